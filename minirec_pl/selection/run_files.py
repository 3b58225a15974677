"""What a selection leaves in the run folder: `ledger.parquet`, `diagnostics.json` and `signals.safetensors`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from minirec_pl.files import write_json
from minirec_pl.selection.diagnostics import Diagnostics, diagnose

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from minirec_pl.selection.session import SelectionSession

_PAUSE = 60.0  # seconds


class RunFiles:
    """Writes the files of the last selection when a fit ends, and before that at most once a minute."""

    def __init__(self) -> None:
        self._written = time.monotonic()

    def write(self, session: SelectionSession, trainer: Trainer, *, at_once: bool) -> None:
        """Writes the files, all of the same selection, on the first rank.

        Args:
            session: with a ledger, else nothing is done.
            trainer: whose run folder is written to.
            at_once: False leaves it for later within a minute of the last time.

        Raises:
            InputError: if the folder cannot be written.
        """
        if session.ledger is None or not trainer.is_global_zero:
            return
        if not at_once and time.monotonic() - self._written < _PAUSE:
            return
        folder = session.folder(trainer)
        session.ledger.to_parquet(folder / "ledger.parquet")
        write_json(folder / "diagnostics.json", diagnostics_of(session, trainer).as_dict())
        if session.scored:
            session.store.save(folder / "signals.safetensors")
        self._written = time.monotonic()


def diagnostics_of(session: SelectionSession, trainer: Trainer) -> Diagnostics:
    """Diagnostics of the ledger of a session, with the coverage of users and items where the DataModule knows them."""
    assert session.ledger is not None
    describe = getattr(getattr(trainer, "datamodule", None), "users_and_items", None)
    return diagnose(session.ledger, None if describe is None else describe(session.store.sample_ids.numpy()))
