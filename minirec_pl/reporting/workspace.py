"""The W&B workspace and the W&B report that show runs with `SelectionDashboard`, and the names that both use."""

from __future__ import annotations

from typing import Any

from minirec_pl.utils.errors import InputError

NAME = "MiniRec"
TOKENS, ROLLOUTS, SECONDS, STEP = "cost/tokens", "cost/rollouts", "cost/seconds", "trainer/global_step"
LEDGER, PLAN = "selection/ledger", "curriculum/plan"
TERMS = ("difficulty", "learnability", "representativeness", "novelty")
_AXES = {
    TOKENS: "tokens so far, forward and backward",
    ROLLOUTS: "rollouts so far",
    SECONDS: "seconds so far, without evaluation",
    STEP: "optimizer steps",
}
_IN_WORDS = {"difficulty": "Difficulty in use (higher is easier)"}

# Section: what it shows, then its lines as (title, x, [y, ...]).
LINES: dict[str, tuple[str, list[tuple[str, str, list[str]]]]] = {
    "Quality over cost": (
        "Validation figures over everything that was spent: scoring, selection and training, and the warm start.",
        [
            ("NDCG@10 over tokens", TOKENS, ["val/ndcg@10"]),
            ("NDCG@10 over rollouts", ROLLOUTS, ["val/ndcg@10"]),
            ("NDCG@10 over seconds", SECONDS, ["val/ndcg@10"]),
            ("HR@10 over tokens", TOKENS, ["val/hit_rate@10"]),
            ("MRR over tokens", TOKENS, ["val/mrr"]),
            ("Coverage@10 over tokens", TOKENS, ["val/coverage@10"]),
        ],
    ),
    "Training": (
        "Rewards of the rollouts that were trained on, and what the objective made of them.",
        [
            ("Mean reward", ROLLOUTS, ["reward"]),
            ("Spread of the reward in a group", ROLLOUTS, ["reward_std"]),
            ("Groups without reward variance", ROLLOUTS, ["frac_reward_zero_std"]),
            ("Entropy [nats]", ROLLOUTS, ["entropy"]),
            ("Share of tokens clipped", ROLLOUTS, ["clip_ratio/low_mean", "clip_ratio/high_mean"]),
            ("Length of a completion [tokens]", ROLLOUTS, ["completions/mean_length"]),
        ],
    ),
    "Selection": (
        "What the pool looks like, which part of it was picked, and why: the terms of the value, their histograms over "
        "pool and picks, and the ledger with a row per sample.",
        [
            ("Mean reward of the picks", STEP, ["selection/reward_mean"]),
            ("Picks with a reward near zero", STEP, ["selection/share_near_zero"]),
            ("Picks kept from the selection before", STEP, ["selection/overlap"]),
            ("Picks decided by novelty", STEP, ["selection/novelty_share"]),
            ("Pool with a learnability near zero", STEP, ["selection/learnability_near_zero"]),
            ("Coverage by the picks", STEP, ["selection/coverage/user_id", "selection/coverage/item_id"]),
        ],
    ),
    "Curriculum": (
        "The order of the last plan, and what came of it in training.",
        [
            ("Mean reward met in training", STEP, ["selection/trained_reward"]),
            ("Groups with mixed rewards", STEP, ["selection/trained_share_mixed"]),
            ("Samples per epoch", STEP, ["curriculum/length"]),
        ],
    ),
    "Cost": (
        "Running totals by phase; evaluation is not counted.",
        [
            ("Tokens", STEP, ["cost/warm_start_tokens", "cost/scoring_tokens", "cost/training_tokens"]),
            ("Rollouts", STEP, ["cost/scoring_rollouts", "cost/training_rollouts"]),
            (
                "Seconds",
                STEP,
                [f"cost/{phase}_seconds" for phase in ("warm_start", "scoring", "selection", "training")],
            ),
        ],
    ),
}


def views(entity: str, project: str) -> dict[str, Any]:
    """Makes the W&B report and the W&B workspace, a section for each of `LINES`; neither is saved yet.

    Args:
        entity: W&B user or team.
        project: of the runs.

    Raises:
        InputError: without the package wandb-workspaces.
    """
    ws, wr = _packages()
    blocks: list[Any] = []
    for name, (text, _) in LINES.items():
        runs = wr.Runset(name="Runs")  # of the report's own project, so that nothing has to be looked up
        blocks += [wr.H2(text=name), wr.P(text=text), wr.PanelGrid(runsets=[runs], panels=_panels(name))]
    report = wr.Report(
        entity=entity,
        project=project,
        title="MiniRec: quality, selection and cost",
        description="Made by `minirec dashboard`; write what the runs show between the panels.",
        blocks=blocks,
        width="fluid",
    )
    sections = [ws.Section(name=name, panels=_panels(name), is_open=True) for name in LINES]
    return {"report": report, "workspace": ws.Workspace(entity=entity, project=project, name=NAME, sections=sections)}


def _panels(section: str) -> list[Any]:
    wr = _packages()[1]
    made = [
        wr.LinePlot(title=title, x=x, y=y, title_x=_AXES[x], title_y=title.partition(" over ")[0])
        for title, x, y in LINES[section][1]
    ]
    if section == "Selection":
        for term in TERMS:
            keys = [f"selection/{term}/{group}" for group in ("pool", "picks")]
            title = f"{_IN_WORDS.get(term, term.capitalize())} of pool and picks"
            made.append(wr.MediaBrowser(title=title, media_keys=keys))
        title = "Learnability over the difficulty in use (higher is easier)"
        made += [_scatter(LEDGER, "difficulty", "learnability", title), _table(LEDGER)]
    if section == "Curriculum":
        title = "Easiness (mean reward or solve probability, see measure) over the position in the epoch"
        made += [_scatter(PLAN, "position", "easiness", title), _table(PLAN)]
    return made


def _scatter(table: str, x: str, y: str, title: str) -> Any:
    return _packages()[1].CustomChart(
        query={"summaryTable": {"tableKey": table}},
        chart_name="wandb/scatter/v0",
        chart_fields={"x": x, "y": y},
        chart_strings={"title": title},
    )


def _table(key: str) -> Any:
    wr = _packages()[1]
    return wr.WeavePanelSummaryTable(table_name=key, layout=wr.Layout(w=24, h=12))


def _packages() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        raise InputError("minirec dashboard needs wandb-workspaces: pip install 'minirec-pl[dashboard]'") from error
    return ws, wr
