"""Oracle: each figure again, in a loop over the rows of the ledger."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.paths import GOLDEN
from helpers.rival_pool import random_pool

from minirec_pl.selection import MiniRecSelector, RandomSelector, diagnose
from minirec_pl.selection.remedies import Situation
from minirec_pl.utils.errors import InputError


def test_figures_equal_a_loop():
    signals = random_pool(n=80, seed=4)
    ledger = MiniRecSelector("official", alpha=0.6).select(signals, 15)
    rows = ledger.table.to_dict("records")
    picks = set(ledger.selected())
    users = {row["sample_id"]: row["sample_id"] % 7 for row in rows}
    samples = pd.DataFrame({"sample_id": list(users), "user_id": list(users.values())}).sample(frac=1, random_state=0)
    found = diagnose(ledger, samples)
    assert (found.n_pool, found.n_scored, found.n_selected) == (80, 80, 15)
    assert found.share_near_zero == sum(r["reward_mean"] < 0.05 for r in rows if r["sample_id"] in picks) / 15
    assert found.pool_share_near_zero == sum(r["reward_mean"] < 0.05 for r in rows) / 80
    assert found.learnability_near_zero == sum(r["learnability"] < 0.05 for r in rows) / 80
    assert found.n_separated == sum(r["learnability"] >= 0.05 for r in rows)
    best = sorted(rows, key=lambda r: -r["score"])[:15]
    assert found.novelty_share == sum(r["sample_id"] not in picks for r in best) / 15
    learn = np.array([r["learnability"] for r in rows])
    represent = np.array([r["representativeness"] for r in rows])
    assert found.correlation == pytest.approx(np.corrcoef(learn, represent)[0, 1])
    share = np.cov(0.6 * learn, 0.6 * learn + represent)[0, 1] / np.var(0.6 * learn + represent, ddof=1)
    assert found.learnability_weight == pytest.approx(share)
    assert found.coverage == {"user_id": len({users[i] for i in picks}) / 7}
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the published figures are not on this machine")
def test_published_rewards_are_degenerate():
    published = np.load(GOLDEN)
    rewards = published["rewards"]
    torch.manual_seed(0)
    signals = random_pool(
        n=len(rewards),
        sample_id=published["sample_id"],
        reward_mean=rewards.mean(axis=1),
        reward_std=rewards.std(axis=1),
        n_rollouts=np.full(len(rewards), 4),
        solve_share=(rewards > 0.5).mean(axis=1),
        embedding=torch.randn(len(rewards), 16),
    )
    found = diagnose(MiniRecSelector("official").select(signals, 256), situation=Situation(signals, "module"))
    assert found.learnability_near_zero == pytest.approx(0.97, abs=0.005)
    (degenerate,) = [text for text in found.warnings if text.startswith("learnability is below 0.05 for 97%")]
    assert "calibrate='quantile'" in degenerate
    assert any("of the picks have a mean reward below 0.05" in text for text in found.warnings)


def test_a_sound_selection_raises_no_warning():
    assert diagnose(MiniRecSelector().select(random_pool(), 15)).warnings == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_mean": np.full(60, 0.5)}, "learnability is the same for all samples"),
        ({"gradient": None}, "representativeness is the same for all samples"),
    ],
)
def test_degenerate_scores_are_named_with_the_remedy(changes, message):
    warnings = diagnose(MiniRecSelector("official").select(random_pool(**changes), 3)).warnings
    assert any(message in text for text in warnings)


def test_novelty_that_decides_nearly_all_is_named():
    best = torch.arange(60) < 12
    embedding = torch.where(best[:, None], torch.ones(60, 60), torch.eye(60))
    reward = np.where(best.numpy(), 0.5, 0.1)
    signals = random_pool(reward_mean=reward, embedding=embedding, gradient=None, sample_id=np.arange(60))
    found = diagnose(MiniRecSelector().select(signals, 12))
    assert found.novelty_share == 11 / 12
    assert any(text.startswith("novelty decides 92% of the picks") for text in found.warnings)


def test_random_picks_have_rewards_but_no_terms():
    found = diagnose(RandomSelector().select(random_pool(), 9))
    assert found.n_scored == 60
    assert not math.isnan(found.share_near_zero)
    assert math.isnan(found.correlation)
    assert math.isnan(found.novelty_share)
    assert found.as_dict()["novelty_share"] is None
    assert found.warnings == []


def test_samples_that_do_not_fit_are_refused():
    ledger = RandomSelector().select(random_pool(), 9)
    with pytest.raises(InputError, match="no column sample_id"):
        diagnose(ledger, pd.DataFrame({"user_id": [1]}))
    with pytest.raises(InputError, match="no row for sample_id 100"):
        diagnose(ledger, pd.DataFrame({"sample_id": range(101, 160), "user_id": 1}))
