"""The small Emu that comes along, from nothing: its data, its network, and every stage of its training.

Each stage is a packaged recipe (`tiny-*.yaml`), run as `emu train` runs it. A stage that is done is not run again, and
one that was stopped goes on from its last complete checkpoint. Small networks leave a second thread idle most of the time,
so that processes, which divide each batch, are the better use of cores.
"""

import json
import logging
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import Blip2VisionConfig, CLIPImageProcessorPil, LlamaConfig

from ..configuration_emu import (
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    EmuCausalFormerConfig,
    EmuConfig,
)
from ..hub.outputs import whole_folder
from ..hub.repository import list_code_files
from ..hub.tokenizer import train_tokenizer
from ..modeling_emu import EmuForMultimodalGeneration
from ..pipeline_emu import EmuPipeline
from ..processing_emu import EmuProcessor
from ..shapes.documents import TASK_KINDS, draw_task
from ..shapes.render import CANVAS_SIZE
from ..shapes.shards import write_shards
from .arguments import EmuTrainingArguments
from .checkpoints import get_last_complete_checkpoint
from .decoder_arguments import DecoderArguments, DecoderTrainingArguments
from .decoder_run import train_decoder
from .recipes import InstructArguments, PretrainArguments, parse_as, read_recipe
from .run import FINAL_FOLDER, instruct, pretrain


logger = logging.getLogger(__name__)

NUM_IMAGE_TOKENS = 4
MAX_LENGTH = 512
VOCAB_SIZE = 512
NUM_TEXTS = 4000  # from which the tokenizer learns its pieces
# Documents of each kind that are written; the recipes say how often each is drawn.
NUM_DOCUMENTS = {
    "caption": 40_000,
    "caption_page": 20_000,
    "clip_caption": 12_000,
    "story": 12_000,
    "pattern_text": 12_000,
    "pattern_image": 12_000,
    "blend": 12_000,
    "quiz_page": 40_000,
    "clip_quiz_page": 20_000,
    "lookup_page": 24_000,
    "comparison_page": 24_000,
    "dialogue_page": 16_000,
    "quiz": 10_000,
    "comparison": 8_000,
    "clip_quiz": 6_000,
    "dialogue": 12_000,
}
# Recipe, what runs it, and what it is read into.
STAGES: tuple[tuple[str, Callable[..., Path], tuple[type, type]], ...] = (
    ("tiny-vision-captions", pretrain, (PretrainArguments, EmuTrainingArguments)),
    ("tiny-vision", pretrain, (PretrainArguments, EmuTrainingArguments)),
    ("tiny-pretrain", pretrain, (PretrainArguments, EmuTrainingArguments)),
    ("tiny-instruct", instruct, (InstructArguments, EmuTrainingArguments)),
    ("tiny-decoder-autoencoding", train_decoder, (DecoderArguments, DecoderTrainingArguments)),
    ("tiny-decoder", train_decoder, (DecoderArguments, DecoderTrainingArguments)),
)
VARIANT = "tiny"
DONE_MARK = "stage_complete"
# What torch calls a CPU's instructions for bfloat16, without which it is slower than float32.
BFLOAT16_CAPABILITIES = ("amx_bf16", "avx512_bf16", "bf16")


def make_config(vocab_size: int, token_ids: dict[str, int], pad_token_id: int) -> EmuConfig:
    """The sizes of the small Emu: a vision tower of 3 layers, 2 of the causal former, 4 of the language model."""
    vision = Blip2VisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=CANVAS_SIZE,
        patch_size=4,
        initializer_range=0.06,  # of the order of 1 / sqrt(width): 0.02 learns at half the speed here
    )
    causal_former = EmuCausalFormerConfig(
        num_image_tokens=NUM_IMAGE_TOKENS,
        encoder_hidden_size=vision.hidden_size,
        projection_size=192,
        hidden_size=128,
        head_dim=32,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        dropout=0.0,
        initializer_range=0.06,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=causal_former.projection_size,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.05,
        pad_token_id=pad_token_id,
        bos_token_id=1,
        eos_token_id=2,
    )
    return EmuConfig(
        vision_config=vision.to_dict(),
        causal_former_config=causal_former.to_dict(),
        text_config=text.to_dict(),
        variant="untrained",
        image_token_id=token_ids[IMAGE_TOKEN],
        image_start_token_id=token_ids[IMAGE_START_TOKEN],
        image_end_token_id=token_ids[IMAGE_END_TOKEN],
        supervise_image_start=True,
    )


def make_untrained(folder: Path, seed: int) -> None:
    """Write the network with random weights, and the processor, whose tokenizer knows the words of the world."""
    rng = random.Random(f"tokenizer:{seed}")
    tasks = [draw_task(rng.choice(TASK_KINDS), rng, "train") for _ in range(NUM_TEXTS)]
    texts = [part["text"] for task in tasks for part in task.document if part["type"] == "text"]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE, MAX_LENGTH)
    image_processor = CLIPImageProcessorPil(size={"height": CANVAS_SIZE, "width": CANVAS_SIZE}, do_center_crop=False)
    torch.manual_seed(seed)
    token_ids = {
        token: tokenizer.convert_tokens_to_ids(token) for token in (IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN)
    }
    model = EmuForMultimodalGeneration(make_config(len(tokenizer), token_ids, tokenizer.pad_token_id))
    processor = EmuProcessor(image_processor, tokenizer, num_image_tokens=NUM_IMAGE_TOKENS, variant="untrained")
    unet = UNet2DConditionModel(
        sample_size=CANVAS_SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=2,  # the number of heads, by a name that diffusers keeps for old checkpoints
        cross_attention_dim=model.config.text_config.hidden_size,
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=True,
    )
    save_whole(EmuPipeline(model, processor, unet, None, scheduler), folder)


def save_whole(pipeline: EmuPipeline, folder: Path) -> None:
    """Write a repository without code: the package that reads it has the code."""
    with whole_folder(folder) as output:
        pipeline.save_pretrained(output)
        for file in list_code_files():
            (output / file.name).unlink()


def run_stage(
    recipe: str,
    run: Callable[..., Path],
    classes: tuple[type, type],
    seed: int,
    scale: float,
    settings: Sequence[str] = (),
    num_processes: int = 1,
) -> None:
    """Run a packaged recipe, unless that is done; a run that was stopped goes on from its last complete checkpoint.

    Args:
        recipe: its name; its `output_dir` is in the folder that is worked in.
        run: what trains it: `pretrain`, `instruct` or `train_decoder`.
        classes: what it is read into.
        seed: replaces the recipe's.
        scale: of the recipe's steps, how many are run.
        settings: `key=value`, which replace the recipe's.
        num_processes: that divide each batch among them; 1 is this one.

    Raises:
        RuntimeError: if one of several processes fails.
    """
    values = read_recipe(recipe, settings)
    output_dir = Path(values["output_dir"])
    mark = output_dir / DONE_MARK
    if mark.exists():
        return
    settings = [*settings, f"seed={seed}", f"max_steps={math.ceil(values['max_steps'] * scale)}"]
    if get_last_complete_checkpoint(output_dir) is not None:
        settings.append("resume_from_checkpoint=true")
    if (output_dir / FINAL_FOLDER).exists():  # of a run that was stopped while it was written
        shutil.rmtree(output_dir / FINAL_FOLDER)
    logger.info("stage %s", recipe)
    if num_processes == 1:
        run(*parse_as(recipe, settings, *classes))
    else:
        launch(recipe, divide_batch(recipe, settings, num_processes), num_processes)
    mark.touch()


def divide_batch(recipe: str, settings: Sequence[str], num_processes: int) -> list[str]:
    """The settings with each process's part of the recipe's batch.

    Raises:
        ValueError: if it cannot be divided.
    """
    batch_size = read_recipe(recipe, settings)["per_device_train_batch_size"]
    if num_processes < 1 or batch_size % num_processes:
        raise ValueError(f"processes: got {num_processes}, expected a divisor of {batch_size}, the batch of {recipe}")
    return [*settings, f"per_device_train_batch_size={batch_size // num_processes}"]


def launch(recipe: str, settings: Sequence[str], num_processes: int) -> None:
    """Run a stage's recipe in new processes, a group for each stage: accelerate leaves it at the end of one.

    Raises:
        RuntimeError: if one of them fails.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}", "--no-python"]
    code = f"import sys; from {__name__} import run_recipe; run_recipe(sys.argv[1], sys.argv[2:])"
    command = [sys.executable, *launcher, sys.executable, "-c", code, recipe, *settings]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise RuntimeError(f"{num_processes} processes of {recipe}: got exit status {status}, expected 0")


def run_recipe(recipe: str, settings: Sequence[str]) -> None:
    """Run a stage's recipe in this process, which may be one of several."""
    run, classes = next((run, classes) for name, run, classes in STAGES if name == recipe)
    run(*parse_as(recipe, settings, *classes))


def put_together(model_folder: Path, decoder_folder: Path, folder: Path) -> None:
    """Write the repository of a tuned model and a trained visual decoder."""
    model = EmuForMultimodalGeneration.from_pretrained(model_folder)
    processor = EmuProcessor.from_pretrained(model_folder)
    model.config.variant = processor.variant = VARIANT
    unet = UNet2DConditionModel.from_pretrained(decoder_folder / "unet")
    scheduler = DDIMScheduler.from_pretrained(decoder_folder / "scheduler")
    save_whole(EmuPipeline(model, processor, unet, None, scheduler), folder)


def make_settings(run: Callable[..., Path]) -> list[str]:
    """What the device says of a stage: where it runs, and that the U-Net is computed in bfloat16 where that is faster.

    Args:
        run: what trains the stage.
    """
    has_gpu = torch.cuda.is_available()
    settings = [f"use_cpu={str(not has_gpu).lower()}"]
    if run is train_decoder:
        capabilities = torch.cpu.get_capabilities()
        has_bfloat16 = has_gpu or any(capabilities.get(name, False) for name in BFLOAT16_CAPABILITIES)
        settings.append(f"bf16={str(has_bfloat16).lower()}")
    return settings


def check_run(settings: dict[str, float]) -> None:
    """Refuse to go on with another run's stages; the first time, say here what this run is."""
    file = Path("run.json")
    if not file.exists():
        file.write_text(json.dumps(settings))
    elif (found := json.loads(file.read_text())) != settings:
        raise ValueError(f"run: got {settings}, expected {found}, with which the stages in this folder were begun")


def train_tiny(output: Path, seed: int = 0, scale: float = 1.0, num_processes: int = 1) -> Path:
    """Train the small Emu through every stage, each from where the last time stopped; on a GPU if there is one.

    Args:
        output: the folder to work in; it keeps data, checkpoints and logs of all stages.
        seed: of data, weights and training.
        scale: of the recipes' steps and of the documents, how many are taken.
        num_processes: that divide each batch among them. They read other documents than one process alone, so other
            weights come out.

    Returns:
        The folder of the repository, without code: the tuned model at the root, the visual decoder in its folders.

    Raises:
        ValueError: if `scale` is not above 0, the processes cannot share a batch, or `output` holds a run of another seed
            or scale.
        RuntimeError: if one of several processes fails.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale: got {scale}, expected more than 0 and at most 1")
    for recipe, _, _ in STAGES:
        divide_batch(recipe, [], num_processes)
    output.mkdir(parents=True, exist_ok=True)
    with chdir(output):
        check_run({"seed": seed, "scale": scale})
        if not Path("data").exists():
            counts = {kind: math.ceil(count * scale) for kind, count in NUM_DOCUMENTS.items()}
            logger.info("writing %d documents", sum(counts.values()))
            write_shards("data", counts, seed)
        if not Path("untrained").exists():
            make_untrained(Path("untrained"), seed)
        for recipe, run, classes in STAGES:
            run_stage(recipe, run, classes, seed, scale, make_settings(run), num_processes)
        if not Path("emu_tiny").exists():
            put_together(Path("instruct", FINAL_FOLDER), Path("decoder", FINAL_FOLDER), Path("emu_tiny"))
    return output / "emu_tiny"
