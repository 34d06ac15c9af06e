"""What a recipe's training needs in memory, per process, from configurations alone.

Exact: weights, gradients and the optimiser's states. Estimated: copies of weights for computing, activations
and logits (activations.py). The exact part stops a run before its first step where it cannot fit; the estimate only warns.
"""

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import psutil
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.training_args import OptimizerNames

from ..configuration_emu import EmuConfig
from ..modeling_emu import EmuForMultimodalGeneration
from .activations import compute_activations, compute_logits, get_batches, get_precision
from .arguments import EmuTrainingArguments
from .instruct import INSTRUCT_TOKENS, add_lora
from .parts import freeze_parts
from .recipes import DataArguments, InstructArguments


logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# bitsandbytes' nf4: two weights per byte, and a float32 scale per block.
NF4_BLOCK = 64
# bitsandbytes' 8-bit optimisers: a float32 scale per block and state; small tensors and word embeddings stay in float32.
ADAM8_BLOCK, ADAM8_MIN_SIZE = 256, 4096
# Name of TrainingArguments.optim -> states per weight, in the dtype of the weight.
OPTIMIZER_STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0}
OPTIMIZERS_8BIT = ("adamw_8bit", "adamw_bnb_8bit")


@dataclass(frozen=True)
class Layout:
    """How many processes train, one GPU each, and whether they share weights, gradients and states.

    Args:
        num_processes: all of them.
        is_sharded: FSDP2 or DeepSpeed ZeRO-3; otherwise each process has all (DDP).
    """

    num_processes: int = 1
    is_sharded: bool = False

    def get_share(self, shape: torch.Size) -> int:
        """Numbers of a tensor of this shape on the process that has most of it: FSDP2 cuts the first dimension."""
        if not self.is_sharded or not shape:
            return shape.numel()
        return math.ceil(shape[0] / self.num_processes) * math.prod(shape[1:])


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs.

    Args:
        weights: exact.
        gradients: exact.
        optimizer: exact, without step counters.
        copies: of weights and gradients: those that autocast makes, layers gathered from all processes, DDP's buckets.
        activations: what the forward pass keeps for the backward pass, for the largest batch.
        moment: the most that comes on top for a moment: the heads' outputs with their losses and gradients, or one
            checkpointed layer.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    moment: int

    @property
    def exact(self) -> int:
        """Weights, gradients and states: the least that a step takes."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """With all estimates."""
        return self.exact + self.copies + self.activations + self.moment


def find_dtype(config: EmuConfig, name: str) -> torch.dtype:
    """Give the dtype that a recipe names; auto is the model's own.

    Raises:
        ValueError: for an unknown one.
    """
    dtype = config.dtype or torch.float32 if name == "auto" else DTYPES.get(name)
    if dtype is None:
        raise ValueError(f"dtype: got {name!r}, expected auto or one of {', '.join(DTYPES)}")
    return dtype


def build_empty_model(config: EmuConfig, arguments: DataArguments, training: EmuTrainingArguments) -> nn.Module:
    """Build the model that a recipe trains on the meta device: names, shapes, dtypes, what is frozen; no numbers.

    Args:
        config: of the model that the recipe starts from; left as it is.

    Raises:
        ValueError: for an unknown dtype.
    """
    config = EmuConfig.from_dict(config.to_dict())
    if isinstance(arguments, InstructArguments) and config.variant != "instruct":
        config.text_config.vocab_size += len(INSTRUCT_TOKENS)
    dtype = find_dtype(config, arguments.dtype)
    with torch.device("meta"):
        model = EmuForMultimodalGeneration(config).to(dtype)
        freeze_parts(model, training.freeze)
        if isinstance(arguments, InstructArguments):
            return add_lora(model, arguments.lora_r, arguments.lora_alpha, arguments.lora_dropout)
    return model


def check_optimizer(training: EmuTrainingArguments) -> None:
    """Refuse an optimiser whose states are not known here.

    Raises:
        ValueError: naming those that are.
    """
    name, known = OptimizerNames(training.optim).value, (*OPTIMIZER_STATES, *OPTIMIZERS_8BIT)
    if name not in known:
        raise ValueError(f"optim: got {name!r}, expected one whose memory is known: {', '.join(known)}")


def get_optimizer_bytes(name: str, count: int, bytes_per_number: int, is_embedding: bool) -> int:
    """Bytes of the optimiser's states for so many numbers of a tensor; 0 for one that is not known here."""
    if name in OPTIMIZER_STATES:
        return OPTIMIZER_STATES[name] * bytes_per_number * count
    if name in OPTIMIZERS_8BIT:
        if is_embedding or count < ADAM8_MIN_SIZE:
            return 2 * 4 * count
        return 2 * (count + 4 * math.ceil(count / ADAM8_BLOCK))
    return 0


def iterate_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Give each parameter once, with its name and the module that has it."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{module_name}.{name}", module, parameter


def is_quantized(name: str, module: nn.Module, arguments: DataArguments) -> bool:
    """Whether a recipe keeps this weight in 4 bits: the linear layers inside the language model's layers."""
    return (
        isinstance(arguments, InstructArguments)
        and arguments.quantization is not None
        and isinstance(module, nn.Linear)
        and "language_model.layers." in name
        and "lora_" not in name
    )


def compute_states(
    model: nn.Module, arguments: DataArguments, training: EmuTrainingArguments, layout: Layout
) -> tuple[int, int, int]:
    """Compute the bytes of weights, gradients and optimiser states on the process that has most of them.

    Args:
        model: as `build_empty_model` gives it.

    Source:
        accelerate keeps the trained weights of a sharded run in float32 where it computes in another dtype; ZeRO-3
        spends as many bytes on them otherwise (16-bit weights and gradients, float32 weights, AdamW's states).
    """
    weights = gradients = optimizer = 0
    for name, module, parameter in iterate_parameters(model):
        count = layout.get_share(parameter.shape)
        if is_quantized(name, module, arguments):
            weights += math.ceil(count / 2) + 4 * math.ceil(count / NF4_BLOCK)
            continue
        bytes_per_number = parameter.element_size()
        if layout.is_sharded and parameter.requires_grad and (training.bf16 or training.fp16):
            bytes_per_number = 4
        weights += count * bytes_per_number
        if parameter.requires_grad:
            gradients += count * bytes_per_number
            optimizer += get_optimizer_bytes(
                OptimizerNames(training.optim).value, count, bytes_per_number, isinstance(module, nn.Embedding)
            )
    return weights, gradients, optimizer


def compute_copies(model: nn.Module, training: EmuTrainingArguments, layout: Layout, gradients: int) -> int:
    """Estimate the bytes of copies beside the weights themselves.

    Unsharded, autocast keeps float32 weights a second time in 16 bits during a forward pass, and DDP sums gradients in
    buckets of their own. Sharded, two layers are gathered at a time, with the gradients of one, and what is in no layer
    is gathered with its gradients for the whole step.
    """
    half = training.bf16 or training.fp16
    if not layout.is_sharded:
        buckets = gradients if layout.num_processes > 1 else 0
        if not half:
            return buckets
        cast_weights = sum(
            parameter.numel()
            for _, module, parameter in iterate_parameters(model)
            if parameter.dtype == torch.float32 and parameter.ndim > 1 and not isinstance(module, nn.Embedding)
        )
        return buckets + 2 * cast_weights
    layers = [
        sum(parameter.numel() for parameter in module.parameters())
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer)
    ]
    outside = sum(parameter.numel() for parameter in model.parameters()) - sum(layers)
    bytes_per_value = 2 if half else next(model.parameters()).element_size()
    return bytes_per_value * (3 * max(layers) + 2 * outside)


def compute_memory(
    model: nn.Module, arguments: DataArguments, training: EmuTrainingArguments, layout: Layout
) -> Memory:
    """Compute what one process needs; of the sources' batches, the one that needs most.

    Args:
        model: as `build_empty_model` gives it.
    """
    config = cast(EmuConfig, model.config)
    weights, gradients, optimizer = compute_states(model, arguments, training, layout)
    copies = compute_copies(model, training, layout, gradients)
    precision = get_precision(model, training, layout.is_sharded)
    candidates = []
    for batch in get_batches(arguments, training, config):
        activations = compute_activations(model, arguments, training, precision, batch)
        moment = max(compute_logits(config, batch), activations.recomputed)
        candidates.append(Memory(weights, gradients, optimizer, copies, activations.kept, moment))
    return max(candidates, key=lambda memory: memory.total)


def get_layout(training: EmuTrainingArguments) -> Layout:
    """Give how this run is laid out, as torchrun, accelerate or the recipe say; DeepSpeed counts as ZeRO-3, its least."""
    asks_for_fsdp = bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    has_fsdp = asks_for_fsdp and training.world_size > 1 and training.device.type != "cpu"  # a CPU falls back to DDP
    return Layout(training.world_size, is_sharded=has_fsdp or training.deepspeed_plugin is not None)


def is_offloaded(training: EmuTrainingArguments) -> bool:
    """Whether DeepSpeed or FSDP keep weights or states in the memory of the computer instead of the GPU's."""
    if training.deepspeed_plugin is not None:
        return training.deepspeed_plugin.hf_ds_config.is_offload()
    recipe_says = (training.fsdp_plugin_args or {}).get("cpu_offload", False)
    return recipe_says or os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"


def get_free_bytes(device: torch.device) -> int | None:
    """Bytes that are free for this process on its device, None where that is not known.

    The processes of one computer share its memory evenly.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return None


def check_memory(config: EmuConfig, arguments: DataArguments, training: EmuTrainingArguments) -> None:
    """Refuse a run that cannot take its first step, before its model is loaded; say so where it probably cannot.

    Processes wait for each other, so that none loads while another still looks. States of an optimiser that is not
    known here count as nothing. What is kept outside the device is not checked.

    Raises:
        ValueError: if weights, gradients and optimiser states alone need more than is free.
    """
    free = get_free_bytes(training.device)
    training.distributed_state.wait_for_everyone()
    if free is None or is_offloaded(training):
        return
    model = build_empty_model(config, arguments, training)
    memory = compute_memory(model, arguments, training, get_layout(training))
    compare_with_free(
        memory, free, training.device, "smaller batches, a smaller max_length or activation_checkpointing"
    )


def compare_with_free(memory: Memory, free: int, device: torch.device, remedy: str) -> None:
    """Refuse what cannot fit, and warn of what probably does not.

    Args:
        free: bytes.
        remedy: what would need less, in words.

    Raises:
        ValueError: if weights, gradients and optimiser states alone need more than is free.
    """
    parts = (
        f"weights {format_bytes(memory.weights)}, gradients {format_bytes(memory.gradients)}, "
        f"optimiser states {format_bytes(memory.optimizer)}"
    )
    if memory.exact > free:
        raise ValueError(
            f"free memory of {device}: got {format_bytes(free)}, expected at least {format_bytes(memory.exact)} "
            f"({parts}) and room for activations"
        )
    if memory.total > free:
        logger.warning(
            "free memory of %s: got %s; %s are exact, and with activations about %s may be needed for a moment: %s "
            "need less",
            device,
            format_bytes(free),
            parts,
            format_bytes(memory.total),
            remedy,
        )


def format_bytes(num_bytes: int) -> str:
    """Say a number of bytes in GB or MB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
