"""Items of any dataset as bytes: equal values give equal bytes, and what cannot be told is left out."""

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from minirec_pl.data.identity import content


@dataclass
class Row:
    x: object
    y: object


Pair = namedtuple("Pair", "a b")
SAME = {
    "tensor": lambda v: torch.tensor([v, 2.0]),
    "bfloat16": lambda v: torch.tensor([v], dtype=torch.bfloat16),
    "scalar": lambda v: torch.tensor(v),
    "array": lambda v: np.array([[v], [1.0]]),
    "number": lambda v: v,
    "text": str,
    "nested": lambda v: {"a": [v, ("b", None)], "c": {}},
    "dataclass": lambda v: Row(torch.tensor(v), [1]),
    "named tuple": lambda v: Pair(v, "b"),
}


@pytest.mark.parametrize("kind", SAME)
def test_equal_values_give_equal_bytes_and_others_do_not(kind):
    make = SAME[kind]
    assert content(make(1.5)) == content(make(1.5)) != content(make(2.5))
    assert content(make(1.5)) is not None


def test_structure_counts():
    assert content(["ab", "c"]) != content(["a", "bc"])
    assert content([[], 1]) != content([1, []])
    assert content(torch.zeros(2, 3)) != content(torch.zeros(3, 2)) != content(torch.zeros(6))
    assert content({"a": 1, "b": 2}) == content({"b": 2, "a": 1})


def test_what_cannot_be_told_is_left_out():
    assert content(object()) is None
    assert content([1, object()]) is None
    assert content(torch.zeros(2).to_sparse()) is None
    assert content(np.array([object()])) is None
