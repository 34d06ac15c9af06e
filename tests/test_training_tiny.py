"""The recipes of the small model, end to end: a thousandth of the steps."""

import json

import pytest
import torch
from python_processes import TIME_LIMIT, run_python

from modeling_emu.cli.loading import load_pipeline
from modeling_emu.hub.repository import list_code_files
from modeling_emu.pipeline_emu import EmuPipeline
from modeling_emu.training import tiny
from modeling_emu.training.tiny import STAGES, divide_batch, launch, make_settings, train_tiny


SCALE = 0.001


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("tiny")
    return train_tiny(output, seed=1, scale=SCALE)


def test_every_stage_leads_to_a_repository_without_code(trained):
    pipeline = load_pipeline(trained)
    assert isinstance(pipeline, EmuPipeline)
    assert pipeline.vae is None
    assert pipeline.multimodal_encoder.config.variant == "tiny"
    assert pipeline.multimodal_encoder.config.regression_loss_weight == 1
    assert "[ASSISTANT]" in pipeline.processor.chat_template
    assert not [file for file in list_code_files() if (trained / file.name).exists()]
    size = sum(file.stat().st_size for file in trained.rglob("*") if file.is_file())
    assert size < 40e6
    image = pipeline("a large red circle in the middle.", num_inference_steps=2).images[0]
    assert image.size == (32, 32)


def test_what_is_done_is_not_run_again(trained, monkeypatch):
    monkeypatch.setattr(tiny, "parse_as", None)  # no recipe is read for a run
    weights = (trained / "model.safetensors").read_bytes()
    assert train_tiny(trained.parent, seed=1, scale=SCALE) == trained
    assert (trained / "model.safetensors").read_bytes() == weights


def test_a_stopped_stage_goes_on_from_its_checkpoint(trained, tmp_path):
    """The stage after the one that stands is run anew, from the same start: the same weights."""
    weights = (trained / "model.safetensors").read_bytes()
    output = trained.parent
    (output / "instruct" / tiny.DONE_MARK).unlink()
    (output / "decoder" / tiny.DONE_MARK).unlink()
    trained.rename(tmp_path / "first")
    train_tiny(output, seed=1, scale=SCALE)
    assert (trained / "model.safetensors").read_bytes() == weights


def test_two_processes_share_every_batch(trained, tmp_path):
    """The same data and the same start; then each process learns from half of a batch."""
    output = tmp_path / "run"
    options = ["train", "tiny", "--output", str(output), "--seed", "1", "--scale", str(SCALE), "--processes", "2"]
    process = run_python("-c", "from modeling_emu.cli import main; main()", *options, time_limit=3 * TIME_LIMIT)
    assert process.returncode == 0, process.stderr[-4000:]
    for name in ("data/caption/00000.tar", "untrained/model.safetensors"):
        assert (output / name).read_bytes() == (trained.parent / name).read_bytes()
    [state] = (output / "pretrain").glob("checkpoint-*/trainer_state.json")
    assert json.loads(state.read_text())["train_batch_size"] == 4
    assert len(list(output.glob("*/stage_complete"))) == len(STAGES)
    pipeline = load_pipeline(output / "emu_tiny")
    assert pipeline("a large red circle in the middle.", num_inference_steps=2).images[0].size == (32, 32)


def test_processes_that_cannot_share_a_batch_are_refused(tmp_path):
    assert divide_batch("tiny-vision", ["seed=1"], 2) == ["seed=1", "per_device_train_batch_size=4"]
    with pytest.raises(
        ValueError, match="processes: got 3, expected a divisor of 8, the batch of tiny-vision-captions"
    ):
        train_tiny(tmp_path / "run", num_processes=3)
    assert not (tmp_path / "run").exists()


def test_processes_that_fail_end_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="2 processes of tiny-vision: got exit status 1, expected 0"):
        launch("tiny-vision", ["model=nowhere"], 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what the CPU can do")
@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"amx_bf16": True}, "bf16=true"), ({"bf16": True}, "bf16=true"), ({"avx512_bf16": False}, "bf16=false")],
)
def test_the_u_net_is_computed_in_bfloat16_by_a_cpu_that_has_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert [make_settings(run) for _, run, _ in STAGES] == 4 * [["use_cpu=true"]] + 2 * [["use_cpu=true", expected]]


def test_a_run_of_another_seed_is_refused(trained):
    assert json.loads((trained.parent / "run.json").read_text()) == {"seed": 1, "scale": SCALE}
    with pytest.raises(ValueError, match=r"run: got .*'seed': 2"):
        train_tiny(trained.parent, seed=2, scale=SCALE)


def test_a_share_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="scale: got 0, expected more than 0"):
        train_tiny(tmp_path, scale=0)
