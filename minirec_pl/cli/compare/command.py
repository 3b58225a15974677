"""`minirec compare`: its options; what they start is imported once they are known to be right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minirec_pl.cli.compare.study import Study
from minirec_pl.cli.terminal import CommandParser
from minirec_pl.utils.errors import InputError


def parser() -> CommandParser:
    """Makes the parser of `minirec compare`."""
    made = CommandParser(
        prog="minirec compare",
        description="Compares selection methods at equal cost: every cell of a study (data set, method, budget, seed) "
        "starts from the same warm policy, counts every token and second, and is evaluated on validation and test "
        "before training and after each epoch. The same command resumes where an interrupted one stopped.",
    )
    made.add_argument(
        "--config", required=True, metavar="FILE", help="study, such as benchmarks/studies/data_efficiency.yaml"
    )
    made.add_argument(
        "--to", required=True, metavar="DIR", help="folder for warm starts, cells and the table STUDY.parquet"
    )
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="worker processes, one core each")
    made.add_argument("--cell", metavar="ID", help="run this cell only, such as ml-100k/late/random/0.1/42")
    made.add_argument("--only", metavar="PATTERN", help="run the cells whose id matches, such as '*/random/*'")
    made.add_argument("--time-limit", type=float, metavar="MIN", help="begin no cell after so many minutes")
    made.add_argument(
        "--path",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="folder with the files of a data set, instead of the study's; may be repeated",
    )
    return made


def run(arguments: Sequence[str]) -> int:
    """Runs `minirec compare` on the words that follow it; returns 1 if a cell failed, else 0."""
    options = parser().parse_args(arguments)
    if options.jobs < 1:
        raise InputError(f"--jobs is {options.jobs}: give at least 1")
    if options.time_limit is not None and not options.time_limit >= 0:
        raise InputError(f"--time-limit is {options.time_limit}: give minutes, at least 0")
    study = Study.read(Path(options.config), _paths(options.path))
    from minirec_pl.cli.compare.running import compare

    return compare(study, options)


def _paths(given: Sequence[str]) -> dict[str, str]:
    paths = {}
    for word in given:
        name, equals, folder = word.partition("=")
        if not equals:
            raise InputError(f"--path {word!r}: write NAME=DIR, a data set of the study and the folder of its files")
        paths[name] = folder
    return paths
