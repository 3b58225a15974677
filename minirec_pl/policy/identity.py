"""What a policy on a language model is, as facts: its tokenizer, base model, prompt and item ids."""

from __future__ import annotations

import json
import re
from typing import Any

from torch import nn

from minirec_pl.data.identity import text_table
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy.catalogue_text import rows_of
from minirec_pl.policy.language_models.model_config import text_config
from minirec_pl.utils.checkpoints import weights_digest, weights_under_adapters
from minirec_pl.utils.identity import Identity, fact

_NOT_ITS_KIND = re.compile(r"dropout|pdrop|_token_id|initializer|cache|version|chunk|num_labels|vocab_size")
_SAMPLED = 4096  # values of a weight
_STATE = ("padding", "truncation")  # of a tokenizer, as it was last called


def tokenizer_fact(tokenizer: Any) -> str:
    """Makes the fact of a tokenizer: its vocabulary and rules, its special tokens and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    rules = {name: value for name, value in rules.items() if name not in _STATE}
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    known = [rules, special, str(getattr(tokenizer, "chat_template", None))]
    return fact(f"{len(tokenizer)} tokens", json.dumps(known, sort_keys=True).encode())


def model_facts(model: Any) -> dict[str, str]:
    """Makes a fact of each number and name in a model's config that says how it computes."""
    settings = {"model_type": getattr(model.config, "model_type", ""), **text_config(model).to_dict()}
    return {
        f"base_model.{name}": str(value)
        for name, value in sorted(settings.items())
        if isinstance(value, int | float | str)
        and not isinstance(value, bool)
        and not name.startswith("_")
        and not _NOT_ITS_KIND.search(name)
        and name not in ("dtype", "torch_dtype")
    }


def base_fact(model: nn.Module) -> str:
    """Makes the fact of the weights that training starts from, those under adapters, from 4,096 values of each.

    Embedding and head are left out, which get rows for new tokens.
    """
    rows = rows_of(model)
    fixed = weights_under_adapters(model) or dict(model.named_parameters())
    sampled = {
        f"{name} {tuple(weight.shape)}": weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLED)].float()
        for name, weight in fixed.items()
        if len(weight) != rows
    }
    return fact(f"{len(sampled)} weights", weights_digest(sampled).encode())


def texts_identity(catalogue: Catalogue) -> Identity:
    """The titles and texts that a policy reads."""
    table = text_table(catalogue)
    return Identity({f"texts.{name}": value for name, value in table.facts().items()}, lambda: {"texts": table})


def other_item(catalogue: Catalogue, new: Catalogue) -> str:
    """Names the first item of a new catalogue that is not at its place in the old one, for a sentence."""
    pairs = enumerate(zip(catalogue.item_ids, new.item_ids, strict=False))
    found = next(((place, old, own) for place, (old, own) in pairs if old != own), None)
    return "" if found is None else f" (item {found[0]} is {found[2]!r} here and {found[1]!r} there)"
