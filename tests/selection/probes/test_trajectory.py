"""Alignments against the cosine of gradients that autograd takes, written out as one vector."""

import pytest
import torch
from helpers.head_steps import drawn, several_steps

from minirec_pl.selection.probes.gradients import HeadStep
from minirec_pl.selection.probes.trajectory import Trajectory, gradient_alignment, head_alignment


def test_alignment_equals_the_cosine_of_the_heads_own_gradient():
    steps, rows, weight, states, logp = several_steps()
    displacement = drawn(50, 9, 5)
    got = head_alignment(steps, rows, displacement)
    reached = torch.cat(rows).unique()
    for b in range(4):
        leaf = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(logp(b, states, leaf), leaf)
        truth = torch.nn.functional.cosine_similarity(
            gradient[reached].flatten(), displacement[reached].flatten(), dim=0
        )
        torch.testing.assert_close(got[b], truth)
    assert got.abs().max() > 0.05
    torch.testing.assert_close(head_alignment(steps, rows, -7 * displacement), -got)
    assert (head_alignment(steps, rows, torch.zeros_like(displacement)) == 0).all()


def test_alignment_is_one_after_a_step_along_the_samples_own_gradient():
    steps, rows, weight, states, logp = several_steps()
    leaf = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(logp(2, states, leaf), leaf)
    assert float(head_alignment(steps, rows, 1e-3 * gradient)[2]) == pytest.approx(1, abs=1e-9)


def test_a_target_that_is_not_allowed_has_no_alignment():
    hidden, vectors, target = drawn(0, 2, 4), drawn(1, 5, 4), torch.tensor([1, 3])
    allowed = torch.ones(2, 5, dtype=torch.bool)
    allowed[0, 1] = False
    step = HeadStep(hidden, vectors, target, allowed)
    got = head_alignment([step], [torch.arange(5)], drawn(2, 5, 4))
    assert got[0] == 0
    assert got[1] != 0


def test_alignment_is_the_cosine_of_all_parameters_as_one_vector():
    gradients = {"a": drawn(0, 5, 2, 3), "b": drawn(1, 5, 4)}
    moved = {"b": drawn(2, 4), "a": drawn(3, 2, 3)}
    long = torch.cat([gradients["a"].flatten(1), gradients["b"]], dim=1)
    way = torch.cat([moved["a"].flatten(), moved["b"]])
    got = gradient_alignment(gradients, moved)
    torch.testing.assert_close(got, torch.nn.functional.cosine_similarity(long, way[None], dim=1))
    gradients["a"][2], gradients["b"][2] = 0, 0
    assert gradient_alignment(gradients, moved)[2] == 0


def test_displacement_is_counted_from_the_first_look():
    trajectory, weight, bias = Trajectory(), torch.ones(2, 2), torch.zeros(3)
    assert trajectory.displacement({"w": weight}) is None
    weight += 0.5
    assert trajectory.displacement({"w": weight})["w"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    weight -= 2
    moved = trajectory.displacement({"w": weight, "b": bias})
    assert moved["w"].tolist() == [[-1.5, -1.5], [-1.5, -1.5]]
    assert moved["b"].tolist() == [0, 0, 0]
    weight += 1.5
    assert trajectory.displacement({"w": weight, "b": bias}) is None
