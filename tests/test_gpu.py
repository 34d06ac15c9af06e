"""What only an accelerator can show. Run with `pytest -m gpu`."""

import pytest
import torch
from conftest import BOS, NUM_IMAGE_TOKENS, START, image_ids, make_batch, make_model
from torch.testing import assert_close

from modeling_emu import generation_emu


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS = [[BOS, 5, 6, 7, 8], [BOS, *image_ids(), 9, 10], [BOS, 11, START]]
START_BIAS = {"sequence_bias": {(START,): 6.0}}


def to_cuda(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in batch.items()}


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_cuda_equals_cpu(mode, cache):
    batch = make_batch(ROWS, num_images=1)
    options = {} if mode == "image" else {"max_new_tokens": 17, **START_BIAS}
    expected = make_model().generate(**batch, generation_mode=mode, **options)
    torch.compiler.reset()
    got = make_model().cuda().generate(**to_cuda(batch), generation_mode=mode, cache_implementation=cache, **options)
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert got.image_rows.tolist() == expected.image_rows.tolist()
    assert_close(got.image_embeds.cpu(), expected.image_embeds, atol=1e-3, rtol=1e-3)


def test_image_steps_wait_for_nothing(monkeypatch):
    model = make_model().cuda()
    batch = to_cuda(make_batch(ROWS[:2], num_images=1))
    model.generate(**batch, generation_mode="image")  # library handles are made on first use
    step, num_steps = generation_emu.regress_next, 0

    def strict_step(*args, **inputs):
        nonlocal num_steps
        num_steps += 1
        torch.cuda.set_sync_debug_mode("error")
        return step(*args, **inputs)

    monkeypatch.setattr(generation_emu, "regress_next", strict_step)
    try:
        model.generate(**batch, generation_mode="image")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert num_steps == NUM_IMAGE_TOKENS - 1


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_attention_implementations_agree_in_bfloat16(implementation):
    batch = to_cuda(make_batch(ROWS[:2], num_images=1))
    expected = make_model().cuda().generate(**batch, generation_mode="image").image_embeds
    model = make_model().to("cuda", torch.bfloat16)
    model.set_attn_implementation(implementation)
    got = model.generate(**batch, generation_mode="image").image_embeds
    assert (got.float() - expected).norm() < 0.1 * expected.norm()
