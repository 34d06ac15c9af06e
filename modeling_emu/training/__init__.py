"""Training: a trainer that divides both losses by the targets of the whole step, recipes, and instruction tuning."""

from .arguments import EmuTrainingArguments
from .instruct import add_instruct_tokens, add_lora, save_tuned
from .trainer import EmuTrainer


__all__ = ["EmuTrainer", "EmuTrainingArguments", "add_instruct_tokens", "add_lora", "save_tuned"]
