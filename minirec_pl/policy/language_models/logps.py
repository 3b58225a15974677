"""Log-probabilities of completions, differentiable, without ever holding the logits of all tokens at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirec_pl.policy.language_models.causal_lm import (
    Body,
    Head,
    body_of,
    by_length,
    cache_under_checkpointing,
    check_padding,
    decoder_of,
    head_of,
    places,
    run_completions,
    run_prompts,
)
from minirec_pl.policy.language_models.model_support import check_support, support_of
from minirec_pl.policy.language_models.positions import position_rules
from minirec_pl.policy.language_models.sampling import Prompt

_TILE_TOKENS = 1024
_TILE_ENTRIES = 2**20  # 4 MiB in float32, which stay in the last-level cache of a CPU


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
    of the weights as G full sequences. With dropout at work the group shares the prompt's dropout mask. Where no cache
    reaches the layers (reentrant gradient checkpointing, recurrent models), each completion runs its own prompt.

    Logits exist in small tiles, one at a time, in backward too. Tokens that are masked, or whose log-probability
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
        InputError: if a prompt is empty or padded on the right, or the model is not known to give in batches what it
            gives for single sequences, see `minirec_pl.policy.language_models.model_support`.
    """
    states = completion_states(model, input_ids, attention_mask, completion_ids, completion_mask)
    return token_logps(model, states, completion_ids, completion_mask, temperature)


def completion_states(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    prompt: Prompt | None = None,
) -> Tensor:
    """The last hidden states that produce the tokens of completions, float [B, G, L, D], from one pass.

    Args and exceptions are those of `completion_logps`, as is what the completions of a group share; `prompt` is that
    of the same prompts, where they have been run already.
    """
    tokens, mask = completion_ids.flatten(0, 1), completion_mask.bool().flatten(0, 1)
    check_padding(attention_mask)
    check_support(model, cache=False)
    most = completion_mask.sum(dim=-1).amax(dim=-1)
    position_rules(decoder_of(model)).check(attention_mask.sum(dim=1), most, "prompt {} of the batch".format)
    with cache_under_checkpointing(model) as reaches:
        group, attention_mask = completion_ids.shape[1], attention_mask.to(torch.int64)
        if prompt is None and reaches and support_of(model).cache is None:
            prompt = run_prompts(body_of(model), input_ids, attention_mask)
        if prompt is not None and prompt.cache.layers:
            states = _shared_states(prompt, tokens, mask, group)
        else:
            states = _separate_states(body_of(model), input_ids, attention_mask, tokens, mask, group)
    return states.view(*completion_ids.shape, -1)


def token_logps(model: Any, states: Tensor, tokens: Tensor, mask: Tensor, temperature: float = 1.0) -> TokenLogps:
    """As `completion_logps`, from the states [..., D] that produce the tokens int64 [...]."""
    active = mask.bool().flatten().nonzero().flatten()
    states, targets = states.flatten(0, -2).index_select(0, active), tokens.flatten().index_select(0, active)
    logps, entropy = head_logps(head_of(model), states, targets, temperature)
    return TokenLogps(
        *(values.new_zeros(mask.numel()).index_copy(0, active, values).view(mask.shape) for values in (logps, entropy))
    )


def _shared_states(prompt: Prompt, tokens: Tensor, mask: Tensor, group: int) -> Tensor:
    """The states that produce the tokens, [R, L, D], from prompts run once each."""
    sample = torch.arange(len(prompt.states), device=tokens.device).repeat_interleave(group)
    first = prompt.states.index_select(0, sample)[:, None]
    fed = mask[:, 1:]
    if not fed.any():
        return first.expand(-1, tokens.shape[1], -1)

    def run(rows: Tensor) -> Tensor:
        width = max(1, int(fed[rows].sum(dim=1).max()))
        states = run_completions(prompt, sample[rows], tokens[rows, :width], fed[rows, :width])
        return torch.nn.functional.pad(states, (0, 0, 0, fed.shape[1] - width))

    return torch.cat([first, by_length(fed.sum(dim=1), run)], dim=1)


def _separate_states(
    body: Body, input_ids: Tensor, attention_mask: Tensor, tokens: Tensor, mask: Tensor, group: int
) -> Tensor:
    """As `_shared_states`, each completion after its own copy of the prompt."""
    both = torch.cat([attention_mask.repeat_interleave(group, dim=0), mask[:, :-1].to(torch.int64)], dim=1)
    states: Tensor = body(
        input_ids=torch.cat([input_ids.repeat_interleave(group, dim=0), tokens[:, :-1]], dim=1),
        attention_mask=both,
        position_ids=places(both),
        use_cache=False,
    ).last_hidden_state
    return states[:, -tokens.shape[1] :]


def head_logps(
    head: Head, states: Tensor, targets: Tensor, temperature: float = 1.0, tile: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Log-softmax of the head's logits / temperature at the targets, and the entropy of the distribution.

    The logits exist in tiles of some tokens by some of the vocabulary, small enough for the processor's cache. Only
    `states` are kept for backward, which computes each tile of the logits z again: with p = softmax(z / T) and g the
    gradient of a log-probability, that of its logits is g (onehot - p) / T.

    Args:
        head: of the model.
        states: float [N, D].
        targets: int64 [N].
        temperature: T.
        tile: tokens and vocabulary entries whose logits exist at once; chosen by the device if None.

    Returns:
        logps [N] in nats, differentiable in the states and the head; entropy [N] in nats, without gradient.

    Example:
        >>> head = Head(torch.eye(3))
        >>> logps, entropy = head_logps(head, torch.zeros(1, 3), torch.tensor([2]))
        >>> logps, entropy
        (tensor([-1.0986]), tensor([1.0986]))
    """
    if tile is None:
        entries = _TILE_ENTRIES if states.device.type == "cpu" else 16 * _TILE_ENTRIES
        tokens = min(max(1, len(states)), _TILE_TOKENS)
        tile = (tokens, -(-entries // tokens))
    divisor, softcap = head.over(temperature)
    result: tuple[Tensor, Tensor] = _HeadLogps.apply(  # type: ignore[no-untyped-call]
        states, head.weight, head.bias, targets, softcap, divisor, tile
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
        tile: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        head = Head(weight, bias, softcap)
        dtype = torch.promote_types(states.dtype, torch.float32)
        logps, norms, entropy = torch.empty(3, len(states), dtype=dtype, device=states.device).unbind()
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(states), tile[0]):
                rows = slice(start, start + tile[0])
                chosen, norms[rows], mean = _tiled_sums(head, states[rows], targets[rows], temperature, tile[1])
                logps[rows], entropy[rows] = chosen - norms[rows], norms[rows] - mean
        ctx.save_for_backward(states, weight, bias, targets, norms)
        ctx.softcap, ctx.temperature, ctx.tile = softcap, temperature, tile
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, norms = ctx.saved_tensors
        needed = zip((states, weight, bias), ctx.needs_input_grad, strict=False)
        grads = [torch.zeros_like(value, dtype=norms.dtype) if wanted else None for value, wanted in needed]
        active = grad_logps.nonzero().flatten()
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(active), ctx.tile[0]):
                rows = active[start : start + ctx.tile[0]]
                some = (states[rows], targets[rows], norms[rows], grad_logps[rows] / ctx.temperature)
                of_states = _tiled_grads(
                    Head(weight, bias, ctx.softcap), *some, ctx.temperature, ctx.tile[1], *grads[1:]
                )
                if grads[0] is not None:
                    grads[0][rows] = of_states
        values = (states, weight, bias)
        return (*(g if g is None else g.to(v.dtype) for g, v in zip(grads, values, strict=True)), *[None] * 4)


def _tiled_sums(
    head: Head, states: Tensor, targets: Tensor, temperature: float, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of z / T: the targets' entries, the logarithm of the sum of exponentials, and the mean under the softmax, [n]."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    chosen, total, moment = (torch.zeros(len(states), dtype=dtype, device=states.device) for _ in range(3))
    top = torch.full_like(chosen, -torch.inf)
    for tile, start in head.tiles(width):
        logits = tile.logits(states).div_(temperature)
        place = targets - start
        inside = (place >= 0) & (place < logits.shape[1])
        here = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        chosen, higher = torch.where(inside, here, chosen), torch.maximum(top, logits.amax(dim=1))
        shrink = (top - higher).exp_()
        mass = torch.sub(logits, higher[:, None]).exp_()
        total, top = total * shrink + mass.sum(dim=1), higher
        moment = moment * shrink + mass.mul_(logits).sum(dim=1)
    return chosen, total.log() + top, moment / total


def _tiled_grads(
    head: Head,
    states: Tensor,
    targets: Tensor,
    norms: Tensor,
    grads: Tensor,
    temperature: float,
    width: int,
    of_weight: Tensor | None,
    of_bias: Tensor | None,
) -> Tensor:
    """Adds to the gradients of weight and bias and returns that of the states [n, D].

    `norms` [n] are the log-sum-exps of z / T, `grads` [n] the gradients of the log-probabilities, divided by T.
    """
    wide = states.to(norms.dtype)
    of_states = torch.zeros_like(wide)
    for tile, start in head.tiles(width):
        grad = tile.logits(states)
        slope = None if tile.softcap is None else 1 - (grad / tile.softcap).square()
        grad = grad.div_(temperature).sub_(norms[:, None]).exp_().mul_(-grads[:, None])
        place = targets - start
        inside = ((place >= 0) & (place < grad.shape[1])).nonzero().flatten()
        grad[inside, place[inside]] += grads[inside]
        if slope is not None:
            grad.mul_(slope)
        of_states.addmm_(grad, tile.weight.to(grad.dtype))
        columns = slice(start, start + grad.shape[1])
        if of_weight is not None:
            of_weight[columns].addmm_(grad.T, wide)
        if of_bias is not None:
            of_bias[columns] += grad.sum(dim=0)
    return of_states
