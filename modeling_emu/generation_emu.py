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
"""Generation: at each step of each row, a token or an embedding.

The token stream stays discrete: `[IMG]`, N times `<image>`, `[/IMG]`. The id `<image>` at a position says that the input
there is the embedding that the regression head gave one position before; that embedding travels beside the ids. So
GenerationMixin's own loop runs unchanged, and sampling, penalties, stopping, streaming, caches and compilation are its
own. This file adds which ids a row may take, and the embedding on its way from one step to the next.

Shapes: B rows, T positions, N slots per image, D width of the language model, V vocabulary.
"""

import copy
import functools
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation import (
    BaseStreamer,
    GenerationMode,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput, logging

from .configuration_emu import EmuConfig


logger = logging.get_logger(__name__)

CANDIDATES_AT_ONCE = 8  # candidates ranked in one pass, each with its own copy of the prompt's cache


@dataclass
class EmuGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` gives outside text mode; scores, states and cache as in transformers, where asked for.

    Args:
        sequences: `(B, T)`, long: prompt and generated ids.
        image_embeds: `(num_generated_images, N, D)`: the images generated, in reading order, whole ones only.
        image_rows: `(num_generated_images,)`, long: the row of each.
    """

    image_embeds: torch.Tensor | None = None
    image_rows: torch.Tensor | None = None


@dataclass
class EmuRankOutput:
    """Candidates in the order of their losses.

    Args:
        order: `(num_candidates,)`, long: indices of the candidates, best first.
        losses: `(num_candidates,)`, float32: their losses in nats, as given.
    """

    order: torch.Tensor
    losses: torch.Tensor


class EmuTextLogitsProcessor(LogitsProcessor):
    """Ids that a row cannot choose: slots and `[/IMG]` always, `[IMG]` where no further image may start.

    Stands before all others, so that top-k and top-p choose among ids that can be taken.

    Args:
        prompt_length: T of the prompt, after which images count as generated.
        max_images: images that a row may generate; None for any number.
    """

    def __init__(self, config: EmuConfig, prompt_length: int, max_images: int | None):
        self.start, self.end, self.slot = config.image_start_token_id, config.image_end_token_id, config.image_token_id
        self.prompt_length = prompt_length
        self.max_images = max_images

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`(B, T)` ids and `(B, V)` scores to scores."""
        scores = scores.clone()
        scores[:, self.slot] = scores[:, self.end] = float("-inf")
        if self.max_images is not None:
            num_images = (input_ids[:, self.prompt_length :] == self.end).sum(-1)
            start_scores = scores[:, self.start].masked_fill(num_images >= self.max_images, float("-inf"))
            scores[:, self.start] = start_scores
        return scores


class EmuImageLogitsProcessor(LogitsProcessor):
    """The only id that a row can take inside an image: `<image>` after `[IMG]` until there are N, then `[/IMG]`.

    A pure function of the last N + 1 ids, so every row is in its own mode. Stands after all others, whose temperature,
    bias or penalty cannot end an image early.
    """

    def __init__(self, config: EmuConfig):
        self.start, self.end, self.slot = config.image_start_token_id, config.image_end_token_id, config.image_token_id
        self.num_slots = config.num_image_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`(B, T)` ids and `(B, V)` scores to scores."""
        is_slot = (input_ids[:, -self.num_slots :] == self.slot).long()
        num_trailing = is_slot.flip(-1).cumprod(-1).sum(-1)
        full = num_trailing == self.num_slots
        within = (input_ids[:, -1] == self.start) | ((num_trailing > 0) & ~full)
        scores = scores.masked_fill((within | full)[:, None], float("-inf"))
        scores[:, self.slot] = scores[:, self.slot].masked_fill(within, 0.0)
        scores[:, self.end] = scores[:, self.end].masked_fill(full, 0.0)
        return scores


class EmuGenerationMixin(GenerationMixin):
    """`generate` and `rank_candidates` of `EmuForMultimodalGeneration`.

    Source:
        Emu, section 2.3; `Emu1/models/modeling_emu.py` (`generate`, `generate_image`). The published loop reads the
        whole prompt again for each embedding; this one keeps a cache.
    """

    _supported_generation_modes = [
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    ]

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        generation_mode: Literal["text", "image", "interleaved"] = "text",
        max_images: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | EmuGenerateOutput:
        """Continue prompts with text, with one image, or with both.

        Args:
            inputs: `(B, T)` ids, also as `input_ids`; left-padded, with `attention_mask` and `pixel_values` beside them.
            generation_config: as in transformers, like every other argument of its `generate`.
            generation_mode: "text": no image can start; beams are allowed. "image": the N embeddings of one image per
                row, in exactly N steps; `[IMG]` is appended where a prompt does not end in it (the published tokenizer
                strips white space before it, so such a prompt should not end in a space), and `max_new_tokens` has no
                meaning. "interleaved": text, and an image wherever `[IMG]` is sampled or ends the prompt.
            max_images: in interleaved mode, images that a row may generate, one that its prompt starts included; None
                for any number.

        Returns:
            In text mode what transformers gives, `(B, T + new)` ids. Else `EmuGenerateOutput`. An image cut short by
            `max_new_tokens` keeps its ids, has no embeddings, and a warning says so.

        Raises:
            ValueError: for beams or embeddings as input outside text mode, `use_cache=False`, guidance over tokens,
                right padding, or more positions than the context has.

        Source:
            `Emu1/models/modeling_emu.py`, `generate` and `generate_image`. Its defaults are `num_beams=5` and
            `length_penalty=0`, and its `min_length` counts one `<s>`: m there is `min_new_tokens` = m - 1 here.
        """
        if generation_mode not in ("text", "image", "interleaved"):
            raise ValueError(f"generation_mode: got {generation_mode!r}, expected 'text', 'image' or 'interleaved'")
        if max_images is not None and generation_mode != "interleaved":
            raise ValueError(f"max_images: got {max_images} in {generation_mode} mode, expected None")
        if max_images is not None and max_images < 0:
            raise ValueError(f"max_images: got {max_images}, expected 0 or more")

        if inputs is not None:
            if kwargs.get("input_ids") is not None:
                raise ValueError("input_ids: got them also as the first argument, expected them once")
            kwargs["input_ids"] = inputs
        self._check_prompt(generation_mode, max_images, **kwargs)
        if generation_mode != "text" and self.config.variant == "instruct":
            logger.warning_once("These are weights of Emu-I, which was not trained to make images: expect poor ones.")
        if generation_mode == "image":
            generation_config, kwargs = self._prepare_image_arguments(generation_config, kwargs)
        return super().generate(
            generation_config=generation_config, generation_mode=generation_mode, max_images=max_images, **kwargs
        )

    def _check_prompt(
        self,
        generation_mode: str,
        max_images: int | None,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        streamer: BaseStreamer | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse prompts that cannot be continued, and arguments that have no meaning in a mode."""
        if generation_mode != "text" and (inputs_embeds is not None or input_ids is None):
            raise ValueError(f"input_ids: got none in {generation_mode} mode, expected the prompt as ids")
        if input_ids is not None and (input_ids.ndim != 2 or 0 in input_ids.shape or input_ids.is_floating_point()):
            raise ValueError(
                f"input_ids: got {input_ids.dtype} {tuple(input_ids.shape)}, expected integers (batch, length)"
            )
        loop_arguments = {
            "streamer": streamer,
            "stopping_criteria": stopping_criteria,
            "logits_processor": logits_processor,
        }
        for name, value in loop_arguments.items():
            if generation_mode == "image" and value is not None:
                raise ValueError(f"{name}: got one in image mode, expected None: every id is known in advance")
        if attention_mask is not None and attention_mask.ndim == 2 and not bool(attention_mask[:, -1].all()):
            raise ValueError("attention_mask: got right padding, expected left padding (padding_side='left')")
        if (
            max_images == 0
            and input_ids is not None
            and bool((input_ids[:, -1] == self.config.image_start_token_id).any())
        ):
            raise ValueError("max_images: got 0 with a prompt that ends in [IMG], expected at least 1")

    def _check_length(self, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
        """Refuse more positions than the language model knows, before anything runs."""
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        names = ("input_ids", "inputs_embeds", "attention_mask")
        lengths = [model_kwargs[name].shape[1] for name in names if model_kwargs.get(name) is not None]
        if context is None or not lengths:
            return
        num_new = 1
        if generation_config.max_new_tokens is not None:
            num_new = generation_config.max_new_tokens
        elif generation_config.max_length is not None:
            num_new = max(generation_config.max_length - lengths[0], 1)
        if max(lengths) + num_new - 1 > context:  # what is generated last is not read
            raise ValueError(
                f"prompt: got {max(lengths)} positions and {num_new} to generate, expected at most {context + 1} together"
            )

    def _prepare_image_arguments(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig | None, dict[str, Any]]:
        """Arguments of transformers' `generate` that make it regress one image per row."""
        input_ids, attention_mask = self._append_image_start(**kwargs)
        kwargs = {**kwargs, "input_ids": input_ids, "attention_mask": attention_mask, "custom_generate": regress_image}
        settings = {"max_new_tokens": self.config.num_image_tokens + 1, "max_length": None}  # the last is `[/IMG]`
        if self._needs_static_cache(attention_mask, generation_config, kwargs):
            # Not compiled, which the caller did not ask for: a single picture would not repay it.
            settings |= {"cache_implementation": "static", "disable_compile": True}
        if generation_config is None:
            return None, kwargs | settings
        generation_config = copy.deepcopy(generation_config)
        for name, value in settings.items():
            setattr(generation_config, name, value)
        return generation_config, {name: value for name, value in kwargs.items() if name not in settings}

    def _needs_static_cache(
        self, attention_mask: torch.Tensor, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> bool:
        """Whether image mode should take a static cache: where rows are padded, and nothing speaks for another.

        A static cache has its mask ready, where a dynamic one asks the device at every step which rows are padded. A
        cache that is handed back must grow in later calls, and one under autocast gets other dtypes than the weights'.
        """
        configs = [config for config in (generation_config, self.generation_config) if config is not None]
        is_chosen = kwargs.get("past_key_values") is not None or any(
            kwargs.get(name) or any(getattr(config, name) for config in configs)
            for name in ("cache_implementation", "return_dict_in_generate")
        )
        devices = {attention_mask.device.type, self.device.type} - {"meta"}
        is_autocast = any(torch.is_autocast_enabled(device) for device in devices)
        return not is_chosen and not is_autocast and not bool(attention_mask.all())

    def _append_image_start(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """End every row in `[IMG]`; rows that do already get one more position of padding on the left instead."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        has_start = input_ids[:, -1:] == self.config.image_start_token_id  # never padding: that is on the left
        if bool(has_start.all()):
            return input_ids, attention_mask
        if past_key_values is not None and bool(has_start.any()):
            raise ValueError("input_ids: got some rows that end in [IMG] beside a cache, expected all or none")
        start = torch.full_like(input_ids[:, :1], self.config.image_start_token_id)
        padding = torch.full_like(start, self.config.get_text_config().pad_token_id or 0)
        ones, zeros = torch.ones_like(attention_mask[:, :1]), torch.zeros_like(attention_mask[:, :1])
        return (
            torch.where(has_start, torch.cat((padding, input_ids), 1), torch.cat((input_ids, start), 1)),
            torch.where(has_start, torch.cat((zeros, attention_mask), 1), torch.cat((attention_mask, ones), 1)),
        )

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict]:
        """Take our own arguments out, keep them on this call's copy of the config, refuse what cannot work."""
        mode, max_images = kwargs.pop("generation_mode", "text"), kwargs.pop("max_images", None)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        generation_config._emu_mode, generation_config._emu_max_images = mode, max_images
        if not generation_config.use_cache:
            raise ValueError("use_cache: got False, expected True: generated embeddings are only in the cache")
        if generation_config.guidance_scale not in (None, 1, 1.0):
            raise ValueError(
                f"guidance_scale: got {generation_config.guidance_scale}, expected 1: Emu guides in EmuPipeline's decoder"
            )
        if generation_config.num_beams not in (None, 1) and mode != "text":
            raise ValueError(f"num_beams: got {generation_config.num_beams} in {mode} mode, expected 1")
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if mode == "image" and getattr(generation_config, name):
                raise ValueError(f"{name}: got True in image mode, expected False: its steps keep embeddings alone")
        self._check_length(generation_config, model_kwargs)
        return generation_config, model_kwargs

    def _get_logits_processor(
        self, generation_config: GenerationConfig, input_ids_seq_length: int = 0, **kwargs: Any
    ) -> LogitsProcessorList:
        """Transformers' own processors between the two that know of images."""
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, **kwargs)
        in_text_mode = generation_config._emu_mode == "text"
        max_images = 0 if in_text_mode else generation_config._emu_max_images
        first = EmuTextLogitsProcessor(self.config, input_ids_seq_length, max_images)
        last = [] if in_text_mode else [EmuImageLogitsProcessor(self.config)]
        return LogitsProcessorList([first, *processors, *last])

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        visual_inputs: torch.Tensor | None = None,
        recorded_embeds: list[torch.Tensor] | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; the embedding of the last step goes in at every step but the first.

        `inputs_embeds` is in the signature because transformers reads there that a prompt may be embeddings;
        `recorded_embeds` is for the loop alone and goes no further.
        """
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration:
            model_inputs["visual_inputs"] = visual_inputs
        return model_inputs

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers; hands the embedding on, and keeps it where images may be generated."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        # A copy: the buffer belongs to the compiled call, whose next run overwrites it.
        model_kwargs["visual_inputs"] = outputs.regressed_embeds[:, -1:].clone()
        if model_kwargs.get("recorded_embeds") is not None:
            model_kwargs["recorded_embeds"].append(model_kwargs["visual_inputs"])
        return model_kwargs

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Transformers' loop; outside text mode with the embeddings of the images that it went through."""
        if generation_config._emu_mode == "text":
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        recorded_embeds: list[torch.Tensor] = []
        outputs = super()._sample(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            recorded_embeds=recorded_embeds,
            **kwargs,
        )
        fields = dict(outputs) if isinstance(outputs, GenerateDecoderOnlyOutput) else {"sequences": outputs}
        new_ids = fields["sequences"][:, input_ids.shape[1] :]
        # Ranks that wait for others run on without adding ids.
        embeds = torch.cat(recorded_embeds[: new_ids.shape[1]], dim=1)
        image_embeds, image_rows = self._collect_images(new_ids, embeds)
        return EmuGenerateOutput(**fields, image_embeds=image_embeds, image_rows=image_rows)

    def _collect_images(self, new_ids: torch.Tensor, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole images among generated positions: `(B, T)` ids and `(B, T, D)` to `(n, N, D)` and `(n,)` rows."""
        num_slots = self.config.num_image_tokens
        is_slot = new_ids == self.config.image_token_id
        # Slots stand in runs of N, but for a last run that the length limit cut short.
        cut = is_slot.flip(-1).long().cumprod(-1).flip(-1).bool()
        cut &= cut.sum(-1, keepdim=True) < num_slots
        num_cut = int(cut.any(-1).sum())
        if num_cut:
            logger.warning(
                f"{num_cut} of {new_ids.shape[0]} rows end inside an image, which is left out: "
                f"max_new_tokens is too small for its {num_slots} embeddings."
            )
        rows, positions = (is_slot & ~cut).nonzero(as_tuple=True)
        return embeds[rows, positions].unflatten(0, (-1, num_slots)), rows[::num_slots]

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Continuous batching knows ids alone."""
        raise ValueError("generate_batch: continuous batching carries no embeddings, expected generate()")

    @torch.no_grad()
    def rank_candidates(
        self, inputs: dict, candidates: list[list[int]], reduction: Literal["sum", "mean"] = "sum"
    ) -> EmuRankOutput:
        """Order candidate continuations of one prompt by their loss.

        Args:
            inputs: what `EmuProcessor` makes of one prompt: `input_ids` `(1, T)`, `attention_mask`, `pixel_values`.
            candidates: ids of each candidate, without a start token (`EmuProcessor.encode_candidates`).
            reduction: "sum" of a candidate's token losses, the published order within one batch; "mean", that sum over
                the T + length - 1 positions of prompt and candidate, the published order with one candidate at a time.

        Raises:
            ValueError: for several prompts, no candidates, an empty candidate, or another reduction.

        Source:
            `Emu1` VisDial evaluation.
        """
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction: got {reduction!r}, expected 'sum' or 'mean'")
        if inputs["input_ids"].shape[0] != 1:
            raise ValueError(f"prompts: got {inputs['input_ids'].shape[0]}, expected 1")
        if not candidates or not all(len(candidate) for candidate in candidates):
            raise ValueError(f"candidates: got {candidates}, expected at least one, none of them empty")

        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        length = inputs["input_ids"].shape[1] + max(map(len, candidates))
        if context is not None and length > context:
            raise ValueError(f"prompt and longest candidate: got {length} positions, expected at most {context}")
        prompt_mask = inputs.get("attention_mask")
        if prompt_mask is None:
            prompt_mask = torch.ones_like(inputs["input_ids"])
        position_ids = (prompt_mask.cumsum(-1) - 1).clamp(min=0)
        prompt = self(**inputs, position_ids=position_ids, use_cache=True, logits_to_keep=1)
        losses = torch.cat(
            [
                self._compute_candidate_losses(
                    prompt.logits, prompt.past_key_values, prompt_mask, candidates[first : first + CANDIDATES_AT_ONCE]
                )
                for first in range(0, len(candidates), CANDIDATES_AT_ONCE)
            ]
        )
        if reduction == "mean":
            prompt_length = prompt_mask.sum()
            losses = losses / (prompt_length - 1 + torch.tensor([len(c) for c in candidates], device=losses.device))
        return EmuRankOutput(order=losses.argsort(stable=True), losses=losses)

    def _compute_candidate_losses(
        self,
        prompt_logits: torch.Tensor,
        prompt_cache: Cache,
        prompt_mask: torch.Tensor,
        candidates: list[list[int]],
    ) -> torch.Tensor:
        """`(num_candidates,)` sums of token losses, in float32, in one pass over copies of the prompt's cache."""
        cache = copy.deepcopy(prompt_cache)
        cache.batch_repeat_interleave(len(candidates))
        length = max(len(candidate) for candidate in candidates)
        ids = torch.tensor([[*c, *[0] * (length - len(c))] for c in candidates], device=prompt_mask.device)
        mask = torch.tensor([[1] * len(c) + [0] * (length - len(c)) for c in candidates], device=prompt_mask.device)
        attention_mask = torch.cat((prompt_mask.expand(len(candidates), -1).to(mask.dtype), mask), dim=1)
        positions = attention_mask.cumsum(-1)[:, -length:] - 1
        outputs = self(ids, attention_mask=attention_mask, position_ids=positions, past_key_values=cache)
        logits = torch.cat((prompt_logits.expand(len(candidates), -1, -1), outputs.logits[:, :-1]), dim=1)
        log_probs = logits.float().log_softmax(-1).gather(-1, ids.unsqueeze(-1).to(logits.device)).squeeze(-1)
        return -(log_probs * mask.to(log_probs.device)).sum(-1)


def regress_next(model: "EmuGenerationMixin", logits_to_keep: int | None = None, **model_inputs: Any) -> ModelOutput:
    """The model's `forward` for one position, without the logits, which image mode never reads.

    The embedding comes back on the device of the ids, as accelerate's hooks on `forward` bring it back when the model
    lies on several.
    """
    outputs = model.model(**model_inputs)
    outputs.regressed_embeds = model.regression_head(outputs.last_hidden_state).to(model_inputs["input_ids"].device)
    return outputs


def regress_image(
    model: "EmuGenerationMixin",
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> EmuGenerateOutput:
    """Decoding loop of image mode: N steps from `[IMG]`, with nothing to ask of the device between them.

    Takes what transformers hands to a `custom_generate`. Every id is known in advance, so there is nothing to sample
    or to stop at. Where the cache is to be returned, one more step puts the last embedding into it.
    """
    forward = functools.partial(regress_next, model)
    if model._valid_auto_compile_criteria(model_kwargs, generation_config):
        forward = model.get_compiled_call(generation_config.compile_config)
    slot = torch.full_like(input_ids[:, :1], model.config.image_token_id)
    num_slots = model.config.num_image_tokens
    num_steps = num_slots + 1 if generation_config.return_dict_in_generate else num_slots

    sequences = input_ids
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    recorded_embeds = model_kwargs["recorded_embeds"] = []
    with model._optimize_model_for_decode():
        for _ in range(num_steps - 1):
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            sequences = torch.cat((sequences, slot), dim=1)
            model_inputs = model.prepare_inputs_for_generation(sequences, next_sequence_length=1, **model_kwargs)
            outputs = forward(**model_inputs, return_dict=True)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)

    end = torch.full_like(slot, model.config.image_end_token_id)
    return EmuGenerateOutput(
        sequences=torch.cat((input_ids, slot.expand(-1, num_slots), end), dim=1),
        image_embeds=torch.cat(recorded_embeds[:num_slots], dim=1),
        image_rows=torch.arange(input_ids.shape[0], device=input_ids.device),
        past_key_values=model_kwargs["past_key_values"] if generation_config.return_dict_in_generate else None,
    )
