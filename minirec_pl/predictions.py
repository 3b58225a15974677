"""Recommendations as a table with external ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from minirec_pl.data.columns import Columns
from minirec_pl.files import write_atomically

if TYPE_CHECKING:
    from minirec_pl.recommender import RecModule


def write_predictions(batches: Sequence[Any], module: RecModule, data: Any, path: Path) -> Path:
    """Writes parquet with the columns sample_id, user_id, item_id, score (log-probability in nats) and rank (from 1).

    Args:
        batches: what `RecModule.predict_step` returned.
        module: the recommender, for its item ids.
        data: the DataModule, for its user ids.
        path: file to write.
    """
    joined = {
        key: torch.cat([batch[key].cpu() for batch in batches]) for key in ("sample_id", "user", "items", "scores")
    }
    items, scores = joined["items"].numpy(), joined["scores"].numpy()
    n, k = items.shape
    keep = items.ravel() >= 0
    users = np.asarray(data.table.user_ids, dtype=object)[joined["user"].numpy()]
    table = pd.DataFrame(
        {
            Columns.SAMPLE_ID: joined["sample_id"].numpy().repeat(k)[keep],
            Columns.USER_ID: users.repeat(k)[keep],
            Columns.ITEM_ID: module.item_ids[items.ravel()[keep]],
            "score": scores.ravel()[keep],
            "rank": np.tile(np.arange(1, k + 1), n)[keep],
        }
    )
    return write_atomically(path, lambda temporary: table.to_parquet(temporary, index=False))
