"""How the benchmarks take time and memory, and what they say of the machine."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

GIB = 2**30
_SHOWN = ("min", "median")


def machine() -> str:
    """The machine, the versions and how busy it is at the start, in one line."""
    return f"{versions()}, load {os.getloadavg()[0]:.1f} at the start"


def versions() -> str:
    """The machine and the versions, for a page that is written after the measurements."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return (
        f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, NumPy {np.__version__}"
    )


def alternate(rivals: Mapping[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Runs rivals in turn, so that what else the machine does meets all of them.

    Args:
        rivals: By name.
        repeats: Rounds.

    Returns:
        What each returned last, and its seconds in each round.
    """
    results: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, run in rivals.items():
            started = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - started)
    return results, seconds


def summary(seconds: list[float]) -> dict[str, Any]:
    """Minimum, median and all of them."""
    return {"min": min(seconds), "median": statistics.median(seconds), "all": seconds}


def cell(seconds: Mapping[str, float]) -> str:
    """Minimum / median of a `summary` for a table."""
    return " / ".join(f"{seconds[name]:,.0f}" if seconds[name] >= 100 else f"{seconds[name]:.3g}" for name in _SHOWN)


def ratio_cell(slow: Mapping[str, float], fast: Mapping[str, float]) -> str:
    """How many times faster, of the minima / of the medians."""
    return " / ".join(f"{slow[name] / fast[name]:.1f}" for name in _SHOWN)


def peak_memory() -> int:
    """Most bytes this process had resident, pages of mapped files included."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss may be that of the process which started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
