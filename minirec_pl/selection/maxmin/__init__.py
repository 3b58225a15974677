"""Max-min selection: high scores that are far from each other."""

from minirec_pl.selection.maxmin.greedy import NearestPick, Selection, maxmin_select, nearest_pick

__all__ = ["NearestPick", "Selection", "maxmin_select", "nearest_pick"]
