"""Small real models that the tests share. Nothing here reaches the network."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported, and for the processes that tests start: over tensors this small, threads wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from conversion.convert_emu_to_hub import main as convert_emu_to_hub
from modeling_emu import EmuConfig, EmuForMultimodalGeneration


GOLDENS = Path(__file__).parent / "fixtures" / "goldens"

# ids of the tiny vocabulary
BOS, EOS, PAD, START, END, SLOT = 1, 2, 94, 95, 96, 97
NUM_IMAGE_TOKENS = 3
IMAGE_SIZE = 28


def make_config(text_config: dict | None = None, hidden_size: int = 32, **kwargs) -> EmuConfig:
    """A configuration of a few thousand parameters; `text_config` names another language model."""
    text_config = {
        "model_type": "llama",
        "vocab_size": 98,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **(text_config or {}),
    }
    return EmuConfig(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": IMAGE_SIZE,
            "patch_size": 14,
            "initializer_range": 0.1,
        },
        causal_former_config={
            "num_image_tokens": NUM_IMAGE_TOKENS,
            "encoder_hidden_size": 24,
            "projection_size": hidden_size,
            "hidden_size": 20,
            "head_dim": 6,
            "intermediate_size": 28,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_position_buckets": 4,
            "max_position_distance": 6,
            "dropout": 0.0,
            "initializer_range": 0.3,
        },
        text_config=text_config,
        **{"image_token_id": SLOT, "image_start_token_id": START, "image_end_token_id": END, **kwargs},
    )


def make_model(seed: int = 0, **kwargs) -> EmuForMultimodalGeneration:
    """A random model in evaluation mode, with weights large enough that predictions differ."""
    torch.manual_seed(seed)
    model = EmuForMultimodalGeneration(make_config(**kwargs)).eval()
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
        model.lm_head.weight.mul_(6)
        model.regression_head.weight.normal_(std=0.3)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    return model


def image_ids() -> list[int]:
    """The ids of one image."""
    return [START, *[SLOT] * NUM_IMAGE_TOKENS, END]


def make_batch(
    rows: list[list[int]], num_images: int = 0, side: str = "left", seed: int = 1
) -> dict[str, torch.Tensor]:
    """Pad rows of ids on one side, with random pixels for their images."""
    length = max(map(len, rows))
    padded, masks = [], []
    for row in rows:
        padding = [0] * (length - len(row))
        pads = [PAD] * len(padding)
        padded.append(pads + row if side == "left" else row + pads)
        masks.append(padding + [1] * len(row) if side == "left" else [1] * len(row) + padding)
    batch = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)}
    if num_images:
        generator = torch.Generator().manual_seed(seed)
        batch["pixel_values"] = torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return batch


@pytest.fixture(scope="session")
def tiny_model() -> EmuForMultimodalGeneration:
    """A random model that tests do not change."""
    return make_model()


def convert_golden(source: str, folder: Path, *options: str) -> Path:
    """Convert a golden checkpoint with its own sizes, as a user does."""
    name = source.split("/")[0]
    convert_emu_to_hub(
        [
            str(GOLDENS / source),
            f"--model-config={GOLDENS / name / 'Emu.json'}",
            f"--causal-former-config={GOLDENS / name / 'causal_former_t5.json'}",
            f"--llama-config={GOLDENS / name / 'llama_config'}",
            f"--output={folder}",
            *options,
        ]
    )
    return folder


@pytest.fixture(scope="session")
def converted_pretrain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository of golden base Emu with its visual decoder. Not to be changed."""
    return convert_golden("pretrain/pretrain", tmp_path_factory.mktemp("converted") / "pretrain")


@pytest.fixture(scope="session")
def converted_instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository of golden Emu-I, its LoRA merged. Not to be changed."""
    return convert_golden("instruct/Emu-instruct.pt", tmp_path_factory.mktemp("converted") / "instruct")
