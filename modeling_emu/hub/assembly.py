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
"""The publishable folder of a model that lies in one without code: its weights, and all that a repository has besides."""

import json
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..configuration_emu import EmuConfig
from ..processing_emu import EmuProcessor
from .outputs import check_free_space, check_output, whole_folder
from .repository import ADAPTER_FOLDER, PACKAGE, check_repository, write_repository_files


DISTRIBUTION = "modeling-emu"
MODEL_CARD = "README.md"
PIPELINE_INDEX = "model_index.json"
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
ROOT_COMPONENTS = ("multimodal_encoder", "processor")  # of the pipeline: they have no folders of their own


def find_licence() -> Path:
    """The licence of this package's code: beside the package in a checkout, else among what was installed with it.

    Raises:
        FileNotFoundError: if it is in neither place.
    """
    places = [PACKAGE.parent / "LICENSE"]
    try:
        installed = distribution(DISTRIBUTION).files or []
    except PackageNotFoundError:
        installed = []
    places += [Path(str(file.locate())) for file in installed if file.name == "LICENSE"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"LICENSE: got none beside {PACKAGE} or in the installed {DISTRIBUTION}, expected one")
    return found


def list_components(folder: Path) -> list[str]:
    """The subfolders that belong to a model: the components that `model_index.json` names, and an adapter."""
    index_file = folder / PIPELINE_INDEX
    index = json.loads(index_file.read_text(encoding="utf-8")) if index_file.is_file() else {}
    components = [
        name
        for name, entry in index.items()
        if isinstance(entry, list) and name[0] != "_" and name not in ROOT_COMPONENTS and entry[0] is not None
    ]
    return [*components, *([ADAPTER_FOLDER] if (folder / ADAPTER_FOLDER).is_dir() else [])]


def assemble_repository(source: Path, output: Path) -> None:
    """Write the repository of a model, whole or not at all; files that are none of a repository's stay behind.

    Args:
        source: folder with configurations, tokenizer, weights and a model card (README.md); code in it is not read.
        output: new or empty.

    Raises:
        ValueError: if the source lacks something that a repository has, or if `output` is taken.
        OSError: if the disk is full.
    """
    check_output(output)
    if not (source / MODEL_CARD).is_file():
        raise ValueError(f"{MODEL_CARD} in {source}: got none, expected the model card of the repository")
    components = list_components(source)
    if absent := [name for name in components if not (source / name).is_dir()]:
        raise ValueError(f"folders {absent} in {source}: got none, expected them since {PIPELINE_INDEX} names them")
    files = [file for pattern in WEIGHT_FILES for file in sorted(source.glob(pattern))]
    files += [source / name for name in (MODEL_CARD, PIPELINE_INDEX) if (source / name).is_file()]
    trees = [file for name in components for file in (source / name).rglob("*") if file.is_file()]
    config, processor, licence = (
        EmuConfig.from_pretrained(source),
        EmuProcessor.from_pretrained(source),
        find_licence(),
    )
    with whole_folder(output) as folder:
        check_free_space(output, sum(file.stat().st_size for file in (*files, *trees)))
        write_repository_files(folder, config, processor, licence)
        for file in files:
            shutil.copyfile(file, folder / file.name)
        for name in components:
            shutil.copytree(source / name, folder / name, copy_function=shutil.copyfile)
        check_repository(folder)
