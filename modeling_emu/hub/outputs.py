# Copyright 2026 The Emu Hub-native developers. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Outputs that appear whole or not at all, and that one process at a time writes."""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_free_space(output: Path, num_bytes: int) -> None:
    """Refuse to start what cannot end.

    Args:
        output: what will be written, in a folder that exists.
        num_bytes: its size.

    Raises:
        OSError: if the disk has fewer bytes left.
    """
    free = shutil.disk_usage(output.absolute().parent).free
    if free < num_bytes:
        raise OSError(f"free disk space for {output}: got {free / 1e9:.2f} GB, expected {num_bytes / 1e9:.2f} GB")


def check_output(output: Path) -> None:
    """Refuse an output that is there already; an empty folder may be.

    Raises:
        ValueError: if `output` is a file, or a folder that is not empty.
    """
    if output.is_dir():
        if any(output.iterdir()):
            raise ValueError(f"output: got {output}, a folder that is not empty, expected a new or an empty folder")
    elif output.exists():
        raise ValueError(f"output: got {output}, which exists, expected a new path")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Give a temporary folder beside `output` that becomes `output` at the end, and disappears on any error.

    Args:
        output: new or empty folder; its parents are made.

    Raises:
        ValueError: if `output` is not empty, or if another process is writing it.
        OSError: if the disk is full, which the message says.
    """
    with _staging(output.absolute()) as staging:
        folder = staging / "folder"
        folder.mkdir()
        yield folder
        check_output(output)
        if output.exists():
            output.rmdir()
        folder.rename(output)


@contextmanager
def whole_file(output: Path) -> Iterator[Path]:
    """As `whole_folder`, for one file: what is written to the path given becomes `output`."""
    if output.is_dir():
        raise ValueError(f"output: got {output}, a folder, expected a new file")
    with _staging(output.absolute()) as staging:
        yield staging / "file"
        check_output(output)
        (staging / "file").rename(output)


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A temporary folder on the disk of `output`, for one process at a time."""
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lock_file = output.parent / f".{output.name}.lock"
    lock = FileLock(lock_file, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"output: got {output}, which another process is writing, expected a free path") from error
    prefix = f".{output.name}.partial-"
    try:
        for abandoned in output.parent.glob(f"{prefix}*"):  # by a process that was killed: the lock is ours
            shutil.rmtree(abandoned)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=output.parent) as staging:
            yield Path(staging)
    except OSError as error:
        if error.errno in DISK_FULL:
            message = f"disk full while writing {output}: nothing is kept ({error.strerror})"
            raise OSError(message) from error
        raise
    finally:
        lock_file.unlink(missing_ok=True)
        lock.release()
