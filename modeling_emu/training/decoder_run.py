"""From a recipe to a trained visual decoder: the frozen models, the data, the trainer, and what is written at the end."""

import hashlib
import json
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil

from ..configuration_emu import EmuConfig
from ..data import EmuMixture, EmuSampleEncoder, EmuSource
from ..data.files import find_shards
from ..modeling_emu import EmuForMultimodalGeneration
from ..pipeline_emu import EmuPipeline
from ..processing_emu import EmuProcessor
from .decoder import EmuDecoderTrainer
from .decoder_arguments import DecoderArguments, DecoderTrainingArguments
from .decoder_cache import (
    SAMPLES_PER_SHARD,
    PrecomputedDecoderData,
    ShardWriter,
    check_fingerprint,
    hash_files,
    hash_weights,
    is_complete_cache,
    write_index,
    write_null_embeds,
)
from .decoder_data import DecoderData, DecoderEncoder, DecoderStream, LiveDecoderData
from .decoder_memory import check_decoder_memory, read_decoder_configs
from .decoder_pictures import PictureGrid
from .samples import read_prompt


ENCODER_FILES = ("config.json", "processor_config.json", "tokenizer*.json", "*.safetensors*")
DECODER_FOLDERS = ("unet", "vae", "scheduler", "safety_checker", "feature_extractor")
PROMPTS_FILE = "validation.safetensors"
LONGEST_WAIT = timedelta(days=2)  # of a process that has computed its shards, for the others


def find_folder(name: str) -> Path:
    """A folder, or the local copy of a Hub repository."""
    if Path(name).is_dir():
        return Path(name)
    patterns = [*ENCODER_FILES, *(f"{folder}/*" for folder in DECODER_FOLDERS)]
    return Path(snapshot_download(name, allow_patterns=patterns))


def load_vae(decoder: Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL | None:
    """The VAE of a visual decoder's folder; None for a U-Net that works on pixels."""
    return AutoencoderKL.from_pretrained(decoder / "vae", dtype=dtype) if (decoder / "vae").is_dir() else None


def load_safety(decoder: Path) -> dict[str, Any]:
    """The safety checker and the feature extractor of a folder, where it has them."""
    parts: dict[str, Any] = {}
    if (decoder / "safety_checker").is_dir():
        parts["safety_checker"] = StableDiffusionSafetyChecker.from_pretrained(decoder / "safety_checker")
        parts["feature_extractor"] = CLIPImageProcessorPil.from_pretrained(decoder / "feature_extractor")
    return parts


def load_scheduler(decoder: Path) -> SchedulerMixin:
    """The scheduler of a folder, of whichever class it is."""
    config = json.loads((decoder / "scheduler" / "scheduler_config.json").read_text())
    return getattr(diffusers, config["_class_name"]).from_pretrained(decoder / "scheduler")


class DecoderRun:
    """One run of a recipe.

    Args:
        arguments: what is trained on what.
        training_arguments: how.

    Raises:
        ValueError: before anything is loaded, if a step cannot fit into memory.
    """

    def __init__(self, arguments: DecoderArguments, training_arguments: DecoderTrainingArguments):
        self.arguments, self.args = arguments, training_arguments
        AcceleratorState._reset_state()  # an earlier run of this process may have computed in another precision
        self.state = PartialState(cpu=training_arguments.use_cpu)
        self.model = find_folder(arguments.model)
        self.decoder = self.model if arguments.decoder is None else find_folder(arguments.decoder)
        self.check_memory()
        self.unet = UNet2DConditionModel.from_pretrained(self.decoder / "unet", dtype=torch.float32)
        self.scheduler = load_scheduler(self.decoder)
        self.prompts = [read_prompt(prompt) for prompt in arguments.validation_prompts]

    def check_memory(self, is_precomputing: bool = False) -> None:
        """Refuse to train, or to precompute, where that cannot fit into memory."""
        config, decoder = EmuConfig.from_pretrained(self.model), read_decoder_configs(self.decoder)
        check_decoder_memory(config, decoder, self.arguments, self.args, self.state, is_precomputing)

    def load_encoder(self) -> DecoderEncoder:
        """The frozen models, on this process's device."""
        model = EmuForMultimodalGeneration.from_pretrained(self.model, dtype=self.arguments.dtype)
        pipeline = EmuPipeline(
            multimodal_encoder=model,
            processor=EmuProcessor.from_pretrained(self.model),
            unet=self.unet,
            vae=load_vae(self.decoder, model.dtype),
            scheduler=self.scheduler,
        )
        for network in (pipeline.multimodal_encoder, pipeline.vae):
            if network is not None:
                network.to(self.state.device)
        return DecoderEncoder(pipeline, self.arguments.condition)

    def make_stream(
        self, encoder: DecoderEncoder, sources: list[dict[str, Any]], seed: int, repeat: bool
    ) -> DecoderStream:
        """The documents of some sources, cut for the U-Net."""
        mixture = EmuMixture(
            [EmuSource(**{key: value for key, value in source.items() if key != "weight"}) for source in sources],
            weights=[source.get("weight", 1.0) for source in sources],
            seed=seed,
            repeat=repeat,
        )
        measure = EmuSampleEncoder(encoder.pipeline.processor) if self.arguments.condition == "regressed" else None
        return DecoderStream(mixture, *encoder.pipeline.default_size, measure)

    def make_fingerprint(self, is_complete: bool) -> dict[str, Any]:
        """What shards depend on; the order of their samples and the sources' weights do not count.

        Args:
            is_complete: the shards need their sources no more, and these may be gone.
        """
        vae = self.decoder / "vae"
        fingerprint = {
            "emu": hash_weights(self.model),
            "tokenizer": hashlib.sha256((self.model / "tokenizer.json").read_bytes()).hexdigest(),
            "vae": hash_weights(vae) if vae.is_dir() else None,
            "condition": self.arguments.condition,
            "sample_size": self.unet.config.sample_size,
            "dtype": self.arguments.dtype,
            "sources": [
                {key: value for key, value in source.items() if key != "weight"} for source in self.arguments.sources
            ],
        }
        try:
            fingerprint["contents"] = [hash_files(find_shards(source["files"])) for source in self.arguments.sources]
        except ValueError:
            if not is_complete:
                raise
        return fingerprint

    def precompute(self, folder: Path) -> None:
        """Compute the shards that are missing, in all processes, and the conditions of the prompts to draw."""
        is_complete, has_prompts = is_complete_cache(folder), self._read_prompts(folder) is not None
        is_done = is_complete and has_prompts
        if not is_done:
            self.check_memory(is_precomputing=True)
        wait_for_everyone = self.make_long_wait()
        if self.state.is_main_process:
            check_fingerprint(folder, self.make_fingerprint(is_complete))
        wait_for_everyone()
        if is_done:
            return
        encoder = self.load_encoder()
        if not is_complete:
            for number, source in enumerate(self.arguments.sources):
                writer = ShardWriter(folder, number, self.state.process_index, self.state.num_processes)
                stream = self.make_stream(encoder, [source], seed=0, repeat=False)
                writer.write(encoder, stream, self.arguments.precompute_batch_size, SAMPLES_PER_SHARD)
        wait_for_everyone()
        if self.state.is_main_process:
            if self.prompts:
                tensors = {"image_embeds": encoder.embed_prompts(self.prompts).cpu()}
                save_file(tensors, folder / PROMPTS_FILE, metadata={"prompts": self._name_prompts()})
            if not is_complete:
                write_null_embeds(folder, encoder)
                write_index(folder, len(self.arguments.sources))
        wait_for_everyone()

    def make_long_wait(self) -> Callable[[], Any]:
        """A barrier for processes that are done long before others; every other one soon gives up a process that is lost."""
        if self.state.num_processes == 1:
            return self.state.wait_for_everyone
        return partial(dist.barrier, dist.new_group(timeout=LONGEST_WAIT, backend="gloo"))

    def _name_prompts(self) -> str:
        return json.dumps(self.arguments.validation_prompts)

    def _read_prompts(self, folder: Path) -> torch.Tensor | None:
        """Conditions of the recipe's prompts, `(num_prompts, N, D)`; None if they are not there."""
        if not self.prompts:
            return torch.empty(0)
        if not (folder / PROMPTS_FILE).is_file():
            return None
        with safe_open(folder / PROMPTS_FILE, framework="pt") as opened:
            is_same = opened.metadata()["prompts"] == self._name_prompts()
            return opened.get_tensor("image_embeds") if is_same else None

    def make_data(self) -> tuple[DecoderData, PictureGrid | None]:
        """The batches, and the pictures to draw while training."""
        data: DecoderData
        open_vae: Callable[[], AutoencoderKL | None]
        if self.arguments.precomputed is None:
            encoder = self.load_encoder()
            data = LiveDecoderData(encoder, self.make_stream(encoder, self.arguments.sources, self.args.seed, True))
            image_embeds = encoder.embed_prompts(self.prompts) if self.prompts else None
            open_vae = partial(getattr, encoder.pipeline, "vae")
        else:
            folder = Path(self.arguments.precomputed)
            self.precompute(folder)
            weights = [source.get("weight", 1.0) for source in self.arguments.sources]
            data = PrecomputedDecoderData(folder, weights, self.args.seed)
            image_embeds = self._read_prompts(folder)
            open_vae = partial(load_vae, self.decoder)
        if not self.prompts or image_embeds is None:
            return data, None
        return data, PictureGrid(image_embeds, data.null_embeds, open_vae)

    def train(self) -> Path:
        """Train the U-Net; gives the folder of the trained decoder."""
        data, grid = self.make_data()
        trainer = EmuDecoderTrainer(self.unet, self.scheduler, data, self.args, grid)
        trainer.train(self.args.resume_from_checkpoint)
        trainer.save_model(self.args.final_folder, vae=load_vae(self.decoder), **load_safety(self.decoder))
        trainer.finish()
        return self.args.final_folder


def train_decoder(arguments: DecoderArguments, training_arguments: DecoderTrainingArguments) -> Path:
    """Train the visual decoder of a recipe; gives the folder with it, in the layout of a repository."""
    return DecoderRun(arguments, training_arguments).train()
