"""What training the visual decoder needs in memory, per process, from configurations alone.

Exact: weights, their averages, the frozen models, gradients and AdamW's states. Estimated, by formulas per picture: what a
forward pass of the U-Net keeps. Letters: bytes of a value in computing (c) and in norms (n), P positions of a feature map,
N slots of the condition of width D.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, Transformer2DModel, UNet2DConditionModel
from torch import nn

from ..configuration_emu import EmuConfig
from ..modeling_emu import EmuForMultimodalGeneration
from .activations import Activations
from .decoder_arguments import DecoderArguments, DecoderTrainingArguments
from .memory import Memory, compare_with_free, find_dtype, get_free_bytes


# Stable Diffusion 1.5's unet/config.json, but for the width of what it reads, which is the published Emu's; the rest is
# what UNet2DConditionModel has by default.
PUBLISHED_UNET = {"sample_size": 64, "cross_attention_dim": 5120}
# Stable Diffusion 1.5's vae/config.json, likewise.
PUBLISHED_VAE = {
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
FLOAT32 = 4  # bytes: of the U-Net's weights, whatever it computes in
ADAMW_STATES = 2  # per weight


@dataclass(frozen=True)
class DecoderConfigs:
    """The configurations of a visual decoder's networks.

    Args:
        unet: as in `unet/config.json`.
        vae: as in `vae/config.json`; None for a U-Net that works on pixels.
    """

    unet: dict[str, Any]
    vae: dict[str, Any] | None


PUBLISHED_DECODER = DecoderConfigs(PUBLISHED_UNET, PUBLISHED_VAE)


def read_decoder_configs(folder: Path) -> DecoderConfigs:
    """Read them from a visual decoder's folder.

    Raises:
        ValueError: if it has no U-Net.
    """
    unet, vae = (folder / name / "config.json" for name in ("unet", "vae"))
    if not unet.is_file():
        raise ValueError(f"visual decoder: got {str(folder)!r}, which has no unet/config.json, expected one")
    return DecoderConfigs(json.loads(unet.read_text()), json.loads(vae.read_text()) if vae.is_file() else None)


@dataclass(frozen=True)
class DecoderNetworks:
    """What trains and what is frozen, on the meta device: names and shapes, no numbers.

    Args:
        emu: frozen.
        unet: what is trained, in float32.
        vae: frozen; None for a U-Net that works on pixels.
        dtype: of the frozen models.
    """

    emu: EmuForMultimodalGeneration
    unet: UNet2DConditionModel
    vae: AutoencoderKL | None
    dtype: torch.dtype

    @property
    def frozen(self) -> list[nn.Parameter]:
        """The weights of Emu and the VAE."""
        return [*self.emu.parameters(), *(() if self.vae is None else self.vae.parameters())]

    @property
    def frozen_bytes(self) -> int:
        """Of these weights."""
        return self.dtype.itemsize * sum(parameter.numel() for parameter in self.frozen)

    @property
    def num_parameters(self) -> int:
        """Of all networks."""
        return sum(parameter.numel() for parameter in (*self.frozen, *self.unet.parameters()))


def build_empty_decoder(config: EmuConfig, decoder: DecoderConfigs, arguments: DecoderArguments) -> DecoderNetworks:
    """Build the networks of a recipe on the meta device.

    Args:
        config: of the Emu that the recipe names.
        decoder: of the visual decoder that it starts from.

    Raises:
        ValueError: for an unknown dtype, or a U-Net that reads embeddings of another width.
    """
    width = config.text_config.hidden_size
    if (got := decoder.unet.get("cross_attention_dim")) != width:
        raise ValueError(
            f"cross_attention_dim of the U-Net: got {got}, expected {width}, the width of the model's embeddings"
        )
    dtype = find_dtype(config, arguments.dtype)
    with torch.device("meta"):
        emu = EmuForMultimodalGeneration(EmuConfig.from_dict(config.to_dict()))
        unet = UNet2DConditionModel.from_config(decoder.unet)
        vae = None if decoder.vae is None else AutoencoderKL.from_config(decoder.vae)
    return DecoderNetworks(emu, unet, vae, dtype)


@dataclass(frozen=True)
class DecoderPrecision:
    """Bytes per value: of computing, and in norms, which autocast leaves in float32 on a GPU."""

    computing: int
    norms: int = FLOAT32


@dataclass(frozen=True)
class Layer:
    """A piece of the U-Net.

    Args:
        kept: bytes that it keeps for the backward pass, per picture.
        given: bytes of its input, which is all that it keeps where it is checkpointed.
        module: what gradient checkpointing computes again as a whole; None where it leaves this piece as it is.
    """

    kept: int
    given: int = 0
    module: nn.Module | None = None


def get_resnet_bytes(resnet: Any, positions: int, time_width: int, precision: DecoderPrecision) -> int:
    """Bytes that a residual block from I to O channels keeps: (2n + c)(I + O)P, and the time's embedding.

    Each of its two convolutions comes after a norm and an activation: n for what either reads, c for what the
    convolution does. A projected shortcut reads the input in c.
    """
    c, n = precision.computing, precision.norms
    total = positions * (2 * n + c) * (resnet.in_channels + resnet.out_channels) + c * time_width
    if resnet.conv_shortcut is not None and n != c:
        total += positions * c * resnet.in_channels
    return total


def get_transformer_block_bytes(
    block: Any, positions: int, condition: tuple[int, int], precision: DecoderPrecision
) -> int:
    """Bytes that a transformer block of width W and inner width F keeps, with fused attention.

    Three norms 3nWP; what linear layers read of them (r + 2)cWP, r being 3 where autocast makes a copy for each of query,
    key and value, else 1; query and output of two attentions, key and value of the first, 6cWP; key and value of the
    condition 2cWN, and its two copies 2cND under autocast; 4cFP for the gated layer.
    """
    c, n = precision.computing, precision.norms
    (slots, condition_width), width, inner = condition, block.attn1.inner_dim, block.ff.net[-1].in_features
    readers = 3 if n != c else 1
    total = positions * (3 * n * width + (readers + 8) * c * width + 4 * c * inner)
    return total + 2 * c * slots * (width + (condition_width if n != c else 0))


def get_block_layers(
    block: Any, positions: int, time_width: int, condition: tuple[int, int], precision: DecoderPrecision
) -> Iterator[Layer]:
    """Give the residual blocks and transformers of one of the U-Net's blocks."""
    c, n = precision.computing, precision.norms
    for resnet in block.resnets:
        given = c * resnet.in_channels * positions
        yield Layer(get_resnet_bytes(resnet, positions, time_width, precision), given, resnet)
    for attention in getattr(block, "attentions", ()):
        if isinstance(attention, Transformer2DModel):
            # its norm, and what its projections into the blocks and out of them read
            yield Layer(positions * ((n + c) * attention.in_channels + c * attention.inner_dim))
            for inner in attention.transformer_blocks:
                kept = get_transformer_block_bytes(inner, positions, condition, precision)
                yield Layer(kept, c * attention.inner_dim * positions, inner)


def iterate_layers(
    unet: UNet2DConditionModel, condition: tuple[int, int], precision: DecoderPrecision
) -> Iterator[Layer]:
    """Give all pieces of the U-Net, from its first convolution to the loss.

    Besides the blocks: what the convolutions between resolutions read, cCP; the two at the ends with the last norm; the
    prediction and its target in float32. Attention of another kind than Stable Diffusion's counts as nothing.

    Args:
        condition: its slots N and their width D.
    """
    c, n, config = precision.computing, precision.norms, unet.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    sizes, first = [(height, width)], config.block_out_channels[0]
    rest = (4 * first, condition, precision)
    pixels = height * width
    yield Layer(pixels * (c * config.in_channels + (2 * n + c) * first + 2 * FLOAT32 * config.out_channels))
    for block in unet.down_blocks:
        height, width = sizes[-1]
        yield from get_block_layers(block, height * width, *rest)
        if block.downsamplers is not None:
            yield Layer(c * block.resnets[-1].out_channels * height * width)
            sizes.append(((height + 1) // 2, (width + 1) // 2))
    height, width = sizes[-1]
    if unet.mid_block is not None:
        begin, *others = get_block_layers(unet.mid_block, height * width, *rest)
        yield Layer(begin.kept)  # diffusers does not checkpoint it
        yield from others
    for block in unet.up_blocks:
        height, width = sizes[-1]
        yield from get_block_layers(block, height * width, *rest)
        if block.upsamplers is not None:
            sizes.pop()
            yield Layer(c * block.resnets[-1].out_channels * sizes[-1][0] * sizes[-1][1])


def count_weights(module: nn.Module) -> int:
    """Numbers in the weights that autocast copies: those of linear layers and convolutions."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def compute_unet_activations(
    unet: UNet2DConditionModel, training: DecoderTrainingArguments, condition: tuple[int, int]
) -> tuple[Activations, int]:
    """Estimate what a forward pass of the U-Net keeps, and the bytes of weights in 16 bits among it.

    Checkpointed, residual and transformer blocks keep their inputs, and one at a time is computed again, with the copies
    of its weights.

    Args:
        condition: its slots N and their width D.
    """
    half = training.bf16 or training.fp16
    precision = DecoderPrecision(2 if half else FLOAT32)
    kept = recomputed = 0
    num_copied = count_weights(unet) if half else 0
    for layer in iterate_layers(unet, condition, precision):
        whole = training.per_device_train_batch_size * layer.kept
        if layer.module is None or not training.gradient_checkpointing:
            kept += whole
            continue
        kept += training.per_device_train_batch_size * layer.given
        copies = count_weights(layer.module) if half else 0
        num_copied -= copies
        recomputed = max(recomputed, whole + 2 * copies)
    return Activations(kept, recomputed), 2 * num_copied


def compute_decoder_memory(
    networks: DecoderNetworks, arguments: DecoderArguments, training: DecoderTrainingArguments, num_processes: int
) -> Memory:
    """Compute what one process needs while the U-Net trains; the frozen models count unless all is precomputed.

    Many processes: DDP, which sums gradients in buckets of their own.
    """
    num_weights = sum(parameter.numel() for parameter in networks.unet.parameters())
    config = networks.emu.config
    condition = config.num_image_tokens, config.text_config.hidden_size
    activations, copies = compute_unet_activations(networks.unet, training, condition)
    gradients = FLOAT32 * num_weights
    return Memory(
        weights=2 * FLOAT32 * num_weights + (networks.frozen_bytes if arguments.precomputed is None else 0),
        gradients=gradients,
        optimizer=ADAMW_STATES * FLOAT32 * num_weights,
        copies=copies + (gradients if num_processes > 1 else 0),
        activations=activations.kept,
        moment=activations.recomputed,
    )


def compute_precomputing_memory(networks: DecoderNetworks) -> Memory:
    """Compute what one process needs while embeddings and latents are computed: the frozen models alone."""
    return Memory(networks.frozen_bytes, 0, 0, 0, 0, 0)


def check_decoder_memory(
    config: EmuConfig,
    decoder: DecoderConfigs,
    arguments: DecoderArguments,
    training: DecoderTrainingArguments,
    state: PartialState,
    is_precomputing: bool,
) -> None:
    """Refuse a run whose U-Net cannot take its first step, or whose frozen models cannot be loaded to precompute.

    Called before either; processes wait for each other, so that none loads while another still looks.

    Args:
        state: of the run's processes.
        is_precomputing: which of the two.

    Raises:
        ValueError: if the exact part alone needs more than is free.
    """
    free = get_free_bytes(state.device)
    state.wait_for_everyone()
    if free is None:
        return
    networks = build_empty_decoder(config, decoder, arguments)
    if is_precomputing:
        memory, remedy = compute_precomputing_memory(networks), "dtype bfloat16"
    else:
        memory = compute_decoder_memory(networks, arguments, training, state.num_processes)
        remedy = "precomputed embeddings, a smaller per_device_train_batch_size or gradient_checkpointing"
    compare_with_free(memory, free, state.device, remedy)
