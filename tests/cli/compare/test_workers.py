"""The worker processes of `minirec compare` end with it, however it ends."""

import os
import signal
import threading
import time

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
