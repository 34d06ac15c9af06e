"""What training the visual decoder is said to need, against the tensors of real steps; refusing one that cannot fit."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, UNet2DConditionModel
from test_training_memory import count_bytes, make_config
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional
from training_decoder_run import make_arguments, make_scheduler
from typer.testing import CliRunner

from modeling_emu import EmuConfig, EmuForMultimodalGeneration
from modeling_emu.cli import app
from modeling_emu.cli.info import PUBLISHED, find_decoder_configurations, find_training_configuration
from modeling_emu.training.decoder import EmuDecoderTrainer
from modeling_emu.training.decoder_arguments import DecoderArguments, DecoderTrainingArguments
from modeling_emu.training.decoder_data import DecoderBatch
from modeling_emu.training.decoder_memory import (
    PUBLISHED_DECODER,
    DecoderConfigs,
    build_empty_decoder,
    compute_decoder_memory,
    compute_precomputing_memory,
    compute_unet_activations,
    read_decoder_configs,
)
from modeling_emu.training.decoder_run import train_decoder
from modeling_emu.training.memory import Memory
from modeling_emu.training.plan import PRECOMPUTING, TrainingPlan, plan_training
from modeling_emu.training.recipes import PACKAGED_RECIPES, parse_as, read_recipe


FACTOR = 1.05  # between the estimate of activations and what autograd keeps
PEAK_FACTOR = 1.15  # between the sum and all that is alive at once
BATCH, SLOTS, WIDTH = 3, 8, 128  # the last two as in make_config
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


class OneBatch:
    """Pictures and conditions that come again and again."""

    def __init__(self, unet: UNet2DConditionModel):
        size = unet.config.sample_size
        latents = torch.randn(BATCH, unet.config.in_channels, size, size)
        self.null_embeds = torch.zeros(1, SLOTS, WIDTH)
        self.batch = DecoderBatch(torch.randn(BATCH, SLOTS, WIDTH), latents, torch.zeros_like(latents), ["x"] * BATCH)

    def read(self, *_: int) -> Iterator[DecoderBatch]:
        return itertools.repeat(self.batch)


def make_trainer(tmp_path: Path, unet: UNet2DConditionModel, **kwargs: Any) -> EmuDecoderTrainer:
    AcceleratorState._reset_state(reset_partial_state=True)  # for another precision than that of the run before
    arguments = make_arguments(tmp_path, per_device_train_batch_size=BATCH, **kwargs)
    return EmuDecoderTrainer(unet, make_scheduler(), OneBatch(unet), arguments)


def make_recipe(**kwargs: Any) -> DecoderArguments:
    return DecoderArguments(**{"model": "x", "sources": SOURCES, "precomputed": "shards", **kwargs})


def make_networks(arguments: DecoderArguments, unet: UNet2DConditionModel, vae: AutoencoderKL | None = None):
    configs = DecoderConfigs(dict(unet.config), None if vae is None else dict(vae.config))
    return build_empty_decoder(make_config(), configs, arguments)


def test_exact_parts_are_the_bytes_of_a_real_step(tmp_path):
    unet = make_levels()
    trainer = make_trainer(tmp_path, unet, max_steps=1)
    found = []
    trainer.optimizer.optimizer.register_step_pre_hook(
        lambda *_: found.append(count_bytes(parameter.grad for parameter in unet.parameters()))
    )
    trainer.train()
    arguments = make_recipe()
    networks = make_networks(arguments, unet)
    assert {parameter.device.type for parameter in (*networks.unet.parameters(), *networks.frozen)} == {"meta"}
    memory = compute_decoder_memory(networks, arguments, trainer.args, num_processes=1)
    assert memory.weights == count_bytes(unet.parameters()) + count_bytes(trainer.ema.shadow_params)
    assert memory.gradients == found[0]
    states = trainer.optimizer.optimizer.state.values()
    assert memory.optimizer == count_bytes(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))
    shared = compute_decoder_memory(networks, arguments, trainer.args, num_processes=8)
    assert shared == dataclasses.replace(memory, copies=memory.copies + memory.gradients)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("with_vae", [False, True], ids=["pixels", "latents"])
def test_frozen_models_count_unless_all_is_precomputed(tmp_path, dtype, with_vae):
    frozen: list[torch.nn.Module] = [EmuForMultimodalGeneration(make_config())]
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4) if with_vae else None
    frozen += [vae] if with_vae else []
    for network in frozen:
        torch.nn.Module.to(network, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    num_bytes = sum(count_bytes(network.parameters()) for network in frozen)
    training = make_arguments(tmp_path)
    live, precomputed = make_recipe(dtype=dtype, precomputed=None), make_recipe(dtype=dtype)
    networks = make_networks(live, make_levels(), vae)
    memory = compute_decoder_memory(networks, precomputed, training, num_processes=1)
    assert compute_precomputing_memory(networks) == Memory(num_bytes, 0, 0, 0, 0, 0)
    with_frozen = dataclasses.replace(memory, weights=memory.weights + num_bytes)
    assert compute_decoder_memory(networks, live, training, num_processes=1) == with_frozen


@pytest.mark.parametrize(("half", "checkpointing"), [(False, False), (True, True)], ids=["plain", "spared"])
def test_the_peak_of_a_step_is_within_the_sum(tmp_path, norms_in_float32, half, checkpointing):
    """All that is alive at once in a step of the trainer, as PyTorch's tracker sees it."""
    unet = make_levels(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
    )
    trainer = make_trainer(tmp_path, unet, bf16=half, gradient_checkpointing=checkpointing, max_steps=1)
    trainer.train()  # makes the states
    trainer.args.max_steps = 2
    tracker = MemTracker()
    tracker.track_external(unet, trainer.optimizer.optimizer, *trainer.ema.shadow_params)
    with tracker:
        trainer.train()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    arguments = make_recipe()
    memory = compute_decoder_memory(make_networks(arguments, unet), arguments, trainer.args, num_processes=1)
    assert peak / PEAK_FACTOR < memory.total < peak * PEAK_FACTOR


def write_configs(folder: Path, with_vae: bool = True, **text_config: Any) -> str:
    """A model's folder that has configurations and no weights."""
    make_config(**text_config).save_pretrained(folder)
    make_levels().save_config(folder / "unet")
    if with_vae:
        AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_config(folder / "vae")
    return str(folder)


def make_plan(folder: str, recipe: str, *settings: str) -> TrainingPlan:
    settings = (f"model={folder}", "decoder=null", *settings)
    return plan_training(recipe, settings, find_training_configuration, find_decoder_configurations)


@pytest.mark.parametrize("recipe", [path.stem for path in sorted(PACKAGED_RECIPES.glob("*decoder*.yaml"))])
def test_a_plan_of_each_packaged_recipe_needs_configurations_only(tmp_path, recipe):
    plan = make_plan(write_configs(tmp_path), recipe)
    assert (plan.kind, plan.num_trained) == ("decoder", sum(p.numel() for p in make_levels().parameters()))
    assert plan.num_parameters > plan.num_trained
    assert ("precomputed" in read_recipe(recipe)) == (PRECOMPUTING in plan.memory)
    assert list(plan.memory)[:3] == ["1", "8 DDP", "128 DDP"]
    precomputed = make_plan(str(tmp_path), recipe, "precomputed=shards").memory
    live = make_plan(str(tmp_path), recipe, "precomputed=null").memory
    assert live["1"].weights - precomputed["1"].weights == precomputed[PRECOMPUTING].weights > 0


def test_more_pictures_need_more_and_checkpointing_less(tmp_path):
    folder = write_configs(tmp_path)

    def get_memory(*settings: str) -> Memory:
        return make_plan(folder, "decoder-cpu", *settings).memory["1"]

    few, many = get_memory("per_device_train_batch_size=2"), get_memory("per_device_train_batch_size=4")
    assert (few.exact, 2 * few.activations) == (many.exact, many.activations)
    assert get_memory("gradient_checkpointing=true").activations < many.activations / 2
    assert get_memory("bf16=true").exact == many.exact


def test_published_sizes():
    """Stable Diffusion 1.5 has 859,520,964 and 83,653,863 weights; each of 16 blocks reads 5120 instead of 768 twice."""
    networks = build_empty_decoder(EmuConfig(), PUBLISHED_DECODER, make_recipe())
    projected = 2 * (5120 - 768) * (5 * 320 + 5 * 640 + 6 * 1280)
    assert sum(parameter.numel() for parameter in networks.unet.parameters()) == 859_520_964 + projected
    assert sum(parameter.numel() for parameter in networks.vae.parameters()) == 83_653_863


def test_the_command_prints_a_decoder_recipe():
    result = CliRunner().invoke(app, ["info", "--training", "decoder-24gb", "--set", f"model={PUBLISHED}"])
    assert result.exit_code == 0, result.output
    assert "968,146,884 trained" in " ".join(result.stdout.split())
    assert "precomputing" in result.stdout


def test_configurations_are_the_decoder_s_or_else_the_model_s(tmp_path):
    model, decoder = write_configs(tmp_path / "model", with_vae=False), write_configs(tmp_path / "decoder")
    assert find_decoder_configurations(model, None).vae is None
    assert find_decoder_configurations(model, decoder) == read_decoder_configs(Path(decoder))
    assert find_decoder_configurations(PUBLISHED, decoder) == read_decoder_configs(Path(decoder))
    for names in ((PUBLISHED, None), (PUBLISHED, "stable-diffusion"), (model, PUBLISHED)):
        assert find_decoder_configurations(*names) is PUBLISHED_DECODER
    make_config().save_pretrained(tmp_path / "encoder")
    for name in (str(tmp_path / "encoder"), "stable-diffusion"):
        with pytest.raises(ValueError, match=r"visual decoder of the recipe: got .*expected --set decoder=DIR"):
            find_decoder_configurations(model, name)
    with pytest.raises(ValueError, match="cross_attention_dim of the U-Net: got 5120, expected 128"):
        make_plan(model, "decoder-cpu", f"decoder={PUBLISHED}")


def run_with_free_memory(monkeypatch, available: int, folder: str, *settings: str) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    settings = (f"model={folder}", f"output_dir={folder}/out", f"precomputed={folder}/shards", *settings)
    train_decoder(*parse_as("decoder-cpu", settings, DecoderArguments, DecoderTrainingArguments))


def test_too_little_memory_is_said_before_anything_is_loaded(tmp_path, monkeypatch, caplog):
    """The folder has no weights: loading them is another error."""
    folder = write_configs(tmp_path)
    memory = make_plan(folder, "decoder-cpu").memory["1"]
    with pytest.raises(ValueError, match=r"free memory of cpu: got .* MB, expected at least .* MB \(weights "):
        run_with_free_memory(monkeypatch, memory.exact - 1, folder)
    with pytest.raises(OSError, match="no file named"):
        run_with_free_memory(monkeypatch, memory.exact, folder)
    assert "gradient_checkpointing need less" in caplog.text
    with pytest.raises(ValueError, match="free memory of cpu"):
        run_with_free_memory(monkeypatch, memory.exact, folder, "precomputed=null")


def test_too_little_memory_to_precompute_is_said_before_the_frozen_models_are_loaded(tmp_path, monkeypatch):
    """The U-Net has weights, Emu has none: loading it is another error."""
    folder = write_configs(tmp_path, vocab_size=1 << 16)
    make_levels().save_pretrained(tmp_path / "unet")
    make_scheduler().save_pretrained(tmp_path / "scheduler")
    memory = make_plan(folder, "decoder-cpu").memory
    assert memory["1"].exact < memory[PRECOMPUTING].exact
    with pytest.raises(ValueError, match=r"gradients 0\.0 MB, optimiser states 0\.0 MB"):
        run_with_free_memory(monkeypatch, memory[PRECOMPUTING].exact - 1, folder)
    with pytest.raises(ValueError, match="weights: got no"):
        run_with_free_memory(monkeypatch, memory[PRECOMPUTING].exact, folder)
