# Copyright 2026 The Emu Hub-native developers. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""From a mapped published state dict to the model's weights: mapping, checking, writing, comparing."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from conversion.checkpoint import (
    NUMBERS_AT_ONCE,
    check_finite,
    meta_tensors,
    to_bytes,
    write_safetensors,
)
from conversion.key_table import Plan, list_keys
from conversion.surgery import LORA_ALPHA, join_parts


MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZE_UNITS = {None: 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
LORA_DROPOUT = 0.05  # published training recipe
LORA_TARGETS = r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"  # the causal former has such names too


def build_parameter(
    source: Mapping[str, torch.Tensor], parts: Mapping[str, str], dtype: torch.dtype | None
) -> torch.Tensor:
    """One parameter from its published tensors, in `dtype`, or in that of the first of them."""
    tensors = {part: source[key] for part, key in parts.items()}
    return join_parts(tensors).to(dtype or next(iter(tensors.values())).dtype)


def convert_state_dict(
    source: Mapping[str, torch.Tensor], plan: Plan, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The model's state dict from a published one. Pure: no reading, no writing, any device.

    Args:
        source: published keys and tensors.
        plan: from `plan_conversion`.
        dtype: of the result; None keeps each tensor's.
    """
    return {name: build_parameter(source, parts, dtype) for name, parts in plan.parts.items()}


def check_dtypes(what: str, tensors: Mapping[str, torch.Tensor], plan: Plan, dtype: torch.dtype | None) -> None:
    """Refuse numbers that would have to be cast where no dtype was asked for.

    A merged weight is rounded once, to the dtype of its base, and what that changes is reported.

    Args:
        what: for the message.
        tensors: by source key, on any device.
        plan: which of them make which parameter.
        dtype: that is asked for; None keeps each tensor's.

    Raises:
        ValueError: lists the keys that are no floating point, or, without `dtype`, of another width than models have,
            or unlike their partner in a fused tensor.
    """
    problems = []
    for parts in plan.parts.values():
        kinds = {key: tensors[key].dtype for key in parts.values()}
        unknown = [
            kind for kind in kinds.values() if not kind.is_floating_point or not (dtype or kind in MODEL_DTYPES)
        ]
        if unknown or (not dtype and parts.keys() == {"query", "value"} and len(set(kinds.values())) > 1):
            problems.append(" + ".join(f"{key} {kind}" for key, kind in kinds.items()))
    if problems:
        raise ValueError(
            f"dtypes of {what}: got {list_keys(problems)}, expected {', '.join(map(str, MODEL_DTYPES))}, one in each "
            f"fused tensor (--dtype casts floating point)"
        )


def check_shapes(source: Mapping[str, torch.Tensor], plan: Plan, expected: Mapping[str, torch.Tensor]) -> None:
    """Compare every shape with the model's, before anything is read.

    Raises:
        ValueError: lists all keys whose shape cannot be.
    """
    metas = meta_tensors(source)
    problems = []
    for name, parts in plan.parts.items():
        keys = " + ".join(parts.values())
        try:
            shape = tuple(build_parameter(metas, parts, None).shape)
        except ValueError as error:
            problems.append(f"{keys} ({error})")
            continue
        if shape != tuple(expected[name].shape):
            problems.append(f"{keys} {shape} instead of {tuple(expected[name].shape)}")
    if problems:
        raise ValueError(
            f"shapes of the checkpoint: got {list_keys(problems)}, expected those of the model (sizes come from "
            f"--model-config, --causal-former-config and --llama-config)"
        )


def check_tensors(what: str, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare names and shapes.

    Raises:
        ValueError: lists the keys that are unknown or missing, and the shapes that differ.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    problems = {
        "unknown keys": shapes.keys() - wanted.keys(),
        "missing keys": wanted.keys() - shapes.keys(),
        "wrong shapes": {
            f"{name} {shapes[name]} instead of {wanted[name]}"
            for name in shapes.keys() & wanted.keys()
            if shapes[name] != wanted[name]
        },
    }
    if found := [f"{problem}: {list_keys(names)}" for problem, names in problems.items() if names]:
        raise ValueError(f"{what}: got {'; '.join(found)}, expected the tensors of its configuration")


def count_dtypes(tensors: Iterable[torch.Tensor]) -> dict[str, int]:
    """Number of tensors of each dtype."""
    return dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))


def write_weights(
    folder: Path,
    source: Mapping[str, torch.Tensor],
    plan: Plan,
    dtype: torch.dtype | None,
    stem: str,
    max_shard_size: int,
) -> None:
    """Write the tensors of a plan, each checked to be finite; the other arguments are those of `write_shards`.

    Args:
        source: published keys and tensors.
        plan: from `plan_conversion`.
        dtype: of the weights written; None keeps each tensor's.

    Raises:
        ValueError: names a tensor that is not finite, in the source or in the dtype written.
    """

    def build(name: str) -> torch.Tensor:
        parts = plan.parts[name]
        for key in parts.values():
            check_finite(key, source[key])
        tensor = build_parameter(source, parts, dtype)
        if tensor.dtype != source[next(iter(parts.values()))].dtype or len(parts) > 1:
            check_finite(f"{name} as {tensor.dtype}", tensor)
        return tensor

    write_shards(folder, convert_state_dict(meta_tensors(source), plan, dtype), build, stem, max_shard_size)


def write_shards(
    folder: Path,
    layout: Mapping[str, torch.Tensor],
    build: Callable[[str], torch.Tensor],
    stem: str,
    max_shard_size: int,
) -> None:
    """Write tensors as safetensors, in shards with an index where one file is not enough.

    Args:
        folder: where to.
        layout: name, shape and dtype of each tensor, on the meta device.
        build: gives the tensor of a name.
        stem: what the file names begin with: "model", "adapter_model".
        max_shard_size: of one file, in bytes.
    """
    pattern = f"{stem}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(dict(layout), filename_pattern=pattern, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: layout[name] for name in names}, build)
        print(f"wrote {file}: {len(names)} tensors")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def parse_shard_size(size: int | str) -> int:
    """Bytes of a size such as "5GB" or "100 kb"; a number alone is bytes.

    Raises:
        ValueError: if it is no size, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", str(size).strip().upper())
    num_bytes = int(float(match[1]) * SIZE_UNITS[match[2]]) if match else 0
    if num_bytes < 1:
        raise ValueError(f"--max-shard-size: got {size}, expected a positive size such as 5GB, 500MB or 100KB")
    return num_bytes


def write_adapter_config(folder: Path, rank: int) -> None:
    """Write what PEFT needs to load the adapter of Emu-I onto the model: published alpha, exact module names."""
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "r": rank,
            "lora_alpha": LORA_ALPHA,
            "lora_dropout": LORA_DROPOUT,
            "bias": "none",
            "target_modules": LORA_TARGETS,
            "inference_mode": True,
        },
    )


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as the Hub's libraries do: indented, keys sorted."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def compare_weights(
    written: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor], plan: Plan, dtype: torch.dtype | None
) -> float:
    """Compare every tensor written with what the source gives.

    Returns:
        The largest difference that rounding to another dtype made; 0 where the source's own bits were kept.

    Raises:
        RuntimeError: if a tensor is not what was to be written.
    """
    if written.keys() != plan.parts.keys():
        raise RuntimeError(f"tensors written: got {list_keys(written.keys() ^ plan.parts.keys())} too many or too few")
    largest = 0.0
    for name, parts in plan.parts.items():
        got, expected = written[name], build_parameter(source, parts, dtype)
        if got.dtype != expected.dtype or not torch.equal(to_bytes(got), to_bytes(expected)):
            raise RuntimeError(
                f"{name}: got other numbers in the file, expected those of {' + '.join(parts.values())}"
            )
        exact = join_parts({part: source[key] for part, key in parts.items()})
        if exact.dtype != got.dtype:
            pieces = zip(*(tensor.reshape(-1).split(NUMBERS_AT_ONCE) for tensor in (got, exact)), strict=True)
            largest = max(largest, *(float((left.double() - right.double()).abs().max()) for left, right in pieces))
    return largest
