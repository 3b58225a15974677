"""Which samples to train on, and in which order: scores, max-min selection, curriculum, store and ledger."""

from minirec_pl.selection.curriculum import default_folds, fold_curriculum, fold_starts
from minirec_pl.selection.diagnostics import Diagnostics, diagnose
from minirec_pl.selection.diversity import Selection, maxmin_select
from minirec_pl.selection.learnability import group_difficulty, learnability
from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.merge import merge_stores
from minirec_pl.selection.representativeness import representativeness
from minirec_pl.selection.selectors import MiniRecSelector, RandomSelector, Selector
from minirec_pl.selection.session import SelectionSession, session_of
from minirec_pl.selection.signals import SampleSignals, Signals
from minirec_pl.selection.store import SignalStore

__all__ = [
    "Diagnostics",
    "MiniRecSelector",
    "RandomSelector",
    "SampleSignals",
    "Selection",
    "SelectionLedger",
    "SelectionSession",
    "Selector",
    "SignalStore",
    "Signals",
    "default_folds",
    "diagnose",
    "fold_curriculum",
    "fold_starts",
    "group_difficulty",
    "learnability",
    "maxmin_select",
    "merge_stores",
    "representativeness",
    "session_of",
]
