"""What the language model is and how it recommends."""

from minirec_pl.policy.generative import GenerativePolicy
from minirec_pl.policy.interface import Policy
from minirec_pl.policy.language_models.adapters import Lora
from minirec_pl.policy.language_models.generation import Completions, Sampling, generate
from minirec_pl.policy.language_models.logps import TokenLogps, completion_logps
from minirec_pl.policy.language_models.pretrained import LanguageModel
from minirec_pl.policy.language_models.sampling import Rollouts, rollout_generator
from minirec_pl.policy.prompt import PromptTemplate
from minirec_pl.policy.retrieval import RetrievalPolicy
from minirec_pl.policy.semantic_ids import SemanticIds

__all__ = [
    "Completions",
    "GenerativePolicy",
    "LanguageModel",
    "Lora",
    "Policy",
    "PromptTemplate",
    "RetrievalPolicy",
    "Rollouts",
    "Sampling",
    "SemanticIds",
    "TokenLogps",
    "completion_logps",
    "generate",
    "rollout_generator",
]
