"""Emu, the multimodal generative model, native to transformers, diffusers and the Hub.

Importing this package imports nothing else: a class brings its libraries with it when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .configuration_emu import EmuCausalFormerConfig, EmuConfig
    from .modeling_emu import EmuForMultimodalGeneration, EmuModel, EmuPreTrainedModel
    from .pipeline_emu import EmuPipeline
    from .processing_emu import EmuProcessor

__version__ = "0.1.0"

__all__ = [
    "EmuCausalFormerConfig",
    "EmuConfig",
    "EmuForMultimodalGeneration",
    "EmuModel",
    "EmuPipeline",
    "EmuPreTrainedModel",
    "EmuProcessor",
]

_MODULE_OF = {
    "EmuCausalFormerConfig": "configuration_emu",
    "EmuConfig": "configuration_emu",
    "EmuForMultimodalGeneration": "modeling_emu",
    "EmuModel": "modeling_emu",
    "EmuPipeline": "pipeline_emu",
    "EmuPreTrainedModel": "modeling_emu",
    "EmuProcessor": "processing_emu",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
