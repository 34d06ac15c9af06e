"""Tests of processes end in time, with all that they started."""

import re

import psutil
import pytest
from python_processes import run_python


STUCK = """
import os, subprocess, sys, time

def wait_for_nothing():
    print(os.getpid(), flush=True)
    if len(sys.argv) == 1:
        subprocess.run([sys.executable, __file__, "inner"], start_new_session=True)
    time.sleep(600)

wait_for_nothing()
"""


def is_running(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_processes_that_hang_are_ended_and_say_where(tmp_path):
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    with pytest.raises(TimeoutError, match="not done after 5 s") as caught:
        run_python(str(script), time_limit=5)
    message = str(caught.value)
    ids = [int(number) for number in re.findall(r"^\d+$", message, re.MULTILINE)]
    assert len(ids) == 2
    assert not any(is_running(number) for number in ids)
    assert message.count("in wait_for_nothing") == 2
