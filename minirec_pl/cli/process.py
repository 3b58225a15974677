"""What a command changes of its process, and puts back."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

from transformers.utils.logging import disable_progress_bar


def finish_wandb(failed: bool) -> None:
    """Ends the W&B run, so that the next run of this process does not log into it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        with contextlib.suppress(OSError):
            wandb.finish(exit_code=int(failed))


@contextlib.contextmanager
def own_process_state() -> Iterator[None]:
    """Quiets advertisements, and gives Ctrl-C back at the end."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()[:10]
