"""A converted folder as a Hub repository: one line per class, from a folder and from a Hub, without this package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import convert_golden
from loopback_hub import LoopbackHub
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modeling_emu.hub.repository import AUTO_MAP, check_repository


ROOT = Path(__file__).parents[1]
REPOSITORY = "org/emu"

REFUSE_PACKAGE = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_emu", "conversion"):
            raise ImportError(f"{name} must not be imported here")

sys.meta_path.insert(0, Refuse())
try:
    import modeling_emu
except ImportError:
    pass
else:
    raise SystemExit("this package can be imported")
"""

# One line each, as a user writes it. The value is what the line's result is.
LINES = {
    "AutoConfig.from_pretrained(NAME, trust_remote_code=True)": "EmuConfig",
    "AutoModel.from_pretrained(NAME, trust_remote_code=True)": "EmuForMultimodalGeneration",
    "AutoModelForCausalLM.from_pretrained(NAME, trust_remote_code=True)": "EmuForMultimodalGeneration",
    "AutoModelForImageTextToText.from_pretrained(NAME, trust_remote_code=True)": "EmuForMultimodalGeneration",
    "AutoModelForMultimodalLM.from_pretrained(NAME, trust_remote_code=True)": "EmuForMultimodalGeneration",
    "AutoProcessor.from_pretrained(NAME, trust_remote_code=True)": "EmuProcessor",
    "AutoTokenizer.from_pretrained(NAME, trust_remote_code=True)": "TokenizersBackend",
    "AutoImageProcessor.from_pretrained(NAME, trust_remote_code=True)": "CLIPImageProcessorPil",
    "DiffusionPipeline.from_pretrained(NAME, trust_remote_code=True)": "EmuPipeline",
    "pipeline('image-text-to-text', model=NAME, trust_remote_code=True)": "ImageTextToTextPipeline",
}

RUN_LINES = """
from transformers import *
from diffusers import DiffusionPipeline
from PIL import Image
NAME, LINES = sys.argv[1], json.loads(sys.argv[2])
results = {}
for line in LINES:
    result = eval(line)
    results[line] = type(result).__name__
    if line.startswith("pipeline"):
        outputs = result(images=[Image.new("RGB", (20, 30))], text="<image>There are", max_new_tokens=3)
        assert isinstance(outputs[0]["generated_text"], str), outputs
print(json.dumps(results))
"""

MAKE_OUTPUTS = """
import torch
from transformers import AutoModel, AutoProcessor
from PIL import Image

def make_outputs(model, processor):
    inputs = processor(text="<image>There are two", images=[Image.radial_gradient("L")], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs.logits, outputs.regressed_embeds

def load(name):
    parts = [auto.from_pretrained(name, trust_remote_code=True) for auto in (AutoModel, AutoProcessor)]
    return *parts, make_outputs(*parts)
"""


def run(code: str, *arguments: str, folder: Path, hub: LoopbackHub | None = None, with_package: bool = False) -> str:
    """Run code in a fresh interpreter with empty caches, by default one that cannot import this package."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    environment |= {
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": "token",
        "PYTHONPATH": str(ROOT) if with_package else "",
    }
    environment |= {"HF_ENDPOINT": hub.endpoint} if hub else {"HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code if with_package else REFUSE_PACKAGE + code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def published(converted_pretrain, tmp_path_factory):
    """A Hub with the converted repository, as `publish_repository` uploads it."""
    folder = tmp_path_factory.mktemp("hub")
    with LoopbackHub(folder / "repositories") as hub:
        code = (
            "import sys; from modeling_emu.hub.repository import publish_repository; publish_repository(*sys.argv[1:])"
        )
        run(
            code.replace("*sys.argv[1:]", "__import__('pathlib').Path(sys.argv[1]), sys.argv[2]"),
            str(converted_pretrain),
            REPOSITORY,
            folder=folder,
            hub=hub,
            with_package=True,
        )
        yield hub


@pytest.fixture
def hub(published):
    """The same, its list of requests empty."""
    published.requests.clear()
    return published


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_publishing_uploads_the_folder_as_it_is(converted_pretrain, hub):
    assert files_of(hub.folder / REPOSITORY) == files_of(converted_pretrain)


def test_every_class_loads_from_a_folder(converted_pretrain, tmp_path):
    assert json.loads(run(RUN_LINES, str(converted_pretrain), json.dumps(list(LINES)), folder=tmp_path)) == LINES


def test_every_class_loads_from_a_hub_and_weights_travel_once(hub, tmp_path):
    assert json.loads(run(RUN_LINES, REPOSITORY, json.dumps(list(LINES)), folder=tmp_path, hub=hub)) == LINES
    downloads = [request for request in hub.requests if request.startswith('"GET') and ".safetensors" in request]
    assert len(downloads) == len(set(downloads)) == 4  # Emu, U-Net, VAE, safety checker
    cached = [file for file in (tmp_path / "home").rglob("*") if file.is_file() and not file.is_symlink()]
    weights = [file for file in files_of(hub.folder / REPOSITORY).items() if file[0].endswith(".safetensors")]
    for _, content in weights:
        assert sum(file.stat().st_size == len(content) and file.read_bytes() == content for file in cached) == 1


SAVE_AGAIN = """
for part in load(sys.argv[1])[:2]:
    part.save_pretrained(sys.argv[2])
torch.save(load(sys.argv[1])[2], "outputs.pt")
"""

PUSH = SAVE_AGAIN.replace("save_pretrained", "push_to_hub")

LOAD_AGAIN = """
for got, expected in zip(load(sys.argv[1])[2], torch.load("outputs.pt"), strict=True):
    assert torch.equal(got, expected)
"""

SAVE_PIPELINE = """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.save_pretrained(sys.argv[2])
torch.save(make_outputs(pipe.multimodal_encoder, pipe.processor), "outputs.pt")
"""

PUSH_PIPELINE = SAVE_PIPELINE.replace(
    "pipe.save_pretrained(sys.argv[2])", "pipe.save_pretrained('saved', repo_id=sys.argv[2], push_to_hub=True)"
)


def check_auto_map(folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor["auto_map"]["AutoProcessor"] == "processing_emu.EmuProcessor"


LOAD_ADAPTER = """
import torch
from transformers import AutoModel
NAME, LINE, MERGED = sys.argv[1:]
input_ids = torch.arange(3, 40)[None]
model, merged = (AutoModel.from_pretrained(name, trust_remote_code=True) for name in (NAME, MERGED))
expected = merged(input_ids=input_ids).logits
assert not torch.allclose(model(input_ids=input_ids).logits, expected, atol=1e-2)
exec(LINE)
torch.testing.assert_close(model(input_ids=input_ids).logits, expected, rtol=1e-4, atol=1e-4)
"""


def test_the_cards_line_loads_an_adapter_from_a_hub(converted_instruct, tmp_path):
    folder = convert_golden("instruct/Emu-instruct.pt", tmp_path / "repositories" / "org" / "emu-i", "--lora=adapter")
    [line] = [
        line for line in (folder / "README.md").read_text().splitlines() if line.startswith("model.load_adapter")
    ]
    with LoopbackHub(tmp_path / "repositories") as hub:
        arguments = ["org/emu-i", line.replace("org/emu-instruct", "org/emu-i"), str(converted_instruct)]
        run(LOAD_ADAPTER, *arguments, folder=tmp_path, hub=hub)


def test_saving_and_loading_again_keeps_all_of_it(converted_pretrain, tmp_path):
    again = tmp_path / "again"
    run(MAKE_OUTPUTS + SAVE_AGAIN, str(converted_pretrain), str(again), folder=tmp_path)
    check_auto_map(again)
    run(MAKE_OUTPUTS + LOAD_AGAIN, str(again), folder=tmp_path)
    lines = {line: name for line, name in LINES.items() if "Diffusion" not in line}
    assert json.loads(run(RUN_LINES, str(again), json.dumps(list(lines)), folder=tmp_path)) == lines


def test_pushing_and_loading_again_keeps_all_of_it(hub, tmp_path):
    run(MAKE_OUTPUTS + PUSH, REPOSITORY, "org/again", folder=tmp_path, hub=hub)
    check_auto_map(hub.folder / "org" / "again")
    shutil.rmtree(tmp_path / "home")
    run(MAKE_OUTPUTS + LOAD_AGAIN, "org/again", folder=tmp_path, hub=hub)


def test_a_saved_pipeline_is_a_whole_repository_again(converted_pretrain, tmp_path):
    again = tmp_path / "again"
    run(MAKE_OUTPUTS + SAVE_PIPELINE, str(converted_pretrain), str(again), folder=tmp_path)
    check_auto_map(again)
    run(MAKE_OUTPUTS + LOAD_AGAIN, str(again), folder=tmp_path)
    assert json.loads(run(RUN_LINES, str(again), json.dumps(list(LINES)), folder=tmp_path)) == LINES


def test_a_pushed_pipeline_is_a_whole_repository_again(hub, tmp_path):
    run(MAKE_OUTPUTS + PUSH_PIPELINE, REPOSITORY, "org/pushed", folder=tmp_path, hub=hub)
    check_auto_map(hub.folder / "org" / "pushed")
    shutil.rmtree(tmp_path / "home")
    run(MAKE_OUTPUTS + LOAD_AGAIN, "org/pushed", folder=tmp_path, hub=hub)
    assert json.loads(run(RUN_LINES, "org/pushed", json.dumps(list(LINES)), folder=tmp_path, hub=hub)) == LINES


def test_weights_are_stored_once(converted_pretrain):
    """No tensor is in two files, and no two tensors of the model are the same bytes."""
    seen = set()
    for file in converted_pretrain.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
        assert not names & seen
        seen |= names
    assert not [file for file in converted_pretrain.rglob("*") if file.suffix in (".bin", ".pt")]
    contents = [content for name, content in files_of(converted_pretrain).items() if name.endswith(".safetensors")]
    assert len(set(contents)) == len(contents) == 4


# -- checking a folder ---------------------------------------------------------------------------------------------


@pytest.fixture
def copy(converted_pretrain, tmp_path):
    return Path(shutil.copytree(converted_pretrain, tmp_path / "copy"))


def test_a_converted_folder_is_whole(converted_pretrain, converted_instruct):
    check_repository(converted_pretrain)
    check_repository(converted_instruct)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "model.safetensors",
        "modeling_emu.py",
        "modeling_emu_causal_former.py",
        "processing_emu.py",
        "pipeline_emu.py",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "safety_checker/model.safetensors",
        "feature_extractor/preprocessor_config.json",
    ],
)
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(ValueError, match=Path(name).name.split(".")[0]):
        check_repository(copy)


def test_an_auto_map_without_a_class_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["auto_map"]["AutoModelForCausalLM"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        check_repository(copy)


def test_weights_stored_twice_or_pickled_are_refused(copy):
    shutil.copyfile(copy / "model.safetensors", copy / "model-copy.safetensors")
    (copy / "unet" / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"pickled weights in unet.*model-copy"):
        check_repository(copy)


def test_shards_that_do_not_follow_their_index_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    names = sorted(weights)
    (copy / "model.safetensors").unlink()
    place = {}
    for number, part in enumerate((names[:50], names[50:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, copy / file)
        place |= dict.fromkeys(part, file)
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": place}))
    check_repository(copy)
    save_file({name: weights[name] for name in names[49:]}, copy / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=f"{names[49]} against the index in model-00002"):
        check_repository(copy)
    save_file({name: weights[name] for name in names[51:]}, copy / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=f"{names[50]} not in model-00002"):
        check_repository(copy)
