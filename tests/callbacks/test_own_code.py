"""Selectors, curricula and probes of the user's own: what works, and that each wrong return is named before a step."""

import functools

import numpy as np
import pytest
import torch
from helpers.foreign import Classifier, N, loader_of

from minirec_pl import InputError
from minirec_pl.callbacks import Curriculum, EasyToHardCurriculum, MiniRec, RescoreSamples, SelectSamples
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import FullSelector, RandomSelector, SampleSignals, SelectionLedger
from minirec_pl.selection.selectors.checked import check_selector
from minirec_pl.selection.selectors.picks import best_first, ledger_of
from minirec_pl.selection.session.session import session_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:selection"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
BUDGET = 20


class Hardest:
    """A right one; `change` makes of its ledger what another might return."""

    needs = frozenset({"rewards"})

    def __init__(self, change=lambda ledger: ledger):
        self.change = change

    def select(self, signals, k, *, epoch=0):
        value = -signals.reward_mean
        return self.change(ledger_of(signals, best_first(value, k), k, {"value": value}, {}))


class Ordered(Curriculum):
    """A right one; `change` makes of its plan what another might return."""

    def __init__(self, change=lambda plan: plan):
        super().__init__(seed=0)
        self.change = change

    def plan(self, session, trainer, chosen, easiness, epoch):
        plan = [chosen[place] for place in easiness.argsort().tolist()]
        chosen.clear(), easiness.zero_()  # what it does with its arguments is its own affair
        return self.change(plan)


def measured(module, batch, rows=None):
    """A right probe of two arguments; foreign batches have no ids, so those that it gives do not count."""
    x, y = (part[:rows] for part in batch)
    p = module(x).softmax(dim=1).gather(1, y[:, None])
    return SampleSignals(torch.arange(len(x)), rewards=p, gradient=x * (1 - p), embedding=x)


def fit(make_trainer, module=None, **options):
    module = Classifier() if module is None else module
    trainer = make_trainer(
        callbacks=[MiniRec(BUDGET, **{"selector": Hardest(), "probe": measured, "curriculum": Ordered(), **options})]
    )
    trainer.fit(module, loader_of())
    return module, session_of(trainer)


@pytest.mark.parametrize("as_", [list, tuple, torch.tensor, np.array, lambda plan: np.array(plan, dtype="uint16")])
def test_a_selector_a_curriculum_and_a_function_train_the_hardest_first(make_trainer, as_):
    module, session = fit(make_trainer, curriculum=Ordered(as_))
    oracle, store = Classifier(), session.store
    x, y = (torch.stack(column) for column in zip(*[loader_of().dataset[row] for row in range(N)], strict=True))
    with torch.no_grad():
        p = oracle(x).softmax(dim=1)[torch.arange(N), y].tolist()
    assert module.rows(0) == sorted(range(N), key=p.__getitem__)[:BUDGET]
    assert session.plan_easiness == store.read(session.plan).reward_mean.tolist()


class Method:
    def measure(self, module, batch):
        return measured(module, batch)


def with_ids(module, batch, sample_id):
    return SampleSignals(sample_id, rewards=measured(module, batch).rewards, embedding=batch[0])


def with_an_option(module, batch, rows=None, *, sharpness=1.0):
    return measured(module, batch, rows)


def with_everything(*args, **options):
    return measured(*args, **options)


@pytest.mark.parametrize(
    "probe",
    [
        measured,
        with_ids,
        with_an_option,
        with_everything,
        functools.partial(with_an_option, sharpness=2.0),
        Method().measure,
        lambda module, batch: measured(module, batch),
    ],
)
def test_any_function_of_module_and_batch_is_a_probe(make_trainer, probe):
    rewards = [
        fit(make_trainer, probe=one, selector=RandomSelector())[1].store.read(range(N)).reward_mean
        for one in (probe, HeadProbe("classifier"))
    ]
    torch.testing.assert_close(*rewards)


class NoNeeds:
    def select(self, signals, k, *, epoch=0): ...


class NoSelect:
    needs = frozenset()


class Needs(Hardest):
    def __init__(self, needs):
        super().__init__()
        self.needs = needs


class NoEpoch(NoNeeds):
    needs = frozenset()

    def select(self, signals, k): ...


class NeedsGradient(Hardest):
    needs = frozenset({"gradient"})

    def select(self, signals, k, *, epoch=0):
        return super().select(signals, k if signals.gradient.norm() > 0 else 0)


class TooMany(Hardest):
    def select(self, signals, k, *, epoch=0):
        return super().select(signals, 30)


class NeedsRewards(Hardest):
    def select(self, signals, k, *, epoch=0):
        return signals.solve_share.nothing


class Unfinished(Curriculum):
    def plan(self, chosen, easiness, epoch): ...


def columns(**changed):
    """A ledger as `SelectionLedger.of` takes it unchecked, with other columns."""

    def change(ledger):
        made = {name: change(ledger.columns) for name, change in changed.items()}
        return SelectionLedger.of({**ledger.columns, **made})

    return Hardest(change)


def without(name):
    return Hardest(lambda ledger: SelectionLedger.of({n: c for n, c in ledger.columns.items() if n != name}))


def twice(columns):
    """The first pick ranked as the second."""
    return np.where(columns["rank"] == 1, 2, columns["rank"])


def unknown(columns):
    rank = columns["rank"].astype(float)
    rank[0] = np.nan
    return rank


SELECTORS = [
    (Hardest, "selector is the class Hardest: give an object of it, Hardest(...)"),
    (ledger_of, "selector is <function ledger_of"),
    (NoSelect(), "give an object such as MiniRecSelector(), of a class with `needs` and `select(self, signals, k, *"),
    (NoNeeds(), "NoNeeds has no `needs`: set it to the signals that select reads, a frozenset out of embedding, grad"),
    (NoEpoch(), "NoEpoch.select does not take what it is given: define `select(self, signals, k, *, epoch=0)`"),
    (Needs({"loss"}), "Needs.needs is {'loss'}: give a frozenset out of embedding, gradient, rewards"),
    (Needs("rewards"), "Needs.needs is 'rewards': give a frozenset"),
    (Needs(None), "Needs.needs is None: give a frozenset"),
    (Needs([["rewards"]]), "Needs.needs is [['rewards']]: give a frozenset"),
    (NeedsGradient(), "NeedsGradient needs a gradient per sample: return `gradient` from sample_signals"),
    (Hardest(lambda ledger: None), "Hardest.select returned a NoneType: return a SelectionLedger, as"),
    (Hardest(lambda ledger: ledger.selected()), "Hardest.select returned a list: return a SelectionLedger"),
    (Hardest(lambda ledger: ledger.table), "Hardest.select returned a DataFrame: return a SelectionLedger"),
    (
        Hardest(lambda ledger: SelectionLedger.of({name: c[:30] for name, c in ledger.columns.items()})),
        f"Hardest.select returned a ledger without a sample_id for each of the {N} samples",
    ),
    (columns(sample_id=lambda c: c["sample_id"] + 1), "Hardest.select returned a ledger of other samples: return a"),
    (columns(sample_id=lambda c: c["sample_id"][::-1]), "Hardest.select returned a ledger of other samples"),
    (columns(value=lambda c: c["value"][:3]), "Hardest.select returned a ledger without a value for each of the 60"),
    (without("novelty"), "Hardest.select returned a ledger without a novelty for each of the 60 samples"),
    (columns(rank=twice), "Hardest.select returned ranks that are not 1..20, each once: pick each sample once"),
    (columns(rank=unknown), "Hardest.select returned reasons that do not go with its ranks"),
    (columns(reason=lambda c: np.full(N, "mine", object)), "returned reasons that do not go with its ranks: give a"),
    (columns(rank=lambda c: 0 * c["rank"]), "Hardest.select returned reasons that do not go with its ranks"),
    (
        columns(rank=lambda c: 0 * c["rank"], reason=lambda c: np.full(N, "too_hard", object)),
        "Hardest.select picked 0 samples for a budget of 20: pick 1 to 20",
    ),
    (TooMany(), "TooMany.select picked 30 samples for a budget of 20: pick 1 to 20"),
]
CURRICULA = [
    (Ordered, "curriculum is <class"),
    (measured, "curriculum is <function measured"),
    (
        Unfinished(seed=0),
        "Unfinished.plan(self, chosen, easiness, epoch) does not take what it is given: define `plan(",
    ),
    *[
        (Ordered(change), f"Ordered.plan returned a {words}: return each sample_id of `chosen` once, in the order to")
        for change, words in [
            (lambda plan: None, "NoneType that is no list of sample_ids"),
            (lambda plan: map(int, plan), "map that is no list of sample_ids"),
            (lambda plan: {"plan": plan}, "dict that is no list of sample_ids"),
            (lambda plan: torch.tensor([plan]), "Tensor that is no list of sample_ids"),
            (lambda plan: torch.tensor(plan) / 1, "Tensor that is no list of sample_ids"),
            (lambda plan: [str(one) for one in plan], "list that is no list of sample_ids"),
            (lambda plan: [*plan[:-1], float("nan")], "list that is no list of sample_ids"),
            (lambda plan: [*plan[:-1], 99], "plan in which sample_id 99 is not among the chosen"),
        ]
    ],
    (Ordered(lambda plan: range(len(plan))), "and 7 more is not among the chosen: return each"),
    (Ordered(lambda plan: [*plan, plan[0]]), "occurs more than once: return each"),
    (Ordered(lambda plan: plan[1:]), "is missing: return each"),
    (Ordered(lambda plan: []), "and 15 more is missing: return each"),
]


def changed(**values):
    """A probe whose signals are wrong from the second batch on."""
    batches = []

    def probe(module, batch):
        batches.append(batch)
        signals = measured(module, batch)
        for name, change in values.items() if len(batches) > 1 else ():
            setattr(signals, name, change(getattr(signals, name)))
        return signals

    return probe


def broken(**values):
    def probe(module, batch):
        signals = measured(module, batch)
        made = {name: change(getattr(signals, name)) for name, change in values.items()}
        return SampleSignals(**{"sample_id": signals.sample_id, "rewards": signals.rewards, **made})

    return probe


def no_argument(): ...


def own_ids(module, batch, sample_id):
    return SampleSignals(sample_id.flip(0), rewards=measured(module, batch).rewards)


PROBES = [
    (HeadProbe, "probe is the class HeadProbe: give an object of it, HeadProbe(...)"),
    ("classifier", "probe is 'classifier': give an object such as HeadProbe('classifier'"),
    (no_argument, "the probe no_argument does not take what it is given: define `no_argument(module, batch)`"),
    (lambda module, batch: None, "<lambda> returned a NoneType: return SampleSignals(sample_id, rewards=..."),
    (lambda module, batch: batch[0], "<lambda> returned a Tensor: return SampleSignals("),
    (lambda module, batch: {"rewards": batch[0]}, "<lambda> returned a dict: return SampleSignals("),
    (
        lambda module, batch: measured(module, batch, 5),
        "returned 5 rows of signals for a batch of 8 samples: return one",
    ),
    (own_ids, "own_ids returned 8 rows of signals for other sample_ids than the 8 of the batch"),
    (changed(gradient=lambda g: g[:, :2]), "probe: gradient has [2, 4] columns in different batches: return one width"),
    (changed(embedding=lambda e: None), "probe: only some batches have embedding: return it for all or for none"),
    (broken(gradient=lambda g: g[:, 0]), "gradient has the shape [8]: give [8, n], a row per sample_id"),
    (broken(gradient=lambda g: g[:5]), "gradient has the shape [5, 4]: give [8, n], a row per sample_id"),
    (broken(rewards=lambda r: r / 0), "rewards is NaN or infinite for sample_id 0, 1, 2, 3, 4 and 3 more: fix"),
    (broken(embedding=lambda e: e * float("nan")), "embedding is NaN or infinite for sample_id 0, 1"),
    (broken(solve_probability=lambda p: torch.full((8,), 2.0)), "solve_probability is outside [0, 1] for sample_id 0"),
]


def refused(error, words, module):
    assert isinstance(error.value, InputError), error.value
    text = str(error.value)
    assert words in text
    assert "\n" not in text
    assert ": " in text
    assert not module.seen  # nothing was trained on


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        *[("selector", value, words) for value, words in SELECTORS],
        *[("curriculum", value, words) for value, words in CURRICULA],
        *[("probe", value, words) for value, words in PROBES],
    ],
)
def test_a_wrong_return_is_named_in_one_sentence_before_anything_is_trained_on(make_trainer, option, value, words):
    module, probe = Classifier(), with_ids if isinstance(value, NeedsGradient) else measured
    with pytest.raises(InputError) as error:
        fit(make_trainer, module, **{"probe": probe, option: value})
    refused(error, words, module)


class Scored(Classifier):
    def __init__(self, signals):
        super().__init__()
        self.signals = signals

    def sample_signals(self, batch):
        return self.signals(self, batch)


@pytest.mark.parametrize(
    ("signals", "words"),
    [
        (PROBES[3][0], "Scored.sample_signals returned a NoneType: return SampleSignals("),
        (PROBES[6][0], "Scored.sample_signals returned 5 rows of signals for a batch of 8 samples"),
        (
            changed(gradient=lambda g: g[:, :2]),
            "Scored.sample_signals: gradient has [2, 4] columns in different batches",
        ),
        (changed(rewards=lambda r: None), "Scored.sample_signals: only some batches have rewards"),
    ],
)
def test_the_same_of_a_modules_own_method(make_trainer, signals, words):
    module = Scored(signals)
    with pytest.raises(InputError) as error:
        fit(make_trainer, module, probe=None)
    refused(error, words, module)


def test_the_single_callbacks_check_the_same():
    for make, words in [
        (lambda: SelectSamples(selector=NoSelect()), "give an object such as MiniRecSelector"),
        (lambda: RescoreSamples(probe=HeadProbe), "probe is the class HeadProbe"),
    ]:
        with pytest.raises(InputError, match=words):
            make()


def test_an_error_of_the_users_own_stays_what_it_is(make_trainer):
    with pytest.raises(AttributeError, match="nothing"):
        fit(make_trainer, selector=NeedsRewards())


def test_the_shipped_ones_pass_the_checks(make_trainer):
    assert check_selector(FullSelector()).needs == frozenset()
    module, _ = fit(make_trainer, selector=FullSelector(), curriculum=EasyToHardCurriculum())
    assert len(module.rows(0)) == N
