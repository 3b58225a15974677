"""Checkpoint files: written whole or not at all, and checked before they are read."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from minirec_pl.errors import InputError
from minirec_pl.files import write_atomically


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


def load_policy_weights(policy: nn.Module, checkpoint: Path) -> None:
    """Gives a policy the weights that a checkpoint of its module has for it."""
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "policy."
    policy.load_state_dict({n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)})


@contextmanager
def policy_of(policy: nn.Module, checkpoint: Path | None) -> Iterator[None]:
    """Lends a policy the weights of a checkpoint; its own are put back, also after an exception. None lends nothing."""
    if checkpoint is None:
        yield
        return
    own = {name: value.detach().clone() for name, value in policy.state_dict().items()}
    load_policy_weights(policy, checkpoint)
    try:
        yield
    finally:
        policy.load_state_dict(own)
