"""The LightningModules: warm start and GRPO."""

from minirec_pl.trainers.grpo import GRPORecModule
from minirec_pl.trainers.recommender import RecModule
from minirec_pl.trainers.warm_start import WarmStartModule

__all__ = ["GRPORecModule", "RecModule", "WarmStartModule"]
