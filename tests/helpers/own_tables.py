"""Tables as users have them, made on the spot from toy interactions."""

import gzip
import json

import pandas as pd

from .toy_data import random_rows


def log_frame(seed=0, **options):
    """Random interactions without repeats of (user, item, time): user_id, item_id, rating, timestamp."""
    rows = list(dict.fromkeys(random_rows(seed, **options)))
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    return frame.assign(rating=[float(1 + i % 5) for i in range(len(frame))])


def item_frame(log):
    """item_id, title and brand of every item of a log, in descending order of ids."""
    ids = sorted(log["item_id"].unique(), reverse=True)
    return pd.DataFrame({"item_id": ids, "title": [f"Thing {i}" for i in ids], "brand": [f"B{i}" for i in ids]})


def sequence_frame(log, window=5, parts=("train", "train", "train", "test")):
    """A row for each interaction that has earlier ones, with the last `window` of these, ordered by time."""
    rows = []
    ordered = log.sort_values("timestamp", kind="stable")
    for _, own in ordered.groupby("user_id", sort=False):
        items, times = own["item_id"].tolist(), own["timestamp"].tolist()
        for i in range(1, len(items)):
            history = [item for item, time in zip(items, times, strict=True) if time < times[i]][-window:]
            if history:
                rows.append((own["user_id"].iloc[0], history, items[i], times[i]))
    frame = pd.DataFrame(rows, columns=["user_id", "history_item_id", "item_id", "timestamp"])
    frame = frame.sort_values("timestamp", kind="stable", ignore_index=True)
    return frame.assign(split=[parts[len(parts) * i // len(frame)] for i in range(len(frame))])


def write_amazon(folder, reviews, items, category="Toys"):
    """The dump of a category: raw reviews and metadata as jsonl.gz."""
    for name, rows in ((category, reviews), (f"meta_{category}", items)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
