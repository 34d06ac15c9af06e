"""Estimates of what a forward pass keeps for the backward pass, by formulas over a recipe's batches.

Letters of the formulas: bytes of a value in computing (c), in the residual stream (r) and in adapters (a); widths of the
residual stream (W) and of the feed-forward layer (F).
"""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..configuration_emu import EmuConfig
from ..data.interleaved import STRETCH_IMAGES
from ..documents_emu import NUM_VIDEO_FRAMES
from .arguments import EmuTrainingArguments
from .parts import PARTS, get_part
from .recipes import DataArguments, InstructArguments


CAPTION_TOKENS = 64  # of text beside an image or a clip: an assumption, for captions of the web and subtitles


@dataclass(frozen=True)
class Batch:
    """What one process reads in one forward pass.

    Args:
        name: the source.
        num_rows: rows.
        length: positions of a row.
        num_images: images of all rows.
    """

    name: str
    num_rows: int
    length: int
    num_images: int

    @property
    def num_positions(self) -> int:
        """Of all rows."""
        return self.num_rows * self.length


@dataclass(frozen=True)
class Precision:
    """Bytes per value: of computing, of the residual stream, and of computing in adapters, which are float32."""

    computing: int
    residual: int
    adapter: int


def get_batches(arguments: DataArguments, training: EmuTrainingArguments, config: EmuConfig) -> list[Batch]:
    """Estimate the batches of a recipe, one per source: how long its rows are, and how many images they have.

    Pairs have a caption of `CAPTION_TOKENS`, web pages of MMC4 the published stretch, other pages and storyboards fill
    the row with as many tokens of text per image; conversations fill it and have one image.
    """
    longest: int = config.text_config.max_position_embeddings
    if arguments.max_length is not None:
        longest = arguments.max_length
    slots = config.num_image_tokens + 2  # with [IMG] and [/IMG]
    default_rows: int = training.per_device_train_batch_size
    batches = []
    for source in arguments.sources:
        kind = source["kind"]
        num_rows = source.get("batch_size", default_rows)
        images = {"image_text": 1, "video_text": NUM_VIDEO_FRAMES, "mmc4": STRETCH_IMAGES, "instruction": 1}.get(
            kind, longest // (slots + CAPTION_TOKENS)
        )
        length = longest
        if kind in ("image_text", "video_text"):
            document = images * slots + CAPTION_TOKENS + 2
            length = longest if arguments.packing else min(document, longest)
            images *= max(longest // document, 1) if arguments.packing else 1
        batches.append(Batch(source.get("name") or kind, num_rows, length, max(images, 1) * num_rows))
    return batches


def get_precision(model: nn.Module, training: EmuTrainingArguments, is_sharded: bool) -> Precision:
    """Bytes per value: under autocast, layers compute in 16 bits and float32 weights keep the residual stream in 32.

    The layers of a sharded run have their inputs cast.
    """
    half = training.bf16 or training.fp16
    weight = next(parameter for name, parameter in model.named_parameters() if "lora_" not in name).element_size()
    computing = 2 if half else weight
    return Precision(computing, computing if is_sharded else weight, 2 if half else 4)


def get_norm_bytes(width: int, num_readers: int, precision: Precision, is_trained: bool) -> int:
    """Bytes that a root mean square norm and the linear layers that read it keep per position.

    4W for its input in float32; trained, rW for the normed values and cW for what is read, once per reader where
    autocast makes the copies.
    """
    if not is_trained:
        return 4 * width
    num_copies = num_readers if precision.residual != precision.computing else 1
    return (4 + precision.residual + num_copies * precision.computing) * width


def get_decoder_layer_bytes(config: Any, precision: Precision, is_trained: bool, lora_dropout: float | None) -> int:
    """Bytes that one layer of the language model keeps per position, with fused attention.

    Two norms; query and attention's output 2cW, key and value 2cK (K their width); gate twice and up 3cF, and their
    product cF where what reads it is trained. LoRA: 4(a + 1)W, its dropped inputs and where they were dropped.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    key_width = width * (getattr(config, "num_key_value_heads", None) or heads) // heads
    inner = getattr(config, "intermediate_size", None) or 4 * width
    c = precision.computing
    total = get_norm_bytes(width, 3, precision, is_trained) + get_norm_bytes(width, 2, precision, is_trained)
    total += c * (2 * width + 2 * key_width + (4 if is_trained else 3) * inner)
    if lora_dropout is not None:
        total += 4 * width * (precision.adapter + (1 if lora_dropout else 0))
    return total


def get_vision_layer_bytes(config: Any, precision: Precision) -> int:
    """Bytes that one layer of the vision tower keeps per position: two norms, (4 + c)W each; 4cW in attention; 2cF."""
    c = precision.computing
    return 2 * (4 + c) * config.hidden_size + 4 * c * config.hidden_size + 2 * c * config.intermediate_size


def get_causal_former_layer_bytes(config: EmuConfig, precision: Precision) -> int:
    """Bytes that one layer of the causal former keeps per image, N queries looking at P positions.

    Three norms; 4cNI for self-attention (I the width of all heads), c(2N + 2P)I for the other one, 2cHN(N + P) for the
    weights of both and what dropout leaves of them; 3cNF; a byte for each value that dropout may take.
    """
    former, vision, c = config.causal_former_config, config.vision_config, precision.computing
    width, queries, heads = former.hidden_size, former.num_image_tokens, former.num_attention_heads
    inner = heads * former.head_dim
    positions = get_num_patches(vision)
    norms = sum(get_norm_bytes(width, readers, precision, True) for readers in (3, 1, 1))
    total = queries * (norms + c * (4 * inner + 3 * former.intermediate_size) + 3 * width + former.intermediate_size)
    total += c * (2 * queries + 2 * positions) * inner + (2 * c + 1) * heads * queries * (queries + positions)
    num_copies = 2 if precision.residual != c else 0  # of the image features, which both projections read
    return total + num_copies * c * positions * vision.hidden_size


def get_num_patches(vision_config: Any) -> int:
    """Positions of an image in the vision tower, the class token included."""
    return (vision_config.image_size // vision_config.patch_size) ** 2 + 1


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass leaves for the backward pass.

    Args:
        kept: until the backward pass has used them.
        recomputed: of the largest layer, computed again in the backward pass where layers are checkpointed.
    """

    kept: int
    recomputed: int


def compute_activations(
    model: nn.Module, arguments: DataArguments, training: EmuTrainingArguments, precision: Precision, batch: Batch
) -> Activations:
    """Estimate what the networks below the heads keep for the backward pass.

    All layers keep what the formulas above say; checkpointed, each its input, rW per position. Besides: the pixels in
    float32, the norm of the image features and that of the language model. Parts that no gradient passes through keep
    nothing.
    """
    config = cast(EmuConfig, model.config)
    trained = dict.fromkeys(PARTS, False)
    for name, parameter in model.named_parameters():
        trained[get_part(name)] |= parameter.requires_grad
    lora_dropout = arguments.lora_dropout if isinstance(arguments, InstructArguments) else None
    text, vision, former = config.text_config, config.vision_config, config.causal_former_config
    is_text_trained = trained["language_model"] and lora_dropout is None
    image_positions = batch.num_images * get_num_patches(vision)
    text_layer = get_decoder_layer_bytes(text, precision, is_text_trained, lora_dropout)
    # (whether gradients pass, layers, bytes of one, bytes of its input, bytes outside the layers)
    stacks = (
        (
            trained["vision"],
            vision.num_hidden_layers,
            image_positions * get_vision_layer_bytes(vision, precision),
            image_positions * vision.hidden_size * precision.residual,
            batch.num_images * 12 * vision.image_size**2
            + image_positions * (4 + precision.computing) * vision.hidden_size,
        ),
        (
            trained["vision"] or trained["causal_former"],
            former.num_hidden_layers,
            batch.num_images * get_causal_former_layer_bytes(config, precision),
            batch.num_images * former.num_image_tokens * former.hidden_size * precision.residual,
            0,
        ),
        (
            trained["vision"] or trained["causal_former"] or trained["language_model"],
            text.num_hidden_layers,
            batch.num_positions * text_layer,
            batch.num_positions * text.hidden_size * precision.residual,
            batch.num_positions * get_norm_bytes(text.hidden_size, 2, precision, trained["heads"]),
        ),
    )
    active = [stack[1:] for stack in stacks if stack[0]]
    outside = sum(rest for *_, rest in active)
    if not training.activation_checkpointing:
        return Activations(outside + sum(layers * whole for layers, whole, *_ in active), 0)
    kept = outside + sum(layers * given for layers, _, given, _ in active)
    return Activations(kept, max((whole for _, whole, *_ in active), default=0))


def compute_logits(config: EmuConfig, batch: Batch) -> int:
    """Estimate the bytes of both heads' outputs, losses and gradients, where the forward pass ends.

    12 per token of the vocabulary and position: the scores, their copy without the last position and the
    log-probabilities in float32; then these, their gradient and that of the scores. As many for the regression.
    """
    return 3 * 4 * batch.num_positions * (config.text_config.vocab_size + config.text_config.hidden_size)
