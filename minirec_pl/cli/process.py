"""What a command changes of its process, and puts back."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.loggers import Logger, WandbLogger
from transformers.utils.logging import disable_progress_bar

from minirec_pl.utils.run_folder import CHECKPOINT_VARIABLE, RUN_DIR_VARIABLE, STARTED_IN_VARIABLE

_NOISE = ("💡 Tip:", "GPU available:", "TPU available:", "HPU available:", "LOCAL_RANK:", "`Trainer.fit` stopped:")
_WANDB_QUIET, _WANDB_INFO = "WANDB_QUIET", "WANDB_SHOW_INFO"
_OF_A_RUN = (RUN_DIR_VARIABLE, CHECKPOINT_VARIABLE, STARTED_IN_VARIABLE)


def quiet_wandb(offline: bool) -> None:
    """Reduces what W&B prints to the address of an online run; variables that the user has set take precedence."""
    os.environ.setdefault(_WANDB_QUIET, "true")
    if offline or os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        os.environ.setdefault(_WANDB_INFO, "false")


def without_anonymous(logger: Logger) -> None:
    """Takes a setting out of a WandbLogger that Lightning always passes on, and that W&B warns of."""
    if isinstance(logger, WandbLogger) and logger._wandb_init.get("anonymous") is None:
        logger._wandb_init.pop("anonymous", None)


def finish_wandb(failed: bool) -> None:
    """Ends the W&B run, so that the next run of this process does not log into it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        folder, offline = Path(wandb.run.dir).parent, wandb.run.offline
        with contextlib.suppress(OSError):
            wandb.finish(exit_code=int(failed))
        if offline and not failed:
            of_run = f"*-{folder.name.rpartition('-')[2]}"
            parts = folder.parent / of_run if len(list(folder.parent.glob(of_run))) > 1 else folder
            print(f"W&B: offline; to upload this run: wandb sync {parts}", file=sys.stderr)


@contextlib.contextmanager
def own_process_state() -> Iterator[None]:
    """Leaves out advertisements and what a user cannot act on; gives Ctrl-C and variables back at the end."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_noise)
    handler = signal.getsignal(signal.SIGINT)
    given = {name: os.environ.get(name) for name in (_WANDB_QUIET, _WANDB_INFO, *_OF_A_RUN)}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
            warnings.filterwarnings("ignore", "The dirpath has changed from")
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            yield
    finally:
        for name, value in given.items():
            if value is None:
                os.environ.pop(name, None)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE)
