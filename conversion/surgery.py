"""What happens to the numbers where a parameter is not a published tensor as it is: pairs of inverse functions.

Pure functions of tensors on any device, the meta device included: that is how shapes are checked before a byte is read.
"""

from collections.abc import Mapping

import torch


LORA_ALPHA = 16  # published; a state dict does not hold it
LORA_RANK = 16  # likewise; a state dict of another rank can be read, but the published code expects this one


def fuse_qkv_bias(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Bias of the fused projection, `(3C,)`, from those of query and value, `(C,)` each: the key has none, so zero.

    Raises:
        ValueError: if the two differ in shape.
    """
    if query.shape != value.shape:
        raise ValueError(
            f"shapes of the biases: got {tuple(query.shape)} and {tuple(value.shape)}, expected one shape"
        )
    return torch.cat([query, torch.zeros_like(query), value])


def split_qkv_bias(bias: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inverse of `fuse_qkv_bias`: "query" and "value", `(C,)` each.

    The key's part is left out: it shifts all scores of a query alike, which softmax does not see.
    """
    query, _, value = bias.chunk(3)
    return {"query": query, "value": value}


def merge_lora(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, alpha: float = LORA_ALPHA
) -> torch.Tensor:
    """`W + (alpha / r) B A` in float32: `(out, in)` from `(out, in)`, `(r, in)` and `(out, r)`.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    rank, shapes = lora_a.shape[0], (tuple(lora_a.shape), tuple(lora_b.shape))
    if shapes != ((rank, weight.shape[1]), (weight.shape[0], rank)):
        raise ValueError(f"shapes of LoRA A and B: got {shapes[0]} and {shapes[1]} for a weight {tuple(weight.shape)}")
    return weight.float() + (alpha / rank) * (lora_b.float() @ lora_a.float())


def join_parts(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A parameter from its published tensors (the parts of `key_table.Plan`), before any change of dtype.

    A merged weight is float32; everything else keeps the dtype of the checkpoint.
    """
    if parts.keys() == {""}:
        return parts[""]
    if parts.keys() == {"query", "value"}:
        return fuse_qkv_bias(parts["query"], parts["value"])
    if parts.keys() == {"", "lora_A", "lora_B"}:
        return merge_lora(parts[""], parts["lora_A"], parts["lora_B"])
    raise ValueError(f"parts of a parameter: got {sorted(parts)}, expected those that the key table has")


def split_parts(parameter: torch.Tensor, names: set[str]) -> dict[str, torch.Tensor]:
    """The inverse of `join_parts` for parameters that were not merged."""
    return split_qkv_bias(parameter) if names == {"query", "value"} else {"": parameter}
