"""The folder of a run: claimed, held, named by `latest`, and what a config leaves open pointed there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import write_atomically

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

CONFIG, RESULTS, EVALUATIONS, CHECKPOINTS = "config.yaml", "results.json", "evaluations.csv", "checkpoints"
STAGES, WARM_START, WARM_STATE = "stages.json", "warm_start", "end.ckpt"
SIDE_FILE = "minirec.json"  # what a policy is, beside its weights
RUNNING, LATEST = ".running", "latest"
# What the first process of a run tells those that Lightning starts: folder, checkpoint, where the command was given.
RUN_DIR_VARIABLE, CHECKPOINT_VARIABLE = "MINIREC_RUN_DIR", "MINIREC_CHECKPOINT"
STARTED_IN_VARIABLE = "MINIREC_STARTED_IN"


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


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes from running in a run folder; the hold of a killed process ends with it.

    Where the file system has no locks, nothing is held.

    Raises:
        InputError: if another process runs in it.
    """
    if fcntl is None:
        yield
        return
    path = folder / RUNNING
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise InputError(
                f"the run in '{folder}' is still going: wait for its end, or stop it before it is resumed"
            ) from error
        except OSError:
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def point_latest(folder: Path) -> str | None:
    """Has `latest`, beside a run folder, point to it.

    Returns:
        The name of the folder that it pointed to, None if there was none.
    """
    link = folder.with_name(LATEST)
    before = os.readlink(link) if link.is_symlink() else None
    _link(link, folder.name)
    return before


def put_latest_back(folder: Path, before: str | None) -> None:
    """Undoes `point_latest`, unless another run has begun since."""
    link = folder.with_name(LATEST)
    if not link.is_symlink() or os.readlink(link) != folder.name:
        return
    if before is None:
        link.unlink()
    else:
        _link(link, before)


def _link(link: Path, name: str) -> None:
    scratch = link.with_name(f".{LATEST}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(name, target_is_directory=True)
    os.replace(scratch, link)


def write_config(folder: Path, text: str) -> None:
    """Writes the config of a run."""
    write_atomically(folder / CONFIG, lambda scratch: scratch.write_text(text, encoding="utf-8"))


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
            "--model.policy.pretrained"
        )
    return side


def csv_logger(folder: Path) -> Any:
    """Makes the config of a CSVLogger that writes into a folder."""
    init_args = Namespace(save_dir=str(folder), name="", version="")  # type: ignore[no-untyped-call]
    return Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=init_args)  # type: ignore[no-untyped-call]


def go_on_logging(logger: Any, folder: Path, step: int) -> None:
    """Makes the config of a logger go on with what it wrote in a run folder until a step.

    W&B gets the id of the run there, in a new folder where it is offline. TensorBoard hides what comes after the step.
    """
    kind = str(getattr(logger, "class_path", "")).rsplit(".", 1)[-1]
    if kind == "WandbLogger" and not (logger.init_args.get("id") or logger.init_args.get("version")):
        runs = sorted(folder.glob("wandb/*run-*-*"), key=lambda path: path.stat().st_mtime)
        if runs:
            logger.init_args.id = runs[-1].name.rpartition("-")[2]
    if kind == "TensorBoardLogger":
        logger["dict_kwargs"] = {"purge_step": step + 1, **(logger.get("dict_kwargs") or {})}


def send_to(logger: Any, folder: Path) -> None:
    """Makes the config of a logger name a folder, where it is one of those that write files."""
    kind = str(getattr(logger, "class_path", "")).rsplit(".", 1)[-1]
    if kind in ("CSVLogger", "WandbLogger", "TensorBoardLogger"):
        logger.init_args.save_dir = str(folder)
    if kind in ("CSVLogger", "TensorBoardLogger"):
        logger.init_args.name, logger.init_args.version = "", ""


def run_folder(trainer: Trainer) -> Path | None:
    """Finds the folder of a run: where the first logger writes, else `default_root_dir`.

    None without a logger and a `default_root_dir`: nothing is then written into the working directory. A logger that
    writes into the working directory has its run in `NAME/VERSION` there, as Lightning has it for checkpoints. All
    ranks must ask at the same time, since Lightning has the first tell the others.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    if folder.resolve() != Path.cwd().resolve():
        return folder
    named = [str(part) for logger in trainer.loggers[:1] for part in (logger.name, logger.version) if part]
    named = trainer.strategy.broadcast(named)
    return folder.joinpath(*named) if named else None
