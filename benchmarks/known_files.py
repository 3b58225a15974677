"""Writes pools of known kinds as files that a study reads, with policies whose completions are long.

python benchmarks/known_files.py --to data/known
python benchmarks/known_files.py --to data/known-5 --useful 0.05    # fewer samples that teach; 0.2: more
python benchmarks/known_files.py --to data/known-oracle --useful 1 --samples 200    # only the useful ones of data/known

Each seed has a folder with `sequences.parquet` (also the kind of each sample), `items.parquet` and, for completions of
16 and of 64 tokens, an untrained policy. `known_kinds.py` says what the kinds are. An item's number is written to base
42: its first digit is the token in the middle of its id and its second digit the last token. All other tokens are the
same filler, so a rollout hits only if both digits are right, and the last one is known when all tokens are written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from known_kinds import KnownKinds, counts_of

from minirec_pl.data.samples import Catalogue
from minirec_pl.policy.folder import StoredPolicy, write_policy
from minirec_pl.policy.language_models.tiny import SPECIAL_TOKENS, build_tiny

LENGTHS = (16, 64)
SEEDS = (*range(1, 10), 101)  # 101 is for tuning
SAMPLES, USEFUL = 2_000, 0.1
HISTORY = 3  # items of a prompt: two fillers and the key
BASE = 42


def pool_of(useful: float = USEFUL) -> dict[str, float]:
    """Shares of the pool by kind: what is not useful is solved, redundant and hopeless in equal parts."""
    return {"useful": useful, **dict.fromkeys(("solved", "redundant", "hopeless"), (1 - useful) / 3)}


def source_of(seed: int, useful: float = USEFUL, samples: int = SAMPLES) -> KnownKinds:
    """The samples of a seed; all but the pool are the same for any share of useful samples."""
    return KnownKinds(seed, counts_of(pool_of(useful), samples), n_candidates=8, warm_repeats=12, held_out=6)


def long_ids(n_items: int, length: int) -> tuple[torch.Tensor, list[str]]:
    """Ids of so many tokens, int64 [n_items, length], and the names of the tokens from 0."""
    first, second = np.divmod(np.arange(n_items), BASE)
    ids = np.zeros((n_items, length), dtype=np.int64)
    ids[:, length // 2 - 1], ids[:, length - 1] = 1 + first, 1 + BASE + second
    return torch.from_numpy(ids), ["<filler>", *(f"<{place}{digit}>" for place in "ab" for digit in range(BASE))]


def policy_of(catalogue: Catalogue, length: int, seed: int) -> StoredPolicy:
    """An untrained policy with ids of so many tokens."""
    torch.manual_seed(seed)
    ids, words = long_ids(len(catalogue), length)
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": (HISTORY + 1) * length + 1,
        "tie_word_embeddings": True,
    }
    model = build_tiny(config, len(SPECIAL_TOKENS) + len(words))
    return StoredPolicy(model, catalogue, ids + len(SPECIAL_TOKENS), {}, words=words, made_for={})


def write(to: Path, seed: int, source: KnownKinds, lengths: Sequence[int] = LENGTHS) -> None:
    """Writes the files of a seed into `to`/SEED."""
    samples = source.read()
    table, folder = samples.table, to / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    catalogue = Catalogue([str(item) for item in range(source.n_items)])
    rows = {
        "user_id": table.user,
        "history_item_id": [table.history(row).tolist() for row in range(len(table.item))],
        "item_id": table.item,
        "split": table.part,
        "kind": source.kinds,
    }
    pd.DataFrame(rows).to_parquet(folder / "sequences.parquet", index=False)
    pd.DataFrame({"item_id": range(source.n_items)}).to_parquet(folder / "items.parquet", index=False)
    for length in lengths:
        write_policy(folder / f"policy-{length}", policy_of(catalogue, length, seed))


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the files of all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    parser.add_argument("--useful", type=float, default=USEFUL, help="share of the pool (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the pool (default: %(default)s)")
    options = parser.parse_args(argv)
    for seed in SEEDS:
        source = source_of(seed, options.useful, options.samples)
        write(options.to, seed, source)
        print(f"seed {seed}: warm_fraction {source.warm_fraction:.7f}")


if __name__ == "__main__":
    main()
