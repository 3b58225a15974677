"""SIGKILL at an exact place of a run of the real command, in a process of its own."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

from lightning.pytorch import Callback


class Killer(Callback):
    """Among the callbacks of a config; kills the process at the place that a variable names, if it names one.

    Places are `HOOK:n`, the n-th call of a hook of this callback; `step:MODULE.CLASS.METHOD:n`, the n-th call of a
    method; `file:NAME:n`, the n-th file of this name (or in a folder of this name) when half of it is written.
    """

    variable = "MINIREC_TEST_KILL"

    def __init__(self):
        place = os.environ.get(self.variable)
        if place is None:
            return
        *what, count = place.split(":")
        self.left = int(count)
        if what[0] == "file":
            self._at_a_file(what[1])
        elif what[0] == "step":
            self._at_a_method(what[1])
        else:
            setattr(self, what[0], self._count)

    def _count(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def _at_a_file(self, name):
        from minirec_pl.utils import files

        class Replacing:
            def __getattr__(self, attribute):
                return getattr(os, attribute)

            def replace(_, source, target):
                if name in (Path(target).name, Path(target).parent.name):
                    os.truncate(source, os.path.getsize(source) // 2) if self.left == 1 else None
                    self._count()
                os.replace(source, target)

        files.os = Replacing()

    def _at_a_method(self, name):
        from minirec_pl.cli.arguments import class_of

        owner, _, method = name.rpartition(".")
        kind = class_of(owner)
        given = getattr(kind, method)

        def counted(*args, **kwargs):
            self._count()
            return given(*args, **kwargs)

        setattr(kind, method, counted)


def _command(arguments, folder, kill, log):
    from minirec_pl.cli.main import main

    os.setsid()
    os.chdir(folder)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    if kill is not None:
        os.environ[Killer.variable] = kill
    os._exit(main(arguments))


def minirec(arguments, folder, log, kill=None):
    """Runs the command in a process that is a copy of this one; returns its exit code (-9 if killed) and its output."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_command, args=([str(word) for word in arguments], folder, kill, log))
    process.start()
    process.join()
    return process.exitcode, Path(log).read_text()
