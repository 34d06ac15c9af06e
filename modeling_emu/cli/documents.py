"""Documents of the command line: arguments become parts, and generated parts become lines and files."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def read_document(arguments: list[str]) -> list[dict[str, Any]]:
    """Make a document of command-line arguments, in their order.

    Args:
        arguments: texts, and paths of images and videos. What ends in a media suffix must be a file.

    Returns:
        One part per argument. Images and videos are paths, which the processor reads.

    Raises:
        ValueError: if an argument is empty, or a file that is neither image nor video.
        FileNotFoundError: if an argument ends in a media suffix and is no file.
    """
    return [_read_part(argument) for argument in arguments]


def _read_part(argument: str) -> dict[str, Any]:
    suffix = Path(argument).suffix.lower()
    if not argument.strip():
        raise ValueError("PART: got an empty text, expected a text or the path of an image or video")
    if suffix in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        if not Path(argument).is_file():
            raise FileNotFoundError(
                f"PART: got {argument!r}, expected an existing file because of its suffix {suffix}"
            )
        media = "image" if suffix in IMAGE_SUFFIXES else "video"
        return {"type": media, media: argument}
    if suffix and Path(argument).is_file():
        known = ", ".join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)
        raise ValueError(f"PART: got the file {argument!r}, expected a text or a file that ends in one of {known}")
    return {"type": "text", "text": argument}


def check_output(folder: Path) -> None:
    """Refuse a file where a folder is meant, before anything is computed for it.

    Raises:
        ValueError: if `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output: got the file {str(folder)!r}, expected a folder")


def write_images(images: list["Image"], folder: Path) -> list[Path]:
    """Write images as PNG files, all of them or none, and overwrite nothing.

    Args:
        images: PIL images.
        folder: made where it does not exist; files are numbered on from those that are there.

    Returns:
        The paths written, in order.
    """
    check_output(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(path.stem[6:]) for path in folder.glob("image_*.png") if path.stem[6:].isdigit()]
    first = max(taken, default=-1) + 1
    paths = [folder / f"image_{number}.png" for number in range(first, first + len(images))]
    try:
        # On the target's own file system, so that the last step is a rename.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".emu-") as scratch:
            for image, path in zip(images, paths, strict=True):
                image.save(Path(scratch) / path.name)
            for path in paths:
                os.replace(Path(scratch) / path.name, path)
    except BaseException:
        if is_new:
            folder.rmdir()
        raise
    return paths
