"""What `minirec check` has found, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from minirec_pl.cli.estimates import Load, Memory, peak

Level = Literal["ok", "warning", "fails"]
GIB = 2**30
_COLOURS = {"ok": "green", "warning": "yellow", "fails": "red"}


class Finding(NamedTuple):
    """One line of the report."""

    level: Level
    what: str
    text: str


class Prompts(NamedTuple):
    """What prompts look like.

    Attributes:
        text: the first one.
        lengths: tokens of some from all over the pool.
        completion: tokens of a completion at most.
    """

    text: str
    lengths: list[int]
    completion: int


def report(
    findings: Sequence[Finding], prompts: Prompts | None, load: Load | None, memory: Memory | None, console: Console
) -> None:
    """Prints what was found, as far as it was found."""
    if prompts is not None:
        shortest, longest = min(prompts.lengths), max(prompts.lengths)
        title = f"a prompt: {prompts.lengths[0]} tokens (others {shortest} to {longest})"
        console.print(Panel(escape(prompts.text), title=title, title_align="left"))
    if load is not None and memory is not None:
        table = Table(title="What the fit needs, at most", show_header=False)
        table.add_column("what")
        table.add_column("figure", justify="right")
        for name, size in memory._asdict().items():
            table.add_row(f"memory: {name}", f"{size / GIB:.2f} GiB")
        table.add_row("memory at the fullest moment", f"{peak(memory) / GIB:.2f} GiB")
        table.add_section()
        table.add_row("samples an epoch, of the pool", f"{load.selected:,} of {load.pool:,}")
        for phase, count in load.rollouts().items():
            table.add_row(f"rollouts: {phase}", f"{count:,}")
        for kind, count in load.tokens().items():
            table.add_row(f"tokens: {kind}", f"{count:,}")
        console.print(table)
    for level, what, text in findings:
        console.print(f"[{_COLOURS[level]}]{level:8}[/] {what}: {escape(text)}", soft_wrap=True, highlight=False)
    verdict = (
        "the fit would fail"
        if any(found.level == "fails" for found in findings)
        else "nothing stands in the way of the fit"
    )
    console.print(verdict, highlight=False)
