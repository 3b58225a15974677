"""Signals of any module from its last linear layer: no method, no batch format and no loss of the user's is needed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from minirec_pl.selection.probes.gradients import HeadStep, head_signal
from minirec_pl.selection.signals import SampleSignals
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.modules import evaluation_mode
from minirec_pl.utils.protocols import accepts
from minirec_pl.utils.seeds import isolated_random_state

Forward: TypeAlias = Callable[[Any, Any], object] | int | str
Target: TypeAlias = Callable[[Any], Tensor] | int | str
Reward: TypeAlias = Callable[[Tensor, Tensor], Tensor]
SIGNALS = ("reward", "gradient", "embedding")
TARGETS = ("labels", "label", "targets", "target", "y")
_UNIMPLEMENTED = {
    f"{package}.module" for package in ("torch.nn.modules", "lightning.pytorch.core", "pytorch_lightning.core")
}
_COMPILED = "_orig_mod"  # torch.compile's name for what is inside
IGNORED = -100  # torch.nn.functional.cross_entropy's ignore_index


class HeadProbe:
    """Takes reward, gradient signal and embedding from the last linear layer z = W h + b of any LightningModule.

    One forward pass in evaluation mode without gradients; the layer's input and output are read by a hook that is gone
    afterwards. No `*_step` of the module is called, and its mode and all random numbers stay as they were.

    * Integer targets are classes, the loss l is the cross-entropy: u = dl/dh = W^T (softmax(z) - onehot(y)), reward =
      softmax(z)_y.
    * Float targets are values, l = mean_c (z_c - y_c)^2 over the C outputs: u = (2/C) W^T (z - y), reward =
      1 - l / (1 + l).
    * The embedding is e = h.

    A layer that is applied at several positions (h [B, T, D], targets [B, T]) gives the means over the positions; those
    whose class is -100 do not count, and there must be another.

    What a model does to the layer's output afterwards, a scale or a softcap of its logits, is not seen. Of a compiled
    module the original runs.

    Args:
        head: dotted name of the layer, as in `module.named_modules()`; without the `_orig_mod` of a compiled module.
        forward: what to run, `forward(module, batch)`; or the key or position of the batch that `module(...)` takes.
            None takes the first entry of a tuple. Of a mapping it takes what is not the target, by name: the keys that
            `module.forward` has parameters for, all of them where it has `**kwargs`, and the mapping itself where its
            one required parameter is called `batch`.
        target: `target(batch)`; or the key or position of the batch that holds the targets. None takes the second
            entry of a tuple, and of a mapping the one key out of labels, label, targets, target and y.
        reward: `reward(z, target) -> [B]` instead of the above, higher is easier; float.
        signals: which to take, out of reward, gradient and embedding.

    Raises:
        InputError: if `signals` names anything else or nothing.

    Example:
        >>> module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0]))
        >>> signals = HeadProbe(head="2", forward=0, target=1)(module, batch, torch.arange(5))
        >>> tuple(signals.rewards.shape), tuple(signals.gradient.shape), tuple(signals.embedding.shape)
        ((5, 1), (5, 8), (5, 8))
    """

    def __init__(
        self,
        head: str,
        forward: Forward | None = None,
        target: Target | None = None,
        reward: Reward | None = None,
        signals: Collection[str] = SIGNALS,
    ) -> None:
        if not signals or not set(signals) <= set(SIGNALS):
            raise InputError(f"signals is {list(signals)}: name some of {', '.join(SIGNALS)}")
        self.head = head
        self.forward = forward
        self.target = target
        self.reward = reward
        self.signals = frozenset(signals)

    def __call__(
        self, module: nn.Module, batch: Any, sample_id: Tensor, gradient: str = "first", gradient_space: str = "answer"
    ) -> SampleSignals:
        """Signals of one batch.

        Args:
            module: whose layer is read.
            batch: on the module's device, as `training_step` gets it.
            sample_id: [B] int64, of the batch's samples in their order.
            gradient: `first` for u as above; `hvp` for the published Hessian-vector product, see
                `minirec_pl.selection.probes.gradients.head_signal`, for classes at one position.
            gradient_space: `answer` only, the input of the layer.

        Returns:
            rewards [B, 1], gradient [B, D], embedding [B, D], float32; None for a signal that is not taken.

        Raises:
            InputError: if the layer is missing, not linear, not called or called twice, the targets do not fit it, it
                is not clear what `forward` takes, or another kind of gradient is asked for.
        """
        if gradient not in ("first", "hvp") or gradient_space != "answer":
            raise InputError(
                f"HeadProbe has no gradient={gradient!r} in the space {gradient_space!r}: set gradient to 'first' or "
                "'hvp' and gradient_space to 'answer' in MiniRecSelector"
            )
        head = self._layer(module)
        with isolated_random_state(), evaluation_mode(module), torch.no_grad():
            key = self._target_key(batch)
            hidden, output = self._run(module, head, batch, key)
            target = key(batch) if callable(key) else self._pick("target", key, batch)
            if not isinstance(target, Tensor):
                raise InputError(f"the target of HeadProbe is a {type(target).__name__}: let `target` give a tensor")
            hidden, output, target = hidden.float(), output.float(), target.to(output.device)
            if len(output) != len(sample_id):
                raise InputError(
                    f"'{self.head}' gives {len(output)} rows for a batch of {len(sample_id)} samples: HeadProbe needs "
                    "a row per sample, so keep every sample in collate_fn and run each once"
                )
            reward = None if self.reward is None else self.reward(output, target)
            if output.ndim > 2 and isinstance(batch, Mapping) and self.target is None:
                raise InputError(
                    f"'{self.head}' is called at {output.shape[1]} positions and the batch does not say whether its "
                    f"{key} are shifted by one: set HeadProbe's `target` to {key!r}, or to a function that shifts them"
                )
            if output.ndim == 2:
                hidden, output = hidden[:, None], output[:, None]
            with torch.autocast(output.device.type, enabled=False):
                own_reward, error, weight = self._measure(output, target)
                reward = own_reward if reward is None else reward
                signal = None
                if "gradient" in self.signals and gradient == "hvp":
                    signal = self._published(head, hidden, target)
                elif "gradient" in self.signals:
                    signal = (error * weight[..., None]).flatten(1, -2).sum(dim=1) @ head.weight.float()
                embedding = (hidden * weight[..., None]).flatten(1, -2).sum(dim=1)
        return SampleSignals(
            sample_id,
            rewards=reward.float()[:, None] if "reward" in self.signals else None,
            gradient=signal,
            embedding=embedding if "embedding" in self.signals else None,
        )

    def _layer(self, module: nn.Module) -> nn.Linear:
        layers = {_original_name(name): layer for name, layer in module.named_modules()}  # the inner one comes last
        linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        layer = layers.get(_original_name(self.head)) if self.head else None
        if not isinstance(layer, nn.Linear):
            what = "has no layer" if layer is None else f"has a {type(layer).__name__} as"
            raise InputError(
                f"{type(_original(module)).__name__} {what} '{self.head}': name its last nn.Linear as "
                f"HeadProbe(head=...), one of {', '.join(linear) or 'none here'}"
            )
        return layer

    def _run(self, module: nn.Module, head: nn.Linear, batch: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Input [B, ..., D] and output [B, ..., C] of the layer."""
        calls: list[tuple[Tensor, Tensor]] = []

        def note(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
            calls.append((args[0] if args else named["input"], output))

        hook = head.register_forward_hook(note, with_kwargs=True)
        try:
            with _uncompiled():
                if callable(self.forward):
                    self.forward(module, batch)
                else:
                    args, named = self._arguments(module, batch, target)
                    module(*args, **named)
        finally:
            hook.remove()
        if len(calls) != 1:
            raise InputError(
                f"'{self.head}' was called {len(calls)} times in the forward pass: HeadProbe needs a layer that is "
                "called once, so name another or let `forward` run only the part that calls it once"
            )
        return calls[0]

    def _target_key(self, batch: Any) -> Any:
        """Function, key or position of the targets."""
        if self.target is not None or not isinstance(batch, Mapping):
            return 1 if self.target is None else self.target
        found = [key for key in TARGETS if key in batch]
        if len(found) != 1:
            raise InputError(
                f"the batch has the keys {', '.join(map(str, batch))}, {len(found) or 'none'} of them out of "
                f"{', '.join(TARGETS)}: set HeadProbe's `target` to the key of the targets"
            )
        return found[0]

    def _arguments(self, module: nn.Module, batch: Any, target: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `module(...)` is called with."""
        original = _original(module)
        forward = original.forward
        if getattr(forward, "__module__", None) in _UNIMPLEMENTED:
            raise InputError(
                f"{type(original).__name__} has no forward: say what is run with "
                "HeadProbe(forward=lambda module, batch: ...)"
            )
        parameters = _parameters(forward)
        required = [name for name, one in parameters.items() if one.default is one.empty and not _is_rest(one)]
        if self.forward is not None or not isinstance(batch, Mapping):
            key = 0 if self.forward is None else self.forward
            value = self._pick("forward", key, batch)
            if accepts(forward, value):
                return (value,), {}
            named = {str(key): value} if key in parameters else dict.fromkeys(required, value)
            if len(named) == 1 and accepts(forward, **named):
                return (), named
        elif required == ["batch"] and "batch" not in batch:
            return (batch,), {}
        else:
            whole = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
            wanted = {key for key in batch if key in required or (key != target and (whole or key in parameters))}
            named = {key: value for key, value in batch.items() if isinstance(key, str) and key in wanted}
            if named and accepts(forward, **named):
                return (), named
        held = f"the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "no names"
        raise InputError(
            f"{type(original).__name__}.forward takes {', '.join(parameters)} and the batch has {held}: say "
            "what is run with HeadProbe(forward=lambda module, batch: ...)"
        )

    def _pick(self, name: str, key: Any, batch: Any) -> Any:
        try:
            if isinstance(key, str) and not isinstance(batch, Mapping) and hasattr(batch, key):
                return getattr(batch, key)
            return batch[key]
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"the batch, a {type(batch).__name__}, has no {key!r}: set HeadProbe's `{name}` to a key or position "
                "of it, or to a function of it"
            ) from error

    def _measure(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reward [B], dl/dz [B, T, C] at each position, weight [B, T] of each position in the mean)."""
        classes = not target.is_floating_point()
        wanted = output.shape[:-1] if classes else output.shape
        if target.numel() != wanted.numel():
            raise InputError(
                f"'{self.head}' gives {list(output.squeeze(1).shape)} and the targets are {list(target.shape)} "
                f"{target.dtype}: HeadProbe needs a class (integer) per row or a value (float) per output"
            )
        target = target.reshape(wanted)
        if not classes:
            error = output - target.to(output.dtype)
            loss = error.square().flatten(1).mean(dim=1)
            weight = torch.full_like(output[..., 0], 1.0 / output.shape[1:-1].numel())
            return 1.0 - loss / (1.0 + loss), 2.0 * error / output.shape[-1], weight
        known = target != IGNORED
        lost = (known & ((target < 0) | (target >= output.shape[-1]))).any() or not known.flatten(1).any(dim=1).all()
        if output.shape[-1] < 2 or lost:
            raise InputError(
                f"'{self.head}' has {output.shape[-1]} outputs and the targets lie in {int(target.min())}.."
                f"{int(target.max())}: HeadProbe needs an output for each class and a class for each sample; for a "
                "single value per sample, let `target` give floats"
            )
        chosen = target.where(known, 0).long()[..., None]
        p = output.softmax(dim=-1)
        weight = known.to(p.dtype) / known.flatten(1).sum(dim=1).view(-1, *[1] * (known.ndim - 1))
        reward = (p.gather(-1, chosen)[..., 0] * weight).flatten(1).sum(dim=1)
        return reward, p.scatter_add(-1, chosen, -torch.ones_like(chosen, dtype=p.dtype)), weight

    def _published(self, head: nn.Linear, hidden: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point() or hidden.shape[1:-1].numel() != 1:
            raise InputError(
                "the Hessian-vector product needs one class per sample: use MiniRecSelector(gradient='first')"
            )
        bias = None if head.bias is None else head.bias.detach()
        step = HeadStep(hidden.flatten(1), head.weight.detach(), target.reshape(-1).long(), None, bias)
        return head_signal([step], "hvp")[0]


def _original(module: nn.Module) -> nn.Module:
    """The module inside a compiled one."""
    while isinstance(inside := getattr(module, _COMPILED, None), nn.Module):
        module = inside
    return module


def _original_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _uncompiled() -> AbstractContextManager[Any]:
    """Runs the original of what is compiled: a compiled graph does not see a new hook."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (ValueError, TypeError):
        return {}


def _is_rest(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
