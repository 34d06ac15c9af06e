"""What a recipe of the visual decoder may say."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .recipes import SOURCE_VALUES, check_source


CONDITIONS = ("regressed", "encoder")
PREDICTION_TYPES = ("epsilon", "v_prediction")
IMAGE_KINDS = ("image_text", "obelics", "storyboard")  # whose documents have pictures, and are not measured in tokens
PIECEWISE_CONSTANT = "piecewise_constant"
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", PIECEWISE_CONSTANT)


@dataclass
class DecoderArguments:
    """Which visual decoder a recipe trains, on what, and on which condition.

    Raises:
        ValueError: for unknown keys or values, or no source.
    """

    model: str = field(metadata={"help": "Folder or Hub id of the Emu whose embeddings are the condition."})
    sources: list[dict] = field(
        metadata={"help": "Per source: kind and files, as in EmuSource, and its weight in the mixture."}
    )
    decoder: str | None = field(
        default=None, metadata={"help": "Folder with unet/, scheduler/ and vae/ to start from; None is the model's."}
    )
    condition: str = field(
        default="regressed",
        metadata={
            "help": "regressed: what the model regresses after all parts of a document but its last picture; encoder: "
            "the embeddings of that picture itself."
        },
    )
    precomputed: str | None = field(
        default=None,
        metadata={
            "help": "Folder of embeddings and latents, computed once; None computes them anew in each step. It is refused "
            "when files of the sources have changed, by their names, sizes and first and last 64 KiB; of remote files by "
            "their addresses alone, and the pictures that rows name are not looked at."
        },
    )
    precompute_batch_size: int = field(default=16, metadata={"help": "Documents per pass of the frozen models."})
    validation_prompts: list[Any] = field(
        default_factory=list,
        metadata={
            "help": "Texts, or lists of parts, to draw while training; with condition encoder, one picture each."
        },
    )
    dtype: str = field(default="float32", metadata={"help": "Of the frozen models: float32, bfloat16 or auto."})

    def __post_init__(self) -> None:
        if self.condition not in CONDITIONS:
            raise ValueError(f"condition: got {self.condition!r}, expected one of {CONDITIONS}")
        if self.precompute_batch_size < 1:
            raise ValueError(f"precompute_batch_size: got {self.precompute_batch_size}, expected at least 1")
        if not self.sources:
            raise ValueError("sources: got none, expected at least one")
        known = tuple(key for key in SOURCE_VALUES if key != "batch_size")
        for source in self.sources:
            check_source(source, known)
            if source["kind"] not in IMAGE_KINDS:
                raise ValueError(f"kind of a decoder's source: got {source['kind']!r}, expected one of {IMAGE_KINDS}")


@dataclass
class DecoderTrainingArguments:
    """How the U-Net is trained: the names are TrainingArguments' own wherever it has the thing.

    Raises:
        ValueError: for values that cannot be.
    """

    output_dir: str = field(metadata={"help": "Checkpoints, pictures, logs, and at the end the decoder in final/."})
    max_steps: int = field(metadata={"help": "Steps of the optimiser."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Pictures per process and micro-batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per step."})
    learning_rate: float = field(default=1e-4, metadata={"help": "The peak rate."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Of AdamW."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Of AdamW."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to it; 0 does not clip."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": f"One of {', '.join(SCHEDULES)}."})
    lr_scheduler_kwargs: dict = field(
        default_factory=dict,
        metadata={"help": "Of piecewise_constant: rates, the learning rate by the step from which on it holds."},
    )
    warmup_steps: float = field(default=0, metadata={"help": "Steps; below 1, a fraction of max_steps."})
    prediction_type: str = field(default="epsilon", metadata={"help": f"One of {', '.join(PREDICTION_TYPES)}."})
    condition_dropout: float = field(
        default=0.1, metadata={"help": "Chance that a condition is replaced by the null embeds."}
    )
    ema_decay: float = field(default=0.9999, metadata={"help": "Of the averaged weights, which are those saved."})
    seed: int = field(default=42, metadata={"help": "Of the data, the noise, and all else."})
    bf16: bool = field(default=False, metadata={"help": "Compute the U-Net in bfloat16; its weights are float32."})
    fp16: bool = field(default=False, metadata={"help": "As bf16, in float16 with scaled losses."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations twice, to save memory."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read documents or shards."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between logs."})
    validation_steps: int = field(default=500, metadata={"help": "Steps between the pictures of the prompts."})
    validation_num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps of these pictures."})
    validation_guidance_scale: float = field(default=7.5, metadata={"help": "Guidance of these pictures."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints; 0 writes none."})
    save_total_limit: int | None = field(default=None, metadata={"help": "Checkpoints to keep."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint's folder, or true for the last complete one."}
    )
    report_to: str | None = field(default="tensorboard", metadata={"help": "Tracker, a list of them, or none."})
    use_cpu: bool = field(default=False, metadata={"help": "Do not use an accelerator."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        for name in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("condition_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 to 1")
        for name, known in {"prediction_type": PREDICTION_TYPES, "lr_scheduler_type": SCHEDULES}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {known}")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected at least 0")
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16: got both, expected at most one")
        needed = ["rates"] if self.lr_scheduler_type == PIECEWISE_CONSTANT else []
        if sorted(self.lr_scheduler_kwargs) != needed:
            raise ValueError(
                f"lr_scheduler_kwargs: got {sorted(self.lr_scheduler_kwargs)}, expected {needed or 'none'} with "
                f"{self.lr_scheduler_type}"
            )

        rates = self.lr_scheduler_kwargs.get("rates", {})
        if needed and not (self.learning_rate > 0 and isinstance(rates, dict)):
            raise ValueError(
                f"{PIECEWISE_CONSTANT}: got learning_rate {self.learning_rate} and rates {rates!r}, expected a rate above "
                f"0, and rates by step"
            )

    @property
    def num_warmup_steps(self) -> int:
        """Steps over which the learning rate rises from 0."""
        return round(self.warmup_steps * self.max_steps if self.warmup_steps < 1 else self.warmup_steps)

    @property
    def mixed_precision(self) -> str:
        """As accelerate names it."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "no"

    @property
    def final_folder(self) -> Path:
        """Where the trained decoder goes."""
        return Path(self.output_dir) / "final"
