"""What the checkpoints of a run were made for: kept in them, compared when a run goes on from one or is evaluated."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minirec_pl.data.identity import loader_identity
from minirec_pl.utils.identity import Facts, Identity, refuse_changed

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

IDENTITY_KEY = "minirec_pl.Identity"
_ONLY_TRAINED_WITH = {"training_part", "validation_part", "rewards", "reward_columns", "module"}
_NEVER = {"test_part"}  # no weight depends on it


def allowed(trainer: Trainer) -> bool:
    """Whether a user lets a run go on with what was made for something else."""
    return bool(getattr(trainer, "allow_changed_data", False))


def accept(trainer: Trainer, what: str, differences: Sequence[str]) -> list[str]:
    """Refuses what was made for something else, or warns of it where the user allows it.

    Args:
        trainer: its attribute `allow_changed_data` allows it.
        what: is wrong, see `refuse_changed`.
        differences: see `Identity.differences`.

    Returns:
        The differences.

    Raises:
        InputError: naming the first difference.
    """
    if not allowed(trainer):
        refuse_changed(what, differences)
    if differences and trainer.is_global_zero:
        warnings.warn(f"{what}, which is allowed: {'; '.join(differences)}", stacklevel=2)
    return list(differences)


class RunIdentity:
    """Keeps what a run is made for in its checkpoints and compares it.

    The hooks of a module and of selection callbacks call the methods; where both do, the first call counts.

    Attributes:
        changed: what is different from the checkpoint that the run goes on from and was allowed to be.
    """

    def __init__(self) -> None:
        self.changed: list[str] = []
        self._of_loader: Identity | None = None
        self._stored: Facts | None = None

    def of_data(self, trainer: Trainer, loader: Any = None) -> Identity:
        """Returns what the data are: what a DataModule says, else what is read off a training loader, once.

        Args:
            trainer: of the run.
            loader: of the training; None takes that of the Trainer.
        """
        known = _of_datamodule(trainer)
        if known is not None:
            return known
        loader = trainer.train_dataloader if loader is None else loader
        ids = getattr(getattr(loader, "sampler", None), "sample_ids", None)
        if self._of_loader is None and ids is not None:
            self._of_loader = loader_identity(loader, ids)
        return self._of_loader or Identity()

    def save(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the facts into a checkpoint."""
        if IDENTITY_KEY not in checkpoint:
            checkpoint[IDENTITY_KEY] = Identity.of([self.of_data(trainer), of_module(module)]).facts

    def load(self, trainer: Trainer, module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Compares a checkpoint with data and module, as far as they are known before a fit starts.

        Raises:
            InputError: if it was made for something else, and this is not allowed.
        """
        stored = checkpoint.get(IDENTITY_KEY, {})
        if self._stored is stored or (not stored and self._stored == {}):
            return
        self._stored, self.changed = stored, []
        if not stored and trainer.is_global_zero:
            warnings.warn(
                "the checkpoint does not say what it was made for, as those of version 0.1, so this cannot be checked: "
                "see to it yourself that data and prompt are the same",
                stacklevel=2,
            )
        self._compare(trainer, Identity.of([_of_datamodule(trainer) or Identity(), of_module(module)]))
        if trainer.state.fn != "fit":
            self._stored = None

    def check_loader(self, trainer: Trainer, loader: Any) -> None:
        """Compares a checkpoint with data that only the training loader shows; called when a resumed fit starts.

        Raises:
            InputError: if the checkpoint was made for other data, and this is not allowed.
        """
        if self._stored and _of_datamodule(trainer) is None:
            self._compare(trainer, self.of_data(trainer, loader))
        self._stored = None

    def _compare(self, trainer: Trainer, here: Identity) -> None:
        left_out = _NEVER if trainer.state.fn == "fit" else _NEVER | _ONLY_TRAINED_WITH
        names = {name.partition(".")[0] for name in here.facts} - left_out
        found = here.only(names).differences(self._stored or {})
        self.changed += accept(trainer, "the checkpoint was made for something else", found)


def of_signals(data: Identity, module: LightningModule) -> dict[str, str]:
    """Returns the facts that measured signals depend on, those of evaluation left out."""
    facts = Identity.of([data, of_module(module)]).facts
    return {name: value for name, value in facts.items() if name not in ("validation_part", "test_part", "module")}


def of_module(module: LightningModule) -> Identity:
    """Returns what a module says that its weights are for."""
    own = getattr(module, "identity", None)
    return own if isinstance(own, Identity) else Identity()


def _of_datamodule(trainer: Trainer) -> Identity | None:
    data = getattr(trainer, "datamodule", None)
    own = getattr(data, "identity", None)
    if isinstance(own, Identity):
        return own
    fingerprint = getattr(data, "fingerprint", None)
    return Identity({"data": fingerprint}) if isinstance(fingerprint, str) else None
