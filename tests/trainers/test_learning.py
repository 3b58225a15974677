"""A bandit with a known optimum: 20 items, an empty prompt, reward 1 for item 7."""

import pytest
import torch
from helpers.plain_policy import CONFIG
from helpers.slow import slow
from torch.utils.data import DataLoader

from minirec_pl import GRPORecModule
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import GenerativePolicy

STEPS = 40
WANTED = 7
SEEDS = [0, *map(slow, range(1, 5))]


def distribution(make_trainer, seed, steps=STEPS, **options):
    """Probabilities of the items before and after training."""
    torch.manual_seed(seed)
    policy = GenerativePolicy(config=CONFIG)
    policy.bind(Catalogue([str(i) for i in range(20)]))
    batch = {name: torch.full((16, 1), -1) for name in ("history", "seen")}
    ids = torch.arange(16)
    batch |= {"target": torch.full((16,), WANTED), "sample_id": ids, "user": torch.zeros_like(ids)}
    options = {"num_generations": 8, "optimizer": lambda p: torch.optim.Adam(p, lr=0.02), **options}
    before = policy.item_logps(batch)[0].exp()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(GRPORecModule(policy, **options), DataLoader([batch] * steps, batch_size=None))
    return before, policy.item_logps(batch)[0].exp()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_optimum_is_reached_in_forty_steps(make_trainer, seed):
    before, after = distribution(make_trainer, seed)
    assert 0.03 < float(before[WANTED]) < 0.08
    assert float(after[WANTED]) > 0.95


@pytest.mark.parametrize("seed", SEEDS)
def test_negated_advantages_make_it_worse(make_trainer, seed):
    before, after = distribution(make_trainer, seed, reward_weights=[-1.0])
    assert float(after[WANTED]) < 0.5 * float(before[WANTED])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_large_beta_keeps_to_the_reference(make_trainer, seed):
    before, after = distribution(make_trainer, seed, beta=100.0)
    assert float((before - after).abs().sum() / 2) < 0.02
