"""What a policy recommended, as rows and as a table in the terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from minirec_pl.grpo.buffer import RolloutBatch

Row: TypeAlias = dict[str, Any]
_TEXTS = ("prompt", "target", "completion", "recommended")


def completion_rows(
    rollouts: RolloutBatch, item_ids: Any, num_prompts: int, words: Callable[[Tensor], list[str]] | None = None
) -> list[Row]:
    """Makes a row for each rollout of the first prompts: texts and plain numbers, None where a reward does not apply.

    Args:
        rollouts: what was trained on.
        item_ids: [n_items] object array of external ids.
        num_prompts: how many prompts.
        words: makes words of the rollouts' tokens, where these are texts.
    """
    rows: list[Row] = []
    for b in range(min(num_prompts, len(rollouts))):
        history = rollouts.batch["history"][b].cpu()
        drawn = rollouts.exists[b]
        names = [str(item_ids[item]) for item in rollouts.items[b][drawn].tolist()]
        texts = None if words is None or rollouts.texts is None else words(rollouts.texts[b][drawn])
        for g, name in enumerate(names):
            made = {"completion": name} if texts is None else {"completion": texts[g], "recommended": name}
            rewards = {f"reward/{key}": _number(v[b, g]) for key, v in rollouts.rewards_by_name.items()}
            rows.append(
                {
                    "sample_id": int(rollouts.batch["sample_id"][b]),
                    "prompt": " ".join(item_ids[history[history >= 0].numpy()]),
                    "target": str(item_ids[int(rollouts.batch["target"][b])]),
                    **made,
                    **rewards,
                    "reward": _number(rollouts.rewards[b, g]) if bool(rollouts.applies[b, g]) else None,
                    "advantage": _number(rollouts.advantages[b, g]),
                }
            )
    return rows


def _number(value: Any) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number


def print_completions(rows: list[Row]) -> None:
    """Prints the rows of one step as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Completions, step {rows[0]['step']}")
    columns = [name for name in rows[0] if name != "step"]
    for name in columns:
        table.add_column(name, justify="left" if name in _TEXTS else "right")
    last: Mapping[str, Any] = {}
    for row in rows:
        again = ("sample_id", "prompt", "target") if row["sample_id"] == last.get("sample_id") else ()
        table.add_row(*(Text("" if name in again else _cell(row[name])) for name in columns))
        last = row
    Console(file=sys.stdout).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = "-" if value is None else " ".join(str(value).split())
    return text if len(text) <= 60 else f"... {text[-56:]}"
