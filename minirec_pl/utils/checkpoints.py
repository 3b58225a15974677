"""Checkpoint files: written whole or not at all, without the weights that never change."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from minirec_pl.utils.files import write_atomically

_OF_ADAPTERS = ("lora_", "trainable_tokens_", "modules_to_save.")  # in peft's names


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written whole in their own folder and read safely.

    Lightning writes to the system's temporary folder first and copies from there, so that a full disk leaves half a
    file in the place of an older one.
    """

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
        place: Any = map_location or "cpu"
        return super().load_checkpoint(path, place, weights_only=True)


def weights_under_adapters(module: nn.Module) -> dict[str, Tensor]:
    """Collects the frozen weights of peft models inside `module`, by their names in its `state_dict`.

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


def leave_out_copies(checkpoint: dict[str, Any], fixed: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Takes every copy of some weights out of a checkpoint, whoever put it there.

    Averaging callbacks and a reference policy bring whole models along. A copy is a tensor of the same values whose
    name ends with that of the weight.

    Args:
        checkpoint: changed, but not what it shares with others: a mapping that loses something is replaced.
        fixed: the weights, by their names in the policy.

    Returns:
        For `put_back_copies`: where each mapping is, `at`, and the weight that each of its `names` was.
    """
    left_out: list[dict[str, Any]] = []

    def reduced(value: Any, at: list[Any]) -> Any:
        if isinstance(value, list | tuple):
            entries = [reduced(part, [*at, place]) for place, part in enumerate(value)]
            changed = any(new is not old for new, old in zip(entries, value, strict=True))
            return type(value)(entries) if changed else value
        if not isinstance(value, dict):
            return value
        names = {}
        for key, part in value.items():
            name = _ending(key, fixed) if isinstance(part, Tensor) else None
            if name is not None and _same(part, fixed[name]):
                names[key] = name
        parts = {key: reduced(part, [*at, key]) for key, part in value.items() if key not in names}
        if names:
            left_out.append({"at": at, "names": names})
        if not names and all(part is value[key] for key, part in parts.items()):
            return value
        made = copy.copy(value)
        made.clear()
        made.update(parts)
        return made

    checkpoint.update(reduced(dict(checkpoint), []))
    return left_out


def put_back_copies(
    checkpoint: dict[str, Any], fixed: Mapping[str, Tensor], left_out: Sequence[Mapping[str, Any]]
) -> None:
    """Completes a checkpoint with what `leave_out_copies` took out of it."""
    for copies in left_out:
        place: Any = checkpoint
        for key in copies["at"]:
            place = place[key]
        place.update({key: fixed[name] for key, name in copies["names"].items()})


def _ending(key: Any, fixed: Mapping[str, Tensor]) -> str | None:
    while isinstance(key, str) and key:
        if key in fixed:
            return key
        key = key.partition(".")[2]
    return None


def _same(value: Tensor, weight: Tensor) -> bool:
    if value.shape != weight.shape or value.dtype != weight.dtype:
        return False
    return value.data_ptr() == weight.data_ptr() or torch.equal(value.to(weight.device), weight)


@torch.no_grad()
def keep_frozen(callbacks: Sequence[Any], module: nn.Module) -> None:
    """Gives the averaged copies of a module that callbacks have its frozen weights, which averaging rounds."""
    held = [value for callback in callbacks for value in vars(callback).values()]
    for average in [value for value in held if isinstance(value, AveragedModel)]:
        averaged = dict(average.module.named_parameters())
        for name, own in module.named_parameters():
            if not own.requires_grad and name in averaged:
                averaged[name].copy_(own)


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Computes the SHA-256 (hex) of names, types, shapes and values, on any device."""
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
