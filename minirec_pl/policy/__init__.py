"""What the language model is and how it recommends."""

from minirec_pl.policy.adapters import Lora
from minirec_pl.policy.generation import Completions, Sampling, generate
from minirec_pl.policy.generator import GenerativePolicy
from minirec_pl.policy.language_model import LanguageModel
from minirec_pl.policy.logps import TokenLogps, completion_logps
from minirec_pl.policy.prompt import PromptTemplate
from minirec_pl.policy.retriever import RetrievalPolicy
from minirec_pl.policy.rollout import Rollouts, rollout_generator

Recommender = GenerativePolicy | RetrievalPolicy

__all__ = [
    "Completions",
    "GenerativePolicy",
    "LanguageModel",
    "Lora",
    "PromptTemplate",
    "Recommender",
    "RetrievalPolicy",
    "Rollouts",
    "Sampling",
    "TokenLogps",
    "completion_logps",
    "generate",
    "rollout_generator",
]
