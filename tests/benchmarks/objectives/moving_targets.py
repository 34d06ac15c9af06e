"""Pretraining whose regression targets are not detached: the encoder learns to be easy to regress.

The package always detaches them.
"""

from pathlib import Path
from types import MethodType

import torch

from modeling_emu import EmuForMultimodalGeneration, EmuProcessor
from modeling_emu.modeling_emu import compute_regression_loss
from modeling_emu.training import EmuTrainingArguments
from modeling_emu.training.recipes import PretrainArguments
from modeling_emu.training.run import FINAL_FOLDER, finish, load_model, make_trainer


def compute_losses_with_moving_targets(
    model: EmuForMultimodalGeneration,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    logits: torch.Tensor,
    embeds: torch.Tensor,
    regressed: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """As `EmuForMultimodalGeneration.compute_losses`, with the same values, and gradients to the targets too."""
    losses = EmuForMultimodalGeneration.compute_losses(
        model, input_ids, attention_mask, labels, logits, embeds, regressed
    )
    config = model.config
    is_slot = input_ids == config.image_token_id
    starts = (input_ids[:, :-1] == config.image_start_token_id) & is_slot[:, 1:]
    loss_sum, num_targets = compute_regression_loss(
        regressed[:, :-1],
        embeds[:, 1:],
        is_slot[:, :-1] | starts,
        kind=config.regression_loss,
        normalize_targets=config.normalize_regression_targets,
    )
    regression_loss = loss_sum / num_targets.clamp(min=1)
    loss = config.text_loss_weight * losses["text_loss"] + config.regression_loss_weight * regression_loss
    return losses | {"loss": loss, "regression_loss": regression_loss, "regression_loss_sum": loss_sum}


def pretrain_with_moving_targets(arguments: PretrainArguments, training_arguments: EmuTrainingArguments) -> Path:
    """As `modeling_emu.training.run.pretrain`; what it saves is a plain model."""
    processor = EmuProcessor.from_pretrained(arguments.model)
    model = load_model(arguments)
    model.compute_losses = MethodType(compute_losses_with_moving_targets, model)
    trainer = make_trainer(model, processor, arguments, training_arguments)
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    folder = Path(training_arguments.output_dir) / FINAL_FOLDER
    trainer.save_model(str(folder))
    processor.save_pretrained(folder)
    finish(trainer)
    return folder
