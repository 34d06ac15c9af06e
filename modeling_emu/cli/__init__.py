"""The `emu` command: it parses, calls and prints.

Nothing here imports torch, transformers or diffusers before a command runs, so that `emu --help` answers at once.
"""

import typer

from .chat import chat
from .demo import demo
from .evaluate import evaluate
from .generate import generate
from .hub import hub
from .info import info
from .train import train


app = typer.Typer(
    name="emu",
    help="Emu reads text, images and video in any order and continues them with text, with images or with both.",
    epilog="Errors are one line; EMU_TRACEBACK=1 shows where they come from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (generate, chat, info, demo):
    app.command()(command)
app.add_typer(train)
app.add_typer(evaluate)
app.add_typer(hub)


def main() -> None:
    """Entry point of the console script."""
    app()
