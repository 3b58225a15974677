"""Keeps the vectors of a store outside of checkpoints, in `<run>/signals/<fingerprint>.safetensors`."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from minirec_pl.selection.store import SignalStore
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import load_tensors, save_tensors


class SignalFiles:
    """Writes the vectors of a store once per content and removes files that no checkpoint names any more.

    A file that was never seen named by a checkpoint of the run is kept: its checkpoint may lie elsewhere.
    """

    def __init__(self) -> None:
        self._written: tuple[int, str] = (-1, "")
        self._named: set[str] = set()

    def save(self, store: SignalStore, folder: Path) -> str | None:
        """Writes gradients and embeddings, unless the same are there already.

        Args:
            store: whose `vectors` are written.
            folder: `<run>/signals`.

        Returns:
            The file's name; None if the store has no vectors.

        Raises:
            InputError: if it cannot be written.
        """
        vectors = store.vectors()
        if not vectors:
            return None
        if self._written[0] != store.vectors_version:
            self._written = (store.vectors_version, f"{_fingerprint(vectors)}.safetensors")
        path = folder / self._written[1]
        if not path.is_file():
            save_tensors(path, vectors, {})
        return path.name

    def prune(self, folder: Path, checkpoints: Iterable[Path]) -> None:
        """Removes the files that checkpoints named earlier and none names now.

        Args:
            folder: `<run>/signals`.
            checkpoints: folders that the run's checkpoints are in, searched with their subfolders.
        """
        files = {path.name for path in folder.glob("*.safetensors")} - {self._written[1]}
        if not files:
            return
        named: set[str] = set()
        for checkpoint in {path for place in checkpoints for path in place.rglob("*.ckpt")}:
            content = _pickled_part(checkpoint)
            named |= {name for name in files if name.encode() in content}
        for name in (files & self._named) - named:
            (folder / name).unlink(missing_ok=True)
        self._named |= named


def read_vectors(name: str, checkpoint: str, places: Iterable[Path]) -> dict[str, Tensor]:
    """Reads the vectors that a checkpoint names.

    Args:
        name: the file's name.
        checkpoint: the checkpoint, for the message; the file is first looked for beside it.
        places: folders to look in afterwards.

    Raises:
        InputError: if the file is nowhere, or damaged.
    """
    beside = Path(checkpoint).parent
    tried = [beside, beside / "signals", beside.parent / "signals", *places]
    for place in tried:
        if (place / name).is_file():
            vectors, _ = load_tensors(place / name)
            if f"{_fingerprint(vectors)}.safetensors" != name:
                raise InputError(f"{place / name} is damaged, its content is not what its name says: copy it again")
            return vectors
    raise InputError(
        f"the checkpoint {checkpoint} goes with {name}, the gradients and embeddings of its samples, which is neither "
        f"beside it nor in {tried[-1]}: copy it from the folder signals/ of the run that wrote the checkpoint"
    )


def _fingerprint(vectors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(vectors.items()):
        sha.update(f"{name} {tuple(value.shape)}".encode())
        sha.update(value.contiguous().numpy().data)
    return sha.hexdigest()[:32]


def _pickled_part(checkpoint: Path) -> bytes:
    """Names and numbers of a checkpoint as bytes, without its tensors; nothing is unpickled."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            return b"".join(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    except (OSError, zipfile.BadZipFile):
        return b""
