"""Which releases of `pytorch_lightning` have a Trainer that runs the callbacks."""

from __future__ import annotations

import re
import sys
from typing import Final

from minirec_pl.utils.errors import InputError

LOWEST: Final = (2, 6)


def check_pytorch_lightning() -> None:
    """Refuses an imported `pytorch_lightning` whose Trainer knows none but its own callbacks.

    Raises:
        InputError: if it is older than 2.6, with its version and that of `lightning`.
    """
    theirs = str(getattr(sys.modules.get("pytorch_lightning"), "__version__", ""))
    release = tuple(int(number) for number in re.findall(r"\d+", theirs)[:2])
    if release and release < LOWEST:
        from lightning import __version__ as ours

        raise InputError(
            f"pytorch_lightning {theirs} is imported, and its Trainer cannot run callbacks that are made for lightning "
            f"{ours}, as that of pytorch_lightning 2.6 or newer can: pip install 'pytorch-lightning>=2.6,<3', or take "
            "the Trainer from lightning.pytorch and do not import pytorch_lightning"
        )
