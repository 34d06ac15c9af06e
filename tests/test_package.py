"""The package as a whole: it is cheap to import, and each class comes with the first use of its name."""

import importlib
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

import modeling_emu


ROOT = Path(__file__).parents[1]
SECONDS_TO_IMPORT = 0.3
HEAVY_LIBRARIES = ("torch", "transformers", "diffusers", "numpy", "PIL")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_loads_no_heavy_library():
    code = f"import sys, modeling_emu; print([name for name in {HEAVY_LIBRARIES} if name in sys.modules])"
    assert run_python(code) == "[]"


def test_import_is_quick():
    """The best of several runs of a whole interpreter: other work on the machine only ever adds time."""
    durations_s = []
    for _ in range(5):
        start = time.perf_counter()
        run_python("import modeling_emu")
        durations_s.append(time.perf_counter() - start)
    assert min(durations_s) < SECONDS_TO_IMPORT


@pytest.mark.parametrize("name", modeling_emu.__all__)
def test_public_names_resolve_to_the_classes_of_their_modules(name):
    resolved = getattr(modeling_emu, name)
    assert isinstance(resolved, type)
    assert resolved.__name__ == name
    assert getattr(importlib.import_module(resolved.__module__), name) is resolved
    assert name in dir(modeling_emu)


def test_config_alone_brings_no_diffusers():
    code = "import sys; from modeling_emu import EmuConfig; EmuConfig(); print('diffusers' in sys.modules)"
    assert run_python(code) == "False"


def test_training_without_its_extra_says_what_to_install():
    code = """
import sys
sys.modules["datasets"] = None  # as if it were not installed
import modeling_emu
try:
    modeling_emu.EmuDataCollator
except ImportError as error:
    print(error)
"""
    expected = "EmuDataCollator: got no datasets, expected it (pip install modeling-emu[train])"
    assert run_python(code).splitlines()[-1] == expected


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="EmuNothing"):
        _ = modeling_emu.EmuNothing
    assert not hasattr(modeling_emu, "EmuNothing")


def test_source_distribution_holds_the_package_whole_and_no_tests(tmp_path):
    """Built by the declared backend; a part of the tests would be useless without the rest."""
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    copied = shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".*", "*.egg-info", "goldens"))
    (tmp_path / "dist").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "dist")]
    subprocess.run(command, cwd=copied, capture_output=True, text=True, check=True)
    [archive] = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "modeling_emu").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package <= names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith("tests")]
