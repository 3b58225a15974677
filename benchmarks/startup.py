"""What `minirec` takes to answer: help, version, and what is wrong with a command line; beside imports and before.

    python benchmarks/startup.py --before CHECKOUT --to benchmarks/results/startup

Each answer is a process of its own, in an empty folder. Processes take turns, and the CPU time (user and system) is
the smallest of the rounds, since a busy machine stretches the seconds on the clock but hardly those of the CPU. The
rivals are `python -c "import torch"` and `python -c "import lightning.pytorch"`, of the same rounds. `--before` is a
checkout of an earlier version, whose `minirec` gets the same words.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import machine

from minirec_pl.utils.files import write_atomically, write_json

HERE = Path(__file__).resolve().parents[1]
WARM = str(HERE / "configs" / "ml-100k" / "warm-start.yaml")
COMMANDS = (
    *("fit", "validate", "test", "predict", "score", "check", "select", "data describe", "report", "export"),
    *("compare", "dashboard", "fetch", "init", "quickstart"),
)
ANSWERS = {
    "--help": "--help",
    "--version": "--version",
    **{f"{command} --help": f"{command} --help" for command in COMMANDS},
    "unknown command": "selct",
    "unknown option": "fit --trainer.max_epoch=3",
    "unknown option of a class": f"fit --config {WARM} --model.droput=0.1",
    "no such config": "fit --config none.yaml",
    "YAML syntax": "fit --config broken.yaml",
    "unknown key in YAML": "fit --config key.yaml",
    "no such data": f"fit --config {WARM}",
    "no such policy": f"fit --config {WARM.replace('warm-start', 'quickstart')}",
    "no such checkpoint": "test --ckpt_path none.ckpt",
    "no such signals": "select none.safetensors",
    "no such run": "report none",
    "no such study": "compare --config none.yaml --to there",
    "negative seed": "quickstart --seed=-1",
}
RIVALS = ("torch", "lightning.pytorch")
TOLD_BEFORE = {  # which of them an earlier version is asked for, since it takes seconds for each
    *("--help", "fit --help", "select --help", "report --help", "export --help", "unknown option", "no such config"),
    *("YAML syntax", "unknown key in YAML", "no such data", "no such checkpoint", "no such signals", "negative seed"),
}


def cost(words: list[str], folder: Path, source: Path) -> tuple[float, float]:
    """CPU and clock seconds of a process."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, cwd=folder, env=environment, capture_output=True, check=False)
    after, ended = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, ended - started


def measure(before: Path | None, rounds: int) -> dict[str, Any]:
    """The smallest CPU and clock seconds of each answer and rival, here and before."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "broken.yaml").write_text("model: [1,\n")
        (folder / "key.yaml").write_text("trainer:\n  max_epoch: 3\n")
        tasks = {(f"import {module}", "here"): ([sys.executable, "-c", f"import {module}"], HERE) for module in RIVALS}
        for answer, words in ANSWERS.items():
            for version, source in {"here": HERE, **({"before": before} if before else {})}.items():
                if version == "here" or answer in TOLD_BEFORE:
                    tasks[answer, version] = ([sys.executable, "-m", "minirec_pl", *words.split()], source)
        for _ in range(rounds):
            for (answer, version), (words, source) in tasks.items():
                taken = cost(words, folder, source)
                least = found.setdefault(answer, {}).get(version, taken)
                found[answer][version] = (min(taken[0], least[0]), min(taken[1], least[1]))
    return {
        answer: {version: {"cpu": cpu, "clock": clock} for version, (cpu, clock) in versions.items()}
        for answer, versions in found.items()
    }


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    torch = found["import torch"]["here"]["cpu"]
    lines = [
        "| answer | CPU s | clock s | CPU s before | before / now | of `import torch` |",
        "|---|---|---|---|---|---|",
    ]
    for answer, versions in found.items():
        here, before = versions["here"], versions.get("before")
        cells = [f"{here['cpu']:.2f}", f"{here['clock']:.2f}"]
        cells += [f"{before['cpu']:.2f}", f"{before['cpu'] / here['cpu']:.0f}"] if before else ["", ""]
        lines.append(f"| `{answer}` | {' | '.join(cells)} | {here['cpu'] / torch:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of an earlier version")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to", type=Path, required=True, help="files to write, without their ending")
    options = parser.parse_args()
    about = machine()
    found = measure(options.before and options.before.resolve(), options.rounds)
    write_json(options.to.with_suffix(".json"), {"machine": about, "rounds": options.rounds, "seconds": found})
    text = f"# Time to answer\n\n{about}; the smallest of {options.rounds} rounds.\n\n{table(found)}\n"
    write_atomically(options.to.with_suffix(".md"), lambda scratch: scratch.write_text(text, encoding="utf-8"))
    print(text)


if __name__ == "__main__":
    main()
