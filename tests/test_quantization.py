"""Which modules quantisers touch, by name."""

import re

import pytest
import torch
from conftest import BOS, NUM_IMAGE_TOKENS, image_ids, make_batch, make_model
from transformers import BitsAndBytesConfig, TorchAoConfig

from modeling_emu import EmuForMultimodalGeneration


# Every linear layer of the language model, and nothing else.
EXPECTED = re.compile(r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(hidden_size=64).save_pretrained(path)  # 4-bit blocks hold 64 weights
    return path


def make_quantization_config(kind: str):
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return BitsAndBytesConfig(
        load_in_4bit=kind == "4bit", load_in_8bit=kind == "8bit", bnb_4bit_compute_dtype="float32"
    )


def is_quantized(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt") or "torchao" in type(weight).__module__


@pytest.mark.parametrize("kind", ["4bit", "8bit", "torchao"])
def test_only_the_language_model_is_quantized(folder, kind):
    config = make_quantization_config(kind)
    before = config.to_dict()
    model = EmuForMultimodalGeneration.from_pretrained(folder, quantization_config=config, device_map="cpu")
    quantized = {name for name, module in model.named_modules() if is_quantized(module)}
    linear = {name for name, module in make_model().named_modules() if isinstance(module, torch.nn.Linear)}
    assert quantized == {name for name in linear if EXPECTED.fullmatch(name)}
    assert len(quantized) == 14
    assert config.to_dict() == before, "the caller's config must stay as it was"
    batch = make_batch([[BOS, *image_ids(), 5]], num_images=1)
    embeds = model.generate(**batch, generation_mode="image").image_embeds
    assert embeds.shape == (1, NUM_IMAGE_TOKENS, 64)
    assert embeds.isfinite().all()


def test_a_dictionary_is_read_as_a_config(folder):
    config = {"load_in_8bit": True, "quant_method": "bitsandbytes"}
    model = EmuForMultimodalGeneration.from_pretrained(folder, quantization_config=config, device_map="cpu")
    quantized = {name for name, module in model.named_modules() if is_quantized(module)}
    assert quantized
    assert all(EXPECTED.fullmatch(name) for name in quantized)


def test_modules_that_the_caller_names_are_left_as_named(folder):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["model.language_model", "lm_head"])
    model = EmuForMultimodalGeneration.from_pretrained(folder, quantization_config=config, device_map="cpu")
    quantized = {name for name, module in model.named_modules() if is_quantized(module)}
    parts = {name.removeprefix("model.").split(".")[0] for name in quantized}
    assert parts == {"vision_model", "causal_former", "regression_head"}
