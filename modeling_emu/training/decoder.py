"""The trainer of the visual decoder: its U-Net alone learns, on accelerate; Emu and the VAE stay as they are.

    data = LiveDecoderData(DecoderEncoder(pipeline, "regressed"), DecoderStream(mixture, 512, 512, measure=None))
    trainer = EmuDecoderTrainer(pipeline.unet, pipeline.scheduler, data, DecoderTrainingArguments("out", max_steps=1000))
    trainer.train()
    trainer.save_model("out/final")

What is drawn for a sample (noise, timestep, whether its condition is dropped) follows from the seed and the sample's number,
so the same data gives the same step for any split into micro-batches, accumulation steps and processes.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, gather_object, set_seed, tqdm
from diffusers import DDPMScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import rotate_checkpoints

from ..pipeline_emu import EmuPipeline
from .checkpoints import find_checkpoint, mark_complete
from .decoder_arguments import PIECEWISE_CONSTANT, DecoderTrainingArguments
from .decoder_data import DecoderBatch, DecoderData
from .decoder_pictures import PictureGrid, make_sheet, report_picture


logger = logging.getLogger(__name__)

PROJECT = "emu-decoder"  # what trackers call it


@dataclass
class DecoderDraws:
    """What chance decides for B samples.

    Args:
        noise: `(B, C, H, W)`, float32, to be predicted.
        latents_noise: as `noise`, of the VAE's distribution.
        timesteps: `(B,)`, long.
        is_dropped: `(B,)`, bool, whose condition becomes the null embeds.
    """

    noise: torch.Tensor
    latents_noise: torch.Tensor
    timesteps: torch.Tensor
    is_dropped: torch.Tensor


@dataclass
class DenoisingTask:
    """What the U-Net gets for B samples, and what it should give.

    Args:
        noisy: `(B, C, H, W)`.
        timesteps: `(B,)`, long.
        condition: `(B, N, D)`, the null embeds where it was dropped.
        target: as `noisy`: the noise, or the velocity.
    """

    noisy: torch.Tensor
    timesteps: torch.Tensor
    condition: torch.Tensor
    target: torch.Tensor


def draw_samples(
    seed: int, first: int, shape: torch.Size, num_timesteps: int, condition_dropout: float
) -> DecoderDraws:
    """Draw for the samples with the numbers from `first` on, each from a generator of its own.

    Args:
        shape: `(B, C, H, W)`.
        num_timesteps: of the diffusion.
        condition_dropout: chance that a condition is dropped.
    """
    noise = np.empty((2, *shape), dtype=np.float32)
    timesteps, is_dropped = [], []
    for row in range(shape[0]):
        rng = np.random.Generator(np.random.Philox(key=[seed, first + row]))
        timesteps.append(int(rng.integers(num_timesteps)))
        is_dropped.append(bool(rng.random() < condition_dropout))
        for values in noise:
            rng.standard_normal(dtype=np.float32, out=values[row])
    drawn, latents_noise = torch.from_numpy(noise)
    return DecoderDraws(drawn, latents_noise, torch.tensor(timesteps), torch.tensor(is_dropped))


def make_schedule(optimizer: torch.optim.Optimizer, args: DecoderTrainingArguments) -> LambdaLR:
    """The learning rate over the steps: diffusers' schedules, and a warm-up that constant pieces follow."""
    if args.lr_scheduler_type != PIECEWISE_CONSTANT:
        return get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.num_warmup_steps,
            num_training_steps=args.max_steps,
        )
    rates = sorted((int(step), float(rate)) for step, rate in args.lr_scheduler_kwargs["rates"].items())

    def get_factor(step: int) -> float:
        rate = next((rate for first, rate in reversed(rates) if step >= first), args.learning_rate)
        is_warming_up = step < args.num_warmup_steps
        return rate / args.learning_rate * (step / args.num_warmup_steps if is_warming_up else 1.0)

    return LambdaLR(optimizer, get_factor)


class TrainingProgress:
    """The number of steps done, as accelerate keeps it in checkpoints."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        """As plain numbers."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.step = state["step"]


class EmuDecoderTrainer:
    """Trains the U-Net of an `EmuPipeline` to remove noise from pictures, given their embeddings.

    The loss is the mean squared error of the predicted noise, or velocity. With the chance `condition_dropout` the
    embeddings of a sample are replaced by the null embeds, against which the pipeline guides. The averaged weights are
    drawn from and saved; the others are in the checkpoints, which accelerate writes.

    Args:
        unet: float32; `in_channels` of the latents, or of RGB where there is no VAE.
        scheduler: of the pipeline, whose betas are those of training.
        data: `LiveDecoderData` or `PrecomputedDecoderData`.
        args: how to train.
        grid: what to draw at each `validation_steps`; None draws nothing.

    Source:
        Emu, section 2.3; what recipes/decoder.yaml names. Dropped conditions: Ho and Salimans, 2022.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        data: DecoderData,
        args: DecoderTrainingArguments,
        grid: PictureGrid | None = None,
    ):
        self.args = args
        self.data = data
        self.grid = grid
        self.accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to in (None, "none") else args.report_to,
            project_dir=args.output_dir,
            cpu=args.use_cpu,
            # each weight is read once, so 16-bit copies for later would only fill memory
            kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
        )
        set_seed(args.seed, device_specific=True)
        self.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=args.prediction_type)
        self.noise_scheduler = DDPMScheduler.from_config(self.scheduler.config)
        unet.requires_grad_(True).train()
        if args.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            foreach=False,  # which takes as much as all weights for a moment, as it does in the averages
        )
        self.lr_schedule = make_schedule(optimizer, args)
        self.unet, self.optimizer = self.accelerator.prepare(unet, optimizer)
        self.ema = EMAModel(self.parameters, decay=args.ema_decay, foreach=False)
        self.null_embeds = data.null_embeds.to(self.accelerator.device)
        if (width := self.null_embeds.shape[-1]) != unet.config.cross_attention_dim:
            raise ValueError(
                f"unet.config.cross_attention_dim: got {unet.config.cross_attention_dim}, expected {width}, the width of "
                f"the embeddings"
            )
        self.progress = TrainingProgress()
        self.accelerator.register_for_checkpointing(self.progress, self.lr_schedule, self.ema)
        self.log_history: list[dict[str, float]] = []

    @property
    def plain_unet(self) -> UNet2DConditionModel:
        """The U-Net without what accelerate wraps it in."""
        return self.accelerator.unwrap_model(self.unet)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        return list(self.plain_unet.parameters())

    @contextmanager
    def averaged_weights(self) -> Iterator[UNet2DConditionModel]:
        """The U-Net with its averaged weights, in evaluation mode."""
        unet = self.plain_unet
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        unet.eval()
        try:
            yield unet
        finally:
            unet.train()
            self.ema.restore(self.parameters)

    def make_task(self, batch: DecoderBatch, first: int) -> DenoisingTask:
        """Noisy latents and what is to be predicted from them.

        Args:
            batch: on the accelerator's device.
            first: number of its first sample; the others follow.
        """
        args, mean = self.args, batch.latents_mean
        num_timesteps = self.noise_scheduler.config.num_train_timesteps
        draws = draw_samples(args.seed, first, mean.shape, num_timesteps, args.condition_dropout)
        noise, latents_noise, timesteps, is_dropped = (
            value.to(mean.device, non_blocking=True)
            for value in (draws.noise, draws.latents_noise, draws.timesteps, draws.is_dropped)
        )
        latents = mean + batch.latents_std * latents_noise
        target = noise
        if args.prediction_type == "v_prediction":
            target = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return DenoisingTask(
            noisy=self.noise_scheduler.add_noise(latents, noise, timesteps),
            timesteps=timesteps,
            condition=torch.where(is_dropped[:, None, None], self.null_embeds, batch.image_embeds),
            target=target,
        )

    def compute_losses(self, task: DenoisingTask) -> torch.Tensor:
        """The mean squared error of each sample, `(B,)`, float32."""
        predicted = self.unet(task.noisy, task.timesteps, encoder_hidden_states=task.condition).sample
        return functional.mse_loss(predicted.float(), task.target, reduction="none").flatten(1).mean(1)

    def train(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Train up to `max_steps`.

        Args:
            resume_from_checkpoint: a folder, or True for the last complete one in `output_dir`.

        Raises:
            ValueError: if there is no complete checkpoint to resume.
            FloatingPointError: if a loss is NaN or infinite; it names the samples.
        """
        args, accelerator = self.args, self.accelerator
        if resume_from_checkpoint:
            accelerator.load_state(str(find_checkpoint(resume_from_checkpoint, Path(args.output_dir))))
        self.ema.to(accelerator.device)
        accelerator.init_trackers(PROJECT, {name: str(value) for name, value in asdict(args).items()})
        batches = enumerate(
            self.data.read(
                args.per_device_train_batch_size,
                self.progress.step * args.gradient_accumulation_steps,
                accelerator.process_index,
                accelerator.num_processes,
                args.dataloader_num_workers,
            ),
            start=self.progress.step * args.gradient_accumulation_steps,
        )
        losses: list[torch.Tensor] = []
        with tqdm(total=args.max_steps, initial=self.progress.step, disable=args.disable_tqdm) as bar:
            while self.progress.step < args.max_steps:
                losses.append(self._take_step(batches))
                step = self.progress.step
                bar.update()
                if step % args.logging_steps == 0 or step == args.max_steps:
                    self._log(losses, bar)
                    losses = []
                if self.grid is not None and (step % args.validation_steps == 0 or step == args.max_steps):
                    self._draw_grid(self.grid)
                if args.save_steps and step % args.save_steps == 0:
                    self._save_checkpoint()
        accelerator.wait_for_everyone()

    def _take_step(self, batches: Iterator[tuple[int, DecoderBatch]]) -> torch.Tensor:
        """One step of the optimiser; gives its loss in this process."""
        args, accelerator = self.args, self.accelerator
        losses, keys = [], []
        for _ in range(args.gradient_accumulation_steps):
            number, batch = next(batches)
            first = (number * accelerator.num_processes + accelerator.process_index) * len(batch.keys)
            with accelerator.accumulate(self.unet):
                with accelerator.autocast():
                    losses.append(self.compute_losses(self.make_task(batch.to(accelerator.device), first)))
                keys += batch.keys
                accelerator.backward(losses[-1].mean())
                if accelerator.sync_gradients:
                    self._stop_at_infinite_loss(torch.cat(losses).detach(), keys)
                    if args.max_grad_norm > 0:
                        accelerator.clip_grad_norm_(self.parameters, args.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            self.lr_schedule.step()
        self.ema.step(self.parameters)
        self.progress.step += 1
        return torch.cat(losses).detach().mean()

    def _stop_at_infinite_loss(self, losses: torch.Tensor, keys: list[str]) -> None:
        """Stop every process if a loss of any is NaN or infinite, before the optimiser has used its gradients."""
        is_finite = losses.isfinite()
        if self.accelerator.gather(is_finite.all()[None]).all():
            return
        bad_keys = gather_object([key for key, finite in zip(keys, is_finite.tolist(), strict=True) if not finite])
        raise FloatingPointError(
            f"loss of step {self.progress.step + 1}: got NaN or infinity, expected a finite number; "
            f"samples: {', '.join(bad_keys)}"
        )

    def _log(self, losses: list[torch.Tensor], bar: Any) -> None:
        """Report the mean loss since the last report, over all processes."""
        loss = self.accelerator.gather(torch.stack(losses).mean()[None]).mean().item()
        logs = {"loss": loss, "learning_rate": self.lr_schedule.get_last_lr()[0], "step": self.progress.step}
        self.log_history.append(logs)
        bar.set_postfix(loss=f"{loss:.4f}")
        self.accelerator.log({name: value for name, value in logs.items() if name != "step"}, self.progress.step)

    def _draw_grid(self, grid: PictureGrid) -> None:
        """Draw the prompts with the averaged weights: a PNG in `pictures/`, and to the tracker."""
        if self.accelerator.is_main_process:
            with self.averaged_weights() as unet, self.accelerator.autocast():
                pictures = grid.draw(unet, self.scheduler, self.args)
            sheet = make_sheet(pictures)
            folder = Path(self.args.output_dir) / "pictures"
            folder.mkdir(parents=True, exist_ok=True)
            sheet.save(folder / f"step-{self.progress.step:06d}.png")
            report_picture(self.accelerator, sheet, self.progress.step)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self) -> None:
        """Write a checkpoint, mark it when every process is done, and only then delete older ones."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.progress.step}"
        if self.accelerator.is_main_process and folder.exists():
            shutil.rmtree(folder)  # of a run that was killed, or of another one
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            mark_complete(folder)
            rotate_checkpoints(self.args.output_dir, save_total_limit=self.args.save_total_limit, use_mtime=True)

    def save_model(self, folder: Path | str, **components: Any) -> None:
        """Write a visual decoder that `EmuPipeline` loads: the U-Net's averaged weights and what belongs to them.

        The scheduler says what the U-Net predicts.

        Args:
            components: `vae`, `safety_checker` and `feature_extractor` of the pipeline, where it has them.
        """
        if self.accelerator.is_main_process:
            with self.averaged_weights() as unet:
                parts = {"vae": None} | components
                EmuPipeline(None, None, unet, scheduler=self.scheduler, **parts).save_pretrained(folder)
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Close the trackers, and leave together: a process that ends while others talk to it takes them down."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
