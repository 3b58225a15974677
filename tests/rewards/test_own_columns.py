"""Rewards that ask for columns of the user's data: what they get, for every source, and what is refused."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers.own_tables import item_frame, log_frame, sequence_frame, write_amazon
from helpers.slow import slow
from helpers.text_policy import write_model
from hypothesis import given
from hypothesis import strategies as st

from minirec_pl import RecDataModule
from minirec_pl.cli.main import main
from minirec_pl.data.own_columns import OwnColumns, as_values, values_at
from minirec_pl.data.sources import AmazonReviews2023, InteractionTable
from minirec_pl.rewards import NDCGReward, rank_penalty
from minirec_pl.rewards.calls import Rewarder, asked_for, check_columns, combine_rewards
from minirec_pl.utils.errors import InputError

OWN = OwnColumns(("user_id", "timestamp", "price", "paid", "group"), ("title", "price", "brand", "rank", "history"))


def asks(name: str, default: bool = False) -> Any:
    """A reward whose signature names one column."""
    scope: dict[str, Any] = {}
    exec(f"def asks(completions, {name}{'=None' if default else ''}):\n    return [0.0] * len(completions)", scope)
    return scope["asks"]


@pytest.mark.parametrize(
    ("name", "owner", "column"),
    [
        ("paid", "interaction", "paid"),
        ("brand", "target", "brand"),
        ("interaction_price", "interaction", "price"),
        ("target_price", "target", "price"),
        ("recommended_price", "recommended", "price"),
        ("history_title", "history", "title"),
        ("interaction_group", "interaction", "group"),
    ],
)
def test_a_name_has_one_meaning(name: str, owner: str, column: str) -> None:
    assert OWN.places(name) == [(owner, column)]
    check_columns([asks(name)], OWN)


def test_names_that_are_unknown_or_mean_two_things_are_refused_with_those_there_are() -> None:
    with pytest.raises(InputError) as raised:
        check_columns([asks("prize")], OWN)
    said = str(raised.value)
    assert said.startswith("reward asks asks for 'prize': ask by keyword for one of completions, recommended, target,")
    assert "of the interactions: user_id, timestamp, price, paid, group; of the items, with target_" in said
    assert said.endswith("title, price, brand, rank, history")
    for unknown in ("target_paid", "recommended_paid", "interaction_brand", "history_paid", "price_", "target_"):
        with pytest.raises(InputError, match=f"asks for '{unknown}'"):
            check_columns([asks(unknown)], OWN)
        check_columns([asks(unknown, default=True)], OWN)
    with pytest.raises(
        InputError, match="'price', which is both a column of the interactions and a column of the item"
    ):
        check_columns([asks("price")], OWN)
    with pytest.raises(InputError, match="ask for interaction_price or target_price, or rename one in the data"):
        check_columns([asks("price")], OWN)
    with pytest.raises(InputError, match=r"'group', which is both what every reward gets and a col.*interaction_group"):
        check_columns([asks("group")], OWN)
    with pytest.raises(InputError, match=r"'history', which is both what every .* the items: ask for target_history"):
        check_columns([asks("history")], OWN)
    check_columns([asks("target_rank")], OWN)
    check_columns([rank_penalty, NDCGReward(), lambda completions, **columns: [0.0] * len(completions)], OWN)
    with pytest.raises(InputError, match=r"asks for 'paid': .* target_rank, target_probability$"):
        check_columns([asks("paid")], OwnColumns())


def test_only_what_is_asked_for_is_kept() -> None:
    interactions = pd.DataFrame({"price": [1, 2], "paid": [3, 4], "item_id": ["x", "y"], "no name": [0, 0]})
    items = pd.DataFrame({"price": ["5", "6"], "brand": ["b", ""], "item_id": ["x", "y"]})
    own = OwnColumns.keep(interactions, items, {"completions", "paid", "recommended_brand", "nothing"})
    assert own.interaction_names == ("price", "paid")
    assert own.item_names == ("price", "brand")
    assert (list(own.interactions), list(own.items)) == (["paid"], ["brand"])
    assert not OwnColumns.keep(interactions, items, set()).items


VALUES = [
    (["2.5", " 3 ", "", None, "nan", "NA"], [2.5, 3.0, None, None, None, None]),
    (["1", "2"], [1, 2]),
    (["007", "1"], ["007", "1"]),
    (["0.5", "-0.25", "0"], [0.5, -0.25, 0.0]),
    (["1e3", "2"], [1000.0, 2.0]),
    (["12 EUR", "", "nan"], ["12 EUR", None, "nan"]),
    (["inf", "1"], ["inf", "1"]),
    (["", None], [None, None]),
    ([1, 2, 3], [1, 2, 3]),
    ([1.5, math.nan], [1.5, None]),
    ([True, False], [True, False]),
    ([True, None], [True, None]),
    ([np.array(["a", "b"]), None, []], [["a", "b"], None, []]),
    ([[1, 2], [3]], [[1, 2], [3]]),
    ([2**60 + 1, 5], [2**60 + 1, 5]),
]


@pytest.mark.parametrize(("given_values", "wanted"), VALUES)
def test_values_are_python_values_and_none_where_missing(given_values: list[Any], wanted: list[Any]) -> None:
    column = (
        pd.Series(given_values)
        if not isinstance(given_values[0], str | list)
        else pd.Series(given_values, dtype=object)
    )
    got = values_at(as_values(column), np.arange(len(wanted)))
    assert got == wanted
    assert [type(value) for value in got] == [type(value) for value in wanted]
    assert values_at(as_values(column), np.array([1, 0, 1])) == [wanted[1], wanted[0], wanted[1]]


@given(st.data())
def test_a_reward_gets_the_values_of_its_rows(data: st.DataObject) -> None:
    """Against plain look-ups, for any shape of batch."""
    n_samples, n_items = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    rows, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    price = data.draw(st.lists(st.sampled_from([1.5, 2.0, None]), min_size=n_items, max_size=n_items))
    paid = data.draw(st.lists(st.sampled_from(["x", "y", None]), min_size=n_samples, max_size=n_samples))
    index = st.integers(0, n_items - 1)
    ids = data.draw(st.lists(st.integers(0, n_samples - 1), min_size=rows, max_size=rows))
    target = data.draw(st.lists(index, min_size=rows, max_size=rows))
    items = data.draw(st.lists(st.lists(index, min_size=group, max_size=group), min_size=rows, max_size=rows))
    histories = data.draw(st.lists(st.lists(index, max_size=3), min_size=rows, max_size=rows))
    batch = {
        "sample_id": torch.tensor(ids),
        "target": torch.tensor(target),
        "history": torch.tensor([[-1] * (3 - len(h)) + h for h in histories]),
    }
    frames = pd.DataFrame({"paid": paid}), pd.DataFrame({"price": pd.Series(price, dtype=object)})
    seen: dict[str, list[Any]] = {}

    def reward(completions, paid, price, recommended_price, history_price, recommended):  # type: ignore[no-untyped-def]
        seen.update(locals())
        return [0.0] * len(completions)

    own = OwnColumns.keep(*frames, asked_for([reward]))
    ids_of_items = np.array([f"i{i}" for i in range(n_items)], dtype=object)
    Rewarder([reward], None, ids_of_items, own)(batch, torch.tensor(items), torch.zeros(rows, group))
    place = [(row, member) for row in range(rows) for member in range(group)]
    assert seen["paid"] == [paid[ids[row]] for row, _ in place]
    assert seen["price"] == [price[target[row]] for row, _ in place]
    assert seen["recommended_price"] == [price[items[row][member]] for row, member in place]
    assert seen["history_price"] == [[price[item] for item in histories[row]] for row, _ in place]
    assert seen["recommended"] == [f"i{items[row][member]}" for row, member in place]


def test_keywords_that_are_not_named_get_no_column_of_the_data() -> None:
    seen: list[set[str]] = []

    def everything(completions, price, **columns):  # type: ignore[no-untyped-def]
        seen.append({"price", *columns})
        return [0.0] * len(completions)

    own = {"price": lambda: [1.0], "brand": lambda: ["b"]}
    combine_rewards([everything], None, ["a"], {"target": lambda: ["a"]}, own)
    assert seen == [{"price", "target"}]


RECORDING = '''
import json


def margin(completions, sample_id, target, recommended, history, {names}):
    """Writes down what it gets; a number that depends on it is the reward."""
    with open("seen.jsonl", "a") as file:
        rows = zip(sample_id, target, recommended, history, {names})
        file.writelines(json.dumps(row) + "\\n" for row in rows)
    return [float(len(str(a)) % 3) for a in {first}]
'''
TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def write_run(
    folder: Path, source: dict[str, Any], names: list[str], policy: str = "GenerativePolicy", **data: Any
) -> Path:
    """A config and a reward beside it, as a user has them."""
    (folder / "my_margin.py").write_text(RECORDING.format(names=", ".join(names), first=names[0]))
    init = {"config": TINY}
    rewards = ["my_margin.margin"]
    if policy == "RetrievalPolicy":
        write_model(folder / "model")
        init = {"language_model": {"name": str(folder / "model")}, "max_completion_length": 3}
        rewards = ["minirec_pl.rewards.SoftmaxMixReward", "my_margin.margin"]
    model = {
        "policy": {"class_path": f"minirec_pl.policy.{policy}", "init_args": init},
        "rewards": rewards,
        "num_generations": 2,
        "scoring_generations": 2,
    }
    trainer = {
        "max_steps": 2,
        "logger": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "limit_val_batches": 0,
    }
    config = {
        "model": {"class_path": "minirec_pl.GRPORecModule", "init_args": model},
        "data": {
            "class_path": "minirec_pl.RecDataModule",
            "init_args": {"source": source, "batch_size": 4, "history_window": 4, "warm_fraction": 0.3, **data},
        },
        "trainer": {**trainer, "default_root_dir": str(folder / "runs")},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def own_source(folder: Path, kind: str) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """A source of some kind with columns of its own, and what its rows and items say, as plain frames."""
    log = log_frame(n=300).assign(channel=lambda f: [f"c{i % 4}" for i in range(len(f))])
    items = item_frame(log).assign(price=lambda f: [str(1.5 + i) if i % 3 else "" for i in range(len(f))])
    truth = items.assign(price=[float(p) if p else None for p in items["price"]]).astype({"price": object})
    truth = truth.where(truth.notna(), None)
    init: dict[str, Any]
    if kind == "csv":
        log.to_csv(folder / "log.csv", index=False, sep=";")
        items.to_csv(folder / "items.csv", index=False)
        name, init = "InteractionTable", {"interactions": "log.csv", "items": "items.csv"}
    elif kind == "sequences":
        log = sequence_frame(log).assign(channel=lambda f: [f"c{i % 4}" for i in range(len(f))])
        (folder / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log.to_dict("records")))
        items.to_parquet(folder / "i.parquet")
        name, init = "Sequences", {"sequences": "s.jsonl", "items": "i.parquet"}
    elif kind == "hub":
        datasets = pytest.importorskip("datasets")
        parts = {"data": log, "info": items}
        made = {n: datasets.Dataset.from_pandas(f, preserve_index=False) for n, f in parts.items()}
        datasets.DatasetDict(made).save_to_disk(folder / "hub")
        name, init = "HubDataset", {"name_or_folder": "hub", "items": "info"}
    else:
        (folder / "toy").mkdir()
        head = {"user_id": "token", "item_id": "token", "timestamp": "float", "channel": "token"}
        lines = [
            "\t".join(f"{n}:{t}" for n, t in head.items()),
            *("\t".join(map(str, r)) for r in log[[*head]].to_numpy()),
        ]
        (folder / "toy" / "toy.inter").write_text("\n".join(lines) + "\n")
        head = {"item_id": "token", "title": "token_seq", "price": "float"}
        lines = [
            "\t".join(f"{n}:{t}" for n, t in head.items()),
            *("\t".join(map(str, r)) for r in items[[*head]].to_numpy()),
        ]
        (folder / "toy" / "toy.item").write_text("\n".join(lines) + "\n")
        name, init = "AtomicFiles", {"path": ".", "dataset": "toy"}
    return {"class_path": f"minirec_pl.data.sources.{name}", "init_args": init}, log, truth


def go_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "my_margin", raising=False)


NAMES = ["channel", "price", "recommended_price", "history_price", "title", "user_id", "timestamp"]


def check_seen(folder: Path, log: pd.DataFrame, items: pd.DataFrame) -> int:
    """Each line that the reward wrote, against look-ups in the plain frames."""
    ordered = log.sort_values("timestamp", kind="stable", ignore_index=True)
    price, title = (
        dict(zip(items["item_id"], items["price"], strict=True)),
        dict(zip(items["item_id"], items["title"], strict=True)),
    )
    lines = (folder / "seen.jsonl").read_text().splitlines()
    for line in lines:
        sample_id, target, recommended, history, *own = json.loads(line)
        row = ordered.iloc[sample_id]
        assert row["item_id"] == target
        assert own == [
            row["channel"],
            price[target],
            price[recommended],
            [price[item] for item in history],
            title[target],
            row["user_id"],
            float(row["timestamp"]),
        ]
    return len(lines)


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("csv", "GenerativePolicy"),
        pytest.param("csv", "RetrievalPolicy", marks=pytest.mark.slow),
        pytest.param("sequences", "GenerativePolicy", marks=pytest.mark.slow),
        pytest.param("hub", "GenerativePolicy", marks=pytest.mark.slow),
        pytest.param("atomic", "GenerativePolicy", marks=pytest.mark.slow),
    ],
)
def test_a_reward_of_the_users_own_file_gets_its_columns_in_a_fit(
    kind: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go_to(tmp_path, monkeypatch)
    source, log, items = own_source(tmp_path, kind)
    config = write_run(tmp_path, source, NAMES, policy)
    assert main(["check", "--config", str(config)]) == 0, capsys.readouterr().out
    assert not (tmp_path / "seen.jsonl").exists()
    assert main(["fit", "--config", str(config)]) == 0
    assert check_seen(tmp_path, log, items) == 2 * 4 * 2
    (tmp_path / "seen.jsonl").unlink()
    assert main(["score", "--config", str(config), "--to", "scores", "--data.pool_samples=6"]) == 0
    assert check_seen(tmp_path, log, items) == 6 * 2


@pytest.mark.slow
def test_a_warm_start_before_it_and_a_selection_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_to(tmp_path, monkeypatch)
    source, log, items = own_source(tmp_path, "csv")
    config = write_run(tmp_path, source, NAMES, pool_samples=20)
    more = [
        "--warm_start.epochs=1",
        "--selection=MiniRec",
        "--selection.selector=minirec_pl.selection.MiniRecSelector",
        "--selection.budget=0.5",
        "--selection.selector.on_short=fill",
    ]
    assert main(["fit", "--config", str(config), *more]) == 0
    assert check_seen(tmp_path, log, items) == 20 * 2 + 2 * 4 * 2


@pytest.mark.parametrize("name", ["prise", slow("target_channel"), slow("timestamps"), slow("group")])
def test_check_and_fit_say_which_columns_there_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go_to(tmp_path, monkeypatch)
    log = log_frame(n=300).assign(channel="c", group="g")
    log.to_csv(tmp_path / "log.csv", index=False)
    item_frame(log).to_csv(tmp_path / "items.csv", index=False)
    source = {
        "class_path": "minirec_pl.data.sources.InteractionTable",
        "init_args": {"interactions": "log.csv", "items": "items.csv"},
    }
    config = write_run(tmp_path, source, [name])
    assert main(["check", "--config", str(config)]) == 1
    checked = " ".join(capsys.readouterr().out.split())
    assert main(["fit", "--config", str(config)]) == 2
    for said in (checked, " ".join(capsys.readouterr().err.split())):
        assert f"reward margin asks for '{name}'" in said
        if name == "group":
            assert "ask for interaction_group, or rename one in the data" in said
        else:
            assert "of the interactions: user_id, timestamp, rating, channel, group" in said.replace(
                "user_id, rating, timestamp", "user_id, timestamp, rating"
            )
            assert "with target_, recommended_ or history_ before them: title, brand" in said
    assert not (tmp_path / "seen.jsonl").exists()
    assert not list((tmp_path / "runs").glob("version_*/checkpoints")) if (tmp_path / "runs").exists() else True


def test_amazon_gives_fields_of_its_metadata(tmp_path: Path) -> None:
    day = 1_672_531_200_000
    reviews = [
        {"user_id": u, "parent_asin": f"B{i}", "rating": 5.0, "timestamp": day + i, "verified_purchase": i % 2 == 0}
        for u in "abc"
        for i in range(5)
    ]
    meta = [
        {
            "parent_asin": f"B{i}",
            "title": f"Thing {i}",
            "price": f"{i}.5",
            "store": None if i == 2 else f"S{i}",
            "categories": ["Toys", str(i)],
        }
        for i in range(5)
    ]
    write_amazon(tmp_path, reviews, meta)
    source = AmazonReviews2023("Toys", str(tmp_path), category_core=0, min_items=0)
    data = RecDataModule(source=source, split=(0.6, 0.2, 0.2), warm_fraction=0.3)
    data.keep_columns({"verified_purchase", "recommended_price", "store", "categories"})
    data.setup()
    ids = np.arange(len(data.table))
    items = [data.catalogue.item_ids[i] for i in data.table.item]
    assert values_at(data.own_columns.interactions["verified_purchase"], ids) == [int(i[1:]) % 2 == 0 for i in items]
    every = np.arange(5)
    assert values_at(data.own_columns.items["price"], every) == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert values_at(data.own_columns.items["store"], every) == ["S0", "S1", None, "S3", "S4"]
    assert values_at(data.own_columns.items["categories"], every) == [["Toys", str(i)] for i in range(5)]
    assert set(data.own_columns.items) == {"price", "store", "categories"}


def test_columns_asked_for_later_are_read_from_the_same_data(tmp_path: Path) -> None:
    log = log_frame(n=200).assign(channel=lambda f: [f"c{i}" for i in range(len(f))])
    log.to_csv(tmp_path / "log.csv", index=False)
    data = RecDataModule(source=InteractionTable(str(tmp_path / "log.csv")), warm_fraction=0.3)
    data.setup()
    assert not data.own_columns.interactions
    table = data.table
    data.keep_columns({"channel", "completions"})
    assert data.table is table
    wanted = log.sort_values("timestamp", kind="stable")["channel"].tolist()
    assert values_at(data.own_columns.interactions["channel"], np.arange(len(log))) == wanted
    log.iloc[1:].to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(InputError, match=r"log\.csv has changed since it was read: start again"):
        data.keep_columns({"rating"})
