"""`emu demo`: what Emu does, on scenes of the shapes' world that it draws from a seed, with the model that comes along."""

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .documents import check_output, write_images
from .reporting import MAX_SEED, progress, reports_errors
from .sheet import Row, make_sheet


if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation.shapes import Ability
    from ..pipeline_emu import EmuPipeline
    from ..shapes.documents import Task

PICTURE_PARTS = ("count", "shapes", "colours", "sizes", "places")  # of the checker's verdict
MAX_LETTERS = 300  # of a text on the terminal: more than any text of the shapes' world


@reports_errors
def demo(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="DIR", help="Model folder or Hub id.", show_default="the packaged one"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of what the model is asked, and of its drawings.")
    ] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the PNG goes.")] = Path(
        "outputs"
    ),
) -> None:
    """Describe, answer, watch, draw, blend, continue patterns and tell a story, each once, and write all on one sheet.

    Scenes of simple shapes are drawn from the seed, so that every answer and picture can be checked without a model.
    """
    check_output(output)
    start = time.perf_counter()
    with progress("Loading the model"):
        from rich.console import Console

        from .loading import find_model, load_pipeline

        pipeline: Any = load_pipeline(find_model(model, with_decoder=True))
        from ..evaluation.shapes import ABILITIES
    pipeline.set_progress_bar_config(disable=True)
    console = Console(highlight=False)
    if notice := describe_model(pipeline.multimodal_encoder.config.variant):
        console.print(notice, markup=False)
    rows = []
    for ability in ABILITIES:
        rows.append(show(pipeline, ability, seed))
        print_row(console, rows[-1])
    summary = f"{sum(row.is_right is True for row in rows)} of {len(rows)} right"
    [path] = write_images([make_sheet(f"emu demo, seed {seed}: {summary}", rows)], output)
    console.print(f"\n{summary}, in {time.perf_counter() - start:.0f} s. Sheet:")
    typer.echo(path)


def describe_model(variant: str) -> str:
    """What to know of a model that was not trained in the shapes' world; empty for the one that was."""
    from .loading import TINY, UNTRAINED

    if variant == UNTRAINED:
        return "This model is UNTRAINED: its weights are random, so texts and pictures are noise. It shows the way."
    if variant != TINY:
        return f"This model ({variant}) was not trained in the shapes' world: what it says and draws is shown as it comes."
    return ""


def show(pipeline: "EmuPipeline", ability: "Ability", seed: int) -> Row:
    """Ask a model for one thing and judge what comes, whatever it is."""
    from ..evaluation.shapes import ask, draw_tasks

    [task] = draw_tasks(ability.kind, ability.split, 1, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an image that was cut short: what came is shown
        [answer] = ask(pipeline, [task], seed)
    is_right, verdict = judge_answer(task, answer)
    given, right = list(task.prompt), list(task.target)
    if task.kind == "dialogue":  # questions are among what is given, answers beside what is right
        given, right = [*given, *right[1::2]], right[::2]
    elif task.kind == "story":
        right = [{"type": "text", "text": "each picture as its text says, and one event after the other"}]
    return Row(ability.name, verdict, is_right, given, make_document(answer), right)


def make_document(answer: Any) -> list[dict[str, Any]]:
    """An answer as a document: a text, the texts of a dialogue's turns, a picture, or a document."""
    if isinstance(answer, list):
        return answer
    if isinstance(answer, str | tuple):
        texts = [answer] if isinstance(answer, str) else answer
        return [{"type": "text", "text": text} for text in texts]
    return [{"type": "image", "image": answer}]


def judge_answer(task: "Task", answer: Any) -> tuple[bool | None, str]:
    """Whether an answer is right, None where the checker cannot read pictures of this size, and the same in words."""
    from ..evaluation.shapes import DRAWN_KINDS, is_right
    from ..shapes.checker import judge

    if not all(can_read(part["image"]) for part in make_document(answer) if part["type"] == "image"):
        return None, "not judged: the checker cannot read pictures of this size"
    if task.kind not in DRAWN_KINDS:
        right = is_right(task, answer)
        return right, "right" if right else "wrong"
    expected: Any = task.expected
    verdict = judge(expected, answer)
    if verdict.right:
        return True, "right"
    wrong = [part for part in PICTURE_PARTS if not getattr(verdict, part)]
    if len(wrong) == len(PICTURE_PARTS):
        return False, "wrong"
    return False, f"wrong: {', '.join(wrong) or 'which belongs to which, or something else is there'}"


def can_read(image: Any) -> bool:
    """Whether the checker reads pictures of this size."""
    from ..shapes.render import CANVAS_SIZE

    return image.width == image.height and image.width % CANVAS_SIZE == 0


def describe_document(document: list[dict[str, Any]]) -> str:
    """A document in words, one part per line, pictures as the checker reads them."""
    from ..shapes.captions import join_items
    from ..shapes.checker import read_scene

    lines = []
    for part in document:
        if part["type"] == "text":
            text = " ".join(part["text"].split())
            lines.append(text if len(text) <= MAX_LETTERS else f"{text[:MAX_LETTERS]}...")
        elif part["type"] == "video":
            lines.append(f"[video of {len(part['video'])} frames]")
        else:
            scene = read_scene(part["image"]) if can_read(part["image"]) else None
            lines.append(f"[picture: {'nothing clear' if scene is None else join_items(scene)}]")
    return "\n".join(lines)


def print_row(console: "Console", row: Row) -> None:
    """Print what was given, answered and right, and the verdict."""
    from rich.table import Table
    from rich.text import Text

    style = {True: "bold green", False: "bold red", None: "bold"}[row.is_right]
    console.print(Text.assemble("\n", (row.title, "bold"), "  ", (row.verdict, style)))
    table = Table.grid(padding=(0, 2))
    for name, document in (("given", row.given), ("the model", row.answered), ("right", row.right)):
        table.add_row(Text(f"  {name}", "dim"), Text(describe_document(document)))
    console.print(table)
