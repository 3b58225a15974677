"""A policy on disk: an ordinary Hugging Face folder with a side file that holds the catalogue."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minirec_pl.data.samples import Catalogue
from minirec_pl.policy.catalogue_text import Text, joined
from minirec_pl.policy.identity import base_fact, tokenizer_fact
from minirec_pl.policy.item_index import ItemIndex
from minirec_pl.policy.language_models.adapters import Lora
from minirec_pl.policy.language_models.causal_lm import without_adapter_wrapper
from minirec_pl.policy.language_models.pretrained import LanguageModel, save_language_model
from minirec_pl.policy.language_models.tiny import item_tokenizer, word_tokenizer
from minirec_pl.policy.prompt import PromptTemplate
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import replace_folder
from minirec_pl.utils.run_folder import SIDE_FILE, policy_file

ITEMS_FILE = "items.safetensors"
_KIND, _MADE_FOR, _PARTS = "retrieval", "made_for", "made_of"


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
        chat: for a pretrained language model; None for one whose tokens are those of item ids and nothing else.
        words: of the latter, the names of these tokens; None where each item has one.
        made_for: see `minirec_pl.policy.interface.Policy`.
    """

    model: Any
    catalogue: Catalogue
    item_tokens: Tensor
    training_cost: dict[str, Any]
    chat: Chat | None = None
    words: list[str] | None = None
    made_for: Mapping[str, str] | None = None


def read_policy(folder: Path) -> StoredPolicy:
    """Reads a folder that `write_policy` wrote.

    Raises:
        InputError: if there is no policy in the folder, or it is damaged.
    """
    side = policy_file(folder)
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
    cost, words = stored.get("training_cost", {}), stored.get("words")
    return StoredPolicy(model.train(), catalogue, item_tokens, cost, chat, words, stored.get(_MADE_FOR))


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
    check_parts(model, tokenizer, stored.get(_PARTS, {}))
    texts = stored["id_texts"]
    if len(texts) != len(stored["item_ids"]):
        raise ValueError(f"{SIDE_FILE} has {len(texts)} id_texts for {len(stored['item_ids'])} items")
    return model, Chat(first, tokenizer, PromptTemplate(**stored["prompt"]), stored["id_kind"], texts)


def _made_of(model: Any, tokenizer: Any) -> dict[str, str]:
    """Facts of what lies in a folder beside the trained weights, or is only named there."""
    adapted = without_adapter_wrapper(model) is not model
    return {"tokenizer": tokenizer_fact(tokenizer), **({"base_model": base_fact(model)} if adapted else {})}


def check_parts(model: Any, tokenizer: Any, made_of: Mapping[str, str]) -> None:
    """Refuses a tokenizer, or a model under adapters, that is not the one that a folder was written with.

    Args:
        model: as loaded.
        tokenizer: as loaded.
        made_of: the facts that the folder holds.

    Raises:
        InputError: naming the part.
    """
    for part, own in _made_of(model, tokenizer).items():
        if made_of.get(part, own) != own:
            what = "the model under its adapters" if part == "base_model" else "its tokenizer"
            raise InputError(f"{what} is not the one that it was trained with: put that back")


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
        _MADE_FOR: policy.made_for and dict(policy.made_for),
    }
    if policy.words is not None:
        side["words"] = policy.words
    if chat is not None:
        side |= {
            "texts": catalogue.texts,
            "language_model": asdict(chat.language_model),
            "prompt": asdict(chat.prompt),
            "id_kind": chat.kind,
            "id_texts": chat.id_texts,
            _PARTS: _made_of(policy.model, chat.tokenizer),
        }

    def write(new: Path) -> None:
        if chat is None:
            policy.model.save_pretrained(new)
            words = policy.words
            tokenizer = item_tokenizer(catalogue.item_ids) if words is None else word_tokenizer(words)
            tokenizer.save_pretrained(new)
        else:
            save_language_model(policy.model, chat.tokenizer, new)
        (new / SIDE_FILE).write_text(json.dumps(side), encoding="utf-8")

    replace_folder(folder, write, holds=SIDE_FILE, what="policy")


@dataclass(frozen=True)
class RetrieverText:
    """What a retrieval policy reads and writes, which it is trained for; see `RetrievalPolicy`.

    Raises:
        InputError: if an option is out of range.
    """

    prompt: PromptTemplate = field(default_factory=PromptTemplate)
    answer_marker: str = "<answer>"
    item_prompt: str = "{text}"
    similarity_temperature: float = 0.02
    max_completion_length: int = 256
    longest_item: int = 128

    def __post_init__(self) -> None:
        if not self.answer_marker.strip():
            raise InputError("answer_marker is empty: give a text, for example <answer>")
        if "{text}" not in self.item_prompt:
            raise InputError("item_prompt does not say where the item's text goes: put {text} into it")
        if not 0 < self.similarity_temperature < math.inf:
            raise InputError(
                f"similarity_temperature is {self.similarity_temperature}: it divides the cosines, so give one above 0"
            )
        if self.max_completion_length < 0 or self.longest_item < 1:
            raise InputError(
                f"max_completion_length is {self.max_completion_length} and longest_item {self.longest_item}: give at "
                "least 0 and 1 tokens"
            )

    def item_text(self, text: str) -> Text:
        """What the model reads of an item with this text, and which of it is from the catalogue."""
        first, *others = self.item_prompt.split("{text}")
        return joined(
            [(first, False), *((part, own) for other in others for part, own in ((text, True), (other, False)))]
        )

    def updated(self, **options: Any) -> RetrieverText:
        """With those of the options that are not None."""
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    def facts(self) -> dict[str, str]:
        """What the texts that the model reads are made with, see `Policy.identity`."""
        prompt = {f"prompt.{name}": str(value) for name, value in asdict(self.prompt).items()}
        own = {name: str(getattr(self, name)) for name in ("answer_marker", "item_prompt", "longest_item")}
        return {**prompt, **own}

    def unlike(self, other: RetrieverText) -> str:
        """Says in words which options differ from those of another, and what they were."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        changed = [f"another {name} ({mine!r}, before {old!r})" for name, mine, old in pairs if mine != old]
        return " and ".join(changed)


class StoredRetriever(NamedTuple):
    """What a folder says of its policy.

    Attributes:
        language_model: the model in the folder, to train further.
        text: see `RetrieverText`.
        training_cost: `Cost.state_dict()` of the runs that made it, or empty.
        made_for: see `minirec_pl.policy.interface.Policy`.
        made_of: see `check_parts`.
    """

    language_model: LanguageModel
    text: RetrieverText
    training_cost: dict[str, Any]
    made_for: Mapping[str, str] | None
    made_of: Mapping[str, str]


def read_retriever(folder: Path) -> StoredRetriever:
    """Reads the side file that `write_retriever` wrote.

    Raises:
        InputError: if there is no retrieval policy in the folder, or it is damaged.
    """
    side = policy_file(folder)
    try:
        stored = json.loads(side.read_text(encoding="utf-8"))
        if stored.get("kind") != _KIND:
            raise InputError(f"the policy in '{folder}' generates items: load it as a GenerativePolicy")
        text = {f.name: stored["text"][f.name] for f in fields(RetrieverText)}
        text["prompt"] = PromptTemplate(**text["prompt"])
        model = LanguageModel(str(folder), **stored["language_model"])
        facts = stored.get(_MADE_FOR), stored.get(_PARTS, {})
        return StoredRetriever(model, RetrieverText(**text), stored["training_cost"], *facts)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the policy in '{folder}' cannot be read ({reason}): train or copy it again") from error


def write_retriever(
    folder: Path,
    *,
    model: Any,
    tokenizer: Any,
    language_model: LanguageModel,
    text: RetrieverText,
    index: ItemIndex | None,
    training_cost: dict[str, Any],
    made_for: Mapping[str, str] | None,
) -> None:
    """Writes a folder that `read_retriever` reads.

    Raises:
        InputError: if `folder` holds something else than a policy, or cannot be written; it is then left as it was.
    """

    def write(new: Path) -> None:
        save_language_model(model, tokenizer, new)
        side = {
            "kind": _KIND,
            "language_model": {
                "dtype": language_model.dtype,
                "gradient_checkpointing": language_model.gradient_checkpointing,
            },
            "text": asdict(text),
            "training_cost": training_cost,
            _MADE_FOR: made_for and dict(made_for),
            _PARTS: _made_of(model, tokenizer),
        }
        (new / SIDE_FILE).write_text(json.dumps(side), encoding="utf-8")
        if index is not None:
            metadata = {"weights": _weights_digest(new), "items": index.fingerprint}
            save_file({"vectors": index.vectors.cpu().contiguous()}, new / ITEMS_FILE, metadata=metadata)

    replace_folder(folder, write, holds=SIDE_FILE, what="policy")


def stored_vectors(folder: Path, index: ItemIndex) -> Tensor | None:
    """Vectors of these very items by the very weights in the folder, [n, D]; None if there are none."""
    if not (folder / ITEMS_FILE).is_file():
        return None
    try:
        with safe_open(folder / ITEMS_FILE, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("items") != index.fingerprint or metadata.get("weights") != _weights_digest(folder):
                return None
            vectors: Tensor = stored.get_tensor("vectors")
            return vectors if vectors.shape == index.vectors.shape else None
    except (OSError, SafetensorError):
        return None


def _weights_digest(folder: Path) -> str:
    """SHA-256 (hex) of all weights in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        if path.name != ITEMS_FILE:
            with path.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
