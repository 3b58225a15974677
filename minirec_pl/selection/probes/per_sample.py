"""Per-sample gradients of any parameters, and a random projection of them to a fixed size that is never stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from minirec_pl.utils.errors import InputError

PROJECTED_SIZE = 512
_BLOCKS = 2**8  # blocks of a projection at a time


def per_sample_gradients(
    function: Callable[..., Tensor], parameters: Mapping[str, Tensor], *rows: Tensor
) -> dict[str, Tensor]:
    """Gradient of a scalar of each sample with respect to parameters, which are left alone.

    All samples at once by `torch.func.vmap`; one after the other where the function does what vmap cannot (control
    flow that depends on values, custom kernels).

    Args:
        function: function(parameters, *row) -> scalar, of one sample: each row without its first dimension. Dropout
            must be off.
        parameters: name to float tensor.
        rows: [B, ...] each, B at least 1.

    Returns:
        Name to [B, *shape], detached.

    Raises:
        InputError: if there is no sample.
    """
    if not all(len(row) for row in rows):
        raise InputError("there is no sample to take gradients of: give at least one")
    with torch.inference_mode(False), torch.enable_grad():
        leaves = {name: parameter.detach() for name, parameter in parameters.items()}
        rows = tuple(row.clone() for row in rows)
        try:
            every = torch.func.vmap(torch.func.grad(function), in_dims=(None, *[0] * len(rows)))
            together: dict[str, Tensor] = every(leaves, *rows)
            return {name: gradient.detach() for name, gradient in together.items()}
        except RuntimeError:
            leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        single = []
        for row in zip(*rows, strict=True):
            value = function(leaves, *row)
            single.append(torch.autograd.grad(value, list(leaves.values()), materialize_grads=True))
    return {name: torch.stack(parts) for name, parts in zip(leaves, zip(*single, strict=True), strict=True)}


def project(vectors: Tensor, size: int = PROJECTED_SIZE, *, seed: int = 0, stream: int = 0) -> Tensor:
    """Johnson-Lindenstrauss projection by blocks of a randomised Hadamard transform (Ailon and Chazelle, 2009).

    The vector is cut into blocks x_b of `size` values and P x = sum_b D'_b H D_b x_b, H the orthonormal Hadamard
    matrix, D_b and D'_b diagonals of random signs. P is linear, E <Px, Py> = <x, y>, and the variance is at most
    (|x|^2 |y|^2 + <x, y>^2) / size; a vector of one block keeps its inner products exactly. The signs come from
    (seed, stream, block) alone, and all sums are taken in a fixed order of element-wise additions, so a row's result
    has the same bits in any batch, on any device and with any number of threads.

    Args:
        vectors: float [B, n].
        size: k, a power of two.
        seed: of the signs.
        stream: further number that decides the signs, for instance which parameter the vectors belong to.

    Returns:
        [B, k], float64 for float64 vectors and float32 otherwise.

    Raises:
        InputError: if `size` is no power of two or the vectors are not [B, n].

    Example:
        >>> project(torch.ones(3, 10_000), 256).shape
        torch.Size([3, 256])
    """
    if size < 1 or size & (size - 1):
        raise InputError(f"the size of a projection must be a power of two, not {size}")
    if vectors.ndim != 2:
        raise InputError(f"vectors to project must have the shape [B, n], not {list(vectors.shape)}")
    dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    total = torch.zeros(len(vectors), size, dtype=dtype, device=vectors.device)
    for portion, start in enumerate(range(0, vectors.shape[1], _BLOCKS * size)):
        part = vectors[:, start : start + _BLOCKS * size].to(dtype)
        part = torch.nn.functional.pad(part, (0, -part.shape[1] % size)).view(len(part), -1, size)
        before, after = _signs((seed, stream, portion), part.shape[1], size).to(vectors.device, dtype)
        total += _fold(_hadamard(part * before) * after)
    return total / math.sqrt(size)


def project_gradients(gradients: Mapping[str, Tensor], size: int = PROJECTED_SIZE, *, seed: int = 0) -> Tensor:
    """`project` of all parameters' per-sample gradients, taken as one long vector per sample.

    Args:
        gradients: name to float [B, *shape], in a fixed order.
        size: k, a power of two.
        seed: of the signs.

    Returns:
        [B, k].

    Raises:
        InputError: if there are no gradients or `size` is no power of two.
    """
    if not gradients:
        raise InputError("there are no gradients to project: the policy has no trainable parameters")
    parts = [project(g.flatten(1), size, seed=seed, stream=stream) for stream, g in enumerate(gradients.values())]
    return _fold(torch.stack(parts, dim=1))


def _signs(words: tuple[int, ...], blocks: int, size: int) -> Tensor:
    """Random signs int8 [2, blocks, size]."""
    bits = np.random.Philox(np.random.SeedSequence(words)).random_raw(-(-2 * blocks * size // 64))
    flips = np.unpackbits(bits.astype("<u8").view(np.uint8), count=2 * blocks * size)
    return torch.from_numpy(1 - 2 * flips.astype(np.int8)).view(2, blocks, size)


def _hadamard(blocks: Tensor) -> Tensor:
    """The unscaled Walsh-Hadamard transform of the last dimension."""
    shape, half = blocks.shape, 1
    while half < shape[-1]:
        pairs = blocks.reshape(*shape[:-1], -1, 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        blocks = torch.stack([first + second, first - second], dim=-2)
        half *= 2
    return blocks.reshape(shape)


def _fold(blocks: Tensor) -> Tensor:
    """The sum over dimension 1, half onto half."""
    while blocks.shape[1] > 1:
        half = blocks.shape[1] // 2
        rest = blocks[:, 2 * half :]
        blocks = torch.cat([blocks[:, :half] + blocks[:, half : 2 * half], rest], dim=1)
    return blocks[:, 0]
