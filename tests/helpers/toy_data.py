"""Small datasets made on the spot, and slow but plain answers about them."""

from pathlib import Path

import numpy as np

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"


def write_dataset(root, rows, items=None, users=None, name="toy"):
    """Write `rows` [(user, item, timestamp)] as <root>/<name>/<name>.inter, and the item and user files when given."""
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [INTER, *(f"{user}\t{item}\t3\t{timestamp}" for user, item, timestamp in rows)]
    (folder / f"{name}.inter").write_text("\n".join(lines) + "\n")
    if items is not None:
        lines = ["item_id:token\tmovie_title:token_seq", *(f"{item}\t{title}" for item, title in items)]
        (folder / f"{name}.item").write_text("\n".join(lines) + "\n")
    if users is not None:
        (folder / f"{name}.user").write_text("\n".join(["user_id:token", *users]) + "\n")
    return folder


def random_rows(seed=0, n=900, n_users=12, n_moments=150, n_items=60, unique_items=False):
    """Interactions in no order, most sharing user and second with another; items repeat unless `unique_items`."""
    rng = np.random.default_rng(seed)
    users, moments = rng.integers(0, n_users, n), np.sort(rng.integers(0, n_moments, n)) + 880_000_000
    moments[: n // 10] = rng.permutation(moments[: n // 10])
    items = rng.permutation(n) if unique_items else rng.integers(0, n_items, n)
    order = rng.permutation(n)
    return [(f"u{users[i]}", f"i{items[i]}", int(moments[i])) for i in order]


def known_before(rows):
    """For each sample_id of `rows`: (user, item, timestamp, the same user's strictly earlier items in order)."""
    ordered = [row for _, row in sorted(enumerate(rows), key=lambda pair: (pair[1][2], pair[0]))]
    return [
        (user, item, time, [other for who, other, when in ordered if who == user and when < time])
        for user, item, time in ordered
    ]
