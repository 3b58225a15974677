"""What the language model is and how it recommends."""

from minirec_pl.policy.generator import GenerativePolicy
from minirec_pl.policy.rollout import Rollouts

__all__ = ["GenerativePolicy", "Rollouts"]
