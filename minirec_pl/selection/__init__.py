"""Which samples to train on, and in which order: scores, max-min selection, curriculum, store and ledger."""

from minirec_pl.selection.calibration import Calibration, calibration
from minirec_pl.selection.curriculum import (
    default_folds,
    fold_curriculum,
    fold_starts,
    gaussian_curriculum,
    hard_to_easy_curriculum,
    move_target,
    shuffled_curriculum,
    target_curriculum,
)
from minirec_pl.selection.diagnostics import Diagnostics, diagnose
from minirec_pl.selection.expected_update import GroupMoments, expected_update, group_moments
from minirec_pl.selection.learnability import group_difficulty, learnability, update_learnability
from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.maxmin.greedy import Selection, maxmin_select
from minirec_pl.selection.merge import merge_stores
from minirec_pl.selection.predicted import PredictedDifficulty
from minirec_pl.selection.representativeness import representativeness
from minirec_pl.selection.selectors.baselines import FullSelector, KCenterSelector, KMeansSelector, RandomSelector
from minirec_pl.selection.selectors.minirec import MiniRecSelector
from minirec_pl.selection.selectors.outcome_based import GRESOSelector, MoPPSSelector
from minirec_pl.selection.selectors.predicted import PredictedSelector
from minirec_pl.selection.selectors.protocol import Selector
from minirec_pl.selection.selectors.score_based import (
    DEALRecSelector,
    EL2NSelector,
    ExpectedUpdateSelector,
    GraNdSelector,
    LearnAlignSelector,
    RewardVarianceSelector,
)
from minirec_pl.selection.session.session import SelectionSession, session_of
from minirec_pl.selection.signals import SampleSignals, Signals
from minirec_pl.selection.store import SignalStore

__all__ = [
    "Calibration",
    "DEALRecSelector",
    "Diagnostics",
    "EL2NSelector",
    "ExpectedUpdateSelector",
    "FullSelector",
    "GRESOSelector",
    "GraNdSelector",
    "GroupMoments",
    "KCenterSelector",
    "KMeansSelector",
    "LearnAlignSelector",
    "MiniRecSelector",
    "MoPPSSelector",
    "PredictedDifficulty",
    "PredictedSelector",
    "RandomSelector",
    "RewardVarianceSelector",
    "SampleSignals",
    "Selection",
    "SelectionLedger",
    "SelectionSession",
    "Selector",
    "SignalStore",
    "Signals",
    "calibration",
    "default_folds",
    "diagnose",
    "expected_update",
    "fold_curriculum",
    "fold_starts",
    "gaussian_curriculum",
    "group_difficulty",
    "group_moments",
    "hard_to_easy_curriculum",
    "learnability",
    "maxmin_select",
    "merge_stores",
    "move_target",
    "representativeness",
    "session_of",
    "shuffled_curriculum",
    "target_curriculum",
    "update_learnability",
]
