"""The arms: what differs between the networks that are compared, as settings of the small model's own recipes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from modeling_emu.training.run import pretrain
from modeling_emu.training.tiny import NUM_IMAGE_TOKENS

from .moving_targets import pretrain_with_moving_targets


WHOLE, ANEW, HALF = "whole", "anew", "half"
# The image tokens of each beginning: that with the packaged model's encoder, and two whose encoder first learns to see.
BEGINNINGS = {WHOLE: NUM_IMAGE_TOKENS, ANEW: NUM_IMAGE_TOKENS, HALF: NUM_IMAGE_TOKENS // 2}

# The same pairs: in either order, and always as image, then caption.
PAIRS = 'sources=[{kind: image_text, name: pair, files: "data/caption/*.tar"}]'
PAGES = 'sources=[{kind: obelics, name: page, files: "data/caption_page/*.parquet"}]'
TEXT_LOSS = ("objective.text_loss_weight=1", "objective.regression_loss_weight=0")
REGRESSION_LOSS = ("objective.text_loss_weight=0", "objective.regression_loss_weight=1")
BOTH_LOSSES = ("objective.text_loss_weight=1", "objective.regression_loss_weight=1")
TRAIN_ALL = "freeze=[]"


@dataclass(frozen=True)
class Arm:
    """One of the networks to compare.

    Args:
        name: in files and tables.
        what: what it is, in a line.
        settings: of the recipe tiny-pretrain; of tiny-decoder for the network that is no Emu.
        draws: whether it is asked for pictures.
        beginning: one of `BEGINNINGS`.
        run: what runs the recipe.
        tunes_decoder: whether the packaged visual decoder is tuned for what it regresses, as it has to be where it does
            not know such embeddings.
        same_emu_as: the arm whose Emu it is, so that this is trained once; empty for one of its own.
    """

    name: str
    what: str
    settings: tuple[str, ...] = ()
    draws: bool = True
    beginning: str = WHOLE
    run: Callable[..., Path] = pretrain
    tunes_decoder: bool = False
    same_emu_as: str = ""


DIFFUSION = "diffusion"
BOTH = Arm("both", "text and regression loss", (PAIRS, *BOTH_LOSSES))
FIRST_ARMS = (
    BOTH,
    Arm("text", "text loss alone", (PAIRS, *TEXT_LOSS), draws=False),
    Arm("regression", "regression loss alone", (PAIRS, *REGRESSION_LOSS)),
    Arm("captioner", "specialist: image, then caption, always; text loss alone", (PAGES, *TEXT_LOSS), draws=False),
    Arm(
        DIFFUSION,
        "specialist: text encoder and U-Net, trained together, no Emu",
        ("learning_rate=1e-3", "per_device_train_batch_size=32"),
    ),
)
LATER_ARMS = (
    replace(
        BOTH,
        name="decoder-tuned",
        what="the same Emu as both, the decoder tuned for it: what the next two differ from",
        tunes_decoder=True,
        same_emu_as=BOTH.name,
    ),
    Arm(
        "cosine",
        "both losses, the regression's is the cosine",
        (PAIRS, *BOTH_LOSSES, "objective.regression_loss=cosine"),
        tunes_decoder=True,
    ),
    Arm(
        "encoder-trained",
        "both losses, the encoder learns too: what the next arm differs from",
        (PAIRS, *BOTH_LOSSES, TRAIN_ALL),
        tunes_decoder=True,
    ),
    Arm(
        "not-detached",
        "both losses, the encoder learns too, also from being the regression's target",
        (PAIRS, *BOTH_LOSSES, TRAIN_ALL),
        run=pretrain_with_moving_targets,
        tunes_decoder=True,
    ),
    Arm(
        "encoder-anew",
        "both losses, an encoder that learned to see anew: what the next arm differs from",
        (PAIRS, *BOTH_LOSSES),
        beginning=ANEW,
        tunes_decoder=True,
    ),
    Arm(
        "n-halved",
        f"both losses, an encoder that learned to see anew, {BEGINNINGS[HALF]} image tokens",
        (PAIRS, *BOTH_LOSSES),
        beginning=HALF,
        tunes_decoder=True,
    ),
)
ARMS = {arm.name: arm for arm in (*FIRST_ARMS, *LATER_ARMS)}
