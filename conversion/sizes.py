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
"""The configuration of a model from the files that say the published model's sizes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import Blip2VisionConfig, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase

from modeling_emu.configuration_emu import (
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    EmuCausalFormerConfig,
    EmuConfig,
)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: if there is no such file, or it holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: got {error}, expected a JSON file") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: got {type(content).__name__}, expected a JSON object")
    return content


def read_field(content: Mapping[str, Any], name: str, file: Path) -> Any:
    """A field that must be there; `name` may be dotted."""
    value: Any = content
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"{file}: got no {name}, expected it")
        value = value[part]
    return value


def read_vision_config(file: Path | None) -> Blip2VisionConfig:
    """Sizes of the vision tower from a file in the form of the published `Emu-14B.json`; published sizes without one."""
    if file is None:
        return EmuConfig().vision_config
    content = read_json(file)
    width, head_width = (read_field(content, f"vision_cfg.{name}", file) for name in ("width", "head_width"))
    if width % head_width:
        raise ValueError(f"{file}: got width {width}, expected a multiple of head_width = {head_width}")
    return Blip2VisionConfig(
        hidden_size=width,
        num_hidden_layers=read_field(content, "vision_cfg.layers", file),
        num_attention_heads=width // head_width,
        intermediate_size=int(width * read_field(content, "vision_cfg.mlp_ratio", file)),
        image_size=read_field(content, "vision_cfg.image_size", file),
        patch_size=read_field(content, "vision_cfg.patch_size", file),
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        initializer_range=0.02,
    )


def read_num_image_tokens(file: Path | None) -> int:
    """N from a file in the form of the published `Emu-14B.json`, which names it twice; the published N without one."""
    if file is None:
        return EmuCausalFormerConfig().num_image_tokens
    content = read_json(file)
    counts = {name: read_field(content, f"{name}.n_causal", file) for name in ("multimodal_cfg", "vladapter_cfg")}
    if len(set(counts.values())) != 1:
        raise ValueError(f"{file}: got n_causal {counts}, expected the same number twice")
    return counts["multimodal_cfg"]


def read_causal_former_config(
    file: Path | None, num_image_tokens: int, encoder_hidden_size: int, projection_size: int
) -> EmuCausalFormerConfig:
    """Sizes of the causal former from a T5 configuration; those of T5-base without one."""
    joints = dict(
        num_image_tokens=num_image_tokens, encoder_hidden_size=encoder_hidden_size, projection_size=projection_size
    )
    if file is None:
        return EmuCausalFormerConfig(**joints)
    content = read_json(file)
    if (activation := content.get("feed_forward_proj", "relu")) != "relu":
        raise ValueError(f"{file}: got feed_forward_proj {activation!r}, expected 'relu', as the causal former has")
    layers = "num_decoder_layers" if content.get("num_decoder_layers") is not None else "num_layers"
    return EmuCausalFormerConfig(
        **joints,
        hidden_size=read_field(content, "d_model", file),
        head_dim=read_field(content, "d_kv", file),
        intermediate_size=read_field(content, "d_ff", file),
        num_hidden_layers=read_field(content, layers, file),
        num_attention_heads=read_field(content, "num_heads", file),
        num_position_buckets=content.get("relative_attention_num_buckets", 32),
        max_position_distance=content.get("relative_attention_max_distance", 128),
        layer_norm_eps=content.get("layer_norm_epsilon", 1e-6),
        dropout=content.get("dropout_rate", 0.1),
    )


def read_text_config(folder: Path) -> PreTrainedConfig:
    """Sizes of the language model from a LLaMA folder; the vocabulary is set by `build_config`."""
    content = read_json(folder / "config.json")
    if (model_type := content.get("model_type")) != "llama":
        raise ValueError(f"{folder / 'config.json'}: got model_type {model_type!r}, expected 'llama'")
    left_out = ("_name_or_path", "architectures", "torch_dtype", "transformers_version", "model_type")
    return LlamaConfig(**{name: value for name, value in content.items() if name not in left_out})


def build_config(
    tokenizer: PreTrainedTokenizerBase,
    text_config: PreTrainedConfig,
    vocab_size: int,
    variant: str,
    model_config: Path | None = None,
    causal_former_config: Path | None = None,
    num_image_tokens: int | None = None,
) -> EmuConfig:
    """The configuration of a model; special ids are the tokenizer's.

    Args:
        tokenizer: with Emu's tokens.
        text_config: of the language model; its vocabulary size and special ids are replaced.
        vocab_size: rows of the word embedding.
        variant: "pretrain", "instruct", or a name of your own.
        model_config: file in the form of the published `Emu-14B.json`; None for the published sizes.
        causal_former_config: T5 configuration file; None for T5-base.
        num_image_tokens: N; None takes that of `model_config`.

    Raises:
        ValueError: if a file lacks a size, or the sizes do not fit together.
    """
    vision_config = read_vision_config(model_config)
    text_config.vocab_size = vocab_size
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_config, name, getattr(tokenizer, name))
    if num_image_tokens is None:
        num_image_tokens = read_num_image_tokens(model_config)
    try:
        return EmuConfig(
            vision_config=vision_config,
            causal_former_config=read_causal_former_config(
                causal_former_config, num_image_tokens, vision_config.hidden_size, text_config.hidden_size
            ),
            text_config=text_config,
            variant=variant,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_start_token_id=tokenizer.convert_tokens_to_ids(IMAGE_START_TOKEN),
            image_end_token_id=tokenizer.convert_tokens_to_ids(IMAGE_END_TOKEN),
            tie_word_embeddings=text_config.tie_word_embeddings,
        )
    except StrictDataclassError as error:
        raise ValueError(f"sizes of the model: {error.__cause__ or error}") from error
