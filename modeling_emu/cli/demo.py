"""`emu demo`: what Emu does, shown on a picture that is drawn here, with the model that comes along."""

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .documents import check_output, write_images
from .generate import continue_with_text, encode_prompt
from .reporting import MAX_SEED, progress, reports_errors


if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = {"red": (214, 64, 54), "green": (62, 158, 84), "blue": (56, 108, 214), "yellow": (236, 190, 60)}
PICTURE_SIZE = 224
NUM_NEW_TOKENS = 12
NUM_STEPS = 10


def draw_picture(colour: str) -> "Image":
    """Draw a disc of this colour on a light ground, `PICTURE_SIZE` pixels square."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), (240, 238, 232))
    margin = PICTURE_SIZE // 5
    ImageDraw.Draw(picture).ellipse((margin, margin, PICTURE_SIZE - margin, PICTURE_SIZE - margin), COLOURS[colour])
    return picture


def make_sheet(pictures: dict[str, "Image"]) -> "Image":
    """Put pictures beside each other, each with its title above."""
    from PIL import Image, ImageDraw

    margin, line = 12, 20
    sheet = Image.new(
        "RGB", (margin + len(pictures) * (PICTURE_SIZE + margin), PICTURE_SIZE + line + 2 * margin), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    for column, (title, picture) in enumerate(pictures.items()):
        left = margin + column * (PICTURE_SIZE + margin)
        draw.text((left, margin), title, fill=(40, 40, 40))
        sheet.paste(picture.convert("RGB").resize((PICTURE_SIZE, PICTURE_SIZE)), (left, margin + line))
    return sheet


@reports_errors
def demo(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="DIR", help="Model folder or Hub id.", show_default="the packaged one"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Chooses the picture, and makes the drawing repeatable.")
    ] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the PNG goes.")] = Path(
        "outputs"
    ),
) -> None:
    """Continue a text, describe a picture, draw one, and write both pictures on one sheet."""
    check_output(output)
    with progress("Loading the model"):
        from .loading import UNTRAINED, find_model, load_pipeline, seed_everything

        pipeline: Any = load_pipeline(find_model(model, with_decoder=True))
        generator = seed_everything(seed)
    emu, processor = pipeline.multimodal_encoder, pipeline.processor
    colour = random.Random(seed).choice(sorted(COLOURS))
    picture, prompt = draw_picture(colour), f"a {colour} disc"

    def tell(title: str, document: list[dict[str, Any]]) -> None:
        options = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False}
        text = continue_with_text(emu, processor, encode_prompt(processor, document), options)
        typer.echo(f"{title:<28}{text!r}")

    if emu.config.variant == UNTRAINED:
        typer.echo(
            "This model is UNTRAINED: its weights are random, so texts and pictures are noise. It shows the way."
        )
    tell(f"text after {prompt!r}:", [{"type": "text", "text": prompt}])
    tell("text after the picture:", [{"type": "image", "image": picture}, {"type": "text", "text": "the image shows"}])
    drawn = pipeline([{"type": "text", "text": prompt}], num_inference_steps=NUM_STEPS, generator=generator).images[0]
    sheet = make_sheet({"given": picture, f"drawn after {prompt!r}": drawn})
    typer.echo(f"{'pictures:':<28}{write_images([sheet], output)[0]}")
