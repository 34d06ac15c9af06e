"""EmuTrainer: transformers' Trainer, with both losses divided once, by the targets of the whole optimiser step.

The same data gives the same step for any split into micro-batches, accumulation steps and processes. The trainer knows
nothing of data sources, nor of files: it takes whatever a collator makes.
"""

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints

from ..configuration_emu import EmuConfig
from .arguments import EmuTrainingArguments
from .checkpoints import find_checkpoint, mark_complete
from .parts import freeze_parts, get_part


KEYS = "keys"  # in a batch: the names of its samples
REPEATED = "is_repeated"  # in a batch of an evaluation: that another rank counts it
LOSSES = ("text", "regression")


def count_targets(batch: dict[str, Any], config: EmuConfig) -> torch.Tensor:
    """Count what the model's forward will count, before it runs.

    Args:
        batch: `input_ids` and `labels` `(B, T)`, and `attention_mask` `(B, T)` where rows are padded.

    Returns:
        `(2,)`, long: text targets and regression targets.
    """
    input_ids, labels = batch["input_ids"], batch["labels"][:, 1:]
    unlearned = [config.image_token_id, config.image_end_token_id]
    if not config.supervise_image_start:
        unlearned.append(config.image_start_token_id)
    is_target = (labels != -100) & ~torch.isin(labels, labels.new_tensor(unlearned))
    attention_mask = batch.get("attention_mask")
    if attention_mask is not None and attention_mask.ndim == 2:
        is_target &= attention_mask[:, :-1] != 0
    is_slot = input_ids == config.image_token_id
    starts = (input_ids[:, :-1] == config.image_start_token_id) & is_slot[:, 1:]
    return torch.stack([is_target.sum(), (is_slot[:, :-1] | starts).sum()])


@runtime_checkable
class SplitDataset(Protocol):
    """A stream that reads one rank's part by itself, as those of `modeling_emu.data` do."""

    def split(self, rank: int, world_size: int) -> None:
        """Read this rank's part only."""


class EvaluationShare(IterableDataset):
    """One rank's batches of a stream that ends; the ranks take them in turn.

    Every rank gets as many, since ranks that share weights run together: where the last round has too few, a rank gets
    the first one of the round again, marked, so that it is not counted twice.

    Args:
        stream: of samples, or of whole batches.
        batch_size: samples of a batch; None where the stream has batches.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(self, stream: Iterable[Any], batch_size: int | None, rank: int, world_size: int):
        self.stream = stream
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        """Batches, each with whether another rank counts it."""
        samples = iter(self.stream)
        size = self.batch_size
        batches = samples if size is None else iter(lambda: list(islice(samples, size)), [])
        place = self.world_size - 1
        first = own = None
        for number, batch in enumerate(batches):
            place = number % self.world_size
            if place == 0:
                first, own = batch, None
            if place == self.rank:
                own = batch
            if place == self.world_size - 1:
                yield own, False
        if place < self.world_size - 1:
            yield (first, True) if own is None else (own, False)


def collate_share(data_collator: Any, entry: tuple[Any, bool]) -> dict[str, Any]:
    """One batch of an `EvaluationShare` as a collator makes it, with the mark."""
    features, is_repeated = entry
    return {**data_collator(features), REPEATED: is_repeated}


class LossTotals:
    """Loss sums and target counts of one process since the last report. Adding does not wait for the device."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None

    def add(self, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """Add the `(2,)` sums and counts of one micro-batch."""
        self.sums = sums if self.sums is None else self.sums + sums
        self.counts = counts if self.counts is None else self.counts + counts

    def pop(self, trainer: Trainer) -> dict[str, float]:
        """Give means and counts over all processes, and begin again. All processes call it, or none."""
        if self.sums is None or self.counts is None:
            return {}
        sums = trainer.accelerator.gather(self.sums[None]).sum(0).tolist()
        counts = trainer.accelerator.gather(self.counts[None]).sum(0).tolist()
        self.sums = self.counts = None
        report: dict[str, float] = {}
        for name, loss_sum, count in zip(LOSSES, sums, counts, strict=True):
            report[f"{name}_loss"] = loss_sum / max(count, 1)
            report[f"num_{name}_targets"] = count
        return report


class EmuTrainer(Trainer):
    """Trainer for `EmuForMultimodalGeneration`, bare or with a PEFT adapter.

    The loss of a step is `text_loss_weight * (sum of text losses) / (number of text targets)` plus the same for the
    regression, where sums and numbers run over all micro-batches of the step on all processes.

    Batches are what `EmuForMultimodalGeneration.forward` takes, and may carry `keys`, the names of their samples. Logs have
    `text_loss`, `regression_loss`, `num_text_targets` and `num_regression_targets` besides Trainer's own values. With
    `EmuTrainingArguments`, parts have learning rates of their own, and some are frozen.

    Raises:
        ValueError: if more than one device is used without processes (`torch.nn.DataParallel`), which cannot split a
            batch of images and rows.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model: nn.Module, args: Any = None, **kwargs: Any):
        if args is not None and args.n_gpu > 1:
            raise ValueError(f"devices of one process: got {args.n_gpu}, expected 1 (start with torchrun)")
        if isinstance(args, EmuTrainingArguments):
            freeze_parts(model, args.freeze)
        super().__init__(model=model, args=args, **kwargs)
        self.emu_config = cast(EmuConfig, model.config)
        self.train_totals, self.eval_totals = LossTotals(), LossTotals()
        self.losses_of_step: list[tuple[torch.Tensor, list[str]]] = []
        self.rates_of_step: dict[str, float] = {}

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        return data_collator  # what a sample holds is the collator's business, not forward's

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any
    ) -> DataLoader:
        """As in Trainer; a stream that splits itself over ranks is not divided again.

        Its ranks may end at different times, so one that ends, for evaluation, is divided by batches.
        """
        if not isinstance(dataset, SplitDataset):
            return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        copies = self.get_tp_size()  # ranks that share a batch
        rank, world_size = self.args.process_index // copies, self.args.world_size // copies
        size = None if getattr(dataset, "batch_sizes", None) else batch_size  # None: batches come ready
        collate = self.data_collator
        if kwargs.get("is_training", False):
            dataset.split(rank, world_size)
        else:
            dataset = EvaluationShare(cast(Iterable[Any], dataset), size, rank, world_size)
            size, collate = None, partial(collate_share, self.data_collator)
        loader = DataLoader(
            cast(IterableDataset, dataset),
            batch_size=size,
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Count the targets of these micro-batches on all processes: `(2,)`, long, on `device`."""
        counts = torch.zeros(2, dtype=torch.long)
        for batch in batch_samples:
            counts = counts.to(batch["input_ids"].device) + count_targets(batch, self.emu_config)
        return self.accelerator.gather(counts.to(device)[None]).sum(0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Weigh the losses of one micro-batch so that the micro-batches of a step add up to the step's loss.

        Args:
            inputs: a batch of the collator.
            num_items_in_batch: `(2,)`, targets of the whole step; those of this batch where it is None.
        """
        keys = inputs.get(KEYS, [])
        # Without a cache, position_ids alone tell where a packed document ends.
        arguments = {"use_cache": False} | {
            name: value for name, value in inputs.items() if name not in (KEYS, REPEATED)
        }
        outputs = model(**arguments)
        sums = torch.stack([outputs.text_loss_sum, outputs.regression_loss_sum.to(outputs.text_loss_sum.device)])
        counts = torch.stack([outputs.num_text_targets, outputs.num_regression_targets.to(sums.device)])
        if num_items_in_batch is None:
            num_items_in_batch = self.accelerator.gather(counts[None]).sum(0)
        weights = sums.new_tensor([self.emu_config.text_loss_weight, self.emu_config.regression_loss_weight])
        # Gradients are averaged over processes; tensor-parallel ones count the same targets again, so this holds there.
        scale = self.accelerator.num_processes / num_items_in_batch.to(sums.device).clamp(min=1)
        loss = (weights * scale * sums).sum()

        if model.training:
            self.train_totals.add(sums.detach(), counts)
            self.losses_of_step.append((loss.detach(), keys))
        elif inputs.get(REPEATED, False):
            self.eval_totals.add(torch.zeros_like(sums), torch.zeros_like(counts))
        else:
            self.eval_totals.add(sums.detach(), counts)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in Trainer; after the last micro-batch of a step, stop if a loss of any process is not finite.

        Raises:
            FloatingPointError: naming the samples, before the optimiser has used their gradients.
        """
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._stop_at_infinite_loss()
        return loss

    def _stop_at_infinite_loss(self) -> None:
        losses, self.losses_of_step = self.losses_of_step, []
        is_finite = torch.stack([loss for loss, _ in losses]).isfinite()
        if self.accelerator.gather(is_finite.all()[None]).all():
            return
        pairs = zip(is_finite.tolist(), losses, strict=True)
        bad_keys = [key for finite, (_, keys) in pairs if not finite for key in keys or ["a sample without a key"]]
        if dist.is_initialized():
            keys_of_ranks: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(keys_of_ranks, bad_keys)
            bad_keys = [key for rank_keys in keys_of_ranks for key in rank_keys]
        raise FloatingPointError(
            f"loss of step {self.state.global_step + 1}: got NaN or infinity, expected a finite number; "
            f"samples of these micro-batches: {', '.join(bad_keys)}"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer; training logs also have both losses, their counts, and each part's learning rate."""
        if "loss" in logs:
            logs |= self.train_totals.pop(self)
            logs |= {f"{part}_learning_rate": rate for part, rate in self.rates_of_step.items()}
        super().log(logs, start_time)

    def _get_learning_rate(self) -> float:
        # Trainer asks before the schedule moves on.
        groups = self.optimizer.param_groups
        self.rates_of_step = {group["part"]: group["lr"] for group in groups if "part" in group}
        return super()._get_learning_rate()

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As in Trainer, with both losses over all targets; `{prefix}_loss` is their weighted sum."""
        self.eval_totals = LossTotals()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        report = self.eval_totals.pop(self)
        if report:
            config = self.emu_config
            report["loss"] = (
                config.text_loss_weight * report["text_loss"]
                + config.regression_loss_weight * report["regression_loss"]
            )
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in report.items()})
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in Trainer; with `EmuTrainingArguments` its groups are split by part, each with the part's learning rate.

        Raises:
            ValueError: if a parameter is in no part, or nothing is left to train.
        """
        is_ours = self.optimizer is None and isinstance(self.args, EmuTrainingArguments)
        optimizer = super().create_optimizer(model)
        if is_ours:
            named = (self.model if model is None else model).named_parameters()
            part_of = {id(parameter): get_part(name) for name, parameter in named}
            groups = []
            for group in optimizer.param_groups:
                by_part = defaultdict(list)
                for parameter in group["params"]:
                    by_part[part_of[id(parameter)]].append(parameter)
                for part, parameters in by_part.items():
                    rate = self.args.get_part_learning_rate(part)
                    groups.append({**group, "params": parameters, "part": part, "lr": rate})
            if not groups:
                raise ValueError("parameters to train: got none, expected at least one part that is not frozen")
            optimizer.param_groups[:] = groups
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As in Trainer, but never from a checkpoint that was not written to its end.

        Args:
            resume_from_checkpoint: a folder, or True for the last complete one in `output_dir`.

        Raises:
            ValueError: if there is no complete checkpoint.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = str(find_checkpoint(resume_from_checkpoint, Path(self.args.output_dir)))
        self.losses_of_step = []
        self.train_totals = LossTotals()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer, which would take one more step from the checkpoint of the last one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as Trainer does, mark the folder when every process is done, and only then delete older ones."""
        run_dir = self._get_output_dir(trial)
        folder = Path(run_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # of a run that was killed, or of another one
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(
                output_dir=os.fspath(run_dir), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True
            )
