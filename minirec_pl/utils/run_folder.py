"""The folder of a run: claimed, and what a config leaves open pointed there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from minirec_pl.utils.errors import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

CONFIG, EVALUATIONS = "config.yaml", "evaluations.csv"
RUN_DIR_VARIABLE = "MINIREC_RUN_DIR"
SIDE_FILE = "minirec.json"  # what a policy is, beside its weights


def is_first() -> bool:
    """Says whether this process is the first of its run, be the others started by Lightning or by `srun`."""
    return "LOCAL_RANK" not in os.environ and (slurm_step() is None or os.environ["SLURM_PROCID"] == "0")


def slurm_step() -> str | None:
    """Names the step of several tasks that `srun` has started this process in, else None."""
    by_hand = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # Lightning starts the processes then
    if by_hand or int(os.environ.get("SLURM_NTASKS", 1)) < 2 or "SLURM_PROCID" not in os.environ:
        return None
    return f"slurm_{os.environ.get('SLURM_JOB_ID', 0)}_{os.environ.get('SLURM_STEP_ID', 0)}"


def claim_folder(root: Path) -> Path:
    """Makes the next folder `version_N` of a root; other ranks take that of the first.

    Tasks of a SLURM step know nothing of each other yet, and share `slurm_JOB_STEP`.

    Raises:
        InputError: if it cannot be made.
    """
    if RUN_DIR_VARIABLE in os.environ and "LOCAL_RANK" in os.environ:
        return Path(os.environ[RUN_DIR_VARIABLE])
    step = slurm_step()
    try:
        root.mkdir(parents=True, exist_ok=True)
        if step is not None:
            (root / step).mkdir(exist_ok=True)
            return root / step
        number = 0
        while True:
            folder = root / f"version_{number}"
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                os.environ[RUN_DIR_VARIABLE] = str(folder)
                return folder
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"cannot make a run folder in '{root}' ({reason}): choose another with --trainer.default_root_dir"
        ) from error


def pin_policy(config: Any) -> None:
    """Names the run a policy comes from, not `latest`, which moves on."""
    policy: Any = config.get("model.init_args.policy.init_args")
    if policy is not None and policy.get("pretrained") and Path(policy.pretrained).is_dir():
        policy.pretrained = os.path.relpath(Path(policy.pretrained).resolve())


def policy_file(folder: Path) -> Path:
    """Finds the file of a policy folder that says what the policy is.

    Raises:
        InputError: if there is no policy in the folder.
    """
    side = folder / SIDE_FILE
    if not side.is_file():
        raise InputError(
            f"no policy in '{folder}' ({SIDE_FILE} is missing): train one first, for example with "
            "`minirec fit --config configs/ml-100k/warm-start.yaml`, or give its folder as "
            "policy.init_args.pretrained"
        )
    return side


def csv_logger(folder: Path) -> Any:
    """Makes the config of a CSVLogger that writes into a folder."""
    init_args = Namespace(save_dir=str(folder), name="", version="")  # type: ignore[no-untyped-call]
    return Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=init_args)  # type: ignore[no-untyped-call]


def send_to(logger: Any, folder: Path) -> None:
    """Makes the config of a logger name a folder, where it is one of those that write files."""
    kind = str(getattr(logger, "class_path", "")).rsplit(".", 1)[-1]
    if kind in ("CSVLogger", "WandbLogger", "TensorBoardLogger"):
        logger.init_args.save_dir = str(folder)
    if kind in ("CSVLogger", "TensorBoardLogger"):
        logger.init_args.name, logger.init_args.version = "", ""


def run_folder(trainer: Trainer) -> Path:
    """Finds the folder of a run: where the first logger writes, else `default_root_dir`.

    All ranks must ask at the same time, since Lightning has the first tell the others.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)
