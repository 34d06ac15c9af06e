"""The published numbers, through a converted repository, in an interpreter that cannot import this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDENS


# Names by prefix, with the largest difference allowed; losses are relative. True stands for equal ids.
BOUNDS = {
    "pixel_values": 1e-6,
    "vision_features": 2e-5,
    "visual_embeds": 2e-5,
    "logits": 2e-5,
    "hidden": 2e-5,
    "regressed": 2e-5,
    "image_embeds": 2e-5,
    "text_loss": 1e-5,
    "regression_loss": 1e-5,
    "pipe": 1e-4,
}


@pytest.mark.parametrize("name", ["pretrain", "instruct"])
def test_converted_repository_gives_the_published_numbers(name, request, tmp_path):
    repository = request.getfixturevalue(f"converted_{name}")
    script = Path(__file__).with_name("golden_run.py")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    process = subprocess.run(
        [sys.executable, str(script), str(repository), str(GOLDENS / name)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    golden = json.loads((GOLDENS / name / "golden.json").read_text())
    expected_names = {f"tokenization.{i}" for i in range(len(golden["tokenization"]))}
    expected_names |= {f"generate.{i}" for i in range(len(golden["generate"]))} | {"generate_batch", "rank"}
    expected_names |= set(BOUNDS) - {"image_embeds", "pipe", "text_loss", "regression_loss"}
    if "loss" in golden:
        expected_names |= {"text_loss", "regression_loss", "num_text_targets", "num_regression_targets"}
        expected_names |= {f"image_embeds.{i}" for i in range(len(golden["generate_image"]))}
        kinds = ("final_latents", "image", "nsfw")
        expected_names |= {f"pipe.{i}.{kind}" for i in range(len(golden["pipeline"])) for kind in kinds}
    assert results.keys() == expected_names
    wrong = {}
    for result_name, value in results.items():
        bound = BOUNDS.get(result_name, BOUNDS.get(result_name.split(".")[0]))
        if value is not True and not (isinstance(value, float) and bound is not None and value <= bound):
            wrong[result_name] = value
    assert wrong == {}
