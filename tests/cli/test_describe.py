"""`minirec data describe` on toy data: figures against plain counts."""

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers.own_tables import item_frame, log_frame, sequence_frame
from helpers.tiny_config import TINY

from minirec_pl.cli.describe import facts_of, history_text, token_facts
from minirec_pl.cli.main import main
from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.data.sources import InteractionTable, Sequences


@pytest.fixture
def files(tmp_path):
    """Log with an unknown item, items with one that nobody has, and the sequences of the log."""
    log = log_frame(6, n=600, n_items=120)
    items = item_frame(log)
    extra = pd.DataFrame({"item_id": ["new"], "title": [""], "brand": ["x"]})
    pd.concat([items, extra]).to_csv(tmp_path / "items.csv", index=False)
    one = pd.DataFrame({"user_id": ["once"], "item_id": ["i1"], "timestamp": [880_000_000], "rating": [None]})
    unknown = one.assign(user_id="u1", item_id="gone")
    pd.concat([log, one, unknown]).to_csv(tmp_path / "log.csv", index=False)
    sequence_frame(log).to_parquet(tmp_path / "sequences.parquet")
    return tmp_path, log


def test_figures_equal_plain_counts(files):
    folder, log = files
    data = RecDataModule(source=InteractionTable(str(folder / "log.csv"), str(folder / "items.csv")), history_window=7)
    data.setup()
    facts = facts_of(data)
    n_users, n_items = log["user_id"].nunique() + 1, log["item_id"].nunique() + 1
    n_pairs = len(log[["user_id", "item_id"]].drop_duplicates()) + 1
    assert facts["data"] == {
        "users": f"{n_users:,}",
        "items": f"{n_items:,}",
        "interactions": f"{len(log) + 1:,}",
        "sparsity, the share of user-item pairs without interaction": f"{1 - n_pairs / (n_users * n_items):.4%}",
        "users with a single row": "1",
        "items that nobody has": "1",
    }
    order = log.sort_values("timestamp", kind="stable")
    train = set(data.table.item[: data.split.train_end].tolist())
    cold = [item for item in data.table.item[data.test_ids].tolist() if item not in train]
    assert facts["cold"]["test samples whose item is never in train"].startswith(f"{len(cold)} (")
    assert facts["cold"]["different items among these"] == f"{len(set(cold))}"
    lengths = sorted(
        int(data.table.n_earlier[i]) for part in ("warm", "pool", "val", "test") for i in getattr(data, f"{part}_ids")
    )
    assert facts["history length, items"]["longest"] == f"{lengths[-1]}"
    assert facts["history length, items"]["median"] == f"{lengths[-(-len(lengths) // 2) - 1]}"
    assert facts["history length, items"]["longer than history_window (7)"].startswith(
        f"{sum(n > 7 for n in lengths)} "
    )
    missing = facts["not served, dropped or fixed"]
    assert missing["log.csv: interactions with an item that is not in the item table: dropped"] == "1"
    assert missing["items.csv: items without a title: the id stands in"] == "1"
    assert missing["log.csv: ratings that are missing: kept as unknown"] == "2"
    assert len(order) == len(log)


class Characters:
    """A tokenizer with a token per character."""

    def __call__(self, texts, **options):
        return {"input_ids": [list(map(ord, text)) for text in texts]}


def test_tokens_are_counted_on_the_prompts_that_the_given_function_makes(files):
    folder, _ = files
    data = RecDataModule(source=InteractionTable(str(folder / "log.csv"), str(folder / "items.csv")), history_window=2)
    data.setup()
    assert history_text(data.catalogue, np.array([0, 1])) == "\n".join(data.catalogue.texts[:2])
    facts = token_facts(data, Characters())
    assert facts["item text, tokens"]["longest"] == str(max(map(len, data.catalogue.texts)))
    assert int(facts["history in a prompt, tokens"]["longest"]) <= 2 * max(map(len, data.catalogue.texts)) + 1
    three = token_facts(data, Characters(), lambda catalogue, history: "abc")
    assert set(three["history in a prompt, tokens"].values()) == {"3"}


def config(folder, source, **options):
    path = folder / "config.yaml"
    init_args = {"source": source, "history_window": 7, **options}
    data = {"class_path": "minirec_pl.RecDataModule", "init_args": init_args}
    path.write_text(yaml.safe_dump({"model": {"class_path": "not.looked.at"}, "data": data}))
    return path


def test_the_command_prints_the_table(files, capsys):
    folder, log = files
    init_args = {"interactions": str(folder / "log.csv"), "items": str(folder / "items.csv")}
    source = {"class_path": "minirec_pl.data.sources.InteractionTable", "init_args": init_args}
    path = config(folder, source)
    assert main(["data", "describe", "--config", str(path)]) == 0
    printed = capsys.readouterr().out
    for text in ("sparsity", f"{len(log) + 1:,}", "history_window (7)", "not in the item table: dropped"):
        assert text in printed
    assert "leaks the future" not in printed
    assert main(["data", "describe", f"--config={path}", "--data.split=leave_one_out", "--data.history_window=3"]) == 0
    printed = capsys.readouterr().out
    assert "leave-one-out leaks the future" in printed
    assert "history_window (3)" in printed


def test_the_command_reads_sequences_and_a_tokenizer(files, capsys):
    from minirec_pl.policy.language_models.tiny import item_tokenizer

    folder, _ = files
    item_tokenizer(["a", "b"]).save_pretrained(folder / "tokenizer")
    init_args = {"sequences": str(folder / "sequences.parquet"), "items": str(folder / "items.csv")}
    source = {"class_path": "minirec_pl.data.sources.Sequences", "init_args": init_args}
    path = config(folder, source, split="given")
    assert main(["data", "describe", "--config", str(path), "--tokenizer", str(folder / "tokenizer")]) == 0
    printed = capsys.readouterr().out
    assert "history in a prompt, tokens" in printed
    assert "sequences" in printed
    facts = facts_of(_setup(RecDataModule(source=Sequences(**init_args), split="given")))
    assert facts["data"]["sparsity, the share of user-item pairs without interaction"] in printed


def _setup(data):
    data.setup()
    return data


def test_bad_calls_are_one_sentence(files, capsys, tmp_path):
    folder, _ = files
    source = {"class_path": "minirec_pl.data.sources.InteractionTable", "init_args": {"interactions": "no.csv"}}
    path = str(config(folder, source))
    empty = tmp_path / "empty.yaml"
    empty.write_text("model: {}\n")
    calls = {
        ("data",): "minirec data has one command",
        ("data", "describe"): "minirec data describe --help",
        ("data", "describe", "--config", "no.yaml"): "no.yaml",
        ("data", "describe", "--config", str(empty)): "has no section data",
        ("data", "describe", "--config", path): "no.csv does not exist",
        ("data", "describe", "--config", path, "--data.nonsense=1"): "nonsense",
        ("data", "describe", "--config", path, "--data.split=random"): "split",
    }
    for arguments, fragment in calls.items():
        assert main(list(arguments)) == 2
        err = capsys.readouterr().err
        assert err.startswith("minirec: error: ")
        assert err.count("\n") == 1
        assert fragment in err
    good = {"interactions": str(folder / "log.csv")}
    path = str(config(folder, {**source, "init_args": good}))
    assert main(["data", "describe", "--config", path, "--tokenizer", str(tmp_path)]) == 2
    assert "no tokenizer in" in capsys.readouterr().err


def test_what_was_dropped_is_printed_once_by_describe_and_by_a_fit(tmp_path, capsys):
    log = pd.concat([log_frame(n=300), pd.DataFrame({"user_id": ["None"], "item_id": ["i1"], "timestamp": [5]})])
    log.to_csv(tmp_path / "log.csv", index=False, sep=";")
    (tmp_path / "items.csv").write_text(
        "item_id|title\n" + "".join(f"{i}|Thing\n" for i in log["item_id"].unique()) + "|x\n"
    )
    source = {
        "class_path": "minirec_pl.data.sources.InteractionTable",
        "init_args": {"interactions": str(tmp_path / "log.csv"), "items": str(tmp_path / "items.csv")},
    }
    path = config(tmp_path, source, batch_size=8, warm_fraction=0.3)
    assert main(["data", "describe", "--config", str(path)]) == 0
    printed = capsys.readouterr().out
    for what in ("log.csv: rows without user_id: dropped", "items.csv: rows without item_id: dropped"):
        assert printed.count(what) == 1
    model = {"policy": {"class_path": "minirec_pl.policy.GenerativePolicy", "init_args": {"config": TINY}}}
    content = yaml.safe_load(path.read_text())
    content["model"] = {"class_path": "minirec_pl.GRPORecModule", "init_args": model}
    content["trainer"] = {"max_steps": 1, "logger": False, "limit_val_batches": 0, "accelerator": "cpu"}
    path.write_text(yaml.safe_dump(content))
    root = f"--trainer.default_root_dir={tmp_path / 'runs'}"
    assert main(["fit", "--config", str(path), root]) == 0
    printed = capsys.readouterr().out
    for what in ("data: log.csv: rows without user_id: dropped 1", "data: items.csv: rows without item_id: dropped 1"):
        assert printed.count(what) == 1
    assert main(["fit", "--config", str(path), root, "--data.source.on_missing=error"]) == 2
    assert "log.csv, line 302, column user_id: the id is missing ('None'): give it" in capsys.readouterr().err
