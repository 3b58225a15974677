"""What this process holds: child processes, open files and threads."""

import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import Callback


class Held(NamedTuple):
    processes: int
    files: int
    threads: int


def held():
    """Counts without collecting garbage."""
    return Held(len(multiprocessing.active_children()), len(open_files()), threading.active_count())


def open_files():
    """What is open, but for matplotlib's fonts, which it keeps, and tensors in hand, which share a worker's memory."""
    places = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    targets = [os.readlink(place) for place in places if place.is_symlink()]
    return [target for target in targets if not target.endswith(".ttf") and not target.startswith("/dev/shm/torch_")]


def held_at_rest(expected, seconds=5.0):
    """Counts until it is what is expected: processes and threads that were told to end take a moment."""
    end = time.monotonic() + seconds
    while (found := held()) != expected and time.monotonic() < end:
        time.sleep(0.02)
    return found


class Watch(Callback):
    """Notes what the process holds at the end of each epoch, and its child processes; to come before `MiniRec`.

    There every batch has been used, so that none is left in shared memory.
    """

    def __init__(self):
        self.held, self.children = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        first = self.held[0] if self.held else held()
        self.held.append(held_at_rest(first, seconds=1.0))
        self.children.append([child.pid for child in multiprocessing.active_children()])


def say_pid(seconds):
    """Names this process and goes on for a while: work for a process that will be killed."""
    os.write(1, f"{os.getpid()}\n".encode())  # one write: two processes share the pipe
    time.sleep(seconds)
