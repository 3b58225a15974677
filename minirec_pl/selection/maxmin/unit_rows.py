"""Embeddings as rows of length 1, read a block at a time from wherever they are."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minirec_pl.selection.signals import Array
from minirec_pl.utils.errors import InputError

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

PICKS = 256  # columns in one product
_BLOCK = 2**22  # numbers in a block and in its product: 16 MiB of float32
_TINY, _HUGE = 1e-15, 1e15  # lengths outside have squares that float32 cannot hold


def as_matrix(embeddings: Array) -> Tensor:
    """Views the embeddings as a tensor, without a copy.

    Args:
        embeddings: [N, D] tensor of any device, array or `numpy.memmap`.

    Returns:
        [N, D], sharing memory with `embeddings`.

    Raises:
        InputError: If it is not a matrix of real numbers that torch can read in place.
    """
    if isinstance(embeddings, Tensor):
        matrix = embeddings.detach()
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # it is never written to
                matrix = torch.from_numpy(np.asarray(embeddings))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"embeddings cannot be read in place ({error}): save them as a contiguous float16 or float32 array"
            ) from error
    if matrix.ndim != 2:
        raise InputError(f"embeddings have the shape {list(matrix.shape)}: give [N, D]")
    if matrix.is_complex():
        raise InputError("embeddings are complex numbers: give real ones")
    return matrix


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Computes float32 products in float32, whatever autocast and `set_float32_matmul_precision` allow elsewhere.

    Args:
        device: Where the products are taken.

    Yields:
        Nothing.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class UnitRows:
    """Rows of a matrix scaled to length 1; a zero row stays zero.

    Keeps the length of each row and nothing else of the matrix. Rows are read in float64 if the matrix is float64, else
    in float32.

    Attributes:
        dtype: float64 or float32, of the rows it gives.
        device: Where the matrix is.
        columns: D.
    """

    def __init__(self, matrix: Tensor, only: Ints | None = None) -> None:
        """Takes the length of each row, in one pass.

        Args:
            matrix: [M, D], kept and never copied whole.
            only: [N] int64, the rows of `matrix` to use, ascending; the others are not read. None means all.

        Raises:
            InputError: If a row that is used holds a NaN or infinite number.
        """
        self._matrix = matrix
        self._only = only
        self.dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        self.device = matrix.device
        self.columns = matrix.shape[1]
        self._length = np.ones(len(self))
        self._largest: Floats | None = None
        if self.columns:
            for rows in self.blocks():
                self._measure(rows)

    def __len__(self) -> int:
        return len(self._matrix) if self._only is None else len(self._only)

    def blocks(self) -> Iterator[Ints]:
        """Yields the positions 0..N-1, ascending, in blocks of about the size of the processor's cache."""
        size = self.block_rows()
        for start in range(0, len(self), size):
            yield np.arange(start, min(start + size, len(self)))

    def block_rows(self) -> int:
        """Returns the number of rows in a block."""
        return max(_BLOCK // max(self.columns, PICKS), 1)

    def take(self, rows: Ints) -> Tensor:
        """Returns the rows at these positions, scaled to length 1.

        Args:
            rows: [n] int64 in 0..N-1.

        Returns:
            [n, D] of `dtype` on `device`, new memory.
        """
        unit = self._read(rows)
        if self._largest is not None:
            unit /= self._column(self._largest[rows])
        unit /= self._column(self._length[rows])
        return unit

    def _read(self, rows: Ints) -> Tensor:
        used = rows if self._only is None else self._only[rows]
        picked = self._matrix.index_select(0, torch.from_numpy(used).to(self.device))
        return picked.to(self.dtype)

    def _column(self, values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.device, self.dtype)[:, None]

    def _measure(self, rows: Ints) -> None:
        block = self._matrix[rows[0] : rows[-1] + 1].to(self.dtype) if self._only is None else self._read(rows)
        length = torch.linalg.vector_norm(block, dim=1)
        odd = (~((length > _TINY) & (length < _HUGE))).nonzero()[:, 0]
        self._length[rows] = length.cpu().numpy()
        if not len(odd):
            return
        block, odd_rows = block[odd], rows[odd.cpu().numpy()]
        largest = block.abs().amax(dim=1).double()
        if not largest.isfinite().all():
            row = int(odd_rows[int((~largest.isfinite()).nonzero()[0])])
            row = row if self._only is None else int(self._only[row])
            raise InputError(f"the embedding in row {row} is NaN or infinite: fix the model or leave the sample out")
        largest = largest.where(largest > 0, torch.ones_like(largest))
        length = torch.linalg.vector_norm(block.double() / largest[:, None], dim=1)
        if self._largest is None:
            self._largest = np.ones(len(self))
        self._largest[odd_rows] = largest.cpu().numpy()
        self._length[odd_rows] = length.where(length > 0, torch.ones_like(length)).cpu().numpy()
