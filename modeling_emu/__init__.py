"""Emu, the multimodal generative model, native to transformers, diffusers and the Hub.

Importing this package imports nothing else: a class brings its libraries with it when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .configuration_emu import EmuCausalFormerConfig, EmuConfig
    from .data import EmuDataCollator, EmuMixture, EmuSampleEncoder, EmuSource, PackedDocuments
    from .modeling_emu import EmuForMultimodalGeneration, EmuModel, EmuPreTrainedModel
    from .pipeline_emu import EmuPipeline
    from .processing_emu import EmuProcessor
    from .training import EmuSamplesCallback, EmuTrainer, EmuTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "EmuCausalFormerConfig",
    "EmuConfig",
    "EmuDataCollator",
    "EmuForMultimodalGeneration",
    "EmuMixture",
    "EmuModel",
    "EmuPipeline",
    "EmuPreTrainedModel",
    "EmuProcessor",
    "EmuSampleEncoder",
    "EmuSamplesCallback",
    "EmuSource",
    "EmuTrainer",
    "EmuTrainingArguments",
    "PackedDocuments",
]

_MODULE_OF = {
    "EmuCausalFormerConfig": "configuration_emu",
    "EmuConfig": "configuration_emu",
    "EmuDataCollator": "data",
    "EmuForMultimodalGeneration": "modeling_emu",
    "EmuMixture": "data",
    "EmuModel": "modeling_emu",
    "EmuPipeline": "pipeline_emu",
    "EmuPreTrainedModel": "modeling_emu",
    "EmuProcessor": "processing_emu",
    "EmuSampleEncoder": "data",
    "EmuSamplesCallback": "training",
    "EmuSource": "data",
    "EmuTrainer": "training",
    "EmuTrainingArguments": "training",
    "PackedDocuments": "data",
}
_EXTRA_OF = {"data": "train", "training": "train"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULE_OF[name]
    try:
        return getattr(import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        if module not in _EXTRA_OF or library == __name__:
            raise
        raise ImportError(
            f"{name}: got no {library}, expected it (pip install modeling-emu[{_EXTRA_OF[module]}])"
        ) from error


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
