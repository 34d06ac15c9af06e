"""`emu chat`: turns on the terminal or from a pipe, with images and videos in them, and pictures drawn on the way."""

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .documents import read_document
from .generate import draw, print_document
from .reporting import MAX_SEED, describe_error, is_user_error, progress, reports_errors


if TYPE_CHECKING:
    import torch

    from ..modeling_emu import EmuForMultimodalGeneration
    from ..pipeline_emu import EmuPipeline
    from ..processing_emu import EmuProcessor

COMMANDS = {
    "/image": "PATH puts an image or a video into your next turn",
    "/draw": "TEXT draws a picture from the text, beside the conversation, and says where it is",
    "/new": "begins again",
    "/help": "shows these lines",
    "/quit": "leaves, as does the end of the input",
}
NUM_NEW_TOKENS = 128
FOLDER = Path("outputs")


def has_roles(processor: "EmuProcessor") -> bool:
    """Whether the chat template writes who speaks, as that of a tuned model does."""
    user, assistant = (
        processor.apply_chat_template([{"role": role, "content": "x"}], tokenize=False)
        for role in ("user", "assistant")
    )
    return user != assistant


@dataclass
class Chat:
    """A conversation with a model.

    Args:
        model, processor: a pair.
        pipeline: around them, to draw; None where there is no visual decoder.
        generator: of the drawn pictures' noise; None leaves it to chance.
        messages: what was said, in the form of chat templates, images and videos loaded.
        media: image and video parts of the next turn.
    """

    model: "EmuForMultimodalGeneration"
    processor: "EmuProcessor"
    pipeline: "EmuPipeline | None" = None
    generator: "torch.Generator | None" = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    media: list[dict[str, Any]] = field(default_factory=list)

    def take(self, line: str) -> bool:
        """Do what a line says; returns whether the conversation goes on.

        Raises:
            ValueError: for an unknown command, a text that cannot be read, a conversation that is too long.
            OSError: for a file that is not there.
        """
        command, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if not command:
            return True
        if not command.startswith("/"):
            self.answer(line.strip())
        elif command not in COMMANDS:
            raise ValueError(f"command: got {command!r}, expected one of {', '.join(COMMANDS)}")
        elif command in ("/image", "/draw") and not argument:
            raise ValueError(f"{command}: got nothing behind it, expected a {COMMANDS[command].split()[0]}")
        elif command == "/image":
            self.media.append(load_part(argument))
        elif command == "/draw":
            self.draw(argument)
        elif command == "/new":
            self.messages, self.media = [], []
        elif command == "/help":
            print_help()
        return command != "/quit"

    def answer(self, text: str) -> None:
        """Make a turn of the text and the images before it, and print the answer as it comes; on an error nothing is
        added to the conversation."""
        from transformers import TextStreamer

        if self.messages and not self.media and not has_roles(self.processor):
            text = f" {text}"  # what is continued is one text
        turn = {"role": "user", "content": [*self.media, {"type": "text", "text": text}]}
        messages = [*self.messages, turn]
        room = self.processor.tokenizer.model_max_length - self.count_tokens(messages)
        if room < 1:
            limit = self.processor.tokenizer.model_max_length
            raise ValueError(
                f"conversation: got {limit - room} tokens with this turn, expected fewer than {limit}, the context of "
                "the language model; the turn was not taken, and nothing was dropped: /new begins again"
            )
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_frames": None},
        )
        ids = self.model.generate(
            **inputs.to(self.model.device, self.model.dtype),
            max_new_tokens=min(room, NUM_NEW_TOKENS),
            do_sample=False,
            num_beams=1,
            streamer=TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        new_ids = ids[0, inputs["input_ids"].shape[1] :]
        if len(new_ids) == room < NUM_NEW_TOKENS and new_ids[-1] != self.processor.tokenizer.eos_token_id:
            typer.echo("emu: the answer was cut where the model's context ends: /new begins again", err=True)
        said = self.processor.tokenizer.decode(new_ids, skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": said}]}]
        self.media = []

    def count_tokens(self, messages: list[dict[str, Any]]) -> int:
        """How much of the context a conversation takes."""
        from .loading import without_hints

        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        media = [part for message in messages for part in message["content"] if part["type"] != "text"]
        with without_hints():  # a warning of what is refused here
            return self.processor.count_tokens(text, media)

    def draw(self, text: str) -> None:
        """Draw a picture from a text alone, write it, and print where."""
        from .loading import get_drawing_options

        if self.pipeline is None:
            raise ValueError("/draw: got a model without a visual decoder, expected one to draw pictures")
        options = get_drawing_options(self.model.config.variant)
        document = [{"type": "text", "text": text}]
        print_document(draw(self.pipeline, document, generator=self.generator, **options), FOLDER)


def load_part(path: str) -> dict[str, Any]:
    """The image or video of a file as a part of a turn, loaded, so that what cannot be read is said at once."""
    from ..documents_emu import load_image, load_video

    [part] = read_document([str(Path(path).expanduser())])
    if part["type"] == "text":
        raise ValueError(f"/image: got {path!r}, expected the path of an image or a video")
    return (
        {"type": "image", "image": load_image(part["image"])}
        if part["type"] == "image"
        else {"type": "video", "video": load_video(part["video"])}
    )


def print_help() -> None:
    """Say what a line can be."""
    for command, what in COMMANDS.items():
        typer.echo(f"{command:<8}{what}")
    typer.echo(f"{'':<8}Every other line is your turn.")


@reports_errors
def chat(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="DIR", help="Model folder or Hub id.", show_default="the packaged one"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="Makes drawing repeatable.", show_default=False)
    ] = None,
) -> None:
    """Talk with a model: a line is your turn, and the answer follows.

    /image PATH puts an image or a video into the next turn, /draw TEXT draws a picture (into outputs/), /new begins
    again, /help lists these, /quit leaves. Lines may also come from a pipe.
    """
    with progress("Loading the model"):
        from .loading import (
            UNTRAINED,
            find_configuration,
            find_model,
            load_model,
            load_pipeline,
            load_processor,
            seed_everything,
        )

        with_decoder = model is None or (find_configuration(model) / "model_index.json").is_file()
        folder = find_model(model, with_decoder=with_decoder)
        generator = seed_everything(seed)
        if with_decoder:
            pipeline: Any = load_pipeline(folder)
            talk = Chat(pipeline.multimodal_encoder, pipeline.processor, pipeline, generator)
        else:
            talk = Chat(load_model(folder), load_processor(folder), generator=generator)
    if talk.model.config.variant == UNTRAINED:
        typer.echo("This model is UNTRAINED: its weights are random, and so is what it says.", err=True)
    if not has_roles(talk.processor):
        typer.echo("This model is not tuned for conversations: it continues the text so far.", err=True)
    typer.echo("/help lists the commands.", err=True)
    run_chat(talk)


def run_chat(talk: Chat) -> None:
    """Give a conversation one line after the other, until it ends; an error is one line, and the next line follows."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):  # not on every system
            import readline  # noqa: F401  lines can be edited then
    while True:
        try:
            line = input("> " if is_terminal else "")
        except EOFError:
            break
        try:
            if not talk.take(line):
                break
        except Exception as error:
            if not is_user_error(error):
                raise
            typer.echo(describe_error(error), err=True)
