import math

import numpy as np
import pytest
import torch

from minirec_pl.selection import SampleSignals, Signals
from minirec_pl.utils.errors import InputError


def test_numpy_and_lists_become_tensors_without_graph():
    weight = torch.ones(2, 3, requires_grad=True)
    signals = SampleSignals([7, 3], rewards=np.zeros((2, 4)), gradient=weight * 2)
    assert signals.sample_id.tolist() == [7, 3]
    assert isinstance(signals.rewards, torch.Tensor)
    assert signals.gradient is not None
    assert not signals.gradient.requires_grad
    assert len(signals) == 2


@pytest.mark.parametrize("field", ["rewards", "gradient", "embedding"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_value_names_field_and_sample(field, bad):
    values = torch.zeros(3, 2)
    values[1, 1] = bad
    with pytest.raises(InputError, match=rf"^{field} is NaN or infinite for sample_id 22:"):
        SampleSignals([11, 22, 33], **{field: values})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewards": torch.zeros(3)}, r"rewards has the shape \[3\]: give \[2, n\]"),
        ({"gradient": torch.zeros(3, 2)}, r"gradient has the shape \[3, 2\]: give \[2, n\]"),
        ({"solve_probability": torch.zeros(2, 1)}, r"solve_probability has the shape \[2, 1\]: give \[2\]"),
        ({"solve_probability": torch.tensor([0.5, 1.5])}, r"solve_probability is outside \[0, 1\] for sample_id 2"),
        ({"solve_probability": torch.tensor([math.nan, 0.5])}, r"solve_probability is NaN.*sample_id 1"),
        ({"alignment": torch.zeros(2, 1)}, r"alignment has the shape \[2, 1\]: give \[2\]"),
        ({"alignment": torch.tensor([-1.5, 0.5])}, r"alignment is outside \[-1, 1\] for sample_id 1"),
        ({"alignment": torch.tensor([0.5, math.nan])}, r"alignment is NaN.*sample_id 2"),
        ({"embedding": torch.zeros(2, 0)}, r"embedding has no columns"),
    ],
)
def test_misfit_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        SampleSignals([1, 2], **fields)


def test_ids_must_be_flat_integers():
    with pytest.raises(InputError, match="integers"):
        SampleSignals(torch.tensor([1.0, 2.0]))
    with pytest.raises(InputError, match="flat"):
        SampleSignals(torch.zeros(2, 2, dtype=torch.int64))


def test_probability_beyond_one_by_rounding_is_clamped():
    signals = SampleSignals([1, 2], solve_probability=torch.tensor([1.0000001, -1e-9]))
    assert signals.solve_probability is not None
    assert signals.solve_probability.tolist() == [1.0, 0.0]
    alignment = SampleSignals([1, 2], alignment=torch.tensor([-1.0000001, 1.000001])).alignment
    assert alignment is not None
    assert alignment.tolist() == [-1.0, 1.0]


def test_many_bad_ids_are_counted_not_listed():
    with pytest.raises(InputError, match=r"0, 1, 2, 3, 4 and 15 more:"):
        SampleSignals(range(20), rewards=torch.full((20, 2), math.nan))


def test_cat_joins_in_order():
    joined = SampleSignals.cat(
        [SampleSignals([5], rewards=torch.ones(1, 2)), SampleSignals([2, 9], rewards=torch.zeros(2, 2))]
    )
    assert joined.sample_id.tolist() == [5, 2, 9]
    assert joined.rewards is not None
    assert joined.rewards.tolist() == [[1, 1], [0, 0], [0, 0]]
    assert joined.gradient is None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "at least one batch"),
        ([SampleSignals([1], rewards=torch.ones(1, 2)), SampleSignals([2])], "only some batches have rewards"),
        (
            [SampleSignals([1], embedding=torch.ones(1, 2)), SampleSignals([2], embedding=torch.ones(1, 3))],
            r"embedding has \[2, 3\] columns",
        ),
    ],
)
def test_cat_refuses_parts_that_do_not_fit(parts, message):
    with pytest.raises(InputError, match=message):
        SampleSignals.cat(parts)


def pool(**changes):
    fields = {
        "sample_id": [4, 2, 8],
        "reward_mean": np.array([0.5, np.nan, 1.0]),
        "reward_std": np.array([0.1, np.nan, 0.0]),
        "n_rollouts": [4, 0, 4],
        "embedding": np.eye(3),
    }
    return Signals(**(fields | changes))


def test_take_keeps_rows_together():
    taken = pool().take(torch.tensor([2, 0]))
    assert taken.sample_id.tolist() == [8, 4]
    assert taken.reward_mean.tolist() == [1.0, 0.5]
    assert taken.embedding is not None
    assert taken.embedding.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert taken.gradient is None


def test_nan_embedding_is_bad_only_where_it_is_said_to_be_known():
    embedding = np.eye(3)
    embedding[1] = np.nan
    with pytest.raises(InputError, match="embedding is NaN or infinite for sample_id 2:"):
        pool(embedding=embedding)
    assert len(pool(embedding=embedding, embedding_known=[True, False, True])) == 3


def test_repeated_id_is_refused():
    with pytest.raises(InputError, match="sample_id 4 occurs more than once"):
        pool(sample_id=[4, 8, 4])


def test_alignment_is_nan_where_not_measured():
    alignment = pool(alignment=np.array([-0.5, np.nan, 1.0])).alignment
    assert alignment is not None
    assert alignment.nan_to_num(9).tolist() == [-0.5, 9, 1.0]
    with pytest.raises(InputError, match=r"alignment is outside \[-1, 1\] for sample_id 4"):
        pool(alignment=np.array([-1.5, np.nan, 1.0]))


def test_infinite_reward_is_refused_though_nan_means_unknown():
    with pytest.raises(InputError, match="reward_mean is NaN or infinite for sample_id 8:"):
        pool(reward_mean=np.array([0.5, np.nan, np.inf]))
