"""Samples while training: at every evaluation, what the model says and draws after prompts that stay the same.

diffusers is imported by those runs alone that draw.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import BatchFeature, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import cached_file

from ..documents_emu import get_media, prepare_documents, prepare_part
from ..processing_emu import EmuProcessor
from .arguments import EmuTrainingArguments


if TYPE_CHECKING:
    from ..pipeline_emu import EmuPipeline

logger = logging.getLogger(__name__)

TRACKERS = (TensorBoardCallback, WandbCallback, TrackioCallback)
DECODER = ("unet", "scheduler")  # and a VAE, unless the U-Net works on pixels
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class TrainingSample:
    """What one prompt gave.

    Args:
        prompt: the prompt in words.
        text: how the model goes on in text.
        picture: how it goes on in pixels; None where nothing is drawn.
    """

    prompt: str
    text: str
    picture: Image.Image | None


class EmuSamplesCallback(TrainerCallback):
    """Sends a text, and a picture where there is a visual decoder, for each prompt to the trackers of `report_to`.

    TensorBoard, W&B and trackio get them, under `samples`. The run itself is as it would be without: text is what is
    most likely at each step, pictures start from noise of their own (the same at every evaluation, so that they can be
    compared), and nothing draws from the run's random numbers. Every process generates, since each may hold a part of
    the weights; the first one draws and reports.

        trainer.add_callback(EmuSamplesCallback(trainer, processor, ["a red square", [{"type": "image", "image": "dog.png"}]]))

    Args:
        trainer: whose model is asked, and whose trackers get the samples.
        processor: of the model. The text is generated after the prompt in its chat template.
        prompts: documents: a text, or a list of parts as `prepare_documents` takes them.
        decoder: folder or Hub id of a repository with U-Net, VAE and scheduler; None draws nothing. Between evaluations
            they wait in the memory of the CPU. Its safety checker is not asked: it would hide what training does.

    Raises:
        ValueError: if there is no prompt, one cannot be read, or accelerate's FSDP 1 shards the model.
    """

    def __init__(
        self,
        trainer: Trainer,
        processor: EmuProcessor,
        prompts: Sequence[Any],
        decoder: str | None = None,
    ):
        if not prompts:
            raise ValueError("prompts of samples: got none, expected at least one")
        if getattr(trainer.accelerator.state, "fsdp_plugin", None) and not trainer.accelerator.is_fsdp2:
            raise ValueError("samples: got a model that FSDP 1 shards, expected FSDP 2 (fsdp_config: {version: 2})")
        self.trainer = trainer
        self.processor = processor
        documents = [read_prompt(prompt) for prompt in prompts]
        self.prompts = [describe_prompt(document) for document in documents]
        self.text_inputs = [encode_for_text(processor, document) for document in documents]
        self.image_inputs: list[BatchFeature] = []
        self.decoder: EmuPipeline | None = None
        if decoder is not None:
            from ..pipeline_emu import trim_document

            guided = [prepare_documents("")[0], *map(trim_document, documents)]
            self.image_inputs = [processor(documents=[document], return_tensors="pt") for document in guided]
            if trainer.is_world_process_zero():
                self.decoder = load_decoder(decoder)
        if not any(isinstance(callback, TRACKERS) for callback in trainer.callback_handler.callbacks):
            logger.warning("samples go nowhere: set report_to to tensorboard, wandb or trackio")

    def on_evaluate(
        self,
        args: EmuTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Generate after every prompt, and report it with the step."""
        model = self.trainer.model
        was_training = model.training
        model.eval()
        texts = [self._continue(inputs) for inputs in self.text_inputs]
        embeds = [self._generate(inputs, "image").image_embeds for inputs in self.image_inputs]
        model.train(was_training)
        if state.is_world_process_zero:
            pictures = self._draw(*embeds) if embeds else [None] * len(texts)
            samples = [TrainingSample(*entry) for entry in zip(self.prompts, texts, pictures, strict=True)]
            report_samples(samples, self.trainer.callback_handler.callbacks, state.global_step)

    def _generate(self, inputs: BatchFeature, mode: str, **kwargs: Any) -> Any:
        """What the model generates after one prompt."""
        model: Any = self.trainer.model
        if isinstance(model, FSDPModule) and "generate" not in vars(model):
            # Its vision tower runs before its forward, for which alone FSDP would gather the weights.
            register_fsdp_forward_method(cast(nn.Module, model), "generate")
        inputs = BatchFeature(dict(inputs)).to(model.device, model.dtype)  # the prompts themselves stay where they are
        return model.generate(**inputs, generation_mode=mode, do_sample=False, **kwargs)

    def _continue(self, inputs: BatchFeature) -> str:
        """The text after one prompt."""
        ids = self._generate(inputs, "text", max_new_tokens=MAX_NEW_TOKENS)
        new_ids = ids[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(new_ids, skip_special_tokens=True)[0].strip()

    def _draw(self, null_embeds: torch.Tensor, *embeds: torch.Tensor) -> list[Image.Image]:
        """A picture of each `(1, N, D)`, guided against the null embeds."""
        decoder: Any = self.decoder
        decoder.to(self.trainer.args.device)
        pictures = [
            decoder(
                prompt_embeds=embed,
                negative_prompt_embeds=null_embeds,
                generator=torch.Generator().manual_seed(self.trainer.args.seed),
            ).images[0]
            for embed in embeds
        ]
        decoder.to("cpu")
        return pictures


def read_prompt(prompt: Any) -> list[dict[str, Any]]:
    """One document of a part or a list of parts."""
    return [prepare_part(part) for part in (prompt if isinstance(prompt, list) else [prompt])]


def describe_prompt(document: list[dict[str, Any]]) -> str:
    """A document in words, images and videos by their paths."""
    words = []
    for part in document:
        if part["type"] == "text":
            words.append(part["text"])
        else:
            source = get_media(part)
            words.append(f"[{part['type']} {source}]" if isinstance(source, str) else f"[{part['type']}]")
    return " ".join(words)


def encode_for_text(processor: EmuProcessor, document: list[dict[str, Any]]) -> BatchFeature:
    """A document as the user's message of the processor's chat template."""
    return processor.apply_chat_template(
        [{"role": "user", "content": document}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def has_decoder(model: str) -> bool:
    """Whether a folder or Hub repository has a visual decoder beside the model."""
    path = cached_file(model, "model_index.json", _raise_exceptions_for_missing_entries=False)
    index = json.loads(Path(path).read_text()) if path else {}
    return all(index.get(name, [None])[0] is not None for name in DECODER)


def load_decoder(model: str) -> "EmuPipeline":
    """U-Net, scheduler and, where there is one, VAE of a folder or Hub repository, in float32 on the CPU; it draws from embeddings alone."""
    import diffusers

    from ..pipeline_emu import EmuPipeline

    index = EmuPipeline.load_config(model)
    names = DECODER if index.get("vae", [None])[0] is None else (*DECODER, "vae")
    parts = {name: getattr(diffusers, index[name][1]).from_pretrained(model, subfolder=name) for name in names}
    decoder = EmuPipeline(multimodal_encoder=None, processor=None, **{"vae": None, **parts})
    decoder.set_progress_bar_config(disable=True)
    return decoder


def report_samples(samples: Sequence[TrainingSample], callbacks: Sequence[TrainerCallback], step: int) -> None:
    """Hand samples to the trackers among a trainer's callbacks."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            for number, sample in enumerate(samples):
                name = f"samples/{number}"
                callback.tb_writer.add_text(name, f"{sample.prompt}\n\n{sample.text}", step)
                if sample.picture is not None:
                    callback.tb_writer.add_image(name, np.asarray(sample.picture), step, dataformats="HWC")
        elif isinstance(callback, WandbCallback):
            import wandb

            wandb.log(make_log(wandb, samples, step))
        elif isinstance(callback, TrackioCallback):
            import trackio

            trackio.log(make_log(trackio, samples, step))


def make_log(tracker: Any, samples: Sequence[TrainingSample], step: int) -> dict[str, Any]:
    """What W&B and trackio log: a table of prompts and texts, and the pictures, at the step that their callbacks count by."""
    rows = [[sample.prompt, sample.text] for sample in samples]
    pictures = {
        f"samples/{number}": tracker.Image(sample.picture, caption=sample.prompt)
        for number, sample in enumerate(samples)
        if sample.picture is not None
    }
    table = tracker.Table(columns=["prompt", "text"], data=rows)
    return {"samples/texts": table, **pictures, "train/global_step": step}
