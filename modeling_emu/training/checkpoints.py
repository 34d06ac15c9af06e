"""Checkpoints that a killed run cannot fool: a mark is written into a folder when all else is there."""

import re
from pathlib import Path


COMPLETE_MARK = "checkpoint_complete"
CHECKPOINT_FOLDER = re.compile(r"checkpoint-(\d+)")


def mark_complete(folder: Path) -> None:
    """Say that this checkpoint has all its files."""
    (folder / COMPLETE_MARK).touch()


def is_complete(folder: Path) -> bool:
    """Whether this checkpoint has all its files."""
    return (folder / COMPLETE_MARK).is_file()


def find_checkpoint(checkpoint: str | bool, output_dir: Path) -> Path:
    """Give the folder to resume from.

    Args:
        checkpoint: a folder, or True for the last complete one in `output_dir`.
        output_dir: of the run.

    Raises:
        ValueError: if there is no complete checkpoint.
    """
    if checkpoint is True:
        last = get_last_complete_checkpoint(output_dir)
        if last is None:
            raise ValueError(f"checkpoints in {str(output_dir)!r}: got no complete one, expected one to resume")
        return last
    folder = Path(str(checkpoint))
    if not is_complete(folder):
        raise ValueError(f"checkpoint: got {checkpoint!r}, expected one that was written to its end")
    return folder


def get_last_complete_checkpoint(output_dir: Path) -> Path | None:
    """Give the complete checkpoint with the highest step, None where there is none."""
    if not output_dir.is_dir():
        return None
    steps = {
        int(match[1]): folder
        for folder in output_dir.iterdir()
        if (match := CHECKPOINT_FOLDER.fullmatch(folder.name)) and is_complete(folder)
    }
    return steps[max(steps)] if steps else None
