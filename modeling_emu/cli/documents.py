"""Documents of the command line: arguments become parts, and generated parts become lines and files."""

import os
import tempfile
from contextlib import suppress
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
        if not os.path.isfile(argument):
            raise FileNotFoundError(
                f"PART: got {argument!r}, expected an existing file because of its suffix {suffix}"
            )
        media = "image" if suffix in IMAGE_SUFFIXES else "video"
        return {"type": media, media: argument}
    if suffix and os.path.isfile(argument):  # False, where `Path.is_file` raises on a text too long for a name
        known = ", ".join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)
        raise ValueError(f"PART: got the file {argument!r}, expected a text or a file that ends in one of {known}")
    return {"type": "text", "text": argument}


def check_output(folder: Path) -> None:
    """Refuse what cannot become a folder, before anything is computed for it.

    Raises:
        ValueError: if `folder` or one of its parents is a file, or if nothing can be written there.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ValueError(f"--output: got the file {str(existing)!r}, expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--output: got {str(folder)!r}, expected a folder that can be written to")


def write_images(images: list["Image"], folder: Path) -> list[Path]:
    """Write images as PNG files, all of them or none, and overwrite nothing, whoever else writes there meanwhile.

    Args:
        images: PIL images; where there are none, nothing is made.
        folder: made where it does not exist; files are numbered on from those that are there.

    Returns:
        The paths written, in order.
    """
    if not images:
        return []
    check_output(folder)
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # On the target's own file system, so that the last step is a rename.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".emu-") as scratch:
            files = [Path(scratch) / f"{index}.png" for index in range(len(images))]
            for image, file in zip(images, files, strict=True):
                image.save(file)
            for file in files:
                written.append(_claim_name(folder))
                os.replace(file, written[-1])
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's files are in it
            for path in new_folders:
                path.rmdir()
        raise
    return written


def _claim_name(folder: Path) -> Path:
    """Make an empty file of the next free number, which no other process can take then."""
    taken = [int(path.stem[6:]) for path in folder.glob("image_*.png") if path.stem[6:].isdecimal()]
    number = max(taken, default=-1) + 1
    while True:
        path = folder / f"image_{number}.png"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return path
