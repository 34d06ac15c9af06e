"""The four parts of Emu that a recipe names: which parameter belongs to which, and freezing them."""

from collections.abc import Iterable

from torch import nn


PARTS = {
    "vision": ("model.vision_model.",),
    "causal_former": ("model.causal_former.",),
    "language_model": ("model.language_model.",),
    "heads": ("lm_head.", "regression_head."),
}
# What wrappers put into a parameter's name: DDP, torch.compile, FSDP, activation checkpointing, PEFT.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
PEFT_PREFIX = "base_model.model."


def get_part(name: str) -> str:
    """Give the part that a parameter belongs to, whatever wraps the model.

    Raises:
        ValueError: if the name is in none of the parts.
    """
    plain = ".".join(piece for piece in name.split(".") if piece not in WRAPPERS).removeprefix(PEFT_PREFIX)
    for part, prefixes in PARTS.items():
        if plain.startswith(prefixes):
            return part
    raise ValueError(f"parameter: got {name!r}, expected a name in one of Emu's parts ({', '.join(PARTS)})")


def check_parts(parts: Iterable[str], what: str) -> None:
    """Refuse names that are no part.

    Raises:
        ValueError: naming the first of them.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"{what}: got {part!r}, expected some of {', '.join(PARTS)}")


def freeze_parts(model: nn.Module, parts: Iterable[str]) -> None:
    """Stop gradients to all parameters of these parts; the others stay as they are.

    Raises:
        ValueError: for a name that is no part, or a parameter that belongs to none.
    """
    frozen = set(parts)
    check_parts(frozen, "freeze")
    for name, parameter in model.named_parameters():
        if get_part(name) in frozen:
            parameter.requires_grad_(False)
