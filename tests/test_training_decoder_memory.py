"""What training the visual decoder is said to need, against the tensors of real steps; refusing one that cannot fit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional
from training_decoder_run import make_arguments

from modeling_emu.training.decoder_memory import (
    compute_unet_activations,
)


FACTOR = 1.05  # between the estimate of activations and what autograd keeps
PEAK_FACTOR = 1.2  # between the sum and all that is alive at once
BATCH, SLOTS, WIDTH = 3, 8, 128
SOURCES = [{"kind": "image_text", "files": "pairs/*.tar"}]
SHAPES: dict[str, dict[str, Any]] = {
    "latents": {},
    "pixels": {"sample_size": (16, 12), "in_channels": 3, "out_channels": 3, "layers_per_block": 1},
    "wide": {"block_out_channels": (64, 128, 128), "attention_head_dim": 8},
    "odd": {"sample_size": 13, "block_out_channels": (16, 32, 48)},
}


def make_levels(**kwargs: Any) -> UNet2DConditionModel:
    """A U-Net of three levels, two of which attend to the condition."""
    sizes = {
        "sample_size": 16,
        "block_out_channels": (16, 32, 32),
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**sizes, **kwargs})


def compute_loss(unet: UNet2DConditionModel, half: bool) -> torch.Tensor:
    """As the trainer does."""
    size = unet.config.sample_size
    noisy = torch.randn(BATCH, unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
    timesteps, condition = torch.zeros(BATCH, dtype=torch.long), torch.randn(BATCH, SLOTS, WIDTH)
    with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
        predicted = unet(noisy, timesteps, encoder_hidden_states=condition).sample
        return functional.mse_loss(predicted.float(), torch.randn_like(noisy), reduction="none").flatten(1).mean(1)


@pytest.fixture
def norms_in_float32(monkeypatch):
    """What autocast does on a GPU."""

    def widen(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def compute(value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                return norm(value.float(), *args, **kwargs)

        return compute

    for name in ("group_norm", "layer_norm"):
        monkeypatch.setattr(functional, name, widen(getattr(functional, name)))


def get_saved_bytes(unet: UNet2DConditionModel, half: bool) -> int:
    """What autograd keeps of a forward pass, the U-Net's own weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute_loss(unet, half)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all", "checkpointed"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "mixed"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_activations_are_estimated_within_a_factor(tmp_path, norms_in_float32, shape, half, checkpointing):
    unet = make_levels(**shape).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    training = make_arguments(
        tmp_path, per_device_train_batch_size=BATCH, bf16=half, gradient_checkpointing=checkpointing
    )
    activations, copies = compute_unet_activations(unet, training, (SLOTS, WIDTH))
    saved = get_saved_bytes(unet, half)
    assert saved / FACTOR < activations.kept + copies < saved * FACTOR
    assert (activations.recomputed > 0) == checkpointing
    assert (copies > 0) == half
