"""The package as a whole: it is cheap to import, and each class comes with the first use of its name."""

import importlib
import subprocess
import sys
import time

import pytest

import modeling_emu


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


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="EmuNothing"):
        _ = modeling_emu.EmuNothing
    assert not hasattr(modeling_emu, "EmuNothing")
