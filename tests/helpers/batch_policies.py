"""Tiny policies in float64, built once, and drawn batches of their prompts."""

import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import GenerativePolicy, LanguageModel, PromptTemplate, RetrievalPolicy
from minirec_pl.policy.folder import StoredPolicy, write_policy
from minirec_pl.policy.language_models.tiny import build_tiny
from minirec_pl.policy.semantic_ids import SemanticIds

from .batch_cases import in_float64, pad_columns, root
from .plain_policy import CONFIG, padded, shaken, unequal_ids
from .text_policy import toy_catalogue, write_model

N_ITEMS, LONGEST = 12, 60
LLAMA = {**CONFIG, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 512}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 512}
GPT2 |= dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0)
SHORT = PromptTemplate(system="", user="{history}", item="{title}", separator="; ", age="", rating=" {rating}")


def prepared(policy):
    """In float64, with weights far from zero."""
    policy.model = shaken(in_float64(policy.model))
    return policy.eval()


@functools.cache
def text_folder():
    """A language model with absolute positions and a byte-level tokenizer with a chat template."""
    folder = write_model(root() / "text")
    tokens = {"vocab_size": 400, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT2, **tokens)).save_pretrained(folder)
    return str(folder)


@functools.cache
def generative(kind):
    """With ids of one token by `llama` or `gpt2`; of `many` tokens; `title`, `semantic` or `token` ids in words."""
    torch.manual_seed(0)
    if kind in ("llama", "gpt2"):
        policy = GenerativePolicy(config=LLAMA if kind == "llama" else {"model_type": "gpt2", **GPT2})
        policy.bind(Catalogue([f"i{i}" for i in range(N_ITEMS)]))
    elif kind == "many":
        model, catalogue = build_tiny({"model_type": "gpt2", **GPT2}, 7), Catalogue([f"i{i}" for i in range(N_ITEMS)])
        write_policy(root() / "many", StoredPolicy(model, catalogue, padded(unequal_ids(N_ITEMS)), {}))
        policy = GenerativePolicy(pretrained=str(root() / "many"))
    else:
        semantic = SemanticIds(levels=2, codes=3) if kind == "semantic" else None
        model = LanguageModel(text_folder(), dtype="float32")
        policy = GenerativePolicy(language_model=model, item_ids=kind, semantic_ids=semantic, prompt=SHORT)
        policy.bind(toy_catalogue(N_ITEMS))
    return prepared(policy)


KINDS = ("llama", "gpt2", "many", "title", "semantic", "token")


@functools.cache
def retriever():
    """With fresh vectors."""
    torch.manual_seed(0)
    model = LanguageModel(text_folder(), dtype="float32")
    policy = RetrievalPolicy(model, prompt=SHORT, max_completion_length=4, similarity_temperature=0.5)
    policy.bind(toy_catalogue(N_ITEMS))
    prepared(policy)
    policy.double()
    policy.refresh_items()
    return policy


def samples(case, longest=None, left=4):
    """Histories of 0 to 20 items, at times 60, what has been seen and an unseen target; `left` items are unseen."""
    longest = longest or case.pick(20, 20, 20, 20, LONGEST)
    history, real = case.padded(case.lengths(0, longest), 0, N_ITEMS, left=True, fill=-1)
    if not history.shape[1]:
        history, real = torch.full((case.n, 1), -1), torch.zeros(case.n, 1, dtype=torch.bool)
    seen, _ = case.padded(case.lengths(0, N_ITEMS - left - 1), 0, N_ITEMS, left=False, fill=-1)
    unseen = [[item for item in range(N_ITEMS) if item not in row] for row in seen.tolist()]
    rating = case.integers(1, 6, *history.shape).double().where(case.flags(*history.shape), torch.nan)
    return {
        "history": history,
        "history_rating": rating.where(real, torch.nan),
        "history_age": case.uniform(*history.shape) * 10**6,
        "seen": seen,
        "target": torch.tensor([case.random.choice(row) for row in unseen], dtype=torch.int64),
        "sample_id": case.permutation(10 * case.n)[: case.n],
        "user": case.integers(0, 5, case.n),
    }


def pad_samples(case):
    """More columns in histories, on the left or in the middle, and in `seen`."""
    history = [("history", -1), ("history_rating", torch.nan), ("history_age", 0.0)]
    return lambda part: pad_columns(case, part, left=history, right=[("seen", -1)], anywhere=history)
