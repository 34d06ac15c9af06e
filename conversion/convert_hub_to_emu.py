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
"""Convert a Hub repository of Emu back to a checkpoint of the published form.

    python conversion/convert_hub_to_emu.py emu --output Emu-pretrain.pt

Every tensor keeps its bits and gets its published key. An adapter beside the model (`--lora adapter` before) gives
Emu-I's LoRA keys. Keys that conversion dropped do not come back: the published code does not read them, or computes
them. The vision tower's key bias has no place in the published form; it does not change what attention gives, and what
is left out is said. The file appears whole or not at all.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout: both packages are beside this folder

import torch
from huggingface_hub.errors import StrictDataclassError

from conversion.checkpoint import check_finite, open_checkpoint
from conversion.convert_emu_to_hub import build_meta_model
from conversion.key_table import LORA_PARTS, adapter_key, list_keys, peft_name, published_parts
from conversion.sizes import read_json
from conversion.surgery import LORA_ALPHA, LORA_RANK, split_parts
from conversion.weights import check_tensors
from modeling_emu.configuration_emu import EmuConfig
from modeling_emu.hub.outputs import check_free_space, whole_file
from modeling_emu.hub.repository import ADAPTER_FOLDER


OTHER_LORA = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
)


def convert_state_dict(
    model: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A published state dict from the model's. Pure: no reading, no writing; the inverse of the other direction.

    Args:
        model: parameters of `EmuForMultimodalGeneration`.
        adapter: tensors of its PEFT adapter, or nothing; with one, the keys are those of Emu-I.

    Raises:
        ValueError: lists the parameters and adapter tensors that the published form has no key for.
    """
    adapter, with_lora = dict(adapter), bool(adapter)
    published: dict[str, torch.Tensor] = {}
    unknown = []
    for name, parameter in model.items():
        keys = published_parts(name, with_lora)
        if not keys:
            unknown.append(name)
            continue
        lora = {part: adapter.pop(adapter_key(name, part), None) for part in LORA_PARTS if part in keys}
        if absent := [adapter_key(name, part) for part, tensor in lora.items() if tensor is None]:
            raise ValueError(f"adapter: got no {', '.join(absent)}, expected LoRA on every q, k, v and o projection")
        tensors = split_parts(parameter, keys.keys() - lora.keys()) | {p: t for p, t in lora.items() if t is not None}
        published |= {keys[part]: tensors[part] for part in keys}
    if unknown or adapter:
        raise ValueError(
            f"parameters: got {list_keys([*unknown, *adapter])}, which have no published key, expected those of Emu on LLaMA"
        )
    return {peft_name(key): tensor for key, tensor in published.items()} if with_lora else published


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a PEFT adapter, if the published code would apply them as PEFT does.

    Raises:
        ValueError: if its configuration is not that of Emu-I: the published form holds its tensors, and no settings.
    """
    file = folder / "adapter_config.json"
    content = read_json(file)
    fixed = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": LORA_ALPHA, "bias": "none"}
    different = {name: content.get(name) for name, value in fixed.items() if content.get(name) != value}
    different |= {name: content[name] for name in OTHER_LORA if content.get(name)}
    if different:
        raise ValueError(
            f"{file}: got {different}, expected {fixed} on q, k, v and o, as the published code applies LoRA: merge the "
            f"adapter into the model instead"
        )
    tensors = open_checkpoint(folder).tensors
    if others := {
        name: len(tensor) for name, tensor in tensors.items() if "lora_A" in name and len(tensor) != LORA_RANK
    }:
        raise ValueError(f"ranks of {folder}: got {others}, expected {LORA_RANK}")
    return tensors


def find_key_bias(model: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the vision tower's biases whose key part is not zero: trained here, without influence on the output."""
    return [
        name
        for name, bias in model.items()
        if name.endswith(".self_attn.qkv.bias") and bool(bias.chunk(3)[1].count_nonzero())
    ]


def convert(folder: Path, output: Path) -> dict[str, torch.Tensor]:
    """Write the checkpoint.

    Args:
        folder: a repository.
        output: new `.pt` file.

    Returns:
        What was written, mapped from the repository's files.

    Raises:
        ValueError: if the folder has no Emu, or one that is not whole; if it has a parameter without a published key,
            an adapter that is not Emu-I's, or a weight that is not finite; or if the output is there already.
        OSError: if the disk is full.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"repository: got {folder}, which has no config.json, expected a folder with an Emu")
    if (model_type := read_json(folder / "config.json").get("model_type")) != EmuConfig.model_type:
        raise ValueError(f"model_type of {folder}: got {model_type!r}, expected {EmuConfig.model_type!r}")
    try:
        config = EmuConfig.from_pretrained(folder)
    except StrictDataclassError as error:
        raise ValueError(f"config.json of {folder}: {error.__cause__ or error}") from error
    model = open_checkpoint(folder).tensors
    check_tensors(f"model in {folder}", model, build_meta_model(config).state_dict())
    adapter = read_adapter(folder / ADAPTER_FOLDER) if (folder / ADAPTER_FOLDER).is_dir() else {}
    published = convert_state_dict(model, adapter)
    for key, tensor in published.items():
        check_finite(key, tensor)
    for name in find_key_bias(model):
        print(f"left out: the key part of {name}; the output does not depend on it")
    with whole_file(output) as partial:
        check_free_space(output, sum(tensor.nbytes for tensor in published.values()))
        with partial.open("wb") as stream:  # a stream of ours says why it cannot be written
            try:
                torch.save({key: own_storage(tensor) for key, tensor in published.items()}, stream)
            except RuntimeError as error:  # torch still closes its archive, which fails then
                raise error.__context__ if isinstance(error.__context__, OSError) else error from error
    return published


def own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it where it is a part of a larger one: `torch.save` writes whole storages."""
    return tensor if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()


def main(arguments: list[str] | None = None) -> None:
    """The command line; an error of the user's is one line, without a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="repository of an Emu")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="new .pt file")
    options = parser.parse_args(arguments)
    try:
        published = convert(options.folder, options.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.output}: {len(published)} tensors")


if __name__ == "__main__":
    main()
