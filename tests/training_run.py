"""Tiny training runs that the tests compare; started by torchrun, two processes that each train on half of a batch.

torchrun --nproc-per-node 2 tests/training_run.py MODEL_FOLDER OUTPUTS.pt
"""

import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from conftest import BOS, EOS, IMAGE_SIZE, PAD, image_ids
from transformers import TrainerCallback
from transformers.distributed import DistributedConfig

from modeling_emu import EmuForMultimodalGeneration
from modeling_emu.training.arguments import EmuTrainingArguments
from modeling_emu.training.trainer import EmuTrainer


def make_samples() -> list[dict[str, Any]]:
    """Eight documents: of each four, the first pair has no image, the second has some.

    Step 1: text only; text only | text and image; image only. Step 2: no targets at all, twice | two images; image first.
    """
    rows = [
        [BOS, 5, 6, 7, EOS],
        [BOS, 8, 9, EOS],
        [BOS, 10, *image_ids(), 11, 12, EOS],
        image_ids(),
        [BOS, 13, 14, 15],
        [BOS, 16, EOS],
        [BOS, *image_ids(), 17, *image_ids(), 18, 19, 20, EOS],
        [BOS, *image_ids(), 21, EOS],
    ]
    generator = torch.Generator().manual_seed(3)
    samples = []
    for number, ids in enumerate(rows):
        num_images = ids.count(image_ids()[0])
        pixels = torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        labels = [-100] * len(ids) if number in (4, 5) else ids
        samples.append({"ids": ids, "labels": labels, "pixels": pixels, "key": f"shard-0:{number}"})
    return samples


class TinyCollator:
    """Samples to a batch: rows padded on the right, or one row without padding."""

    def __init__(self, packed: bool = False):
        self.packed = packed

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {"keys": [sample["key"] for sample in samples]}
        pixels = torch.cat([sample["pixels"] for sample in samples])
        if len(pixels):
            batch["pixel_values"] = pixels
        if self.packed:
            batch["input_ids"] = torch.tensor([[i for sample in samples for i in sample["ids"]]])
            # a document's first token is predicted from nothing
            batch["labels"] = torch.tensor([[i for sample in samples for i in [-100, *sample["labels"][1:]]]])
            batch["position_ids"] = torch.tensor([[i for sample in samples for i in range(len(sample["ids"]))]])
            return batch
        length = max(len(sample["ids"]) for sample in samples)
        fills = {"input_ids": ("ids", PAD), "labels": ("labels", -100), "attention_mask": (None, 0)}
        for name, (field, fill) in fills.items():
            rows = [sample[field] if field else [1] * len(sample["ids"]) for sample in samples]
            batch[name] = torch.tensor([row + [fill] * (length - len(row)) for row in rows])
        return batch


class KeepGradients(TrainerCallback):
    """Keeps the gradients of every step as the optimiser sees them."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(
            {name: gather(p.grad) for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        )


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, whole where each process has a part of it."""
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def make_arguments(output_dir: str, batch_size: int = 4, accumulation: int = 1, **kwargs: Any) -> EmuTrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": output_dir,
        "use_cpu": True,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": 0.001,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return EmuTrainingArguments(**{**defaults, **kwargs})


def run_training(
    model: EmuForMultimodalGeneration,
    batch_size: int,
    accumulation: int = 1,
    packed: bool = False,
    samples: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train two steps on all samples; gives gradients, weights and logs."""
    keep = KeepGradients()
    with tempfile.TemporaryDirectory() as folder:
        trainer = EmuTrainer(
            model=model,
            args=make_arguments(folder, batch_size, accumulation),
            train_dataset=make_samples() if samples is None else samples,
            data_collator=TinyCollator(packed),
            callbacks=[keep],
        )
        trainer.train()
    weights = {name: gather(parameter) for name, parameter in model.named_parameters()}
    return {"gradients": keep.gradients, "weights": weights, "logs": trainer.state.log_history}


def main(folder: str, outputs_file: str) -> None:
    results: dict[str, Any] = {}
    for name, settings in {"2 x 2": (2,), "2 x 1 x 2": (1, 2), "2 x 2 packed": (2, 1, True)}.items():
        results[name] = run_training(EmuForMultimodalGeneration.from_pretrained(folder), *settings)
    samples = make_samples()
    samples[2]["pixels"][0, 0, 0, 0] = float("nan")  # the second process reads it
    try:
        run_training(EmuForMultimodalGeneration.from_pretrained(folder), 2, samples=samples)
    except FloatingPointError as error:
        messages: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(messages, str(error))
        results["errors"] = messages
    sharded = EmuForMultimodalGeneration.from_pretrained(
        folder, distributed_config=DistributedConfig(fsdp_size=dist.get_world_size())
    )
    results["fsdp"] = run_training(sharded, 2)
    results["fsdp"]["sharded"] = [name for name, p in sharded.named_parameters() if hasattr(p, "full_tensor")]
    if dist.get_rank() == 0:
        torch.save(results, outputs_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    main(*sys.argv[1:])
