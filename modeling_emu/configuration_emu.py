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
"""Configuration of Emu: the sizes of its three networks, the ids that mark images, and the training objective.

Every default is the published 14B checkpoint; where the paper leaves a number open, the default is the published code.
"""

from typing import Any, ClassVar, Literal

import transformers
from huggingface_hub.dataclasses import strict
from packaging import version


MINIMUM_TRANSFORMERS = "5.20.0"

# Names are taken from `transformers` below this line, so that an older version fails here and not on a missing name.
if version.parse(transformers.__version__) < version.parse(MINIMUM_TRANSFORMERS):
    raise ImportError(
        f"transformers: got {transformers.__version__}, Emu expects {MINIMUM_TRANSFORMERS} or newer "
        f"(pip install --upgrade 'transformers>={MINIMUM_TRANSFORMERS}')"
    )

IMAGE_TOKEN = "<image>"
IMAGE_START_TOKEN = "[IMG]"
IMAGE_END_TOKEN = "[/IMG]"


@strict
class EmuCausalFormerConfig(transformers.PreTrainedConfig):
    """Sizes of the causal former, the decoder stack of T5-base reading another width.

    Args:
        num_image_tokens: N, the learned queries, and so the embeddings that the language model sees per image.
        encoder_hidden_size: width of the image features, read by cross-attention.
        projection_size: width of the language model, which the output is projected to.
        head_dim: width of one attention head; `num_attention_heads * head_dim` need not be `hidden_size`.
        num_position_buckets: buckets of the relative position bias, which layer 0 learns and all layers share.
        max_position_distance: distances from here on share the last bucket.

    Source:
        `Emu1/models/causal_former.py`; T5-base.
    """

    model_type = "emu_causal_former"
    base_config_key = "causal_former_config"
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {"layers.*": "free_full_weight"}

    num_image_tokens: int = 32
    encoder_hidden_size: int = 1408
    projection_size: int = 5120
    hidden_size: int = 768
    head_dim: int = 64
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_position_buckets: int = 32
    max_position_distance: int = 128
    layer_norm_eps: float = 1e-6
    dropout: float = 0.1
    initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        """Refuse sizes that no causal former can have."""
        if self.num_image_tokens < 1:
            raise ValueError(f"num_image_tokens: got {self.num_image_tokens}, expected at least 1")
        if self.num_position_buckets < 2:
            raise ValueError(f"num_position_buckets: got {self.num_position_buckets}, expected at least 2")
        if self.max_position_distance <= self.num_position_buckets // 2:
            raise ValueError(
                f"max_position_distance: got {self.max_position_distance}, "
                f"expected more than num_position_buckets // 2 = {self.num_position_buckets // 2}"
            )


@strict
class EmuConfig(transformers.PreTrainedConfig):
    """Configuration of `EmuForMultimodalGeneration`.

    Args:
        vision_config: the vision tower, a `Blip2VisionConfig` (EVA-CLIP g/14).
        causal_former_config: an `EmuCausalFormerConfig`.
        text_config: the configuration of any causal language model of transformers (LLaMA-1 13B). Its `vocab_size`
            counts the added tokens.
        variant: which weights these are: "pretrain" (Emu), "instruct" (Emu-I), or a name of your own. Templates,
            warnings and model cards read it.
        image_token_id: id of an image slot, whose input is a visual embedding.
        image_start_token_id: id of `[IMG]`, which stands before the slots.
        image_end_token_id: id of `[/IMG]`, which stands after them.
        text_loss_weight: weight of the text loss in the sum.
        regression_loss_weight: weight of the regression loss in the sum.
        regression_loss: "mse" (the published code) compares every component, "cosine" (one minus the cosine) the
            directions only.
        normalize_regression_targets: divide prediction and target by the target's root mean square first, so that
            every target weighs the same whatever its length. Has no meaning for "cosine".
        supervise_image_start: train `[IMG]` as a text target, so that the model starts images by itself. The
            published model does not.

    Raises:
        ValueError: if two widths do not fit together or an id is outside the vocabulary.

    Source:
        Emu, section 2; `Emu1/models/modeling_emu.py` and `Emu1/models/Emu-14B.json`.
    """

    model_type = "emu"
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {}  # its parts have their own
    sub_configs_defaults = {
        "vision_config": transformers.configuration_utils.SubConfigSpec(
            config_class=transformers.Blip2VisionConfig,
            init_kwargs={"num_hidden_layers": 40, "initializer_range": 0.02},
        ),
        "causal_former_config": transformers.configuration_utils.SubConfigSpec(config_class=EmuCausalFormerConfig),
        "text_config": transformers.configuration_utils.SubConfigSpec(
            config_class=transformers.AutoConfig,
            model_type="llama",
            init_kwargs={
                "vocab_size": 32004,
                "hidden_size": 5120,
                "intermediate_size": 13824,
                "num_hidden_layers": 40,
                "num_attention_heads": 40,
                "max_position_embeddings": 2048,
                "rms_norm_eps": 1e-6,
                "pad_token_id": 32000,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
        ),
    }

    vision_config: Any = None
    causal_former_config: Any = None
    text_config: Any = None
    variant: str = "pretrain"
    image_token_id: int = 32003
    image_start_token_id: int = 32001
    image_end_token_id: int = 32002
    text_loss_weight: int | float = 1.0
    regression_loss_weight: int | float = 1.0
    regression_loss: Literal["mse", "cosine"] = "mse"
    normalize_regression_targets: bool = False
    supervise_image_start: bool = False
    tie_word_embeddings: bool = False

    @property
    def num_image_tokens(self) -> int:
        """N, the image slots of one image."""
        return self.causal_former_config.num_image_tokens

    def validate_architecture(self) -> None:
        """Refuse parts that do not fit together."""
        relations = (
            ("causal_former_config.encoder_hidden_size", "vision_config.hidden_size"),
            ("causal_former_config.projection_size", "text_config.hidden_size"),
        )
        for left, right in relations:
            got, expected = (
                getattr(getattr(self, part), field) for part, field in (left.split("."), right.split("."))
            )
            if got != expected:
                raise ValueError(f"{left}: got {got}, expected {right} = {expected}")

        token_ids = {
            name: getattr(self, name) for name in ("image_token_id", "image_start_token_id", "image_end_token_id")
        }
        for name, token_id in token_ids.items():
            if not 0 <= token_id < self.text_config.vocab_size:
                raise ValueError(
                    f"{name}: got {token_id}, expected an id below text_config.vocab_size = {self.text_config.vocab_size}"
                )
        if len(set(token_ids.values())) < len(token_ids):
            raise ValueError(f"image token ids: got {token_ids}, expected three different ids")
        if self.tie_word_embeddings != self.text_config.tie_word_embeddings:
            raise ValueError(
                f"tie_word_embeddings: got {self.tie_word_embeddings}, expected text_config.tie_word_embeddings = "
                f"{self.text_config.tie_word_embeddings}"
            )
        if self.regression_loss == "cosine" and self.normalize_regression_targets:
            raise ValueError(
                "normalize_regression_targets: got True, expected False with regression_loss='cosine', "
                "which compares directions only"
            )


EmuConfig.register_for_auto_class()
