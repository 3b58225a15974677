"""Selectors: from the signals of a pool to a ranked pick; users import them from `minirec_pl.selection`."""

from minirec_pl.selection.selectors.minirec import MiniRecSelector
from minirec_pl.selection.selectors.protocol import Selector

__all__ = ["MiniRecSelector", "Selector"]
