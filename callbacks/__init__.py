"""Callbacks that choose and order the training samples of any Lightning run."""

from minirec_pl.callbacks.completions_table import CompletionsTable
from minirec_pl.callbacks.curriculum import Curriculum
from minirec_pl.callbacks.easy_to_hard_curriculum import EasyToHardCurriculum
from minirec_pl.callbacks.gaussian_curriculum import GaussianCurriculum
from minirec_pl.callbacks.hard_to_easy_curriculum import HardToEasyCurriculum
from minirec_pl.callbacks.minirec import MiniRec
from minirec_pl.callbacks.moving_target_curriculum import MovingTargetCurriculum
from minirec_pl.callbacks.rescore_samples import RescoreSamples
from minirec_pl.callbacks.reward_history import RewardHistory
from minirec_pl.callbacks.run_folder import RunFolder
from minirec_pl.callbacks.select_samples import SelectSamples
from minirec_pl.callbacks.selection_dashboard import SelectionDashboard

__all__ = [
    "CompletionsTable",
    "Curriculum",
    "EasyToHardCurriculum",
    "GaussianCurriculum",
    "HardToEasyCurriculum",
    "MiniRec",
    "MovingTargetCurriculum",
    "RescoreSamples",
    "RewardHistory",
    "RunFolder",
    "SelectSamples",
    "SelectionDashboard",
]
