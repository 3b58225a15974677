import json
import os

import pytest
import torch
from safetensors.torch import save_file

from minirec_pl.utils.checkpoints import AtomicCheckpointIO
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import check_checkpoint, load_tensors, save_tensors, write_atomically, write_json


def full_disk(path):
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")


def test_write_atomically_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    for text in ("one", "two"):
        assert write_atomically(path, lambda temporary, text=text: temporary.write_text(text)) == path
        assert path.read_text() == text
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("older", [True, False])
def test_a_failed_write_leaves_what_was_there(older, tmp_path):
    path = tmp_path / "file.txt"
    if older:
        path.write_text("older")
    with pytest.raises(InputError, match=r"file\.txt.*No space left on device.*free the disk"):
        write_atomically(path, full_disk)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == (["older"] if older else [])


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("older")

    def interrupted(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["older"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("older")

    def look(temporary):
        temporary.write_text("newer")
        assert path.read_text() == "older"
        assert temporary.parent == path.parent

    write_atomically(path, look)
    assert path.read_text() == "newer"


def test_the_folder_of_a_file_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another folder"):
        write_atomically(tmp_path / "file" / "inner", lambda temporary: temporary.write_text(""))


def test_tensors_and_settings_come_back(tmp_path):
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.rand(4, 4).T, "c": torch.tensor(True)}
    settings = {"seed": 3, "names": ["x", "ü"], "none": None}
    path = save_tensors(tmp_path / "signals.safetensors", tensors, settings)
    loaded, read = load_tensors(path)
    assert loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], tensors[name]) and loaded[name].dtype == tensors[name].dtype for name in tensors
    )
    assert read == settings


def test_bad_tensor_files(tmp_path):
    path = save_tensors(tmp_path / "signals.safetensors", {"a": torch.rand(100)}, {})
    whole = path.read_bytes()
    for cut in (0, 5, 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"signals\.safetensors is damaged"):
            load_tensors(path)
    with pytest.raises(InputError, match="no signals at"):
        load_tensors(tmp_path / "none.safetensors")
    save_file({"a": torch.rand(1)}, path)
    with pytest.raises(InputError, match="not a signal store"):
        load_tensors(path)


def test_json_is_readable_and_whole(tmp_path):
    write_json(tmp_path / "results.json", {"ndcg@10": 0.1, "rows": [1, None]})
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == {"ndcg@10": 0.1, "rows": [1, None]}
    assert text.endswith("}\n")


def test_checkpoints_are_written_whole_and_read_safely(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "best.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3), "epoch": 2}, str(path))
    check_checkpoint(path)
    loaded = torch.load(path, weights_only=True)
    assert torch.equal(loaded["a"], torch.ones(3))
    assert loaded["epoch"] == 2
    before = path.read_bytes()

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match=r"best\.ckpt.*No space left"):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(3)}, path)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1
    path.write_bytes(before[:-20])
    with pytest.raises(InputError, match="truncated"):
        check_checkpoint(path)
