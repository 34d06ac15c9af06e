"""Python in processes of its own: what still runs at a time limit is ended, with all that it started, and says where it was."""

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
SECONDS_TO_ABORT = 10  # in which a process writes its stacks and ends; it is killed then
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
    with open_output() as output, open_output() as errors:
        # Files, not pipes: nobody has to read while processes write their stacks
        with subprocess.Popen(command, env=environment, stdout=output, stderr=errors) as process:
            try:
                process.wait(timeout=time_limit)
            except subprocess.TimeoutExpired:
                whole = psutil.Process(process.pid)
                # Parents first: a launcher that sees one of its processes end would end the others
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
    """End a process by SIGABRT and wait until it is done: stacks that are written into one file at the same time would mix."""
    with contextlib.suppress(psutil.NoSuchProcess):  # where it ended by itself, or is gone now
        process.send_signal(signal.SIGABRT)
        deadline = time.monotonic() + SECONDS_TO_ABORT
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(0.01)


def open_output() -> IO[str]:
    return tempfile.TemporaryFile("w+", errors="replace")


def read_from_start(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
