"""Where training has gone, and how well a sample's update agrees with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minirec_pl.selection.probes.gradients import HeadStep, check_step, exact, step_softmax


class Trajectory:
    """Where training has gone: how far parameters are from where they were when first looked at.

    Attributes:
        start: the parameters at that time, by name, for a checkpoint; empty before.
    """

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}

    def displacement(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Parameters now minus parameters at the first call; None as long as none of them has moved."""
        with torch.inference_mode(False), torch.no_grad():
            moved = {}
            for name, now in parameters.items():
                start = self.start.get(name)
                self.start[name] = now.detach().clone() if start is None else start.to(now.device)
                moved[name] = now.detach() - self.start[name]
            return moved if any(bool(difference.any()) for difference in moved.values()) else None


def head_alignment(steps: Sequence[HeadStep], rows: Sequence[Tensor], displacement: Tensor) -> Tensor:
    """Agreement of each sample's update of the head with the way the head has gone.

    a_i = cos(-dl_i/dW, W_now - W_start), l_i = -log p_i, over the rows of W that any step can choose. The gradient is
    a sum of outer products, dl_i/dW = sum_t (p_t - y_t) h_t^T / tau, which is never built: its product with the
    displacement takes one matrix product a step, its norm a Gram matrix over the steps.

    Args:
        steps: of the same samples, with shared vectors.
        rows: for each step int64 [V], the rows of W that its vectors are.
        displacement: float [vocabulary, D], W_now - W_start.

    Returns:
        float [B] in [-1, 1]; 0 where the gradient or the displacement is 0.

    Raises:
        InputError: if shapes do not fit or a target is not a position among the vectors.
    """
    used = torch.unique(torch.cat(list(rows)))
    residuals, states, products, logps = [], [], [], []
    with exact(displacement.device):
        for step, row in zip(steps, rows, strict=True):
            check_step(step)
            soft = step_softmax(step)
            moved = soft.hidden @ displacement.index_select(0, row).to(soft.hidden.dtype).T
            products.append((soft.residual * moved).sum(dim=1) / step.temperature)
            wide = moved.new_zeros(len(moved), len(used))
            residuals.append(wide.index_add_(1, torch.searchsorted(used, row), soft.residual))
            states.append(soft.hidden / step.temperature)
            logps.append(soft.logp)
        q, h = torch.stack(residuals, dim=1), torch.stack(states, dim=1)
        norm = (q @ q.mT * (h @ h.mT)).sum(dim=(1, 2)).clamp_min(0).sqrt()
        length = torch.linalg.vector_norm(displacement[used].to(norm.dtype))
        cosine = _cosine(torch.stack(products).sum(dim=0), norm * length)
        return cosine.masked_fill(torch.stack(logps).sum(dim=0).isneginf(), 0.0)


def gradient_alignment(gradients: Mapping[str, Tensor], displacement: Mapping[str, Tensor]) -> Tensor:
    """cos(g_i, theta_now - theta_start) for per-sample gradients of the same parameters.

    Args:
        gradients: name to float [B, *shape], pointing the way an update would go.
        displacement: name to float [*shape], for the same names.

    Returns:
        float [B] in [-1, 1]; 0 where either is 0.
    """
    pairs = [(_exact(gradients[name].flatten(1)), _exact(moved.flatten())) for name, moved in displacement.items()]
    product = torch.stack([gradient @ moved for gradient, moved in pairs]).sum(dim=0)
    norm = torch.stack([gradient.square().sum(dim=1) for gradient, _ in pairs]).sum(dim=0).sqrt()
    length = torch.stack([moved.square().sum() for _, moved in pairs]).sum().sqrt()
    return _cosine(product, norm * length)


def _cosine(product: Tensor, norm: Tensor) -> Tensor:
    """Product / norm in [-1, 1]; 0 where the norm is 0."""
    return torch.where(norm > 0, product / norm.where(norm > 0, torch.ones_like(norm)), 0.0).clamp(-1, 1)


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
