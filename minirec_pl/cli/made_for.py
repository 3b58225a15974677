"""What a run was made for, in its `results.json`, and which options of a resumed fit have changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from minirec_pl.selection.session.session import session_of
from minirec_pl.utils.files import write_json
from minirec_pl.utils.identity import figures_fact
from minirec_pl.utils.run_folder import CONFIG, RESULTS

_NO_MATTER = (
    "ckpt_path",
    "config",
    "allow_changed_data",
    "working_dir",
    "trainer.default_root_dir",
    "trainer.logger",
)
_IDLE = "without effect, since optimizer, scheduler and warm start are the checkpoint's"
_GO_ON = (".optimizer.", ".lr_scheduler.")


class MadeFor(Callback):
    """Prints which options of a resumed fit differ from those of its checkpoint, and adds to `results.json`.

    * `data`: a digest of what figures on validation and test depend on, see `minirec report`.
    * `changed`: the `options` of a resumed fit that have changed, and the `data` that were allowed to.

    Options that make data or policy something else are refused elsewhere, see `minirec_pl.selection.session.identity`.
    Optimizer and scheduler go on with what the checkpoint holds of them, and there is no second warm start, so a change
    of their options has no effect.

    Args:
        run_dir: folder of the run.
        config: of the run, as YAML.
        checkpoint: that a fit resumes; None for anything else.
    """

    def __init__(self, run_dir: Path, config: str, checkpoint: Path | None) -> None:
        super().__init__()
        self.run_dir, self.config, self.checkpoint = run_dir, config, checkpoint
        self._before: dict[str, str] | None = None

    @cached_property
    def _options(self) -> dict[str, str]:
        return options_of(self.config)

    def state_dict(self) -> dict[str, Any]:
        """Returns the options of the fit."""
        return {"options": json.dumps(self._options)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the options of the checkpoint."""
        self._before = json.loads(state_dict["options"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints what has changed."""
        if not trainer.is_global_zero or not (changed := self._changed()):
            return
        idle = [text for name, text in changed.items() if _goes_on(name)]
        others = [text for name, text in changed.items() if not _goes_on(name)]
        told = [f"resumes with changed options: {', '.join(others)}"] if others else []
        if idle:
            told.append(f"{_IDLE}: {', '.join(idle)}")
        print("; ".join(told))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds to `results.json`."""
        self._add(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds to `results.json` of a `validate`."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._add(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds to `results.json` of a `test`."""
        self._add(trainer)

    def _add(self, trainer: Trainer) -> None:
        path, identity = self.run_dir / RESULTS, session_of(trainer).identity
        if trainer.is_global_zero and path.is_file():
            facts = identity.of_data(trainer).facts
            data = {part: figures_fact(facts, f"{part}_part") for part in ("validation", "test")}
            changed = {"options": list(self._changed().values()), "data": identity.changed}
            more = {"changed": changed} if any(changed.values()) else {}
            write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "data": data, **more})

    def _changed(self) -> dict[str, str]:
        """A text for each option that has changed, by its name."""
        if self.checkpoint is None:
            return {}
        before, earlier = self._before, self.checkpoint.parent.parent / CONFIG
        if before is None:
            before = options_of(earlier.read_text(encoding="utf-8")) if earlier.is_file() else self._options
        here = self._options
        names = [name for name in {**before, **here} if before.get(name) != here.get(name)]
        return {name: f"{name} {before.get(name, 'unset')} -> {here.get(name, 'unset')}" for name in names}


def options_of(config: str) -> dict[str, str]:
    """Reads the options of a config by dotted name, as JSON; those that say where a run is kept or shown left out."""
    content = yaml.safe_load(config)
    return {name: json.dumps(value) for name, value in _flat(content, "") if not name.startswith(_NO_MATTER)}


def _goes_on(name: str) -> bool:
    return name.startswith("warm_start") or any(part in f".{name}." for part in _GO_ON)


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    parts: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = enumerate(value)
    if not parts:
        yield name, value
    for key, part in parts:
        yield from _flat(part, f"{name}.{key}" if name else str(key))
