"""A retrieval policy on disk: adapters or model, tokenizer, its texts and the vectors of its items."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minirec_pl.policy.catalogue_text import Text, joined
from minirec_pl.policy.folder import SIDE_FILE
from minirec_pl.policy.item_index import ItemIndex
from minirec_pl.policy.language_models.pretrained import LanguageModel, save_language_model
from minirec_pl.policy.prompt import PromptTemplate
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import replace_folder

ITEMS_FILE = "items.safetensors"
_KIND = "retrieval"


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


class StoredRetriever(NamedTuple):
    """What a folder says of its policy.

    Attributes:
        language_model: the model in the folder, to go on training.
        text: see `RetrieverText`.
        training_cost: `Cost.state_dict()` of the runs that made it, or empty.
    """

    language_model: LanguageModel
    text: RetrieverText
    training_cost: dict[str, Any]


def read_retriever(folder: Path) -> StoredRetriever:
    """Reads the side file that `write_retriever` wrote.

    Raises:
        InputError: if there is no retrieval policy in the folder, or it is damaged.
    """
    side = folder / SIDE_FILE
    if not side.is_file():
        raise InputError(f"no policy in '{folder}' ({SIDE_FILE} is missing): train one first, or mend `pretrained`")
    try:
        stored = json.loads(side.read_text(encoding="utf-8"))
        if stored.get("kind") != _KIND:
            raise InputError(f"the policy in '{folder}' generates items: load it as a GenerativePolicy")
        text = {f.name: stored["text"][f.name] for f in fields(RetrieverText)}
        text["prompt"] = PromptTemplate(**text["prompt"])
        model = LanguageModel(str(folder), **stored["language_model"])
        return StoredRetriever(model, RetrieverText(**text), stored["training_cost"])
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
