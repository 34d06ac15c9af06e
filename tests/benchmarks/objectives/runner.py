"""Runs the experiment: per seed what all arms share, then arm after arm. What is done is not done again.

A run's folder has one folder per seed, and in it:

    data/, validation/              pairs and pages of the shapes' world
    whole/ (anew/, half/)           a beginning: start/; where the encoder is not the packaged one, untrained/, vision/
    both/ (text/, ...)              an arm: language/ if the Emu is its own, perhaps decoder/, result.json
"""

import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from filelock import FileLock, Timeout

from modeling_emu import EmuForMultimodalGeneration, EmuPipeline, EmuProcessor
from modeling_emu.cli.loading import EMU_TINY, load_pipeline
from modeling_emu.hub.outputs import whole_file, whole_folder
from modeling_emu.shapes.shards import write_shards
from modeling_emu.training.recipes import parse_as, read_recipe
from modeling_emu.training.run import FINAL_FOLDER
from modeling_emu.training.tiny import STAGES, check_run, make_untrained, run_stage, save_whole

from .arms import ARMS, BEGINNINGS, DIFFUSION, PAIRS, WHOLE, Arm
from .measuring import DRAWING, WRITING, measure_abilities, measure_losses
from .text_to_image import TextToImagePipeline, train_text_to_image


logger = logging.getLogger(__name__)

RESULT_FILE = "result.json"
PAGES_PER_SAMPLE = 5  # of the validation split, for each sample of the test
VISION, LANGUAGE, DECODER = "tiny-vision-captions", "tiny-pretrain", "tiny-decoder"
STAGE_RUNS = {recipe: (run, classes) for recipe, run, classes in STAGES}


@dataclass(frozen=True)
class Settings:
    """What a run's results depend on, beside seed and arm.

    Args:
        scale: of the recipes' steps, how many every arm takes.
        vision_scale: the same of the vision stage, for an encoder that is not the packaged one.
        num_pairs: for training.
        num_samples: for each share of right answers.

    Raises:
        ValueError: if a number cannot be.
    """

    scale: float = 0.15
    vision_scale: float = 0.5
    num_pairs: int = 40_000
    num_samples: int = 200

    def __post_init__(self) -> None:
        for name in ("scale", "vision_scale"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than 0 and at most 1")
        for name in ("num_pairs", "num_samples"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 2")


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Work in a folder that no other process works in.

    Raises:
        ValueError: if one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.absolute() / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"folder: got {folder}, in which another process works, expected a free one") from error
    try:
        with chdir(folder):
            yield
    finally:
        lock.release()


class SeedRun:
    """One seed, in the folder that is worked in.

    Args:
        seed: of data, weights and training.
        settings: of the whole run.
        device: as torch names it.
    """

    def __init__(self, seed: int, settings: Settings, device: str):
        self.seed, self.settings, self.device = seed, settings, device

    def run_arm(self, arm: Arm) -> None:
        """Train and measure an arm, unless that is done."""
        result = Path(arm.name, RESULT_FILE)
        if result.exists():
            return
        logger.info("seed %d: %s", self.seed, arm.name)
        self.write_data()
        start = self.prepare_beginning(arm.beginning)
        measured = self.run_diffusion(arm, start) if arm.name == DIFFUSION else self.run_emu(arm, start)
        with whole_file(result) as path:
            entry = {"arm": arm.name, "seed": self.seed, "settings": asdict(self.settings), **measured}
            path.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")

    def write_data(self) -> None:
        """The training pairs, in either order and as pages with the picture first; pages of the validation split."""
        if not Path("data").exists():
            # A task depends on its kind and number: the pages are the same pairs.
            counts = dict.fromkeys((WRITING, f"{WRITING}_page"), self.settings.num_pairs)
            write_shards("data", counts, self.seed)
        if not Path("validation").exists():
            counts = dict.fromkeys(
                (f"{WRITING}_page", f"{DRAWING}_page"), PAGES_PER_SAMPLE * self.settings.num_samples
            )
            write_shards("validation", counts, self.seed, "validation")

    def prepare_beginning(self, name: str) -> Path:
        """The network that arms begin with: an encoder that sees, and a language model and heads with random weights."""
        start, encoder = Path(name, "start"), EMU_TINY
        if name != WHOLE:
            untrained, vision = Path(name, "untrained"), Path(name, "vision")
            if not untrained.exists():
                make_untrained_with(untrained, self.seed, BEGINNINGS[name])
            self.run_stage(VISION, [f"model={untrained}", f"output_dir={vision}"], self.settings.vision_scale)
            encoder = vision / FINAL_FOLDER
        if not start.exists():
            make_start(start, encoder, self.seed)
        return start

    def run_stage(self, recipe: str, settings: Sequence[str], scale: float | None = None, run: Any = None) -> None:
        """A recipe with these settings, unless it is done; `run` and `scale` replace what is usual."""
        usual, classes = STAGE_RUNS[recipe]
        settings = [*settings, f"use_cpu={str(self.device == 'cpu').lower()}"]
        run_stage(recipe, run or usual, classes, self.seed, scale or self.settings.scale, settings)

    def run_emu(self, arm: Arm, start: Path) -> dict[str, Any]:
        """Train an Emu; gives what is measured."""
        language = Path(arm.same_emu_as or arm.name, "language")
        self.run_stage(LANGUAGE, [f"model={start}", f"output_dir={language}", *arm.settings], run=arm.run)
        model, decoder = language / FINAL_FOLDER, EMU_TINY
        if arm.tunes_decoder:
            decoder = self.tune_decoder(arm, model)
        pipeline = EmuPipeline(
            EmuForMultimodalGeneration.from_pretrained(model),
            EmuProcessor.from_pretrained(model),
            UNet2DConditionModel.from_pretrained(decoder / "unet"),
            None,
            DDIMScheduler.from_pretrained(decoder / "scheduler"),
        ).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        kinds = [WRITING, DRAWING] if arm.draws else [WRITING]
        figures = measure_abilities(pipeline, kinds, self.settings.num_samples, self.seed)
        losses = measure_losses(pipeline.multimodal_encoder, pipeline.processor, "validation", regresses=arm.draws)
        return {"figures": figures, "losses": losses}

    def tune_decoder(self, arm: Arm, model: Path) -> Path:
        """The packaged visual decoder, tuned to what an arm regresses. Gives the folder."""
        decoder = Path(arm.name, "decoder")
        precomputed = decoder / "precomputed"
        settings = [f"model={model}", f"decoder={EMU_TINY}", f"output_dir={decoder}", f"precomputed={precomputed}"]
        self.run_stage(DECODER, [*settings, PAIRS])
        shutil.rmtree(precomputed, ignore_errors=True)  # hundreds of megabytes, and done with
        return decoder / FINAL_FOLDER

    def run_diffusion(self, arm: Arm, start: Path) -> dict[str, Any]:
        """Train the specialist for pictures in as many steps as the others; gives what is measured."""
        max_steps = math.ceil(read_recipe(LANGUAGE)["max_steps"] * self.settings.scale)
        settings = [f"seed={self.seed}", f"max_steps={max_steps}", *arm.settings]
        _, arguments = parse_as(DECODER, settings, *STAGE_RUNS[DECODER][1])
        folder = Path(arm.name)
        train_text_to_image(start, EMU_TINY, "data/caption/*.tar", arguments, folder, self.device)
        pipeline = TextToImagePipeline(folder / FINAL_FOLDER, self.device)
        return {
            "figures": measure_abilities(pipeline, [DRAWING], self.settings.num_samples, self.seed),
            "losses": {},
        }


def make_start(folder: Path, encoder: Path, seed: int) -> None:
    """Write a model with the encoder, the sizes and the processor of another one, all else with random weights."""
    model = EmuForMultimodalGeneration.from_pretrained(encoder)
    torch.manual_seed(seed)
    start = EmuForMultimodalGeneration(model.config)
    for part in ("vision_model", "causal_former"):
        getattr(start.model, part).load_state_dict(getattr(model.model, part).state_dict())
    with whole_folder(folder) as output:
        start.save_pretrained(output)
        EmuProcessor.from_pretrained(encoder).save_pretrained(output)


def make_untrained_with(folder: Path, seed: int, num_image_tokens: int) -> None:
    """The small model's untrained repository, with this number of image tokens."""
    with TemporaryDirectory() as temporary:
        source = Path(temporary, "untrained")
        make_untrained(source, seed)
        pipeline = load_pipeline(source)
    config, processor = pipeline.multimodal_encoder.config, pipeline.processor
    config.causal_former_config.num_image_tokens = processor.num_image_tokens = num_image_tokens
    torch.manual_seed(seed)
    model = EmuForMultimodalGeneration(config)
    save_whole(EmuPipeline(model, processor, pipeline.unet, None, pipeline.scheduler), folder)


def run_experiment(
    output: Path, seeds: Sequence[int], names: Sequence[str], settings: Settings, device: str = "cpu"
) -> None:
    """Run arms for seeds, seed by seed, each from where it was stopped.

    Args:
        output: the run's folder. Several processes may work in it, each at seeds of its own.
        names: of the arms.

    Raises:
        ValueError: for an unknown arm, a seed that another process works at, or a folder with other settings.
    """
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"arms: got {unknown}, expected some of {list(ARMS)}")
    for seed in seeds:
        with working_in(output / f"seed-{seed}"):
            check_run(asdict(settings))
            run = SeedRun(seed, settings, device)
            for name in names:
                run.run_arm(ARMS[name])


def read_results(output: Path) -> list[dict[str, Any]]:
    """What has been measured so far, in the order of arms and seeds."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in output.glob(f"seed-*/*/{RESULT_FILE}")]
    order = list(ARMS)
    return sorted(results, key=lambda result: (order.index(result["arm"]), result["seed"]))
