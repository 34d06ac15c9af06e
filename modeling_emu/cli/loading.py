"""Model folders, opened with this package's own classes: a folder, a Hub id, or the small model that comes along.

A repository's copy of the code is never run, so no trust has to be asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

    from ..modeling_emu import EmuForMultimodalGeneration
    from ..pipeline_emu import EmuPipeline
    from ..processing_emu import EmuProcessor

EMU_TINY = Path(__file__).parents[1] / "emu_tiny"
UNTRAINED = "untrained"  # config.variant of a model that only shows how things work


def find_model(model: str | None, *, with_decoder: bool) -> Path:
    """Give the local folder of a model, after downloading it where it is a Hub id.

    Args:
        model: a folder, or a Hub id such as "org/emu"; the package's own small model where it is None.
        with_decoder: whether the visual decoder is needed too; it is not downloaded otherwise.

    Raises:
        ValueError: if it is neither, or if the folder has no Emu, or no visual decoder although it is needed.
    """
    folder = EMU_TINY if model is None else Path(model)
    if model is not None and not folder.exists():
        folder = _download(model, with_decoder=with_decoder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model: got {str(folder)!r}, expected a folder with the config.json of an Emu")
    if with_decoder and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"--model: got {str(folder)!r}, which has no visual decoder (model_index.json, unet/, vae/), "
            "expected one to draw images; --mode text works without"
        )
    return folder


def _download(repository: str, *, with_decoder: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError

    parts = Path(repository).parts
    if len(parts) != 2 or parts[0] in (".", "..", "~", "/"):
        raise ValueError(f"--model: got {repository!r}, expected an existing folder or a Hub id such as 'org/emu'")
    ignored = ["*.py", "*.md", *([] if with_decoder else ["*/*"])]
    try:
        return Path(snapshot_download(repository, ignore_patterns=ignored))
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
    """Load the Emu of a folder, ready to generate."""
    from transformers.utils import logging

    from ..modeling_emu import EmuForMultimodalGeneration

    logging.disable_progress_bar()
    return EmuForMultimodalGeneration.from_pretrained(folder, dtype=dtype, device_map={"": pick_device(device)}).eval()


def load_pipeline(folder: Path, dtype: str = "auto", device: str = "auto") -> "EmuPipeline":
    """Load a folder's Emu, processor and visual decoder as one pipeline, all in the same dtype and on one device."""
    with without_hints():
        import diffusers
        from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessorPil

        from ..pipeline_emu import EmuPipeline

    model = load_model(folder, dtype, device)
    index = EmuPipeline.load_config(folder)
    classes = {
        "unet": getattr(diffusers, index["unet"][1]),
        "vae": getattr(diffusers, index["vae"][1]),
        "safety_checker": StableDiffusionSafetyChecker,
    }
    components: dict[str, Any] = dict.fromkeys(("safety_checker", "feature_extractor"))
    for name, network in classes.items():
        if (folder / name).is_dir():
            loaded = network.from_pretrained(folder / name, torch_dtype=model.dtype)
            components[name] = loaded.to(model.device).eval()
    components["scheduler"] = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
    if (folder / "feature_extractor").is_dir():
        components["feature_extractor"] = CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor")
    return EmuPipeline(multimodal_encoder=model, processor=load_processor(folder), **components)
