"""Python in processes of its own, which leave nothing behind: also those that it starts end in time, and say where they were."""

import os
import signal
import subprocess
import sys
from pathlib import Path

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
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            output, errors = process.communicate(timeout=time_limit)
        except subprocess.TimeoutExpired:
            for running in [*psutil.Process(process.pid).children(recursive=True), process]:
                running.send_signal(signal.SIGABRT)
            output, errors = process.communicate()
            raise TimeoutError(f"{command}: not done after {time_limit} s\n{output}\n{errors}") from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
