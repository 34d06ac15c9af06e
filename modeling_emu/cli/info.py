"""`emu info`: what a model folder holds and what it needs, from its configuration and the headers of its weights; and
what a training recipe needs, from configurations alone."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .reporting import progress, reports_errors
from .train import Settings


if TYPE_CHECKING:
    from ..configuration_emu import EmuConfig
    from ..training.decoder_memory import DecoderConfigs


Shapes = dict[str, Sequence[int]]  # of the tensors in one folder, by name

# Prefix of a tensor's name -> part of the model.
ENCODER_PARTS = {
    "model.vision_model.": "vision tower",
    "model.causal_former.": "causal former",
    "model.language_model.": "language model",
    "lm_head.": "text head",
    "regression_head.": "regression head",
}
# Subfolder with weights -> part of the model.
PART_OF_FOLDER = {"adapter": "adapter", "unet": "U-Net", "vae": "VAE", "safety_checker": "safety checker"}
PUBLISHED = "published"  # as the model of a recipe: the published sizes, without a folder
CARD_SIZES_GB = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)
# What a card must keep free beside weights and cache: activations, the driver, fragments.
FREE_SHARE = 0.1
# Bytes of one quantised weight: int8 values; 4-bit values with a float32 scale per block of 64 (bitsandbytes' nf4).
QUANTISED_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}


# What the columns of a recipe's memory are, by the kind of training.
NOTES = {
    "pretrain": "Weights, gradients and optimizer (its states) are exact; the rest is estimated, for the source that needs "
    "most: copies of weights for computing, activations, and for a moment the heads' outputs or one checkpointed layer. "
    "FSDP2 or ZeRO-3.",
    "decoder": "Weights (with their averages, and the frozen models unless all is precomputed), gradients and optimizer (its "
    "states) are exact; the rest is estimated: copies of weights for computing, activations, and for a moment one "
    "checkpointed layer.",
}


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part.

    Args:
        num_parameters: all of them.
        num_quantisable: those in linear layers that a quantiser may replace.
    """

    num_parameters: int
    num_quantisable: int = 0


def read_shapes(folder: Path) -> Shapes:
    """Read names and shapes of all tensors in a folder's safetensors files, without their values.

    Raises:
        ValueError: if there are none.
    """
    from safetensors import safe_open

    shapes: Shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    if not shapes:
        raise ValueError(f"weights: got no *.safetensors in {str(folder)!r}, expected at least one")
    return shapes


def read_all_shapes(folder: Path) -> dict[str, Shapes]:
    """Read the shapes of a model folder: under "" those at its root, under a subfolder's name those of a part."""
    return {name: read_shapes(folder / name) for name in ("", *PART_OF_FOLDER) if (folder / name).is_dir()}


def fetch_all_shapes(repository: str) -> dict[str, Shapes]:
    """As `read_all_shapes` for a repository of the Hub, of whose weights only the headers are read.

    Raises:
        ValueError: if there are no weights at its root.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    shapes: dict[str, Shapes] = {}
    for file in api.list_repo_files(repository):
        folder, _, name = file.rpartition("/")
        if name.endswith(".safetensors") and folder in ("", *PART_OF_FOLDER):
            tensors = api.parse_safetensors_file_metadata(repository, file).tensors
            shapes.setdefault(folder, {}).update((name, tensor.shape) for name, tensor in tensors.items())
    if "" not in shapes:
        raise ValueError(f"weights: got no *.safetensors in {repository!r}, expected at least one")
    return shapes


def count_parameters(shapes: dict[str, Shapes]) -> dict[str, PartSize]:
    """Count the parameters of each part of a model, from shapes as `read_all_shapes` gives them.

    Raises:
        ValueError: if a tensor at the root belongs to no part.
    """
    totals: Counter[str] = Counter()
    quantisable: Counter[str] = Counter()
    for name, shape in shapes[""].items():
        part = next((part for prefix, part in ENCODER_PARTS.items() if name.startswith(prefix)), None)
        if part is None:
            raise ValueError(f"weights: got the tensor {name!r}, expected names of Emu's parts")
        size = math.prod(shape)
        totals[part] += size
        if name.startswith("model.language_model.layers.") and len(shape) == 2:
            quantisable[part] += size
    for folder, part in PART_OF_FOLDER.items():
        if folder in shapes:
            totals[part] = sum(map(math.prod, shapes[folder].values()))
    return {
        part: PartSize(totals[part], quantisable[part])
        for part in (*ENCODER_PARTS.values(), *PART_OF_FOLDER.values())
        if part in totals
    }


def compute_memory(parts: dict[str, PartSize]) -> dict[str, int]:
    """Compute the bytes of all weights for each dtype; quantised, the linear layers of the language model shrink."""
    total = sum(part.num_parameters for part in parts.values())
    quantisable = sum(part.num_quantisable for part in parts.values())
    memory = {"float32": 4 * total, "bfloat16": 2 * total}
    for name, bytes_per_weight in QUANTISED_BYTES.items():
        memory[name] = 2 * (total - quantisable) + round(bytes_per_weight * quantisable)
    return memory


def compute_cache_bytes(text_config: Any, bytes_per_value: int = 2) -> int:
    """Compute the bytes of keys and values for one row that fills the language model's context."""
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    per_position = 2 * text_config.num_hidden_layers * heads * head_dim * bytes_per_value
    return per_position * text_config.max_position_embeddings


def smallest_card_gb(needed_bytes: int) -> int | None:
    """Give the smallest common card, in GB, that holds this and keeps `FREE_SHARE` free; None where none does."""
    return next((size for size in CARD_SIZES_GB if needed_bytes <= size * 1e9 * (1 - FREE_SHARE)), None)


def describe_sizes(config: Any, folder: Path, parts: dict[str, PartSize]) -> dict[str, str]:
    """Describe the networks of an `EmuConfig` in one line each."""
    vision, former, text = config.vision_config, config.causal_former_config, config.text_config
    sizes = {
        "variant": config.variant,
        "vision tower": f"{vision.num_hidden_layers} layers x {vision.hidden_size}, "
        f"{vision.image_size} px in patches of {vision.patch_size}",
        "causal former": f"{former.num_hidden_layers} layers x {former.hidden_size}, "
        f"{config.num_image_tokens} embeddings per image",
        "language model": f"{text.model_type}, {text.num_hidden_layers} layers x {text.hidden_size}, "
        f"{text.vocab_size:,} tokens, {text.max_position_embeddings:,} positions",
    }
    adapter = folder / "adapter" / "adapter_config.json"
    if adapter.is_file():
        adapter_config = json.loads(adapter.read_text(encoding="utf-8"))
        kind, rank = adapter_config.get("peft_type", "adapter"), adapter_config.get("r")
        sizes["adapter"] = f"{kind}{f' of rank {rank}' if rank else ''}, beside the weights: loading it needs peft"
    unet = folder / "unet" / "config.json"
    if unet.is_file():
        unet_config = json.loads(unet.read_text(encoding="utf-8"))
        sizes["visual decoder"] = (
            f"U-Net {'/'.join(map(str, unet_config['block_out_channels']))}, reads width "
            f"{unet_config['cross_attention_dim']}{'' if 'VAE' in parts else ', works on pixels'}"
        )
    else:
        sizes["visual decoder"] = "none: this folder gives text and embeddings, no pictures"
    return sizes


@reports_errors
def info(
    model: Annotated[str | None, typer.Argument(metavar="[DIR]", help="Model folder or Hub id.")] = None,
    training: Annotated[
        str | None, typer.Option("--training", metavar="RECIPE", help="Say what this recipe's training needs instead.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Say what a model holds: variant, sizes, parameters, memory by dtype, and what a GPU needs.

    Of a model on the Hub, configurations and the headers of the weights are read, not the weights. With --training, the
    same of a recipe: weights, gradients, optimiser states, activations, for one GPU and for many; its model needs no more
    than a config.json, and `--set model=published` stands for the sizes of the published one.
    """
    if training is not None:
        if model is not None:
            raise ValueError(f"emu info: got {model!r} and --training, expected --training alone (--set model=DIR)")
        _print_training(training, settings or [])
        return
    if model is None:
        raise ValueError("emu info: got neither, expected a model's folder or Hub id, or --training RECIPE")
    if settings:
        raise ValueError("--set: got it without --training, expected it with a recipe")
    with progress("Reading the headers"):
        from ..configuration_emu import EmuConfig
        from .loading import find_configuration, is_folder

        folder = find_configuration(model)
        config = EmuConfig.from_pretrained(folder)
        parts = count_parameters(read_all_shapes(folder) if is_folder(model) else fetch_all_shapes(model))
    _print_tables(describe_sizes(config, folder, parts), parts, compute_cache_bytes(config.text_config))


def _print_tables(sizes: dict[str, str], parts: dict[str, PartSize], cache_bytes: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, box=None)
    for name, size in sizes.items():
        table.add_row(name, size)
    console.print(table)

    table = Table("part", "parameters", box=None, title="Parameters", title_justify="left")
    for name, part in parts.items():
        table.add_row(name, f"{part.num_parameters:,}")
    table.add_row("all", f"{sum(part.num_parameters for part in parts.values()):,}")
    console.print(table)

    table = Table("dtype", "weights", "with a full context", "GPU", box=None, title="Memory", title_justify="left")
    for name, weights in compute_memory(parts).items():
        cache = 2 * cache_bytes if name == "float32" else cache_bytes
        card = smallest_card_gb(weights + cache)
        table.add_row(
            name, _readable(weights), _readable(weights + cache), f"{card} GB" if card else "more than one card"
        )
    console.print(table)
    console.print(
        f"int8 and nf4: the linear layers of the language model, all else bfloat16. GPU: the smallest common card that "
        f"keeps {FREE_SHARE:.0%} free for activations. Computed, not measured."
    )


def _readable(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def find_training_configuration(model: str) -> "EmuConfig":
    """Give the configuration of a recipe's model: a folder's or a Hub repository's, or the published sizes.

    Raises:
        ValueError: if there is none.
    """
    from ..configuration_emu import EmuConfig
    from .loading import find_configuration

    if model == PUBLISHED and not Path(model).is_dir():
        return EmuConfig()  # its defaults are the published checkpoint
    try:
        return EmuConfig.from_pretrained(find_configuration(model))
    except ValueError as error:
        raise ValueError(
            f"model of the recipe: got {model!r}, which has no configuration to read ({error}); "
            f"expected --set model=DIR with a config.json, or --set model={PUBLISHED} for the published sizes"
        ) from error


def find_decoder_configurations(model: str, decoder: str | None) -> "DecoderConfigs":
    """Give the configurations of the visual decoder that a recipe starts from: its decoder's, or else its model's.

    With the published sizes as the model, they are the published ones unless the decoder is a folder.

    Raises:
        ValueError: if there are none.
    """
    from huggingface_hub import snapshot_download

    from ..training.decoder_memory import PUBLISHED_DECODER, read_decoder_configs
    from .loading import is_folder

    name = model if decoder is None else decoder
    if PUBLISHED in (model, name) and not Path(name).is_dir():
        return PUBLISHED_DECODER
    try:
        files = [f"{folder}/config.json" for folder in ("unet", "vae")]
        return read_decoder_configs(Path(name if is_folder(name) else snapshot_download(name, allow_patterns=files)))
    except ValueError as error:
        raise ValueError(
            f"visual decoder of the recipe: got {name!r}, which has no configuration to read ({error}); "
            f"expected --set decoder=DIR with a unet/config.json, or --set decoder={PUBLISHED} for the published sizes"
        ) from error


def _print_training(recipe: str, settings: list[str]) -> None:
    with progress("Computing"):
        from ..training.plan import plan_training

        plan = plan_training(recipe, settings, find_training_configuration, find_decoder_configurations)
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"emu train {plan.kind} --recipe {recipe}: {plan.num_parameters:,} parameters, {plan.num_trained:,} trained"
    )
    table = Table("source", "rows", "length", "images", box=None, title="A process reads", title_justify="left")
    for batch in plan.batches:
        table.add_row(batch.name, *(f"{size:,}" for size in (batch.num_rows, batch.length, batch.num_images)))
    console.print(table)
    columns = ("weights", "gradients", "optimizer", "copies", "activations", "moment", "total")
    unit, divisor = ("GB", 1e9) if max(memory.total for memory in plan.memory.values()) >= 1e9 else ("MB", 1e6)
    title = f"Memory of a process, {unit}"
    table = Table("GPUs", *columns, "each", box=None, title=title, title_justify="left", padding=(0, 1, 0, 0))
    for name, memory in plan.memory.items():
        card = smallest_card_gb(memory.total)
        sizes = [f"{getattr(memory, column) / divisor:,.1f}" for column in columns]
        table.add_row(name, *sizes, f"{card} GB" if card else "none")
    console.print(table)
    console.print(
        f"{NOTES.get(plan.kind, NOTES['pretrain'])} Each: the smallest common card that keeps {FREE_SHARE:.0%} free. "
        "Computed, not measured."
    )
