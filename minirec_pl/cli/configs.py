"""The YAML files that come with minirec-pl."""

from __future__ import annotations

import shutil
from pathlib import Path

from minirec_pl.utils.errors import InputError


def shipped_configs() -> Path:
    """The folder of the shipped configs: inside an installed package, beside it in a source tree."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def write_configs(to: Path) -> None:
    """Copies the shipped configs into `to / "configs"` and prints their paths.

    Raises:
        InputError: if that folder exists or cannot be written.
    """
    target = to / "configs"
    if target.exists():
        raise InputError(f"'{target}' exists: give another folder, as in `minirec init DIR`")
    try:
        shutil.copytree(shipped_configs(), target)
    except OSError as error:
        raise InputError(f"cannot write '{target}' ({error}): give another folder") from error
    for path in sorted(target.rglob("*.yaml")):
        print(path)
    print("Each file begins with what it is for and the command that runs it.")
