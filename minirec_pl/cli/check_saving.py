"""What `minirec check` tells of the saving that selection can bring, before a run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table

from minirec_pl.callbacks import RescoreSamples, SelectSamples
from minirec_pl.cli.check_model import Finding
from minirec_pl.cli.estimates import Load
from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.trainers.grpo import GRPORecModule
from minirec_pl.utils.break_even import BreakEven, schedules
from minirec_pl.utils.errors import InputError

PROBED = 64
_SEED = 0


def parser() -> argparse.ArgumentParser:
    """The options of `minirec check` beside those of `minirec fit`."""
    made = argparse.ArgumentParser(prog="minirec check", add_help=False, allow_abbrev=False, exit_on_error=False)
    group = made.add_argument_group("what selection can save")
    group.add_argument(
        "--flat_share",
        type=float,
        metavar="SHARE",
        help="Share of the groups without reward variance, at least 0 and below 1, if it is known.",
    )
    group.add_argument(
        "--probe",
        action="store_true",
        help=f"Load the policy and draw groups for {PROBED} samples of the pool, to measure that share.",
    )
    return made


def own_options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of `parser` out of a command line, and the other words.

    Raises:
        InputError: if one has no value, or another than a number.
    """
    try:
        return parser().parse_known_args(words)
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name}: {error.message}: see `minirec check --help`") from error


def probed(module: GRPORecModule, data: RecDataModule) -> tuple[float, float]:
    """Draws groups for samples from all over the pool.

    Args:
        module: with the policy that training begins with.
        data: after `setup`.

    Returns:
        Share of the groups without reward variance, and mean number of tokens of a completion.
    """
    module.policy.bind(data.catalogue)
    module.item_ids = np.asarray(data.catalogue.item_ids, dtype=object)
    module.use_columns(data.own_columns)
    ids = np.random.default_rng(_SEED).permutation(data.pool_ids)[:PROBED]
    random, flat, lengths = torch.Generator().manual_seed(_SEED), [], []
    module.policy.refresh_items()
    for batch in data.sample_loader(ids, batch_size=data.batch_size):
        (batch,) = module.policy.with_negatives([batch], (_SEED,), None, lambda values: values)
        drawn = module.sampler.roll_out(batch, random, False)
        flat.append(drawn.flat.double())
        lengths.append(drawn.lengths.double().flatten())
    return float(torch.cat(flat).mean()), float(torch.cat(lengths).mean())


def setting_of(load: Load, flat_share: float, *, exact: bool, fed: float) -> BreakEven:
    """The cost of a sample of a run.

    Args:
        load: of the run.
        flat_share: see `BreakEven`.
        exact: whether scoring knows the target's probability, from a pass over its id.
        fed: tokens of a completion that are fed to the model, on average or at most.
    """
    completions = load.scoring_generations + int(exact)
    return BreakEven(
        prompt=load.prompt,
        completion=fed,
        num_generations=load.num_generations,
        scoring=load.prompt + completions * fed,
        flat_share=flat_share,
        budget=min(1.0, load.selected / load.pool),
    )


def scoring_of(selection: Any) -> RescoreSamples | None:
    """The part of a callback that scores the pool; None where nothing is scored."""
    return next((part for part in _parts(selection) if isinstance(part, RescoreSamples)), None)


def samples_of(selection: Any, pool: int) -> int:
    """Samples that an epoch trains on: those of the part of a callback that selects, all without one.

    Raises:
        InputError: if the budget is above the pool, or the ledger cannot be read.
    """
    return next((part.expected(pool) for part in _parts(selection) if isinstance(part, SelectSamples)), pool)


def _parts(selection: Any) -> tuple[Any, ...]:
    return (selection, *getattr(selection, "parts", ()))


def schedules_of(load: Load, selection: Any) -> dict[str, float]:
    """The usual schedules of scoring, and that of the config if it is another: c by name, see `BreakEven`.

    Args:
        load: of the run.
        selection: the callback of the config, or None.
    """
    found = schedules(load.epochs)
    if scoring_of(selection) is not None:
        own = (load.scored + load.rescored * (load.epochs - 1)) / (load.epochs * load.pool)
        if all(abs(own - scored) > 1e-3 for scored in found.values()):
            found["as in the config"] = own
    return found


def saving_table(setting: BreakEven, known: bool, found: Mapping[str, float]) -> Table:
    """A row for each schedule of scoring, and one for none.

    Args:
        setting: of the run.
        known: whether its share of flat groups is known.
        found: schedules by name.
    """
    table = Table(title="What a perfect selector could save, scoring")
    for name in ("", "of the tokens", "pays above a flat share of"):
        table.add_column(name, justify="right" if name else "left")
    for name, scored in {**found, "nothing": 0.0}.items():
        needed = setting.needed(scored)
        saved = f"{setting.saving(scored):.0%}" if known else "-"
        table.add_row(name, saved, "never" if needed is None else f"{needed:.0%}")
    return table


def finding_of(setting: BreakEven, known: bool, found: Mapping[str, float]) -> Finding:
    """The line on what selection can bring; arguments as of `saving_table`, no schedules where nothing is scored."""
    if known:
        text = setting.verdict(found)
        return Finding("warning" if "cannot pay" in text else "ok", "selection", text)
    needed = {name: setting.needed(scored) for name, scored in found.items()}
    if found and all(share is None for share in needed.values()):
        return Finding(
            "warning",
            "selection",
            "Selection that scores cannot pay here: a sample's score costs more than its rollouts. Select without a "
            "scoring pass, or train on random samples.",
        )
    return Finding(
        "ok",
        "selection",
        "how much selection can save depends on the share of flat groups: measure it with --probe, or give it as "
        "--flat_share",
    )


def check_flat_share(flat_share: float | None, probe: bool, warms_up: bool) -> None:
    """Refuses a share that is out of range, and a probe of a policy that training does not begin with.

    Raises:
        InputError: naming the option.
    """
    if flat_share is not None and probe:
        raise InputError("--flat_share gives what --probe measures: leave one of them out")
    if flat_share is not None and not 0 <= flat_share < 1:
        raise InputError(f"--flat_share is {flat_share}: give a share of the groups, at least 0 and below 1")
    if probe and warms_up:
        raise InputError(
            "--probe draws with the policy of the config, which is warmed up before GRPO begins: warm it up first and "
            "give its folder as --model.policy.pretrained, or give --flat_share"
        )
