"""The table holds what the rewards were asked and what the rollouts were worth, by hand."""

import json
import statistics

import pandas as pd
import pytest
import torch
from helpers.text_policy import text_policy, write_model
from lightning.pytorch.loggers import WandbLogger

from minirec_pl import GRPORecModule, InputError, WarmStartModule
from minirec_pl.callbacks import CompletionsTable

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
SMALL = {"warm_fraction": 0.9, "batch_size": 8}  # a pool of 77 samples, ten batches


def popular(completions, **columns):
    return [(int(item.removeprefix("i")) % 3) / 2 for item in completions]


class Recorder:
    def __init__(self):
        self.calls = []

    def __call__(self, completions, prompts, target, sample_id):
        self.calls.append(list(zip(sample_id, prompts, target, completions, popular(completions), strict=True)))
        return popular(completions)


def bonus(completions, sample_id):
    """Applies to every second completion."""
    return [None if n % 2 else 0.25 for n in range(len(completions))]


def fit(make_trainer, module, data, table, **options):
    trainer = make_trainer(**{"max_epochs": 1, **options}, callbacks=[table])
    trainer.fit(module, data)
    return trainer


def folder_of(tmp_path):
    return pd.read_parquet(tmp_path / "run" / "completions.parquet")


def test_rows_are_what_was_asked_and_rewarded(tiny_policy, toy_data, make_trainer, tmp_path, capsys):
    reward = Recorder()
    module = GRPORecModule(tiny_policy(), [reward, bonus], [1.0, 2.0], num_generations=4)
    fit(make_trainer, module, toy_data(**SMALL), CompletionsTable(every_n_steps=4, num_prompts=2))
    table = folder_of(tmp_path)
    assert list(table.columns) == [
        "step",
        "sample_id",
        "prompt",
        "target",
        "completion",
        "reward/Recorder",
        "reward/bonus",
        "reward",
        "advantage",
    ]
    assert table["step"].unique().tolist() == [1, 4, 8]
    assert len(table) == 3 * 2 * 4
    for step, rows in table.groupby("step"):
        asked = reward.calls[step - 1][:8]
        for (_, row), (sample_id, prompt, target, completion, value) in zip(rows.iterrows(), asked, strict=True):
            assert (row["sample_id"], row["prompt"], row["target"]) == (sample_id, prompt, target)
            assert (row["completion"], row["reward/Recorder"]) == (completion, value)
        assert rows["reward/bonus"].isna().tolist() == [False, True] * 4
        for start in (0, 4):
            totals = [asked[start + g][4] + (0.5 if g % 2 == 0 else 0.0) for g in range(4)]
            assert rows["reward"].tolist()[start : start + 4] == pytest.approx(totals)
            spread = statistics.stdev(totals) + 1e-4
            advantages = [(total - statistics.fmean(totals)) / spread for total in totals]
            assert rows["advantage"].tolist()[start : start + 4] == pytest.approx(advantages, abs=1e-4)
    shown = capsys.readouterr().out
    assert [f"step {step}" in shown for step in (1, 2, 4, 8)] == [True, False, True, True]
    assert str(table["sample_id"][0]) in shown


@pytest.mark.parametrize(
    ("options", "trainer", "steps"),
    [
        ({}, {"accumulate_grad_batches": 2}, [1, 2, 4]),
        ({"num_iterations": 2}, {}, [1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
        ({"wasted_groups": "dynamic_sampling"}, {}, [1, 2, 4]),
    ],
)
def test_each_step_is_shown_once_whatever_the_schedule(
    tiny_policy, toy_data, make_trainer, tmp_path, capsys, options, trainer, steps
):
    module = GRPORecModule(tiny_policy(), [popular], num_generations=4, **options)
    table = CompletionsTable(every_n_steps=2, num_prompts=1, print_table=False)
    fit(make_trainer, module, toy_data(**SMALL), table, **trainer)
    rows = folder_of(tmp_path)
    assert rows["step"].tolist() == [step for step in steps for _ in range(4)]
    assert "Completions" not in capsys.readouterr().out


def test_of_a_policy_that_reasons_the_text_is_shown_beside_the_item(toy_data, make_trainer, tmp_path, capsys):
    said = []

    def length(completions, recommended):
        said.extend(zip(completions, recommended, strict=True))
        return [float(len(text)) for text in completions]

    data = toy_data(**SMALL, history_window=3)
    data.setup("fit")
    folder = write_model(tmp_path / "llama")
    policy = text_policy(folder, catalogue=data.catalogue, max_completion_length=3)
    module = GRPORecModule(policy, [length], num_generations=3)
    fit(make_trainer, module, data, CompletionsTable(num_prompts=2), limit_train_batches=1)
    rows = folder_of(tmp_path)
    assert list(zip(rows["completion"], rows["recommended"], strict=True)) == said[:6]
    assert rows["reward"].tolist() == [len(text) for text, _ in said[:6]]
    assert len(set(rows["completion"])) > 1
    assert "step 1" in capsys.readouterr().out


def test_a_step_without_rollouts_to_show(tiny_policy, toy_data, make_trainer, tmp_path):
    def nothing(completions):
        return [0.0] * len(completions)

    module = GRPORecModule(tiny_policy(), [nothing], num_generations=4, wasted_groups="dynamic_sampling")
    fit(make_trainer, module, toy_data(**SMALL), CompletionsTable(every_n_steps=1))
    assert len(folder_of(tmp_path)) == 0


def test_brackets_are_no_markup_and_long_prompts_are_cut(tiny_policy, toy_data, make_trainer, capsys):
    module = GRPORecModule(tiny_policy(), [popular], num_generations=4)
    data = toy_data(**SMALL)
    data.setup("fit")
    data.catalogue.item_ids[:] = [f"[red]{item}" for item in data.catalogue.item_ids]
    module.policy.catalogue.item_ids[:] = data.catalogue.item_ids
    module.rewards = [lambda completions: [float(n % 2) for n in range(len(completions))]]
    fit(make_trainer, module, data, CompletionsTable(num_prompts=1), limit_train_batches=1)
    assert "[red]" in "".join(capsys.readouterr().out.split())


def test_wandb_offline_gets_the_whole_table_each_time(tiny_policy, toy_data, make_trainer, tmp_path):
    import wandb

    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    module = GRPORecModule(tiny_policy(), [popular], num_generations=4)
    table = CompletionsTable(every_n_steps=5, num_prompts=1, print_table=False)
    trainer = make_trainer(max_epochs=1, callbacks=[table], logger=logger)
    trainer.fit(module, toy_data(**SMALL))
    wandb.finish()
    files = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/completions_*.table.json"))
    sizes = sorted(len(json.loads(path.read_text())["data"]) for path in files)
    assert sizes == [4, 8, 12]
    (path,) = tmp_path.rglob("completions.parquet")
    assert len(pd.read_parquet(path)) == 12


def test_a_resumed_run_goes_on_with_its_table(tiny_policy, toy_data, make_trainer, tmp_path):
    module = GRPORecModule(tiny_policy(), [popular], num_generations=4)
    trainer = fit(make_trainer, module, toy_data(**SMALL), CompletionsTable(every_n_steps=5, print_table=False))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    before = folder_of(tmp_path)
    again = make_trainer(
        max_epochs=2, callbacks=[CompletionsTable(every_n_steps=5, print_table=False)], default_root_dir=tmp_path / "b"
    )
    torch.manual_seed(1)
    again.fit(
        GRPORecModule(tiny_policy(), [popular], num_generations=4), toy_data(**SMALL), ckpt_path=tmp_path / "a.ckpt"
    )
    after = pd.read_parquet(tmp_path / "b" / "completions.parquet")
    assert after["step"].unique().tolist() == [1, 5, 10, 15, 20]
    pd.testing.assert_frame_equal(after.iloc[: len(before)], before)


def test_wrong_numbers_and_modules(tiny_policy, toy_data, make_trainer):
    for options, message in (({"every_n_steps": 0}, "every_n_steps is 0"), ({"num_prompts": 0}, "num_prompts is 0")):
        with pytest.raises(InputError, match=message):
            CompletionsTable(**options)
    trainer = make_trainer(max_epochs=1, callbacks=[CompletionsTable()])
    with pytest.raises(InputError, match="CompletionsTable shows the rollouts of GRPORecModule and WarmStartModule"):
        trainer.fit(WarmStartModule(tiny_policy()), toy_data(train_on="warm"))
