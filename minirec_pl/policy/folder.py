"""A policy on disk: an ordinary Hugging Face folder with a side file that holds the catalogue."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from minirec_pl.data.samples import Catalogue
from minirec_pl.policy.language_models.adapters import Lora
from minirec_pl.policy.language_models.pretrained import LanguageModel, save_language_model
from minirec_pl.policy.language_models.tiny import item_tokenizer
from minirec_pl.policy.prompt import PromptTemplate
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import replace_folder

SIDE_FILE = "minirec.json"


class Chat(NamedTuple):
    """What a policy on a pretrained language model has besides.

    Attributes:
        language_model: how it was first loaded.
        tokenizer: of the model, with the tokens that were added.
        prompt: what is asked.
        kind: of the item ids, see `minirec_pl.policy.item_ids`.
        id_texts: the id of each item as text, [n_items].
    """

    language_model: LanguageModel
    tokenizer: Any
    prompt: PromptTemplate
    kind: str
    id_texts: list[str]


class StoredPolicy(NamedTuple):
    """What a folder holds.

    Attributes:
        model: the causal language model in training mode: float32, or as its language model says.
        catalogue: the items it recommends.
        item_tokens: int64 [n_items, L], padded with -1.
        training_cost: `Cost.state_dict()` of the runs that made it, or empty.
        chat: for a pretrained language model; None for one with a token for each item and nothing else.
    """

    model: Any
    catalogue: Catalogue
    item_tokens: Tensor
    training_cost: dict[str, Any]
    chat: Chat | None = None


def read_policy(folder: Path) -> StoredPolicy:
    """Reads a folder that `write_policy` wrote.

    Raises:
        InputError: if there is no policy in the folder, or it is damaged.
    """
    side = folder / SIDE_FILE
    if not side.is_file():
        raise InputError(
            f"no policy in '{folder}' ({SIDE_FILE} is missing): train one first, for example with "
            "`minirec fit --config configs/ml-100k/warm-start.yaml`, or give its folder as "
            "policy.init_args.pretrained"
        )
    try:
        stored = json.loads(side.read_text(encoding="utf-8"))
        catalogue = Catalogue(stored["item_ids"], stored["titles"], stored.get("texts"))
        item_tokens = torch.tensor(stored["item_tokens"])
        if "language_model" in stored:
            model, chat = _read_chat(folder, stored)
        else:
            model, chat = _read_plain(folder), None
        vocabulary = len(model.get_input_embeddings().weight)
        if item_tokens.ndim != 2 or item_tokens.is_floating_point() or len(item_tokens) != len(catalogue):
            raise ValueError(f"{SIDE_FILE} does not give each of the {len(catalogue)} items its tokens")
        if int(item_tokens.max()) >= vocabulary:
            raise ValueError(f"{SIDE_FILE} names token {int(item_tokens.max())} of a vocabulary of {vocabulary}")
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, InputError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the policy in '{folder}' cannot be read ({reason}): train or copy it again") from error
    return StoredPolicy(model.train(), catalogue, item_tokens, stored.get("training_cost", {}), chat)


def _read_plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    read: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    model, loaded = read
    if loaded["missing_keys"]:
        raise ValueError(f"weights are missing: {', '.join(sorted(loaded['missing_keys'])[:3])}")
    return model


def _read_chat(folder: Path, stored: Mapping[str, Any]) -> tuple[Any, Chat]:
    options = dict(stored["language_model"])
    lora = None if options["lora"] is None else Lora(**options.pop("lora"))
    first = LanguageModel(**{**options, "lora": lora})
    model, tokenizer = replace(first, name=str(folder), lora=None).load()
    texts = stored["id_texts"]
    if len(texts) != len(stored["item_ids"]):
        raise ValueError(f"{SIDE_FILE} has {len(texts)} id_texts for {len(stored['item_ids'])} items")
    return model, Chat(first, tokenizer, PromptTemplate(**stored["prompt"]), stored["id_kind"], texts)


def write_policy(folder: Path, policy: StoredPolicy) -> None:
    """Writes model, tokenizer and side file beside `folder`, then moves them into its place.

    Raises:
        InputError: if `folder` holds something else than a policy, or cannot be written; it is then left as it was.
    """
    catalogue, chat = policy.catalogue, policy.chat
    side: dict[str, Any] = {
        "item_ids": catalogue.item_ids,
        "titles": catalogue.titles,
        "item_tokens": policy.item_tokens.tolist(),
        "training_cost": policy.training_cost,
    }
    if chat is not None:
        side |= {
            "texts": catalogue.texts,
            "language_model": asdict(chat.language_model),
            "prompt": asdict(chat.prompt),
            "id_kind": chat.kind,
            "id_texts": chat.id_texts,
        }

    def write(new: Path) -> None:
        if chat is None:
            policy.model.save_pretrained(new)
            item_tokenizer(catalogue.item_ids).save_pretrained(new)
        else:
            save_language_model(policy.model, chat.tokenizer, new)
        (new / SIDE_FILE).write_text(json.dumps(side), encoding="utf-8")

    replace_folder(folder, write, holds=SIDE_FILE, what="policy")
