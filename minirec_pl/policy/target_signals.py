"""How gradient signals are taken from a policy: on its small head in closed form, or on its trainable parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minirec_pl.policy.item_id_generator import ItemIdGenerator
from minirec_pl.policy.language_models.causal_lm import body_of, head_of
from minirec_pl.policy.language_models.sampling import CompletionStates
from minirec_pl.selection.probes.gradients import GradientKind, GradientSpace, HeadStep, head_signal
from minirec_pl.selection.probes.per_sample import PROJECTED_SIZE, per_sample_gradients, project_gradients
from minirec_pl.selection.probes.trajectory import Trajectory, gradient_alignment, head_alignment
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.modules import evaluation_mode

_TOKENS = 1024  # tokens through a backward pass at a time
_VALUES = 2**26  # values of per-sample gradients at a time


class TargetSignals(NamedTuple):
    """What `target_signals` returns, all detached.

    Attributes:
        gradient: float32 [B, D], or [B, 512] in the space `lora`.
        logp: float32 [B], log of the exact solve probability; -inf where the target cannot be generated.
        alignment: float32 [B] in [-1, 1] for `trajectory` once training has moved, else None.
        tokens: tokens that went through the model again, forward and backward; 0 in the space `answer`.
    """

    gradient: Tensor
    logp: Tensor
    alignment: Tensor | None
    tokens: int


def target_signals(
    policy: ItemIdGenerator,
    states: CompletionStates,
    batch: Mapping[str, Tensor],
    temperature: float,
    gradient: GradientKind,
    space: GradientSpace,
    trajectory: Trajectory,
) -> TargetSignals:
    """Gradient signal of each sample for the exact solve probability p of its target.

    In the space `answer` it is taken at the hidden states that produce the target, in closed form (see
    `probes.gradients`): `first` -dp/dh, `hvp` the published Hessian-vector product. In the space `lora` it is
    -dp/dtheta by the trainable parameters theta (adapters, or whatever is trained), sample by sample through the whole
    model, projected to 512 values.

    `trajectory` has the gradient of `first` and, once training has moved, beside it the alignment a =
    cos(d log p / dtheta, theta - theta_start), theta_start being the parameters when it was first asked for: the weight
    of the head in the space `answer`, the trainable parameters in the space `lora` (before the projection).

    Args:
        policy: the policy.
        states: of the targets as completions, [B, 1].
        batch: `history`, `seen` and `target`.
        temperature: divides the logits.
        gradient: which signal.
        space: where it is taken.
        trajectory: remembers theta_start from one call to the next.

    Raises:
        InputError: if `gradient` is hvp in the space `lora`, or nothing that could be followed is trained.
    """
    steps = target_steps(policy, states, batch, temperature)
    signal, logp = head_signal(steps, "hvp" if gradient == "hvp" else "first")
    if space == "lora":
        if gradient == "hvp":
            raise InputError(
                "gradient='hvp' needs a second backward pass through the model in the space 'lora': set gradient_space="
                "'answer', or gradient='first'"
            )
        return _on_parameters(policy, batch, steps, logp, temperature, trajectory if gradient == "trajectory" else None)
    alignment = None
    if gradient == "trajectory":
        head = head_of(policy.model).weight
        if not head.requires_grad:
            raise InputError(
                "gradient='trajectory' follows the weight of the head, which is not trained here: set gradient_space="
                "'lora' to follow the adapters"
            )
        moved = trajectory.displacement({"head": head})
        if moved is not None:
            rows = [policy.trie.level(depth)[0] for depth in range(policy.id_length)]
            alignment = head_alignment(steps, rows, moved["head"])
    return TargetSignals(signal.float(), logp, alignment, 0)


def target_steps(
    policy: ItemIdGenerator, states: CompletionStates, batch: Mapping[str, Tensor], temperature: float
) -> list[HeadStep]:
    """The choices, one for each token of the longest id, that lead to the target of each sample.

    Args:
        policy: the policy.
        states: of the targets as completions, [B, 1].
        batch: `seen` and `target`.
        temperature: divides the logits.
    """
    trie, target, head = policy.trie, batch["target"], head_of(policy.model)
    divisor, softcap = head.over(temperature)
    counts = trie.available_below(batch["seen"])
    low = torch.zeros_like(target)
    high = low + trie.n_items
    steps = []
    for depth, hidden in enumerate([states.prompt, *states.rest[:, 0].unbind(dim=1)]):
        tokens, lows, highs = trie.level(depth)
        child = trie.child_of[target, depth]
        allowed = trie.allowed_children(depth, low, high, counts)
        bias = None if head.bias is None else head.bias.detach().index_select(0, tokens)
        vectors = head.weight.detach().index_select(0, tokens)
        steps.append(HeadStep(hidden, vectors, child, allowed, bias, divisor, softcap=softcap))
        low, high = lows[child.clamp(min=0)], highs[child.clamp(min=0)]
    return steps


class _TargetLogp(nn.Module):
    """Log p of one sample's target, from its prompt and the known tokens of its id."""

    def __init__(self, policy: ItemIdGenerator, temperature: float) -> None:
        super().__init__()
        self.policy = policy
        self.temperature = temperature

    def forward(self, tokens: Tensor, child: Tensor, *allowed: Tensor) -> Tensor:
        """Scalar, of tokens int64 [T + L - 1], child int64 [L] and allowed bool [V] for each of L choices."""
        body, head = body_of(self.policy.model), head_of(self.policy.model)
        states = body(input_ids=tokens[None], use_cache=False).last_hidden_state[0, -len(allowed) :]
        parts = []
        for depth, mask in enumerate(allowed):
            logits = head.logits(states[depth], self.policy.trie.level(depth)[0])
            logits = (logits / self.temperature).masked_fill(~mask, torch.finfo(logits.dtype).min)
            parts.append(logits.log_softmax(dim=0).gather(0, child[depth, None]))
        return torch.cat(parts).sum()


def _on_parameters(
    policy: ItemIdGenerator,
    batch: Mapping[str, Tensor],
    steps: list[HeadStep],
    logp: Tensor,
    temperature: float,
    trajectory: Trajectory | None,
) -> TargetSignals:
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    if not trained:
        raise InputError("gradient_space='lora' is of the trainable parameters, and the policy has none: unfreeze some")
    moved = None if trajectory is None else trajectory.displacement(trained)
    function = _TargetLogp(policy, temperature)

    places = _places(function, trained)

    def target_logp(parameters: dict[str, Tensor], *row: Tensor) -> Tensor:
        renamed = {place: parameters[name] for place, name in places.items()}
        value: Tensor = torch.func.functional_call(function, renamed, row, tie_weights=False)
        return value

    signal = logp.new_zeros(len(logp), PROJECTED_SIZE)
    alignment = None if moved is None else logp.new_zeros(len(logp))
    spent = 0
    with evaluation_mode(policy), sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the CPU's flash attention
        for rows, tokens, length in _equal_lengths(policy, batch, sum(p.numel() for p in trained.values())):
            child = torch.stack([step.target[rows] for step in steps[:length]], dim=1)
            allowed = [step.allowed[rows] for step in steps[:length] if step.allowed is not None]
            slopes = per_sample_gradients(target_logp, trained, tokens, child, *allowed)
            signal[rows] = -logp[rows].exp()[:, None] * project_gradients(slopes).to(signal.dtype)
            if alignment is not None and moved is not None:
                alignment[rows] = gradient_alignment(slopes, moved).to(alignment.dtype)
            spent += tokens.numel()
    if alignment is not None:
        alignment = alignment.masked_fill(logp.isneginf(), 0.0)
    return TargetSignals(signal.float(), logp, alignment, spent)


def _places(module: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, str]:
    """The name in `trained` of each place of the module that holds one of these parameters.

    A parameter may be in several modules (tied embeddings), and a module in several others (peft's rows of new
    tokens): that one is named once, since `functional_call` would not put its parameter back where it is named twice.
    """
    names = {id(parameter): name for name, parameter in trained.items()}
    return {
        f"{path}.{attribute}": names[id(parameter)]
        for path, part in module.named_modules()
        for attribute, parameter in part._parameters.items()
        if id(parameter) in names
    }


def _equal_lengths(
    policy: ItemIdGenerator, batch: Mapping[str, Tensor], values: int
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Samples whose prompts and ids are of one length: (rows, unpadded tokens with the id but for its last, L)."""
    encoded = policy.encode(batch)
    prompts, mask = encoded.input_ids[encoded.row], encoded.mask[encoded.row]
    ids = policy.trie.item_tokens[batch["target"]]
    lengths = torch.stack([mask.sum(dim=1), (ids >= 0).sum(dim=1)], dim=1)
    alike = defaultdict(list)
    for row, pair in enumerate(lengths.tolist()):
        alike[tuple(pair)].append(row)
    for (prompt, length), members in sorted(alike.items()):
        most = max(1, min(_TOKENS // (prompt + length - 1), _VALUES // values))
        for rows in torch.split(torch.tensor(members, device=ids.device), most):
            tokens = torch.cat([prompts[rows, prompts.shape[1] - prompt :], ids[rows, : length - 1]], dim=1)
            yield rows, tokens, length
