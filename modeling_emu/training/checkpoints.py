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
