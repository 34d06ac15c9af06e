"""Two processes that share one model give what one process gives."""

import torch
from conftest import BOS, image_ids, make_batch, make_model
from python_processes import TESTS, TWO_PROCESSES, run_python
from torch.testing import assert_close


def test_two_processes_equal_one(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    batch = make_batch([[BOS, *image_ids(), 5, 6], [BOS, 7]], num_images=1)
    torch.save(batch, tmp_path / "inputs.pt")
    script = TESTS / "tensor_parallel_run.py"
    arguments = [str(tmp_path / "model"), str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
    process = run_python(*TWO_PROCESSES, str(script), *arguments)
    assert process.returncode == 0, process.stderr
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    assert any(name.endswith("self_attn.q_proj.weight") for name in outputs["sharded"])
    assert {"lm_head.weight", "regression_head.weight"} <= set(outputs["sharded"])
    # sums over two halves of a layer, in another order
    assert_close(
        outputs["image_embeds"], model.generate(**batch, generation_mode="image").image_embeds, atol=1e-4, rtol=1e-4
    )
    assert outputs["ids"].tolist() == model.generate(**batch, max_new_tokens=6).tolist()
