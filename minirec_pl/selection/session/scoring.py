"""Takes the signals of samples in one pass and leaves the run as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from minirec_pl.data.foreign_loader import ForeignLoader
from minirec_pl.data.loader import SampleLoader
from minirec_pl.data.train_loader import prepared
from minirec_pl.selection.session.scorers import Probe, Scorer
from minirec_pl.selection.signals import SampleSignals
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.modules import evaluation_mode
from minirec_pl.utils.seeds import isolated_random_state

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_SHARDED = frozenset({"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"})


def measure(
    trainer: Trainer,
    module: LightningModule,
    loader: DataLoader[Any],
    sample_ids: list[int],
    probe: Probe | None,
    asked: Mapping[str, str],
) -> list[SampleSignals]:
    """Measures rewards, gradient signals and embeddings of samples.

    Neither the module's mode nor any random number generator of the run is disturbed.

    Args:
        trainer: moves batches and sets the precision.
        module: that is measured.
        loader: of the training; its dataset and collate_fn make the batches.
        sample_ids: [n].
        probe: how; None asks `module.sample_signals(batch)`.
        asked: options of `sample_signals`, see `minirec_pl.selection.selectors.protocol.signal_options`.

    Returns:
        The signals of each batch, on the CPU; none for no ids.

    Raises:
        InputError: as a `Scorer`.
    """
    scorer = Scorer(module, probe, asked, isinstance(loader, ForeignLoader))
    batches, ids = _batches(loader, getattr(getattr(trainer, "datamodule", None), "eval_batch_size", None), sample_ids)
    parts: list[SampleSignals] = []
    with isolated_random_state(), evaluation_mode(module):
        for batch, batch_ids in zip(_progress(batches, len(sample_ids), trainer), ids, strict=True):
            batch = prepared(trainer, module, batch)
            with trainer.precision_plugin.forward_context():
                parts.append(scorer(batch, batch_ids).cpu())
    return parts


def is_sharded(trainer: Trainer) -> bool:
    """Whether the strategy spreads the weights over the ranks."""
    return bool(_SHARDED & {base.__name__ for base in type(trainer.strategy).__mro__})


def refuse_sharded(trainer: Trainer, probe: Probe | None) -> None:
    """Refuses gradient signals where no rank holds all the weights.

    Raises:
        InputError: if the strategy is sharded and gradient signals are asked for.
    """
    if is_sharded(trainer) and "gradient" in getattr(probe, "signals", {"gradient"}):
        raise InputError(
            f"{type(trainer.strategy).__name__} spreads the weights over the ranks, so gradient signals cannot be taken"
            ": set `signals: [reward, embedding]` on HeadProbe, or use the strategy ddp"
        )


def _batches(
    loader: DataLoader[Any], batch_size: int | None, ids: list[int]
) -> tuple[DataLoader[Any], list[torch.Tensor]]:
    """Batches of these samples, and the ids in each."""
    size = batch_size or loader.batch_size or 1
    rows, options = ids, dict[str, Any]()
    if isinstance(loader, ForeignLoader):
        rows = loader.foreign_sampler.rows(ids)
        names = ("num_workers", "worker_init_fn", "multiprocessing_context", "timeout")
        options = {name: getattr(loader, name) for name in names}
    made = SampleLoader(loader.dataset, batch_size=size, sampler=rows, collate_fn=loader.collate_fn, **options)
    return made, [torch.tensor(ids[start : start + size]) for start in range(0, len(ids), size)]


def _progress(loader: DataLoader[Any], count: int, trainer: Trainer) -> Any:
    from rich.console import Console
    from rich.progress import track

    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    description = f"Scoring {count:,} samples"
    return track(loader, description, total=len(loader), console=Console(stderr=True), disable=not shown)
