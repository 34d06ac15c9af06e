"""`emu train`: a recipe to a trained model, in one process or in as many as torchrun or accelerate start."""

import os
from pathlib import Path
from typing import Annotated

import typer

from .reporting import reports_errors


Recipe = Annotated[str, typer.Option("--recipe", metavar="FILE", help="YAML file, or the name of a packaged recipe.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replaces a value of the recipe; repeatable.")
]

train = typer.Typer(
    name="train",
    help="Train from a recipe: TrainingArguments' own names, and what Emu needs besides.",
    no_args_is_help=True,
)


@train.command()
@reports_errors
def pretrain(recipe: Recipe, settings: Settings = None) -> None:
    """Train on documents of text, images and video, with both losses."""
    from ..training.recipes import PretrainArguments, parse_recipe
    from ..training.run import pretrain as run_pretrain

    _say_where(run_pretrain(*parse_recipe(recipe, settings or [], PretrainArguments)))


@train.command()
@reports_errors
def instruct(recipe: Recipe, settings: Settings = None) -> None:
    """Tune on conversations: LoRA on the language model, loss on the answers."""
    from ..training.recipes import InstructArguments, parse_recipe
    from ..training.run import instruct as run_instruct

    _say_where(run_instruct(*parse_recipe(recipe, settings or [], InstructArguments)))


@train.command()
@reports_errors
def decoder(recipe: Recipe, settings: Settings = None) -> None:
    """Train the visual decoder's U-Net on embeddings of the frozen model."""
    from ..training.decoder_arguments import DecoderArguments, DecoderTrainingArguments
    from ..training.decoder_run import train_decoder
    from ..training.recipes import parse_as

    _say_where(train_decoder(*parse_as(recipe, settings or [], DecoderArguments, DecoderTrainingArguments)))


@train.command()
@reports_errors
def tiny(
    output: Annotated[Path, typer.Option("--output", help="Folder to work in; a run that was stopped goes on there.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of data, weights and training.")] = 0,
    scale: Annotated[float, typer.Option("--scale", help="Share of the steps and documents, to try it.")] = 1.0,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="They divide each batch: one per core, or per GPU.")
    ] = 1,
) -> None:
    """Train the small model that comes along: data, vision tower, pretraining, tuning, visual decoder."""
    from ..training.tiny import train_tiny

    _say_where(train_tiny(output, seed, scale, processes))


def _say_where(folder: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        typer.echo(folder)
