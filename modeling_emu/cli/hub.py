"""`emu hub`: the folder of a model as the repository that the Hub gets."""

import os
from pathlib import Path
from typing import Annotated

import typer

from .reporting import progress, reports_errors


hub = typer.Typer(name="hub", help="Make the folders that go to the Hub.", no_args_is_help=True)


@hub.command()
@reports_errors
def assemble(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="New or empty folder.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="DIR",
            help="Folder with configurations, tokenizer, weights and a model card (README.md).",
            show_default="the packaged one",
        ),
    ] = None,
) -> None:
    """Write the publishable repository of a model: its weights, with code, licence and model card.

    AutoModel and DiffusionPipeline load it with trust_remote_code=True. It appears whole or not at all.
    """
    with progress("Writing the repository"):
        from .loading import EMU_TINY, find_configuration, without_hints

        if model is not None and not os.path.isdir(model):
            raise ValueError(f"--model: got {model!r}, expected an existing folder")
        source = find_configuration(str(EMU_TINY) if model is None else model)
        with without_hints():
            from ..hub.assembly import assemble_repository

            assemble_repository(source, output)
    typer.echo(output)
