"""`emu hub assemble`: the folder of a model becomes a repository that both libraries load without this package."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from test_hub import run
from typer.testing import CliRunner

from modeling_emu import EmuConfig
from modeling_emu.cli import app
from modeling_emu.cli.loading import EMU_TINY, load_model
from modeling_emu.hub import assembly
from modeling_emu.hub.assembly import assemble_repository, find_licence
from modeling_emu.hub.repository import check_repository, list_code_files


LOAD_AND_COMPARE = """
import torch
from diffusers import DiffusionPipeline
from transformers import AutoModel, AutoProcessor

folder, expected = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text="a large red circle", return_tensors="pt")
with torch.no_grad():
    logits = [loaded(**inputs).logits for loaded in (model, pipe.multimodal_encoder)]
expected = torch.load(expected, weights_only=True)
assert all(torch.equal(got, expected) for got in logits)
picture = pipe("a large red circle", num_inference_steps=1).images[0]
print(json.dumps([type(model).__name__, type(pipe).__name__, pipe.vae is None, picture.size]))
"""


def assemble(*arguments, exit_code=0):
    result = CliRunner().invoke(app, ["hub", "assemble", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output + repr(result.exception)
    return result


@pytest.fixture
def pixel_model(tmp_path):
    """The packaged model with a U-Net that works on pixels, and so without a VAE."""
    folder = shutil.copytree(EMU_TINY, tmp_path / "pixels")
    shutil.rmtree(folder / "vae", ignore_errors=True)
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=EmuConfig.from_pretrained(folder).text_config.hidden_size,
    ).save_pretrained(folder / "unet")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    return folder


def test_the_packaged_model_becomes_a_repository(tmp_path):
    assert assemble("--output", tmp_path / "emu").stdout == f"{tmp_path / 'emu'}\n"
    check_repository(tmp_path / "emu")
    names = {path.name for path in (tmp_path / "emu").iterdir()}
    assert {"LICENSE", "README.md", "model_index.json", *(path.name for path in list_code_files())} <= names
    for path in EMU_TINY.rglob("*"):
        if path.suffix == ".safetensors" or path.name in ("README.md", "model_index.json"):
            assert (tmp_path / "emu" / path.relative_to(EMU_TINY)).read_bytes() == path.read_bytes()
    assert not list(EMU_TINY.rglob("*.py"))


def test_both_libraries_load_a_repository_without_a_vae(tmp_path, pixel_model):
    assemble("--model", pixel_model, "--output", tmp_path / "emu")
    assert not (tmp_path / "emu" / "vae").exists()
    inputs = assembly.EmuProcessor.from_pretrained(pixel_model)(text="a large red circle", return_tensors="pt")
    with torch.no_grad():
        torch.save(load_model(pixel_model)(**inputs).logits, tmp_path / "expected.pt")
    output = run(LOAD_AND_COMPARE, str(tmp_path / "emu"), str(tmp_path / "expected.pt"), folder=tmp_path)
    assert json.loads(output) == ["EmuForMultimodalGeneration", "EmuPipeline", True, [16, 16]]


def test_only_what_a_repository_has_is_taken(tmp_path, pixel_model):
    (pixel_model / "notes.txt").write_text("mine")
    (pixel_model / "modeling_emu.py").write_text("raise RuntimeError('this code was run')\n")
    (pixel_model / "old").mkdir()
    assemble_repository(pixel_model, tmp_path / "emu")
    assert not {"notes.txt", "old"} & {path.name for path in (tmp_path / "emu").iterdir()}
    assert "this code was run" not in (tmp_path / "emu" / "modeling_emu.py").read_text()


def test_a_model_without_a_decoder_is_a_repository_too(tmp_path, pixel_model):
    (pixel_model / "model_index.json").unlink()
    assemble("-m", pixel_model, "-o", tmp_path / "emu")
    assert not (tmp_path / "emu" / "unet").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "README.md").unlink(), "README.md in"),
        (lambda folder: (folder / "model.safetensors").unlink(), "weight files []"),
        (lambda folder: shutil.rmtree(folder / "unet"), "folders ['unet'] in"),
        (lambda folder: (folder / "unet" / "config.json").unlink(), "no unet/config.json"),
        (lambda folder: (folder / "unet" / "old.bin").touch(), "pickled weights in unet/old.bin"),
        (lambda folder: (folder / "config.json").unlink(), "expected a folder with the config.json of an Emu"),
    ],
)
def test_a_model_that_lacks_something_gives_nothing(tmp_path, pixel_model, change, message):
    change(pixel_model)
    error = assemble("--model", pixel_model, "--output", tmp_path / "emu", exit_code=2).stderr.splitlines()[-1]
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["pixels"]


def test_an_output_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / "emu").mkdir()
    (tmp_path / "emu" / "notes.txt").write_text("mine")
    assert "not empty" in assemble("--output", tmp_path / "emu", exit_code=2).stderr
    assert [path.name for path in (tmp_path / "emu").iterdir()] == ["notes.txt"]
    assert "expected an existing folder" in assemble("-m", "no/model", "-o", tmp_path / "new", exit_code=2).stderr


def test_the_licence_is_found_in_an_installed_package_too(tmp_path, monkeypatch):
    """Where no checkout is around the package, its licence is among the files of its distribution."""
    information = tmp_path / "site" / "modeling_emu-0.0.0.dist-info"
    (information / "licenses").mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.4\nName: modeling-emu\nVersion: 0.0.0\n")
    (information / "RECORD").write_text("modeling_emu-0.0.0.dist-info/licenses/LICENSE,,\n")
    (information / "licenses" / "LICENSE").write_text("terms")
    monkeypatch.setattr(assembly, "PACKAGE", tmp_path / "site" / "modeling_emu")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert find_licence().read_text() == "terms"
    (information / "licenses" / "LICENSE").unlink()
    with pytest.raises(FileNotFoundError, match="LICENSE: got none"):
        find_licence()


def test_the_licence_of_a_checkout_is_its_own():
    assert find_licence() == Path(__file__).parents[1] / "LICENSE"
