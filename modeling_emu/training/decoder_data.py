"""What the visual decoder learns from: documents to a picture and the embeddings that condition it.

Shapes: B pictures, N slots per image, D width of the language model, C channels of the latents, H and W of the latents.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from ..data import EmuMixture, EmuSampleEncoder, Sample
from ..pipeline_emu import EmuPipeline
from .decoder_arguments import CONDITIONS


logger = logging.getLogger(__name__)

Document = list[dict[str, Any]]
MAX_UNFIT_IN_A_ROW = 1000  # documents without a picture, or too long; so many say that a source is the wrong one


@dataclass(frozen=True)
class DecoderSample:
    """One document, cut into what is drawn and what it is drawn from.

    Args:
        prompt: all parts but the picture to draw, in their order.
        target: the picture, cropped to the shape that the U-Net draws.
        pixels: `(3, height, width)`, uint8 RGB, the target at the U-Net's size.
        key: as in `Sample`.
    """

    prompt: Document
    target: Image.Image
    pixels: torch.Tensor
    key: str


@dataclass
class DecoderBatch:
    """What one micro-batch of the U-Net is made of; all tensors float32.

    Args:
        image_embeds: `(B, N, D)`.
        latents_mean: `(B, C, H, W)`, in the scale that the U-Net reads.
        latents_std: as `latents_mean`, of the VAE's distribution; zero for pixels, which are certain.
        keys: names of the samples.
    """

    image_embeds: torch.Tensor
    latents_mean: torch.Tensor
    latents_std: torch.Tensor
    keys: list[str]

    def to(self, device: torch.device) -> "DecoderBatch":
        """The batch with its tensors on a device."""
        return DecoderBatch(
            self.image_embeds.to(device, non_blocking=True),
            self.latents_mean.to(device, non_blocking=True),
            self.latents_std.to(device, non_blocking=True),
            self.keys,
        )


class DecoderData(Protocol):
    """Where the trainer gets its batches from."""

    null_embeds: torch.Tensor
    """`(1, N, D)`, float32: what stands for a condition that is dropped."""

    def read(
        self, batch_size: int, first_batch: int, rank: int, world_size: int, num_workers: int
    ) -> Iterator[DecoderBatch]:
        """An endless stream of one rank's micro-batches, from the number `first_batch` on."""


def crop_to_shape(image: Image.Image, height: int, width: int) -> Image.Image:
    """The centre of a picture, as large as it can be in the proportions of this height and width."""
    scale = min(image.width / width, image.height / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def make_pixels(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """A picture at this size, `(3, height, width)`, uint8 RGB."""
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


class DecoderStream(IterableDataset):
    """A mixture's documents as `DecoderSample`s: the last picture of each is the target.

    A document without a picture, or whose prompt is too long, is left out with a warning that names it.

    Args:
        mixture: without an encoder.
        height: of the pictures, in pixels.
        width: as `height`.
        measure: counts the tokens of prompts and says how many they may be; None where prompts are not read.

    Raises:
        ValueError: when iterated, if nothing but such documents comes for long.
    """

    def __init__(self, mixture: EmuMixture, height: int, width: int, measure: EmuSampleEncoder | None):
        self.mixture = mixture
        self.height, self.width = height, width
        self.measure = measure

    def __iter__(self) -> Iterator[DecoderSample]:
        num_unfit = 0
        for sample in self.mixture:
            try:
                cut = self.cut(sample)
            except ValueError as error:
                num_unfit += 1
                if num_unfit == MAX_UNFIT_IN_A_ROW:
                    raise
                logger.warning("%s", error)
                continue
            num_unfit = 0
            yield cut

    def cut(self, sample: Sample) -> DecoderSample:
        """Cut a document into prompt and target.

        Raises:
            ValueError: if it has no picture, or its prompt is too long.
        """
        places = [index for index, part in enumerate(sample.document) if part["type"] == "image"]
        if not places:
            raise ValueError(f"document {sample.key} is left out: got no picture, expected one to draw")
        prompt = [part for index, part in enumerate(sample.document) if index != places[-1]]
        if self.measure is not None:
            limit = self.measure.max_length - self.measure.processor.num_image_tokens - 1
            if (length := self.measure.count_document_tokens(prompt)) > limit:
                raise ValueError(f"document {sample.key} is left out: got {length} tokens, expected at most {limit}")
        target = crop_to_shape(sample.document[places[-1]]["image"], self.height, self.width)
        return DecoderSample(prompt, target, make_pixels(target, self.height, self.width), sample.key)


class DecoderEncoder:
    """The frozen Emu and VAE: samples to what the U-Net learns from.

    Args:
        pipeline: with its encoder and processor.
        condition: "regressed" or "encoder", see `DecoderArguments`.

    Raises:
        ValueError: for another condition.
    """

    def __init__(self, pipeline: EmuPipeline, condition: str):
        if condition not in CONDITIONS:
            raise ValueError(f"condition: got {condition!r}, expected one of {CONDITIONS}")
        self.pipeline = pipeline
        self.condition = condition
        for network in (pipeline.multimodal_encoder, pipeline.vae):
            if network is not None:
                network.requires_grad_(False).eval()

    @property
    def null_embeds(self) -> torch.Tensor:
        """`(1, N, D)`, float32."""
        return self.pipeline.get_null_embeds().float()

    @torch.no_grad()
    def __call__(self, samples: list[DecoderSample]) -> DecoderBatch:
        """Encode documents and pictures."""
        if self.condition == "regressed":
            image_embeds = self.pipeline.regress_embeds([sample.prompt for sample in samples])
        else:
            image_embeds = self.embed_pictures([sample.target for sample in samples])
        mean, std = self.encode_pixels(torch.stack([sample.pixels for sample in samples]))
        return DecoderBatch(image_embeds.float(), mean, std, [sample.key for sample in samples])

    @torch.no_grad()
    def embed_prompts(self, documents: list[Document]) -> torch.Tensor:
        """Conditions `(num_documents, N, D)`, float32, of the prompts to draw while training.

        Raises:
            ValueError: if the condition is "encoder" and a prompt is not one picture.
        """
        if self.condition == "regressed":
            return torch.cat([self.pipeline.regress_embeds([document]) for document in documents]).float()
        if any([part["type"] for part in document] != ["image"] for document in documents):
            raise ValueError(
                "validation_prompts: got one that is not one picture, expected that with condition encoder"
            )
        return self.embed_pictures([document[0]["image"] for document in documents]).float()

    def embed_pictures(self, images: list[Any]) -> torch.Tensor:
        """The encoder's embeddings of pictures, `(B, N, D)`."""
        encoder = self.pipeline.multimodal_encoder
        documents = [[{"type": "image", "image": image}] for image in images]
        pixel_values = self.pipeline.processor(documents=documents, return_tensors="pt")["pixel_values"]
        pixel_values = pixel_values.to(device=encoder.device, dtype=encoder.dtype)
        return torch.stack(encoder.get_image_features(pixel_values).pooler_output)

    def encode_pixels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents of `(B, 3, height, width)` uint8 pixels."""
        vae = self.pipeline.vae
        values = scale_pixels(pixels)
        if vae is None:
            return values, torch.zeros_like(values)
        distribution = vae.encode(values.to(device=vae.device, dtype=vae.dtype)).latent_dist
        scale = vae.config.scaling_factor
        return (distribution.mean.float() * scale).contiguous(), (distribution.std.float() * scale).contiguous()


def scale_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 values to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


class LiveDecoderData:
    """Batches whose embeddings and latents are computed as they are needed; see `DecoderData`.

    Args:
        encoder: the frozen models.
        stream: endless, which is to be resumed by reading again what came before.
    """

    def __init__(self, encoder: DecoderEncoder, stream: DecoderStream):
        self.encoder = encoder
        self.stream = stream
        self.null_embeds = encoder.null_embeds

    def read(
        self, batch_size: int, first_batch: int, rank: int, world_size: int, num_workers: int
    ) -> Iterator[DecoderBatch]:
        """See `DecoderData`. Ranks read different documents, as `EmuMixture` divides them."""
        self.stream.mixture.split(rank, world_size)
        loader = DataLoader(
            self.stream,
            batch_size,
            collate_fn=list,
            num_workers=num_workers,
            generator=torch.Generator(),  # or it would draw from the run's random numbers
        )
        return (self.encoder(samples) for samples in islice(loader, first_batch, None))
