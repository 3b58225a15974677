"""The parts of a report: what is said, tabulated and drawn of each run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from minirec_pl.metrics.evaluation import FIGURES
from minirec_pl.reporting import figures
from minirec_pl.reporting.figures import Floats, Picture
from minirec_pl.reporting.plots import HIGHER
from minirec_pl.reporting.runs import Row, Run
from minirec_pl.selection.diagnostics import ease_of, notable
from minirec_pl.selection.reasons import TOO_EASY, TOO_HARD
from minirec_pl.utils.cost import PHASES

UNKNOWN = "–"


@dataclass(frozen=True)
class Cell:
    """An entry of a table.

    Attributes:
        text: what is shown.
        value: the number that the text rounds, if it is one.
        joint: stands between the text and that of `other`.
        other: a second number of the same entry.
    """

    text: str
    value: float | None = None
    joint: str = ""
    other: Cell | None = None


@dataclass(frozen=True)
class Grid:
    """A table; the first cell of a row names it.

    Attributes:
        caption: above it.
        columns: their names.
        rows: an entry for each column.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [any(row[i].value is not None for row in self.rows) for i in range(len(self.columns))]


@dataclass
class Part:
    """What a section holds of one run, or of all where `heading` is None."""

    heading: str | None = None
    sentences: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    code: str | None = None


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    id: str
    title: str
    intro: str
    parts: Sequence[Part]


def sections(rows: Sequence[Row], runs: Sequence[Run]) -> list[Section]:
    """Makes all sections of a report; one that nothing is known for says so.

    Args:
        rows: of the headline table.
        runs: see `minirec_pl.reporting.runs`.
    """

    def each(make: Callable[[Run], Part | str]) -> list[Part]:
        """Makes a part for each run; runs with the same excuse share one."""
        parts: list[Part] = []
        excuses: dict[str, list[str]] = {}
        for run in runs:
            made = make(run)
            if isinstance(made, Part):
                made.heading = run.name
                parts.append(made)
            else:
                excuses.setdefault(made, []).append(run.name)
        return [*parts, *(Part(sentences=[f"{', '.join(names)}: {excuse}"]) for excuse, names in excuses.items())]

    with figures.style():
        return [
            Section("headline", "Headline", _HEADLINE, [_headline(rows, runs)]),
            Section("quality", "Quality over what was spent", _QUALITY, _quality(runs)),
            Section("rewards", "Rewards of pool and picks", _REWARDS, each(_rewards)),
            Section("learnability", "Learnability", _LEARNABILITY, each(_learnability)),
            Section("terms", "Value terms", _TERMS, each(_terms)),
            Section("map", "Map of the picks", _MAP, each(_map)),
            Section("plan", "Curriculum", _PLAN, each(_plan)),
            Section("samples", "Samples", _SAMPLES, each(_samples)),
            Section("cost", "Cost", _COST, _cost(runs)),
            Section("config", "Configuration", _CONFIG, each(_config)),
        ]


_HEADLINE = (
    "The whole catalogue is ranked for each sample, without what the user had before. ± is one standard error with "
    "users as the unit. Tokens and seconds include warm start, scoring and selection; evaluation is not counted."
)
_QUALITY = (
    "Each point is a validation. What was spent counts all phases, the warm start too. Runs are validated on the same "
    "samples; whether one method is better than another, several seeds tell (`minirec compare`)."
)
_REWARDS = "How the policy does on the samples of the pool, and on those that were picked."
_LEARNABILITY = (
    "A sample teaches most where the policy is neither hopeless nor sure: L is a Gaussian of the difficulty in use, "
    "which is high for easy samples."
)
_TERMS = "A pick has the largest value = novelty × (alpha × learnability + beta × representativeness) of all left."
_MAP = (
    "Principal components (PCA) of the vectors that the run stored: novelty is a distance between embeddings, "
    "representativeness a cosine of gradient signals."
)
_PLAN = (
    "The order of the last planned epoch, by mean reward, or by the exact solve probability unless rollouts were drawn "
    "for the whole pool."
)
_SAMPLES = "Histories are the last items, most recent last."
_COST = "Where tokens, rollouts and seconds went; training includes waiting for data."
_CONFIG = "What each run was started with, all defaults filled in."
_NO_SELECTION = "nothing was selected, the run trained on its whole pool or part."


def _known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _number(value: Any, form: str) -> Cell:
    return Cell(format(value, form), float(value)) if _known(value) else Cell(UNKNOWN)


def _pair(value: Any, joint: str, other: Any, form: str) -> Cell:
    first = _number(value, form)
    return replace(first, joint=joint, other=_number(other, form)) if _known(other) else first


def _headline(rows: Sequence[Row], runs: Sequence[Run]) -> Part:
    names = [[Cell(run.name), Cell(run.method or UNKNOWN), Cell(str(run.folder))] for run in runs]
    known = [Grid("Runs", ["run", "method", "folder"], names)] if runs else []
    if not rows:
        return Part(sentences=["There is no results.json, so quality and cost are not known."], grids=known)
    columns = ["run", "part", *("HR@10" if "hit" in name else "NDCG@10" for name in FIGURES), "samples per epoch"]
    columns += ["rollouts scoring + training", "tokens forward + backward", "seconds"]
    lines = []
    for row in rows:
        quality = [_pair(row.get(name), "±", row.get(f"{name}_se_users"), ".4f") for name in FIGURES]
        rollouts, tokens = row["rollouts"], row["tokens"]
        cost = [
            _number(row.get("samples_per_epoch"), ","),
            _pair(rollouts["scoring"], "+", rollouts["training"], ","),
            _pair(tokens["forward"], "+", tokens["backward"], ","),
            _number(sum(row["seconds"].values()), ",.1f"),
        ]
        lines.append([Cell(row["label"]), Cell(row["part"]), *quality, *cost])
    return Part(grids=[Grid("Quality and cost", columns, lines), *known], sentences=_of_other_data(rows))


def _of_other_data(rows: Sequence[Row]) -> list[str]:
    """A sentence for each part whose figures are not all of the same samples."""
    sentences = []
    for part in ("test", "validation"):
        labels: dict[str, list[str]] = {}
        for row in rows:
            if row["part"] == part:
                labels.setdefault(row.get("data") or "", []).append(row["label"])
        known = [", ".join(names) for data, names in labels.items() if data]
        if len(known) > 1:
            sentences.append(f"Not to be compared, the figures on {part} are of different data: {' | '.join(known)}.")
        if "" in labels and known:
            sentences.append(f"It is not known which data these figures on {part} are of: {', '.join(labels[''])}.")
    return sentences


def _quality(runs: Sequence[Run]) -> list[Part]:
    part = Part()
    name = FIGURES[-1]
    known = {run.name: run.evaluations for run in runs if run.evaluations is not None and name in run.evaluations}
    if absent := [run.name for run in runs if run.name not in known]:
        part.sentences.append(f"{', '.join(absent)}: no validations are stored (evaluations.csv is missing).")
    for over, label in (
        ("rollouts", "rollouts drawn so far"),
        ("tokens", "tokens so far, forward and backward"),
        ("seconds", "seconds so far, without evaluation"),
    ):
        none = [run for run, table in known.items() if table[over].iloc[-1] == 0]
        if len(none) < len(known):
            part.pictures.append(figures.quality(known, name, over, label))
        if none:
            part.sentences.append(f"{', '.join(none)}: no {over} were spent, so there is no line over {over}.")
    return [part]


def _rewards(run: Run) -> Part | str:
    ledger, signals = run.ledger, run.signals
    if ledger is None:
        return _NO_SELECTION
    picked = ledger.columns["rank"] > 0
    reasons = {str(name).replace("_", " "): count for name, count in ledger.table["reason"].value_counts().items()}
    counts = ", ".join(f"{count:,} {name}" for name, count in reasons.items())
    part = Part(
        sentences=[
            f"{ledger.n_selected:,} of {len(ledger):,} samples were picked: {counts}.",
            *(f"Warning: {text}" for text in run.warnings),
        ]
    )
    ease = ease_of(ledger)
    values, label = ease.to_numpy(), str(ease.name)
    if signals is not None and signals.sample_id.tolist() == ledger.columns["sample_id"].tolist():
        exact = signals.solve_probability
        values, label = signals.reward_mean.numpy(), "mean reward of the rollouts of a sample"
        if exact is not None and np.isnan(values).any():  # as the curriculum orders, see SelectionSession.easiness
            values, label = exact.numpy(), "solve probability of a rollout, exact"
    elif ledger.table["difficulty"].isna().all():
        label = "mean reward of the rollouts of a sample"
    if np.isnan(values).all():
        part.sentences.append("No reward was measured, so there is no distribution to show.")
        return part
    caption = "Shares of the pool and of the picks."
    named = f"{label} ({HIGHER})"
    part.pictures.append(figures.pool_and_picks(values, values[picked], named, caption, logarithmic=True))
    return part


def _learnability(run: Run) -> Part | str:
    if run.ledger is None:
        return _NO_SELECTION
    columns = run.ledger.columns
    known = ~np.isnan(columns["difficulty"]) & ~np.isnan(columns["learnability"])
    if not known.any():
        return "the selector did not use learnability."
    difficulty, reason = columns["difficulty"], columns["reason"]
    hard, easy = difficulty[reason == TOO_HARD], difficulty[reason == TOO_EASY]
    gate = (hard.max() if len(hard) else -math.inf, easy.min() if len(easy) else math.inf)
    name = str(ease_of(run.ledger).name)
    return Part(pictures=[figures.learnability_curve(difficulty[known], columns["learnability"][known], gate, name)])


def _terms(run: Run) -> Part | str:
    if run.ledger is None:
        return _NO_SELECTION
    columns = run.ledger.columns
    picked = columns["rank"] > 0
    part = Part()
    for term, caption in (
        ("learnability", "L, scaled to 0 to 1 over the pool."),
        ("representativeness", "R, the cosine with the mean gradient, scaled to 0 to 1 over the pool."),
    ):
        if not np.isnan(columns[term]).all():
            label = f"{term} {term[0].upper()}, scaled to 0 to 1"
            part.pictures.append(figures.pool_and_picks(columns[term], columns[term][picked], label, caption))
    of_picks: dict[str, Floats] = {
        term: columns[term][picked][np.argsort(columns["rank"][picked])] for term in ("novelty", "value")
    }
    known = {term: values for term, values in of_picks.items() if len(values) and not np.isnan(values).any()}
    if "novelty" in known:
        caption, label = "Distance of a pick to the nearest earlier pick.", "novelty, 1 - cosine to the nearest pick"
        part.pictures.append(figures.pool_and_picks(known["novelty"][:0], known["novelty"], label, caption))
    if "value" in known:
        words = "by which this selector picks" if np.isnan(columns["score"]).all() else "novelty × score"
        part.pictures.append(figures.value_by_rank(known["value"], words))
    return part if part.pictures else "the selector used none of these terms."


def _map(run: Run) -> Part | str:
    if run.ledger is None:
        return _NO_SELECTION
    if run.signals is None:
        return "no signals are stored (signals.safetensors is missing, or nothing was scored)."
    kinds = {"embeddings": run.signals.embedding, "gradient signals": run.signals.gradient}
    picks = run.plan
    if picks is None or not set(picks["sample_id"]) <= set(run.signals.sample_id.tolist()):
        picks = pd.DataFrame({"sample_id": run.ledger.selected(), "fold": 0})
    part = Part()
    for what, vectors in kinds.items():
        if vectors is not None and len(picks):
            part.pictures.append(figures.vector_map(vectors, run.signals.sample_id, picks, what))
    return part if part.pictures else "the stored signals hold neither embeddings nor gradients."


def _plan(run: Run) -> Part | str:
    if run.plan is None or not len(run.plan):
        return "no plan is stored, the order was the sampler's own shuffle."
    if run.plan["easiness"].isna().all():
        return f"the last epoch had {len(run.plan):,} samples in random order."
    return Part(pictures=[figures.plan(run.plan)])


def _samples(run: Run) -> Part | str:
    if run.ledger is None:
        return _NO_SELECTION
    if run.examples is None:
        return "no texts of samples are stored (examples.parquet is missing)."
    kinds, ease = notable(run.ledger), str(ease_of(run.ledger).name)
    part = Part()
    for kind in ("easiest", "hardest"):
        if len(kinds[kind]):
            end = {"easiest": "highest", "hardest": "lowest"}[kind]
            caption = f"The {kind} picks: those of the {end} {ease}"
            part.grids.append(_sample_grid(caption, kinds[kind], run.examples, ease))
    if not part.grids:
        part.sentences.append("No reward or solve probability of a pick was measured.")
    redundant, twins = kinds["redundant"], kinds["twins"]
    if len(redundant):
        both = pd.concat([redundant, twins]).iloc[np.arange(2 * len(redundant)).reshape(2, -1).T.ravel()]
        caption = "The most redundant samples, each followed by the pick that it is like"
        part.grids.append(_sample_grid(caption, both, run.examples, ease))
    else:
        part.sentences.append("No sample was passed over as redundant.")
    return part


def _sample_grid(caption: str, rows: pd.DataFrame, examples: pd.DataFrame, ease: str) -> Grid:
    lines = []
    for row in rows.to_dict("records"):
        sample_id, novelty = row["sample_id"], _number(row["novelty"], ".3g")
        text = examples.loc[sample_id] if sample_id in examples.index else {"history": [], "target": UNKNOWN}
        rank = _number(None if pd.isna(row["rank"]) else row["rank"], ",")
        words = Cell(" → ".join(map(str, text["history"])) or UNKNOWN), Cell(str(text["target"]))
        lines.append([Cell(str(sample_id)), rank, _number(row["ease"], ".3g"), novelty, *words])
    return Grid(caption, ["sample", "rank", f"{ease} ({HIGHER})", "novelty", "history", "target"], lines)


def _cost(runs: Sequence[Run]) -> list[Part]:
    known = {run.name: run.cost for run in runs if run.cost}
    part = Part()
    if absent := [run.name for run in runs if not run.cost]:
        part.sentences.append(f"{', '.join(absent)}: no cost is stored (results.json is missing).")
    if not known:
        return [part]
    tokens: dict[str, Mapping[str, float]] = {
        name: {phase: cost["tokens_forward"][phase] + cost["tokens_backward"][phase] for phase in PHASES}
        for name, cost in known.items()
        if "tokens_forward" in cost
    }
    seconds: dict[str, Mapping[str, float]] = {name: cost["seconds"] for name, cost in known.items()}
    units = (("tokens, forward and backward", tokens), ("seconds", seconds))
    part.pictures = [figures.stacked(of, PHASES, unit) for unit, of in units if of]
    kinds = {"rollouts": ",", "tokens_forward": ",", "tokens_backward": ",", "seconds": ",.1f"}
    lines = [
        [
            Cell(name),
            Cell(phase.replace("_", " ")),
            *(_number(cost[kind].get(phase, 0) if kind in cost else None, form) for kind, form in kinds.items()),
        ]
        for name, cost in known.items()
        for phase in PHASES
        if any(cost[kind].get(phase) for kind in cost)
    ]
    part.grids = [Grid("By run and phase", ["run", "phase", *(kind.replace("_", " ") for kind in kinds)], lines)]
    return [part]


def _config(run: Run) -> Part | str:
    return "there is no config.yaml." if run.config is None else Part(code=run.config)
