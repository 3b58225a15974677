"""How gradient signals are taken from a policy: on its small head alone, never by a backward pass through the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from minirec_pl.head_probe import HeadProbe

__all__ = ["GradientKind", "HeadProbe", "head_signal"]

GradientKind = Literal["first", "hvp"]


def head_signal(
    target_logp: Callable[[Sequence[Tensor]], Tensor], states: Sequence[Tensor], kind: GradientKind
) -> tuple[Tensor, Tensor]:
    """Gradient signal of each sample at the hidden states that produce its target.

    * `first`: u = -dp/dh = -p d(log p)/dh, p the probability of the target: the expected group advantage gradient of
      a hit reward before scaling.
    * `hvp`: u = d(g.g)/dh with g = dl/dh and l = -p / stop_gradient(p), the published signal (2 H g).

    Args:
        target_logp: from hidden states to log p, float [B], where row b depends on row b of the states alone.
        states: tensors [B, ..., D]; the signal is summed over the dimensions between.
        kind: which signal.

    Returns:
        (u float32 [B, D], log p float32 [B]), both detached.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [state.detach().clone().requires_grad_() for state in states]
        logp = target_logp(leaves)
        used = [leaf for leaf in leaves if leaf.numel()]
        if kind == "first":
            gradients = torch.autograd.grad(-logp.exp().sum(), used)
        else:
            loss = -(logp - logp.detach()).exp().sum()
            first = torch.autograd.grad(loss, used, create_graph=True)
            gradients = torch.autograd.grad(torch.stack([(g * g).sum() for g in first]).sum(), used)
        signal = torch.stack([g.flatten(1, -2).sum(dim=1) if g.ndim > 2 else g for g in gradients]).sum(dim=0)
    return signal.float(), logp.detach()
