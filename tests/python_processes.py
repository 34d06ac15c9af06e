"""Python in processes of its own, which leave nothing behind: also those that it starts end in time, and say where they were."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import psutil


TESTS = Path(__file__).parent
TIME_LIMIT = 240  # seconds; on idle cores each run takes a tenth of it
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run_python(
    *arguments: str, env: dict[str, str] | None = None, time_limit: float = TIME_LIMIT
) -> subprocess.CompletedProcess:
    """Run Python, where it finds this checkout and the tests' scripts.

    Args:
        arguments: of Python.
        env: beside this process's own.
        time_limit: in seconds.

    Raises:
        TimeoutError: with the stacks of all processes that ran; they are ended.
    """
    environment = os.environ | {
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
        "PYTHONFAULTHANDLER": "1",  # prints the stack at SIGABRT
        "OMP_NUM_THREADS": "1",
        **(env or {}),
    }
    command = [sys.executable, *arguments]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        # Files, not pipes: nobody has to read while processes write their stacks
        with subprocess.Popen(command, env=environment, stdout=output, stderr=errors) as process:
            try:
                process.wait(timeout=time_limit)
            except subprocess.TimeoutExpired:
                whole = psutil.Process(process.pid)
                for running in [whole, *whole.children(recursive=True)]:
                    abort(running)
                message = (
                    f"{command}: not done after {time_limit} s\n{read_from_start(output)}\n{read_from_start(errors)}"
                )
                raise TimeoutError(message) from None
        return subprocess.CompletedProcess(
            command, process.returncode, read_from_start(output), read_from_start(errors)
        )


def abort(process: psutil.Process) -> None:
    """End a process by SIGABRT and wait until it is done: stacks that are written into one stream at a time would mix."""
    with contextlib.suppress(psutil.NoSuchProcess):  # where it ended by itself
        process.send_signal(signal.SIGABRT)
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


def read_from_start(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
