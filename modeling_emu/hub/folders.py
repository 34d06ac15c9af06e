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
"""An output folder that appears whole or not at all, and that one process at a time writes."""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Refuse to start what cannot end.

    Raises:
        OSError: if the disk of `folder` has fewer than `num_bytes` bytes left.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC, f"free disk space: got {free / 1e9:.2f} GB, expected {num_bytes / 1e9:.2f} GB", folder
        )


def check_output(output: Path) -> None:
    """Refuse an output folder that has something in it.

    Raises:
        ValueError: if `output` is a file, or a folder that is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output folder: got {output}, which is not empty, expected a new or an empty folder")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Give a temporary folder beside `output` that becomes `output` at the end, and disappears on any error.

    Args:
        output: new or empty folder; its parents are made.

    Raises:
        ValueError: if `output` is not empty, or if another process is writing it.
        OSError: if the disk is full, which the message says.
    """
    output = output.absolute()
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lock_file = output.parent / f".{output.name}.lock"
    try:
        lock = FileLock(lock_file, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"output folder: got {output}, which another process is writing, expected a free one"
        ) from error
    try:
        prefix = f".{output.name}.partial-"
        for abandoned in output.parent.glob(f"{prefix}*"):  # of a process that was killed: the lock is ours
            shutil.rmtree(abandoned)
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
        try:
            yield partial
            check_output(output)
            partial.chmod(0o755)
            if output.exists():
                output.rmdir()
            partial.rename(output)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise OSError(
                    error.errno, f"disk full while writing {output}: nothing was kept ({error.strerror})"
                ) from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        lock_file.unlink(missing_ok=True)
        lock.release()
