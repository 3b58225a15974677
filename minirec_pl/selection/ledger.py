"""The ledger: what was selected, in which order, and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from minirec_pl.errors import InputError
from minirec_pl.files import write_atomically

SELECTED, FILLED = "selected", "filled"
TOO_HARD, TOO_EASY, NEVER_SCORED = "too_hard", "too_easy", "never_scored"
BELOW_BUDGET, REDUNDANT = "below_budget", "redundant"
_WHY = {
    SELECTED: "",
    FILLED: ", outside the gate, to fill the budget",
    TOO_HARD: "its difficulty value is below the gate (too hard)",
    TOO_EASY: "its difficulty value is above the gate (too easy)",
    BELOW_BUDGET: "others were worth more and the budget was spent",
    REDUNDANT: "it would have been worth a pick, were it as novel as most picks",
    NEVER_SCORED: "a signal the selector needs was never measured",
}
_TERMS = ("learnability", "representativeness", "score", "novelty", "value", "reward_mean", "reward_std", "difficulty")
_DTYPES = {
    "sample_id": "int64",
    "rank": "Int64",
    "learnability": "float64",
    "representativeness": "float64",
    "score": "float64",
    "novelty": "float64",
    "value": "float64",
    "reward_mean": "float64",
    "reward_std": "float64",
    "n_rollouts": "int64",
    "difficulty": "float64",
    "reason": "str",
    "redundant_with": "Int64",
}
_OPTIONAL = ("score", "difficulty", "redundant_with")
_MISSING = {"rank": 0, "redundant_with": -1}  # of the columns that can miss a number, in a checkpoint


class SelectionLedger:
    """A table with a row per sample of the pool.

    Columns:
        sample_id: int64, ascending.
        rank: Int64, 1 for the first pick; missing where not picked.
        learnability, representativeness: float64 in [0, 1], NaN where not known or not used.
        score: float64, alpha * learnability + representativeness; NaN where not known or not used.
        novelty: float64, of a pick its distance to the nearest earlier pick, of a redundant sample that to the nearest
            pick; else NaN.
        value: float64, novelty * score; NaN where novelty is. Of another selector
            than `MiniRecSelector` the score that its docstring names.
        reward_mean, reward_std: float64, of the rollouts; NaN where none was drawn.
        n_rollouts: int64.
        difficulty: float64, the difficulty in use (mean reward, or the solve probability of a group); higher is easier.
        reason: str, one of selected, filled, too_hard, too_easy, redundant, below_budget, never_scored.
        redundant_with: Int64, the sample_id of the nearest pick where the reason is redundant; else missing.

    Attributes:
        table: The pandas table; treat it as read-only.
        fingerprints: What the signals were measured with, by name ("model", "data", "seed"); written into the file.
    """

    def __init__(
        self, table: pd.DataFrame, *, source: str = "the ledger", fingerprints: Mapping[str, str] | None = None
    ) -> None:
        """Checks and keeps a table.

        Args:
            table: The columns above, rows in any order; score, difficulty and redundant_with may be left out.
            source: How error messages call it.
            fingerprints: See the attribute.

        Raises:
            InputError: If a column is missing or mistyped, ids repeat, ranks are not 1..n, or a reason is unknown.
        """
        self.fingerprints = dict(fingerprints or {})
        table = table.assign(**{name: np.nan for name in _OPTIONAL if name not in table.columns})
        missing = [name for name in _DTYPES if name not in table.columns]
        if missing:
            raise InputError(f"{source} has no column {', '.join(missing)}; select again.")
        try:
            typed = table[list(_DTYPES)].astype(_DTYPES)
        except (TypeError, ValueError) as error:
            raise InputError(f"{source} has a column of a wrong type ({error}); select again.") from error
        self.table = typed.sort_values("sample_id", ignore_index=True)
        repeated = self.table["sample_id"][self.table["sample_id"].duplicated()]
        if len(repeated):
            raise InputError(f"{source} has more than one row for sample_id {int(repeated.iloc[0])}.")
        unknown = set(self.table["reason"].unique()) - set(_WHY)
        if unknown:
            raise InputError(f"{source} has the unknown reason {sorted(unknown)[0]!r}; known are {', '.join(_WHY)}.")
        picked = self.table["rank"].notna()
        ranks = self.table.loc[picked, "rank"].to_numpy(dtype=np.int64)
        if not np.array_equal(np.sort(ranks), np.arange(1, len(ranks) + 1)):
            raise InputError(f"{source} has ranks that are not 1..{len(ranks)}, each once; select again.")
        if not (picked == self.table["reason"].isin([SELECTED, FILLED])).all():
            raise InputError(f"{source} has rows whose rank and reason disagree; select again.")
        if (self.table["redundant_with"].notna() & (self.table["reason"] != REDUNDANT)).any():
            raise InputError(f"{source} has rows whose reason and redundant_with disagree; select again.")

    def __len__(self) -> int:
        return len(self.table)

    @property
    def n_selected(self) -> int:
        """Number of picks."""
        return int(self.table["rank"].notna().sum())

    def selected(self, k: int | None = None) -> list[int]:
        """The picks, best first; a smaller budget is a prefix.

        Args:
            k: Number of picks; None means all.

        Returns:
            [k] sample_ids.

        Raises:
            InputError: If k is not in 1..n_selected.
        """
        picks = self.table.dropna(subset=["rank"]).sort_values("rank")["sample_id"]
        if k is not None and not 1 <= k <= len(picks):
            raise InputError(f"a budget of {k} cannot be read off a ledger with {len(picks)} picks; select again.")
        return [int(sample_id) for sample_id in picks[:k]]

    def rows(self, sample_ids: list[int]) -> pd.DataFrame:
        """The rows of some samples, in the order asked for.

        Args:
            sample_ids: [n].

        Returns:
            A table of n rows, indexed by sample_id.

        Raises:
            InputError: If a sample is not in the ledger.
        """
        indexed = self.table.set_index("sample_id")
        for sample_id in sample_ids:
            if sample_id not in indexed.index:
                raise InputError(f"sample_id {sample_id} is not in the ledger, so not in the pool it was made for.")
        return indexed.loc[sample_ids]

    def explain(self, sample_id: int) -> str:
        """One sentence on why a sample was or was not picked.

        Args:
            sample_id: A sample of the pool.

        Returns:
            The sentence, with the known terms.

        Raises:
            InputError: If the sample is not in the ledger.
        """
        row = self.rows([sample_id]).iloc[0]
        why = _WHY[row["reason"]]
        if pd.notna(row["rank"]):
            verdict = f"sample {sample_id} is pick {row['rank']} of {self.n_selected}{why}"
        else:
            like = f", too like sample {row['redundant_with']}" if pd.notna(row["redundant_with"]) else ""
            verdict = f"sample {sample_id} was not picked: {why}{like}"
        known = [f"{term.replace('_', ' ')} {row[term]:.3g}" for term in _TERMS if pd.notna(row[term])]
        known.append(f"{row['n_rollouts']} rollouts")
        return f"{verdict}; {', '.join(known)}."

    def state_dict(self) -> dict[str, Any]:
        """The table as tensors by column, and the fingerprints.

        A missing rank is 0, a missing `redundant_with` -1, and `reason` a list of strings.
        """
        whole = {"rank": "int64", "redundant_with": "int64"}
        numbers = self.table.drop(columns="reason").fillna(_MISSING).astype(whole)
        state: dict[str, Any] = {name: torch.from_numpy(numbers[name].to_numpy(copy=True)) for name in numbers.columns}
        state["reason"] = [str(reason) for reason in self.table["reason"]]
        state["fingerprints"] = dict(self.fingerprints)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> SelectionLedger:
        """The ledger with the content of `state_dict()`.

        Args:
            state: As returned by `state_dict`.

        Raises:
            InputError: If it is no ledger.
        """
        columns = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
        fingerprints: Any = columns.pop("fingerprints", {})
        table = pd.DataFrame(columns)
        for name in _MISSING.keys() & set(table.columns):
            table[name] = table[name].astype("Int64").where(table[name] != _MISSING[name])
        return cls(table, source="the saved ledger", fingerprints=fingerprints)

    def to_parquet(self, path: Path | str) -> Path:
        """Writes the table, whole or not at all.

        Args:
            path: A `.parquet` file.

        Returns:
            The path.

        Raises:
            InputError: If it cannot be written.
        """
        table = self.table.copy(deep=False)
        table.attrs = {"fingerprints": self.fingerprints}
        return write_atomically(Path(path), lambda temporary: table.to_parquet(temporary, index=False))

    @classmethod
    def from_parquet(cls, path: Path | str) -> SelectionLedger:
        """Reads a table that `to_parquet` wrote.

        Args:
            path: A `.parquet` file.

        Returns:
            The ledger.

        Raises:
            InputError: If the file is missing, damaged or not a ledger.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"there is no ledger at {path}; give the ledger.parquet that a run left in its folder.")
        try:
            table = pd.read_parquet(path)
        except (OSError, ValueError) as error:  # pyarrow's errors derive from these
            raise InputError(f"{path} is not a readable parquet file; copy it again or select again.") from error
        return cls(table, source=str(path), fingerprints=table.attrs.get("fingerprints"))
