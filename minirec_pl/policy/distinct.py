"""Groups of different items: exact sampling without replacement."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from minirec_pl.policy.item_id_generator import ItemIdGenerator
from minirec_pl.policy.language_models.causal_lm import head_of
from minirec_pl.policy.language_models.sampling import Prompt, Rollouts
from minirec_pl.policy.trie import child_logps
from minirec_pl.utils.errors import InputError

_NEVER = -1e30  # log-probabilities below it stand for children that are not allowed


@torch.no_grad()
def sample_distinct(
    policy: ItemIdGenerator,
    prompt: Prompt,
    batch: Mapping[str, Tensor],
    num_generations: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Rollouts:
    """Draws G different items per prompt, one after the other from what is left, by stochastic beam search.

    The G items with the largest log p(item) + Gumbel noise are such a sample (Gumbel top-k); the beam search finds them
    without scoring the whole catalogue (arXiv 1903.06059): a node's key is the largest key below it, so the children's
    keys are drawn conditional on that maximum, and no item outside the G best nodes of a level can be among the G best.
    With ids of one token it is Gumbel top-k over all items. Needs the policy's unfiltered probabilities.

    Args:
        policy: in evaluation mode.
        prompt: from `run_prompt`.
        batch: with `seen` [B, S] and `sample_id` [B].
        num_generations: G.
        generator: the random numbers.
        temperature: divides the logits.

    Returns:
        Rollouts in descending order of their keys; the log-probabilities are those of the single items.

    Raises:
        InputError: if fewer than G items are left to a prompt, naming the sample.
    """
    trie, head, seen = policy.trie, head_of(policy.model), batch["seen"]
    counts = trie.available_below(seen)
    _check_left(counts[:, -1], batch["sample_id"], num_generations)
    # One beam, the root, whose key may have any value: the order of the keys below does not depend on their largest.
    keys = torch.zeros(len(seen), 1, dtype=torch.float64, device=seen.device)
    logps, steps = keys, keys[:, :, None][:, :, :0]
    low = torch.zeros_like(keys, dtype=torch.int64)
    high = low + trie.n_items
    for depth in range(trie.depth):
        beams = keys.shape[1]
        inside = trie.order[low]  # an item below each node
        if depth == 0:
            states, ended = prompt.states[:, None], torch.zeros_like(low, dtype=torch.bool)
        else:
            states = policy.completion_states(prompt, inside).rest[:, :, depth - 1]
            ended = trie.child_of[inside, depth] < 0
        rows = (low.flatten(), high.flatten(), counts.repeat_interleave(beams, dim=0))
        step = child_logps(head, trie, states.flatten(0, 1), depth, *rows, temperature).double().view(*low.shape, -1)
        if bool(step.isnan().any()):
            raise InputError(
                "the policy's probabilities are NaN: its weights have diverged, so lower the learning rate"
            )
        step = step.masked_fill((step < _NEVER) | ended[:, :, None], -torch.inf)
        _, lows, highs = trie.level(depth)
        # The last column keeps a beam that has ended.
        step = torch.cat([step, torch.where(ended, 0.0, -torch.inf)[:, :, None]], dim=2)
        below = torch.cat(
            [_keys_below(keys, logps, step[:, :, :-1], generator), (keys + step[:, :, -1])[:, :, None]], 2
        )
        keys, pick = below.flatten(1).topk(min(num_generations, below[0].numel()), dim=1)
        beam, child = pick // step.shape[2], pick % step.shape[2]
        taken = step.flatten(1).gather(1, pick)
        logps = logps.gather(1, beam) + taken
        steps = torch.cat([steps.gather(1, beam[:, :, None].expand(-1, -1, depth)), taken[:, :, None]], dim=2)
        on = child < step.shape[2] - 1
        child = child.clamp(max=step.shape[2] - 2)
        low = torch.where(on, lows[child], low.gather(1, beam))
        high = torch.where(on, highs[child], high.gather(1, beam))
    items = trie.order[low]
    return Rollouts(items, steps.float(), trie.child_of[items] >= 0)


def _check_left(left: Tensor, sample_ids: Tensor, num_generations: int) -> None:
    short = (left < num_generations).nonzero().flatten()
    if len(short):
        raise InputError(
            f"num_generations is {num_generations} but sample_id {int(sample_ids[short[0]])} has only "
            f"{int(left[short[0]])} items left to draw: lower it, or set distinct_rollouts to false"
        )


def _keys_below(keys: Tensor, logps: Tensor, step: Tensor, generator: torch.Generator) -> Tensor:
    """Keys of the children of nodes, drawn such that the largest of a node's children has the node's key.

    Args:
        keys: float64 [B, K] of the nodes.
        logps: float64 [B, K], log-probabilities of the nodes.
        step: float64 [B, K, C], those of the children given the node, -inf where there is no such child.
        generator: the random numbers.

    Returns:
        float64 [B, K, C], -inf where there is no child.
    """
    noise = torch.empty_like(step).exponential_(generator=generator).clamp(min=torch.finfo(step.dtype).tiny)
    free = logps[:, :, None] + step - noise.log()
    gap = free - free.amax(dim=2, keepdim=True)
    v = keys[:, :, None] - free + torch.log1p(-gap.exp())
    bound = keys[:, :, None] - v.clamp(min=0) - torch.log1p((-v.abs()).exp())
    return bound.masked_fill(step.isneginf() | keys.isneginf()[:, :, None], -torch.inf)
