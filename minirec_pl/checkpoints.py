"""Checkpoint files: written whole or not at all, and checked before they are read."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from minirec_pl.errors import InputError
from minirec_pl.files import write_atomically

_OF_ADAPTERS = ("lora_", "trainable_tokens_", "modules_to_save.")  # in peft's names


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, but a full disk leaves no half-written file and an older one as it was."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes beside `path`, then renames.

        Raises:
            InputError: if it cannot be written.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), lambda temporary: temporary.write_bytes(buffer.getbuffer()))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads tensors and primitives only, whatever Lightning's default is."""
        with Path(path).open("rb") as file:
            loaded: dict[str, Any] = torch.load(file, map_location=map_location or "cpu", weights_only=True)
        return loaded


def check_checkpoint(path: Path) -> None:
    """Refuses a checkpoint that is missing or truncated.

    Raises:
        InputError: naming the file.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint '{path}': give --ckpt_path a file from a run's checkpoints/ folder")
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"'{path}' is no checkpoint, or a truncated one: give another from a run's checkpoints/ folder"
        )


def weights_under_adapters(module: nn.Module) -> dict[str, Tensor]:
    """The frozen weights of peft models inside `module`, by their names in its `state_dict`.

    Training leaves them as they were loaded, so that no checkpoint has to hold them. Adapters, frozen ones too, are not
    among them.
    """
    return {
        f"{prefix}.{name}".removeprefix("."): parameter.detach()
        for prefix, part in module.named_modules()
        if hasattr(part, "peft_config") and hasattr(part, "get_base_model")
        for name, parameter in part.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad and not any(mark in name for mark in _OF_ADAPTERS)
    }


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of names, types, shapes and values, on any device."""
    sha = hashlib.sha256()
    for name, value in sorted(weights.items()):
        flat = value.detach().to("cpu").contiguous()
        sha.update(f"{name} {flat.dtype} {tuple(flat.shape)}\n".encode())
        sha.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def load_policy_weights(policy: nn.Module, checkpoint: Path) -> None:
    """Gives a policy the weights that a checkpoint of its module has for it."""
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "policy."
    stored = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
    policy.load_state_dict({**weights_under_adapters(policy), **stored})


@contextmanager
def policy_of(policy: nn.Module, checkpoint: Path | None) -> Iterator[None]:
    """Lends a policy the weights of a checkpoint; its own are put back, also after an exception. None lends nothing."""
    if checkpoint is None:
        yield
        return
    fixed = weights_under_adapters(policy)
    own = {name: value.detach().clone() for name, value in policy.state_dict().items() if name not in fixed}
    load_policy_weights(policy, checkpoint)
    try:
        yield
    finally:
        policy.load_state_dict({**fixed, **own})
