"""Long-lived worker processes, one core each, with the same arithmetic on every x86 processor that has AVX2."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from minirec_pl.utils.errors import InputError

# Set before torch is imported: one thread, and the code paths that every x86 processor since 2013 has.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


class Done(NamedTuple):
    """A task that has ended.

    Attributes:
        task: as it was given.
        result: what it returned.
        error: why it failed, in one sentence; None if it did not.
    """

    task: Any
    result: Any
    error: str | None


class Workers:
    """Processes that run tasks one after the other, as a context manager.

    Inside, the variables of `ENVIRONMENT` are set for this process too, as its children inherit them.

    Args:
        jobs: how many.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def __enter__(self) -> Workers:
        self._before = {name: os.environ.get(name) for name in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)
        self._pool = ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"), _start)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Waits for the running tasks; after a second Ctrl-C ends them at once."""
        if kind is KeyboardInterrupt:
            os.write(2, b"\nstopping after the running cells; Ctrl-C again stops at once\n")
        try:
            self._pool.shutdown(wait=True, cancel_futures=True)
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            for name, value in self._before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})

    def run(
        self, work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], deadline: float | None = None
    ) -> Iterator[Done]:
        """Runs `work(*task)` for each task, and yields each as it ends.

        Args:
            work: a function of a module.
            tasks: its arguments.
            deadline: seconds of `time.monotonic()` after which no task is begun; None for none.

        Raises:
            InputError: if a worker process dies.
        """
        left = list(reversed(tasks))
        running: dict[Future[Any], tuple[Any, ...]] = {}
        while left or running:
            while left and len(running) < self.jobs and (deadline is None or time.monotonic() < deadline):
                task = left.pop()
                running[self._pool.submit(work, *task)] = task
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield _done(running.pop(future), future)


def _done(task: tuple[Any, ...], future: Future[Any]) -> Done:
    try:
        return Done(task, future.result(), None)
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process died, probably for lack of memory: run the same command again with fewer --jobs, the "
            "finished cells are kept"
        ) from error
    except InputError as error:
        return Done(task, None, str(error))
    except Exception as error:  # a cell that fails is reported by name, and the others continue
        return Done(task, None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the tasks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def _end_with_parent() -> None:
    """Ends this process where its parent was killed: nobody would take what it works on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
