"""`grpo_step.md` and `grpo_step.png` out of the JSON files of `grpo_step.py`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

PHASES = ("prefill", "decode", "rewards", "log-probabilities", "backward", "optimizer")
AXES = {
    "generations": "G, rollouts per prompt",
    "prompt_length": "prompt length [tokens]",
    "completion_length": "completion length [tokens]",
}


def write_report(folder: Path):
    """Writes both files into `folder`, from `grpo_step_<case>.json` there; cases without a file are left out."""
    cases = {path.stem.removeprefix("grpo_step_"): json.loads(path.read_text()) for path in _files(folder)}
    lines = ["# One GRPO step, ours and TRL's GRPOTrainer", "", *_method(), ""]
    for case, found in cases.items():
        machine = " ".join([_machine(found["machine"]), *([found["note"]] if "note" in found else [])])
        if case == "items":
            lines += ["## items", "", machine, "", *_items(found["shapes"]), ""]
            continue
        lines += [f"## {case}", "", machine, "", *_table(found["shapes"]), ""]
        if case != "curves":
            lines += ["Where our time goes, seconds of a step (medians by phase):", "", *_phases(found["shapes"]), ""]
    if "curves" in cases:
        plot_curves(cases["curves"]["shapes"], folder / "grpo_step.png")
        lines += ["![Cost over G, prompt length and completion length](grpo_step.png)", ""]
    (folder / "grpo_step.md").write_text("\n".join(lines), encoding="utf-8")


def _files(folder):
    order = ("small", "long", "items", "smollm2", "gpu", "curves")
    paths = (folder / f"grpo_step_{case}.json" for case in order)
    return [path for path in paths if path.is_file()]


def _method():
    return [
        "`python benchmarks/grpo_step.py --case CASE --json benchmarks/results/grpo_step_CASE.json --report` measures",
        "and writes this page. Each side runs in processes of its own that take turns; same model, prompts, G,",
        "lengths, threads, dtype, learning rate (1e-5), loss (`dapo`, beta 0), clipping (1.0) and fused AdamW,",
        "no gradient checkpointing on either side; no completion ends early. The first step of a process is left out;",
        "figures are medians over the rest. Peak memory is that of a step above what the process held before it,",
        "resident on a CPU and allocated on a GPU:",
        "gradients count on both sides, AdamW's state on neither. Ours goes backward over 2,048 tokens at a time.",
        "Where the processor has no bfloat16 arithmetic, ours computes bfloat16 models in float32.",
        "The curves are of our side alone (`--sides ours`). Hosts that share their cores differ by a third from minute",
        "to minute; ratios are of processes that ran one after the other.",
    ]


def _machine(found):
    return (
        f"{found['processor']}, {found['cores']} cores, load {found['load_before']:.1f} before the start; "
        f"torch {found['torch']}, transformers {found['transformers']}, TRL {found['trl']}."
    )


def _table(shapes):
    rows = ["| work | ours [completions/s] | TRL | ratio | ours [MB] | TRL | share |", "| --- " + "| ---: " * 6 + "|"]
    for name, shape in shapes.items():
        speed, peak = shape["completions_per_second"], shape["peak_mb"]
        if "trl" not in speed:
            rows.append(f"| {name} | {speed['ours']:.2f} | | | {peak['ours']:.0f} | | |")
            continue
        rows.append(
            f"| {name} | {speed['ours']:.2f} | {speed['trl']:.2f} | {speed['ours'] / speed['trl']:.1f} | "
            f"{peak['ours']:.0f} | {peak['trl']:.0f} | {peak['ours'] / peak['trl']:.2f} |"
        )
    return rows


def _items(shapes):
    shape = next(iter(shapes.values()))["shape"]
    mixed = " and ".join(f"{found['mixed_groups']:.0%}" for found in shapes.values())
    rows = [
        f"A Llama of 4 layers of width 256 generates the ids of 10,000 items; {shape['prompts']} prompts of 20 items a",
        f"step, G = {shape['generations']}, reward `hit`. `expected` is `rollouts: expected`, `supervised` the warm",
        f"start's loss on the same samples. `sample` draws rollouts; {mixed} of its groups hold a hit and a miss and",
        "are run backward. TRL generates with `prefix_allowed_tokens_fn`, so that every completion is an item; its",
        "update is over the whole vocabulary. The ratio is the median over steps of the same round, which the speed of",
        "the machine does not move.",
        "",
        "| ids | side | prompts/s | `expected` is so many times as fast | peak [MB] |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, found in shapes.items():
        speed, peak = found["prompts_per_second"], found["peak_mb"]
        names, steps = {"trl": "TRL"}, found["step_seconds"]
        for side in speed:
            times = median(other / own for other, own in zip(steps[side], steps["expected"], strict=True))
            rows.append(
                f"| {name} | {names.get(side, f'`{side}`')} | {speed[side]:.1f} | {times:.2f} | {peak[side]:.0f} |"
            )
    return rows


def _phases(shapes):
    rows = ["| work | " + " | ".join(PHASES) + " |", "| --- " + "| ---: " * len(PHASES) + "|"]
    for name, shape in shapes.items():
        seconds = (f"{shape['ours_seconds_by_phase'].get(phase, 0.0):.3f}" for phase in PHASES)
        rows.append(f"| {name} | " + " | ".join(seconds) + " |")
    return rows


def plot_curves(shapes, path):
    """Seconds of a step over each quantity, for each side measured, and our prefill."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(AXES), figsize=(13, 4), layout="constrained")
    for panel, (quantity, label) in zip(panels, AXES.items(), strict=True):
        points = [shape for name, shape in shapes.items() if name.startswith(quantity + " ")]
        values = [shape["shape"][quantity] for shape in points]
        completions = [shape["shape"]["prompts"] * shape["shape"]["generations"] for shape in points]
        sides = points[0]["completions_per_second"]
        for side, name in ((side, {"trl": "TRL 1.16"}.get(side, side)) for side in sides):
            seconds = [n / shape["completions_per_second"][side] for n, shape in zip(completions, points, strict=True)]
            panel.plot(values, seconds, marker="o", label=f"{name}, whole step")
        prefill = [shape["ours_seconds_by_phase"]["prefill"] for shape in points]
        panel.plot(values, prefill, marker="s", linestyle="--", label="ours, prefill")
        panel.set(xlabel=label, ylabel="seconds of a step", yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
