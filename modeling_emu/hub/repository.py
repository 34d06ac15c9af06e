# Copyright 2026 The Emu Hub-native developers. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What an Emu repository consists of: writing everything but the weights, checking a folder, publishing it.

A repository serves transformers (`AutoModel` at the root) and diffusers (`model_index.json`), holds its own code as
flat files, and each weight once.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

from huggingface_hub import HfApi
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedConfig, ProcessorMixin
from transformers.dynamic_module_utils import get_relative_imports


PACKAGE = Path(__file__).parents[1]
REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
ADAPTER_FOLDER = "adapter"
AUTO_MAP = {
    "AutoConfig": "configuration_emu.EmuConfig",
    **dict.fromkeys(
        ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
        "modeling_emu.EmuForMultimodalGeneration",
    ),
}


def list_code_files() -> list[Path]:
    """The files of this package that travel with the weights."""
    return sorted(PACKAGE.glob("*_emu*.py"))


def write_repository_files(folder: Path, config: PreTrainedConfig, processor: ProcessorMixin, licence: Path) -> None:
    """Write what stands beside the weights of the language model: configurations, tokenizer, code and its licence.

    Args:
        folder: of the repository.
        config: an `EmuConfig` whose `dtype` is that of the weights. Its `auto_map` and `architectures` are set.
        processor: an `EmuProcessor`.
        licence: that of the code, which becomes LICENSE.
    """
    config.auto_map = dict(AUTO_MAP)
    config.architectures = [AUTO_MAP["AutoModel"].partition(".")[2]]
    config.save_pretrained(folder)
    text_config = config.get_text_config()
    GenerationConfig(
        bos_token_id=text_config.bos_token_id,
        eos_token_id=text_config.eos_token_id,
        pad_token_id=text_config.pad_token_id,
    ).save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in list_code_files():
        shutil.copyfile(file, folder / file.name)
    shutil.copyfile(licence, folder / "LICENSE")


def check_repository(folder: Path) -> None:
    """Refuse a folder that is not a whole Emu repository.

    Raises:
        ValueError: lists every problem: files that are missing, code whose imports are not in the folder, weights that
            are missing, stored twice or pickled.
    """
    problems = [f"no {name}" for name in REQUIRED_FILES if not (folder / name).is_file()]
    problems += [
        f"pickled weights in {file.relative_to(folder)}" for file in folder.rglob("*") if file.suffix in PICKLES
    ]
    problems += find_code_problems(folder)
    problems += find_weight_problems(folder, "model")
    if (folder / "model_index.json").is_file():
        problems += find_decoder_problems(folder)
    if problems:
        raise ValueError(f"repository {folder}: got {'; '.join(problems)}, expected a whole Emu repository")


def find_code_problems(folder: Path) -> list[str]:
    """Classes that a configuration names, or files that code imports, and that the folder does not have."""
    problems = []
    references = set(AUTO_MAP.values())
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map", {})
            references |= {str(reference) for reference in found.values()}
            if name == "config.json" and (absent := AUTO_MAP.keys() - found.keys()):
                problems.append(f"no {', '.join(sorted(absent))} in the auto_map of config.json")
    files = {f"{reference.split('--')[-1].partition('.')[0]}.py" for reference in references}
    files |= {file.name for file in folder.glob("*.py")}
    if (folder / "model_index.json").is_file():
        files.add("pipeline_emu.py")
    for name in sorted(files):
        if not (folder / name).is_file():
            problems.append(f"no {name}")
            continue
        imported = {f"{module}.py" for module in get_relative_imports(folder / name)}
        problems += [
            f"no {other}, which {name} imports" for other in sorted(imported) if not (folder / other).is_file()
        ]
    return problems


def find_weight_problems(folder: Path, stem: str) -> list[str]:
    """Weights that are missing, in two files, or in a file that the index does not name.

    Args:
        folder: of the repository or of one component.
        stem: what the weight files begin with: "model" or "diffusion_pytorch_model".
    """
    files = sorted(folder.glob("*.safetensors"))
    index_file = folder / f"{stem}.safetensors.index.json"
    if not index_file.is_file():
        names = [file.name for file in files]
        wanted = [f"{stem}.safetensors"]
        return [] if names == wanted else [f"weight files {names} in {folder.name}, not {wanted}"]
    place: dict[str, str] = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
    places: Counter[tuple[str, str]] = Counter((name, file) for name, file in place.items())
    for file in files:
        with safe_open(file, framework="pt") as opened:
            places.subtract((name, file.name) for name in opened.keys())  # noqa: SIM118
    return [
        f"{name} {'not in' if count > 0 else 'against the index in'} {file}"
        for (name, file), count in places.items()
        if count
    ]


def find_decoder_problems(folder: Path) -> list[str]:
    """Components of `model_index.json` that lack their configuration or their weights."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    problems = []
    for name, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("safety_checker", "model"),
    ):
        if index.get(name, [None])[0] is not None:
            problems += [] if (folder / name / "config.json").is_file() else [f"no {name}/config.json"]
            problems += find_weight_problems(folder / name, stem)
    for name, file in (("scheduler", "scheduler_config.json"), ("feature_extractor", "preprocessor_config.json")):
        if index.get(name, [None])[0] is not None and not (folder / name / file).is_file():
            problems.append(f"no {name}/{file}")
    return problems


def publish_repository(folder: Path, repository: str, *, private: bool = False) -> str:
    """Check a folder and upload it as one commit.

    Args:
        folder: a whole repository.
        repository: its id, "organisation/name"; made where it does not exist.
        private: whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        ValueError: if the folder is not a whole repository; nothing is uploaded then.
    """
    check_repository(folder)
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    return api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Publish Emu").commit_url
