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
"""Emu: one Transformer over a sequence that mixes text tokens and visual embeddings, with its two losses.

At each position it classifies the next text token (`lm_head`) or regresses the next visual embedding
(`regression_head`). Vision tower and language model are transformers' own classes; the causal former between them is in
`modeling_emu_causal_former.py`, the generation loop's hooks are in `generation_emu.py`. The module knows nothing of
tokenizers, pixels before normalisation, or diffusion.

Shapes: B rows, T positions, N slots per image, D width of the language model, V vocabulary.
"""

from .configuration_emu import EmuConfig  # first: it checks transformers' version


# isort: split
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Blip2VisionModel, Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check
from transformers.utils.quantization_config import QuantizationConfigMixin

from .generation_emu import EmuGenerationMixin
from .modeling_emu_causal_former import EmuCausalFormer


AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


@dataclass
class EmuModelOutputWithPast(BaseModelOutputWithPast):
    """What `EmuModel` gives: the fields of a decoder, and its mixed input.

    Args:
        inputs_embeds: `(B, T, D)`, what the language model read: word embeddings, and visual ones in the slots.
        image_hidden_states: `(num_images, N, D)`, the embeddings of the images that came as pixels.
    """

    inputs_embeds: torch.Tensor | None = None
    image_hidden_states: torch.Tensor | None = None


@dataclass
class EmuCausalLMOutputWithPast(CausalLMOutputWithPast):
    """What Emu predicts at each position, and the losses where labels were given.

    A loss is its sum divided by its own number of targets; the sums and numbers are here so that a trainer can divide
    by the number of targets of a whole step instead.

    Args:
        loss: scalar, the weighted sum of both losses.
        logits: `(B, T, V)`, scores of the next token.
        regressed_embeds: `(B, T, D)`, the next visual embedding.
        image_hidden_states: `(num_images, N, D)`, the embeddings of the images that came as pixels.
        text_loss: scalar, mean cross-entropy in nats per text target.
        regression_loss: scalar, mean error per regression target.
        text_loss_sum: scalar, float32.
        regression_loss_sum: scalar, float32.
        num_text_targets: scalar, long.
        num_regression_targets: scalar, long.
    """

    regressed_embeds: torch.Tensor | None = None
    image_hidden_states: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    regression_loss: torch.Tensor | None = None
    text_loss_sum: torch.Tensor | None = None
    regression_loss_sum: torch.Tensor | None = None
    num_text_targets: torch.Tensor | None = None
    num_regression_targets: torch.Tensor | None = None


class EmuPreTrainedModel(PreTrainedModel):
    """What transformers has to know of Emu."""

    config: EmuConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # A small part of the parameters, and what an image is made of: quantised, they save little and blur embeddings.
    modules_to_not_quantize = ("model.vision_model", "model.causal_former", "lm_head", "regression_head")

    @classmethod
    def from_pretrained(
        cls, *args: Any, quantization_config: QuantizationConfigMixin | dict | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """As in transformers; a `quantization_config` that names no modules to skip skips `modules_to_not_quantize`."""
        if quantization_config is not None:
            if isinstance(quantization_config, dict):
                quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
            quantization_config = copy.deepcopy(quantization_config)
            for field in ("llm_int8_skip_modules", "modules_to_not_convert"):  # bitsandbytes; the others
                if getattr(quantization_config, field, ()) is None:
                    setattr(quantization_config, field, list(cls.modules_to_not_quantize))
            kwargs["quantization_config"] = quantization_config
        return super().from_pretrained(*args, **kwargs)


class EmuModel(EmuPreTrainedModel):
    """Vision tower, causal former and language model without heads.

    Source:
        Emu, section 2; `Emu1/models/modeling_emu.py`.
    """

    def __init__(self, config: EmuConfig):
        super().__init__(config)
        self.vision_model = Blip2VisionModel(config.vision_config)
        # Its own names are those of all BLIP-2 models: FSDP would look for layers that are not here.
        self.vision_model._no_split_modules = {"Blip2EncoderLayer", "Blip2VisionEmbeddings"}
        self.vision_model.fsdp_plan = {"encoder.layers.*": "free_full_weight"}
        self.causal_former = EmuCausalFormer(config.causal_former_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Encode images into the embeddings that the language model reads and predicts.

        Args:
            pixel_values: `(num_images, 3, image_size, image_size)`, float, as `EmuProcessor` makes them. Images of all
                rows in reading order.

        Returns:
            `pooler_output`: one `(N, D)` per image; `last_hidden_state`: `(num_images, num_positions,
            vision_hidden_size)`, the features that the causal former reads.

        Raises:
            ValueError: for another shape.

        Source:
            Emu, section 2.1; `Emu1/models/modeling_emu.py`.
        """
        size = self.config.vision_config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixel_values: got {tuple(pixel_values.shape)}, expected (num_images, 3, {size}, {size})"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values: got {pixel_values.dtype}, expected a float dtype (EmuProcessor gives it)")
        features = self.vision_model(pixel_values).last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=list(self.causal_former(features).unbind(0))
        )

    def place_image_embeds(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, image_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Put `(num_images, N, D)` embeddings into the slots of `(B, T, D)`, in reading order.

        Raises:
            ValueError: if there are more or fewer slots than embeddings, none included.
        """
        slots = input_ids == self.config.image_token_id
        num_embeds = 0 if image_embeds is None else image_embeds.shape[0] * image_embeds.shape[1]
        torch_compilable_check(
            slots.sum() == num_embeds,
            lambda: (
                f"image slots in input_ids: got {int(slots.sum())}, expected {num_embeds} "
                f"({num_embeds // self.config.num_image_tokens} images of {self.config.num_image_tokens} slots)"
            ),
        )
        if image_embeds is None:
            return inputs_embeds
        image_embeds = image_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(slots.unsqueeze(-1).to(inputs_embeds.device), image_embeds)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        visual_inputs: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EmuModelOutputWithPast:
        """One causal pass over the mixed sequence.

        Args:
            input_ids: `(B, T)`, long; `image_token_id` marks a slot.
            pixel_values: see `get_image_features`; N slots per image.
            attention_mask: `(B, past + T)`, 1 for positions to read; or a 4-D mask.
            position_ids: `(B, T)`, long.
            past_key_values: cache of the language model.
            inputs_embeds: `(B, T, D)`, instead of `input_ids` and images.
            visual_inputs: `(B, 1, D)`, the embedding for every slot of its row: a decoding step.
            mm_encoder_outputs: `{"image": what get_image_features returned}`, instead of `pixel_values`.

        Raises:
            ValueError: if the inputs exclude each other, or slots and images do not match in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("inputs: got both or none of input_ids and inputs_embeds, expected one of them")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and (image_outputs is not None or inputs_embeds is not None):
            raise ValueError("pixel_values: got them beside ready embeddings, expected one or the other")

        nothing = None
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, return_dict=True)
        elif self.training and input_ids is not None and image_outputs is None and past_key_values is None:
            # A batch without images looks at a blank one in training, and adds nothing of it: all processes of a run
            # must use the same weights in the same order, or those that share them wait for each other for ever.
            size = self.config.vision_config.image_size
            blank = torch.zeros(1, 3, size, size, dtype=self.dtype, device=input_ids.device)
            nothing = (0 * self.get_image_features(blank, return_dict=True).pooler_output[0]).sum()
        image_embeds = None if image_outputs is None else torch.stack(tuple(image_outputs.pooler_output))

        if input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if nothing is not None:
                inputs_embeds = inputs_embeds + nothing.to(inputs_embeds)
            if visual_inputs is None:
                inputs_embeds = self.place_image_embeds(input_ids, inputs_embeds, image_embeds)
            else:
                slots = (input_ids == self.config.image_token_id).unsqueeze(-1)
                inputs_embeds = torch.where(
                    slots, visual_inputs.to(inputs_embeds.device, inputs_embeds.dtype), inputs_embeds
                )

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return EmuModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            inputs_embeds=inputs_embeds,
            image_hidden_states=image_embeds,
        )


class EmuForMultimodalGeneration(EmuPreTrainedModel, EmuGenerationMixin):
    """Emu with both heads: the next token or the next visual embedding.

    Source:
        Emu, section 2; `Emu1/models/modeling_emu.py` and `modeling_llama.py` (`stu_regress_head`).
    """

    output_modalities = ("image", "text")
    # Plain Trainer then averages each micro-batch's loss; a trainer that wants exact steps uses the sums in the output.
    accepts_loss_kwargs = False
    _tp_plan = {"lm_head": "colwise_gather_output", "regression_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight", "regression_head": "keep_full_weight"}

    def __init__(self, config: EmuConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.model = EmuModel(config)
        hidden_size, vocab_size = config.text_config.hidden_size, config.text_config.vocab_size
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.regression_head = nn.Linear(hidden_size, hidden_size, bias=False)
        # The word embeddings' name is the language model's own ("embed_tokens", "wte", ...).
        word_embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is word_embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head that scores tokens."""
        return self.lm_head

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, which would name one auto class in the saved configuration; this names all of them."""
        class_reference = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
        known = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {**known, **dict.fromkeys(AUTO_CLASSES, class_reference)}
        super().save_pretrained(*args, **kwargs)

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See `EmuModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def compute_losses(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        logits: torch.Tensor,
        embeds: torch.Tensor,
        regressed: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Both losses over the positions that have a target.

        Text targets are the labels, less `<image>` and `[/IMG]`, which are never learned, and `[IMG]`, which is if
        `supervise_image_start`. Regression positions are `[IMG]` before a slot and the slots; the target is what the
        language model reads next: N visual embeddings, then the word embedding of `[/IMG]`, all detached.

        Args:
            input_ids: `(B, T)`, long.
            attention_mask: `(B, T)`; what follows a padding position is no target. None or a 4-D mask: no padding.
            labels: `(B, T)`, long, not shifted; -100 is no target.
            logits: `(B, T, V)`.
            embeds: `(B, T, D)`, the language model's input.
            regressed: `(B, T, D)`.

        Returns:
            The loss fields of `EmuCausalLMOutputWithPast`.

        Source:
            Emu, section 2.2; `Emu1/models/modeling_emu.py` and the authors' answer in issue 16: the published forward
            prepares the regression's masks and leaves its loss out.
        """
        config = self.config
        ids, next_ids = input_ids[:, :-1], input_ids[:, 1:]

        unlearned = [config.image_token_id, config.image_end_token_id]
        # CODEPATH: the published checkpoints never learn [IMG]; models that start images by themselves do.
        if not config.supervise_image_start:
            unlearned.append(config.image_start_token_id)
        targets = labels[:, 1:].masked_fill(torch.isin(labels[:, 1:], labels.new_tensor(unlearned)), -100)
        if attention_mask is not None and attention_mask.ndim == 2:
            targets = targets.masked_fill(attention_mask[:, :-1] == 0, -100)
        text_loss_sum, num_text_targets = compute_text_loss(logits[:, :-1], targets.to(logits.device))

        is_slot, next_is_slot = ids == config.image_token_id, next_ids == config.image_token_id
        positions = is_slot | ((ids == config.image_start_token_id) & next_is_slot)
        regression_loss_sum, num_regression_targets = compute_regression_loss(
            regressed[:, :-1],
            embeds[:, 1:].detach().to(regressed.device),
            positions.to(regressed.device),
            kind=config.regression_loss,
            normalize_targets=config.normalize_regression_targets,
        )

        text_loss = text_loss_sum / num_text_targets.clamp(min=1)
        regression_loss = (regression_loss_sum / num_regression_targets.clamp(min=1)).to(text_loss.device)
        return {
            "loss": config.text_loss_weight * text_loss + config.regression_loss_weight * regression_loss,
            "text_loss": text_loss,
            "regression_loss": regression_loss,
            "text_loss_sum": text_loss_sum,
            "regression_loss_sum": regression_loss_sum,
            "num_text_targets": num_text_targets,
            "num_regression_targets": num_regression_targets,
        }

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        visual_inputs: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EmuCausalLMOutputWithPast:
        """Predict the next token and the next embedding at each position.

        Args:
            labels: `(B, T)`, long, the ids of the text to learn, -100 elsewhere; shifted here. Images are learned
                wherever they stand in `input_ids`.
            logits_to_keep: number of last positions, or their indices, to predict at; 0 is all of them.

        The other arguments are those of `EmuModel.forward`.

        Raises:
            ValueError: as `EmuModel.forward`, and if labels do not fit the other inputs.
        """
        if labels is not None:
            if input_ids is None or labels.shape != input_ids.shape:
                got = None if input_ids is None else tuple(input_ids.shape)
                raise ValueError(f"labels: got {tuple(labels.shape)}, expected the shape of input_ids ({got})")
            if not isinstance(logits_to_keep, int) or logits_to_keep != 0:
                raise ValueError(f"logits_to_keep: got {logits_to_keep}, expected 0 with labels")

        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            visual_inputs=visual_inputs,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept]
        logits = self.lm_head(hidden_states)
        regressed_embeds = self.regression_head(hidden_states)

        losses = {}
        if labels is not None and input_ids is not None:
            losses = self.compute_losses(
                input_ids, attention_mask, labels, logits, outputs.inputs_embeds, regressed_embeds
            )

        return EmuCausalLMOutputWithPast(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            regressed_embeds=regressed_embeds,
            image_hidden_states=outputs.image_hidden_states,
            **losses,
        )


def compute_text_loss(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy summed over targets, in float32, and their number.

    Args:
        logits: `(B, T, V)`.
        targets: `(B, T)`, long; -100 is no target.
    """
    loss_sum = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return loss_sum, (targets != -100).sum()


def compute_regression_loss(
    predictions: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor, kind: str, normalize_targets: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Regression error summed over positions, in float32, and their number.

    Args:
        predictions: `(B, T, D)`.
        targets: `(B, T, D)`.
        positions: `(B, T)`, bool: where to compare.
        kind: "mse", the mean over D of the squared difference, or "cosine", one minus the cosine.
        normalize_targets: divide both sides by the target's root mean square.
    """
    predictions, targets = predictions.float(), targets.float()
    if normalize_targets:
        scale = targets.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).eps)
        predictions, targets = predictions / scale, targets / scale
    if kind == "cosine":
        errors = 1 - nn.functional.cosine_similarity(predictions, targets, dim=-1)
    else:
        errors = (predictions - targets).square().mean(-1)
    return errors.masked_fill(~positions, 0).sum(), positions.sum()


EmuForMultimodalGeneration.register_for_auto_class(AUTO_CLASSES[0])
