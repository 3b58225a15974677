"""Counts with a fraction are refused by name wherever one is given."""

import numpy as np
import pytest
import torch

from minirec_pl import InputError, RecDataModule
from minirec_pl.callbacks import (
    CompletionsTable,
    EasyToHardCurriculum,
    GaussianCurriculum,
    MiniRec,
    SelectionDashboard,
    SelectSamples,
)
from minirec_pl.grpo import AdaptiveGenerations
from minirec_pl.grpo.reference import check_sync
from minirec_pl.policy.interface import RolloutOptions
from minirec_pl.policy.semantic_ids import SemanticIds
from minirec_pl.selection import (
    DEALRecSelector,
    MiniRecSelector,
    PredictedDifficulty,
    PredictedSelector,
    group_difficulty,
    group_moments,
)
from minirec_pl.trainers.grpo_checks import check_schedule
from minirec_pl.utils.break_even import BreakEven, schedules
from minirec_pl.utils.errors import check_whole
from minirec_pl.utils.seeds import check_seed

HALF = torch.tensor([0.5])
PLACES = {
    "num_generations": [
        lambda n: RolloutOptions(num_generations=n),
        lambda n: MiniRecSelector(num_generations=n),
        lambda n: PredictedSelector(num_generations=n),
        lambda n: BreakEven(prompt=10, completion=1, num_generations=n, scoring=10),
        lambda n: group_moments(HALF.log(), n),
        lambda n: group_difficulty(HALF, n),
    ],
    "scoring_generations": [lambda n: RolloutOptions(scoring_generations=n)],
    "max_completion_length": [lambda n: RolloutOptions(max_completion_length=n)],
    "top_k": [lambda n: RolloutOptions(top_k=n)],
    "relabel_topk": [lambda n: RolloutOptions(relabel_topk=n)],
    "adaptive_generations.max": [lambda n: AdaptiveGenerations(max=n)],
    "folds": [lambda n: PredictedDifficulty(folds=n)],
    "n_groups": [lambda n: DEALRecSelector(n_groups=n)],
    "epochs": [schedules],
    "num_iterations": [lambda n: check_schedule(n, None)],
    "steps_per_generation": [lambda n: check_schedule(1, n)],
    "ref_model_sync_steps": [lambda n: check_sync(0.1, True, n, 0.5)],
    "seed": [check_seed, lambda n: PredictedSelector(seed=n)],
    "semantic_ids.levels": [lambda n: SemanticIds(levels=n)],
    "semantic_ids.codes": [lambda n: SemanticIds(codes=n)],
    "batch_size": [lambda n: RecDataModule(batch_size=n)],
    "n_folds": [lambda n: EasyToHardCurriculum(n_folds=n)],
    "n_levels": [lambda n: GaussianCurriculum(n_levels=n)],
    "max_rows": [lambda n: SelectionDashboard(max_rows=n)],
    "num_prompts": [lambda n: CompletionsTable(num_prompts=n)],
    "warmup_epochs": [lambda n: SelectSamples(warmup_epochs=n), lambda n: MiniRec(warmup_epochs=n)],
    "every_n_epochs": [lambda n: SelectSamples(every_n_epochs=n)],
}


@pytest.mark.parametrize("value", [2.5, 3.0, float("nan"), True, "3"])
@pytest.mark.parametrize("name", PLACES)
def test_a_count_with_a_fraction_is_refused(name, value):
    for make in PLACES[name]:
        with pytest.raises(InputError, match=f"^{name} is {value!r}: give a whole number"):
            make(value)


def test_whole_numbers_of_any_kind_pass():
    check_whole(a=3, b=np.int64(3), c=None, d=-1)
    assert RolloutOptions(num_generations=np.int32(4)).num_generations == 4
