"""As `test_batch_properties`, of the policies: a recommendation depends on its own sample alone."""

import functools

import pytest
import torch
from helpers.batch_cases import Case, Entry, close, drawn, laws, limits, widened
from helpers.batch_policies import KINDS, LONGEST, N_ITEMS, generative, pad_samples, retriever, samples, text_folder
from helpers.text_policy import TITLES
from hypothesis import strategies as st

from minirec_pl.policy import LanguageModel, Sampling, distinct
from minirec_pl.policy.item_ids import text_states
from minirec_pl.policy.item_index import ItemIndex, draw_negatives


def tokens_of(encoded):
    """The prompt of each sample, without padding."""
    return [encoded.input_ids[row][encoded.mask[row].bool()].tolist() for row in encoded.row.tolist()]


def any_policy(case, kinds=KINDS):
    return generative(case.pick(*kinds))


def encoding(case):
    policy = case.pick(*KINDS, "retriever")
    policy = retriever() if policy == "retriever" else generative(policy)
    return Entry(lambda batch: {"tokens": tokens_of(policy.encode(batch))}, samples(case), pad_samples(case))


def running(case):
    policy = any_policy(case)

    def run(batch):
        with torch.no_grad():
            return {"states": policy.run_prompt(batch).states}

    return Entry(run, samples(case), pad_samples(case))


def filters(case):
    return {"temperature": case.pick(1.0, 0.7), **case.pick({}, {"top_k": 2}, {"top_p": 0.8})}


def rollouts_of(made):
    return {"items": made.items, "logps": made.logps, "mask": made.mask}


def sampling(case):
    policy, group, options = any_policy(case), case.count(1, 4), filters(case)

    def run(batch):
        with torch.no_grad():
            return rollouts_of(policy.sample(policy.run_prompt(batch), batch["seen"], batch["uniform"], **options))

    return Entry(run, {**samples(case), "uniform": case.uniform(case.n, group, policy.id_length)}, pad_samples(case))


def beams(case):
    policy, group = any_policy(case), case.count(1, 4)

    def run(batch):
        with torch.no_grad():
            return rollouts_of(policy.beams(policy.run_prompt(batch), batch["seen"], group, 0.8))

    return Entry(run, samples(case), pad_samples(case))


def drawing_distinct_items(case):
    """Each sample has its own random numbers here, a generator seeded by its id."""
    policy, group = any_policy(case), case.count(1, 4)
    keys_below = distinct._keys_below

    def run(batch):
        generators = [torch.Generator().manual_seed(seed) for seed in batch["sample_id"].tolist()]

        def row_by_row(*tables):
            parts = [keys_below(*(table[b, None] for table in tables[:3]), g) for b, g in enumerate(tables[3])]
            return torch.cat(parts) if parts else torch.empty_like(tables[2])

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(distinct, "_keys_below", row_by_row)
            prompt = policy.run_prompt(batch)
            return rollouts_of(distinct.sample_distinct(policy, prompt, batch, group, generators, 0.9))

    return Entry(run, samples(case), pad_samples(case))


def logps_of_items(case):
    """Of chosen items, whose hidden states run on the caches of the prompts, and of the whole catalogue."""
    policy, temperature = any_policy(case), case.pick(1.0, 0.6)

    def run(batch):
        with torch.no_grad():
            logps, mask, entropy = policy.completion_logps(batch, batch["items"], temperature)
        return {"logps": logps, "mask": mask, "entropy": entropy}

    return Entry(
        run, {**samples(case), "items": case.integers(0, N_ITEMS, case.n, case.count(1, 4))}, pad_samples(case)
    )


def logps_of_the_catalogue(case):
    policy, width = any_policy(case), case.pick(None, None, 1, 3, N_ITEMS)

    def run(batch):
        policy.evaluation_beams = width
        try:
            return {"logps": policy.item_logps(batch, case.pick(7, 40, 4096, 4096))}
        finally:
            policy.evaluation_beams = None

    return Entry(run, samples(case), pad_samples(case))


test_a_recommendation_depends_on_its_own_sample_alone, test_no_samples_at_all = laws(
    {
        "encode": encoding,
        "run_prompt": running,
        "sample": sampling,
        "beams": beams,
        "sample_distinct": drawing_distinct_items,
        "completion_logps": logps_of_items,
        "item_logps": logps_of_the_catalogue,
    },
)


def reasoning(case):
    """Reasonings, what is read of them, and the ranking behind them."""
    policy, group, length = retriever(), case.count(1, 4), case.pick(0, 1, 4, 9)
    strategy, temperature = case.pick("sample", "sample", "greedy"), case.pick(1.0, 0.7)

    def run(batch):
        with torch.no_grad():
            prompts = policy.encode(batch, length)
            ran = policy.run(prompts) if case.pick(False, True) else None
            uniform = batch["uniform"] if strategy == "sample" else None
            options = Sampling(strategy, temperature=temperature)
            made = policy.reason(prompts, group, length=length, sampling=options, uniform=uniform, ran=ran)
            passed = policy.read(prompts, made.texts, temperature, ran=ran)
        words = policy.words(made.texts)
        return {
            "texts": made.texts,
            "logps": made.logps,
            "read": passed.logps,
            "entropy": passed.entropy,
            "states": passed.states,
            "truncated": policy.truncated(made.texts),
            "words": [words[b * group : (b + 1) * group] for b in range(len(batch["target"]))],
        }

    return Entry(run, {**samples(case), "uniform": case.uniform(case.n, group, length)}, pad_samples(case))


def reading(case):
    """Given texts of unequal length, some empty, some cut off, with columns of padding on the right."""
    policy, group = retriever(), case.count(1, 4)
    lengths = torch.tensor(case.lengths(0, 12, case.n * group), dtype=torch.int64).view(case.n, group, 1)
    texts = case.integers(3, 400, case.n, group, 12)
    ended = (torch.arange(12) == lengths - 1) & case.flags(case.n, group, 1)
    texts = texts.masked_fill(ended, 2).masked_fill(torch.arange(12) >= lengths, -1)
    pad = pad_samples(case)

    def run(batch):
        with torch.no_grad():
            prompts = policy.encode(batch)
            ran = policy.run(prompts) if case.pick(False, True) else None
            passed = policy.read(prompts, batch["texts"], 0.8, ran=ran)
            if case.pick(False, False, False, True):
                close(policy.read(prompts, batch["texts"], with_logps=False, ran=ran).states, passed.states)
        return {
            "logps": widened(passed.logps, 15),
            "entropy": widened(passed.entropy, 15),
            "states": passed.states,
        }

    def pad_texts(part):
        return {**pad(part), "texts": torch.nn.functional.pad(part["texts"], (0, case.count(0, 3)), value=-1)}

    return Entry(run, {**samples(case), "texts": texts}, pad_texts)


def ranking(case):
    policy = retriever()
    batch = {**samples(case), "states": case.normal(case.n, case.count(1, 4), 8)}

    def run(batch):
        ranking = policy.rank(batch["states"], batch["target"], batch["seen"])
        logps = policy.index.log_softmax(batch["states"][:, 0], batch["seen"], 0.3)
        first = policy.index.rank(batch["states"][:, 0], batch["target"], batch["seen"], 0.3)
        return {**ranking._asdict(), "logps": logps, "first": first.rank, "best of first": first.best}

    return Entry(run, batch, pad_samples(case))


def reasoned_logps(case):
    policy = retriever()

    def run(batch):
        logps, words = policy.reasoned_item_logps(batch)
        return {"logps": logps, "words": words}

    return Entry(run, samples(case), pad_samples(case))


def contrasts(case):
    """Targets among the items of the batch, which stay the same in any order here, and the row's own negatives."""
    policy = retriever()
    target, width = case.integers(0, N_ITEMS, case.n), case.count(0, 6)
    negatives = case.integers(-1, N_ITEMS, case.n, width)

    def run(batch):
        again = case.integers(0, case.n, case.n) if case.n else []
        items = torch.cat([target[case.permutation(case.n)], target[again]])
        with torch.no_grad():
            return {"logps": policy.target_logps(batch["states"], batch["target"], items, batch["negatives"])}

    def pad(part):
        more = case.count(0, 3)
        return {**part, "negatives": torch.nn.functional.pad(part["negatives"], (more, 0), value=-1)}

    return Entry(run, {"states": case.normal(case.n, 8), "target": target, "negatives": negatives}, pad)


def index_of(case, count=9):
    """An index of items of 1 to 60 tokens."""
    tokens = [case.integers(3, 400, length).tolist() for length in case.lengths(1, LONGEST, count)]
    return ItemIndex(tokens, 8, torch.float64, 0)


def vectors_of_items(case):
    index, model = index_of(case), retriever().model

    def run(batch):
        with torch.no_grad():
            return {"vectors": index.encode(model, batch["items"])}

    return Entry(run, {"items": case.integers(0, 9, case.n)})


def negatives(case):
    count, size = case.count(2, N_ITEMS), case.count(0, 5)

    def run(batch):
        return {"negatives": draw_negatives(count, batch["target"], batch["sample_id"], [3, 4], size)}

    return Entry(run, {"target": case.integers(0, count, case.n), "sample_id": case.permutation(99)[: case.n]})


@functools.cache
def text_model():
    model, tokenizer = LanguageModel(text_folder(), dtype="float32").load()
    return model.double(), tokenizer


def states_of_texts(case):
    model, tokenizer = text_model()
    texts = [" ".join(case.random.choices(TITLES, k=length)) for length in case.lengths(0, 40)]
    return Entry(lambda batch: {"states": text_states(model, tokenizer, batch["texts"])}, {"texts": texts})


test_a_reasoning_depends_on_its_own_sample_alone, test_no_reasonings_at_all = laws(
    {
        "reason": reasoning,
        "read": reading,
        "rank": ranking,
        "reasoned_item_logps": reasoned_logps,
        "target_logps": contrasts,
        "ItemIndex.encode": vectors_of_items,
        "draw_negatives": negatives,
        "text_states": states_of_texts,
    },
)


@drawn
def test_items_are_refreshed_the_same_in_any_order_and_in_parts(data):
    case = Case(data, 9)
    one, model = index_of(case), retriever().model
    other = ItemIndex(one.tokens, 8, torch.float64, 0)
    items = case.permutation(9)[: case.count(0, 9)]
    with limits(case):
        tokens = one.refresh(model, items, 3.0, 7)
    assert tokens == sum(len(one.tokens[item]) for item in items.tolist())
    order = case.permutation(len(items))
    with limits(case):
        spent = [other.refresh(model, part, 3.0, 7) for part in torch.split(items[order], case.count(1, 9))]
    assert sum(spent) == tokens
    close(other.vectors, one.vectors)
    assert torch.equal(other.step, one.step)
    close(other.encoded_with, one.encoded_with)
    assert set((one.step >= 0).nonzero().flatten().tolist()) == set(items.tolist())


@drawn
def test_the_items_that_are_due_do_not_depend_on_the_order_of_the_catalogue(data):
    case = Case(data, 9)
    one, order = index_of(case), case.permutation(9)
    other = ItemIndex([one.tokens[item] for item in order.tolist()], 8, torch.float64, 0)
    one.step.copy_(case.permutation(12)[:9] - 1)  # all different, so that no ties are broken by the catalogue
    one.encoded_with.copy_(case.integers(1, 3, 9))
    other.step.copy_(one.step[order])
    other.encoded_with.copy_(one.encoded_with[order])
    step, budget = case.pick(None, 10, 14, 30), case.pick(None, 1, 40, 300)
    due = [index.due(2.0, step, 5, budget) for index in (one, other)]
    assert sorted(order[due[1]].tolist()) == due[0].tolist()


SUMS = {"supervised_loss": (*KINDS, "retriever"), "sequence_nll": KINDS}


def sequences(case):
    """Sequences of unequal length, and for each pair its row, its position and its target."""
    sequence, _ = case.padded(case.lengths(1, 12), 0, N_ITEMS, left=False, fill=-1)
    pairs = [
        (row, place)
        for row, length in enumerate((sequence >= 0).sum(dim=1).tolist())
        for place in range(length)
        if case.random.random() < 0.6
    ]
    row, position = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    return {"sequence": sequence, "row": row, "position": position, "target": case.integers(0, N_ITEMS, len(pairs))}


def pairs_of(batch, index, more):
    """The pairs at these positions, each with its own row of the sequences, and more padding."""
    sequence = torch.nn.functional.pad(batch["sequence"][batch["row"][index]], (0, more), value=-1)
    row = torch.arange(len(index))
    return {"sequence": sequence, "row": row, "position": batch["position"][index], "target": batch["target"][index]}


def close_gradients(policy, found, expected):
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    slopes = [torch.autograd.grad(loss, parameters, materialize_grads=True) for loss in (found, expected)]
    for one, other in zip(*slopes, strict=True):
        close(one, other)


@drawn
def test_the_loss_of_sequences_is_the_mean_of_those_of_pairs_in_any_order(data):
    case = Case(data, data.draw(st.integers(1, 4)))
    policy, batch = any_policy(case), sequences(case)
    with limits(case):
        whole = policy.sequence_nll(batch) * len(batch["target"])
    parts = torch.split(case.permutation(len(batch["target"])), case.count(1, 30))
    with limits(case):
        sums = [policy.sequence_nll(pairs_of(batch, part, case.count(0, 2))) * len(part) for part in parts]
    close(torch.stack(sums).sum(), whole)
    close_gradients(policy, torch.stack(sums).sum(), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 2])
def test_sequences_without_a_pair_have_no_loss_but_a_gradient_of_zero(kind, rows):
    policy, nothing = generative(kind), torch.zeros(0, dtype=torch.int64)
    batch = {"sequence": torch.full((rows, 3), 1), "row": nothing, "position": nothing, "target": nothing}
    loss = policy.sequence_nll(batch)
    slopes = torch.autograd.grad(loss, [parameter for parameter in policy.parameters() if parameter.requires_grad])
    assert float(loss.detach()) == 0
    assert not any(bool(slope.any()) for slope in slopes)
    assert policy.sequence_tokens(batch) == 0


@drawn
def test_the_supervised_loss_is_the_mean_of_those_of_samples(data):
    case = Case(data, data.draw(st.integers(1, 6)))
    policy, batch = any_policy(case), samples(case, longest=20)
    with limits(case):
        whole = policy.supervised_loss(batch)[0] * case.n
    pad, sums = pad_samples(case), []
    for part in torch.split(case.permutation(case.n), case.count(1, case.n)):
        with limits(case):
            sums.append(
                policy.supervised_loss(pad({name: values[part] for name, values in batch.items()}))[0] * len(part)
            )
    close(torch.stack(sums).sum(), whole)
    close_gradients(policy, torch.stack(sums).sum(), whole)


@drawn
def test_the_supervised_loss_of_a_retriever_does_not_depend_on_the_order(data):
    """Of its batch as a whole, whose targets are each other's negatives."""
    case = Case(data, data.draw(st.integers(1, 6)))
    policy, batch = retriever(), samples(case, longest=20)
    pad, order = pad_samples(case), case.permutation(case.n)
    policy.reason_in_warm_start, policy.cached_negatives = False, case.count(0, 5)
    losses = []
    for rows in (torch.arange(case.n), order):
        torch.manual_seed(5)
        with limits(case):
            losses.append(policy.supervised_loss(pad({name: values[rows] for name, values in batch.items()})))
    close(losses[1][0], losses[0][0])
    assert losses[1][1] == losses[0][1]
    close_gradients(policy, losses[1][0], losses[0][0])


@pytest.mark.parametrize("kind", ["llama", "many"])
def test_histories_without_a_column_are_empty_ones(kind):
    batch = {"history": torch.full((2, 1), -1)}
    expected = tokens_of(generative(kind).encode(batch))
    assert tokens_of(generative(kind).encode({"history": batch["history"][:, 1:]})) == expected
