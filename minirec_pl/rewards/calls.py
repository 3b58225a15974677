"""How rewards are called: TRL's contract, checked.

A reward is any callable `reward(completions, **columns) -> list[float | None]`, which gets the columns that its
signature names. `completions` are external item ids, or texts, flat, group after group; the columns are as long
(`BUILT_IN` lists them; `minirec_pl.data.own_columns` has those of the data). None says that the reward does not apply.
"""

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from minirec_pl.data.own_columns import OwnColumns, Place, values_at
from minirec_pl.data.samples import IntArray
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.identity import settings_of

RewardFunction = Callable[..., Sequence[float | None]]
Columns = Mapping[str, Callable[[], Sequence[Any]]]
BUILT_IN: Final = (
    "completions",
    "recommended",
    "target",
    "history",
    "prompts",
    "sample_id",
    "user",
    "group",
    "logp",
    "target_rank",
    "target_probability",
)


def reward_name(fn: RewardFunction) -> str:
    """Names a reward as it is logged: the function's own, or the class name of a callable object.

    Example:
        >>> from minirec_pl.rewards import hit
        >>> reward_name(hit)
        'hit'
    """
    while isinstance(fn, functools.partial):
        fn = fn.func
    return str(getattr(fn, "__name__", type(fn).__name__)).strip("<>")


def checked_rewards(rewards: Sequence[RewardFunction]) -> list[RewardFunction]:
    """Returns rewards as a list.

    Raises:
        InputError: If it is not one of functions, or of objects that can be called.
    """
    given = list(rewards) if isinstance(rewards, Sequence) and not isinstance(rewards, str) else [None]
    for fn in given:
        if inspect.isclass(fn):
            raise InputError(f"the reward {fn.__name__} is a class: give an object of it, {fn.__name__}(...)")
        if not callable(fn):
            raise InputError(f"rewards is {rewards!r}: give a list of functions `reward(completions, **columns)`")
    return given


def described(fn: RewardFunction) -> str:
    """Names a reward with its own numbers, texts and switches, as two runs compare it.

    Example:
        >>> from minirec_pl.rewards import NDCGReward
        >>> described(NDCGReward(k=5))
        'NDCGReward(k=5)'
    """
    given = fn.keywords if isinstance(fn, functools.partial) else {}
    options = "".join(f", {name}={value!r}" for name, value in given.items() if isinstance(value, str | int | float))
    named = isinstance(fn, functools.partial | FunctionType)
    return f"{reward_name(fn)}{options}" if named else settings_of(fn)


def asked_for(fns: Sequence[RewardFunction]) -> frozenset[str]:
    """Lists the names in the signatures of rewards."""
    return frozenset(parameter.name for fn in fns for parameter in _parameters(fn))


def check_columns(fns: Sequence[RewardFunction], own: OwnColumns) -> None:
    """Refuses rewards that ask for a column that there is not, or by a name that may mean two.

    Args:
        fns: the rewards.
        own: columns of the data.

    Raises:
        InputError: naming the reward, the column and those there are.
    """
    for fn in fns:
        for parameter in _parameters(fn):
            name, places = parameter.name, own.places(parameter.name)
            if name in BUILT_IN:
                places = [] if _is_shipped(fn) else [place for place in places if place.column == name]
                places = [Place("sample", name), *places] if places else [Place("sample", name)]
            if len(places) > 1:
                raise InputError(_unclear(fn, name, places))
            if not places and parameter.default is parameter.empty:
                described = own.described()
                raise InputError(
                    f"reward {reward_name(fn)} asks for {name!r}: ask by keyword for one of {', '.join(BUILT_IN)}"
                    f"{'; or for a column ' if described else ''}{described}"
                )


def call_reward(
    fn: RewardFunction, name: str, completions: Sequence[str], columns: Columns, own: Columns | None = None
) -> Tensor:
    """Calls one reward with the columns its signature names, and check what it returns.

    Args:
        fn: Any callable; with `**kwargs` it gets every one of `columns`.
        name: Name for messages.
        completions: [n] external item ids.
        columns: Functions that make the columns, [n] each; only those asked for are called.
        own: Likewise, columns of the data, which only a signature that names them gets.

    Returns:
        [n] float32 on the CPU, NaN where the reward said None.

    Raises:
        InputError: If the reward wants an unknown column, or returns something else than n finite numbers or None.
            Names the reward and the sample_id.
    """
    given: Columns = {"completions": lambda: completions, **columns}
    available = {**(own or {}), **given}
    values = fn(**{column: available[column]() for column in _wanted(fn, name, given, own or {})})
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise InputError(f"reward {name} returned {type(values).__name__}: return a list with a number per completion")
    if len(values) != len(completions):
        raise InputError(
            f"reward {name} returned {len(values)} values for {len(completions)} completions "
            f"({_samples(columns, range(len(completions)))}): return one per completion"
        )
    rewards = torch.tensor(_floats(values, name, columns), dtype=torch.float64).float()
    finite = rewards.isfinite()
    if not bool(finite.all()):
        wrong = [row for row in (~finite).nonzero().flatten().tolist() if values[row] is not None]
        if wrong:
            raise InputError(
                f"reward {name} returned {values[wrong[0]]} for {_samples(columns, wrong)}: "
                "return a finite number, or None where the reward does not apply"
            )
    return rewards


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def combine_rewards(
    fns: Sequence[RewardFunction],
    weights: Sequence[float] | None,
    completions: Sequence[str],
    columns: Columns,
    own: Columns | None = None,
    warn: Callable[[str], None] = _warn,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums the rewards with their weights, r_n = sum_f w_f r_fn over the rewards f that apply to completion n.

    Args:
        fns: At least one reward.
        weights: One per reward; None weighs each with 1.
        completions: [n] external item ids, flat, group after group.
        columns: Functions that make the columns (`prompts`, `target`, `sample_id`, ...), [n] each; one is called at
            most once, and only if a reward asks for it or a message needs it.
        own: Likewise, columns of the data, see `call_reward`.
        warn: Shows a warning.

    Returns:
        The sum, [n] float32, and each reward by name, [n] float32; NaN in both where none applies, which a warning
        says of the sum. A second reward of one name gets the suffix `_2`.

    Raises:
        InputError: If there is no reward, the weights do not fit, or as `call_reward`.

    Example:
        >>> from minirec_pl.rewards import hit
        >>> total, by_name = combine_rewards([hit], None, ["50", "7"], {"target": lambda: ["50", "8"]})
        >>> total
        tensor([1., 0.])
    """
    if not fns:
        raise InputError("there is no reward function: name at least one in the option rewards")
    weights = [1.0] * len(fns) if weights is None else weights
    if len(weights) != len(fns):
        raise InputError(
            f"there are {len(fns)} reward functions but {len(weights)} reward weights: give one weight each"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"reward weights are {list(weights)}: give finite numbers")

    once = {column: functools.cache(make) for column, make in columns.items()}
    own_once = {column: functools.cache(make) for column, make in (own or {}).items()}
    by_name: dict[str, Tensor] = {}
    total = torch.zeros(len(completions), dtype=torch.float64)
    applies = torch.zeros(len(completions), dtype=torch.bool)
    for fn, weight in zip(fns, weights, strict=True):
        name = _free_name(reward_name(fn), by_name)
        rewards = call_reward(fn, name, completions, once, own_once)
        by_name[name] = rewards
        total += weight * rewards.nan_to_num(nan=0.0)
        applies |= ~rewards.isnan()
    if not bool(applies.all()):
        warn(f"no reward of {', '.join(by_name)} applies to some completions: they are left out")
    return total.masked_fill(~applies, math.nan).float(), by_name


def item_columns(batch: Mapping[str, Tensor], items: Tensor, logps: Tensor | None, item_ids: Any) -> Columns:
    """Makes the columns a reward can ask for when completions are items.

    * `prompts`: the history's item ids, separated by spaces; `history`: the same as a list.
    * `target`: the item id wanted. `sample_id` and `user`: int.
    * `group`: number of the group in the batch, the same for the rollouts of one prompt.
    * `logp`: log-probability with which the completion was drawn, in nats; not known where `logps` is None.

    Args:
        batch: the prompts, [B, ...] each.
        items: int64 [B, G], item index.
        logps: float [B, G].
        item_ids: [n_items] object array of external ids.
    """
    n_rows, group = items.shape

    def spread(values: Sequence[Any]) -> list[Any]:
        return [value for value in values for _ in range(group)]

    def histories() -> list[list[str]]:
        return [item_ids[row[row >= 0].numpy()].tolist() for row in batch["history"].cpu()]

    columns: dict[str, Callable[[], Sequence[Any]]] = {
        "prompts": lambda: spread([" ".join(history) for history in histories()]),
        "target": lambda: item_ids[batch["target"].cpu().numpy().repeat(group)].tolist(),
        "sample_id": lambda: batch["sample_id"].cpu().numpy().repeat(group).tolist(),
        "history": lambda: spread(histories()),
        "group": lambda: spread(range(n_rows)),
    }
    if "user" in batch:
        columns["user"] = lambda: batch["user"].cpu().numpy().repeat(group).tolist()
    if logps is not None:
        columns["logp"] = lambda: logps.flatten().tolist()
    return columns


@dataclass(frozen=True)
class Rewarder:
    """The rewards of a module, called on groups of rollouts.

    Attributes:
        fns: at least one reward.
        weights: one per reward; None weighs each with 1.
        item_ids: [n_items] object array of external ids.
        own: columns of the data.
        warn: shows a warning.
    """

    fns: Sequence[RewardFunction]
    weights: Sequence[float] | None
    item_ids: Any
    own: OwnColumns = field(default_factory=OwnColumns)
    warn: Callable[[str], None] = _warn

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        items: Tensor,
        logps: Tensor,
        texts: Sequence[str] | None = None,
        more: Columns | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns rewards float32 [B, G], NaN where none applies, and the single ones by name.

        Args:
            batch: the prompts, [B, ...] each.
            items: int64 [B, G], item index.
            logps: float [B, G].
            texts: [B * G], the completions; the items' ids if None.
            more: columns beside those of `item_columns`.
        """
        recommended = self.item_ids[items.flatten().cpu().numpy()].tolist()
        completions = recommended if texts is None else texts
        columns = {
            **item_columns(batch, items, logps, self.item_ids),
            **(more or {}),
            "recommended": lambda: recommended,
        }
        own = own_columns(batch, items, self.own, asked_for(self.fns))
        total, by_name = combine_rewards(self.fns, self.weights, completions, columns, own, self.warn)
        return total.view_as(items).to(items.device), {
            name: given.view_as(items).to(items.device) for name, given in by_name.items()
        }


def own_columns(batch: Mapping[str, Tensor], items: Tensor, own: OwnColumns, names: Collection[str]) -> Columns:
    """Makes the columns of the data that rewards ask for, None where a value is missing.

    Args:
        batch: the prompts, [B, ...] each.
        items: int64 [B, G], what is recommended, item index.
        own: columns of the data.
        names: what is asked for; what is no column is left out.
    """
    group = items.shape[1]
    histories = [row[row >= 0] for row in batch["history"].cpu().numpy()] if "history" in batch else []
    rows: dict[str, Callable[[], IntArray]] = {
        "interaction": lambda: batch["sample_id"].cpu().numpy().repeat(group),
        "target": lambda: batch["target"].cpu().numpy().repeat(group),
        "recommended": lambda: items.flatten().cpu().numpy(),
    }

    def make(place: Place) -> Callable[[], list[Any]]:
        if place.owner == "history":
            lists = [values_at(own.items[place.column], row) for row in histories]
            return lambda: [values for values in lists for _ in range(group)]
        kept = own.interactions if place.owner == "interaction" else own.items
        return lambda: values_at(kept[place.column], rows[place.owner]())

    return {name: make(own.places(name)[0]) for name in names if name not in BUILT_IN and own.places(name)}


def ranking_columns(rank: Tensor, probability: Tensor) -> Columns:
    """Makes the columns that rewards get beside those of `item_columns` from a policy that ranks for each rollout.

    * `target_rank`: of the target among the unseen items, from 1; None where the user has seen it.
    * `target_probability`: its softmax probability over the unseen items.

    Args:
        rank: int64 [B, G], 0 for None.
        probability: float [B, G].
    """
    return {
        "target_rank": lambda: [place or None for place in rank.flatten().tolist()],
        "target_probability": lambda: probability.flatten().tolist(),
    }


def _wanted(fn: RewardFunction, name: str, given: Columns, own: Columns) -> list[str]:
    parameters = inspect.signature(fn).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.name in {*given, *own}]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return [*given, *(column for column in names if column not in given)]
    for parameter in parameters:
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        if required and (parameter.name not in names or parameter.kind is parameter.POSITIONAL_ONLY):
            raise InputError(
                f"reward {name} asks for {parameter.name!r}: ask by keyword for one of {', '.join({**given, **own})}"
            )
    return names


def _parameters(fn: RewardFunction) -> list[inspect.Parameter]:
    several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [parameter for parameter in inspect.signature(fn).parameters.values() if parameter.kind not in several]


def _is_shipped(fn: RewardFunction) -> bool:
    """Whether a reward is of this library, where names mean what the library says, whatever the data call theirs."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return str(getattr(fn, "__module__", "")).startswith("minirec_pl.rewards.")


def _unclear(fn: RewardFunction, name: str, places: Sequence[Place]) -> str:
    meanings = {
        "sample": "what every reward gets",
        "interaction": "a column of the interactions",
        "target": "a column of the items",
        "recommended": "that of the recommended item",
        "history": "that of the history's items",
    }
    clear = dict.fromkeys(f"{place.owner}_{place.column}" for place in places if place.owner != "sample")
    return (
        f"reward {reward_name(fn)} asks for {name!r}, which is both {meanings[places[0].owner]} and "
        f"{meanings[places[1].owner]}: ask for {' or '.join(n for n in clear if n != name)}, or rename one in the data"
    )


def _floats(values: Sequence[Any], name: str, columns: Columns) -> list[float]:
    plain = set(map(type, values)) <= {float, int, bool}
    return list(values) if plain else [_float(value, row, name, columns) for row, value in enumerate(values)]


def _float(value: Any, row: int, name: str, columns: Columns) -> float:
    if value is None:
        return math.nan
    if isinstance(value, (float, int, np.number, np.bool_)) or (isinstance(value, Tensor) and value.numel() == 1):
        return float(value)
    raise InputError(
        f"reward {name} returned {value!r} for {_samples(columns, [row])}: return a finite number, "
        "or None where the reward does not apply"
    )


def _samples(columns: Columns, rows: Sequence[int]) -> str:
    """The sample_ids of rows, at most five, or the row numbers where there are no ids."""
    word, ids = "completion", list(rows)
    if "sample_id" in columns:
        known = columns["sample_id"]()
        word, ids = "sample_id", list(dict.fromkeys(int(known[row]) for row in rows))
    return f"{word} {', '.join(map(str, ids[:5]))}{' and others' if len(ids) > 5 else ''}"


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    number = 2
    free = name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free
