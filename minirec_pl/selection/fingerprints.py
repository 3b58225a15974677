"""Fingerprints of what signals were measured with, which tell one policy or data set from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from minirec_pl.selection.signals import Array, as_ids
from minirec_pl.utils.checkpoints import weights_digest

_SCORING = ("scoring_generations", "temperature", "top_k", "top_p", "max_completion_length")


def weights_fingerprint(module: nn.Module) -> str:
    """Returns the SHA-256 (hex) of names, types, shapes and values of all weights and buffers.

    Args:
        module: on any device.
    """
    return weights_digest(module.state_dict())


def data_fingerprint(data: Any, sample_ids: Array) -> str:
    """Returns a DataModule's own `fingerprint`, else the SHA-256 (hex) of the pool, whatever the order of its ids.

    Args:
        data: a DataModule or None.
        sample_ids: [N] of the pool.
    """
    ids = as_ids(sample_ids).sort().values.numpy()
    return getattr(data, "fingerprint", None) or hashlib.sha256(ids.tobytes()).hexdigest()


def fingerprints_of(module: nn.Module, data: Any, sample_ids: Array, asked: Mapping[str, str]) -> dict[str, str]:
    """Returns the fingerprints `model` (weights of the policy) and `data`, with rollouts also `seed` and `scoring`.

    Args:
        module: measured; its `policy` if it has one.
        data: a DataModule or None.
        sample_ids: [N] of the pool.
        asked: options of `sample_signals`.
    """
    policy = getattr(module, "policy", module)
    found = {
        "model": weights_fingerprint(policy if isinstance(policy, nn.Module) else module),
        "data": data_fingerprint(data, sample_ids),
    }
    seed = getattr(module, "rollout_seed", None)
    if seed is None:
        return found
    options = {name: getattr(module, name) for name in _SCORING if hasattr(module, name)} | dict(asked)
    scoring = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    return {**found, "seed": str(seed), "scoring": scoring}
