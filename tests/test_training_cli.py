"""`emu train` as a user calls it: in one process, under torchrun, and with a recipe that is wrong."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from python_processes import run_python
from safetensors.torch import load_file
from test_training_recipes import make_settings, write_instructions, write_pairs
from test_training_samples import read_events, read_pictures, read_texts
from typer.testing import CliRunner

from modeling_emu.cli import app


ROOT = Path(__file__).parents[1]


def make_options(settings: list[str]) -> list[str]:
    return [option for setting in settings for option in ("--set", setting)]


def test_pretrain_from_the_command_line_resumes(tmp_path):
    settings = make_settings(tmp_path, write_pairs(tmp_path / "pairs"), "image_text", "save_strategy=steps")
    options = make_options([*settings, "save_steps=2"])
    result = CliRunner().invoke(app, ["train", "pretrain", "--recipe", "pretrain-cpu", *options])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(tmp_path / "out" / "final")
    whole = load_file(tmp_path / "out" / "final" / "model.safetensors")
    (tmp_path / "out" / "checkpoint-3" / "checkpoint_complete").unlink()  # as if killed while it was written
    options += make_options(["resume_from_checkpoint=true"])
    result = CliRunner().invoke(app, ["train", "pretrain", "--recipe", "pretrain-cpu", *options])
    assert result.exit_code == 0, result.output
    resumed = load_file(tmp_path / "out" / "final" / "model.safetensors")
    assert all(resumed[name].equal(tensor) for name, tensor in whole.items())


def test_a_packed_mixture_killed_at_any_moment_ends_as_if_it_had_not_been(tmp_path):
    """`emu train` itself, with dropout; what the kill falls into, a step or a checkpoint, is left to chance."""
    files = write_pairs(tmp_path / "pairs")
    sources = ", ".join(
        f"{{kind: image_text, name: {name}, files: '{files}', weight: {w}}}" for name, w in (("a", 1), ("b", 2))
    )
    weights = {}
    for name in ("whole", "killed"):
        settings = make_settings(tmp_path / name, files, "image_text", "max_steps=8", f"sources=[{sources}]")
        options = ["train", "pretrain", "--recipe", "pretrain-cpu"]
        options += make_options([*settings, "save_strategy=steps", "save_steps=1", "save_total_limit=8"])
        folder = tmp_path / name / "out"
        if name == "killed":
            process = subprocess.Popen(
                [sys.executable, "-c", "from modeling_emu.cli import main; main()", *options],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            while not (folder / "checkpoint-3" / "checkpoint_complete").exists():
                assert process.poll() is None, "the run ended before it was killed"
                time.sleep(0.01)
            process.kill()
            assert process.wait() == -signal.SIGKILL
            assert not (folder / "final").exists()
            options += make_options(["resume_from_checkpoint=true"])
        result = CliRunner().invoke(app, options)
        assert result.exit_code == 0, result.output
        weights[name] = load_file(folder / "final" / "model.safetensors")
    assert all(weights["killed"][name].equal(tensor) for name, tensor in weights["whole"].items())


def run_two_processes(launcher: list[str], *arguments: str) -> str:
    """Start `emu train` by a launcher; gives what it printed."""
    code = "from modeling_emu.cli import main; main()"
    process = run_python("-m", *launcher, sys.executable, "-c", code, "train", *arguments)
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


def test_two_processes_by_torchrun(tmp_path):
    files = write_pairs(tmp_path / "pairs")
    settings = make_settings(tmp_path, files, "image_text", "packing=false", "eval_strategy=steps", "eval_steps=3")
    rows = Path(files).read_text().splitlines()
    held_out = Path(files).with_name("held_out.jsonl")
    held_out.write_text("\n".join([*rows, rows[0]]))
    settings += [f"eval_sources=[{{kind: image_text, files: '{held_out}'}}]", "per_device_eval_batch_size=1"]
    settings += ["sample_prompts=[a red square]"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    output = run_two_processes(launcher, "pretrain", "--recipe", "pretrain-cpu", *make_options(settings))
    # two ranks of two documents each, with 5 regression targets per image
    assert "'num_regression_targets': 20" in output
    assert "'eval_num_regression_targets': 15" in output  # each of three documents once, on one of the ranks
    assert output.splitlines().count(str(tmp_path / "out" / "final")) == 1
    events = read_events(tmp_path)  # one file: one of the ranks reports
    assert [step for step, _ in read_texts(events, 0)] == [3]
    assert len(read_pictures(events, 0)) == 1


def test_two_processes_by_accelerate(tmp_path):
    settings = make_settings(tmp_path, write_instructions(tmp_path / "data"), "instruction", "packing=false")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # accelerate's own launcher for several CPU processes is MPI; this one starts them as on GPUs, use_cpu stays
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--no_python"]
    launcher += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"]
    output = run_two_processes(launcher, "instruct", "--recipe", "instruct-cpu", *make_options(settings))
    folder = tmp_path / "out" / "final"
    assert output.splitlines().count(str(folder)) == 1
    adapter = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)


def test_a_wrong_recipe_is_one_line():
    result = CliRunner().invoke(app, ["train", "instruct", "--recipe", "emu-i", "--set", "learnig_rate=1"])
    assert result.exit_code == 2
    assert "the nearest is 'learning_rate'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_help_loads_no_library():
    code = "import sys; import modeling_emu.cli; print([m for m in ('torch', 'transformers', 'yaml') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
