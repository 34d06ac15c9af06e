"""Pictures of a recipe's prompts while the visual decoder is trained: for the eye, and for the tracker."""

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import make_image_grid
from PIL import Image

from ..pipeline_emu import EmuPipeline, EmuPipelineOutput
from .decoder_arguments import DecoderTrainingArguments


class PictureGrid:
    """Pictures of the same prompts, from the same noise, whenever they are drawn.

    Args:
        image_embeds: `(num_prompts, N, D)`, the prompts' conditions.
        null_embeds: `(1, N, D)`.
        open_vae: gives the VAE when it is needed; None for a U-Net that works on pixels.
    """

    def __init__(
        self,
        image_embeds: torch.Tensor,
        null_embeds: torch.Tensor,
        open_vae: Callable[[], AutoencoderKL | None],
    ):
        self.image_embeds = image_embeds
        self.null_embeds = null_embeds
        self.open_vae = open_vae

    def draw(
        self, unet: UNet2DConditionModel, scheduler: SchedulerMixin, args: DecoderTrainingArguments
    ) -> list[Image.Image]:
        """One picture per prompt; one prompt at a time."""
        vae = self.open_vae()
        pipeline = EmuPipeline(None, None, unet, None if vae is None else vae.to(unet.device), scheduler)
        pipeline.set_progress_bar_config(disable=True)
        calls = [
            pipeline(
                prompt_embeds=embeds[None],
                negative_prompt_embeds=self.null_embeds,
                num_inference_steps=args.validation_num_inference_steps,
                guidance_scale=args.validation_guidance_scale,
                generator=torch.Generator().manual_seed(args.seed),
            )
            for embeds in self.image_embeds
        ]
        return [cast(list[Image.Image], cast(EmuPipelineOutput, call).images)[0] for call in calls]


def make_sheet(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size in rows, as square as their number allows without a gap."""
    num_rows = next(number for number in range(int(len(pictures) ** 0.5), 0, -1) if len(pictures) % number == 0)
    return make_image_grid(pictures, rows=num_rows, cols=len(pictures) // num_rows)


def report_picture(accelerator: Accelerator, picture: Image.Image, step: int) -> None:
    """Hand a picture to TensorBoard, W&B or trackio; other trackers get the losses alone."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"pictures": np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"pictures": [picture]}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({"pictures": trackio.Image(picture)}, step=step)
