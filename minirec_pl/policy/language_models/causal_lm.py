"""A causal language model taken apart into transformer and head; prompts run once, completions run on their cache."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from minirec_pl.policy.language_models.kv_cache import branch_cache, join_prompts, recording_cache
from minirec_pl.policy.language_models.model_config import text_config
from minirec_pl.policy.language_models.positions import PositionRules, position_rules
from minirec_pl.policy.language_models.sampling import Prompt, check_probabilities
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.modules import evaluation_mode

_MAX_PADDING = 0.2  # of the tokens of a bucket
_FEW_ROWS = 96
_LONG_HEAD = 2**14


class Head(NamedTuple):
    """The linear layer over the vocabulary, and what the model does to its product z.

    Attributes:
        weight: float [V, D].
        bias: float [V], or None.
        softcap: c if the logits are c tanh(s z / c) (Gemma 2), else None.
        scale: s, above 0; the logits are s z without a softcap (Granite, Cohere).
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, states: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits of `states` [..., D] before any temperature: [..., V], or [..., n] of `tokens` int64 [n].

        Their dtype is float32 or the wider one of `states`.
        """
        weight, bias = self.weight, self.bias
        if tokens is not None:
            weight, bias = weight.index_select(0, tokens), None if bias is None else bias.index_select(0, tokens)
        logits = _few_rows(states.to(weight.dtype), weight, bias)
        return self._shaped(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def _shaped(self, product: Tensor) -> Tensor:
        logits = product if self.scale == 1.0 else product * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def tiles(self, width: int) -> Iterator[tuple[Head, int]]:
        """Heads over `width` neighbouring entries of the vocabulary each, with the first entry's id."""
        for start in range(0, len(self.weight), width):
            part = slice(start, start + width)
            bias = None if self.bias is None else self.bias[part]
            yield Head(self.weight[part], bias, self.softcap, self.scale), start

    def over(self, temperature: float) -> tuple[float, float | None]:
        """(t, c) so that the logits divided by a temperature are c tanh(z / c) / t, or z / t where c is None."""
        return temperature / self.scale, None if self.softcap is None else self.softcap / self.scale


def _few_rows(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer; a processor's product of few rows with a long head is up to 3 times as fast from the left."""
    rows = states.numel() // states.shape[-1]
    if weight.device.type != "cpu" or rows > _FEW_ROWS or len(weight) < _LONG_HEAD:
        return nn.functional.linear(states, weight, bias)
    product = torch.mm(weight, states.reshape(rows, states.shape[-1]).t()).t().contiguous()
    product = product.view(*states.shape[:-1], len(weight))
    return product if bias is None else product + bias


def without_adapter_wrapper(model: Any) -> Any:
    """The model of transformers inside a model of peft, its adapters in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: Any) -> nn.Module:
    """The transformer over text under the head of a causal language model, also inside peft or a composite model."""
    causal = without_adapter_wrapper(model)
    composite = text_config(causal) is not causal.config
    decoder: nn.Module = causal.get_decoder() if composite else causal.base_model
    # A composite model may hold a causal one, and some models have no attribute under the name of their base.
    while decoder.get_output_embeddings() is not None:  # type: ignore[operator]
        inner: Any = decoder.base_model
        decoder = inner if inner is not decoder else _inner_transformer(decoder)
    return decoder


def _inner_transformer(causal: nn.Module) -> nn.Module:
    from transformers import PreTrainedModel

    for part in causal.children():
        if isinstance(part, PreTrainedModel):
            return part
    raise InputError(f"{type(causal).__name__} has no transformer under its head: take a causal model, such as llama")


def head_of(model: Any) -> Head:
    """The head of a causal language model of transformers, also inside peft; see `body_of` on half precision.

    What the model does to the product of its head is found out once, by a pass over states that are put in place of
    those of the transformer.

    Raises:
        InputError: if the model has no linear head, a LoRA adapter sits on it, or the logits are neither its product
            nor that product scaled and capped as the model's config says.
    """
    causal = without_adapter_wrapper(model)
    layer = causal.get_output_embeddings()
    if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
        raise InputError(f"{type(causal).__name__} has no linear head over its vocabulary: take a causal model")
    if hasattr(layer, "lora_A"):
        raise InputError("a LoRA adapter on the head is not supported: leave lm_head out of target_modules")
    weight, bias = layer.weight, getattr(layer, "bias", None)
    coarse = weight.dtype.itemsize < 4
    if _lacks_arithmetic(weight):
        weight, bias = weight.float(), None if bias is None else bias.float()
    if causal not in _SHAPES:
        plain = Head(weight.detach(), None if bias is None else bias.detach())
        _SHAPES[causal] = _shape_of(causal, plain, 3e-2 if coarse else 1e-4)
    return Head(weight, bias, *_SHAPES[causal])


_SHAPES: WeakKeyDictionary[nn.Module, tuple[float | None, float]] = WeakKeyDictionary()
_PEAKS = (0.5, 5.0, 50.0, 500.0)  # largest product of each state that a head is tried with


def _shape_of(causal: Any, head: Head, tolerance: float) -> tuple[float | None, float]:
    """The softcap and the scale of a head, among those that the config may mean; `tolerance` is relative."""
    name = type(causal).__name__
    try:
        states, logits = _logits_of_states(causal, head)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name} cannot be a policy ({reason}): take a causal decoder such as llama") from error
    if logits is not None and logits.shape[-1] == len(head.weight):
        check_probabilities(logits)
        for softcap, scale in _shapes(text_config(causal).to_dict()):
            ours = head._replace(softcap=softcap, scale=scale).logits(states)
            widest = torch.maximum(ours.abs().amax(dim=-1), logits.abs().amax(dim=-1))[:, None]
            if bool(((ours - logits).abs() <= tolerance * widest).all()):
                return softcap, scale
    raise InputError(
        f"{name} changes the states or the logits around its head in a way that is not known here: take another "
        "model, such as llama"
    )


def _shapes(config: Mapping[str, Any]) -> list[tuple[float | None, float]]:
    """(softcap, scale) that numbers of a config may mean, those that change something first."""
    numbers = {key: float(value) for key, value in config.items() if type(value) in (int, float) and value > 0}
    caps = [value for key, value in numbers.items() if "logit" in key and "cap" in key]
    scales = [
        scale
        for key, value in numbers.items()
        if "cap" not in key and any(part in key for part in ("logit", "lm_head", "output_multiplier"))
        for scale in (value, 1.0 / value)
    ]
    if "dim_model_base" in numbers:  # MiniCPM divides its states by hidden_size / dim_model_base
        scales.append(numbers["dim_model_base"] / numbers["hidden_size"])
    return [(cap, scale) for cap in [*caps, None] for scale in [*scales, 1.0]]


def _logits_of_states(causal: Any, head: Head) -> tuple[Tensor, Tensor | None]:
    """States [n, D] whose products with the head are small to large, and what the model makes of them, [n, V]."""
    size, seeded = (len(_PEAKS), head.weight.shape[1]), torch.Generator().manual_seed(0)
    numbers = torch.randn(size, generator=seeded, dtype=torch.float32)
    states = numbers.to(head.weight.device, torch.promote_types(head.weight.dtype, torch.float32))
    largest = (states @ head.weight.to(states.dtype).T).abs().amax(dim=1, keepdim=True)
    peaks = torch.tensor(_PEAKS, device=states.device, dtype=states.dtype)[:, None]
    states = (states * peaks / largest.clamp(min=torch.finfo(states.dtype).tiny)).to(head.weight.dtype)
    put: list[nn.Module] = []

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        put.append(module)
        made = states[None].to(output[0].dtype)
        if isinstance(output, tuple):
            return (made, *output[1:])
        output.last_hidden_state = made
        return output

    tokens = torch.arange(len(_PEAKS), device=states.device)[None] % len(head.weight)
    places = {causal.base_model, decoder_of(causal), causal.get_decoder()}
    hooks = [place.register_forward_hook(replace) for place in places if place is not causal]
    try:
        with evaluation_mode(causal):
            given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            logits: Tensor = widened(causal)(**given, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return states, logits[0].to(torch.promote_types(logits.dtype, torch.float32)) if put else None


@dataclass(frozen=True)
class Body:
    """The transformer under a head; takes the keywords of its forward and returns a `last_hidden_state`.

    Attributes:
        run: the transformer's forward.
        rules: of its positions, kept in every pass.
        names: keywords that it takes; None for any.
    """

    run: Callable[..., Any]
    rules: PositionRules
    names: frozenset[str] | None = None

    def __call__(self, **inputs: Any) -> Any:
        """One pass."""
        if self.names is not None and "position_ids" not in self.names:
            inputs.pop("position_ids", None)  # its positions follow from the mask
        with self.rules.each_row_by_itself():
            return self.run(**inputs)


def body_of(model: Any) -> Body:
    """The transformer under the head; takes the keywords of its forward and returns a `last_hidden_state`.

    Where the processor cannot compute in bfloat16, the weights are widened to float32, differentiably and for as long
    as the result lives: products in bfloat16 would be emulated there at a tenth of the speed or less. With gradient
    checkpointing at work they stay as they are, since a layer that recomputes looks for its own weights.

    Without gradient, LoRA adapters on layers that compute in float32 on a processor are added to the weights, which
    saves two products a layer; nothing is added on other devices, in half precision or under autocast, where it would
    be rounded. The result keeps the weights of now: ask for another one after an optimizer step.

    In every pass a row's positions are those of its own length, see `PositionRules`.
    """
    body = decoder_of(model)
    rules, names = position_rules(body), _keywords(body)
    if recomputes(body):
        return Body(body, rules, names)
    apart = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    layers = {} if apart else _layers_to_merge(body)
    weights = {f"{name}.base_layer.weight": _merged_weight(layer) for name, layer in layers.items()}
    for path, part in body.named_modules():
        for attribute, parameter in part._parameters.items():
            name = f"{path}.{attribute}".removeprefix(".")
            if parameter is not None and name not in weights and _lacks_arithmetic(parameter):
                weights[name] = parameter.float()
    if not weights:
        return Body(body, rules, names)

    def run(**inputs: Any) -> Any:
        with _base_alone(layers.values()):
            # Layers that share a weight may have adapters of their own.
            return torch.func.functional_call(body, weights, kwargs=inputs, tie_weights=False)

    return Body(run, rules, names)


def _keywords(body: nn.Module) -> frozenset[str] | None:
    parameters = inspect.signature(body.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return frozenset(parameters)


def _layers_to_merge(body: nn.Module) -> dict[str, Any]:
    """Linear layers with plain LoRA adapters at work, by name."""
    adapted = {name: layer for name, layer in body.named_modules() if hasattr(layer, "lora_A")}
    return {name: layer for name, layer in adapted.items() if _mergeable(layer)}


def _mergeable(layer: Any) -> bool:
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear) or layer.disable_adapters or layer.merged:
        return False
    weight = base.weight
    if weight.device.type != "cpu" or not (weight.dtype == torch.float32 or _lacks_arithmetic(weight)):
        return False
    parts = [(layer.lora_dropout[name], layer.lora_B[name]) for name in _at_work(layer)]
    dropping = any(isinstance(dropout, nn.Dropout) and dropout.training for dropout, _ in parts)
    return not dropping and not layer.lora_variant and all(second.bias is None for _, second in parts)


def _at_work(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _merged_weight(layer: Any) -> Tensor:
    weight: Tensor = layer.get_base_layer().weight.detach().float()
    for name in _at_work(layer):
        weight = weight + layer.get_delta_weight(name)
    return weight


@contextmanager
def _base_alone(layers: Iterable[Any]) -> Iterator[None]:
    """Adapters left out of layers inside, without a change to what is trained."""
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def computes_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16.

    PyTorch also says that it supports them where AVX-512 emulates them, at a fifth of the speed of float32.
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widened(model: Any) -> Callable[..., Any]:
    """The forward of a whole model, with the weights widened as `body_of` does, for as long as the result lives."""
    weights = {name: parameter.float() for name, parameter in model.named_parameters() if _lacks_arithmetic(parameter)}
    if not weights:
        return model  # type: ignore[no-any-return]
    return lambda **inputs: torch.func.functional_call(model, weights, kwargs=inputs)


def _lacks_arithmetic(parameter: Tensor) -> bool:
    return parameter.dtype == torch.bfloat16 and parameter.device.type == "cpu" and not computes_bfloat16()


def recomputes(body: nn.Module) -> bool:
    """Whether gradient checkpointing is switched on and at work, which it is in training mode only."""
    return any(getattr(module, "gradient_checkpointing", False) and module.training for module in body.modules())


def same_in_training(model: Any) -> bool:
    """Whether a pass in training mode computes what one in evaluation mode does: nothing is dropped or recomputed."""
    body = decoder_of(model)
    dropping = any(
        isinstance(value, float) and value > 0 and (name == "p" or "drop" in name)
        for module in body.modules()
        for name, value in vars(module).items()
    )
    return not dropping and not recomputes(body)


@contextmanager
def cache_under_checkpointing(model: Any) -> Iterator[bool]:
    """Lets layers that recompute keep the caches of this module, which a second pass leaves as they are.

    Yields:
        Whether a cache reaches every layer inside; if not, prompts cannot be shared in a pass with gradients.
    """
    body = decoder_of(model)
    if not recomputes(body):
        yield True
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
    functions = [getattr(layer, "_gradient_checkpointing_func", None) for layer in layers]
    shared = bool(layers) and hasattr(GradientCheckpointingLayer, "_can_checkpoint_with_cache")
    shared &= all(getattr(function, "keywords", {}).get("use_reentrant") is False for function in functions)
    before = [vars(layer).get("_can_checkpoint_with_cache") for layer in layers]
    try:
        if shared:
            for layer in layers:
                layer._can_checkpoint_with_cache = True
        yield shared
    finally:
        for layer, value in zip(layers, before, strict=True):
            if shared and value is None:
                del layer._can_checkpoint_with_cache


def length_buckets(lengths: Tensor, most_tokens: int | None = None) -> list[Tensor]:
    """Rows of similar length, so that little of a padded batch is padding.

    Args:
        lengths: int64 [n], tokens of each row.
        most_tokens: of a bucket, padding included, unless a single row has more; None for any number.

    Returns:
        int64 [m] positions for each bucket, shortest rows first, ties in their order.

    Example:
        >>> length_buckets(torch.tensor([90, 10, 100, 11]))
        [tensor([1, 3]), tensor([0, 2])]
    """
    order = torch.argsort(lengths, stable=True)
    buckets: list[list[int]] = []
    total = 0
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        padded = length * (len(buckets[-1]) + 1) if buckets else 0
        too_many = most_tokens is not None and padded > most_tokens
        if not buckets or too_many or padded * (1 - _MAX_PADDING) > total + length:
            buckets.append([])
            total = 0
        buckets[-1].append(row)
        total += length
    return [torch.tensor(bucket, device=lengths.device) for bucket in buckets]


def by_length(lengths: Tensor, run: Callable[[Tensor], Tensor], most_tokens: int | None = None) -> Tensor:
    """What `run` makes of rows of similar length at a time, put back into the order of the batch.

    Args:
        lengths: int64 [n], tokens of each row; at least one row.
        run: of positions int64 [m] in the batch: a tensor [m, ...].
        most_tokens: see `length_buckets`.

    Returns:
        [n, ...].
    """
    buckets = length_buckets(lengths, most_tokens)
    made = torch.cat([run(rows) for rows in buckets])
    return made.index_select(0, torch.argsort(torch.cat(buckets)).to(made.device))


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Tokens int64 [n, T] of rows, padded on the left, and their mask int64 [n, T].

    Example:
        >>> pad_left([[7], [8, 9]], 0, "cpu")
        (tensor([[0, 7],
                [8, 9]]), tensor([[0, 1],
                [1, 1]]))
    """
    width = max(map(len, rows))
    tokens = torch.tensor([[*[pad] * (width - len(row)), *row] for row in rows], device=device)
    mask = torch.tensor([[*[0] * (width - len(row)), *[1] * len(row)] for row in rows], device=device)
    return tokens, mask


def places(mask: Tensor) -> Tensor:
    """Position of each token among the real ones of its row, from 0, int64 [n, T], of a mask [n, T]."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def run_prompt(
    body: Body, input_ids: Tensor, mask: Tensor, row: Tensor | None = None, keep_cache: bool = True
) -> Prompt:
    """Runs prompts that are padded on the left, in one batch.

    Args:
        body: from `body_of`.
        input_ids: int64 [U, T].
        mask: int64 [U, T], which tokens are real.
        row: int64 [B], which prompt belongs to each sample; each to its own if None.
        keep_cache: whether completions will follow.

    Raises:
        InputError: if a prompt breaks the rules of the model's positions.
    """
    body.rules.check(mask.sum(dim=1), 0, "prompt {} of the batch".format)
    cache = recording_cache() if keep_cache else None
    output = body(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=places(mask),
        past_key_values=cache,
        use_cache=keep_cache,
    )
    states = output.last_hidden_state[:, -1]
    if row is None:
        row = torch.arange(len(states), device=states.device)
        return Prompt(states, row, mask, cache, body)
    return Prompt(states.index_select(0, row), row, mask, cache, body)


def check_padding(mask: Tensor) -> None:
    """Refuses prompts whose last place is not one of their tokens, and a batch without prompts.

    Raises:
        InputError: naming the first such row of `mask` [B, T].
    """
    if not mask.numel():
        raise InputError("the batch has no prompts: give at least one sample")
    if not bool(mask[:, -1].all()):
        row = int((mask[:, -1] == 0).nonzero()[0])
        raise InputError(f"prompt {row} of the batch is empty or padded on the right: pad prompts on the left")


def run_prompts(
    body: Body, input_ids: Tensor, mask: Tensor, row: Tensor | None = None, keep_cache: bool = True
) -> Prompt:
    """As `run_prompt`, in batches of similar length.

    Raises:
        InputError: if a prompt is empty or padded on the right.
    """
    check_padding(mask)
    lengths = mask.sum(dim=1)
    longest, buckets = int(lengths.max()), length_buckets(lengths)
    input_ids, mask = input_ids[:, -longest:], mask[:, -longest:].to(torch.int64)
    if len(buckets) == 1:
        return run_prompt(body, input_ids, mask, row, keep_cache)
    starts = [longest - int(lengths[rows].max()) for rows in buckets]
    parts = [
        run_prompt(body, input_ids[rows, start:], mask[rows, start:], keep_cache=keep_cache)
        for rows, start in zip(buckets, starts, strict=True)
    ]
    order = torch.argsort(torch.cat(buckets))
    row = torch.arange(len(order), device=order.device) if row is None else row
    states = torch.cat([part.states for part in parts]).index_select(0, order[row])
    cache = join_prompts([part.cache for part in parts], order) if keep_cache else None
    return Prompt(states, row, mask, cache, body)


def run_completions(prompt: Prompt, sample: Tensor, tokens: Tensor, fed: Tensor) -> Tensor:
    """Runs completions on the caches of their prompts, differentiably.

    Args:
        prompt: of B samples.
        sample: int64 [R], the sample of each completion.
        tokens: int64 [R, L], padded on the right.
        fed: [R, L], which tokens are real.

    Returns:
        float [R, L, D], the last hidden states at `tokens`.

    Raises:
        InputError: if a prompt with its completion breaks the rules of the model's positions.
    """
    row = prompt.row.index_select(0, sample)
    prompt.body.rules.check(prompt.mask.sum(dim=1)[row], fed.sum(dim=1) + 1)
    mask = torch.cat([prompt.mask.index_select(0, row), fed.to(prompt.mask.dtype)], dim=1)
    states: Tensor = prompt.body(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=places(mask)[:, -tokens.shape[1] :],
        past_key_values=branch_cache(prompt.cache, row),
        use_cache=True,
    ).last_hidden_state
    return states
