"""`emu generate`: a document from the command line, continued with text, with images, or with both in turn."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .documents import check_output, read_document, write_images
from .reporting import MAX_SEED, progress, reports_errors


if TYPE_CHECKING:
    from transformers import BatchFeature

    from ..modeling_emu import EmuForMultimodalGeneration
    from ..pipeline_emu import EmuPipeline
    from ..processing_emu import EmuProcessor

SAMPLING = "Sampling"
DECODER = "Visual decoder"
# Options that have a meaning in some modes only.
TEXT_OPTIONS = [
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "length_penalty",
]
DECODER_OPTIONS = ["num_inference_steps", "guidance_scale", "height", "width", "negative_prompt"]
OPTIONS_OF_MODE = {
    "text": (*TEXT_OPTIONS,),
    "image": (*DECODER_OPTIONS, "num_images_per_prompt", "output"),
    "interleaved": (
        *(option for option in TEXT_OPTIONS if option not in ("num_beams", "length_penalty")),
        *DECODER_OPTIONS,
        "max_images",
        "output",
    ),
}
DEFAULT_NEW_TOKENS = {"text": 64, "interleaved": 512}
OPTION_NAMES = {"num_inference_steps": "--steps", "num_images_per_prompt": "--num-images"}


@reports_errors
def generate(
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="PART...", help="Texts, and paths of images and videos, in reading order.", show_default=False
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="DIR", help="Model folder or Hub id.", show_default="the packaged one"),
    ] = None,
    mode: Annotated[
        Literal["text", "image", "interleaved"],
        typer.Option(
            help="What to continue the document with. Interleaved: text, and an image where the model starts one, which "
            "the published weights never do."
        ),
    ] = "text",
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_SEED, help="Makes sampling and drawing repeatable.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where PNGs go.", show_default="outputs")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as the weights are stored.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto: CUDA, else MPS, else the CPU.")] = "auto",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="64 in text mode, else 512.", show_default=False, rich_help_panel=SAMPLING),
    ] = None,
    min_new_tokens: Annotated[int | None, typer.Option(min=0, rich_help_panel=SAMPLING)] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Text only.", rich_help_panel=SAMPLING)] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Samples; 0 takes the best token.", rich_help_panel=SAMPLING)
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Samples.", rich_help_panel=SAMPLING)] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Samples.", rich_help_panel=SAMPLING)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(rich_help_panel=SAMPLING)] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Of beams.", rich_help_panel=SAMPLING)] = None,
    max_images: Annotated[int | None, typer.Option(min=1, help="Interleaved only.", rich_help_panel=SAMPLING)] = None,
    steps: Annotated[int | None, typer.Option(min=1, rich_help_panel=DECODER)] = None,
    guidance_scale: Annotated[float | None, typer.Option(rich_help_panel=DECODER)] = None,
    height: Annotated[int | None, typer.Option(min=1, help="In pixels.", rich_help_panel=DECODER)] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels.", rich_help_panel=DECODER)] = None,
    num_images: Annotated[int | None, typer.Option(min=1, help="Image mode only.", rich_help_panel=DECODER)] = None,
    negative_prompt: Annotated[str | None, typer.Option(metavar="TEXT", rich_help_panel=DECODER)] = None,
) -> None:
    """Continue a document of texts, images and videos.

    A PART that ends in the suffix of an image or a video must be a file; every other PART is text.
    Text is printed, images are written as PNG files, whose paths are printed.

    In text mode, a model that was tuned for conversations takes a document that begins or ends in text as the user's
    turn, and answers; images alone, or with texts between them, it continues as they are, as it does in other modes.
    """
    given = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "num_beams": num_beams,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "length_penalty": length_penalty,
        "max_images": max_images,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "num_images_per_prompt": num_images,
        "negative_prompt": negative_prompt,
        "output": output,
    }
    options = select_options(mode, given)
    folder = options.pop("output", Path("outputs"))
    check_output(folder)
    document = read_document(parts)
    with progress("Reading the document"):
        from .loading import (
            find_model,
            get_drawing_options,
            load_model,
            load_pipeline,
            load_processor,
            seed_everything,
        )

        path = find_model(model, with_decoder=mode != "text")
        processor = load_processor(path)
        # Before the weights are loaded: what cannot be read is said at once.
        inputs = encode_prompt(processor, document) if mode == "text" else processor(documents=[document])
    generator = seed_everything(seed)
    if mode == "text":
        with progress("Loading the model"):
            emu = load_model(path, dtype, device)
        with progress("Generating"):
            text = continue_with_text(emu, processor, inputs, options)
        typer.echo(text)
        return

    with progress("Loading the model"):
        pipeline: Any = load_pipeline(path, dtype, device)
    options = get_drawing_options(pipeline.multimodal_encoder.config.variant) | options
    if mode == "image":
        result = draw(pipeline, document, generator=generator, **options)
    else:
        result = pipeline.generate_document(document, generator=generator, **options)
    print_document(result, folder)


def select_options(mode: str, given: dict[str, Any]) -> dict[str, Any]:
    """Take the options that were given, with the defaults of the mode, in the words of `generate()` and the pipeline.

    Raises:
        ValueError: if one of them has no meaning in this mode or beside the others.
    """
    options = {name: value for name, value in given.items() if value is not None}
    for name, value in options.items():
        if name not in OPTIONS_OF_MODE[mode]:
            option = OPTION_NAMES.get(name, "--" + name.replace("_", "-"))
            modes = " or ".join(f"--mode {other}" for other, names in OPTIONS_OF_MODE.items() if name in names)
            raise ValueError(f"{option}: got {value} with --mode {mode}, expected it with {modes} only")
    if mode in DEFAULT_NEW_TOKENS:
        options.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS[mode])
    _check_values(options)
    if mode in DEFAULT_NEW_TOKENS:
        if options.get("temperature") == 0:
            options.pop("temperature")
            options["do_sample"] = False
        elif options.keys() & {"temperature", "top_p", "top_k"}:
            options["do_sample"] = True
    return options


def _check_values(options: dict[str, Any]) -> None:
    """Refuse numbers that are none, and options that contradict each other."""
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected a finite number")
    if "length_penalty" in options and options.get("num_beams", 1) == 1:
        raise ValueError(
            f"--length-penalty: got {options['length_penalty']} without beams, expected it with --num-beams above 1"
        )
    if options.get("repetition_penalty", 1) <= 0:
        raise ValueError(f"--repetition-penalty: got {options['repetition_penalty']}, expected a number above 0")
    smallest, largest = options.get("min_new_tokens", 0), options.get("max_new_tokens", math.inf)
    if smallest > largest:
        raise ValueError(f"--min-new-tokens: got {smallest}, expected at most {largest}, the --max-new-tokens")


def encode_prompt(processor: "EmuProcessor", document: list[dict[str, Any]]) -> "BatchFeature":
    """Encode a document in the prompt form of the processor's variant.

    A document that neither begins nor ends in text asks nothing: a picture to be described, or a pattern of pictures and
    texts to be completed. It is encoded as it is, since a chat template would make a user's turn of it.
    """
    if "text" not in (document[0]["type"], document[-1]["type"]):
        return processor(documents=[document], return_tensors="pt")
    return processor.apply_chat_template(
        [{"role": "user", "content": document}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def continue_with_text(
    model: "EmuForMultimodalGeneration", processor: "EmuProcessor", inputs: "BatchFeature", options: dict[str, Any]
) -> str:
    """Continue an encoded document with text."""
    ids = model.generate(**inputs.to(model.device, model.dtype), **options)
    new_ids = ids[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new_ids, skip_special_tokens=True)[0].strip()


def draw(pipeline: "EmuPipeline", document: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """Draw the picture that follows a document; options as the pipeline takes them.

    Returns:
        Its image parts, each with what the safety checker says of it.
    """
    drawn: Any = pipeline(document, **options)
    flags = drawn.nsfw_content_detected or [False] * len(drawn.images)
    return [
        {"type": "image", "image": image, "nsfw_content_detected": flag}
        for image, flag in zip(drawn.images, flags, strict=True)
    ]


def print_document(document: list[dict[str, Any]], folder: Path) -> None:
    """Write the images of a document, then print its texts and the paths of its images, in order."""
    if num_blacked := sum(part.get("nsfw_content_detected", False) for part in document):
        typer.echo(f"The safety checker made {num_blacked} of the pictures black.", err=True)
    paths = iter(write_images([part["image"] for part in document if part["type"] == "image"], folder))
    for part in document:
        typer.echo(part["text"].strip() if part["type"] == "text" else next(paths))
