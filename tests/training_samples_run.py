"""A tiny run with samples, once with whole and once with sharded weights; started by torchrun.

torchrun --nproc-per-node 2 tests/training_samples_run.py FOLDER
"""

import sys
from pathlib import Path

import torch.distributed as dist
from golden_emu import GOLDEN_EMU
from training_run import make_arguments
from transformers.distributed import DistributedConfig

from modeling_emu import EmuForMultimodalGeneration, EmuProcessor
from modeling_emu.data import EmuDataCollator, EmuMixture, EmuSampleEncoder, EmuSource
from modeling_emu.training.samples import EmuSamplesCallback
from modeling_emu.training.trainer import EmuTrainer


def run(folder: Path, name: str, **kwargs) -> None:
    processor = EmuProcessor.from_pretrained(GOLDEN_EMU)
    source = EmuSource("image_text", str(folder / "pairs" / "metadata.jsonl"))
    encoder = EmuSampleEncoder(processor, max_length=64)
    trainer = EmuTrainer(
        model=EmuForMultimodalGeneration.from_pretrained(GOLDEN_EMU, **kwargs),
        args=make_arguments(
            str(folder / name),
            batch_size=1,
            max_steps=1,
            learning_rate=0.1,
            eval_strategy="steps",
            eval_steps=1,
            report_to="tensorboard",
        ),
        train_dataset=EmuMixture([source], encoder=encoder),
        eval_dataset=EmuMixture([source], encoder=encoder, repeat=False),
        data_collator=EmuDataCollator(processor),
    )
    prompts = ["a red square", [{"type": "image", "image": str(folder / "pairs" / "red.png")}]]
    trainer.add_callback(EmuSamplesCallback(trainer, processor, prompts, str(GOLDEN_EMU)))
    trainer.train()


def main(folder: str) -> None:
    run(Path(folder), "whole")
    run(Path(folder), "sharded", distributed_config=DistributedConfig(fsdp_size=2))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
