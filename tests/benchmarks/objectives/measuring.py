"""What is measured of an arm: captions and pictures of fresh scenes by the evaluation's own judges, and its losses."""

from collections.abc import Collection
from typing import Any

import torch
from torch.utils.data import DataLoader

from modeling_emu import EmuForMultimodalGeneration, EmuProcessor
from modeling_emu.data import EmuDataCollator, EmuMixture, EmuSource
from modeling_emu.evaluation.shapes import ABILITIES, evaluate_ability


WRITING, DRAWING = "caption", "draw"
ABILITY_NAMES = tuple(ability.name for ability in ABILITIES if ability.kind in (WRITING, DRAWING))
TEXT_LOSS, REGRESSION_LOSS, COSINE_LOSS = "text loss", "regression loss", "cosine loss"
LOSS_NAMES = (TEXT_LOSS, REGRESSION_LOSS, COSINE_LOSS)
PAGES_AT_ONCE = 50


def measure_abilities(pipeline: Any, kinds: Collection[str], num_samples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Right answers on scenes of the test split, and on such with a pair of colour and shape that training never shows.

    Args:
        pipeline: an `EmuPipeline`, or what can be asked for these kinds in its place.
        kinds: of tasks, `WRITING` and `DRAWING`.
        num_samples: per ability.
        seed: of scenes and noise, the same for all arms.
    """
    figures = {
        ability.name: evaluate_ability(pipeline, ability, num_samples, seed)[0]
        for ability in ABILITIES
        if ability.kind in kinds
    }
    return {
        name: {"num_right": figure.num_right, "num_samples": figure.num_samples, "baselines": figure.baselines}
        for name, figure in figures.items()
    }


def measure_losses(
    model: EmuForMultimodalGeneration, processor: EmuProcessor, folder: str, regresses: bool
) -> dict[str, float]:
    """Losses on the validation split: of the captions of given pictures, and of the embeddings for given captions.

    Args:
        model: changed in its configuration.
        folder: with pages of both kinds in their folders.
        regresses: whether its regression head has learned something.

    Returns:
        Per text token, and per embedding: the mean squared error and the cosine distance, whichever it was trained on.
    """
    model.config.supervise_image_start = False  # whether a page begins with a picture is no part of a caption
    losses = {TEXT_LOSS: measure_loss(model, processor, f"{folder}/{WRITING}_page", "text")}
    if regresses:
        for name, kind in ((REGRESSION_LOSS, "mse"), (COSINE_LOSS, "cosine")):
            model.config.regression_loss = kind
            losses[name] = measure_loss(model, processor, f"{folder}/{DRAWING}_page", "regression")
    return losses


@torch.no_grad()
def measure_loss(model: EmuForMultimodalGeneration, processor: EmuProcessor, folder: str, kind: str) -> float:
    """The mean of a loss over all its targets in a folder of pages; `kind` is "text" or "regression"."""
    pages = EmuMixture([EmuSource("obelics", f"{folder}/*.parquet")], repeat=False)
    loss_sum, num_targets = 0.0, 0
    for batch in DataLoader(pages, PAGES_AT_ONCE, collate_fn=EmuDataCollator(processor)):
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        loss_sum += float(output[f"{kind}_loss_sum"])
        num_targets += int(output[f"num_{kind}_targets"])
    return loss_sum / num_targets
