"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from minirec_pl.utils.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = "minirec-signals-1"


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Writes to a temporary name beside `path`, flushes it to disk, then renames it.

    Args:
        path: The file to make or replace; missing folders are made.
        write: Writes the content to the path it is given.

    Returns:
        `path`.

    Raises:
        InputError: If the folder cannot be written or the disk is full; an older file is then left as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        return path
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot write {path} ({reason}): free the disk or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Path:
    """Writes tensors as safetensors, with settings as JSON in the file's metadata.

    Args:
        path: The file to make or replace.
        tensors: CPU tensors by name.
        settings: What JSON can hold.

    Returns:
        `path`.

    Raises:
        InputError: If it cannot be written.
    """
    from safetensors.torch import save_file

    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"format": _FORMAT, "settings": json.dumps(settings)}
    return write_atomically(path, lambda temporary: save_file(content, temporary, metadata=metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_tensors` wrote.

    Args:
        path: The file.

    Returns:
        The tensors and the settings.

    Raises:
        InputError: If the file is missing, damaged or of another format.
    """
    if not path.is_file():
        raise InputError(f"there are no signals at {path}: give the signals.safetensors that a run left in its folder")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings = json.loads(metadata.get("settings", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or truncated ({error}): copy it again or score again") from error
    if metadata.get("format") != _FORMAT:
        raise InputError(f"{path} is not a signal store of this version: score again")
    return tensors, settings


def check_checkpoint(path: Path) -> None:
    """Refuses a checkpoint that is missing or truncated.

    Raises:
        InputError: naming the file.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint '{path}': give --ckpt_path a file from a run's checkpoints/ folder")
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"'{path}' is not a checkpoint, or a truncated one: give another from a run's checkpoints/ folder"
        )


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, replacing the file whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def replace_folder(folder: Path, write: Callable[[Path], object], *, holds: str, what: str) -> None:
    """Writes a folder beside `folder`, then moves it into its place.

    Args:
        folder: the folder to make or replace; missing parents are made.
        write: fills the empty folder it is given.
        holds: a file that an older folder must have to be replaced.
        what: what the folder holds, for messages.

    Raises:
        InputError: if `folder` holds something else, or cannot be written; it is then left as it was.
    """
    if folder.exists() and not (folder / holds).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"'{folder}' exists and holds no {what}: give a new folder, so that nothing else is deleted")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            new.mkdir()
            write(new)
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot write the {what} to '{folder}' ({reason}): free the disk or choose another"
        ) from error
