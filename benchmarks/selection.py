"""Speed and memory of selection, each against a plain way of computing the same, in one run on one machine.

    python benchmarks/selection.py --case all

maxmin   `maxmin_select` and the plain greedy at the sizes of the paper's CDs_and_Vinyl: seconds, the same picks, what a
         candidate pool loses (`selection_maxmin.py`).
million  a million float16 embeddings in a memory-mapped file: seconds, peak memory (`selection_million.py`).
hvp      Hessian-vector product signals of hidden states against double backward (`selection_hvp.py`).
predicted  refit, posterior and selection of predicted difficulty (`selection_predicted.py`).
curves   seconds over N, d and k, with a picture (`selection_curves.py`).

Rivals take turns and use the same number of threads. The raw figures go to the JSON file, by case: a case that is not
run keeps the figures it has there. The Markdown beside it is written anew from all of them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from measuring import machine

from minirec_pl.utils.files import write_atomically, write_json

TITLES = {
    "maxmin": "Max-min selection",
    "million": "A million embeddings from a file",
    "hvp": "Hessian-vector product signals",
    "predicted": "Predicted difficulty",
    "curves": "Cost over N, d and k",
}
RESULTS = Path(__file__).resolve().parent / "results"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the cases and writes the JSON, the Markdown and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*TITLES, "all"], default="all")
    parser.add_argument("--json", type=Path, default=RESULTS / "selection.json", metavar="FILE")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch, for all rivals")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)

    results: dict[str, Any] = json.loads(options.json.read_text()) if options.json.is_file() else {}
    for case in TITLES if options.case == "all" else [options.case]:
        about = {
            "machine": machine(),
            "threads": options.threads,
            "date": date.today().isoformat(),
            "command": f"python benchmarks/selection.py --case {case} --threads {options.threads}",
        }
        print(f"{case}: {about['machine']}", file=sys.stderr)
        results[case] = about | {"result": _module(case).run(options.threads)}
        write_json(options.json, results)
        _write_report(options.json, results)
        print(_module(case).markdown(results[case]["result"]), file=sys.stderr)


def report(results: dict[str, Any]) -> str:
    """The Markdown of all cases that have figures."""
    parts = ["# Selection: speed and memory", "Written by `benchmarks/selection.py`, whose files say what is measured."]
    for case, title in TITLES.items():
        if case in results:
            about = results[case]
            parts += [
                f"## {title}",
                f"`{about['command']}`, {about['date']}, {about['threads']} threads each: {about['machine']}.",
                _module(case).markdown(about["result"]),
            ]
    return "\n\n".join(parts) + "\n"


def _write_report(json_file: Path, results: dict[str, Any]) -> None:
    text = report(results)
    write_atomically(json_file.with_suffix(".md"), lambda path: path.write_text(text, encoding="utf-8"))
    if "curves" in results:
        curves = _module("curves")
        picture = json_file.with_name(curves.PICTURE)
        write_atomically(picture, lambda path: curves.plot(results["curves"]["result"], path))


def _module(case: str) -> Any:
    return importlib.import_module(f"selection_{case}")


if __name__ == "__main__":
    main()
