"""Reward functions for the option `rewards`: named by their dotted path in YAML, or passed as objects."""

from minirec_pl.rewards.functions import (
    FormatReward,
    NDCGReward,
    ReciprocalRankReward,
    SoftmaxMixReward,
    hit,
    rank_penalty,
)
from minirec_pl.rewards.hit_or_miss import hit_or_miss

__all__ = [
    "FormatReward",
    "NDCGReward",
    "ReciprocalRankReward",
    "SoftmaxMixReward",
    "hit",
    "hit_or_miss",
    "rank_penalty",
]
