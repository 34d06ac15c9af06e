"""`emu evaluate`: a model on a benchmark, with a report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .documents import check_output as check_folder
from .reporting import MAX_SEED, progress, reports_errors


if TYPE_CHECKING:
    from ..evaluation import Report

FORMATS = (".json", ".md")

evaluate = typer.Typer(
    name="evaluate", help="Evaluate a model on a benchmark, each with its baselines.", no_args_is_help=True
)


@evaluate.callback()
def choose_benchmark() -> None:
    """Without it, a single benchmark would need no name."""


@evaluate.command()
@reports_errors
def shapes(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="DIR", help="Model folder or Hub id.", show_default="the packaged one"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of scenes, pictures and noise; the same gives the same report.")
    ] = 0,
    num_samples: Annotated[int, typer.Option(min=2, help="Tasks per ability.")] = 200,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Writes the report as .json or .md; repeatable.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto: CUDA, else MPS, else the CPU.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as the weights are stored.")
    ] = "auto",
) -> None:
    """Captions, answers, pictures, patterns, blends, stories and dialogues in a small world with exact answers."""
    files = output or []
    check_files(files)
    with progress("Loading the model"):
        from ..evaluation import evaluate_shapes
        from .loading import find_model, load_pipeline

        pipeline = load_pipeline(find_model(model, with_decoder=True), dtype, device)
    pipeline.set_progress_bar_config(disable=True)
    report = evaluate_shapes(pipeline, num_samples, seed, on_ability=say_duration)
    write_report(report, files)


def check_files(files: list[Path]) -> None:
    """Refuse files that cannot be written, or not as a report, before anything is computed for them.

    Raises:
        ValueError: if one has another suffix, exists, or is given twice.
    """
    from ..hub.outputs import check_output

    for file in files:
        if file.suffix not in FORMATS:
            raise ValueError(f"--output: got {str(file)!r}, expected a file that ends in one of {', '.join(FORMATS)}")
        check_output(file)
        check_folder(file.parent)
    if len(set(files)) < len(files):
        raise ValueError(f"--output: got {[str(file) for file in files]}, expected each file once")


def say_duration(ability: str, duration_s: float) -> None:
    """Say on stderr how long an ability took."""
    typer.echo(f"{ability}: {duration_s:.1f} s", err=True)


def write_report(report: "Report", files: list[Path]) -> None:
    """Write the report in the formats of the files, then print it as a table."""
    from rich.console import Console

    from ..hub.outputs import whole_file

    for file in files:
        with whole_file(file) as path:
            path.write_text(report.to_json() if file.suffix == ".json" else report.to_markdown(), encoding="utf-8")
    Console().print(report.to_table())
