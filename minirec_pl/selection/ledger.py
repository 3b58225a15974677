"""The ledger: which samples were selected, in which order, and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from minirec_pl.selection.maxmin.greedy import nearest_pick
from minirec_pl.selection.reasons import BELOW_BUDGET, FILLED, REDUNDANT, SELECTED, WHY
from minirec_pl.selection.signals import Array
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import write_atomically

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
COLUMNS = tuple(_DTYPES)
_OPTIONAL = ("score", "difficulty", "redundant_with")
_MISSING = {"rank": 0, "redundant_with": -1}  # of the columns that can miss a number, in `columns` and a checkpoint
_UNFINISHED = "unfinished"
_SAID = ("fingerprints", "difficulty_name", "options")  # attributes that a file and a checkpoint keep
DIFFICULTY = "difficulty in use"


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

    Which samples are redundant is computed when `table` is first read, from the embeddings of the selection. Do not
    change those in place before then.

    Attributes:
        columns: [N] arrays by column, without a copy; 0 for a missing rank, -1 for a missing `redundant_with`, and the
            redundant may still be among those below the budget.
        fingerprints: What the signals were measured with, by name ("model", "data", "seed"); written into the file.
        difficulty_name: What the column `difficulty` holds, in words; written into the file.
        options: Those of the `MiniRecSelector` that made it, by name; empty of others; written into the file.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        *,
        source: str = "the ledger",
        fingerprints: Mapping[str, str] | None = None,
        difficulty_name: str = DIFFICULTY,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Checks and keeps a table.

        Args:
            table: The columns above, rows in any order; score, difficulty and redundant_with may be left out.
            source: How error messages call it.
            fingerprints: See the attribute.
            difficulty_name: See the attribute.
            options: See the attribute.

        Raises:
            InputError: If a column is missing or mistyped, ids repeat, ranks are not 1..n, or a reason is unknown.
        """
        self.fingerprints = dict(fingerprints or {})
        self.difficulty_name, self.options = difficulty_name, dict(options or {})
        self._embedding: torch.Tensor | None = None
        self._table: pd.DataFrame | None = _checked(table, source)
        whole = self._table.fillna(_MISSING).astype(dict.fromkeys(_MISSING, "int64") | {"reason": "object"})
        self.columns: dict[str, npt.NDArray[Any]] = {name: whole[name].to_numpy(copy=True) for name in _DTYPES}

    @classmethod
    def of(
        cls,
        columns: Mapping[str, npt.NDArray[Any]],
        embedding: torch.Tensor | None = None,
        difficulty_name: str = DIFFICULTY,
        options: Mapping[str, Any] | None = None,
    ) -> SelectionLedger:
        """Makes the ledger of a selector, whose columns need no check.

        Args:
            columns: See the attribute; rows ascending by sample_id.
            embedding: [N, E], if redundant samples are still to be told from those below the budget.
            difficulty_name: See the attribute.
            options: See the attribute.
        """
        ledger = cls.__new__(cls)
        ledger.fingerprints, ledger.difficulty_name, ledger.options = {}, difficulty_name, dict(options or {})
        ledger.columns, ledger._table, ledger._embedding = dict(columns), None, embedding
        return ledger

    @property
    def table(self) -> pd.DataFrame:
        """The pandas table; treat it as read-only."""
        if self._table is None:
            self._finish()
            table = pd.DataFrame(self.columns)
            for name, missing in _MISSING.items():
                table[name] = table[name].astype("Int64").where(table[name] != missing)
            self._table = table[list(_DTYPES)].astype(_DTYPES)
        return self._table

    def _finish(self) -> None:
        if self._embedding is not None:
            _name_redundant(self.columns, self._embedding)
            self._embedding = None

    def __len__(self) -> int:
        return len(self.columns["sample_id"])

    @property
    def n_selected(self) -> int:
        """Number of picks."""
        return int((self.columns["rank"] > 0).sum())

    def selected(self, k: int | None = None) -> list[int]:
        """Returns the picks, best first; a smaller budget is a prefix.

        Args:
            k: Number of picks; None means all.

        Returns:
            [k] sample_ids.

        Raises:
            InputError: If k is not in 1..n_selected.
        """
        rank = self.columns["rank"]
        rows = np.flatnonzero(rank)
        if k is not None and not 1 <= k <= len(rows):
            raise InputError(f"a budget of {k} cannot be read off a ledger with {len(rows)} picks: select again")
        picks: list[int] = self.columns["sample_id"][rows[np.argsort(rank[rows])]][:k].tolist()
        return picks

    def rows(self, sample_ids: list[int]) -> pd.DataFrame:
        """Returns the rows of some samples, in the order asked for.

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
                raise InputError(
                    f"sample_id {sample_id} is not in the ledger: name a sample of the pool it was made for"
                )
        return indexed.loc[sample_ids]

    def explain(self, sample_id: int) -> str:
        """Says in one sentence why a sample was or was not picked.

        Args:
            sample_id: A sample of the pool.

        Returns:
            The sentence, with the known terms.

        Raises:
            InputError: If the sample is not in the ledger.
        """
        row = self.rows([sample_id]).iloc[0]
        why = WHY[row["reason"]]
        if pd.notna(row["rank"]):
            verdict = f"sample {sample_id} is pick {row['rank']} of {self.n_selected}{why}"
        else:
            like = f", too like sample {row['redundant_with']}" if pd.notna(row["redundant_with"]) else ""
            verdict = f"sample {sample_id} was not picked: {why}{like}"
        known = [f"{term.replace('_', ' ')} {row[term]:.3g}" for term in _TERMS if pd.notna(row[term])]
        known.append(f"{row['n_rollouts']} rollouts")
        return f"{verdict}; {', '.join(known)}."

    def state_dict(self, *, embedding: torch.Tensor | None = None) -> dict[str, Any]:
        """Returns the columns as tensors, and the fingerprints.

        A missing rank is 0, a missing `redundant_with` -1, and `reason` a list of strings.

        Args:
            embedding: [N, E], what the caller keeps beside the state. If the redundant are still to be told by these
                very embeddings, that is left to `from_state_dict`.
        """
        own = self._embedding
        later = own is not None and embedding is not None and own.data_ptr() == embedding.data_ptr()
        if not later:
            self._finish()
        numbers = {name: values for name, values in self.columns.items() if name != "reason"}
        state: dict[str, Any] = {name: torch.from_numpy(values.copy()) for name, values in numbers.items()}
        return {
            **state,
            "reason": self.columns["reason"].tolist(),
            **{name: getattr(self, name) for name in _SAID},
            _UNFINISHED: later,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], *, embedding: torch.Tensor | None = None) -> SelectionLedger:
        """Makes the ledger with the content of `state_dict()`.

        Args:
            state: As returned by `state_dict`.
            embedding: As given to it.

        Raises:
            InputError: If it is not a ledger.
        """
        columns = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
        said: dict[str, Any] = {name: columns.pop(name) for name in _SAID if name in columns}
        later = columns.pop(_UNFINISHED, False)
        table = pd.DataFrame(columns)
        for name in _MISSING.keys() & set(table.columns):
            table[name] = table[name].astype("Int64").where(table[name] != _MISSING[name])
        ledger = cls(table, source="the saved ledger", **said)
        if later:
            ledger._table, ledger._embedding = None, embedding
        return ledger

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
        table.attrs = {name: getattr(self, name) for name in _SAID}
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
            raise InputError(f"there is no ledger at {path}: give the ledger.parquet that a run left in its folder")
        try:
            table = pd.read_parquet(path)
        except (OSError, ValueError) as error:  # pyarrow's errors derive from these
            raise InputError(f"{path} is not a readable parquet file: copy it again or select again") from error
        return cls(table, source=str(path), **{name: table.attrs[name] for name in _SAID if name in table.attrs})


def _checked(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """The table with its types, ascending by sample_id, see `SelectionLedger`."""
    table = table.assign(**{name: np.nan for name in _OPTIONAL if name not in table.columns})
    missing = [name for name in _DTYPES if name not in table.columns]
    if missing:
        raise InputError(f"{source} has no column {', '.join(missing)}: select again")
    try:
        typed = table[list(_DTYPES)].astype(_DTYPES)
    except (TypeError, ValueError) as error:
        raise InputError(f"{source} has a column of a wrong type ({error}): select again") from error
    typed = typed.sort_values("sample_id", ignore_index=True)
    repeated = typed["sample_id"][typed["sample_id"].duplicated()]
    if len(repeated):
        raise InputError(f"{source} has more than one row for sample_id {int(repeated.iloc[0])}: select again")
    unknown = set(typed["reason"].unique()) - set(WHY)
    if unknown:
        raise InputError(f"{source} has the unknown reason {sorted(unknown)[0]!r}: use one of {', '.join(WHY)}")
    picked = typed["rank"].notna()
    ranks = typed.loc[picked, "rank"].to_numpy(dtype=np.int64)
    if not np.array_equal(np.sort(ranks), np.arange(1, len(ranks) + 1)):
        raise InputError(f"{source} has ranks that are not 1..{len(ranks)}, each once: select again")
    if not (picked == typed["reason"].isin([SELECTED, FILLED])).all():
        raise InputError(f"{source} has rows whose rank and reason disagree: select again")
    if (typed["redundant_with"].notna() & (typed["reason"] != REDUNDANT)).any():
        raise InputError(f"{source} has rows whose reason and redundant_with disagree: select again")
    return typed


def _name_redundant(columns: dict[str, npt.NDArray[Any]], embeddings: Array) -> None:
    """Tells the redundant samples of a ledger from those below the budget, by the rule of `MiniRecSelector`.

    Args:
        columns: [N] arrays of a ledger by column, `reason`, `redundant_with`, `novelty` and `value` changed in place.
        embeddings: [N, E], of the same rows.
    """
    ranked = np.flatnonzero(columns["reason"] == SELECTED)
    picks = ranked[np.argsort(columns["rank"][ranked])]
    if not len(picks):
        return
    typical = np.sort(columns["novelty"][picks])[(len(picks) - 1) // 2]
    worth = columns["score"] * typical >= columns["value"][picks[-1]]
    rows = np.flatnonzero(worth & (columns["reason"] == BELOW_BUDGET))
    if not len(rows):
        return
    nearest = nearest_pick(embeddings, picks, rows=rows)
    distance = nearest.distance.numpy()
    columns["reason"][rows] = REDUNDANT
    columns["redundant_with"][rows] = columns["sample_id"][picks[nearest.position.numpy()]]
    columns["novelty"][rows] = distance
    columns["value"][rows] = distance * columns["score"][rows]
