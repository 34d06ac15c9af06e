"""Model folders, opened with this package's own classes: a folder, a Hub id, or the small model that comes along.

A repository's copy of the code is never run, so no trust has to be asked for.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub.repository import ADAPTER_FOLDER


if TYPE_CHECKING:
    import torch

    from ..modeling_emu import EmuForMultimodalGeneration
    from ..pipeline_emu import EmuPipeline
    from ..processing_emu import EmuProcessor

EMU_TINY = Path(__file__).parents[1] / "emu_tiny"
NO_COMPONENT = (None, None)  # in model_index.json
# config.variant of a model that only shows how things work, and of one that knows the shapes' world
UNTRAINED = "untrained"
TINY = "tiny"

# What commands read of a Hub repository, as its patterns.
CONFIGURATION_FILES = ["config.json", "model_index.json", "unet/config.json", f"{ADAPTER_FOLDER}/adapter_config.json"]
ENCODER_FILES = [
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer*",
    "chat_template*",
    "model.safetensors*",
    "model-*.safetensors",
    f"{ADAPTER_FOLDER}/*",
]
DECODER_FILES = ["model_index.json", "unet/*", "vae/*", "scheduler/*", "safety_checker/*", "feature_extractor/*"]


def find_model(model: str | None, *, with_decoder: bool) -> Path:
    """Give the local folder of a model, after downloading it where it is a Hub id.

    Args:
        model: a folder, or a Hub id such as "org/emu"; the package's own small model where it is None.
        with_decoder: whether the visual decoder is needed too; it is not downloaded otherwise.

    Raises:
        ValueError: if it is neither, or if the folder has no Emu, or no visual decoder although it is needed.
    """
    folder = find_configuration(str(EMU_TINY) if model is None else model)
    if with_decoder and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"--model: got {model!r}, which has no visual decoder (model_index.json, unet/), "
            "expected one to draw images (emu generate --mode text works without)"
        )
    if model is None or is_folder(model):
        return folder
    return _download(model, [*ENCODER_FILES, *(DECODER_FILES if with_decoder else [])])


def find_configuration(model: str) -> Path:
    """Give the local folder of a model, after downloading its configurations alone where it is a Hub id.

    Raises:
        ValueError: if it is neither, or if its config.json is not that of an Emu.
    """
    folder = Path(model) if is_folder(model) else _download(model, CONFIGURATION_FILES)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(f"--model: got {model!r}, expected a folder with the config.json of an Emu")
    try:
        model_type = json.loads(config_file.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config_file}: got no model_type, expected the configuration of an Emu") from error
    if model_type != "emu":
        raise ValueError(f"model_type in {config_file}: got {model_type!r}, expected 'emu'")
    return folder


def is_folder(model: str) -> bool:
    """Whether `model` is a folder of this machine, refusing what is neither that nor the form of a Hub id.

    Raises:
        ValueError: if it is neither.
    """
    if os.path.isdir(model):
        return True
    parts = Path(model).parts
    if os.path.exists(model) or len(parts) != 2 or parts[0] in (".", "..", "~", "/"):
        raise ValueError(f"--model: got {model!r}, expected an existing folder or a Hub id such as 'org/emu'")
    return False


def _download(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except HFValidationError as error:
        raise ValueError(f"--model: got {repository!r}, expected a folder or a Hub id ({error})") from error


def pick_device(device: str) -> "torch.device":
    """Give the device of this name; "auto" is CUDA, else MPS, else the CPU."""
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: got {device!r}, expected a device of this machine ({error})") from error
    return picked


def seed_everything(seed: int | None) -> "torch.Generator | None":
    """Seed sampling, and give the generator of the visual decoder's noise; None leaves both to chance."""
    import torch

    if seed is None:
        return None
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def get_drawing_options(variant: str) -> dict[str, Any]:
    """How a model of this variant draws best, in the pipeline's words; empty for the pipeline's own defaults."""
    if variant != TINY:
        return {}
    from ..evaluation.asking import GUIDANCE_SCALE, NUM_INFERENCE_STEPS

    return {"num_inference_steps": NUM_INFERENCE_STEPS, "guidance_scale": GUIDANCE_SCALE}


@contextmanager
def without_hints() -> Iterator[None]:
    """Silence what transformers says of torchvision, which Emu has no use for, and of model types that it lacks."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_processor(folder: Path) -> "EmuProcessor":
    """Load the processor of a folder."""
    with without_hints():
        from ..processing_emu import EmuProcessor

        return EmuProcessor.from_pretrained(folder)


def load_model(folder: Path, dtype: str = "auto", device: str = "auto") -> "EmuForMultimodalGeneration":
    """Load the Emu of a folder, with the adapter that stands beside it, ready to generate.

    Raises:
        ValueError: if the weights are not those of the model, all of them and no others.
        ImportError: if there is an adapter, and no peft to load it.
    """
    from transformers.utils import logging

    from ..modeling_emu import EmuForMultimodalGeneration

    logging.disable_progress_bar()
    with without_hints():  # a table of what is missing, which is refused here
        model, found = EmuForMultimodalGeneration.from_pretrained(
            folder, dtype=dtype, device_map={"": pick_device(device)}, output_loading_info=True
        )
    _check_keys(folder, found["missing_keys"], found["unexpected_keys"])
    if (folder / ADAPTER_FOLDER).is_dir():
        _load_adapter(model, folder)
    return model.eval()


def _load_adapter(model: "EmuForMultimodalGeneration", folder: Path) -> None:
    """Load the adapter of a repository whose LoRA was not merged; without it, the model would be the untuned one."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"peft: got none, expected it for the adapter in {folder / ADAPTER_FOLDER} (pip install peft)"
        ) from error
    with without_hints():
        found = model.load_adapter(str(folder), adapter_kwargs={"subfolder": ADAPTER_FOLDER})
    _check_keys(folder / ADAPTER_FOLDER, found.missing_keys, found.unexpected_keys)


def _check_keys(folder: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse weights that lack tensors, which would be random, or have others, which would be dropped."""
    problems = [
        f"{what} {len(names)} tensors ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("without", list(missing)), ("with unknown", list(unexpected)))
        if names
    ]
    if problems:
        raise ValueError(f"weights in {folder}: got them {' and '.join(problems)}, expected exactly the model's")


def load_pipeline(folder: Path, dtype: str = "auto", device: str = "auto") -> "EmuPipeline":
    """Load a folder's Emu, processor and visual decoder as one pipeline, all in the same dtype and on one device.

    Raises:
        ValueError: if `model_index.json` names no such class, or as `load_model`.
    """
    with without_hints():
        from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessorPil

        from ..pipeline_emu import EmuPipeline

    index = EmuPipeline.load_config(folder)
    has_vae = tuple(index.get("vae", NO_COMPONENT)) != NO_COMPONENT  # without one, the U-Net works on pixels
    names = ("unet", "vae", "scheduler") if has_vae else ("unet", "scheduler")
    networks = {name: _find_class(index, name) for name in names}
    scheduler = networks.pop("scheduler")
    if (folder / "safety_checker").is_dir():
        networks["safety_checker"] = StableDiffusionSafetyChecker
    model = load_model(folder, dtype, device)
    components: dict[str, Any] = dict.fromkeys(("vae", "safety_checker", "feature_extractor"))
    for name, network in networks.items():
        components[name] = network.from_pretrained(folder / name, dtype=model.dtype).to(model.device).eval()
    components["scheduler"] = scheduler.from_pretrained(folder / "scheduler")
    if (folder / "feature_extractor").is_dir():
        components["feature_extractor"] = CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor")
    return EmuPipeline(multimodal_encoder=model, processor=load_processor(folder), **components)


def _find_class(index: dict[str, Any], component: str) -> Any:
    """The class of diffusers that `model_index.json` names for a component of the visual decoder."""
    import diffusers

    entry = index.get(component)
    found = getattr(diffusers, str(entry[1]), None) if isinstance(entry, list | tuple) and len(entry) == 2 else None
    if found is None:
        raise ValueError(f"{component} in model_index.json: got {entry}, expected a class of diffusers")
    return found
