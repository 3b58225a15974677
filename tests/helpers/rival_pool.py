"""A pool with every signal, and readings of it and of a ledger by sample_id."""

import numpy as np

from minirec_pl.selection import Signals


def pool(n=60, seed=0, group=8, **changes):
    random = np.random.default_rng(seed)
    rewards = (random.uniform(size=(n, group)) < random.uniform(0.1, 0.9, size=(n, 1))).astype(float)
    rewards[:, :2] = [0, 1]  # no group without variance
    fields = {
        "sample_id": random.permutation(np.arange(100, 100 + n)),
        "reward_mean": rewards.mean(axis=1),
        "reward_std": rewards.std(axis=1),
        "n_rollouts": np.full(n, group),
        "solve_share": rewards.mean(axis=1),
        "gradient": random.normal(size=(n, 5)),
        "embedding": random.normal(size=(n, 4)),
    }
    return Signals(**(fields | changes))


def random_pool(n=60, seed=0, **changes):
    """A pool of sparse rewards, in which groups without variance are common."""
    random = np.random.default_rng(seed)
    solve = random.uniform(size=n) ** 3
    rewards = (random.uniform(size=(n, 8)) < solve[:, None]).astype(float)
    fields = {
        "sample_id": random.permutation(np.arange(100, 100 + n)),
        "reward_mean": rewards.mean(axis=1),
        "reward_std": rewards.std(axis=1),
        "n_rollouts": np.full(n, 8),
        "solve_share": rewards.mean(axis=1),
        "gradient": random.normal(size=(n, 5)),
        "embedding": random.normal(size=(n, 4)),
    }
    return Signals(**(fields | changes))


def by_id(signals, name):
    values = getattr(signals, name)
    return {int(i): row.tolist() for i, row in zip(signals.sample_id, values, strict=True)}


def best(score, k):
    """The k highest scores by sample_id, ties to the smaller id."""
    return sorted(score, key=lambda i: (-score[i], i))[:k]


def values(ledger):
    return ledger.table.set_index("sample_id")["value"].to_dict()
