"""Training: a trainer that divides both losses by the targets of the whole step, recipes, instruction tuning, samples."""

from .arguments import EmuTrainingArguments
from .instruct import add_instruct_tokens, add_lora, save_tuned
from .samples import EmuSamplesCallback
from .trainer import EmuTrainer


__all__ = ["EmuSamplesCallback", "EmuTrainer", "EmuTrainingArguments", "add_instruct_tokens", "add_lora", "save_tuned"]
