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
"""The visual decoder's folder: its weights become safetensors, its configurations are copied as they are.

Beside it goes `model_index.json`, by which diffusers finds the decoder and, at the root, the multimodal encoder.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig

from conversion.checkpoint import (
    check_finite,
    compute_sha256,
    meta_tensors,
    open_checkpoint,
    write_safetensors,
)
from conversion.key_table import Plan
from conversion.sizes import read_field, read_json
from conversion.weights import check_dtypes, check_tensors, compare_weights, count_dtypes, write_json
from modeling_emu.pipeline_emu import RGB_CHANNELS, make_model_index


UNET_WEIGHTS = "diffusion_pytorch_model"
CHECKER_WEIGHTS = "model"
VAE_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.13
DROPPED = "vision_model.vision_model.embeddings.position_ids"  # safety checker: computed since transformers 4.31


def build_unet(folder: Path) -> torch.nn.Module:
    return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))


def build_vae(folder: Path) -> torch.nn.Module:
    return AutoencoderKL.from_config(AutoencoderKL.load_config(folder))


def build_safety_checker(folder: Path) -> torch.nn.Module:
    return StableDiffusionSafetyChecker(CLIPConfig.from_pretrained(folder))


NETWORKS: dict[str, tuple[str, Callable[[Path], torch.nn.Module]]] = {
    "unet": (UNET_WEIGHTS, build_unet),
    "vae": (UNET_WEIGHTS, build_vae),
    "safety_checker": (CHECKER_WEIGHTS, build_safety_checker),
}
CONFIGURED = {"scheduler": "scheduler_config.json", "feature_extractor": "preprocessor_config.json"}
SAFETY = ("safety_checker", "feature_extractor")
OPTIONAL = ("vae", *SAFETY)


def check_decoder(folder: Path, condition_size: int | None) -> list[str]:
    """Names of the components in a decoder's folder.

    Args:
        folder: with one folder per component.
        condition_size: width that the U-Net must read, that of the language model; None for any.

    Raises:
        ValueError: if one is missing that cannot be left out (the safety checker and its feature extractor can,
            together, and the VAE of a U-Net that works on pixels), or if the U-Net reads another width.
    """
    present = [name for name in NETWORKS if (folder / name / "config.json").is_file()]
    present += [name for name, file in CONFIGURED.items() if (folder / name / file).is_file()]
    if absent := [name for name in (*NETWORKS, *CONFIGURED) if name not in present and name not in OPTIONAL]:
        raise ValueError(f"decoder {folder}: got no {', '.join(absent)} (with its configuration), expected them")
    if len(optional := [name for name in SAFETY if name in present]) == 1:
        raise ValueError(
            f"decoder {folder}: got {optional[0]} alone, expected both of {' and '.join(SAFETY)}, or none"
        )
    file = folder / "unet" / "config.json"
    if "vae" not in present and (channels := read_field(read_json(file), "in_channels", file)) != RGB_CHANNELS:
        raise ValueError(
            f"decoder {folder}: got no vae (with its configuration) and a U-Net of {channels} channels, expected a vae, "
            f"or a U-Net of {RGB_CHANNELS} channels, which works on pixels"
        )
    if condition_size not in (None, size := read_field(read_json(file), "cross_attention_dim", file)):
        raise ValueError(
            f"{file}: got cross_attention_dim {size}, expected {condition_size}, the width of the language model "
            f"(assemble_emu.py gives the U-Net of Stable Diffusion new projections of that width)"
        )
    return present


@dataclass(frozen=True)
class Component:
    """Weights of one network under today's names, the files that they are mapped from, and the keys left out."""

    tensors: dict[str, torch.Tensor]
    files: list[Path]
    dropped: list[str]

    @property
    def plan(self) -> Plan:
        """Each tensor is taken as it is."""
        return Plan({key: {"": key} for key in self.tensors}, self.dropped)


def open_component(folder: Path, name: str, dtype: torch.dtype | None = None) -> Component:
    """Map the weights of one component under today's names, checked against its network.

    Args:
        folder: with one folder per component.
        name: of the component.
        dtype: that the weights will be written in; None keeps each tensor's.

    Raises:
        ValueError: lists the keys that are unknown or missing, and the shapes and dtypes that cannot be.
    """
    source = open_checkpoint(folder / name)
    tensors = {}
    for key, tensor in source.tensors.items():
        if key == DROPPED:
            continue
        match = re.fullmatch(r"(.*\.mid_block\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", key)
        tensors[f"{match[1]}.{VAE_RENAMED[match[2]]}.{match[3]}" if match and name == "vae" else key] = tensor
    with torch.device("meta"):
        expected = NETWORKS[name][1](folder / name).state_dict()
    check_tensors(f"{name} of {folder}", with_short_names(tensors), with_short_names(expected))
    component = Component(tensors, source.files, [key for key in source.tensors if key == DROPPED])
    check_dtypes(f"{name} of {folder}", tensors, component.plan, dtype)
    return component


def with_short_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers writes CLIP's vision tower with one prefix or two, and reads both."""
    return {name.replace("vision_model.vision_model.", "vision_model."): tensor for name, tensor in tensors.items()}


def convert_decoder(
    source: Path, output: Path, components: list[str], dtype: torch.dtype | None
) -> dict[str, Component]:
    """Write the components of a decoder into a repository.

    Args:
        source: folder with one folder per component, `.bin` or `.safetensors` weights.
        output: the repository.
        components: from `check_decoder`.
        dtype: of the weights written; None keeps each as it is.

    Returns:
        What was read, by component that has weights; for `verify_decoder` and `report_decoder`.
    """
    opened = {}
    for name in components:
        (output / name).mkdir()
        file = CONFIGURED.get(name, "config.json")
        shutil.copyfile(source / name / file, output / name / file)
        if name in NETWORKS:
            opened[name] = open_component(source, name, dtype)
            write_component(output, name, opened[name].tensors, dtype)
    write_model_index(output, components)
    return opened


def verify_decoder(output: Path, components: Mapping[str, Component], dtype: torch.dtype | None) -> float:
    """Compare every tensor written with its source; arguments as of `convert_decoder`, and what it gave.

    Returns:
        The largest difference, see `compare_weights`.

    Raises:
        RuntimeError: if a tensor is not what was to be written.
    """
    return max(
        compare_weights(open_checkpoint(output / name).tensors, component.tensors, component.plan, dtype)
        for name, component in components.items()
    )


def report_decoder(
    source: Path, components: Mapping[str, Component], dtype: torch.dtype | None
) -> dict[str, dict[str, Any]]:
    """What was read and written, by component: checksums, counts, dtypes, keys dropped."""
    report = {}
    for name, component in components.items():
        tensors = component.tensors.values()
        report[name] = {
            "source": compute_sha256(component.files, source),
            "tensors_read": len(tensors) + len(component.dropped),
            "tensors_written": len(tensors),
            "parameters": sum(tensor.numel() for tensor in tensors),
            "dtypes_read": count_dtypes(tensors),
            "dtypes_written": count_dtypes(
                meta.to(dtype or meta.dtype) for meta in meta_tensors(component.tensors).values()
            ),
            "dropped": component.dropped,
        }
    return report


def write_model_index(output: Path, components: list[str]) -> None:
    """Name the classes that diffusers loads a repository's components by."""
    scheduler_file = output / "scheduler" / CONFIGURED["scheduler"]
    classes: dict[str, tuple[str | None, str | None]] = {
        "multimodal_encoder": ("transformers", "EmuForMultimodalGeneration"),
        "processor": ("transformers", "EmuProcessor"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", read_field(read_json(scheduler_file), "_class_name", scheduler_file)),
        "safety_checker": ("stable_diffusion", "StableDiffusionSafetyChecker"),
        "feature_extractor": ("transformers", "CLIPImageProcessor"),
    }
    classes |= dict.fromkeys((name for name in OPTIONAL if name not in components), (None, None))
    version = {"_diffusers_version": diffusers.__version__}
    write_json(output / "model_index.json", version | make_model_index(classes))


def write_component(
    output: Path, name: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write the weights of one component into a repository, each checked to be finite."""

    def build(key: str) -> torch.Tensor:
        tensor = tensors[key].to(dtype or tensors[key].dtype)
        check_finite(f"{name}: {key}", tensor)
        return tensor

    layout = {key: meta.to(dtype or meta.dtype) for key, meta in meta_tensors(tensors).items()}
    write_safetensors(output / name / f"{NETWORKS[name][0]}.safetensors", layout, build)


def renew_condition(output: Path, condition_size: int, seed: int) -> list[str]:
    """Give the U-Net of a repository new projections for a condition of another width; all else is kept.

    Args:
        output: the repository, its U-Net that of Stable Diffusion.
        condition_size: width of the embeddings that the U-Net shall read.
        seed: of the new weights, drawn as `torch.nn.Linear` draws them.

    Returns:
        Names of the new weights.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = open_component(output, "unet").tensors
    new = [name for name in tensors if re.fullmatch(r".*\.attn2\.to_[kv]\.weight", name)]
    bound = condition_size**-0.5
    for name in new:
        weight = torch.empty(len(tensors[name]), condition_size).uniform_(-bound, bound, generator=generator)
        tensors[name] = weight.to(tensors[name].dtype)
    weight_file = output / "unet" / f"{UNET_WEIGHTS}.safetensors"
    weight_file.unlink()  # what is mapped stays readable
    write_component(output, "unet", tensors)
    config_file = output / "unet" / "config.json"
    write_json(config_file, read_json(config_file) | {"cross_attention_dim": condition_size})
    return new
