"""Methods compared at equal cost: a study is a YAML file, its cells are runs, its result is one tidy table."""

from minirec_pl.cli.compare.study import Cell, Study

__all__ = ["Cell", "Study"]
