"""The data that a policy was trained on, which its folder tells, beside those that it is given."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from minirec_pl.policy.identity import texts_identity
from minirec_pl.policy.interface import Policy
from minirec_pl.selection.session.session import session_of
from minirec_pl.utils.identity import Identity

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_COMPARED = ("catalogue", "samples", "split", "history_window", "dataset", "data")


def data_of_policy(trainer: Trainer, policy: Policy) -> dict[str, str]:
    """Makes the facts of the data that a policy is trained on, which go into its folder."""
    data = session_of(trainer).identity.of_data(trainer)
    return Identity.of([data, policy.identity.only(["texts"])]).brief()


def tell_of_other_data(trainer: Trainer, policy: Policy, data: Any) -> None:
    """Warns where a policy of a folder was trained on other data, or other texts of the items, than it is given.

    Args:
        trainer: of the run.
        policy: bound to the catalogue of the data.
        data: a DataModule.
    """
    made_for = policy.made_for
    if made_for == {} or not trainer.is_global_zero:
        return
    if made_for is None:
        warnings.warn(
            "the folder of the policy does not say which data it was trained on, as those of version 0.1, so this "
            "cannot be checked: see to it yourself that the split is the same",
            stacklevel=2,
        )
        return
    own = getattr(data, "identity", Identity())
    here = Identity.of([own.only(_COMPARED), texts_identity(data.catalogue)])
    if differences := here.differences(made_for):
        warnings.warn(f"the policy was trained on other data: {'; '.join(differences)}", stacklevel=2)
