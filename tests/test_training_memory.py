"""What a training is said to need, against the tensors of real steps; refusing one that cannot fit; files of launchers."""

import pytest
import torch
from training_run import make_arguments
from transformers import TrainerCallback

from modeling_emu import EmuConfig, EmuForMultimodalGeneration
from modeling_emu.training.activations import Batch, compute_activations, get_precision
from modeling_emu.training.instruct import add_lora
from modeling_emu.training.memory import (
    Layout,
    build_empty_model,
    compute_copies,
    compute_states,
)
from modeling_emu.training.parts import freeze_parts
from modeling_emu.training.recipes import DataArguments, InstructArguments, PretrainArguments
from modeling_emu.training.trainer import EmuTrainer


IMAGE, START, END, PAD = 501, 502, 503, 500
NUM_IMAGE_TOKENS = 8
SOURCES = [{"kind": "image_text", "files": "pairs/*.tar"}]
FACTOR = 1.25  # between the estimate of activations and what autograd keeps


def make_config(**text_config) -> EmuConfig:
    """Small networks in which no term of the formulas is lost."""
    return EmuConfig(
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 400,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
        causal_former_config={
            "num_image_tokens": NUM_IMAGE_TOKENS,
            "encoder_hidden_size": 96,
            "projection_size": 128,
            "hidden_size": 48,
            "head_dim": 12,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "pad_token_id": PAD,
            **text_config,
        },
        image_token_id=IMAGE,
        image_start_token_id=START,
        image_end_token_id=END,
    )


def make_data_arguments(lora: bool = False, **kwargs) -> DataArguments:
    return (InstructArguments if lora else PretrainArguments)(**{"model": "x", "sources": SOURCES, **kwargs})


def make_real_model(arguments: DataArguments, config: EmuConfig | None = None, frozen: tuple[str, ...] = ()):
    """The model with numbers that `build_empty_model` describes."""
    model = EmuForMultimodalGeneration(config or make_config())
    model = model.to(getattr(torch, arguments.dtype)).train()
    freeze_parts(model, frozen)
    if isinstance(arguments, InstructArguments):
        return add_lora(model, arguments.lora_r, arguments.lora_alpha, arguments.lora_dropout)
    return model


def make_rows(num_rows: int = 3) -> dict[str, torch.Tensor]:
    """Rows of two images and text."""
    image = [START, *[IMAGE] * NUM_IMAGE_TOKENS, END]
    ids = torch.tensor([[1, *image, *image, *range(5, 85)]] * num_rows)
    pixels = torch.randn(2 * num_rows, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": ids}


def count_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


EXACT_CASES = {
    "all": {},
    "bfloat16": {"dtype": "bfloat16"},
    "frozen": {"freeze": ["vision", "language_model"]},
    "lora": {"lora": True},
    "lora in bfloat16": {"lora": True, "dtype": "bfloat16"},
    "sgd": {"optim": "sgd"},
    "grouped heads": {"num_key_value_heads": 2},
}


@pytest.mark.parametrize("case", EXACT_CASES.values(), ids=EXACT_CASES)
def test_exact_parts_are_the_bytes_of_a_real_step(tmp_path, case):
    case = {"optim": "adamw_torch", "freeze": [], "dtype": "float32", "lora": False, **case}
    training = make_arguments(str(tmp_path), max_steps=1, optim=case["optim"], freeze=case["freeze"])
    arguments = make_data_arguments(case["lora"], dtype=case["dtype"])
    config = make_config(**({"num_key_value_heads": 2} if "num_key_value_heads" in case else {}))
    config.variant = "instruct"  # with its tokens
    model = make_real_model(arguments, config)

    found = {}

    class Look(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            found["gradients"] = count_bytes(p.grad for p in model.parameters() if p.grad is not None)

    batch = make_rows(1)
    trainer = EmuTrainer(
        model=model, args=training, train_dataset=[0], data_collator=lambda _: batch, callbacks=[Look()]
    )
    trainer.train()
    states = trainer.optimizer.optimizer.state.values()
    optimizer = count_bytes(
        value for state in states for name, value in state.items() if name != "step" and value is not None
    )
    empty = build_empty_model(config, arguments, training)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    weights = count_bytes(model.parameters())
    assert compute_states(empty, arguments, training, Layout()) == (weights, found["gradients"], optimizer)


def get_saved_bytes(model, batch: dict[str, torch.Tensor], autocast: bool) -> int:
    """What autograd keeps of a forward pass without its heads, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that no address comes twice
        return tensor

    inner = (model.get_base_model() if hasattr(model, "get_base_model") else model).model
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    inputs["pixel_values"] = inputs["pixel_values"].to(inner.dtype)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        inner(**inputs, use_cache=False)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [("float32", False), ("float32", True), ("bfloat16", True)], ids=["fp32", "mixed", "bf16"]
)
def test_activations_are_estimated_within_a_factor(tmp_path, lora, dtype, autocast):
    arguments = make_data_arguments(lora, dtype=dtype, **({"lora_dropout": 0.0} if lora else {}))
    training = make_arguments(str(tmp_path), bf16=autocast)
    model = make_real_model(arguments)
    batch = make_rows()
    saved = get_saved_bytes(model, batch, autocast)
    precision = get_precision(model, training, is_sharded=False)
    estimate = compute_activations(model, arguments, training, precision, Batch("", 3, batch["input_ids"].shape[1], 6))
    estimate += compute_copies(model, training, Layout(), 0)
    assert saved / FACTOR < estimate < saved * FACTOR
