"""`minirec predict`: whom it serves, what it may recommend, and how it goes on after an interruption."""

import json
import os
import signal

import pandas as pd
import pytest
import torch
from helpers.cli_tools import sentence
from helpers.slow import slow

from minirec_pl import GRPORecModule
from minirec_pl.cli.main import main
from minirec_pl.cli.predict import read_candidates, read_history
from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import GenerativePolicy
from minirec_pl.utils.errors import InputError


@pytest.fixture(scope="module")
def checkpoint(command):
    root = command.folder / "predict"
    assert main(command.grpo(root, "--trainer.max_epochs=1")) == 0
    return root / "version_0" / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="module")
def data(command):
    made = RecDataModule(str(command.data), "toy", warm_fraction=0.8, history_window=10)
    made.setup("fit")
    return made


@pytest.fixture(scope="module")
def policy(checkpoint, data):
    """The policy of the checkpoint."""
    stored = GenerativePolicy(pretrained=str(checkpoint.parents[1] / "policy"))
    return stored.eval()


def predict(checkpoint, to, *options):
    return main(["predict", "--ckpt_path", str(checkpoint), "--to", str(to), "--model.predict_k=4", *options])


def best(policy, history, hidden=(), allowed=None, k=4):
    """The k best items by their definition: item indices and scores."""
    batch = {"history": torch.tensor([history[-10:]]), "seen": torch.tensor([list(hidden) or [-1]])}
    with torch.no_grad():
        scores = policy.item_logps(batch)[0]
    open_items = [i for i in range(len(scores)) if i not in set(hidden) and (allowed is None or i in allowed)]
    order = sorted(open_items, key=lambda i: -float(scores[i]))[:k]
    return order, scores[order].tolist()


HISTORY = {"new": ["i3", "i9", "i4"], "7": ["i11"], "long": [f"i{i}" for i in range(20, 35)]}


def write_log(path, histories, shuffled=True):
    rows = [(user, item, 1000 + place) for user, items in histories.items() for place, item in enumerate(items)]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    frame = frame.sample(frac=1, random_state=0) if shuffled else frame
    frame.to_csv(path, index=False)
    return path


def check_lists(table, histories, policy, data, hide=True, allowed=None, k=4):
    index = {item: i for i, item in enumerate(data.catalogue.item_ids)}
    assert list(table.columns) == ["user_id", "item_id", "score", "rank"]
    assert set(table["user_id"]) == set(histories)
    for user, items in histories.items():
        rows = table[table["user_id"] == user]
        known = [index[item] for item in items]
        order, scores = best(policy, known, known if hide else (), allowed, k)
        assert rows["item_id"].tolist() == [data.catalogue.item_ids[i] for i in order]
        assert rows["score"].tolist() == pytest.approx(scores, abs=1e-4)
        assert rows["rank"].tolist() == list(range(1, len(order) + 1))


def test_users_unknown_to_training_are_served_from_a_log(checkpoint, policy, data, tmp_path, capsys):
    log = write_log(tmp_path / "log.csv", {**HISTORY, "new": ["i3", "gone", "i9", "i4"], "ghost": ["lost"]})
    assert predict(checkpoint, tmp_path / "top.parquet", "--history", str(log)) == 0
    out = capsys.readouterr().out
    assert "2 of 21 history items are not in the catalogue: dropped" in out
    assert "1 of 4 users have no history item left: dropped" in out
    check_lists(pd.read_parquet(tmp_path / "top.parquet"), HISTORY, policy, data)


FOREIGN = {"user_id": "customer", "item_id": "sku", "timestamp": "bought_at"}


@pytest.mark.parametrize(
    ("separator", "encoding", "options"),
    [
        (";", "utf-16", []),
        slow("^", "cp1252", ["--history_separator=^", "--history_encoding=cp1252"]),
    ],
)
def test_a_history_file_has_columns_separators_and_encodings_of_its_own(
    separator, encoding, options, checkpoint, policy, data, tmp_path, capsys
):
    users = {"Zoë": HISTORY["new"], "7": HISTORY["7"], "long": HISTORY["long"]}
    frame = pd.read_csv(write_log(tmp_path / "plain.csv", users), dtype=str)
    lacking = pd.DataFrame(
        {"user_id": ["None", "Zoë", "ghost"], "item_id": ["i3", "nan", "i3"], "timestamp": ["1", "2", "NULL"]}
    )
    frame = pd.concat([frame, lacking]).rename(columns=FOREIGN)
    (tmp_path / "log.csv").write_bytes(frame.to_csv(index=False, sep=separator).encode(encoding))
    options += ["--history", str(tmp_path / "log.csv")]
    assert predict(checkpoint, tmp_path / "top.parquet", *options) == 2
    said = sentence(capsys)
    assert "no column 'user_id' among customer, sku, bought_at" in said
    assert "say which one it is with --history_columns '{user_id: NAME}'" in said
    options += ["--history_columns={user_id: customer, item_id: sku, timestamp: bought_at}"]
    assert predict(checkpoint, tmp_path / "top.parquet", *options) == 0
    out = capsys.readouterr().out
    for name in ("user_id", "item_id", "timestamp"):
        assert f"history: log.csv: rows without {name}: dropped 1" in out
    check_lists(pd.read_parquet(tmp_path / "top.parquet"), users, policy, data)


def test_json_lines_of_lists_leave_out_what_is_missing(checkpoint, policy, data, tmp_path, capsys):
    rows = [{"user_id": user, "history_item_id": [*items, None, "NULL"]} for user, items in HISTORY.items()]
    rows.append({"user_id": "nan", "history_item_id": ["i1"]})
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert predict(checkpoint, tmp_path / "top.parquet", "--history", str(tmp_path / "lists.jsonl")) == 0
    out = capsys.readouterr().out
    assert "history: lists.jsonl: rows without user_id: dropped 1" in out
    assert "history: lists.jsonl: history items without an id: dropped 6" in out
    check_lists(pd.read_parquet(tmp_path / "top.parquet"), HISTORY, policy, data)


def test_a_history_file_may_have_the_columns_of_the_training_data(tmp_path):
    catalogue = Catalogue(["1", "2", "3"])
    columns = {"user_id": "customer", "item_id": "sku", "timestamp": "bought_at", "rating": "stars"}
    (tmp_path / "log.csv").write_text("customer|sku|bought_at\nann|2.0|20\nann|1|10\nbob|3|5\n")
    for given, likely in ((None, columns), (dict(list(columns.items())[:3]), {})):
        requests = read_history(tmp_path / "log.csv", catalogue, given, likely=likely)
        assert requests.table.user_ids == ["ann", "bob"]
        assert [requests.table.history(i).tolist() for i in range(2)] == [[0, 1], [2]]
    (tmp_path / "log.csv").write_text("user_id|item_id|timestamp\nann|2|20\n")
    assert read_history(tmp_path / "log.csv", catalogue, None, likely=columns).table.user_ids == ["ann"]
    with pytest.raises(
        InputError, match=r"no column 'stars' \(for rating\) among .*: fix the name in --history_columns"
    ):
        read_history(tmp_path / "log.csv", catalogue, {"rating": "stars"})
    (tmp_path / "items.csv").write_text("sku;name\n3;c\n\n1;a\nNone;b\n")
    assert read_candidates(tmp_path / "items.csv", catalogue, columns).tolist() == [True, False, True]


def test_users_are_served_from_lists(checkpoint, policy, data, tmp_path):
    frame = pd.DataFrame({"user_id": ["new", 7, "long"], "history_item_id": list(HISTORY.values())})
    frame.astype({"user_id": str}).to_parquet(tmp_path / "lists.parquet")
    options = ["--history", str(tmp_path / "lists.parquet")]
    assert predict(checkpoint, tmp_path / "top.parquet", *options) == 0
    table = pd.read_parquet(tmp_path / "top.parquet")
    assert table["user_id"].drop_duplicates().tolist() == ["new", "7", "long"]
    check_lists(table, HISTORY, policy, data)


def test_what_was_seen_may_be_recommended_again(checkpoint, policy, data, tmp_path):
    log = write_log(tmp_path / "log.csv", HISTORY)
    options = ["--history", str(log), "--mask_seen=false", "--model.predict_k=80"]
    assert predict(checkpoint, tmp_path / "top.parquet", *options) == 0
    table = pd.read_parquet(tmp_path / "top.parquet")
    assert set(HISTORY["new"]) <= set(table[table["user_id"] == "new"]["item_id"])
    check_lists(table, HISTORY, policy, data, hide=False, k=80)


@pytest.mark.parametrize("kind", ["txt", "parquet", "csv"])
def test_candidates_restrict_the_lists(checkpoint, policy, data, tmp_path, kind):
    log, allowed = write_log(tmp_path / "log.csv", HISTORY), ["i4", "i5", "i6", "i21", "i70"]
    path = tmp_path / f"candidates.{kind}"
    if kind == "txt":
        path.write_text("\n".join([*allowed, "", " i5 "]) + "\n")
    elif kind == "csv":
        pd.DataFrame({"item_id": allowed}).to_csv(path, index=False)
    else:
        pd.DataFrame({"item_id": allowed}).to_parquet(path)
    assert predict(checkpoint, tmp_path / "top.parquet", "--history", str(log), "--candidates", str(path)) == 0
    indices = {data.catalogue.index_of(item) for item in allowed}
    check_lists(pd.read_parquet(tmp_path / "top.parquet"), HISTORY, policy, data, allowed=indices)


class Interrupted:
    """`predict_step` that presses Ctrl-C in its n-th call, and counts the samples of all calls."""

    def __init__(self, at):
        self.at, self.samples, self.calls, self.step = at, 0, 0, GRPORecModule.predict_step

    def __call__(self, module, batch, batch_idx):
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        self.samples += len(batch["sample_id"])
        return self.step(module, batch, batch_idx)


def test_the_same_command_goes_on_after_an_interruption(checkpoint, data, tmp_path, capsys, monkeypatch):
    small = "--data.eval_batch_size=16"
    assert predict(checkpoint, tmp_path / "whole.parquet", small) == 0
    counted = Interrupted(at=4)
    monkeypatch.setattr(GRPORecModule, "predict_step", lambda self, *args: counted(self, *args))
    capsys.readouterr()
    assert predict(checkpoint, tmp_path / "top.parquet", small) == 2
    assert "the same command resumes" in sentence(capsys)
    assert not (tmp_path / "top.parquet").exists()
    (parts,) = tmp_path.glob(".predictions-*")
    done = sum(len(pd.read_parquet(part)) for part in parts.glob("*.parquet"))
    assert done == 3 * 16
    counted.samples = 0
    assert predict(checkpoint, tmp_path / "top.parquet", small) == 0
    assert counted.samples == len(data.test_ids) - done
    assert f"resuming after {done} finished samples" in capsys.readouterr().out
    table, whole = pd.read_parquet(tmp_path / "top.parquet"), pd.read_parquet(tmp_path / "whole.parquet")
    pd.testing.assert_frame_equal(table, whole, rtol=1e-5)
    assert table["sample_id"].drop_duplicates().tolist() == data.test_ids.tolist()
    assert not list(tmp_path.glob(".predictions-*"))


@pytest.mark.slow
def test_parts_of_another_request_are_not_taken(checkpoint, data, tmp_path, capsys, monkeypatch):
    counted = Interrupted(at=3)
    monkeypatch.setattr(GRPORecModule, "predict_step", lambda self, *args: counted(self, *args))
    small = "--data.eval_batch_size=16"
    assert predict(checkpoint, tmp_path / "top.parquet", small) == 2
    counted.at, counted.samples = -1, 0
    assert predict(checkpoint, tmp_path / "top.parquet", small, "--model.predict_k=5") == 0
    assert counted.samples == len(data.test_ids)
    assert set(pd.read_parquet(tmp_path / "top.parquet")["rank"]) == {1, 2, 3, 4, 5}
    assert len(list(tmp_path.glob(".predictions-*"))) == 1


@pytest.mark.slow
def test_nothing_is_left_to_do(checkpoint, data, tmp_path, capsys, monkeypatch):
    import minirec_pl.cli.score as score

    monkeypatch.setattr(score, "merge_parts", lambda *args: None)
    assert predict(checkpoint, tmp_path / "top.parquet") == 0
    monkeypatch.undo()
    assert predict(checkpoint, tmp_path / "top.parquet") == 0
    assert f"resuming after {len(data.test_ids)} finished samples" in capsys.readouterr().out
    assert pd.read_parquet(tmp_path / "top.parquet")["sample_id"].nunique() == len(data.test_ids)


@pytest.mark.slow
def test_parts_are_written_while_it_runs(checkpoint, data, tmp_path, monkeypatch):
    import minirec_pl.cli.predict as predictions

    found = []
    merge = predictions.merge_parts
    monkeypatch.setattr(predictions, "SECONDS_A_PART", 0.0)
    monkeypatch.setattr(
        "minirec_pl.cli.score.merge_parts",
        lambda requests, path: (found.extend(requests.finished()), merge(requests, path)),
    )
    assert predict(checkpoint, tmp_path / "top.parquet", "--data.eval_batch_size=50") == 0
    assert len(found) == -(-len(data.test_ids) // 50)


FAULTS = {
    "unknown candidate": (
        "candidates.txt",
        "i4\n\nnope\n",
        ("candidates.txt, line 3", "'nope' is not in"),
    ),
    "no candidate": ("candidates.txt", "\n\n", ("has no candidates",)),
    "unknown candidate in a table": ("candidates.csv", "item_id\ni4\nnope\n", ("candidates.csv, line 3", "'nope'")),
    "candidates without a column": ("candidates.csv", "item\ni4\n", ("no column 'item_id'",)),
    "no candidates file": ("candidates.txt", None, ("candidates.txt does not exist",)),
    "no history file": ("history.csv", None, ("history.csv does not exist",)),
    "empty history": ("history.csv", "user_id,item_id,timestamp\n", ("has no rows",)),
    "history of nothing known": (
        "history.csv",
        "user_id,item_id,timestamp\nu,44,1\n",
        ("none of its items is in the catalogue", "'44'"),
    ),
    "history without times": ("history.csv", "user_id,item_id\nu,i4\n", ("no column 'timestamp'",)),
    "history with a wrong time": ("history.csv", "user_id,item_id,timestamp\nu,i4,soon\n", ("line 2", "'soon'")),
    "lists in text": ("history.csv", "user_id,history_item_id\nu,i4 i5\n", ("line 2", "is not a list")),
}
QUICK = ("unknown candidate", "no history file", "history of nothing known", "lists in text")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in FAULTS])
def test_bad_files(name, checkpoint, tmp_path, capsys):
    file, content, fragments = FAULTS[name]
    path = tmp_path / file
    if content is not None:
        path.write_text(content)
    capsys.readouterr()
    assert predict(checkpoint, tmp_path / "top.parquet", f"--{path.stem}", str(path)) == 2
    said = sentence(capsys)
    assert all(fragment in said for fragment in fragments), said
    assert not (tmp_path / "top.parquet").exists()


def test_a_user_twice_in_lists(checkpoint, tmp_path, capsys):
    frame = pd.DataFrame({"user_id": ["a", "b", "a"], "history_item_id": [["i1"], ["i2"], ["i3"]]})
    frame.to_parquet(tmp_path / "lists.parquet")
    capsys.readouterr()
    assert predict(checkpoint, tmp_path / "top.parquet", "--history", str(tmp_path / "lists.parquet")) == 2
    assert "row 3: the user 'a' comes twice" in sentence(capsys)


def test_a_policy_without_a_text(checkpoint, tmp_path, capsys):
    capsys.readouterr()
    assert predict(checkpoint, tmp_path / "top.parquet", "--reasoning=true") == 2
    assert "GenerativePolicy recommends without a text" in sentence(capsys)


def test_the_text_of_a_policy_is_kept(checkpoint, policy, data, tmp_path, monkeypatch):
    def reasoned(self, batch):
        return self.item_logps(batch), [f"because of {n}" for n in (batch["history"] >= 0).sum(dim=1).tolist()]

    monkeypatch.setattr(GenerativePolicy, "reasoned_item_logps", reasoned, raising=False)
    log = write_log(tmp_path / "log.csv", HISTORY)
    options = ["--history", str(log), "--reasoning=true"]
    assert predict(checkpoint, tmp_path / "top.parquet", *options) == 0
    table = pd.read_parquet(tmp_path / "top.parquet")
    texts = table.groupby("user_id")["reasoning"].unique().map(list).to_dict()
    assert texts == {"new": ["because of 3"], "7": ["because of 1"], "long": ["because of 10"]}
    check_lists(table.drop(columns="reasoning"), HISTORY, policy, data)
