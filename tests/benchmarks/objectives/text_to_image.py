"""The specialist for pictures: a text encoder and a U-Net, trained together; no Emu, and no image embeddings.

The text encoder is the language model of the small Emu, untrained, with its tokenizer; the U-Net is that of its visual
decoder. Texts are padded to one length and the
U-Net attends to the padding too, as in Stable Diffusion. A dropped condition is the empty text.

Shapes: B pictures, L positions of a text, D width of the language model, C channels, H and W in pixels.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn import functional
from transformers import AutoModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_emu import EmuConfig, EmuPipeline
from modeling_emu.data import EmuMixture, EmuSource
from modeling_emu.hub.outputs import whole_folder
from modeling_emu.training.decoder import draw_samples, make_schedule
from modeling_emu.training.decoder_arguments import DecoderTrainingArguments
from modeling_emu.training.decoder_data import make_pixels, scale_pixels


TEXT_LENGTH = 48  # of the world's captions the longest has a good 30 tokens
SAVE_STEPS = 250
STATES = ("model", "optimizer", "lr_schedule", "ema")  # of the trainer, in a checkpoint


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """Token ids `(B, L)`, long, padded on the right.

    Raises:
        ValueError: if a text is longer than that.
    """
    rows = tokenizer(list(texts), padding="max_length", padding_side="right", max_length=TEXT_LENGTH)["input_ids"]
    if (longest := max(map(len, rows))) > TEXT_LENGTH:
        raise ValueError(f"text: got {longest} tokens, expected at most {TEXT_LENGTH}")
    return torch.tensor(rows)


class TextToImage(nn.Module):
    """A U-Net that attends to the hidden states of a text encoder.

    Args:
        text_encoder: a decoder without heads, of the width that the U-Net attends to.
        unet: on pixels.
    """

    def __init__(self, text_encoder: nn.Module, unet: UNet2DConditionModel):
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    @classmethod
    def make(cls, start: Path, decoder: Path, seed: int) -> "TextToImage":
        """A text encoder of the size of an Emu's language model, with random weights, and a visual decoder's U-Net."""
        torch.manual_seed(seed)
        text_encoder = AutoModel.from_config(EmuConfig.from_pretrained(start).text_config)
        return cls(text_encoder, UNet2DConditionModel.from_pretrained(decoder / "unet"))

    def encode(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `(B, L, D)` of `(B, L)` token ids. No position reads the padding that follows it."""
        return self.text_encoder(input_ids=input_ids, use_cache=False).last_hidden_state

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """The velocity `(B, C, H, W)` of noisy pictures of these texts."""
        return self.unet(noisy, timesteps, encoder_hidden_states=self.encode(input_ids)).sample


class Pairs:
    """All pictures of a set of pairs with their texts, in memory.

    Args:
        files: shards of image-text pairs.
        tokenizer: of the text encoder.
        size: of the pictures, in pixels.
    """

    def __init__(self, files: str, tokenizer: PreTrainedTokenizerBase, size: int):
        samples = list(EmuMixture([EmuSource("image_text", files)], repeat=False))
        parts = [{part["type"]: part[part["type"]] for part in sample.document} for sample in samples]
        self.pixels = torch.stack([make_pixels(part["image"], size, size) for part in parts])
        self.input_ids = encode_texts(tokenizer, [part["text"] for part in parts])

    def draw_rows(self, seed: int, first: int) -> Iterator[int]:
        """Numbers of pairs, from the draw `first` on: all of them again and again, each time in a new order."""
        epoch, place = divmod(first, len(self.pixels))
        while True:
            order = np.random.default_rng([seed, epoch]).permutation(len(self.pixels))
            yield from order[place:].tolist()
            epoch, place = epoch + 1, 0


class TextToImageTrainer:
    """Trains with the numbers of a recipe of the visual decoder.

    Args:
        model: what is trained, all of it.
        scheduler: whose betas are those of training.
        pairs: what is learned.
        empty_ids: `(L,)`, long, the text that stands for a condition that is dropped.
        args: the recipe.
        folder: for the checkpoint; training goes on from the one that is there.
    """

    def __init__(
        self,
        model: TextToImage,
        scheduler: DDIMScheduler,
        pairs: Pairs,
        empty_ids: torch.Tensor,
        args: DecoderTrainingArguments,
        folder: Path,
        device: str,
    ):
        self.args = args
        self.model = model.to(device).train()
        self.scheduler = DDPMScheduler.from_config(scheduler.config, prediction_type=args.prediction_type)
        self.pairs, self.empty_ids, self.device = pairs, empty_ids, device
        self.checkpoint = folder / "checkpoint.pt"
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        self.lr_schedule = make_schedule(self.optimizer, args)
        self.ema = EMAModel(self.parameters, decay=args.ema_decay)
        self.step = 0

    def train(self) -> None:
        """Train to the end, and leave the averaged weights in the model."""
        if self.checkpoint.exists():
            self._load()
        size = self.args.per_device_train_batch_size
        rows = self.pairs.draw_rows(self.args.seed, self.step * size)
        while self.step < self.args.max_steps:
            self._take_step([next(rows) for _ in range(size)])
            if self.step % SAVE_STEPS == 0:
                self._save()
        self.ema.copy_to(self.parameters)

    def _take_step(self, rows: list[int]) -> None:
        """One step on these pairs. What chance decides follows from the seed and the number of the sample."""
        pixels = scale_pixels(self.pairs.pixels[rows])
        num_timesteps = self.scheduler.config.num_train_timesteps
        first = self.step * len(rows)
        draws = draw_samples(self.args.seed, first, pixels.shape, num_timesteps, self.args.condition_dropout)
        input_ids = torch.where(draws.is_dropped[:, None], self.empty_ids, self.pairs.input_ids[rows])
        noisy = self.scheduler.add_noise(pixels, draws.noise, draws.timesteps)
        target = self.scheduler.get_velocity(pixels, draws.noise, draws.timesteps)
        noisy, target, timesteps, input_ids = (
            tensor.to(self.device) for tensor in (noisy, target, draws.timesteps, input_ids)
        )
        loss = functional.mse_loss(self.model(noisy, timesteps, input_ids), target)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
        self.optimizer.step()
        self.lr_schedule.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        self.step += 1

    def _save(self) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {name: getattr(self, name).state_dict() for name in STATES}
        partial = self.checkpoint.with_suffix(".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state | {"step": self.step}, partial)
        partial.replace(self.checkpoint)

    def _load(self) -> None:
        """Go on from the checkpoint."""
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        for name in STATES:
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]


def train_text_to_image(
    start: Path, decoder: Path, files: str, args: DecoderTrainingArguments, folder: Path, device: str
) -> None:
    """Train the specialist, unless that is done; `folder / "final"` holds it then.

    Args:
        start: an Emu, for the sizes and the tokenizer.
        decoder: repository with the U-Net to begin with, and the scheduler.
        files: shards of image-text pairs.
        args: see `TextToImageTrainer`.
        folder: to work in.
        device: as torch names it.
    """
    final = folder / "final"
    if final.exists():
        return
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    model = TextToImage.make(start, decoder, args.seed)
    scheduler = DDIMScheduler.from_pretrained(decoder / "scheduler")
    pairs = Pairs(files, tokenizer, model.unet.config.sample_size)
    TextToImageTrainer(model, scheduler, pairs, encode_texts(tokenizer, [""])[0], args, folder, device).train()
    with whole_folder(final) as output:
        model.text_encoder.save_pretrained(output / "text_encoder")
        model.unet.save_pretrained(output / "unet")
        tokenizer.save_pretrained(output / "tokenizer")
        scheduler.save_pretrained(output / "scheduler")


class TextToImagePipeline:
    """The specialist, asked as `modeling_emu.evaluation` asks an `EmuPipeline` for pictures.

    Args:
        folder: what `train_text_to_image` wrote.
        device: as torch names it.
    """

    def __init__(self, folder: Path, device: str):
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        self.model = TextToImage(AutoModel.from_pretrained(folder / "text_encoder"), unet).to(device).eval()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        self.pipeline = EmuPipeline(None, None, unet, None, DDIMScheduler.from_pretrained(folder / "scheduler"))
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def regress_embeds(self, documents: Sequence[list[dict[str, Any]]]) -> torch.Tensor:
        """What the U-Net attends to for documents of one text each, `(B, L, D)`."""
        input_ids = encode_texts(self.tokenizer, [part["text"] for [part] in documents])
        return self.model.encode(input_ids.to(self.model.unet.device))

    def __call__(self, prompt_embeds: torch.Tensor, **kwargs: Any) -> Any:
        """Pictures, as `EmuPipeline` draws them, guided against the empty text."""
        empty = self.regress_embeds([[{"type": "text", "text": ""}]])
        return self.pipeline(prompt_embeds=prompt_embeds, negative_prompt_embeds=empty, **kwargs)
