"""Tiny runs of the decoder's trainer that the tests compare, in processes of their own.

python tests/training_decoder_run.py killed SHARDS OUTPUT_DIR after_step|while_saving STEP
torchrun --nproc-per-node 2 tests/training_decoder_run.py together SHARDS OUTPUTS.pt
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from golden_emu import GOLDEN_EMU
from PIL import Image

from modeling_emu import EmuForMultimodalGeneration, EmuPipeline, EmuProcessor
from modeling_emu.data import EmuMixture, EmuSampleEncoder, EmuSource
from modeling_emu.training import decoder
from modeling_emu.training.decoder import EmuDecoderTrainer
from modeling_emu.training.decoder_arguments import DecoderTrainingArguments
from modeling_emu.training.decoder_cache import PrecomputedDecoderData, ShardWriter, write_index, write_null_embeds
from modeling_emu.training.decoder_data import DecoderEncoder, DecoderStream


Emu = tuple[EmuForMultimodalGeneration, EmuProcessor]
SIZE = 16
WIDTH = 64  # of the small model's language model
COLOURS = {"red": (214, 64, 54), "blue": (56, 108, 214), "green": (62, 158, 84), "yellow": (236, 190, 60)}
MAX_STEPS = 6


def make_unet(
    channels: tuple[int, ...] = (8, 16), in_channels: int = 3, size: int = SIZE, **kwargs: Any
) -> UNet2DConditionModel:
    """A U-Net of one or two levels."""
    torch.manual_seed(0)
    num_plain = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=in_channels,
        out_channels=in_channels,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", *["DownBlock2D"] * num_plain),
        up_block_types=(*["UpBlock2D"] * num_plain, "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=1,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        **kwargs,
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )


def write_pictures(folder: Path) -> str:
    """An image folder of four pictures with their captions, each a colour over another."""
    folder.mkdir()
    rows = []
    for name, colour in COLOURS.items():
        image = Image.new("RGB", (SIZE, SIZE), colour)
        image.paste((250, 250, 250), (0, 0, SIZE, SIZE // 2))
        image.save(folder / f"{name}.png")
        rows.append({"file_name": f"{name}.png", "text": f"{name} below white"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "metadata.jsonl")


def load_emu() -> Emu:
    """The small model that comes along."""
    return EmuForMultimodalGeneration.from_pretrained(GOLDEN_EMU), EmuProcessor.from_pretrained(GOLDEN_EMU)


def make_pipeline(emu: Emu, with_vae: bool = False) -> EmuPipeline:
    vae = AutoencoderKL.from_pretrained(GOLDEN_EMU / "vae") if with_vae else None
    unet = make_unet(in_channels=4, size=SIZE // 2) if with_vae else make_unet()
    return EmuPipeline(*emu, unet, vae, make_scheduler())


def make_stream(pictures: str, emu: Emu, repeat: bool = False) -> DecoderStream:
    mixture = EmuMixture([EmuSource("image_text", pictures)], seed=0, repeat=repeat)
    return DecoderStream(mixture, SIZE, SIZE, EmuSampleEncoder(emu[1]))


def write_shards(folder: Path, pipeline: EmuPipeline, condition: str, pictures: str, emu: Emu) -> Path:
    """Two shards: of three pictures, and of one."""
    folder.mkdir()
    encoder = DecoderEncoder(pipeline, condition)
    ShardWriter(folder, 0, 0, 1).write(encoder, make_stream(pictures, emu), batch_size=2, samples_per_shard=3)
    write_null_embeds(folder, encoder)
    write_index(folder, 1)
    return folder


def make_arguments(output_dir: Any, **kwargs: Any) -> DecoderTrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": MAX_STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_steps": 0,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DecoderTrainingArguments(**{**defaults, **kwargs})


def make_trainer(shards: Any, output_dir: Any, **kwargs: Any) -> EmuDecoderTrainer:
    """A trainer on precomputed shards; the U-Net has dropout, so that the state of the random numbers counts."""
    args = make_arguments(output_dir, **kwargs)
    data = PrecomputedDecoderData(Path(shards), [1.0], args.seed)
    return EmuDecoderTrainer(make_unet(dropout=0.2), make_scheduler(), data, args)


def make_killable_trainer(shards: Any, output_dir: Any) -> EmuDecoderTrainer:
    return make_trainer(shards, output_dir, save_steps=2, lr_scheduler_type="cosine", warmup_steps=2)


def get_gradients(trainer: EmuDecoderTrainer) -> list[dict[str, torch.Tensor]]:
    """Train; gives the gradients of every step as the optimiser sees them."""
    steps: list[dict[str, torch.Tensor]] = []

    def keep(*_: Any) -> None:
        parameters = trainer.plain_unet.named_parameters()
        steps.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})

    trainer.optimizer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return steps


def train_plainly(shards: Any, batch_size: int, accumulation: int, rate: float = 0.0) -> list[dict[str, torch.Tensor]]:
    """Gradients of two steps without dropout; by default the weights stay, so that nothing is amplified."""
    with tempfile.TemporaryDirectory() as folder:
        args = make_arguments(
            folder,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            max_grad_norm=0,
            learning_rate=rate,
        )
        data = PrecomputedDecoderData(Path(shards), [1.0], args.seed)
        return get_gradients(EmuDecoderTrainer(make_unet(), make_scheduler(), data, args))


def assert_same_gradients(got: list[dict], expected: list[dict]) -> None:
    assert len(got) == len(expected) == 2
    for step, reference in zip(got, expected, strict=True):
        assert step.keys() == reference.keys()
        scale = max(tensor.abs().max() for tensor in reference.values())
        assert max((step[name] - reference[name]).abs().max() for name in reference) < 1e-6 * max(scale, 1)


def kill_myself(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_killed(shards: str, output_dir: str, when: str, step: str) -> None:
    trainer = make_killable_trainer(shards, output_dir)
    if when == "after_step":
        save = trainer._save_checkpoint

        def save_and_go_on() -> None:
            save()
            if trainer.progress.step < int(step) <= trainer.progress.step + 1:
                trainer.ema.step = kill_myself  # in the middle of the next step

        trainer._save_checkpoint = save_and_go_on
    else:
        mark = decoder.mark_complete
        decoder.mark_complete = lambda folder: (
            kill_myself() if trainer.progress.step == int(step) else mark(folder)
        )  # all is written but the mark
    trainer.train()


def run_together(shards: str, outputs_file: str) -> None:
    gradients = train_plainly(shards, batch_size=2, accumulation=1)
    torch.save(gradients, f"{outputs_file}.{os.environ['RANK']}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    {"killed": run_killed, "together": run_together}[sys.argv[1]](*sys.argv[2:])
