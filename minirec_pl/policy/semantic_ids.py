"""Semantic ids: residual k-means codes of item embeddings, as in TIGER (arXiv 2305.05065)."""

from __future__ import annotations

import string
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minirec_pl.utils.errors import InputError, check_whole
from minirec_pl.utils.seeds import check_seed

_FACTORS = 64
_MOST_LEVELS = len(string.ascii_lowercase) - 1  # one more letter tells items of the same codes apart


@dataclass(frozen=True)
class SemanticIds:
    """How the codes of a catalogue are made.

    Args:
        levels: number of codes of an item.
        codes: number of clusters at each level.
        embeddings: `.npy` or `.safetensors` with one array [n_items, D], rows in the order of the catalogue, of any
            sentence encoder; None for the mean last hidden states of the items' texts in the language model itself, or,
            of a policy that is built from a `config`, for `item_factors` of the log.
        seed: seed of the clusters' first centres.

    Raises:
        InputError: if an option is out of range, or scikit-learn is not installed.
    """

    levels: int = 3
    codes: int = 64
    embeddings: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(**{"semantic_ids.levels": self.levels, "semantic_ids.codes": self.codes})
        if not 1 <= self.levels <= _MOST_LEVELS:
            raise InputError(f"semantic_ids.levels is {self.levels}: give 1 to {_MOST_LEVELS}")
        if self.codes < 2:
            raise InputError(f"semantic_ids.codes is {self.codes}: a level needs at least 2 clusters")
        check_seed(self.seed, "semantic_ids.seed")
        if find_spec("sklearn") is None:
            raise InputError("item_ids 'semantic' needs scikit-learn: pip install 'minirec-pl[kmeans]'")


def read_embeddings(path: Path, n_items: int) -> Tensor:
    """Item embeddings from a file, float32 [n_items, D].

    Raises:
        InputError: if the file cannot be read, or does not hold one array with a finite row for each item.
    """
    try:
        if path.suffix == ".npy":
            values = torch.from_numpy(np.load(path, allow_pickle=False))
        elif path.suffix == ".safetensors":
            tensors = load_file(path)
            if len(tensors) != 1:
                raise InputError(f"'{path}' holds {len(tensors)} arrays: store the item embeddings alone")
            values = next(iter(tensors.values()))
        else:
            raise InputError(f"semantic_ids.embeddings is '{path}': give a .npy or .safetensors file")
    except (OSError, ValueError, TypeError, EOFError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"the embeddings in '{path}' cannot be read ({reason}): write them again") from error
    if values.ndim != 2 or len(values) != n_items or not values.is_floating_point():
        raise InputError(
            f"'{path}' has the shape {list(values.shape)} ({values.dtype}) and the catalogue {n_items} items: store "
            "floats [n_items, D], a row for each item in the order of the catalogue"
        )
    if not bool(values.isfinite().all()):
        row = int((~values.isfinite()).any(dim=1).nonzero()[0])
        raise InputError(f"'{path}', row {row}: the embedding is not finite; compute it again")
    return values.float()


def item_factors(interactions: npt.NDArray[np.int64], n_items: int, seed: int) -> Tensor:
    """Factors of items by who had them: a truncated SVD of the users x items matrix.

    Rows are divided by the root of the user's items and columns by that of the item's users, so that neither the active
    nor the popular decide. Items that nobody had are 0.

    Args:
        interactions: [n, 2], user and item.
        n_items: size of the catalogue.
        seed: of the randomized SVD.

    Returns:
        float32 [n_items, D], D at most 64.

    Raises:
        InputError: if there are fewer than two users or items with interactions.
    """
    from scipy.sparse import csr_array
    from sklearn.decomposition import TruncatedSVD

    pairs = np.unique(interactions, axis=0)
    users, user = np.unique(pairs[:, 0], return_inverse=True)
    item = pairs[:, 1]
    if len(users) < 2 or len(np.unique(item)) < 2:
        raise InputError("item factors need at least two users and two items in the train part: give more data")
    by_user, by_item = np.bincount(user), np.bincount(item, minlength=n_items)
    values = 1 / np.sqrt(by_user[user] * by_item[item])
    matrix = csr_array((values, (user, item)), shape=(len(users), n_items))
    width = min(_FACTORS, len(users) - 1, n_items - 1)
    with np.errstate(invalid="ignore"):  # in shares of the variance, which are not used
        found = TruncatedSVD(width, random_state=seed).fit(matrix)
    factors = (found.components_ * found.singular_values_[:, None]).T
    return torch.from_numpy(factors).float()


def residual_codes(embeddings: Tensor, levels: int, codes: int, seed: int) -> Tensor:
    """Codes from coarse to fine: each level clusters what the centres of the levels before leave over.

    The embeddings are centred and brought to unit length first, since hidden states share a large common part.

    Args:
        embeddings: float [n, D].
        levels: L.
        codes: clusters at each level, or as many as there are different rows.
        seed: of the first centres.

    Returns:
        int64 [n, L].
    """
    from sklearn.cluster import KMeans

    values = embeddings.double().cpu()
    rest = torch.nn.functional.normalize(values - values.mean(dim=0), dim=1).numpy()
    columns = []
    for level in range(levels):
        different = len(np.unique(rest.round(6), axis=0))
        clusters = KMeans(min(codes, different), n_init=1, random_state=seed + level).fit(rest)
        columns.append(clusters.labels_.astype(np.int64))
        rest = rest - clusters.cluster_centers_[clusters.labels_]
    return torch.from_numpy(np.stack(columns, axis=1))


def code_names(codes: Tensor) -> list[list[str]]:
    """Names of the codes of each item; items with the same codes get one more, by their place in the catalogue.

    Args:
        codes: int64 [n, L].

    Example:
        >>> code_names(torch.tensor([[0, 3], [1, 2], [0, 3]]))
        [['<a_0>', '<b_3>', '<c_0>'], ['<a_1>', '<b_2>'], ['<a_0>', '<b_3>', '<c_1>']]
    """
    rows = [tuple(row) for row in codes.tolist()]
    shared, met = Counter(rows), Counter[tuple[int, ...]]()
    names = []
    for row in rows:
        full = row if shared[row] == 1 else (*row, met[row])
        met[row] += 1
        names.append([f"<{letter}_{code}>" for letter, code in zip(string.ascii_lowercase, full, strict=False)])
    return names
