"""`minirec report`: run folders as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minirec_pl.cli.terminal import CommandParser
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import write_atomically

PAGE = "report.html"


def report(folders: Sequence[str | Path], to: str | Path | None = None) -> Path:
    """Writes the report of runs: what they reached, what they picked, what it cost.

    The page holds its pictures, loads nothing and runs no script. The same folders give the same page.

    Args:
        folders: see `minirec_pl.reporting.runs.read_runs`.
        to: file to write; None takes `report.html` in the first folder.

    Returns:
        The file.

    Raises:
        InputError: if matplotlib or jinja2 is missing, a folder cannot be read, or the file cannot be written.

    Example:
        >>> report(["runs/quickstart"])  # doctest: +SKIP
        PosixPath('runs/quickstart/report.html')
    """
    try:
        import jinja2

        from minirec_pl.reporting.sections import sections
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("minirec_pl"):
            raise
        raise InputError(f"minirec report needs {error.name}: pip install 'minirec-pl[report]'") from error
    from minirec_pl.reporting.runs import read_runs

    rows, runs = read_runs([Path(folder) for folder in folders])
    loader = jinja2.PackageLoader("minirec_pl.reporting", "")
    pages = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    title = ", ".join(f"{run.name} ({run.method})" if run.method else run.name for run in runs)
    page = pages.get_template("page.html.j2").render(title=title, sections=sections(rows, runs))
    path = Path(to) if to else Path(folders[0]) / PAGE
    return write_atomically(path, lambda scratch: scratch.write_text(page, encoding="utf-8"))


def parser() -> CommandParser:
    """Makes the parser of `minirec report`."""
    made = CommandParser(
        prog="minirec report",
        description="Writes one HTML page about runs: quality and its cost, what was picked and why, the plan, samples "
        "in words, the config. It opens without a network.",
    )
    made.add_argument(
        "folders",
        nargs="+",
        metavar="RUN_DIR",
        help="folder of a fit (version_N), of runs (its latest is taken), of a quickstart, or with a ledger.parquet",
    )
    made.add_argument("--to", metavar="FILE.html", help=f"file to write; {PAGE} in the first folder if it is not given")
    return made


def run(arguments: Sequence[str]) -> None:
    """Runs `minirec report` on the words that follow it."""
    options = parser().parse_args(arguments)
    print(f"report: {report(options.folders, options.to)}")
