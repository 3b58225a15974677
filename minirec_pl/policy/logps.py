"""Log-probabilities of completions, differentiable, without ever holding the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirec_pl.policy.causal_lm import (
    Head,
    body_of,
    cache_under_checkpointing,
    head_of,
    length_buckets,
    run_completions,
    run_prompts,
)

_LOGITS_BYTES = 48 * 2**20  # of one chunk


class TokenLogps(NamedTuple):
    """What the policy thinks of given completions.

    Attributes:
        logps: [B, G, L], log-probability of each token in nats, with gradient; 0 where masked.
        entropy: [B, G, L], entropy of each token's distribution in nats, without gradient; 0 where masked.
    """

    logps: Tensor
    entropy: Tensor


def completion_logps(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    temperature: float = 1.0,
) -> TokenLogps:
    """Log-probabilities of completions under softmax(logits / temperature), and its entropy, from one pass.

    Each prompt is run once and its keys and values, with their gradient, are shared by its group: the same function
    of the weights as G full sequences. With dropout at work the group shares the prompt's dropout mask. Under
    reentrant gradient checkpointing, which cannot keep a cache, each completion runs its own prompt.

    Logits exist for one chunk of tokens at a time, in backward too. Tokens that are masked, or whose log-probability
    gets a gradient of exactly 0, cost nothing in the head.

    Args:
        model: a causal language model of transformers, also inside peft.
        input_ids: int64 [B, T], prompts padded on the left.
        attention_mask: [B, T], which of their tokens are real.
        completion_ids: int64 [B, G, L], padded on the right.
        completion_mask: bool [B, G, L], which of their tokens count, see `minirec_pl.grpo.eos_mask`.
        temperature: divides the logits, as in sampling.

    Returns:
        float32, or the wider dtype of the model.

    Raises:
        InputError: if a prompt is empty.
    """
    shape, mask = completion_ids.shape, completion_mask.bool().flatten(0, 1)
    tokens, attention_mask = completion_ids.flatten(0, 1), attention_mask.to(torch.int64)
    active = mask.flatten().nonzero().flatten()
    with cache_under_checkpointing(model) as shared:
        run = _shared_states if shared else _separate_states
        states = run(body_of(model), input_ids, attention_mask, tokens, mask, shape[1])
    states, targets = states.flatten(0, 1).index_select(0, active), tokens.flatten().index_select(0, active)
    logps, entropy = head_logps(head_of(model), states, targets, temperature)
    return TokenLogps(
        *(values.new_zeros(mask.numel()).index_copy(0, active, values).view(shape) for values in (logps, entropy))
    )


def _shared_states(
    body: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor, tokens: Tensor, mask: Tensor, group: int
) -> Tensor:
    """The states that produce the tokens, [R, L, D], from prompts run once each."""
    prompt = run_prompts(body, input_ids, attention_mask)
    sample = torch.arange(len(input_ids), device=tokens.device).repeat_interleave(group)
    first = prompt.states.index_select(0, sample)[:, None]
    fed, parts = mask[:, 1:], []
    if not fed.any():
        return first.expand(-1, tokens.shape[1], -1)
    buckets = length_buckets(fed.sum(dim=1))
    for rows in buckets:
        width = max(1, int(fed[rows].sum(dim=1).max()))
        states = run_completions(prompt, sample[rows], tokens[rows, :width], fed[rows, :width])
        parts.append(torch.nn.functional.pad(states, (0, 0, 0, fed.shape[1] - width)))
    rest = torch.cat(parts).index_select(0, torch.argsort(torch.cat(buckets))) if len(parts) > 1 else parts[0]
    return torch.cat([first, rest], dim=1)


def _separate_states(
    body: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor, tokens: Tensor, mask: Tensor, group: int
) -> Tensor:
    """As `_shared_states`, each completion after its own copy of the prompt."""
    both = torch.cat([attention_mask.repeat_interleave(group, dim=0), mask[:, :-1].to(torch.int64)], dim=1)
    states: Tensor = body(
        input_ids=torch.cat([input_ids.repeat_interleave(group, dim=0), tokens[:, :-1]], dim=1),
        attention_mask=both,
        position_ids=(both.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    return states[:, -tokens.shape[1] :]


def head_logps(
    head: Head, states: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-softmax of the head's logits / temperature at the targets, and the entropy of the distribution.

    Only `states` are kept for backward, which computes the logits z of a chunk again: with p = softmax(z / T) and g the
    gradient of a log-probability, that of its logits is g (onehot - p) / T.

    Args:
        head: of the model.
        states: float [N, D].
        targets: int64 [N].
        temperature: T.
        chunk: tokens whose logits exist at once; as many as fit in 48 MiB if None.

    Returns:
        logps [N] in nats, differentiable in the states and the head; entropy [N] in nats, without gradient.

    Example:
        >>> head = Head(torch.eye(3), None, None)
        >>> logps, entropy = head_logps(head, torch.zeros(1, 3), torch.tensor([2]))
        >>> logps, entropy
        (tensor([-1.0986]), tensor([1.0986]))
    """
    width = torch.promote_types(states.dtype, torch.float32).itemsize
    chunk = chunk or max(1, _LOGITS_BYTES // (width * len(head.weight)))
    result: tuple[Tensor, Tensor] = _HeadLogps.apply(  # type: ignore[no-untyped-call]
        states, head.weight, head.bias, targets, head.softcap, temperature, chunk
    )
    return result


class _HeadLogps(torch.autograd.Function):
    """See `head_logps`."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        head = Head(weight, bias, softcap)
        dtype = torch.promote_types(states.dtype, torch.float32)
        logps, norms, entropy = states.new_empty(3, len(states), dtype=dtype).unbind()
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(states), chunk):
                rows = slice(start, start + chunk)
                logits = head.logits(states[rows]).div_(temperature)
                chosen = logits.gather(1, targets[rows, None]).squeeze(1)
                top = logits.amax(dim=1)
                mass = torch.sub(logits, top[:, None]).exp_()
                total = mass.sum(dim=1)
                norms[rows] = total.log() + top
                logps[rows] = chosen - norms[rows]
                entropy[rows] = norms[rows] - logits.mul_(mass).sum(dim=1) / total
        ctx.save_for_backward(states, weight, bias, targets, norms)
        ctx.softcap, ctx.temperature, ctx.chunk = softcap, temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, norms = ctx.saved_tensors
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        head, temperature = Head(weight, bias, ctx.softcap), ctx.temperature
        grad_states = torch.zeros_like(states) if needs_states else None
        grad_weight = weight.new_zeros(weight.shape, dtype=norms.dtype) if needs_weight else None
        grad_bias = weight.new_zeros(len(weight), dtype=norms.dtype) if needs_bias else None
        active = grad_logps.nonzero().flatten()
        with torch.autocast(states.device.type, enabled=False):
            for rows in active.split(ctx.chunk):
                some, scale = states[rows], (grad_logps[rows] / temperature)[:, None]
                grad = head.logits(some)
                slope = None if head.softcap is None else 1 - (grad / head.softcap).square()
                grad = grad.div_(temperature).sub_(norms[rows, None]).exp_().mul_(-scale)
                grad.scatter_add_(1, targets[rows, None], scale)
                if slope is not None:
                    grad.mul_(slope)
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0)
                if grad_weight is not None:
                    grad_weight.addmm_(grad.T, some.to(grad.dtype))
                if grad_states is not None:
                    grad_states[rows] = (grad.to(weight.dtype) @ weight).to(states.dtype)
        return (
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )
