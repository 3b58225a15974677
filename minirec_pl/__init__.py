"""GRPO for LLM recommenders in PyTorch Lightning, on the small part of the data that teaches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minirec_pl.data.datamodule import RecDataModule
    from minirec_pl.trainers.grpo import GRPORecModule
    from minirec_pl.trainers.warm_start import WarmStartModule
    from minirec_pl.utils.errors import InputError

__version__ = "0.1.0"
__all__ = ["GRPORecModule", "InputError", "RecDataModule", "WarmStartModule"]

_HOMES = {
    "GRPORecModule": "minirec_pl.trainers.grpo",
    "InputError": "minirec_pl.utils.errors",
    "RecDataModule": "minirec_pl.data.datamodule",
    "WarmStartModule": "minirec_pl.trainers.warm_start",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minirec_pl' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
