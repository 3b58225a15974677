"""A study in YAML: data sets x methods x budgets x seeds, and the cells it stands for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from minirec_pl.cli.sentences import check_yaml
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.seeds import LARGEST_SEED

FORMAT = 1
POLICY, WARM_START = "model.policy.", "warm_start."
GRID_POINTS = 4
KEYS = {
    "like": "another study: its keys hold where this file has none, and methods can be like its methods",
    "config": "fit config that all cells share",
    "datasets": "list of {name, window, path, overrides}",
    "methods": "name: {budgets, epochs, like, overrides, per_dataset}",
    "budgets": "shares of the pool",
    "seeds": "list of integers",
    "epochs": "epochs of a cell",
    "references": "methods that the others are compared with",
    "overrides": "of all cells, not of their warm starts",
    "grid": "name of a setting: overrides",
}
STUDY = "a study is a mapping with the keys config, datasets, methods, budgets and seeds"
Overrides = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """One data set of a study.

    Args:
        name: of the data set.
        window: of time, in words; may be empty.
        overrides: of the fit config; `{path}` in them stands for `path`.
        path: of its files, which may lie elsewhere on another machine; no part of what a cell is.
    """

    name: str
    window: str
    overrides: Overrides = field(hash=False)
    path: str = ""

    @property
    def label(self) -> str:
        """`name/window`, or `name`."""
        return f"{self.name}/{self.window}" if self.window else self.name

    def filled(self, seed: int) -> Overrides:
        """The overrides with the path and a seed in their places."""
        filled: Overrides = _filled(self.overrides, {"{path}": self.path, "{seed}": seed})
        return filled

    @property
    def by_seed(self) -> bool:
        """Whether each seed has data or a model of its own: `{seed}` stands in the overrides."""
        return "{seed}" in json.dumps(self.overrides)

    def for_warm_start(self, seed: int) -> Overrides:
        """Those of `filled` that say which policy is warmed up and how, which is no matter of a cell."""
        return {key: value for key, value in self.filled(seed).items() if f"{key}.".startswith((POLICY, WARM_START))}


@dataclass(frozen=True)
class Method:
    """One method of a study.

    Args:
        name: as in the table.
        budgets: shares of the pool; (1.0,) for a method that takes no budget.
        takes_budget: whether `selection.budget` is set.
        epochs: of a cell.
        overrides: of the fit config.
        per_dataset: further overrides, by the name of the data set that they are for.
    """

    name: str
    budgets: tuple[float, ...]
    takes_budget: bool
    epochs: int
    overrides: Overrides = field(hash=False)
    per_dataset: Mapping[str, Overrides] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Cell:
    """One run of a study: a method on a data set at a budget, from one seed.

    Args:
        data: what it is trained on.
        method: how samples are selected.
        budget: share of the pool.
        seed: of everything random in it.
        setting: name of the point of the grid; empty without one.
        overrides: of that point.
    """

    data: Data
    method: Method
    budget: float
    seed: int
    setting: str = ""
    overrides: Overrides = field(default_factory=dict, hash=False)

    @property
    def id(self) -> str:
        """`dataset/window/method/budget/seed`, `method@setting` with a grid."""
        method = f"{self.method.name}@{self.setting}" if self.setting else self.method.name
        return f"{self.data.label}/{method}/{self.budget:g}/{self.seed}"

    def words(self, pool: int, batch_size: int) -> list[str]:
        """Makes the command line of the cell, without the config and without what is for the warm start.

        Args:
            pool: samples in the pool.
            batch_size: samples per optimizer step.
        """
        count = max(1, int(self.budget * pool)) if self.method.takes_budget else pool
        steps = self.method.epochs * -(-count // batch_size)
        own = self.method.per_dataset.get(self.data.name, {})
        warm = self.data.for_warm_start(self.seed)
        values = {key: value for key, value in self.data.overrides.items() if key not in warm}
        values |= {**self.method.overrides, **own, **self.overrides}
        values["trainer.max_epochs"] = self.method.epochs
        if self.method.takes_budget:
            values["selection.budget"] = float(self.budget)
        places = {"{seed}": self.seed, "{steps}": steps, "{epochs}": self.method.epochs, "{path}": self.data.path}
        return as_words({**values, **seeded(self.seed)}, places)


@dataclass(frozen=True)
class Study:
    """A study as its YAML file says.

    Args:
        path: of the file.
        config: fit config that all cells share.
        data: data sets, each with its window.
        methods: what is compared.
        seeds: of each method on each data set.
        references: names of the methods that the others are compared with.
        grid: settings to tune by, each with its overrides; empty for none. Cells of a grid leave the test part alone.
    """

    path: Path
    config: Path
    data: tuple[Data, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    references: tuple[str, ...]
    grid: Mapping[str, Overrides]

    @classmethod
    def read(cls, path: Path, paths: Mapping[str, str] | None = None) -> Study:
        """Reads a study.

        Args:
            path: of the YAML file.
            paths: where the files of a data set are, by its name, instead of where the study says.

        Raises:
            InputError: naming the key that is missing, unknown or wrong.
        """
        check_yaml(path, STUDY)
        return _Reader(path, paths or {}).study()

    def cells(self) -> list[Cell]:
        """Lists all cells; those of one seed together, so that an unfinished study has whole seeds."""
        settings = self.grid or {"": {}}
        return [
            Cell(data, method, budget, seed, setting, overrides)
            for seed in self.seeds
            for data in self.data
            for method in self.methods
            for budget in method.budgets
            for setting, overrides in settings.items()
        ]

    def warm_fingerprint(self, data: Data, seed: int | None) -> str:
        """Computes the SHA-256 (hex) of what a warm start is made of; without a seed what those of all seeds share."""
        return _digest([FORMAT, _parsed(self.config.read_text(encoding="utf-8")), data.overrides, seed])

    def fingerprint(self, cell: Cell) -> str:
        """Computes the SHA-256 (hex) of what a cell is made of: config, overrides, budget, epochs and seed."""
        method = cell.method
        overrides = {**method.overrides, **method.per_dataset.get(cell.data.name, {})}
        own = [overrides, method.epochs, method.takes_budget, cell.budget, cell.overrides]
        return _digest([self.warm_fingerprint(cell.data, cell.seed), *own])


def seeded(seed: int) -> Overrides:
    """Makes the overrides that put a seed everywhere."""
    return {"seed_everything": seed, "data.seed": seed}


def as_words(overrides: Overrides, places: Mapping[str, Any] | None = None) -> list[str]:
    """Spells overrides as words of a command line.

    Args:
        overrides: values by dotted key.
        places: what stands in a value for what is known only when the cell runs, such as `{seed}`.

    Example:
        >>> as_words({"data.window": [0.0, 0.6], "data.seed": "{seed}"}, {"{seed}": 3})
        ['--data.window=[0.0, 0.6]', '--data.seed=3']
    """
    known = {key: _filled(value, places or {}) for key, value in overrides.items()}
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in known.items()]


def _filled(value: Any, places: Mapping[str, Any]) -> Any:
    """A value with what is known put in its places; one that is a place and nothing else keeps the type of that."""
    if isinstance(value, dict):
        return {key: _filled(part, places) for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, places) for part in value]
    if isinstance(value, str):
        for place, known in places.items():
            value = known if value == place else value.replace(place, str(known)) if isinstance(value, str) else value
    return value


@cache
def _parsed(text: str) -> Any:
    return yaml.safe_load(text)


def _names(data: Sequence[Data]) -> str:
    return ", ".join(dict.fromkeys(one.name for one in data))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class _Reader:
    def __init__(self, path: Path, paths: Mapping[str, str], below: tuple[Path, ...] = ()) -> None:
        if path.resolve() in below:
            raise InputError(f"{path} is like itself, directly or through others: take `like` out of one of them")
        self.path, self.paths = path, paths
        self.content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        self.models: dict[str, Method] = {}
        if like := self.content.get("like"):
            check_yaml(Path(like), STUDY)
            above = _Reader(Path(like), {}, (*below, path.resolve()))
            named = {method.name: method for method in above.study().methods}
            self.models = named if "methods" in self.content else above.models
            self.content = {**above.content, **self.content}

    def study(self) -> Study:
        self._known(self.content, KEYS, "")
        for key in ("config", "datasets", "methods", "seeds"):
            if not self.content.get(key):
                raise InputError(f"{self.path}: {key} is missing: give {KEYS[key]}")
        config = Path(self.content["config"])
        check_yaml(config)
        methods = self._methods()
        references = tuple(self.content.get("references") or ())
        for name in references:
            if name not in {method.name for method in methods}:
                raise InputError(f"{self.path}, references: there is no method {name!r}: name one of this study")
        return Study(self.path, config, self._datasets(), methods, self._seeds(), references, self._grid())

    def _datasets(self) -> tuple[Data, ...]:
        made: list[Data] = []
        for position, given in enumerate(self._sequence("datasets")):
            where = f"datasets[{position}]"
            if not isinstance(given, dict) or not given.get("name"):
                raise InputError(f"{self.path}, {where}: give a mapping with a name")
            self._known(given, ("name", "window", "path", "overrides"), where)
            path = self.paths.get(str(given["name"]), str(given.get("path") or ""))
            data = Data(str(given["name"]), str(given.get("window") or ""), self._overrides(given, where), path)
            self._is_name(data.name, where)
            self._is_name(data.window or "-", where)
            if data.label in {other.label for other in made}:
                raise InputError(f"{self.path}, {where}: {data.label} is there twice: give each its own name or window")
            made.append(data)
        for name in self.paths:
            if name not in {data.name for data in made}:
                raise InputError(f"--path names the data set {name!r}: give one of {_names(made)}, as in {self.path}")
        return tuple(made)

    def _methods(self) -> tuple[Method, ...]:
        given = self.content["methods"]
        if not isinstance(given, dict):
            raise InputError(f"{self.path}, methods: give {KEYS['methods']}")
        made: dict[str, Method] = {}
        for name, options in given.items():
            made[str(name)] = self._method(str(name), options or {}, {**self.models, **made})
        return tuple(made.values())

    def _method(self, name: str, options: Any, others: Mapping[str, Method]) -> Method:
        where = f"methods.{name}"
        self._is_name(name, where)
        if not isinstance(options, dict):
            raise InputError(
                f"{self.path}, {where}: give a mapping of budgets, epochs, like, overrides and per_dataset"
            )
        self._known(options, ("budgets", "epochs", "like", "overrides", "per_dataset"), where)
        like = options.get("like")
        if like is not None and like not in others:
            raise InputError(f"{self.path}, {where}.like: there is no method {like!r} above it: name one that is")
        inherited = others[like].overrides if like else self._overrides(self.content, "study")
        overrides = {**inherited, **self._overrides(options, where)}
        takes_budget = overrides.get("selection", ...) is not None
        budgets = options.get("budgets", self.content.get("budgets", []) if takes_budget else [1.0])
        epochs = options.get("epochs", others[like].epochs if like else self.content.get("epochs", 1))
        count = self._count(epochs, f"{where}.epochs")
        per_dataset = {**others[like].per_dataset} if like else {}
        for data, more in self._by_dataset(options.get("per_dataset") or {}, where).items():
            per_dataset[data] = {**per_dataset.get(data, {}), **more}
        return Method(name, self._budgets(budgets, where), takes_budget, count, overrides, per_dataset)

    def _by_dataset(self, given: Any, where: str) -> dict[str, Overrides]:
        known = {str(data.get("name")) for data in self._sequence("datasets") if isinstance(data, dict)}
        if not isinstance(given, dict) or not set(map(str, given)) <= known:
            raise InputError(
                f"{self.path}, {where}.per_dataset: give overrides by the name of a data set, which is one of "
                f"{', '.join(sorted(known))}"
            )
        return {str(name): self._overrides({"overrides": given[name]}, f"{where}.per_dataset.{name}") for name in given}

    def _budgets(self, budgets: Any, where: str) -> tuple[float, ...]:
        if not isinstance(budgets, list) or not budgets:
            raise InputError(f"{self.path}, {where}: give budgets, a list of shares of the pool such as [0.05, 0.1]")
        for budget in budgets:
            if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
                raise InputError(
                    f"{self.path}, {where}: {budget!r} is not a share of the pool: give one above 0 and at most 1"
                )
        return tuple(float(budget) for budget in budgets)

    def _seeds(self) -> tuple[int, ...]:
        seeds = self._sequence("seeds")
        right = all(isinstance(seed, int) and 0 <= seed <= LARGEST_SEED for seed in seeds)
        if not right or len(set(seeds)) < len(seeds):
            raise InputError(f"{self.path}, seeds: give different whole numbers from 0 to {LARGEST_SEED}, not {seeds}")
        return tuple(seeds)

    def _grid(self) -> dict[str, Overrides]:
        grid = self.content.get("grid") or {}
        if not isinstance(grid, dict) or len(grid) > GRID_POINTS:
            raise InputError(f"{self.path}, grid: give at most {GRID_POINTS} settings by name, each with its overrides")
        for name in grid:
            self._is_name(str(name), "grid")
        return {str(name): self._overrides({"overrides": grid[name]}, f"grid.{name}") for name in grid}

    def _overrides(self, given: Mapping[str, Any], where: str) -> Overrides:
        overrides = given.get("overrides") or {}
        if not isinstance(overrides, dict):
            raise InputError(
                f"{self.path}, {where}.overrides: give values by dotted key, as {{model.temperature: 0.9}}"
            )
        return {str(key): value for key, value in overrides.items()}

    def _known(self, given: Mapping[str, Any], allowed: Any, where: str) -> None:
        for key in given:
            if key not in allowed:
                place = f", {where}" if where else ""
                raise InputError(f"{self.path}{place}: unknown key {key!r}: use one of {', '.join(allowed)}")

    def _is_name(self, name: str, where: str) -> None:
        if not name or set(name) & set("/@ \\*?[]") or name.startswith("."):
            raise InputError(f"{self.path}, {where}: {name!r} names a folder: leave out / @ \\ * ? [ ] and spaces")

    def _sequence(self, key: str) -> Sequence[Any]:
        value = self.content[key]
        if not isinstance(value, list):
            raise InputError(f"{self.path}, {key}: give {KEYS[key]}")
        return value

    def _count(self, value: Any, where: str) -> int:
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{self.path}, {where} is {value!r}: give a whole number of at least 1")
        return value
