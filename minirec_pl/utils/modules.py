"""What is done with any torch module: evaluated without a trace, or given a loss of nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; every submodule's own mode is put back, also after an exception."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def no_loss(module: nn.Module) -> Tensor:
    """Zero with a gradient of zero for every trained parameter, so that optimizers and other ranks run as usual."""
    return torch.stack([p.flatten()[:1].sum() for p in module.parameters() if p.requires_grad]).sum() * 0.0
