"""As `test_batch_properties`, of what follows a policy: rewards, losses, signals, metrics and predictions."""

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.batch_cases import Case, Entry, close, drawn, laws, limits, pad_columns, rows, take
from helpers.batch_policies import N_ITEMS, generative, pad_samples, retriever, samples
from hypothesis import strategies as st
from torch import nn

from minirec_pl.cli.predict import merge_parts, rows_of, table_of
from minirec_pl.data.batches import SampleDataset, identity
from minirec_pl.data.loader import ResumableLoader
from minirec_pl.data.sampler import OrderedSampler
from minirec_pl.data.samples import SampleTable
from minirec_pl.grpo.buffer import scoring_numbers
from minirec_pl.grpo.loss import flat_groups, group_advantages, kl_k3, pair_weights, policy_loss, preference_loss
from minirec_pl.metrics.evaluation import sample_ranks
from minirec_pl.metrics.ranking import MRR, NDCG, Coverage, HitRate, SampleRanks, target_rank, top_items
from minirec_pl.rewards import FormatReward, NDCGReward, ReciprocalRankReward, SoftmaxMixReward, hit, rank_penalty
from minirec_pl.rewards.calls import Rewarder, ranking_columns
from minirec_pl.selection.probes.gradients import HeadStep, head_gradient, head_hvp, head_signal
from minirec_pl.selection.probes.head import HeadProbe
from minirec_pl.selection.probes.per_sample import per_sample_gradients, project
from minirec_pl.selection.probes.trajectory import head_alignment
from minirec_pl.trainers.grpo import GRPORecModule
from minirec_pl.utils.identity import Identity

pytestmark = pytest.mark.filterwarnings("ignore:no reward of")

ITEM_IDS = np.array([f"i{i}" for i in range(N_ITEMS)], dtype=object)


def of_even_samples(completions, sample_id):
    return [
        None if number % 2 else float(len(completion))
        for completion, number in zip(completions, sample_id, strict=True)
    ]


def rewarding(case):
    """Every reward through the caller, of items, of rankings and of texts."""
    fns = [hit, NDCGReward(3), ReciprocalRankReward(5), rank_penalty, FormatReward("i1.*"), of_even_samples]
    ranked = case.pick(False, True)
    rewarder = Rewarder([*fns, SoftmaxMixReward(9)] if ranked else fns, None, ITEM_IDS)
    size = (case.n, case.count(1, 4))
    batch = {**samples(case), "items": case.integers(0, 4, *size), "logps": -case.uniform(*size)}
    batch |= {"rank": case.integers(0, N_ITEMS, *size), "p": case.uniform(*size)}
    batch["target"] = batch["target"] % 5

    def run(batch):
        more = ranking_columns(batch["rank"], batch["p"]) if ranked else None
        texts = [f"i{item} of {n}" for row in batch["items"].tolist() for n, item in enumerate(row)]
        total, by_name = rewarder(batch, batch["items"], batch["logps"], None, more)
        of_texts, _ = Rewarder([FormatReward(".*[0-5] of [02]")], None, ITEM_IDS)(batch, batch["items"], None, texts)
        return {"total": total, **by_name, "texts": of_texts}

    return Entry(run, batch, pad_samples(case))


def lists(case):
    """Rewards of ranked lists of unequal length."""
    made = [case.random.sample(list(ITEM_IDS), length) for length in case.lengths(0, N_ITEMS)]

    def run(batch):
        fns = (hit, NDCGReward(3), ReciprocalRankReward(5))
        return {f"{n}": fn(batch["lists"], target=batch["wanted"]) for n, fn in enumerate(fns)}

    return Entry(run, {"lists": made, "wanted": case.random.choices(list(ITEM_IDS), k=case.n)})


def rewards_of(case, *size):
    """Groups without variance among others."""
    return case.integers(0, 3, *size).double().where(case.flags(size[0], 1, share=0.7), 1.0)


def advantages(case):
    size = (case.n, case.count(2, 4))
    options = {"scale_rewards": case.pick("group", "none"), "baseline": case.pick("mean", "leave_one_out")}

    def run(batch):
        made = group_advantages(batch["rewards"], applies=batch["applies"], **options)
        flat, without = flat_groups(batch["rewards"], batch["applies"]), flat_groups(batch["rewards"])
        return {
            "advantages": made,
            "flat": flat,
            "without": without,
            "all": group_advantages(batch["rewards"], **options),
        }

    return Entry(run, {"rewards": rewards_of(case, *size), "applies": case.flags(*size, share=0.8)})


def preferences(case):
    pairs, group, length = case.n, case.count(1, 4), 5
    batch = {"chosen": -case.uniform(pairs, length), "rejected": -case.uniform(pairs, group, length)}
    batch |= {f"old_{name}": values + 0.3 * case.normal(*values.shape) for name, values in batch.items()}
    batch |= {"items": case.integers(0, 3, pairs, group), "kl": -case.uniform(pairs, length)}
    batch |= {"chosen_mask": case.flags(pairs, length), "rejected_mask": case.flags(pairs, group, length)}

    def run(batch):
        given = dict(batch)
        weights, kl = pair_weights(given.pop("items")), kl_k3(given["chosen"], given.pop("kl"))
        return {"loss": preference_loss(weights=weights, **given), "weights": weights, "kl": kl}

    names = [("chosen", 9.0), ("old_chosen", 1.0), ("chosen_mask", False), ("kl", 0.0)]
    names += [("rejected", 9.0), ("old_rejected", 1.0), ("rejected_mask", False)]

    def pad(part):
        return pad_columns(case, part, right=names)

    def without_kl(batch):
        return {name: values if name != "kl" else values[:, :length] for name, values in run(batch).items()}

    return Entry(without_kl, batch, pad)


def head_signals(case):
    """Gradient signals in closed form, with vectors that are shared or each row's own, and their projection."""
    own, width, choices = case.pick(False, True), 4, 5
    vectors = case.normal(case.n, choices, width) if own else case.normal(choices, width)
    batch = {"hidden": case.normal(case.n, width), "target": case.integers(0, choices, case.n)}
    batch["allowed"] = case.flags(case.n, choices, share=0.7)
    batch |= {"second": case.normal(case.n, width), "later": case.integers(-1, choices, case.n)}
    shared = case.normal(choices, width)
    batch |= {"vectors": vectors} if own else {}
    cosine = case.pick(False, True)

    def run(batch):
        every = batch["vectors"] if own else vectors
        options = {"allowed": batch["allowed"], "cosine": cosine, "temperature": 0.7}
        steps = [
            HeadStep(batch["hidden"], shared, batch["target"], batch["allowed"]),
            HeadStep(batch["second"], shared, batch["later"], None, None, 0.7),
        ]
        found = {"gradient": head_gradient(batch["hidden"], every, batch["target"], **options)}
        found["hvp"] = head_hvp(batch["hidden"], every, batch["target"], **options)
        for kind in ("first", "hvp"):
            found[kind], found[f"logp of {kind}"] = head_signal(steps, kind)
        found["aligned"] = head_alignment(steps, [torch.arange(choices)] * 2, shared.flip(1))
        return {**found, "projected": project(found["hvp"], 8)}

    return Entry(run, batch)


@functools.cache
def net(classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, classes)).train()


def probing(case):
    classes, kind = case.pick(2, 4), case.pick("first", "hvp", "values")
    model = net(classes)
    targets = case.normal(case.n, classes).float() if kind == "values" else case.integers(0, classes, case.n)
    probe = HeadProbe(head="4")

    def run(batch):
        gradient = "first" if kind == "values" else kind
        found = probe(model, (batch["x"], batch["y"]), batch["sample_id"], gradient)
        return {name: getattr(found, name) for name in ("sample_id", "rewards", "gradient", "embedding")}

    ids = case.permutation(20)[: case.n]
    return Entry(run, {"x": case.normal(case.n, 6).float(), "y": targets, "sample_id": ids})


def gradients_of_samples(case):
    """By vmap, and one after the other."""
    parameters = {"w": case.normal(3, 4), "b": case.normal(3)}

    def by_vmap(given, x, y):
        return (given["w"] @ x + given["b"]).log_softmax(dim=0).gather(0, y[None])[0]

    def with_control_flow(given, x, y):
        return by_vmap(given, x, y) if float(x.sum()) < 99 else x.sum()

    def run(batch):
        function = case.pick(by_vmap, with_control_flow)
        return per_sample_gradients(function, parameters, batch["x"], batch["y"])

    return Entry(run, {"x": case.normal(case.n, 4), "y": case.integers(0, 3, case.n)})


@functools.cache
def module_of(kind):
    policy = retriever() if kind == "retriever" else generative(kind)
    rewards = None if kind == "retriever" else [hit, rank_penalty]
    module = GRPORecModule(
        policy, rewards=rewards, scoring_generations=3, num_generations=3, max_completion_length=None
    )
    module.configure_model()
    return module.double()


def signals(case):
    kind = case.pick("llama", "gpt2", "many", "title", "retriever")
    module, gradient = module_of(kind), case.pick("first", "hvp")

    def run(batch):
        with torch.no_grad():
            found = module.sample_signals(batch, gradient)
        names = ("sample_id", "rewards", "gradient", "embedding", "solve_probability")
        results = {name: getattr(found, name) for name in names if getattr(found, name) is not None}
        if kind == "retriever":  # advantages of nearly equal rewards, divided by their deviation, magnify its rounding
            deviation = results["rewards"].std(dim=1, keepdim=True) + 1e-4
            results["gradient"] = results["gradient"] * (100 * deviation).clamp(max=1.0)
        return results

    return Entry(run, samples(case), pad_samples(case))


def parameter_signals(case):
    """In the space of the parameters, sample by sample through the model."""
    module = module_of(case.pick("llama", "many"))

    def run(batch):
        found = module.sample_signals(batch, "first", "lora")
        return {"gradient": found.gradient, "solve_probability": found.solve_probability}

    case.n = min(case.n, 3)
    return Entry(run, samples(case, longest=4), pad_samples(case))


def scoring(case):
    """Random numbers of samples."""
    size = (case.count(1, 4), case.count(1, 3))
    return Entry(
        lambda batch: {"numbers": scoring_numbers((3, 4), batch["ids"], size)}, {"ids": case.permutation(99)[: case.n]}
    )


def ranks(case):
    scores = case.integers(0, 6, case.n, N_ITEMS).double()  # with ties
    k = case.count(1, N_ITEMS + 2)

    def run(batch):
        rank = target_rank(batch["scores"], batch["target"], batch["seen"])
        return {"rank": rank, "top": top_items(batch["scores"], k, batch["seen"])}

    return Entry(run, {**samples(case), "scores": scores}, pad_samples(case))


def predicting(case):
    module = module_of(case.pick("llama", "many", "retriever"))
    candidates = case.pick(None, case.flags(N_ITEMS))
    mask_seen, k = case.pick(False, True), case.count(1, N_ITEMS + 2)

    def run(batch):
        module.candidates, module.mask_seen, module.predict_k = candidates, mask_seen, k
        return dict(module.predict_step(batch, 0))

    return Entry(run, samples(case), pad_samples(case))


@functools.cache
def table():
    random = np.random.default_rng(0)
    users, items = random.integers(0, 9, 150), random.integers(0, 40, 150)
    return SampleTable([f"u{u}" for u in users], items, random.integers(0, 60, 150), 40, random.integers(1, 6, 150))


def collating(case):
    """Batches of samples, with other windows; what is padded is compared without its padding."""
    every, window = np.arange(150), case.count(1, 30)

    def run(batch):
        made = SampleDataset(table(), window, every, "all").__getitems__(batch["sample_id"].tolist())
        assert made["history"].shape == (len(batch["sample_id"]), window)
        real = {name: made[name] >= 0 for name in ("history", "seen")}
        columns = {"history": "history", "history_age": "history", "history_rating": "history", "seen": "seen"}
        kept = {
            name: [values[mask].tolist() for values, mask in zip(made[name], real[of], strict=True)]
            for name, of in columns.items()
        }
        return {**kept, **{name: made[name] for name in ("sample_id", "user", "target")}}

    return Entry(run, {"sample_id": case.integers(0, 150, case.n)})


test_a_row_of_rollouts_is_measured_alone, test_no_rollouts_at_all = laws(
    {
        "Rewarder": rewarding,
        "rewards of lists": lists,
        "group_advantages": advantages,
        "preference_loss": preferences,
        "head signals": head_signals,
        "HeadProbe": probing,
        "per_sample_gradients": gradients_of_samples,
        "target_rank and top_items": ranks,
        "SampleDataset": collating,
        "predict_step": predicting,
        "sample_signals": signals,
        "sample_signals of parameters": parameter_signals,
        "scoring_numbers": scoring,
    },
)


@drawn
def test_the_policy_loss_does_not_depend_on_the_order_nor_on_masked_tokens(data):
    """And its gradient moves with the rows."""
    case = Case(data, data.draw(st.integers(1, 9)))
    size = (case.n, case.count(2, 4), case.pick(1, 6))
    batch = {"logps": -case.uniform(*size), "mask": case.flags(*size, share=0.7)}
    batch |= {name: batch["logps"] + 0.3 * case.normal(*size) for name in ("old_logps", "ref_logps")}
    rewards, applies = rewards_of(case, *size[:2]), case.flags(*size[:2], share=0.9)
    options = {"loss_type": case.pick("grpo", "bnpo", "dr_grpo", "dapo"), "beta": case.pick(0.0, 0.1)}
    options |= {"importance_sampling_level": case.pick("token", "sequence"), "delta": case.pick(None, 1.5)}
    scale = case.pick("group", "batch", "none")

    def loss(order, more):
        part = {name: nn.functional.pad(values[order], (0, more)) for name, values in batch.items()}
        part["logps"].requires_grad_()
        made = group_advantages(rewards[order], applies=applies[order], scale_rewards=scale)
        found = policy_loss(advantages=made, max_completion_length=7, **part, **options)
        (slope,) = torch.autograd.grad(found.loss, part["logps"])
        return found, made, slope[:, :, : size[2]]

    order = case.permutation(case.n)
    (whole, advantage, slope), (found, moved, slope_of_moved) = (
        loss(torch.arange(case.n), 0),
        loss(order, case.count(0, 3)),
    )
    close(moved, advantage[order])
    close(slope_of_moved, slope[order])
    for one, other in zip(found, whole, strict=True):
        close(one.detach(), other.detach())


@drawn
def test_an_update_does_not_depend_on_the_order_of_its_groups(data):
    """Nor does its gradient; groups that teach nothing are dropped."""
    case = Case(data, data.draw(st.integers(1, 5)))
    kind = case.pick("llama", "many", "title", "retriever")
    module, batch = module_of(kind), samples(case, longest=12)
    if kind == "retriever":
        batch["negatives"] = case.integers(-1, N_ITEMS, case.n, 3)
    sampler = module.sampler
    with limits(case):
        rollouts = sampler.roll_out(batch, torch.Generator().manual_seed(case.count(0, 99)), True)
    rollouts.rewards = rewards_of(case, case.n, 3)
    flat = flat_groups(rollouts.rewards)
    rollouts.pairs = flat & (rollouts.items != batch["target"][:, None]).all(dim=1) & (kind != "retriever")
    rollouts.learns = ~flat | rollouts.pairs
    rollouts.old_logps = rollouts.old_logps + 0.2 * case.normal(*rollouts.old_logps.shape)
    module.objective.set_advantages([rollouts])
    shares = torch.tensor([9.0, 6.0, 3.0], dtype=torch.float64)
    parameters = [parameter for parameter in module.policy.parameters() if parameter.requires_grad]

    def update(part):
        with limits(case):
            made = module.objective.update(module.policy, part, shares, 0.9)
            return made, torch.autograd.grad(made.loss, parameters, materialize_grads=True)

    (whole, slopes), (found, slopes_of_moved) = update(rollouts), update(rollouts.take(case.permutation(case.n)))
    for one, other in zip(slopes_of_moved, slopes, strict=True):
        close(one, other)
    for name in ("loss", "entropy", "clip_low", "clip_high"):
        close(getattr(found, name).detach(), getattr(whole, name).detach(), name)


def parts_of(case, n, index):
    """The positions of an order in parts, one of them perhaps empty."""
    cuts = sorted(case.random.randint(0, len(index)) for _ in range(case.count(0, 3)))
    return [index[a:b] for a, b in zip([0, *cuts], [*cuts, len(index)], strict=True)]


@drawn
def test_metrics_do_not_depend_on_how_samples_come(data):
    """In any order, in parts, some of them again, with ids that stay with their ranks."""
    case = Case(data, data.draw(st.integers(1, 9)))
    ids, rank = case.permutation(50)[: case.n], case.integers(1, 15, case.n)
    index = case.permutation(case.n).tolist()
    index += [case.random.choice(index) for _ in range(case.count(0, 3))]
    for metric in (SampleRanks(), HitRate(3), NDCG(5), MRR()):
        metric.update(rank, ids)
        whole = metric.compute()
        metric.reset()
        for part in parts_of(case, case.n, index):
            metric.update(rows(rank, part), rows(ids, part))
        close(metric.compute(), whole)
        if type(metric) is SampleRanks:
            assert dict(whole.tolist()) == dict(zip(ids.tolist(), rank.tolist(), strict=True))
    found, lists = Coverage(2, N_ITEMS), case.integers(-1, N_ITEMS, case.n, 4)
    for part in parts_of(case, case.n, index):
        found.update(rows(lists, part))
    whole = Coverage(2, N_ITEMS)
    whole.update(lists)
    close(found.compute(), whole.compute())


@drawn
def test_a_test_keeps_ids_with_ranks(data):
    """Of a whole batch, and of its parts in another order."""
    case = Case(data, data.draw(st.integers(1, 6)))
    module, batch = module_of(case.pick("llama", "many", "retriever")), samples(case)
    index, pad, found = case.permutation(case.n).tolist(), pad_samples(case), []
    for parts in ([list(range(case.n))], [part for part in parts_of(case, case.n, index) if part]):
        module.sample_ranks.reset()
        for part in parts:
            with limits(case):
                module.test_step(pad(take(batch, part)), 0)
        found.append(module.sample_ranks.compute())
        module.metrics.reset()
        module.coverage.reset()
    close(*found)


@drawn
def test_evaluation_ranks_samples_in_the_order_asked_for(data):
    case = Case(data, data.draw(st.integers(0, 9)))
    ids, size = case.integers(0, 150, case.n), case.count(1, 4)
    index = case.permutation(case.n)
    dataset = SampleDataset(table(), 20, np.arange(150), "all")

    class Scores(nn.Module):
        """Each user's own scores."""

        catalogue = range(40)

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def item_logps(self, batch):
            numbers = [torch.Generator().manual_seed(int(sample)) for sample in batch["sample_id"]]
            return torch.stack([torch.rand(40, generator=number) for number in numbers])

    def loader(sample_ids):
        sampler = OrderedSampler(sample_ids)
        return ResumableLoader(dataset, batch_size=size, sampler=sampler, collate_fn=identity)

    data = SimpleNamespace(sample_loader=loader)
    whole = sample_ranks(Scores(), data, ids.numpy())
    assert torch.equal(sample_ranks(Scores(), data, ids[index].numpy()), whole[index])


@drawn
def test_predictions_keep_the_order_of_the_requests(data):
    """However they come in batches and parts, and with one that is written twice."""
    case = Case(data, data.draw(st.integers(1, 9)))
    ids, k = case.permutation(60)[: case.n], case.count(1, 4)
    batch = {"sample_id": ids, "user": case.integers(0, 5, case.n), "items": case.integers(-1, N_ITEMS, case.n, k)}
    batch |= {"scores": case.normal(case.n, k), "reasoning": [f"text of {i}" for i in ids.tolist()]}
    users = [f"u{i}" for i in range(5)]
    whole = table_of(rows_of([batch]), ITEM_IDS.tolist(), users)
    index = case.permutation(case.n).tolist()
    index += [case.random.choice(index) for _ in range(case.count(0, 1))]
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for part in parts_of(case, case.n, index):
            if part:
                paths.append(Path(folder) / f"part-{len(paths)}.parquet")
                rows_of([take(batch, [row]) for row in part]).to_parquet(paths[-1])
        requests = SimpleNamespace(sample_ids=ids.numpy(), table=SimpleNamespace(user_ids=users))
        catalogue = SimpleNamespace(item_ids=ITEM_IDS.tolist())
        merged = Path(folder) / "merged.parquet"
        merge_parts(
            SimpleNamespace(
                finished=lambda: paths,
                requests=requests,
                catalogue=catalogue,
                history=None,
                folder=Path(folder) / "no",
                made_for=Identity({}),
            ),
            merged,
        )
        pd.testing.assert_frame_equal(pd.read_parquet(merged), whole, check_dtype=False)
