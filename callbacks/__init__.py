"""Callbacks that choose and order the training samples of any Lightning run."""

from minirec_pl.callbacks.completions_table import CompletionsTable
from minirec_pl.callbacks.easy_to_hard_curriculum import EasyToHardCurriculum
from minirec_pl.callbacks.minirec import MiniRec
from minirec_pl.callbacks.rescore_samples import RescoreSamples
from minirec_pl.callbacks.reward_history import RewardHistory
from minirec_pl.callbacks.select_samples import SelectSamples
from minirec_pl.run_folder import RunFolder

__all__ = [
    "CompletionsTable",
    "EasyToHardCurriculum",
    "MiniRec",
    "RescoreSamples",
    "RewardHistory",
    "RunFolder",
    "SelectSamples",
]
