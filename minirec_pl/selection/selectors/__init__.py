"""Selectors: from the signals of a pool to a ranked pick."""

from minirec_pl.selection.selectors.baselines import FullSelector, KCenterSelector, KMeansSelector, RandomSelector
from minirec_pl.selection.selectors.minirec import MiniRecSelector
from minirec_pl.selection.selectors.protocol import Selector
from minirec_pl.selection.selectors.score_based import (
    DEALRecSelector,
    EL2NSelector,
    GraNdSelector,
    LearnAlignSelector,
    RewardVarianceSelector,
)

__all__ = [
    "DEALRecSelector",
    "EL2NSelector",
    "FullSelector",
    "GraNdSelector",
    "KCenterSelector",
    "KMeansSelector",
    "LearnAlignSelector",
    "MiniRecSelector",
    "RandomSelector",
    "RewardVarianceSelector",
    "Selector",
]
