"""Predicts the solve probability of the pool for a run's selector, and compares it with what training then met."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from minirec_pl.selection.calibration import calibration
from minirec_pl.selection.predicted import table_features
from minirec_pl.selection.signals import SampleSignals
from minirec_pl.utils.errors import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from minirec_pl.selection.session.session import SelectionSession

_NO_FEATURES = (
    "the data say nothing of users and items, so the solve probability is predicted {}: define "
    "sample_features(sample_ids) on the DataModule, a table of numbers with a row per sample"
)


class Predictions:
    """Refits the predictor of a session before a selection; features are computed once.

    Attributes:
        vectors: float32 [N, D] of the samples, for the novelty and, without embeddings, for the prediction; None where
            the data have none; after `refit`.
    """

    def __init__(self) -> None:
        self.vectors: Tensor | None = None
        self._features: pd.DataFrame | None = None
        self._note: str | None = None
        self._known_for: Tensor | None = None

    def refit(self, session: SelectionSession, trainer: Trainer, epoch: int) -> None:
        """Predicts every sample from the outcomes so far and sets the prior of the store.

        Raises:
            InputError: If the DataModule returns features of another number of samples, or that are not numbers.
        """
        predictor, store = session.predictor, session.store
        assert predictor is not None
        if self._known_for is not store.sample_ids:
            self._find(trainer, store.sample_ids)
            self._known_for = store.sample_ids
        view = store.pool_view(epoch)
        assert view.hits is not None
        assert view.misses is not None
        vectors, vectors_known = view.embedding, view.embedding_known
        if vectors is None:
            vectors, vectors_known = self.vectors, None
        found = predictor.predict(
            view.hits,
            view.misses,
            self._features,
            vectors,
            vectors_known,
            met_at=torch.maximum(store.clock("reward_epoch"), store.clock("solve_probability_epoch")),
            squared_weights=store.squared_weights,
        )
        for note in (*found.notes, *self._notes(view.embedding is not None)):
            session.warn_once(trainer, f"predicted difficulty: {note}", note)
        store.set_prior(found.mean, found.strength, epoch=epoch, step=session.step(trainer))

    def _notes(self, embedded: bool) -> list[str]:
        if self._features is None:
            return [_NO_FEATURES.format("from embeddings alone" if embedded else "the same for all never met")]
        return [] if self._note is None else [self._note]

    def _find(self, trainer: Trainer, sample_ids: Tensor) -> None:
        self._features = self._note = self.vectors = None
        data, ids = getattr(trainer, "datamodule", None), sample_ids.numpy()
        described: Any = getattr(data, "sample_features", None)
        if described is not None:
            found = described(ids)
            self._features = getattr(found, "table", found)
            vectors = getattr(found, "vectors", None)
            self.vectors = None if vectors is None else torch.as_tensor(vectors)
            if not isinstance(self._features, pd.DataFrame):
                raise InputError(
                    f"{type(data).__name__}.sample_features returned a {type(found).__name__}: return a pandas "
                    "DataFrame of numbers with a row per sample_id"
                )
        elif (users_and_items := getattr(data, "users_and_items", None)) is not None:
            rows = users_and_items(ids).set_index("sample_id").loc[ids]
            self._features, self._note = table_features(rows)


def forecast(session: SelectionSession, met: SampleSignals) -> None:
    """Keeps what was predicted of groups beside their outcomes; called before the store takes them in.

    An exact solve probability p, met without rollouts, is the outcome p of a rollout.
    """
    if session.predictor is None or not session.store.has_prior:
        return
    if met.rewards is not None:
        hits, size = (met.rewards.cpu() > session.store.solve_threshold).sum(dim=1).double(), met.rewards.shape[1]
    elif met.solve_probability is not None:
        hits, size = met.solve_probability.cpu().double(), 1
    else:
        return
    columns = [session.store.posterior_mean(met.sample_id), hits, size - hits]
    session.forecasts.append(torch.stack(columns, dim=1))


def compare(session: SelectionSession) -> dict[str, float]:
    """Returns the calibration of the predictions of the plan that ended, and keeps its reliability curve."""
    if not session.forecasts:
        return {}
    columns: Any = torch.cat(session.forecasts).numpy()
    session.forecasts = []
    found = calibration(*np.ascontiguousarray(columns.T))
    session.reliability = [found.predicted, found.observed]
    return found.figures()
