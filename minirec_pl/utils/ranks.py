"""What the ranks of a distributed run tell each other: rows, states, and whether one of them failed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from minirec_pl.utils.errors import InputError


def world() -> tuple[int, int]:
    """Returns number of replicas and own rank: of torch.distributed when it is initialised, else (1, 0)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def gather_rows(rows: Tensor, device: torch.device) -> list[Tensor]:
    """Gathers the rows that every rank has, in the order of the ranks.

    Args:
        rows: [n, ...], n may differ between ranks.
        device: that the process group works on.

    Returns:
        One CPU tensor per rank.
    """
    return [part.cpu() for part in gather_all_tensors(rows.to(device))]


def on_any(flag: bool, device: torch.device) -> bool:
    """Tells every rank whether the flag is set on any; every rank must call this at the same time."""
    return flag if world()[0] == 1 else bool(torch.cat(gather_rows(torch.tensor([flag]), device)).any())


def gather_states(state: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Gathers what each rank holds, in the order of the ranks; every rank must call this at the same time.

    Args:
        state: tensors and primitives.
        device: that the process group works on.

    Returns:
        One state per rank, its tensors on the CPU; without a process group `[state]`.
    """
    if world()[0] == 1:
        return [state]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    files = [io.BytesIO(part.numpy().tobytes()) for part in gather_rows(content, device)]
    return [torch.load(file, map_location="cpu", weights_only=True) for file in files]


def own_state(states: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """Picks this rank's part of what `gather_states` gave.

    Args:
        states: of the ranks that saved them.
        what: they are, for the message.

    Raises:
        InputError: if there were more or fewer ranks.
    """
    n_ranks, rank = world()
    if len(states) != n_ranks:
        raise InputError(
            f"the checkpoint holds {what} of {len(states)} ranks and there are {n_ranks}: resume on {len(states)}, or "
            "from a checkpoint of an epoch's end"
        )
    return states[rank]


def agree(error: Exception | None, device: torch.device, plan: Sequence[int] = ()) -> None:
    """Fails on every rank if one has failed; every rank must call this at the same time.

    Args:
        error: of this rank.
        device: that the process group works on.
        plan: which must be the same on all ranks.

    Raises:
        Exception: this rank's own error.
        InputError: if another rank failed, naming it and its error, or the plans differ.
    """
    if world()[0] > 1:
        text = "" if error is None else f"{type(error).__name__}: {error}"
        encoded = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        texts = [bytes(part.tolist()).decode().strip("\0") for part in gather_rows(encoded, device)]
        failed = [(rank, text) for rank, text in enumerate(texts) if text]
        if error is None and failed:
            raise InputError(f"rank {failed[0][0]} failed and stops the others: {failed[0][1]}")
        digest = torch.frombuffer(bytearray(hashlib.sha256(repr(list(plan)).encode()).digest()), dtype=torch.uint8)
        if error is None:
            plans = gather_rows(digest, device)
            if any(not torch.equal(other, plans[0]) for other in plans):
                raise InputError("the ranks selected different samples: run all of them on the same kind of machine")
    if error is not None:
        raise error
