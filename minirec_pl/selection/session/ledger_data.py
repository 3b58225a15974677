"""The data that a ledger was made for, beside those of the run that trains on it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from minirec_pl.selection.fingerprints import data_fingerprint
from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.session.identity import accept
from minirec_pl.selection.session.session import SelectionSession

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_LISTED = ("split", "training_part", "history_window")
_OF_EVALUATION = ("validation_part", "test_part")


def check_ledger(ledger: SelectionLedger, path: str, session: SelectionSession, trainer: Trainer) -> None:
    """Refuses a ledger of other samples, and warns where it was made for another pool or window of them.

    Args:
        ledger: that a run trains on.
        path: of its file.
        session: of the run.
        trainer: its attribute `allow_changed_data` allows other samples.

    Raises:
        InputError: naming what is different, unless it is allowed.
    """
    stored = ledger.fingerprints
    data = getattr(trainer, "datamodule", None)
    here = session.identity.of_data(trainer, session.loader)
    names = {name.partition(".")[0] for name in here.facts}
    found = here.only(names - {*_LISTED, *_OF_EVALUATION}).differences(stored)
    if not found and stored.get("data", own := data_fingerprint(data, session.store.sample_ids)) != own:
        found = ["its data have another fingerprint"]
    if found:
        accept(trainer, f"{path} was made for other data, whose sample_ids mean other samples", found)
    if not trainer.is_global_zero:
        return
    if "data" not in stored:
        warnings.warn(
            f"{path} does not say which data it was made for, so this cannot be checked: see to it yourself that its "
            "sample_ids are those of the pool",
            stacklevel=2,
        )
    elif listed := here.only(_LISTED).differences(stored):
        warnings.warn(f"{path} was made for other samples to choose from: {'; '.join(listed)}", stacklevel=2)
