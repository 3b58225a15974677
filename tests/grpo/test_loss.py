"""Oracle: loops over unpadded completions in Python floats; gradients by gradcheck and by hand."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from minirec_pl.grpo.loss import LossType, eos_mask, group_advantages, kl_k3, policy_loss
from minirec_pl.utils.errors import InputError

LOSS_TYPES: list[LossType] = ["grpo", "bnpo", "dr_grpo", "dapo"]
MAX_LENGTH = 9


@dataclass
class Case:
    logps: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    advantages: Tensor
    mask: Tensor


def random_case(seed: int, lengths: list[int] | None = None) -> Case:
    """3 groups of 4 completions of up to 6 tokens, one of them empty, float64, off-policy enough to be clipped."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    old = -2 + 0.3 * normal(3, 4, 6)
    counts = torch.tensor(lengths) if lengths else torch.randint(1, 7, (12,), generator=generator)
    if not lengths:
        counts[5] = 0
    mask = torch.arange(6) < counts.reshape(3, 4, 1)
    logps = old + 0.6 * normal(3, 4, 6)
    return Case(logps, old, old + 0.5 * normal(3, 4, 6), group_advantages(normal(3, 4)), mask)


def oracle(
    case: Case,
    loss_type: str,
    *,
    low: float = 0.2,
    high: float = 0.2,
    beta: float = 0.0,
    delta: float = math.inf,
    level: str = "token",
    correct: bool = True,
    num_items: float | None = None,
) -> tuple[float, float, float, float]:
    """Loss, clip_low, clip_high and kl by the formulas of the papers, a token at a time."""
    rows: list[list[float]] = []
    clipped_low = clipped_high = counted = 0
    kls: list[float] = []
    for b in range(3):
        for g in range(4):
            advantage = float(case.advantages[b, g])
            length = int(case.mask[b, g].sum())
            ratios = [math.exp(case.logps[b, g, t]) / math.exp(case.old_logps[b, g, t]) for t in range(length)]
            if level == "sequence" and length:
                ratios = [math.prod(ratios) ** (1 / length)] * length
            row: list[float] = []
            for t, ratio in enumerate(ratios):
                new, ref = float(case.logps[b, g, t]), float(case.ref_logps[b, g, t])
                surrogate = min(min(ratio, delta) * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
                kl = math.exp(ref) / math.exp(new) - math.log(math.exp(ref) / math.exp(new)) - 1
                kl *= ratio if correct else 1.0
                row.append(-surrogate + beta * kl)
                kls.append(kl)
            for ratio in ratios if level == "token" else ratios[:1]:
                counted += 1
                clipped_low += ratio < 1 - low and advantage < 0
                clipped_high += ratio > 1 + high and advantage > 0
            rows.append(row)
    tokens = sum(map(len, rows))
    total = math.fsum(map(math.fsum, rows))
    completions = num_items or len(rows)
    loss = {
        "grpo": math.fsum(math.fsum(row) / len(row) for row in rows if row) / completions,
        "bnpo": total / tokens,
        "dr_grpo": total / (completions * MAX_LENGTH),
        "dapo": total / (num_items or tokens),
    }[loss_type]
    return loss, clipped_low / counted, clipped_high / counted, math.fsum(kls) / tokens


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("epsilon_high", "beta", "correct", "delta"),
    [
        (None, 0.0, True, None),
        (0.28, 0.0, True, None),
        (None, 0.4, False, None),
        (None, 0.4, True, None),
        (0.3, 0.1, True, 1.5),
    ],
)
def test_loss_equals_the_unpadded_loop(
    loss_type: LossType,
    seed: int,
    level: str,
    epsilon_high: float | None,
    beta: float,
    correct: bool,
    delta: float | None,
) -> None:
    case = random_case(seed)
    narrow = 1.0 if level == "token" else 0.1  # ratios of whole completions vary less
    low, high = 0.2 * narrow, None if epsilon_high is None else epsilon_high * narrow
    got = policy_loss(
        case.logps,
        case.old_logps,
        case.advantages,
        case.mask,
        epsilon=low,
        epsilon_high=high,
        delta=delta,
        beta=beta,
        use_bias_correction_kl=correct,
        ref_logps=case.ref_logps,
        loss_type=loss_type,
        importance_sampling_level=level,  # type: ignore[arg-type]
        max_completion_length=MAX_LENGTH,
    )
    assert got.kl is not None
    widths = {"low": low, "high": high or low, "delta": delta or math.inf}
    loss, clip_low, clip_high, kl = oracle(case, loss_type, beta=beta, correct=correct, level=level, **widths)
    assert float(got.loss) == pytest.approx(loss, abs=1e-12)
    assert float(got.clip_low) == pytest.approx(clip_low, abs=1e-6)
    assert float(got.clip_high) == pytest.approx(clip_high, abs=1e-6)
    assert float(got.kl) == pytest.approx(kl, abs=1e-12)
    assert clip_low > 0
    assert clip_high > 0 or (level == "sequence" and seed == 0)


def test_delta_bounds_what_plain_clipping_leaves_open() -> None:
    """With A < 0 the loss grows with the ratio without end; delta stops it, and stops the gradient there."""
    logps = torch.tensor([[[2.0], [0.5]]], requires_grad=True)
    advantages = torch.tensor([[-1.0, -1.0]])
    for delta, losses, dead in (
        (None, (math.exp(2), math.exp(0.5)), [False, False]),
        (4.0, (4.0, 1.64872), [True, False]),
    ):
        loss = policy_loss(logps, torch.zeros(1, 2, 1), advantages, torch.ones(1, 2, 1), delta=delta).loss
        assert float(loss.detach()) == pytest.approx(sum(losses) / 2, rel=1e-5)
        (grad,) = torch.autograd.grad(loss, logps)
        assert (grad.flatten() == 0).tolist() == dead
    above = policy_loss(logps, torch.zeros(1, 2, 1), -advantages, torch.ones(1, 2, 1), delta=4.0).loss
    assert float(above.detach()) == pytest.approx(-1.2)


def test_sequence_level_ratio_is_the_geometric_mean_and_knows_no_padding() -> None:
    logps = torch.tensor([[[math.log(0.5), math.log(0.8), 7.0], [math.log(0.3), 7.0, 7.0]]], dtype=torch.float64)
    old = torch.tensor([[[math.log(0.4), math.log(0.9), -3.0], [math.log(0.3), -3.0, -3.0]]], dtype=torch.float64)
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]]])
    logps.requires_grad_()
    got = policy_loss(
        logps, old, torch.tensor([[1.0, -1.0]]), mask, loss_type="grpo", importance_sampling_level="sequence"
    )
    ratio = math.sqrt(0.5 * 0.8 / (0.4 * 0.9))
    assert float(got.loss.detach()) == pytest.approx(-(ratio - 1) / 2, abs=1e-12)
    (grad,) = torch.autograd.grad(got.loss, logps)
    assert grad[0, 0].tolist() == pytest.approx([-ratio / 4, -ratio / 4, 0.0])
    assert grad[0, 1].tolist() == pytest.approx([0.5, 0.0, 0.0])


def test_defaults_are_those_of_trl() -> None:
    case = random_case(1)
    got = policy_loss(case.logps, case.old_logps, case.advantages, case.mask)
    assert float(got.loss) == pytest.approx(oracle(case, "dapo")[0], abs=1e-12)
    assert got.kl is None


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_given_total_divides_except_for_bnpo(loss_type: LossType) -> None:
    case = random_case(2)
    expected = oracle(case, loss_type, num_items=77)[0]
    for total in (77, 77.0, torch.tensor(77)):
        got = policy_loss(
            case.logps,
            case.old_logps,
            case.advantages,
            case.mask,
            loss_type=loss_type,
            max_completion_length=MAX_LENGTH,
            num_items=total,
        )
        assert float(got.loss) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradient_is_that_of_the_loss(loss_type: LossType, level: str) -> None:
    case = random_case(3)

    def loss(logps: Tensor) -> Tensor:
        return policy_loss(
            logps,
            case.old_logps,
            case.advantages,
            case.mask,
            beta=0.1,
            delta=1.4,
            ref_logps=case.ref_logps,
            loss_type=loss_type,
            importance_sampling_level=level,  # type: ignore[arg-type]
            max_completion_length=MAX_LENGTH,
        ).loss

    assert torch.autograd.gradcheck(loss, case.logps.clone().requires_grad_())


def gradient(case: Case, part: slice = slice(None), **options: object) -> tuple[Tensor, Tensor]:
    logps = case.logps[part].clone().requires_grad_()
    loss = policy_loss(
        logps,
        case.old_logps[part],
        case.advantages[part],
        case.mask[part],
        ref_logps=case.ref_logps[part],
        **options,  # type: ignore[arg-type]
    ).loss
    (grad,) = torch.autograd.grad(loss, logps)
    return loss.detach(), grad


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_positions_do_not_matter(loss_type: LossType, garbage: float) -> None:
    case = random_case(4)
    options = {"loss_type": loss_type, "beta": 0.3, "max_completion_length": MAX_LENGTH}
    clean = gradient(case, **options)
    for tensor in (case.logps, case.old_logps, case.ref_logps):
        tensor[~case.mask] = garbage
    loss, grad = gradient(case, **options)
    assert torch.equal(loss, clean[0])
    assert torch.equal(grad, clean[1])
    assert not grad[~case.mask].any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("num_items", [None, 0])
def test_a_fully_masked_batch_gives_zero(loss_type: LossType, num_items: int | None) -> None:
    case = random_case(5)
    case.mask[:] = False
    case.logps[:] = math.nan
    options = {"loss_type": loss_type, "beta": 0.3, "max_completion_length": MAX_LENGTH, "num_items": num_items}
    loss, grad = gradient(case, **options)
    assert float(loss) == 0.0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_on_policy_the_ratio_is_one_and_the_gradient_is_not_zero() -> None:
    case = random_case(6)
    case.mask[1, 1, :2] = True
    case.old_logps = case.logps.clone()
    loss, grad = gradient(case, loss_type="grpo")
    assert abs(float(loss)) < 1e-12
    lengths = case.mask.sum(-1, keepdim=True)
    assert torch.allclose(grad, -case.advantages.unsqueeze(-1) * case.mask / lengths / 12, atol=1e-12)
    for loss_type in ("dapo", "bnpo"):
        assert abs(float(gradient(case, loss_type=loss_type)[0])) > 1e-3


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("cuts", [[1, 1, 1], [2, 1]])
def test_micro_batches_of_any_size_give_the_gradient_of_the_whole(loss_type: LossType, cuts: list[int]) -> None:
    case = random_case(7)
    options = {"loss_type": loss_type, "beta": 0.1, "max_completion_length": MAX_LENGTH}
    _, whole = gradient(case, **options)
    total = float(case.mask.sum()) if loss_type == "dapo" else 12.0
    options["num_items"] = total / len(cuts)  # what the accumulated micro-batches are averaged by
    parts, start = [], 0
    for cut in cuts:
        parts.append(gradient(case, slice(start, start + cut), **options)[1] / len(cuts))
        start += cut
    assert torch.allclose(torch.cat(parts), whole, atol=1e-14)


def test_micro_batches_of_bnpo_do_not_add_up() -> None:
    case = random_case(7)
    _, whole = gradient(case, loss_type="bnpo")
    parts = [gradient(case, slice(b, b + 1), loss_type="bnpo")[1] / 3 for b in range(3)]
    assert not torch.allclose(torch.cat(parts), whole, atol=1e-3)


def test_a_step_raises_the_good_completions_and_lowers_the_bad() -> None:
    case = random_case(8, lengths=[6] * 12)
    case.old_logps = case.logps.clone()
    _, grad = gradient(case)
    assert torch.equal(grad.sign(), -case.advantages.sign().unsqueeze(-1).expand_as(grad))


def test_clipped_tokens_get_no_gradient() -> None:
    logps = torch.tensor([[[0.5, -0.5, 0.5, -0.5]]], requires_grad=True)
    for advantage, dead in ((1.0, [0, 2]), (-1.0, [1, 3])):
        got = policy_loss(logps, torch.zeros(1, 1, 4), torch.tensor([[advantage]]), torch.ones(1, 1, 4))
        (grad,) = torch.autograd.grad(got.loss, logps)
        assert (grad[0, 0] == 0).nonzero().flatten().tolist() == dead
        assert (float(got.clip_low), float(got.clip_high)) == ((0.0, 0.5) if advantage > 0 else (0.5, 0.0))


def test_a_huge_ratio_stays_finite() -> None:
    logps = torch.tensor([[[0.0], [0.0]]], requires_grad=True)
    for advantages in ([[0.0, 0.0]], [[-1.0, 1.0]]):
        loss = policy_loss(logps, torch.full((1, 2, 1), -1e4), torch.tensor(advantages), torch.ones(1, 2, 1)).loss
        (grad,) = torch.autograd.grad(loss, logps)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()


def test_low_precision_is_computed_in_float32() -> None:
    logps = torch.full((1, 2, 3), -1.0, dtype=torch.bfloat16, requires_grad=True)
    old = torch.full((1, 2, 3), -1.01)
    got = policy_loss(logps, old, torch.tensor([[1.0, 1.0]]), torch.ones(1, 2, 3))
    assert got.loss.dtype == torch.float32
    assert float(got.loss.detach()) == pytest.approx(-math.exp(0.01), rel=1e-6)


def test_no_gradient_flows_to_the_old_and_reference_policies() -> None:
    case = random_case(9)
    others = [tensor.clone().requires_grad_() for tensor in (case.old_logps, case.advantages, case.ref_logps)]
    got = policy_loss(
        case.logps.requires_grad_(), others[0], others[1], case.mask, beta=0.2, ref_logps=others[2], loss_type="grpo"
    )
    got.loss.backward()
    assert all(tensor.grad is None for tensor in others)
    assert not any(value.requires_grad for value in (got.clip_low, got.clip_high, got.kl) if value is not None)


def test_wrong_options_are_named() -> None:
    case = random_case(0)
    tensors = case.logps, case.old_logps, case.advantages, case.mask
    with pytest.raises(InputError, match="loss_type is 'ppo': choose one of grpo, bnpo, dr_grpo, dapo"):
        policy_loss(*tensors, loss_type="ppo")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="epsilon is -0\\.1"):
        policy_loss(*tensors, epsilon=-0.1)
    with pytest.raises(InputError, match="epsilon_high is nan"):
        policy_loss(*tensors, epsilon_high=math.nan)
    with pytest.raises(InputError, match="importance_sampling_level is 'word': choose one of token, sequence"):
        policy_loss(*tensors, importance_sampling_level="word")  # type: ignore[arg-type]
    for delta in (1.2, 0.5, math.nan):
        with pytest.raises(InputError, match=f"delta is {delta}: .* give more than 1.2"):
            policy_loss(*tensors, delta=delta)
    with pytest.raises(InputError, match="beta is -1"):
        policy_loss(*tensors, beta=-1.0)
    with pytest.raises(InputError, match="no reference policy"):
        policy_loss(*tensors, beta=0.1)
    with pytest.raises(InputError, match="max_completion_length"):
        policy_loss(*tensors, loss_type="dr_grpo")
    with pytest.raises(InputError, match="old_logps has shape"):
        policy_loss(case.logps, case.old_logps[:1], case.advantages, case.mask)
    with pytest.raises(InputError, match="one per completion"):
        policy_loss(case.logps, case.old_logps, case.advantages[:, :1], case.mask)


def test_k3_has_the_divergence_as_its_mean() -> None:
    policy, reference = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    expected = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum")
    k3 = kl_k3(policy, reference)
    assert float((policy.exp() * k3).sum()) == pytest.approx(float(expected), abs=1e-12)
    assert (k3 >= 0).all()
    assert torch.equal(kl_k3(policy, policy), torch.zeros_like(policy))


def test_the_corrected_gradient_is_that_of_the_divergence() -> None:
    """On-policy, summed over the vocabulary by probability; k3 alone has the gradient of another divergence."""
    logits = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    reference = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).log_softmax(-1)

    def gradient_of(correct: bool) -> Tensor:
        logps = logits.log_softmax(-1)
        token = {"logps": logps[:, None], "old_logps": logps.detach()[:, None], "mask": torch.ones(20, 1)}
        total = torch.zeros((), dtype=torch.float64)
        for i, p in enumerate(logps.detach().exp()):
            one = {name: value[i : i + 1] for name, value in token.items()}
            loss = policy_loss(
                **one,
                advantages=torch.zeros(1, dtype=torch.float64),
                beta=1.0,
                ref_logps=reference[i : i + 1, None],
                use_bias_correction_kl=correct,
            ).loss
            total = total + p * loss
        return torch.autograd.grad(total, logits)[0]

    logps = logits.log_softmax(-1)
    (truth,) = torch.autograd.grad((logps.exp() * (logps - reference)).sum(), logits)
    assert torch.allclose(gradient_of(True), truth, atol=1e-12)
    assert not torch.allclose(gradient_of(False), truth, atol=1e-2)


@pytest.mark.parametrize("eos", [[2], [2, 7], [], [99]])
def test_eos_mask_equals_a_loop(eos: list[int]) -> None:
    tokens = torch.randint(9, (4, 5, 8), generator=torch.Generator().manual_seed(0))
    got = eos_mask(tokens, eos)
    for row, mask in zip(tokens.reshape(-1, 8).tolist(), got.reshape(-1, 8).tolist(), strict=True):
        length = next((place + 1 for place, token in enumerate(row) if token in eos), 8)
        assert mask == [True] * length + [False] * (8 - length)


def test_eos_mask_keeps_one_eos_where_padding_is_eos() -> None:
    assert eos_mask(torch.tensor([4, 2, 2, 2]), 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize("eos", [[2], [2, 7], []])
def test_a_completion_without_an_end_is_masked_whole(eos: list[int]) -> None:
    tokens = torch.randint(9, (4, 5, 8), generator=torch.Generator().manual_seed(0))
    got = eos_mask(tokens, eos, mask_truncated_completions=True)
    for row, mask in zip(tokens.reshape(-1, 8).tolist(), got.reshape(-1, 8).tolist(), strict=True):
        ends = [place for place, token in enumerate(row) if token in eos]
        assert mask == ([True] * (ends[0] + 1) + [False] * (7 - ends[0]) if ends else [False] * 8)
    assert bool(got.any()) == bool(eos)
