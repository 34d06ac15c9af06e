"""What a recipe may say of the training itself: TrainingArguments, and what Emu needs besides."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .parts import check_parts


@dataclass
class EmuTrainingArguments(TrainingArguments):
    """TrainingArguments with a learning rate per part, and freezing by part.

    A learning rate that is None is `learning_rate`. The schedule multiplies all of them alike. Three defaults are not
    those of TrainingArguments: the collator reads documents, so no column is unused; a loss that is not finite stops
    the run instead of being left out of the logs; and TensorBoard is the tracker.

    Raises:
        ValueError: if `freeze` names something that is no part, or `fsdp` is asked for on CPUs.
    """

    vision_learning_rate: float | None = field(default=None, metadata={"help": "Peak rate of the vision tower."})
    causal_former_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak rate of the causal former."}
    )
    language_model_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak rate of the language model, word embeddings included."}
    )
    heads_learning_rate: float | None = field(default=None, metadata={"help": "Peak rate of both heads."})
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": "Parts that are not trained: vision, causal_former, language_model, heads."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads documents."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "EmuTrainer stops at such a loss."})
    # Not as in TrainingArguments: HfArgumentParser takes no union with a list but in one order. A list works.
    report_to: str | None = field(default="tensorboard", metadata={"help": "Tracker, or a list of them."})

    def __post_init__(self) -> None:
        check_parts(self.freeze, "freeze")
        if self.fsdp and self.use_cpu:
            raise ValueError(
                f"fsdp: got {self.fsdp!r} with use_cpu, expected false: accelerate shards nothing on CPUs, without a word"
            )
        super().__post_init__()

    def get_part_learning_rate(self, part: str) -> float:
        """Give the peak learning rate of a part."""
        rate = getattr(self, f"{part}_learning_rate")
        return self.learning_rate if rate is None else rate
