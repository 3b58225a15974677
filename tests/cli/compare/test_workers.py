"""The worker processes of `minirec compare` end with it, however it ends."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from helpers.resources import held, held_at_rest

from minirec_pl.cli.compare.workers import ENVIRONMENT, Workers
from minirec_pl.utils.errors import InputError

pytestmark = pytest.mark.slow


@pytest.fixture
def before():
    with Workers(1) as workers:  # the process that tracks semaphores starts with the first, and stays
        assert [done.result for done in workers.run(abs, [(-1,)])] == [1]
    return held_at_rest(held(), seconds=1.0)


def run(jobs, work, tasks, after_each):
    with Workers(jobs) as workers:
        for _ in workers.run(work, tasks):
            after_each()


def test_after_an_error_between_tasks(before):
    def fail():
        raise InputError("wrong")

    variables = {name: os.environ.get(name) for name in ENVIRONMENT}
    with pytest.raises(InputError, match="wrong"):
        run(2, abs, [(-1,)] * 4, fail)
    assert held_at_rest(before) == before
    assert {name: os.environ.get(name) for name in ENVIRONMENT} == variables


def test_after_a_second_ctrl_c(before):
    def press_twice():
        for seconds in (1.0, 2.0):
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(1, time.sleep, [(0.0,), (60.0,)], press_twice)
    assert time.monotonic() - started < 40
    assert held_at_rest(before) == before


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


PROGRAM = """
import sys, time
from minirec_pl.cli.compare.workers import Workers
from helpers.resources import say_pid
if __name__ == "__main__":
    with Workers(2) as workers:
        list(workers.run(say_pid, [(600.0,)] * 2))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_after_a_kill(how, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        children = [int(parent.stdout.readline()) for _ in range(2)]
        parent.send_signal(how)
        parent.wait(timeout=30)
    deadline = time.monotonic() + 30
    while (alive := [pid for pid in children if runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(set(children)) == 2
    assert not alive
