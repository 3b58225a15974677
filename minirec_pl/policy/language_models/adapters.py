"""Low-rank adapters on the linear layers of a language model, and which of its layers carry them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from minirec_pl.policy.language_models.causal_lm import without_adapter_wrapper
from minirec_pl.utils.errors import InputError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OPTION = "--model.policy.language_model.lora"
ALL_LINEAR = "all-linear"

_OTHER_MODALITY = re.compile(r"(^|_)(vision|visual|image|img|audio|speech|video|multi_?modal|mm)(_|$)")
_INSIDE_ADAPTERS = ("lora_", "trainable_tokens_", "token_adapter")
_NO_EXPERTS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AdapterCoverage(NamedTuple):
    """Which linear layers of a text decoder carry adapters, as {kind: number of layers}.

    A kind is the last part of the layers' names, which `target_modules` takes. The fused weights of experts are no
    linear layers; theirs are called `experts.gate_up_proj` and the like. Embeddings, norms and the head are left out.

    Attributes:
        carried: with an adapter.
        missing: without one.
        fused: those of `missing` that are fused weights of experts, which no name of a layer reaches.
        routers: without an adapter on purpose: they choose the experts.
        unmatched: entries of `target_modules` that name no layer.
        all_linear: whether every linear layer was asked for.
    """

    carried: dict[str, int]
    missing: dict[str, int]
    fused: list[str]
    routers: dict[str, int]
    unmatched: list[str]
    all_linear: bool

    def sentence(self) -> str:
        """What is carried and what is not, and what to do about it."""
        text = f"adapters on {_listed(self.carried)}"
        if self.missing:
            text += f", none on {_listed(self.missing)}"
        if self.routers:
            text += f" (routers stay without: {', '.join(sorted(self.routers))})"
        if self.unmatched:
            text += f"; no layer is called {', '.join(self.unmatched)}, as {OPTION}.target_modules has it"
        if len(self.missing) > len(self.fused):
            text += (
                f"; peft takes names in {OPTION}.target_modules for the experts' fused weights, and passes these "
                "layers over"
                if self.all_linear
                else f"; for all linear layers set {OPTION}.target_modules to {ALL_LINEAR}"
            )
        if self.fused:
            text += (
                f"; {', '.join(self.fused)} are fused weights of experts, which target_modules {ALL_LINEAR} leaves out"
            )
        return text


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) on linear layers, through peft; everything else stays frozen.

    Only layers of the text decoder get adapters, since nothing else runs.

    Args:
        r: rank of the adapters, at least 1.
        alpha: the adapters' product is scaled by alpha / r.
        dropout: probability of dropping an input of an adapter, in training.
        target_modules: names of the layers, ends of the full names. `all-linear` takes every linear layer but the head
            and the routers of experts; any other text is a regular expression for the whole of a full name.
    """

    r: int = 4
    alpha: float = 128
    dropout: float = 0.05
    target_modules: list[str] | str = field(default_factory=lambda: list(PROJECTIONS))

    def adapt(self, model: Any, new_tokens: Sequence[int] = ()) -> Any:
        """The model with new adapters, which change nothing until they are trained.

        Args:
            model: a causal language model of transformers.
            new_tokens: tokens whose rows in the embedding and in the head are trained too.

        Raises:
            InputError: if `target_modules` names no layer of the model, or peft refuses an option.
        """
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        layers = _Layers.of(model)
        chosen = {name: module for name, module in model.named_modules() if self._names(name, layers)}
        inside = [name for name in chosen if layers.in_decoder(name)]
        reached = {name for name in chosen if name in inside or name == layers.head}
        # peft shortens an expression to the last parts of names in some models, so it gets the names.
        targets: Any = sorted(reached) if reached and isinstance(self.target_modules, str) else self.target_modules
        try:
            config = LoraConfig(
                r=self.r,
                lora_alpha=self.alpha,  # type: ignore[arg-type]
                lora_dropout=self.dropout,
                target_modules=targets,
                exclude_modules=sorted(chosen.keys() - reached) or None,
                trainable_token_indices=_rows_by_layer(model, new_tokens),
                fan_in_fan_out=bool(inside) and all(isinstance(chosen[name], Conv1D) for name in inside),
                task_type="CAUSAL_LM",
            )
            return get_peft_model(model, config)
        except ValueError as error:
            if inside:
                fix = f"fix {OPTION}"
                if "dropout" in str(error) and self.dropout:
                    fix = f"set {OPTION}.dropout to 0"
                raise InputError(f"lora is refused by peft ({' '.join(str(error).split())}): {fix}") from error
            given = self.target_modules if isinstance(self.target_modules, str) else ", ".join(self.target_modules)
            whole = next(iter(layers.linear), "")
            how = f" (a regular expression must match the whole of {whole})" if isinstance(targets, str) else ""
            raise InputError(
                f"{OPTION}.target_modules ({given}) names no linear layer of {type(model).__name__}{how}: give some of "
                f"{', '.join(sorted({_kind(name) for name in layers.linear}))}, or {ALL_LINEAR}"
            ) from error

    @property
    def all_linear(self) -> bool:
        """Whether every linear layer is to carry adapters."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def _names(self, name: str, layers: _Layers) -> bool:
        """Whether a module is named by `target_modules`."""
        if self.all_linear:
            return name in layers.linear
        if isinstance(self.target_modules, str):
            try:
                return bool(name) and re.fullmatch(self.target_modules, name) is not None
            except re.error as error:
                raise InputError(
                    f"{OPTION}.target_modules is not a regular expression ({error}): give a list of names, "
                    f"{ALL_LINEAR} or a regular expression"
                ) from error
        return any(_ends_with(name, target) for target in self.target_modules)

    def coverage(self, model: Any) -> AdapterCoverage:
        """Which layers of a model that `adapt` made carry adapters."""
        layers, config = _Layers.of(model), model.peft_config["default"]
        names = [] if isinstance(self.target_modules, str) else self.target_modules
        # Older names of layers that are fused now stand for the fused weights in peft.
        meant = set(config.target_modules or []) if config.target_parameters else set(names)
        unmatched = [
            name for name in names if name in meant and not any(_ends_with(layer, name) for layer in layers.modules)
        ]
        return adapter_coverage(model)._replace(unmatched=unmatched, all_linear=self.all_linear)


def adapter_coverage(model: Any) -> AdapterCoverage:
    """Which linear layers of a model's text decoder carry adapters.

    Args:
        model: a causal language model of transformers, with adapters or without; on any device, the meta device too.
    """
    layers = _Layers.of(model)
    every = [*layers.linear, *layers.fused]
    return AdapterCoverage(
        _kinds(name for name in every if name in layers.adapted),
        _kinds(name for name in every if name not in layers.adapted),
        sorted({_kind(name) for name in layers.fused if name not in layers.adapted}),
        _kinds(name for name in layers.routers if name not in layers.adapted),
        unmatched=[],
        all_linear=False,
    )


@dataclass(frozen=True)
class _Layers:
    """The layers of a model by their names without adapters.

    Attributes:
        decoder: name of the module that holds the text decoder.
        head: name of the layer over the vocabulary.
        modules: names of all modules of the decoder, and of the head.
        linear: its linear layers, without routers and head.
        fused: its weights of experts that are not linear layers.
        routers: its layers that choose experts.
        adapted: those of all of them that carry adapters.
    """

    decoder: str
    head: str
    modules: list[str]
    linear: list[str]
    fused: list[str]
    routers: list[str]
    adapted: set[str]

    @classmethod
    def of(cls, model: Any) -> _Layers:
        causal = without_adapter_wrapper(model)
        wrapped, modules, adapted = dict(causal.named_modules()), dict[str, nn.Module](), set[str]()
        for name, module in wrapped.items():
            if any(part.startswith(_INSIDE_ADAPTERS) for part in name.split(".")):
                continue
            plain = _plain(name)
            if hasattr(module, "lora_A"):
                parameter = getattr(module, "parameter_name", None)
                adapted.add(plain if parameter is None else _parameter(plain, parameter))
            modules[plain] = module
        ends = (causal.get_input_embeddings(), causal.get_output_embeddings())
        embedding, head = (next((name for name, module in wrapped.items() if module is end), "") for end in ends)
        layers = cls(_decoder_of(embedding, modules), head, [], [], [], [], adapted)
        for name, module in modules.items():
            is_head = bool(head) and _is_in(name, head)
            if is_head or layers.in_decoder(name):
                layers.modules.append(name)
            if is_head or not layers.in_decoder(name):
                continue
            if _is_router(name, module, modules):
                layers.routers.append(name)
            elif _is_linear(module):
                layers.linear.append(name)
            else:
                layers.fused.extend(_parameter(name, parameter) for parameter in _expert_weights(name, module))
        return layers

    def in_decoder(self, name: str) -> bool:
        """Whether a module belongs to the text decoder and to no tower of another modality inside."""
        if not _is_in(name, self.decoder):
            return False
        return not any(_OTHER_MODALITY.search(part) for part in name[len(self.decoder) :].split("."))


def _decoder_of(embedding: str, modules: Mapping[str, nn.Module]) -> str:
    """The smallest module around the input embedding that has linear layers."""
    place = embedding
    while place:
        place = place.rpartition(".")[0]
        if any(_is_in(name, place) and _is_linear(module) for name, module in modules.items()):
            return place
    return ""


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _is_router(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer chooses experts: it is called so, or is a gate beside experts."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return False
    parent, _, last = name.rpartition(".")
    if any("router" in part for part in name.split(".")):
        return True
    return last.endswith("gate") and any("expert" in beside for beside in _children(parent, modules))


def _children(parent: str, modules: Mapping[str, nn.Module]) -> list[str]:
    return [name.rpartition(".")[2] for name in modules if name.rpartition(".")[0] == parent]


def _expert_weights(name: str, module: nn.Module) -> Iterator[str]:
    """Parameters that hold the matrices of several experts at once."""
    if isinstance(module, _NO_EXPERTS):
        return
    for parameter, value in module.named_parameters(recurse=False):
        several = (value.ndim == 3 and min(value.shape[1:]) > 1) or (value.ndim == 2 and "expert" in name)
        if several and "bias" not in parameter:
            yield parameter


def _rows_by_layer(model: Any, tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """The tokens by the name of each layer that has a row for them; a head that shares its rows is left out."""
    if not tokens:
        return None
    ends = [model.get_input_embeddings()]
    if model.get_output_embeddings().weight is not ends[0].weight:
        ends.append(model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(end)]: list(tokens) for end in ends}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _parameter(module: str, parameter: str) -> str:
    return module if parameter == "weight" else f"{module}.{parameter}"


def _is_in(name: str, place: str) -> bool:
    return not place or name == place or name.startswith(f"{place}.")


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _kind(name: str) -> str:
    """The last part of a name, with the one before where it says little alone or is a weight of experts."""
    before, _, last = name.rpartition(".")
    beside = before.rpartition(".")[2]
    return f"{beside}.{last}" if last.isdigit() or last == "layer" or beside.endswith("experts") else last


def _kinds(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(map(_kind, names)).items()))


def _listed(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} ({count})" for kind, count in kinds.items()) or "nothing"
