"""On a GPU: the numbers of the CPU, fits in float32 and bfloat16, checkpoints that go on and are tested anywhere."""

import copy

import pandas as pd
import pytest
import torch
from helpers.chat_models import chat_folder, chat_policy
from helpers.cli_tools import equal_weights, results
from helpers.plain_policy import batch_of
from helpers.text_policy import text_policy, write_model
from helpers.tiny_llm import prompts, tiny_llm

from minirec_pl import GRPORecModule, WarmStartModule
from minirec_pl.callbacks import MiniRec
from minirec_pl.cli.main import main
from minirec_pl.policy.language_models.generation import generate
from minirec_pl.policy.language_models.logps import completion_logps
from minirec_pl.policy.semantic_ids import SemanticIds
from minirec_pl.rewards import hit
from minirec_pl.selection import MiniRecSelector
from minirec_pl.trainers.recommender import RecModule

GPU = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]


def moved(batch):
    return {name: value.to(GPU) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def close(found, truth, tolerance=1e-4):
    torch.testing.assert_close(found.detach().cpu(), truth.detach().cpu(), rtol=tolerance, atol=tolerance)


def test_logps_and_gradients():
    model = tiny_llm("llama")
    twin = copy.deepcopy(model).to(GPU)
    ids, mask = prompts(3, 20, 8, 9, vocabulary=40)
    made = generate(model, ids, mask, 3, 9, generator=torch.Generator().manual_seed(5))
    for owner, place in ((model, "cpu"), (twin, GPU)):
        given = (part.to(place) for part in (ids, mask, made.ids, made.mask))
        found = completion_logps(owner, *given)
        found.logps.sum().backward()
        if owner is model:
            truth = found
    close(found.logps, truth.logps)
    close(found.entropy, truth.entropy)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        close(ours.grad, theirs.grad, 1e-3)


def test_rollouts_repeat_for_a_seed():
    model = tiny_llm("llama").to(GPU)
    ids, mask = (part.to(GPU) for part in prompts(3, 20, 8, 9, vocabulary=40))
    one, two, other = (
        generate(model, ids, mask, 4, 9, generator=torch.Generator(GPU).manual_seed(seed)).ids for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("item_ids", ["title", "semantic", "token"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_items_of_a_language_model(tmp_path, item_ids, dtype):
    more = {"semantic_ids": SemanticIds(levels=2, codes=3)} if item_ids == "semantic" else {}
    policy = chat_policy(chat_folder(tmp_path / "base"), item_ids=item_ids, dtype=dtype, **more).eval()
    batch = batch_of([[3], [0, 5, 2, 7], [], [11, 1]], [[3], [0, 5, 2, 7, 9], [], [1, 11]], [4, 6, 11, 12])
    with torch.no_grad():
        truth = policy.item_logps(batch)
        found = policy.to(GPU).item_logps(moved(batch))
    close(found.float(), truth.float(), 1e-4 if dtype == "float32" else 0.1)
    policy.train()
    loss = policy.supervised_loss(moved(batch))
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters() if p.requires_grad)


def test_selection_scores_the_same(tiny_policy, toy_data, make_trainer, tmp_path):
    """Without training in between, the signals and the picks of a GPU are those of the CPU."""
    ledgers = {}
    for accelerator in ("cpu", "gpu"):
        module = GRPORecModule(
            tiny_policy(), [hit], scoring_generations=0, optimizer=lambda p: torch.optim.SGD(p, lr=0.0)
        )
        folder = tmp_path / accelerator
        trainer = make_trainer(
            accelerator=accelerator,
            max_epochs=1,
            callbacks=[MiniRec(0.2, selector=MiniRecSelector(difficulty="pass_at_group", gate=(0.0, 1.0)))],
            default_root_dir=folder,
        )
        trainer.fit(module, toy_data())
        ledgers[accelerator] = pd.read_parquet(next(folder.rglob("ledger.parquet"))).sort_values("sample_id")
    cpu, gpu = ledgers["cpu"], ledgers["gpu"]
    numbers = cpu.select_dtypes("number").columns.difference(["rank"])
    pd.testing.assert_frame_equal(gpu[numbers], cpu[numbers], rtol=1e-3, atol=1e-4, check_dtype=False)
    assert (gpu["rank"].isna().to_numpy() == cpu["rank"].isna().to_numpy()).mean() > 0.98


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_from_the_command_line(command, tmp_path, precision):
    options = ["--trainer.accelerator=gpu", f"--trainer.precision={precision}"]
    assert main(command.grpo(tmp_path / "runs", *options)) == 0
    run = tmp_path / "runs" / "latest"
    best = results(run)
    assert best["rollouts"]["training"] > 0
    tested = {}
    for accelerator in ("gpu", "cpu"):
        test = ["test", "--ckpt_path", str(run / "checkpoints" / "best.ckpt"), f"--trainer.accelerator={accelerator}"]
        root = tmp_path / f"test_{accelerator}"
        assert main([*test, "--trainer.precision=32-true", f"--trainer.default_root_dir={root}"]) == 0
        tested[accelerator] = results(next(root.iterdir()))["ndcg@10"]
    assert tested["gpu"] == pytest.approx(tested["cpu"], abs=2e-3)


def test_going_on_from_a_checkpoint(command, tmp_path):
    gpu = "--trainer.accelerator=gpu"
    assert main(command.grpo(tmp_path / "long", gpu, "--trainer.max_epochs=3")) == 0
    assert main(command.grpo(tmp_path / "short", gpu)) == 0
    short = tmp_path / "short" / "latest"
    more = ["--ckpt_path", str(short / "checkpoints" / "last.ckpt"), "--trainer.max_epochs=3"]
    more += [f"--trainer.default_root_dir={tmp_path / 'more'}"]
    assert main(["fit", "--config", str(short / "config.yaml"), *more]) == 0
    assert results(tmp_path / "more" / "latest") == results(tmp_path / "long" / "latest")
    assert equal_weights(tmp_path / "more" / "latest", tmp_path / "long" / "latest")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_retrieval_with_reasoning(tmp_path, toy_data, make_trainer, precision):
    data = toy_data(history_window=3)
    data.setup("fit")
    policy = text_policy(write_model(tmp_path / "base"), catalogue=data.catalogue, max_completion_length=4)
    before = copy.deepcopy(policy.state_dict())
    options = {"accelerator": "gpu", "precision": precision, "max_epochs": 1, "limit_train_batches": 2}
    warm = toy_data(history_window=3, train_on="warm_samples")
    make_trainer(**options).fit(WarmStartModule(policy), warm)
    module = GRPORecModule(policy, num_generations=4, scoring_generations=2)
    make_trainer(**options, callbacks=[MiniRec(8)]).fit(module, data)
    assert any(not torch.equal(value.cpu(), before[name]) for name, value in policy.state_dict().items())
    assert all(value.isfinite().all() for value in policy.state_dict().values() if value.is_floating_point())
    figures = [
        make_trainer(accelerator=accelerator).test(RecModule(policy), data, verbose=False)[0]
        for accelerator in ("gpu", "cpu")
    ]
    assert figures[0]["test/ndcg@10"] == pytest.approx(figures[1]["test/ndcg@10"], abs=0.05)
