"""GRPO steps a second and peak memory, ours against TRL's GRPOTrainer, on the same work.

    python benchmarks/grpo_step.py --case small --json small.json

Both sides run in processes of their own that take turns: same model, prompts, G, lengths, threads, dtype, learning
rate, loss and optimizer, no gradient checkpointing, completions forced to full length. The warm-up step is left out;
figures are medians over the other steps. Peak memory is that of a step above what the process held before it, AdamW's
state included in what it held, on both sides; gradients are allocated within a step on both sides. `--case curves`
varies G, prompt and completion length; `gpu` runs on CUDA. `items` trains a generator of item ids, with rollouts, with
their expectation and supervised. `benchmarks/results/grpo_step.md` and `.png` are made of
all JSON files there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from grpo_models import SMOLLM2_FOLDER
from grpo_report import write_report
from grpo_sides import Work
from item_sides import ITEM_SIDES, ItemWork

from minirec_pl.policy.language_models.smollm2 import fetch_smollm2

RESULTS = Path(__file__).parent / "results"
SIDES = ("ours", "trl")
SHAPES = {
    "small": {"4 x 8 x 32": {}},
    "long": {
        "16 x 8 x 64": {"prompts": 16, "completion_length": 64},
        "4 x 16 x 32": {"generations": 16},
    },
    "smollm2": {"2 x 4 x 32": {"model": "smollm2-135m", "prompts": 2, "generations": 4, "prompt_length": 150}},
    "gpu": {
        "20 M, 4 x 8 x 32": {"device": "cuda"},
        "20 M, 16 x 8 x 64": {"device": "cuda", "prompts": 16, "completion_length": 64},
    },
    "items": {"1 token": {"id_tokens": 1}, "4 tokens": {"id_tokens": 4}},
    "curves": {
        f"{name} {value}": {name: value}
        for name, values in {
            "generations": (2, 4, 8, 16),
            "prompt_length": (50, 125, 250, 500),
            "completion_length": (8, 32, 64, 128),
        }.items()
        for value in values
    },
}


def run_side(work):
    """The steps of one process, each with seconds, peak_mb and phases."""
    environment = os.environ | {"OMP_NUM_THREADS": str(work.threads), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    program = "item_sides.py" if isinstance(work, ItemWork) else "grpo_sides.py"
    command = [sys.executable, str(RESULTS.with_name(program)), json.dumps(dataclasses.asdict(work))]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=RESULTS.parent.parent)
    if done.returncode != 0:
        raise SystemExit(f"{work.side} failed on {work} (exit code {done.returncode})")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(shape, rounds, steps, threads, sides=SIDES):
    """The sides on one shape, taking turns."""
    works = {side: Work(side, **{"steps": steps, "threads": threads, **shape}) for side in sides}
    found = in_turns(works, rounds)
    seconds = {side: statistics.median(step["seconds"] for step in found[side]) for side in sides}
    completions = works["ours"].prompts * works["ours"].generations
    phases = {
        name: round(statistics.median(step["phases"].get(name, 0.0) for step in found["ours"]), 4)
        for name in found["ours"][0]["phases"]
    }
    return {
        "completions_per_second": {side: round(completions / seconds[side], 3) for side in sides},
        "peak_mb": {side: round(max(step["peak_mb"] for step in found[side]), 1) for side in sides},
        "step_seconds": {side: [round(step["seconds"], 3) for step in found[side]] for side in sides},
        "ours_seconds_by_phase": phases,
        "shape": dataclasses.asdict(works["ours"]),
    }


def in_turns(works, rounds):
    """The steps of all processes of each side, which take turns."""
    found = {side: [] for side in works}
    for turn in range(rounds):
        for side in list(works)[:: -1 if turn % 2 else 1]:
            found[side] += run_side(works[side])
    return found


def compare_items(shape, rounds, steps, threads):
    """Prompts a second of all sides on one kind of ids."""
    works = {side: ItemWork(side, **{"steps": steps, "threads": threads, **shape}) for side in ITEM_SIDES}
    found = in_turns(works, rounds)
    seconds = {side: statistics.median(step["seconds"] for step in steps) for side, steps in found.items()}
    return {
        "prompts_per_second": {side: round(works[side].prompts / seconds[side], 3) for side in seconds},
        "peak_mb": {side: round(max(step["peak_mb"] for step in steps), 1) for side, steps in found.items()},
        "step_seconds": {side: [round(step["seconds"], 3) for step in steps] for side, steps in found.items()},
        "mixed_groups": round(statistics.mean(step["mixed"] for step in found["sample"]), 3),
        "shape": dataclasses.asdict(works["expected"]),
    }


def machine(gpu=False):
    """Where the figures come from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    if gpu:
        name = f"{torch.cuda.get_device_name()} ({name})"
    packages = {package: version(package) for package in ("torch", "transformers", "trl")}
    return {"processor": name, "cores": os.cpu_count(), "load_before": os.getloadavg()[0], **packages}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=SHAPES, required=True)
    parser.add_argument("--json", type=Path, required=True, help="file to write the figures to")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a process")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="ours alone has no ratio")
    parser.add_argument("--report", action="store_true", help="also write benchmarks/results/grpo_step.md and .png")
    options = parser.parse_args(arguments)
    if options.case == "smollm2":
        fetch_smollm2(SMOLLM2_FOLDER.parent)
    result = {"case": options.case, "machine": machine(options.case == "gpu")}
    sizes = (options.rounds, options.steps, options.threads)
    shapes = {
        name: compare_items(shape, *sizes) if options.case == "items" else compare(shape, *sizes, tuple(options.sides))
        for name, shape in SHAPES[options.case].items()
    }
    result |= next(iter(shapes.values())) if options.case not in ("curves", "items") else {}
    result["shapes"] = shapes
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    what = "prompts" if options.case == "items" else "completions"
    for name, shape in shapes.items():
        speed, peak = shape[f"{what}_per_second"], shape["peak_mb"]
        print(f"{name}: {'; '.join(f'{side} {speed[side]} {what}/s, {peak[side]} MB' for side in speed)}")
    if options.report:
        write_report(RESULTS)


if __name__ == "__main__":
    main()
