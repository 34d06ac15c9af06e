"""Runs of the decoder's trainer that are killed and resumed, and one that two processes share."""

import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from python_processes import TESTS, TWO_PROCESSES, run_python
from training_decoder_run import (
    assert_same_gradients,
    load_emu,
    make_arguments,
    make_killable_trainer,
    make_pipeline,
    make_stream,
    make_trainer,
    train_plainly,
    write_pictures,
    write_shards,
)

from modeling_emu.training.checkpoints import get_last_complete_checkpoint
from modeling_emu.training.decoder import EmuDecoderTrainer
from modeling_emu.training.decoder_data import DecoderEncoder, LiveDecoderData


SCRIPT = str(TESTS / "training_decoder_run.py")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Earlier tests of the process may have asked for other precisions."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def emu():
    """The small model and its processor. Not to be changed."""
    return load_emu()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    """Metadata file of four pictures with captions."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "pairs")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, emu, pictures) -> Path:
    """Pixels and the encoder's embeddings. Not to be changed."""
    return write_shards(tmp_path_factory.mktemp("shards") / "all", make_pipeline(emu), "encoder", pictures, emu)


def test_two_processes_are_one(tmp_path, shards):
    process = run_python(*TWO_PROCESSES, SCRIPT, "together", str(shards), str(tmp_path / "gradients"))
    assert process.returncode == 0, process.stderr[-4000:]
    whole = train_plainly(shards, batch_size=4, accumulation=1)
    for rank in range(2):
        assert_same_gradients(torch.load(tmp_path / f"gradients.{rank}"), whole)


def get_weights(trainer: EmuDecoderTrainer) -> dict[str, torch.Tensor]:
    averaged = dict(enumerate(trainer.ema.shadow_params))
    return trainer.plain_unet.state_dict() | {f"average {number}": value for number, value in averaged.items()}


@pytest.mark.parametrize(("when", "step"), [("after_step", 5), ("while_saving", 4)])
def test_a_killed_run_goes_on_to_the_weights_of_one_that_was_not(tmp_path, shards, when, step):
    whole = make_killable_trainer(shards, tmp_path / "whole")
    whole.train()
    output_dir = tmp_path / "killed"
    process = run_python(SCRIPT, "killed", str(shards), str(output_dir), when, str(step))
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    last = get_last_complete_checkpoint(output_dir)
    assert last.name == ("checkpoint-4" if when == "after_step" else "checkpoint-2")
    resumed = make_killable_trainer(shards, output_dir)
    resumed.train(resume_from_checkpoint=True)
    expected = get_weights(whole)
    got = get_weights(resumed)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    first = last.name == "checkpoint-4"
    assert [logs["loss"] for logs in resumed.log_history] == [
        logs["loss"] for logs in whole.log_history[4 if first else 2 :]
    ]


def test_documents_are_resumed_too(tmp_path, emu, pictures):
    def make(output_dir: Path, max_steps: int) -> EmuDecoderTrainer:
        pipeline = make_pipeline(emu)
        data = LiveDecoderData(DecoderEncoder(pipeline, "encoder"), make_stream(pictures, emu, repeat=True))
        args = make_arguments(output_dir, max_steps=max_steps, save_steps=2, per_device_train_batch_size=3)
        return EmuDecoderTrainer(pipeline.unet, pipeline.scheduler, data, args)

    whole = make(tmp_path / "whole", 4)
    whole.train()
    make(tmp_path / "parts", 2).train()
    resumed = make(tmp_path / "parts", 4)
    resumed.train(resume_from_checkpoint=True)
    expected, got = get_weights(whole), get_weights(resumed)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_checkpoints_are_kept_in_number_and_resumed_only_when_complete(tmp_path, shards):
    trainer = make_trainer(shards, tmp_path, save_steps=1, save_total_limit=2, max_steps=3)
    trainer.train()
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    (tmp_path / "checkpoint-3" / "checkpoint_complete").unlink()
    assert get_last_complete_checkpoint(tmp_path).name == "checkpoint-2"
    with pytest.raises(ValueError, match="expected one that was written to its end"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match="got no complete one"):
        make_trainer(shards, tmp_path / "none").train(resume_from_checkpoint=True)
