"""Representativeness: how well a sample's gradient agrees with that of the pool."""

from __future__ import annotations

import torch
from torch import Tensor

from minirec_pl.selection.learnability import min_max
from minirec_pl.selection.signals import Array
from minirec_pl.utils.errors import InputError

_BLOCK = 2**18  # numbers turned to float64 at a time: 2 MiB, which stay in a processor's cache


def representativeness(gradients: Array, *, fresh: Array | None = None, normalize: bool = True) -> Tensor:
    """Computes how well each sample's gradient agrees with the mean gradient.

    R_i = (1 + cos(u_i, mean_j u_j)) / 2, then min-max to [0, 1] (MiniRec, arXiv 2602.04278). A zero gradient gives 0.5
    before the min-max; a zero mean gives 0.5 for all. An R that is the same for all becomes 0.5 by min-max.

    Args:
        gradients: [N, D] float, the gradient signals u.
        fresh: [N] bool, the rows that form the mean; None means all.
        normalize: Whether to scale to [0, 1] over the N samples.

    Returns:
        [N] float64.

    Raises:
        InputError: If a gradient is NaN or infinite, or a shape does not fit.
    """
    u = torch.as_tensor(gradients).detach()
    if u.ndim != 2 or u.shape[1] == 0:
        raise InputError(f"gradients have the shape {list(u.shape)}: give [N, D] with at least one column")
    in_mean = torch.ones(len(u), dtype=torch.bool) if fresh is None else torch.as_tensor(fresh).to("cpu", torch.bool)
    if in_mean.shape != (len(u),):
        raise InputError(f"fresh has the shape {list(in_mean.shape)}: give [{len(u)}], a flag per gradient")

    step = max(1, (_BLOCK if u.device.type == "cpu" else 128 * _BLOCK) // u.shape[1])
    total = torch.zeros(u.shape[1], dtype=torch.float64, device=u.device)
    scale = torch.zeros(len(u), dtype=torch.float64, device=u.device)
    for start in range(0, len(u), step):
        rows = slice(start, start + step)
        block = u[rows].double()
        scale[rows] = block.abs().amax(dim=1)
        used = in_mean[rows]
        total += (block if used.all() else block[used.to(u.device)]).sum(dim=0)
    bad = ~torch.isfinite(scale)
    if bad.any():
        raise InputError(f"the gradient in row {int(bad.nonzero()[0])} is NaN or infinite: fix the policy's signals")

    peak = scale[in_mean.to(u.device)].amax() if in_mean.any() else scale.new_zeros(())
    cosine = torch.zeros_like(scale)
    if total.abs().amax() > 1e-12 * peak:
        direction = torch.nn.functional.normalize(total / total.abs().amax(), dim=0)
        safe = scale.where(scale > 0, torch.ones_like(scale))
        for start in range(0, len(u), step):
            rows = slice(start, start + step)
            block = u[rows].double()
            if u.dtype == torch.float64:
                block = block / safe[rows, None]  # so that the norm of a tiny gradient does not underflow
            norm = torch.linalg.vector_norm(block, dim=1)
            cosine[rows] = (block @ direction) / norm.where(norm > 0, torch.ones_like(norm))
    value = ((1 + cosine.clamp(-1, 1)) / 2).cpu()
    return min_max(value) if normalize else value
