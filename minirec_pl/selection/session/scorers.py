"""What measures a batch: a probe, or the module's own `sample_signals`; what it returns is checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from minirec_pl.selection.signals import SampleSignals
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.protocols import accepts

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

Probe: TypeAlias = Callable[..., SampleSignals]
_RETURN = "return SampleSignals(sample_id, rewards=..., gradient=..., embedding=...)"


def check_probe(probe: object) -> None:
    """Refuses what cannot be called as a probe; None is fine.

    Raises:
        InputError: naming it.
    """
    if probe is None:
        return
    if not callable(probe):
        raise InputError(f"probe is {probe!r}: give an object such as HeadProbe({probe!r}, forward=0, target=1)")
    if inspect.isclass(probe):
        raise InputError(f"probe is the class {probe.__name__}: give an object of it, {probe.__name__}(...)")
    if not accepts(probe, *[None] * (3 if _takes_ids(probe) else 2)):
        raise InputError(
            f"the probe {_name(probe)} does not take what it is given: define `{_name(probe)}(module, batch)`"
        )


class Scorer:
    """Measures batches by a probe or, without one, by the module's `sample_signals`.

    Args:
        module: that is measured.
        probe: called as `probe(module, batch)`, or `probe(module, batch, sample_id)` if it has a third argument.
        asked: options of the signals, see `minirec_pl.selection.selectors.protocol.signal_options`.
        foreign: whether the batches hold no sample_ids.

    Raises:
        InputError: if there is no probe and the module has no `sample_signals`, or it does not take the options.
    """

    def __init__(self, module: LightningModule, probe: Probe | None, asked: Mapping[str, str], foreign: bool) -> None:
        if probe is None and not callable(getattr(module, "sample_signals", None)):
            raise InputError(
                f"{type(module).__name__} cannot be scored: define `sample_signals(batch) -> SampleSignals` on it, "
                "give MiniRec or RescoreSamples probe=HeadProbe(...), or train on a fixed choice with "
                "SelectSamples(ledger=...)"
            )
        self.module, self.probe, self.asked = module, probe, asked
        self.name = f"{type(module).__name__}.sample_signals" if probe is None else _name(probe)
        self._takes_ids = probe is not None and _takes_ids(probe)
        self._foreign = foreign and not self._takes_ids
        self._first: SampleSignals | None = None
        self._check_options(module.sample_signals if probe is None else probe)

    def _check_options(self, function: Any) -> None:
        parameters = inspect.signature(function).parameters
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        for name in self.asked:
            if name not in parameters:
                raise InputError(
                    f"the selector asks {self.name} for {name}={self.asked[name]!r}, which it does not take: give it a "
                    f"parameter `{name}`, or set gradient='first' and gradient_space='answer' on the selector"
                )

    def __call__(self, batch: Any, sample_id: torch.Tensor) -> SampleSignals:
        """Measures a batch.

        Args:
            batch: on the module's device.
            sample_id: [B] int64, of its samples.

        Raises:
            InputError: naming the probe or method, if it does not return the signals of these samples, or others than
                of the batches before.
        """
        if self.probe is None:
            signals = self.module.sample_signals(batch, **self.asked)  # type: ignore[operator]
        else:
            ids = [sample_id] if self._takes_ids else []
            signals = self.probe(self.module, batch, *ids, **self.asked)
        if not isinstance(signals, SampleSignals):
            raise InputError(f"{self.name} returned a {type(signals).__name__}: {_RETURN}")
        signals = with_ids(signals, sample_id, self.name) if self._foreign else signals
        if not torch.equal(signals.sample_id, sample_id):
            raise InputError(
                f"{self.name} returned {len(signals)} rows of signals for other sample_ids than the {len(sample_id)} "
                "of the batch: return one per sample, in the order of the batch"
            )
        self._first = signals if self._first is None else self._first
        if _columns(signals) != _columns(self._first):
            try:
                SampleSignals.cat([self._first, signals])
            except InputError as error:
                raise InputError(f"{self.name}: {error}") from error
        return signals


def with_ids(signals: SampleSignals, ids: torch.Tensor, name: str) -> SampleSignals:
    """Gives signals the ids of their samples, for foreign loaders, whose batches hold none.

    Args:
        signals: of a batch.
        ids: of its samples.
        name: what returned them, for the message.

    Raises:
        InputError: if there is not a row for each.
    """
    if len(signals) != len(ids):
        raise InputError(
            f"{name} returned {len(signals)} rows of signals for a batch of {len(ids)} samples: return one per sample, "
            "in the order of the batch"
        )
    return replace(signals, sample_id=ids)


def _columns(signals: SampleSignals) -> list[Any]:
    values = [getattr(signals, field.name) for field in fields(signals)]
    return [None if value is None else value.shape[1:] for value in values]


def _takes_ids(probe: Probe) -> bool:
    """Whether a probe has a third argument without a default, or one that is called sample_id."""
    try:
        parameters = list(inspect.signature(probe).parameters.values())
    except (ValueError, TypeError):
        return False
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(by_place) > 2 and (by_place[2].default is by_place[2].empty or by_place[2].name == "sample_id")


def _name(probe: Probe) -> str:
    return str(getattr(probe, "__qualname__", type(probe).__name__))
