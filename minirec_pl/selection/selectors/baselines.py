"""Rival selectors that use no difficulty: the whole pool, random draws, and coverage of the embeddings."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from minirec_pl.selection import reasons
from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.maxmin.greedy import maxmin_select
from minirec_pl.selection.selectors.picks import ascending, ledger_of, vectors
from minirec_pl.selection.signals import Signals
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.seeds import check_seed

_ROWS = 16_384  # rows worked on at a time
_ITERATION_ROWS = 1_024  # rows of a k-means step, at least


class FullSelector:
    """Picks the whole pool, whatever the budget: the reference that a selection is compared with.

    Needs no signals. Ranks are in the order of sample_id. The budget is checked but not used, so a smaller one is not
    a prefix.
    """

    needs: frozenset[str] = frozenset()

    def select(self, signals: Signals, k: int, *, epoch: int = 0) -> SelectionLedger:
        """Picks every sample, see `Selector.select`."""
        signals = ascending(signals, k)
        return ledger_of(signals, torch.arange(len(signals)), k, {}, {})


class RandomSelector:
    """Draws samples uniformly, without replacement: the rival to beat.

    Needs no signals; the ledger still shows the rewards that are known. A smaller budget with the same seed and epoch
    is a prefix.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, seed: int = 42, redraw: bool = False) -> None:
        """Sets the draw.

        Args:
            seed: Seed of the draw.
            redraw: Whether each epoch has a draw of its own; otherwise all epochs have the same.

        Raises:
            InputError: If the seed is out of range.
        """
        self.seed = check_seed(seed)
        self.redraw = redraw

    def select(self, signals: Signals, k: int, *, epoch: int = 0) -> SelectionLedger:
        """Draws k samples, see `Selector.select`; `epoch` changes the draw if `redraw`."""
        signals = ascending(signals, k)
        drawn = np.random.default_rng([self.seed, epoch if self.redraw else 0]).permutation(len(signals))[:k]
        return ledger_of(signals, torch.from_numpy(drawn), k, {}, {})


class KCenterSelector:
    """Picks k centers greedily, each the sample farthest from all earlier ones (Gonzalez 1985).

    argmax over x of min over s in S of d(x, s), as for the core-sets of Sener & Savarese (2018, arXiv 1708.00489), with
    at most twice the covering radius of the best k centers where d is a metric. It is max-min selection with equal
    scores, see `maxmin_select`.

    How ours differs: d = 1 - cos, which orders as the Euclidean distance of unit embeddings does; it starts from the
    smallest sample_id instead of a labelled set, and leaves out the mixed-integer refinement. The ledger's `value` is
    the distance to the nearest earlier pick, as `novelty`. A smaller budget is a prefix.
    """

    needs: frozenset[str] = frozenset({"embedding"})

    def select(self, signals: Signals, k: int, *, epoch: int = 0) -> SelectionLedger:
        """Picks k centers, see `Selector.select`."""
        signals = ascending(signals, k)
        embedding, known = vectors(signals, "embedding", self)
        rows = known.nonzero()[:, 0]
        centers = maxmin_select(
            embedding if bool(known.all()) else embedding[rows],
            torch.ones(len(rows), dtype=torch.float32),
            min(k, len(rows)),
        )
        picks = rows[centers.indices]
        novelty = torch.full((len(signals),), torch.nan, dtype=torch.float64)
        novelty[picks] = centers.novelty
        return ledger_of(signals, picks, k, {"novelty": novelty, "value": novelty}, {reasons.NEVER_SCORED: ~known})


class KMeansSelector:
    """Picks the sample nearest to each of k centroids of the embeddings, k the budget (k-means, Lloyd 1982).

    How ours differs: the embeddings are scaled to unit length first, so that distances follow the cosine; the
    clusters are those of scikit-learn's `MiniBatchKMeans` (Sculley 2010), which scales to millions of samples. Ranks
    are by size of the cluster, largest first. A cluster that ends up empty, as with repeated embeddings, is replaced by
    the unpicked sample nearest to its own centroid. The ledger's `value` is the cosine to the own centroid. Another
    budget means other clusters, so a smaller one is not a prefix.
    """

    needs: frozenset[str] = frozenset({"embedding"})

    def __init__(self, seed: int = 42) -> None:
        """Sets the seed.

        Args:
            seed: Seed of the first centroids and of the mini-batches.

        Raises:
            InputError: If the seed is out of range or scikit-learn is not installed.
        """
        if find_spec("sklearn") is None:
            raise InputError("KMeansSelector needs scikit-learn: pip install 'minirec-pl[kmeans]'")
        self.seed = check_seed(seed)

    def select(self, signals: Signals, k: int, *, epoch: int = 0) -> SelectionLedger:
        """Picks one sample per cluster, see `Selector.select`."""
        signals = ascending(signals, k)
        embedding, known = vectors(signals, "embedding", self)
        rows = known.nonzero()[:, 0]
        unit = torch.nn.functional.normalize(embedding[rows].float(), dim=1).cpu()
        cluster, closeness = self._clusters(unit, min(k, len(rows)))

        by_closeness = np.lexsort((-closeness, cluster))
        _, first, size = np.unique(cluster[by_closeness], return_index=True, return_counts=True)
        nearest = by_closeness[first]
        nearest = nearest[np.lexsort((nearest, -size))]
        others = np.setdiff1d(np.arange(len(rows)), nearest)
        spare = others[np.argsort(-closeness[others], kind="stable")]
        picks = rows[torch.from_numpy(np.concatenate([nearest, spare])[:k])]

        value = torch.full((len(signals),), torch.nan, dtype=torch.float64)
        value[rows] = torch.from_numpy(closeness)
        return ledger_of(signals, picks, k, {"value": value}, {reasons.NEVER_SCORED: ~known})

    def _clusters(self, unit: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.cluster import MiniBatchKMeans

        batch = max(_ITERATION_ROWS, k)
        label = MiniBatchKMeans(k, batch_size=batch, n_init=1, random_state=self.seed).fit(unit.numpy()).labels_
        cluster = torch.from_numpy(label).long()
        blocks = [slice(start, start + _ROWS) for start in range(0, len(unit), _ROWS)]
        centroids = torch.zeros(k, unit.shape[1], dtype=torch.float64)
        for rows in blocks:
            centroids.index_add_(0, cluster[rows], unit[rows].double())
        centroids = torch.nn.functional.normalize(centroids, dim=1)
        cosine = torch.cat([(unit[rows].double() * centroids[cluster[rows]]).sum(dim=1) for rows in blocks])
        return label, cosine.numpy().round(9)
