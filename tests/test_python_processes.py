"""Tests of processes end in time, with all that they started."""

import re

import psutil
import pytest
from python_processes import run_python


PROCESSES = 4
STUCK = """
import os, subprocess, sys, time

def wait_for_nothing(further):
    print(os.getpid(), flush=True)
    print("much" * 50_000, file=sys.stderr, flush=True)
    if further:
        subprocess.run([sys.executable, __file__, str(further - 1)], start_new_session=True)
    time.sleep(600)

wait_for_nothing(int(sys.argv[1]))
"""


DEAF = """
import os, signal, time
signal.signal(signal.SIGABRT, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(600)
"""


def is_running(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_processes_that_hang_are_ended_and_say_where(tmp_path):
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    with pytest.raises(TimeoutError, match="not done after 10 s") as caught:
        run_python(str(script), str(PROCESSES - 1), time_limit=10)
    message = str(caught.value)
    ids = [int(number) for number in re.findall(r"^\d+$", message, re.MULTILINE)]
    assert len(ids) == PROCESSES
    assert not any(is_running(number) for number in ids)
    assert message.count("in wait_for_nothing") == PROCESSES


def test_a_process_that_does_not_abort_is_killed(monkeypatch):
    monkeypatch.setattr("python_processes.SECONDS_TO_ABORT", 0.5)
    with pytest.raises(TimeoutError, match="not done after 5 s") as caught:
        run_python("-c", DEAF, time_limit=5)
    [number] = re.findall(r"^\d+$", str(caught.value), re.MULTILINE)
    assert not is_running(int(number))
