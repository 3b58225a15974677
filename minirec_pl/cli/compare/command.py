"""`minirec compare`: its options; what they start is imported once they are known to be right."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def run(args: Sequence[str]) -> int:
    """Runs the command.

    Args:
        args: as on the command line, without `compare`.

    Returns:
        0; 1 if a cell failed.

    Raises:
        InputError: for a study, cell, pattern or folder that cannot be used.
    """
    options = _parser().parse_args(args)
    from minirec_pl.cli.compare.running import run_study

    return run_study(options)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give at least 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minirec compare",
        description="Compares selection methods at equal cost: every cell of a study (data set, method, budget, seed) "
        "starts from the same warm policy, counts every token and second, and is evaluated on validation and test "
        "before training and after each epoch. The same command goes on where an interrupted one stopped.",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="study, such as benchmarks/studies/data_efficiency.yaml"
    )
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="folder for warm starts, cells and the table STUDY.parquet"
    )
    parser.add_argument(
        "--jobs", type=_positive, default=1, metavar="N", help="worker processes, one core each (default: 1)"
    )
    parser.add_argument("--cell", metavar="ID", help="run this cell only, such as ml-100k/late/random/0.1/42")
    parser.add_argument("--only", metavar="PATTERN", help="run the cells whose id matches, such as '*/random/*'")
    parser.add_argument("--time-limit", type=float, metavar="MIN", help="begin no cell after so many minutes")
    parser.add_argument(
        "--path",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="folder with the files of a data set, instead of the study's; may be repeated",
    )
    return parser
