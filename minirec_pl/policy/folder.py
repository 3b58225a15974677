"""A policy on disk: an ordinary Hugging Face folder with a side file that holds the catalogue."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from minirec_pl.data.samples import Catalogue
from minirec_pl.errors import InputError
from minirec_pl.policy.tiny import item_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIDE_FILE = "minirec.json"


class StoredPolicy(NamedTuple):
    """What a folder holds.

    Attributes:
        model: the causal language model, float32, in training mode.
        catalogue: the items it recommends.
        item_tokens: int64 [n_items, L], padded with -1.
        training_cost: `Cost.state_dict()` of the runs that made it, or empty.
    """

    model: PreTrainedModel
    catalogue: Catalogue
    item_tokens: Tensor
    training_cost: dict[str, Any]


def read_policy(folder: Path) -> StoredPolicy:
    """Reads a folder that `write_policy` wrote.

    Raises:
        InputError: if there is no policy in the folder, or it is damaged.
    """
    from transformers import AutoModelForCausalLM

    side = folder / SIDE_FILE
    if not side.is_file():
        raise InputError(
            f"no policy in '{folder}' ({SIDE_FILE} is missing): train one first, for example with "
            "`minirec fit --config configs/ml-100k/warm-start.yaml`, or give its folder as "
            "policy.init_args.pretrained"
        )
    try:
        stored = json.loads(side.read_text(encoding="utf-8"))
        catalogue = Catalogue(stored["item_ids"], stored["titles"])
        item_tokens = torch.tensor(stored["item_tokens"])
        read: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        model, loaded = read
        vocabulary = model.get_input_embeddings().num_embeddings
        if loaded["missing_keys"]:
            raise ValueError(f"weights are missing: {', '.join(sorted(loaded['missing_keys'])[:3])}")
        if item_tokens.ndim != 2 or item_tokens.is_floating_point() or len(item_tokens) != len(catalogue):
            raise ValueError(f"{SIDE_FILE} does not give each of the {len(catalogue)} items its tokens")
        if int(item_tokens.max()) >= vocabulary:
            raise ValueError(f"{SIDE_FILE} names token {int(item_tokens.max())} of a vocabulary of {vocabulary}")
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, InputError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the policy in '{folder}' cannot be read ({reason}): train or copy it again") from error
    return StoredPolicy(model.train(), catalogue, item_tokens, stored.get("training_cost", {}))


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place once all has been written into it.

    Raises:
        InputError: if `folder` holds something else than a policy, or cannot be written; it is then left as it was.
    """
    if folder.exists() and not (folder / SIDE_FILE).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"'{folder}' exists and holds no policy: give a new folder, so that nothing else is deleted")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            new.mkdir()
            yield new
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot write the policy to '{folder}' ({reason}); free the disk or choose another"
        ) from error


def write_policy(folder: Path, policy: StoredPolicy) -> None:
    """Writes model, tokenizer and side file, see `replaced_folder`."""
    with replaced_folder(folder) as new:
        policy.model.save_pretrained(new)
        item_tokenizer(policy.catalogue.item_ids).save_pretrained(new)
        side = {
            "item_ids": policy.catalogue.item_ids,
            "titles": policy.catalogue.titles,
            "item_tokens": policy.item_tokens.tolist(),
            "training_cost": policy.training_cost,
        }
        (new / SIDE_FILE).write_text(json.dumps(side), encoding="utf-8")
