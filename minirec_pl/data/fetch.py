"""Fetches MovieLens-100K as RecBole atomic files, from its home site or out of a wheel on PyPI."""

import errno
import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from minirec_pl.utils.errors import InputError

GROUPLENS_URL: Final = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
RECBOLE_WHEEL: Final = "recbole==1.2.1"
LICENCE: Final = "https://files.grouplens.org/datasets/movielens/ml-100k-README.txt"
CANONICAL_SHA256: Final = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "1ed14ea67889c8f4da8d42861bf46478c8add9f102d96b8e76033308baa7c0cf",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
_INTER_HEADER: Final = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
_ITEM_HEADER: Final = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
_USER_HEADER: Final = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
_GENRES: Final = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]
_LARGEST_FILE: Final = 16 * 2**20  # bytes; the real ones have 2 MB at most
_Files = dict[str, bytes]


def atomic_file(path: Path, dataset: str) -> Path:
    """Finds the interactions of a data set in RecBole atomic files.

    Args:
        path: folder that holds a folder per data set.
        dataset: name of the folder and its files.

    Raises:
        InputError: if they are not there; says how to get them.
    """
    file = path / dataset / f"{dataset}.inter"
    if not file.is_file():
        fetch = f"run 'minirec fetch {dataset} --to {path}'"
        other = f"put {dataset}.inter and {dataset}.item (RecBole atomic files) there"
        raise InputError(f"{file} is missing: {fetch if dataset == 'ml-100k' else other}")
    return file


class SourceError(Exception):
    """One source failed; the next may do."""


def fetch_ml_100k(to: Path) -> Path:
    """Puts MovieLens-100K (100,000 ratings, 943 users, 1,682 films) into ``to / "ml-100k"``.

    Tries GroupLens first, then ``pip download`` of the wheel recbole 1.2.1; both give the same bytes, checked by
    SHA-256. All work happens in a temporary folder beside the target, so an interrupted call leaves nothing behind; a
    call that finds intact files does nothing, and damaged or missing files are replaced.

    Args:
        to: Folder to put the folder ``ml-100k`` into; made when missing.

    Returns:
        The folder with ``ml-100k.inter``, ``ml-100k.item``, ``ml-100k.user`` and ``SOURCE.json``.

    Raises:
        InputError: Neither source could be reached, or the folder cannot be written.
    """
    console = Console(stderr=True)
    target = to / "ml-100k"
    try:
        if _is_intact(target):
            console.print(f"{target} is there already and intact: nothing to do", soft_wrap=True, markup=False)
            return target
        to.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".ml-100k-", dir=to) as scratch:
            source, files = _obtain(Path(scratch), console)
            _install(files, source, Path(scratch) / "ml-100k", target)
    except OSError as error:
        raise InputError(
            f"{target} cannot be written ({error.strerror or error}): free space there or choose --to"
        ) from None
    console.print(f"MovieLens-100K from {source} is in {target}: SHA-256 verified", soft_wrap=True, markup=False)
    return target


def convert_grouplens(u_data: bytes, u_item: bytes, u_user: bytes) -> dict[str, bytes]:
    """Makes the canonical atomic files from the three tables of GroupLens' archive.

    Args:
        u_data: Tab-separated user, item, rating, timestamp.
        u_item: Latin-1, separated by ``|``: id, title with year, two dates, a link and 19 genre flags.
        u_user: Separated by ``|``: id, age, gender, occupation, zip code.

    Returns:
        The bytes of ``ml-100k.inter``, ``ml-100k.item`` and ``ml-100k.user``.

    Raises:
        ValueError: A line of ``u_item`` does not have 24 fields.
    """
    items: list[tuple[str, str, str, str]] = []
    for line in _lines(u_item.decode("latin-1")):
        item_id, title, _, _, _, *flags = line.split("|")
        genres = [genre for genre, flag in zip(_GENRES, flags, strict=True) if flag == "1"]
        items.append((item_id, *_split_title(title), " ".join(genres)))
    users = [line.replace("|", "\t") for line in _lines(u_user.decode("ascii"))]
    return _canonical(_lines(u_data.decode("ascii")), items, users)


def convert_recbole(inter: bytes, item: bytes, user: bytes) -> dict[str, bytes]:
    """Makes the canonical atomic files from those in RecBole's wheel.

    They differ in two films only: 267, whose title and year RecBole spells "unkonwn", and 1412, whose title ends in
    "(1995) (V)" and was split at the wrong bracket.

    Raises:
        ValueError: A line of ``item`` does not have 4 fields.
    """
    items: list[tuple[str, str, str, str]] = []
    for line in _lines(item.decode("utf-8"))[1:]:
        item_id, title, year, genres = line.split("\t")
        full = "unknown" if title == "unkonwn" else f"{title} ({year})"
        items.append((item_id, *_split_title(full), genres))
    return _canonical(_lines(inter.decode("ascii"))[1:], items, _lines(user.decode("ascii"))[1:])


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def _split_title(full: str) -> tuple[str, str]:
    """Title and year of ``Name (1995)`` or ``Name (1995) (V)``; a title without a year has the year ``unknown``."""
    full = " ".join(full.split())
    match = re.fullmatch(r"(.+) \((\d{4})\)(?: \(V\))?", full)
    return (match[1], match[2]) if match else (full, "unknown")


def _canonical(interactions: list[str], items: list[tuple[str, str, str, str]], users: list[str]) -> dict[str, bytes]:
    tables = {
        "ml-100k.inter": [_INTER_HEADER, *interactions],
        "ml-100k.item": [_ITEM_HEADER, *("\t".join(item) for item in items)],
        "ml-100k.user": [_USER_HEADER, *users],
    }
    return {name: ("\n".join(rows) + "\n").encode() for name, rows in tables.items()}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _is_intact(folder: Path) -> bool:
    return all(
        (folder / name).is_file() and _sha256((folder / name).read_bytes()) == digest
        for name, digest in CANONICAL_SHA256.items()
    )


def _obtain(scratch: Path, console: Console) -> tuple[str, _Files]:
    sources: Mapping[str, Callable[[Path, Console], _Files]] = {
        GROUPLENS_URL: _from_grouplens,
        RECBOLE_WHEEL: _from_wheel,
    }
    reasons: list[str] = []
    for source, read in sources.items():
        try:
            files = read(scratch, console)
            wrong = [name for name, digest in CANONICAL_SHA256.items() if _sha256(files[name]) != digest]
            if wrong:
                raise SourceError(f"the SHA-256 of {wrong[0]} is not the expected one")
            return source, files
        except SourceError as error:
            console.print(f"{source}: {error}", soft_wrap=True, markup=False)
            reasons.append(f"{source}: {error}")
    raise InputError(
        f"MovieLens-100K could not be fetched ({'; '.join(reasons)}): connect to the internet or a PyPI mirror and run "
        "the command again, or copy a folder ml-100k that was fetched elsewhere"
    )


def _from_grouplens(scratch: Path, console: Console) -> _Files:
    archive = scratch / "ml-100k.zip"
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with (
            urllib.request.urlopen(GROUPLENS_URL, timeout=10) as response,
            archive.open("wb") as file,
            Progress(*columns, console=console) as progress,
        ):
            task = progress.add_task("ml-100k.zip", total=int(response.headers.get("Content-Length", 0)) or None)
            while chunk := response.read(2**16):
                file.write(chunk)
                progress.advance(task, len(chunk))
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise SourceError(f"no download ({error})") from None
    return _convert_members(archive, "ml-100k/u.", ("data", "item", "user"), convert_grouplens)


def _from_wheel(scratch: Path, console: Console) -> _Files:
    prefix = "recbole/dataset_example/ml-100k/ml-100k."
    return _convert_members(
        pip_download(RECBOLE_WHEEL, scratch, console), prefix, ("inter", "item", "user"), convert_recbole
    )


def pip_download(requirement: str, scratch: Path, console: Console) -> Path:
    """Downloads a wheel, without what it depends on, through pip.

    Args:
        requirement: Name and version, as ``name==1.2``.
        scratch: Folder for the wheel.
        console: Shows that it is at work.

    Returns:
        The wheel.

    Raises:
        SourceError: No wheel arrived.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), requirement]
    with console.status(f"pip download {requirement}"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        message = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise SourceError(f"pip download failed ({message})")
    return wheels[0]


def _convert_members(
    archive: Path, prefix: str, suffixes: tuple[str, str, str], convert: Callable[[bytes, bytes, bytes], _Files]
) -> _Files:
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [opened.getinfo(prefix + suffix) for suffix in suffixes]
            if any(member.file_size > _LARGEST_FILE for member in members):
                raise SourceError("a file in the archive is far too large")
            first, second, third = (opened.read(member) for member in members)
        return convert(first, second, third)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise SourceError(f"the archive is damaged or not the one expected ({error})") from None


def _install(files: _Files, source: str, staging: Path, target: Path) -> None:
    """Write everything aside first; a new folder appears at once, in an old one file after file is replaced."""
    digests = {name: _sha256(content) for name, content in files.items()}
    record = json.dumps({"source": source, "licence": LICENCE, "sha256": digests}, indent=2) + "\n"
    staging.mkdir()
    for name, content in {**files, "SOURCE.json": record.encode()}.items():
        (staging / name).write_bytes(content)
    if not target.exists():
        os.replace(staging, target)
        return
    for path in sorted(staging.iterdir()):
        os.replace(path, target / path.name)
