"""What a recipe's training is and needs, of whichever kind it is: what `emu info --training` prints."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..configuration_emu import EmuConfig
from .activations import Batch, get_batches
from .arguments import EmuTrainingArguments
from .decoder_arguments import DecoderArguments, DecoderTrainingArguments
from .decoder_memory import (
    DecoderConfigs,
    build_empty_decoder,
    compute_decoder_memory,
    compute_precomputing_memory,
)
from .memory import Layout, Memory, build_empty_model, check_optimizer, compute_memory
from .recipes import InstructArguments, PretrainArguments, parse_as, parse_recipe, read_recipe


KINDS_OF_TRAINING: dict[str, tuple[Any, ...]] = {
    "pretrain": (PretrainArguments, EmuTrainingArguments),
    "instruct": (InstructArguments, EmuTrainingArguments),
    "decoder": (DecoderArguments, DecoderTrainingArguments),
}
LAYOUTS = {
    "1": Layout(),
    "8 DDP": Layout(8),
    "8 FSDP2": Layout(8, True),
    "128 DDP": Layout(128),
    "128 FSDP2": Layout(128, True),
}
PRECOMPUTING = "1, precomputing"  # beside the layouts: the visual decoder's embeddings and latents
ON_CPU = "use_cpu=true"  # of a plan, whatever this machine has
UNSHARDED = "fsdp=false"  # likewise: a layout says what is sharded


def find_kind(recipe: dict[str, Any]) -> str:
    """Give the kind of training that a recipe is for: "pretrain", "instruct" or "decoder".

    Its keys say it; where they fit both of the first, conversations alone are for "instruct".
    """
    names: dict[str, set[str]] = {}
    for kind, classes in KINDS_OF_TRAINING.items():
        names[kind] = {field.name for known in classes for field in dataclasses.fields(known)}
    num_unknown = {kind: len(recipe.keys() - known) for kind, known in names.items()}
    nearest = [kind for kind, count in num_unknown.items() if count == min(num_unknown.values())]
    sources = recipe.get("sources") or [{}]
    if "instruct" in nearest and all(source.get("kind") == "instruction" for source in sources):
        return "instruct"
    return nearest[0]


@dataclass(frozen=True)
class TrainingPlan:
    """What a recipe's training is and needs.

    Args:
        kind: "pretrain", "instruct" or "decoder".
        num_parameters: all of them, those of frozen models included.
        num_trained: those that are not frozen.
        batches: of each source; the visual decoder draws its pictures from all of them, each with one condition.
        memory: by the name of a layout, for one process.
    """

    kind: str
    num_parameters: int
    num_trained: int
    batches: list[Batch]
    memory: dict[str, Memory]


def plan_training(
    recipe: str,
    settings: Sequence[str],
    read_config: Callable[[str], EmuConfig],
    read_decoder: Callable[[str, str | None], DecoderConfigs],
) -> TrainingPlan:
    """Compute what a recipe needs, without weights and whatever this machine has.

    Args:
        recipe: see `read_recipe`.
        settings: see `read_recipe`.
        read_config: gives the configuration of the model that the recipe names.
        read_decoder: gives those of the visual decoder, from the recipe's model and its decoder.

    Raises:
        ValueError: for a recipe that cannot be, or one whose needs are not known.
    """
    kind = find_kind(read_recipe(recipe, settings))
    if kind == "decoder":
        decoder_arguments, decoder_training = parse_as(recipe, [*settings, ON_CPU], *KINDS_OF_TRAINING[kind])
        config = read_config(decoder_arguments.model)
        decoder = read_decoder(decoder_arguments.model, decoder_arguments.decoder)
        return plan_decoder(config, decoder, decoder_arguments, decoder_training)
    arguments_class = InstructArguments if kind == "instruct" else PretrainArguments
    arguments, training = parse_recipe(recipe, [*settings, ON_CPU, UNSHARDED], arguments_class)
    check_optimizer(training)
    model = build_empty_model(read_config(arguments.model), arguments, training)
    is_quantized = isinstance(arguments, InstructArguments) and arguments.quantization is not None
    return TrainingPlan(
        kind,
        sum(parameter.numel() for parameter in model.parameters()),
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        get_batches(arguments, training, cast(EmuConfig, model.config)),
        {
            name: compute_memory(model, arguments, training, layout)
            for name, layout in LAYOUTS.items()
            if not (layout.is_sharded and is_quantized)  # 4-bit weights are not sharded by these recipes
        },
    )


def plan_decoder(
    config: EmuConfig, decoder: DecoderConfigs, arguments: DecoderArguments, training: DecoderTrainingArguments
) -> TrainingPlan:
    """Compute what training the visual decoder needs; it is not sharded."""
    networks = build_empty_decoder(config, decoder, arguments)
    memory = {
        name: compute_decoder_memory(networks, arguments, training, layout.num_processes)
        for name, layout in LAYOUTS.items()
        if not layout.is_sharded
    }
    if arguments.precomputed is not None:
        memory[PRECOMPUTING] = compute_precomputing_memory(networks)
    num_pictures = training.per_device_train_batch_size
    return TrainingPlan(
        "decoder",
        networks.num_parameters,
        sum(parameter.numel() for parameter in networks.unet.parameters()),
        [Batch("all", num_pictures, config.num_image_tokens, num_pictures)],
        memory,
    )
