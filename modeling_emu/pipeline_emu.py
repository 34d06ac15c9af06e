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
"""EmuPipeline: documents to pictures, and to documents with pictures in them.

The multimodal encoder regresses N embeddings for a document; they condition a U-Net, guided against the embeddings of
the empty prompt; the VAE makes the picture, unless the U-Net works on pixels itself. The only file that needs diffusers. What the embeddings mean and how they
are generated is the encoder's business.

Shapes: B pictures, N slots per image, D width of the language model, C channels of the latents, H and W in pixels.
"""

from .configuration_emu import EmuConfig  # first: it checks transformers' version


# isort: split
import inspect
import json
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, logging
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_processing_utils import BaseImageProcessor

from .documents_emu import prepare_documents
from .modeling_emu import EmuForMultimodalGeneration
from .processing_emu import EmuProcessor


if TYPE_CHECKING:
    from .generation_emu import EmuGenerateOutput

    # Named here because diffusers copies the direct imports of this file only.
    from .modeling_emu_causal_former import EmuCausalFormer as EmuCausalFormer

logger = logging.get_logger(__name__)

Document = list[dict[str, Any]]
Generators = torch.Generator | list[torch.Generator] | None

RGB_CHANNELS = 3
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PIPELINE_CLASS = ["pipeline_emu", "EmuPipeline"]


class EmuHubModel(transformers.PreTrainedModel):
    """What `model_index.json` names for the multimodal encoder, so that both libraries load one repository.

    diffusers loads components by name from `transformers`, without handing `trust_remote_code` on, and takes one that
    has no folder of its own from the root. So this stand-in, which is set into `transformers` below, loads
    `EmuForMultimodalGeneration` from there. It runs the code beside this file, whose execution the user has allowed,
    and none that the folder names. Its name is not the real one: AutoModel would take that for a class of
    transformers' own.
    """

    class config_class:
        """Reads the configuration from the root, where `device_map="balanced"` would look into a subfolder."""

        @classmethod
        def from_pretrained(cls, folder: str, subfolder: str | None = None, **kwargs: Any) -> EmuConfig:
            """The `EmuConfig` of a repository."""
            return EmuConfig.from_pretrained(folder, **kwargs)

    def __new__(cls, config: EmuConfig) -> EmuForMultimodalGeneration:
        """A model without weights, to measure."""
        return EmuForMultimodalGeneration(config)

    @classmethod
    def from_pretrained(cls, folder: str, **kwargs: Any) -> EmuForMultimodalGeneration:
        """The model of a repository."""
        return EmuForMultimodalGeneration.from_pretrained(folder, **kwargs)


class EmuHubProcessor(transformers.ProcessorMixin):
    """`EmuHubModel`'s counterpart for the processor."""

    @classmethod
    def from_pretrained(cls, folder: str, **kwargs: Any) -> EmuProcessor:
        """The processor of a repository, part by part: for an auto class, the folder's code would have to be trusted."""
        parts = [
            transformers.CLIPImageProcessorPil.from_pretrained(folder),
            transformers.PreTrainedTokenizerFast.from_pretrained(folder),
        ]
        settings, _ = EmuProcessor.get_processor_dict(folder)
        return EmuProcessor.from_args_and_dict(parts, settings)


transformers.EmuHubModel = EmuHubModel
transformers.EmuHubProcessor = EmuHubProcessor

ROOT_COMPONENTS = {"multimodal_encoder": EmuHubModel, "processor": EmuHubProcessor}


def make_model_index(components: Mapping[str, Sequence[str | None]]) -> dict[str, Any]:
    """The entries of `model_index.json` that diffusers loads an Emu repository by.

    Args:
        components: name -> library and class, as diffusers registers them; `(None, None)` for one that is absent. The
            classes of `multimodal_encoder` and `processor` are replaced by their stand-ins.
    """
    index: dict[str, Any] = {"_class_name": PIPELINE_CLASS}
    for name, (library, class_name) in sorted(components.items()):
        if name in ROOT_COMPONENTS and library is not None:
            library, class_name = "transformers", ROOT_COMPONENTS[name].__name__
        index[name] = [library, class_name]
    return index


@dataclass
class EmuPipelineOutput(BaseOutput):
    """The pictures of one call.

    Args:
        images: B PIL images, or an array `(B, H, W, 3)` or tensor `(B, 3, H, W)` in the range [0, 1], or latents
            `(B, C, H / vae_scale_factor, W / vae_scale_factor)`, by `output_type`.
        nsfw_content_detected: per picture, whether the safety checker found something and blacked it; None without a
            safety checker, and for latents.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    nsfw_content_detected: list[bool] | None


class EmuPipeline(DiffusionPipeline):
    """Pictures from documents of text, images and videos.

    Args:
        multimodal_encoder: `EmuForMultimodalGeneration`; None where only embeddings are given to the call.
        processor: `EmuProcessor`; None as above.
        unet: whose cross-attention reads the width of the language model.
        vae: of Stable Diffusion; None for a U-Net that works on pixels: the latents are RGB in [-1, 1] then.
        scheduler: any of diffusers' Karras schedulers.
        safety_checker: blacks pictures that it finds unsafe; None to leave the check out.
        feature_extractor: makes the safety checker's input.

    Source:
        Emu, section 2.3; `Emu1/models/pipeline.py`.
    """

    model_cpu_offload_seq = "multimodal_encoder->unet->vae"
    _exclude_from_cpu_offload = ["safety_checker"]
    _optional_components = ["multimodal_encoder", "processor", "vae", "safety_checker", "feature_extractor"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    def __init__(
        self,
        multimodal_encoder: transformers.PreTrainedModel | None,
        processor: transformers.ProcessorMixin | None,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL | None,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: BaseImageProcessor | None = None,
    ):
        super().__init__()
        if safety_checker is not None and feature_extractor is None:
            raise ValueError(
                "feature_extractor: got None, expected one beside a safety_checker, which reads its output"
            )
        if multimodal_encoder is not None:
            width = multimodal_encoder.config.get_text_config().hidden_size
            if unet.config.cross_attention_dim != width:
                raise ValueError(
                    f"unet.config.cross_attention_dim: got {unet.config.cross_attention_dim}, expected {width}, the "
                    f"width of the multimodal encoder's language model"
                )
        if vae is None and unet.config.in_channels != RGB_CHANNELS:
            raise ValueError(
                f"unet.config.in_channels: got {unet.config.in_channels} without a vae, expected {RGB_CHANNELS}: without "
                f"one, the U-Net works on pixels"
            )
        self.register_modules(
            multimodal_encoder=multimodal_encoder,
            processor=processor,
            unet=unet,
            vae=vae,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        self.vae_scale_factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._null_embeds: torch.Tensor | None = None
        self._null_embeds_of: tuple = ()

    @property
    def guidance_scale(self) -> float:
        """Weight of the guidance in the call that runs; a callback may change it."""
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """Share of rescaled noise in the call that runs."""
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the U-Net also runs on the negative embeddings."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that runs; callbacks read it."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to leave out the remaining steps."""
        return self._interrupt

    def _get_vae(self) -> AutoencoderKL:
        """The VAE, where what is asked for needs one.

        Raises:
            ValueError: if there is none.
        """
        if self.vae is None:
            raise ValueError("vae: got None, expected one: a U-Net that works on pixels has nothing to slice or tile")
        return self.vae

    def enable_vae_slicing(self) -> None:
        """Decode one picture after the other, to save memory."""
        self._get_vae().enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode all pictures at once."""
        self._get_vae().disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large pictures in tiles, to save memory."""
        self._get_vae().enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode pictures whole."""
        self._get_vae().disable_tiling()

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the U-Net was trained for."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def _fill_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width as given, else the default."""
        default_height, default_width = self.default_size
        return default_height if height is None else height, default_width if width is None else width

    def check_inputs(
        self,
        documents: list[Document] | None,
        negative_documents: list[Document] | None,
        height: int,
        width: int,
        num_inference_steps: int,
        num_images_per_prompt: int,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
    ) -> None:
        """Refuse a call that cannot work, before anything runs. Arguments as in `__call__`, prompts as documents.

        Raises:
            ValueError: says what was given and what is expected.
        """
        num_prompts = self._check_prompts(documents, negative_documents, prompt_embeds, negative_prompt_embeds)
        if not all(size > 0 and size % self.vae_scale_factor == 0 for size in (height, width)):
            raise ValueError(
                f"height and width: got {height} and {width}, expected multiples of {self.vae_scale_factor}"
            )
        for name, count in {
            "num_inference_steps": num_inference_steps,
            "num_images_per_prompt": num_images_per_prompt,
        }.items():
            if count < 1:
                raise ValueError(f"{name}: got {count}, expected at least 1")
        num_pictures = num_prompts * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != num_pictures:
            raise ValueError(f"generator: got a list of {len(generator)}, expected {num_pictures}, one per picture")
        shape = self._latents_shape(num_pictures, height, width)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents: got {tuple(latents.shape)}, expected {shape}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: got {output_type!r}, expected one of {OUTPUT_TYPES}")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: got {unknown}, expected some of {self._callback_tensor_inputs}"
            )

    def _check_prompts(
        self,
        documents: list[Document] | None,
        negative_documents: list[Document] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
    ) -> int:
        """Refuse conditions that exclude each other or do not fit; the number of prompts."""
        if (documents is None) == (prompt_embeds is None):
            raise ValueError("prompt: got both or none of prompt and prompt_embeds, expected one of them")
        if negative_documents is not None and negative_prompt_embeds is not None:
            raise ValueError("negative_prompt: got it beside negative_prompt_embeds, expected one of them")
        needs_null_embeds = self.do_classifier_free_guidance and negative_prompt_embeds is None
        if documents is not None:
            self._check_can_encode("prompt")
        elif needs_null_embeds:
            self._check_can_encode("guidance, but no negative_prompt_embeds")
        embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        shapes = {name: tuple(given.shape) for name, given in embeds.items() if given is not None}
        width = self.unet.config.cross_attention_dim
        for name, shape in shapes.items():
            if len(shape) != 3 or shape[-1] != width:
                raise ValueError(f"{name}: got {shape}, expected (num_prompts, num_image_tokens, {width})")
        lengths = {name: shape[1] for name, shape in shapes.items()}
        if documents is not None or needs_null_embeds:
            lengths["multimodal_encoder"] = self.multimodal_encoder.config.num_image_tokens
        if self.do_classifier_free_guidance and len(set(lengths.values())) > 1:
            raise ValueError(f"embeddings per prompt: got {lengths}, expected as many for both sides of the guidance")

        num_prompts = shapes["prompt_embeds"][0] if documents is None else len(documents)
        num_negative = shapes.get("negative_prompt_embeds", (1,))[0]
        if negative_documents is not None:
            num_negative = len(negative_documents)
        if num_negative not in (1, num_prompts):
            raise ValueError(f"negative prompts: got {num_negative}, expected 1 or {num_prompts}, as many as prompts")
        return num_prompts

    def _check_can_encode(self, what: str) -> None:
        """Refuse what needs the language model where there is none."""
        for name in ("multimodal_encoder", "processor"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"{name}: got None with {what}, expected one (without it, pass prompt_embeds, and either "
                    f"negative_prompt_embeds or guidance_scale=1)"
                )

    def _latents_shape(self, num_pictures: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Of the latents of a call."""
        return (
            num_pictures,
            self.unet.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )

    @property
    def _encoder_device(self) -> torch.device:
        """Where the encoder computes; offloading hooks keep its weights elsewhere between calls."""
        has_hook = hasattr(self.multimodal_encoder, "_hf_hook")
        return self._execution_device if has_hook else self.multimodal_encoder.device

    def _prepare_encoder_inputs(self, documents: list[Document]) -> transformers.BatchFeature:
        """Encode documents, left-padded, for the encoder's `generate`; brings an offloaded encoder to its device.

        `generate` runs the vision tower before it calls `forward`, which is what an offloading hook waits for.
        """
        inputs = self.processor(documents=documents, padding=True, padding_side="left", return_tensors="pt")
        if hasattr(self.multimodal_encoder, "_hf_hook"):
            self.multimodal_encoder._hf_hook.pre_forward(self.multimodal_encoder)
        return inputs.to(device=self._encoder_device, dtype=self.multimodal_encoder.dtype)

    @torch.no_grad()
    def regress_embeds(self, documents: list[Document]) -> torch.Tensor:
        """The embeddings of the picture that follows each document.

        Args:
            documents: one per row, of parts in their full form.

        Returns:
            `(num_documents, N, D)`, in the dtype of the encoder.

        Source:
            `Emu1/models/modeling_emu.py`, `generate_image`.
        """
        inputs = self._prepare_encoder_inputs([trim_document(document) for document in documents])
        return self.multimodal_encoder.generate(**inputs, generation_mode="image").image_embeds

    def get_null_embeds(self) -> torch.Tensor:
        """What the encoder regresses for the empty prompt, `(1, N, D)`.

        Depends on nothing but the encoder, so it is kept, and computed again when the encoder is another one, has
        moved, or an optimiser or `load_state_dict` wrote to its parameters. Writing to `.data`, as merging adapters
        does, and switching adapters cannot be seen so: call `forget_null_embeds` then.
        """
        encoder = self.multimodal_encoder
        versions = sum(parameter._version for parameter in encoder.parameters() if not parameter.is_inference())
        state = (weakref.ref(encoder), self._encoder_device, encoder.dtype, versions)
        null_embeds = self._null_embeds if self._null_embeds_of == state else None
        if null_embeds is None:
            null_embeds = self.regress_embeds(prepare_documents(""))
            self._null_embeds, self._null_embeds_of = null_embeds, state
        return null_embeds

    def forget_null_embeds(self) -> None:
        """Have the null embeds computed again at the next call."""
        self._null_embeds = None

    def encode_prompt(
        self,
        prompt: Any = None,
        negative_prompt: Any = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The conditions of all pictures of a call.

        Args:
            prompt: see `__call__`; not read where `prompt_embeds` are given.
            negative_prompt: as `prompt`, one for all or one per prompt; None and "" give the null embeds.
            num_images_per_prompt: pictures per prompt, which follow each other.
            do_classifier_free_guidance: whether negative embeddings are needed.
            prompt_embeds: `(num_prompts, N, D)`.
            negative_prompt_embeds: `(1, N, D)` or `(num_prompts, N, D)`.

        Returns:
            Two tensors `(B, N, D)` in the dtype of the U-Net, or one and None without guidance.
        """
        if prompt_embeds is None:
            prompt_embeds = self.regress_embeds(prepare_documents(prompt))
        place = {"device": self._execution_device, "dtype": self.unet.dtype}
        num_prompts = prompt_embeds.shape[0]
        prompt_embeds = prompt_embeds.to(**place).repeat_interleave(num_images_per_prompt, dim=0)
        if not do_classifier_free_guidance:
            return prompt_embeds, None

        if negative_prompt_embeds is None:
            documents = prepare_documents("" if negative_prompt is None else negative_prompt)
            is_empty = [trim_document(document) for document in documents] == prepare_documents("")
            negative_prompt_embeds = self.get_null_embeds() if is_empty else self.regress_embeds(documents)
        negative_prompt_embeds = negative_prompt_embeds.to(**place).expand(num_prompts, -1, -1)
        return prompt_embeds, negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)

    def prepare_latents(
        self,
        num_pictures: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The noise to start from, `(B, C, H / vae_scale_factor, W / vae_scale_factor)`, as strong as the scheduler asks.

        Args:
            latents: noise of unit variance to take instead.
        """
        if latents is None:
            shape = self._latents_shape(num_pictures, height, width)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    def prepare_extra_step_kwargs(self, generator: Generators) -> dict[str, Any]:
        """The generator, for schedulers whose steps add noise."""
        accepts_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if accepts_generator else {}

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to pictures `(B, 3, H, W)`, in the range [-1, 1] but for the error of the VAE or of the U-Net."""
        if self.vae is None:
            return latents
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(latents, return_dict=False)[0]

    def run_safety_checker(self, images: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        """Pictures `(B, 3, H, W)` with the unsafe ones zero, and which these are; None without a safety checker."""
        if self.safety_checker is None:
            return images, None
        pil_images = self.image_processor.postprocess(images, output_type="pil")
        features = self.feature_extractor(pil_images, return_tensors="pt")["pixel_values"]
        features = features.to(device=self.safety_checker.device, dtype=self.safety_checker.dtype)
        return self.safety_checker(images=images, clip_input=features)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        negative_prompt: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, torch.Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> EmuPipelineOutput | tuple:
        """Draw the picture that follows each document.

        Args:
            prompt: a text, an image, or a list of parts (texts, images, lists of frames, dictionaries) for one
                picture; a list of lists of parts for one picture each.
            negative_prompt: what guidance leads away from, in the same forms, one for all or one per prompt; default
                the empty prompt.
            height: in pixels, a multiple of `vae_scale_factor`; default the U-Net's own.
            width: as `height`.
            num_inference_steps: denoising steps.
            timesteps: timesteps of your own instead, for schedulers that take them.
            sigmas: noise levels of your own instead, for schedulers that take them.
            guidance_scale: weight of the guidance; 1 or less leaves it out, and halves the work of the U-Net.
            guidance_rescale: share of the guided noise that gets the spread of the unguided (0 to 1).
            num_images_per_prompt: pictures per prompt, which follow each other in the output.
            generator: of the noise, one for all or one per picture.
            latents: `(B, C, H / vae_scale_factor, W / vae_scale_factor)`, noise to start from instead.
            prompt_embeds: `(num_prompts, N, D)`, instead of `prompt`; the encoder is not needed then.
            negative_prompt_embeds: `(1, N, D)` or `(num_prompts, N, D)`, instead of `negative_prompt`.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False for a plain tuple.
            callback_on_step_end: called after each step with the pipeline, the step, the timestep and a dictionary of
                tensors; gives back those that it changed (as a dictionary; None for none).
            callback_on_step_end_tensor_inputs: tensors that the callback gets, of `_callback_tensor_inputs`. With
                guidance, `prompt_embeds` is `(2 B, N, D)`, the negative ones first.

        Returns:
            `EmuPipelineOutput`, or the tuple of its fields.

        Raises:
            ValueError: for arguments that exclude each other or do not fit, before anything runs.

        Source:
            Emu, section 2.3; `Emu1/models/pipeline.py`.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        height, width = self._fill_size(height, width)
        documents = None if prompt is None else prepare_documents(prompt)
        negative_documents = None if negative_prompt is None else prepare_documents(negative_prompt)
        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._interrupt = False
        self.check_inputs(
            documents,
            negative_documents,
            height,
            width,
            num_inference_steps,
            num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        if not self.do_classifier_free_guidance and (
            negative_documents is not None or negative_prompt_embeds is not None
        ):
            logger.warning(f"The negative prompt has no effect at guidance_scale={guidance_scale}: raise it above 1.")

        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            documents,
            negative_documents,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            prompt_embeds,
            negative_prompt_embeds,
        )
        num_pictures, device = prompt_embeds.shape[0], self._execution_device
        if negative_prompt_embeds is not None:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, device, timesteps, sigmas
        )
        latents = self.prepare_latents(num_pictures, height, width, prompt_embeds.dtype, device, generator, latents)
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator)

        self._num_timesteps = len(timesteps)
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                latent_model_input = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
                latent_model_input = self.scheduler.scale_model_input(latent_model_input, t)
                noise_pred = self.unet(latent_model_input, t, encoder_hidden_states=prompt_embeds).sample
                if self.do_classifier_free_guidance:
                    noise_uncond, noise_cond = noise_pred.chunk(2)
                    noise_pred = noise_uncond + self.guidance_scale * (noise_cond - noise_uncond)
                    if self.guidance_rescale > 0:
                        noise_pred = rescale_noise_cfg(noise_pred, noise_cond, self.guidance_rescale)
                latents = self.scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors: dict[str, Any] = {"latents": latents, "prompt_embeds": prompt_embeds}
                    asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, asked) or {}
                    latents, prompt_embeds = tensors["latents"], tensors["prompt_embeds"]

                # Schedulers of second order take two steps for one.
                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()

        images, nsfw_content_detected = latents, None
        if output_type != "latent":
            images, nsfw_content_detected = self.run_safety_checker(self.decode_latents(latents))
            # A blacked picture is zero already; denormalised, it would be grey.
            is_safe = [not unsafe for unsafe in nsfw_content_detected or [False] * num_pictures]
            images = self.image_processor.postprocess(images, output_type=output_type, do_denormalize=is_safe)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, nsfw_content_detected
        return EmuPipelineOutput(images=images, nsfw_content_detected=nsfw_content_detected)

    @torch.no_grad()
    def generate_document(
        self,
        prompt: Any,
        max_new_tokens: int = 512,
        negative_prompt: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        generator: torch.Generator | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pictures_at_once: int = 4,
        **generate_kwargs: Any,
    ) -> Document | list[Document]:
        """Continue documents with text and pictures, in the order in which the model makes them.

        The published weights were never trained to begin an image, so with them the continuation is text; weights
        trained with `supervise_image_start` begin images where they fit.

        Args:
            prompt: see `__call__`.
            max_new_tokens: ids to generate per document; an image takes N + 2. One that they cut short is left out,
                with a warning.
            generator: of sampling and noise.
            pictures_at_once: pictures that the U-Net draws in one batch; their noise does not depend on it.
            generate_kwargs: of the encoder's `generate`: `max_images`, `do_sample`, `temperature`, `streamer`, ...

        The other arguments are those of `__call__`; the negative prompt is one for all pictures.

        Returns:
            The parts that follow the prompt, `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`
            (PIL; with a safety checker also `"nsfw_content_detected"`); for a list of documents, a list of them.

        Raises:
            ValueError: as `__call__` and the encoder's `generate`.
        """
        documents = prepare_documents(prompt)
        negative_documents = None if negative_prompt is None else prepare_documents(negative_prompt)
        if pictures_at_once < 1:
            raise ValueError(f"pictures_at_once: got {pictures_at_once}, expected at least 1")
        num_negative = 1 if negative_prompt_embeds is None else len(negative_prompt_embeds)
        num_negative = num_negative if negative_documents is None else len(negative_documents)
        if num_negative != 1:
            raise ValueError(f"negative prompts: got {num_negative}, expected 1 for all pictures")
        if generate_kwargs.get("num_return_sequences") not in (None, 1):
            raise ValueError(
                f"num_return_sequences: got {generate_kwargs['num_return_sequences']}, expected 1: one document per "
                f"prompt (give the prompt several times instead)"
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator: got {type(generator).__name__}, expected one torch.Generator")
        height, width = self._fill_size(height, width)
        self._guidance_scale = guidance_scale
        self.check_inputs(
            documents,
            negative_documents,
            height,
            width,
            num_inference_steps,
            num_images_per_prompt=1,
            negative_prompt_embeds=negative_prompt_embeds,
        )

        inputs = self._prepare_encoder_inputs(documents)
        device = inputs["input_ids"].device
        # With a generator, sampling starts from a seed that it draws, and the global state stays as it was.
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=generator is not None):
            if generator is not None:
                seed = torch.randint(2**62, (), generator=generator, device=generator.device)
                torch.manual_seed(int(seed))
            outputs: EmuGenerateOutput = self.multimodal_encoder.generate(
                **inputs, generation_mode="interleaved", max_new_tokens=max_new_tokens, **generate_kwargs
            )
        continuations = self.processor.decode_documents(outputs, prompt_length=inputs["input_ids"].shape[1])

        image_parts = [part for document in continuations for part in document if part["type"] == "image"]
        noise = randn_tensor(
            self._latents_shape(len(image_parts), height, width),
            generator=generator,
            device=self._execution_device,
            dtype=self.unet.dtype,
        )
        for first in range(0, len(image_parts), pictures_at_once):
            parts = image_parts[first : first + pictures_at_once]
            images, nsfw_content_detected = self(
                prompt_embeds=torch.stack([part.pop("image_embeds") for part in parts]),
                negative_prompt=negative_documents,
                negative_prompt_embeds=negative_prompt_embeds,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                generator=generator,
                latents=noise[first : first + pictures_at_once],
                return_dict=False,
            )
            for index, part in enumerate(parts):
                part["image"] = images[index]
                if nsfw_content_detected is not None:
                    part["nsfw_content_detected"] = nsfw_content_detected[index]
        self.maybe_free_model_hooks()
        is_batch = isinstance(prompt, list | tuple) and all(isinstance(entry, list | tuple) for entry in prompt)
        return continuations if is_batch else continuations[0]

    def to_json_string(self) -> str:
        """`model_index.json`, naming this file's pipeline and the stand-ins of the components at the root."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)  # a folder of this machine
        components = {name: value for name, value in index.items() if isinstance(value, list) and name[0] != "_"}
        return json.dumps(index | make_model_index(components), indent=2, sort_keys=True) + "\n"

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a repository that serves both libraries: the encoder and the processor at its root, with their code.

        Args:
            save_directory: folder; made where it does not exist.
            safe_serialization: True, there are no other weights.
            variant: None; at the root, diffusers looks for none.
            max_shard_size: of one weight file, such as "5GB"; default each library's own.
            push_to_hub: upload it, too.
            kwargs: `repo_id` (default the name of the folder), `commit_message`, `private`, `token` and `create_pr`
                of the upload.

        Raises:
            ValueError: for pickled weights, or a variant.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization: got False, expected True: weights are stored as safetensors only")
        if variant is not None:
            raise ValueError(
                f"variant: got {variant!r}, expected None: diffusers looks for no variant at the root of a repository, "
                f"where the encoder is; save other dtypes into a folder of their own"
            )
        os.makedirs(save_directory, exist_ok=True)
        # The components after it bring their own code, which counts where it differs.
        custom_object_save(EmuPipeline, save_directory)
        shard_kwargs = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        for name, component in self.components.items():
            if component is None:
                continue
            folder = save_directory if name in ROOT_COMPONENTS else os.path.join(save_directory, name)
            is_network = isinstance(component, torch.nn.Module)
            component = getattr(component, "_orig_mod", component)  # torch.compile's wrapper
            component.save_pretrained(folder, **(shard_kwargs if is_network else {}))
        self.save_config(save_directory)  # last: without it, the folder is no pipeline
        if push_to_hub:
            self._push(save_directory, **kwargs)

    def _push(
        self,
        folder: str | os.PathLike,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> None:
        """Upload a folder that `save_pretrained` wrote."""
        repo_id = repo_id or os.path.basename(os.path.abspath(folder))
        repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
        model_card = populate_model_card(load_or_create_model_card(repo_id, token=token, is_pipeline=True))
        model_card.save(os.path.join(folder, "README.md"))
        self._upload_folder(folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)


def trim_document(document: Document) -> Document:
    """A document without white space at the end of its text: the tokenizer strips it before the `[IMG]` that follows."""
    trimmed = list(document)
    for index in reversed(range(len(trimmed))):
        if trimmed[index]["type"] != "text":
            break
        trimmed[index] = {**trimmed[index], "text": trimmed[index]["text"].rstrip()}
        if trimmed[index]["text"]:
            break
    return trimmed
