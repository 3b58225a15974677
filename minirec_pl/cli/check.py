"""`minirec check`: what a fit would do, need and trip over, before it starts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from torch import nn

from minirec_pl.cli.arguments import class_of, without_types
from minirec_pl.cli.check_model import Finding, Level, Prompts, describe_family, describe_language_model
from minirec_pl.cli.check_saving import (
    PROBED,
    check_flat_share,
    finding_of,
    own_options,
    probed,
    samples_of,
    saving_table,
    schedules_of,
    scoring_of,
    setting_of,
)
from minirec_pl.cli.estimates import Load, Memory, memory_of, peak
from minirec_pl.cli.sentences import one_sentence, sentence_of
from minirec_pl.cli.stages import WarmStart
from minirec_pl.cli.terminal import console
from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import GenerativePolicy, Policy, RetrievalPolicy
from minirec_pl.policy.catalogue_text import encode_texts
from minirec_pl.policy.interface import WITHOUT_ROLLOUTS
from minirec_pl.policy.item_ids import title_ids
from minirec_pl.policy.language_models.model_config import text_setting
from minirec_pl.policy.language_models.pretrained import LanguageModel
from minirec_pl.policy.language_models.tiny import SPECIAL_TOKENS, build_tiny
from minirec_pl.policy.prompt import PromptTemplate
from minirec_pl.policy.semantic_ids import SemanticIds
from minirec_pl.rewards.calls import RewardFunction, check_columns
from minirec_pl.selection.session.callback import SessionCallback
from minirec_pl.trainers.grpo import GRPORecModule
from minirec_pl.trainers.grpo_checks import beta_without_rollouts
from minirec_pl.utils.break_even import BreakEven
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.run_folder import SIDE_FILE, policy_file

T = TypeVar("T")
_GIB = 2**30
_COLOURS = {"ok": "green", "warning": "yellow", "fails": "red"}
_SHOWN_PROMPTS = 64


class Preflight:
    """Goes through a parsed config of `minirec fit` and collects findings.

    Args:
        config: of the subcommand.
        flat_share: share of the groups without reward variance, if it is known.
        probe: whether to load the policy and measure it.

    Raises:
        InputError: if both are given, or the share is out of range.
    """

    def __init__(self, config: Namespace, flat_share: float | None = None, probe: bool = False) -> None:
        check_flat_share(flat_share, probe, config.get("warm_start") is not None)
        self.config, self.flat_share, self.probe = config, flat_share, probe
        self.saving: tuple[BreakEven, dict[str, float]] | None = None
        self.selection: SessionCallback | None = None
        self.findings: list[Finding] = []
        self.prompts: Prompts | None = None
        self.memory: Memory | None = None
        self.load: Load | None = None

    @property
    def fails(self) -> bool:
        """Whether the fit would fail."""
        return any(finding.level == "fails" for finding in self.findings)

    def run(self) -> None:
        """Makes all checks; one that fails keeps those that need its result from being made."""
        self._try("options", self._options)
        self._try("run folder", self._folder)
        data = self._try("data", self._data)
        if data is not None:
            self._try("rewards", lambda: self._reward_columns(data))
        policy = self._policy_options()
        if not issubclass(_kind_of(policy), GenerativePolicy | RetrievalPolicy):
            self._add("ok", "policy", f"{policy['class_path']} is your own class: only its options were checked")
            if self.probe or self.flat_share is not None:
                text = (
                    "its tokens are not known, so work out with minirec_pl.utils.break_even.BreakEven what it can save"
                )
                self._add("warning", "selection", text)
            return
        prompt = self._try("policy", lambda: _prompt_of(policy))
        if self.fails and self.findings[-1].what == "policy":
            return
        tokenizer = None
        if prompt is not None:
            tokenizer = self._try("tokenizer", lambda: _language_model(policy).tokenizer())
        if data is not None and (prompt is None or tokenizer is not None):
            self.prompts = self._try("prompt", lambda: self._render(data, policy, prompt, tokenizer))
        size = len(SPECIAL_TOKENS) + len(data.catalogue) if data is not None else 0
        model = self._try("model", lambda: _on_meta(policy, size, tokenizer))
        if model is not None and tokenizer is not None:
            lora = _language_model(policy).lora
            self.findings += self._try("model", lambda: describe_language_model(model, tokenizer, lora)) or []
        if model is not None and self.prompts is not None:
            prompts, completions = self.prompts, self.prompts.completion > 1 or _retrieves(policy)
            self.findings += self._try("model", lambda: describe_family(model.config, prompts, completions)) or []
        if data is not None and model is not None and self.prompts is not None:
            self._try("size", lambda: self._sizes(data, policy, model))
        if data is not None and self.load is not None and not self.fails:
            self._try("selection", lambda: self._saving(data, policy))

    def _try(self, what: str, step: Callable[[], T]) -> T | None:
        try:
            return step()
        except InputError as error:
            self._add("fails", what, str(error))
        except (OSError, ValueError, TypeError) as error:
            self._add("fails", what, one_sentence(str(error)))
        return None

    def _add(self, level: Level, what: str, text: str) -> None:
        self.findings.append(Finding(level, what, text))

    def _model_options(self) -> dict[str, Any]:
        options: dict[str, Any] = _plain(self.config.model).get("init_args", {})
        return options

    def _policy_options(self) -> dict[str, Any]:
        policy = self._model_options().get("policy") or {}
        return {"class_path": policy.get("class_path", ""), **policy.get("init_args", {})}

    def _options(self) -> None:
        """Makes module, selection and warm start, with a policy that loads nothing in place of the real one."""
        policy = self._policy_options()
        _make_module(
            _plain(self.config.model), _kind_of(policy).unloaded({k: v for k, v in policy.items() if k != "class_path"})
        )
        self.selection = _made(SessionCallback | None, _plain(self.config.get("selection")))
        _made(WarmStart | None, _plain(self.config.get("warm_start")))

    def _folder(self) -> None:
        folder = Path(self.config.trainer.default_root_dir or "runs")
        there = next((place for place in (folder, *folder.parents) if place.exists()), Path())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise InputError(f"'{there}' cannot be written: choose another --trainer.default_root_dir")

    def _data(self) -> RecDataModule:
        data = _made(LightningDataModule, _plain(self.config.data))
        if not isinstance(data, RecDataModule):
            raise InputError(
                f"data is a {type(data).__name__}, which cannot be checked: set it to minirec_pl.RecDataModule"
            )
        data.prepare_data()
        data.setup("fit")
        parts = {"warm": data.warm_ids, "pool": data.pool_ids, "validation": data.val_ids, "test": data.test_ids}
        counts = ", ".join(f"{name} {len(ids):,}" for name, ids in parts.items())
        self._add("ok", "data", f"{len(data.catalogue):,} items; samples: {counts}")
        return data

    def _reward_columns(self, data: RecDataModule) -> None:
        """Refuses rewards that ask for columns that the data do not have."""
        fns = _made(list[RewardFunction] | None, self._model_options().get("rewards"))
        check_columns(fns or [], data.own_columns)

    def _render(
        self, data: RecDataModule, policy: Mapping[str, Any], prompt: PromptTemplate | None, tokenizer: Any
    ) -> Prompts:
        ids = data.pool_ids[np.linspace(0, len(data.pool_ids) - 1, _SHOWN_PROMPTS).astype(np.int64)]
        batch = next(iter(data.sample_loader(ids, batch_size=len(ids))))
        if prompt is None:
            size = _id_tokens(policy)
            lengths = (1 + size * (batch["history"] >= 0).sum(dim=1)).tolist()
            known = [int(item) for item in batch["history"][0] if item >= 0]
            shown = "<s> " + " ".join(data.catalogue.item_ids[item] for item in known)
            return Prompts(shown, lengths, size)
        texts = prompt.write(tokenizer, batch, data.catalogue)
        lengths = [len(tokens) for tokens in encode_texts(tokenizer, texts)]
        if prompt.asks_for_the_date(tokenizer):
            self._add(
                "ok",
                "prompt date",
                f"the chat template tells the model that it is {prompt.date} (--model.policy.prompt.date)",
            )
        return Prompts(texts[0].text, lengths, _completion_tokens(policy, prompt, tokenizer, data.catalogue))

    def _sizes(self, data: RecDataModule, policy: Mapping[str, Any], model: Any) -> None:
        assert self.prompts is not None
        options, trainer = self._model_options(), self.config.trainer
        longest = max(self.prompts.lengths) + self.prompts.completion
        context = text_setting(model, "max_position_embeddings")
        if context is not None and longest > context:
            self._add(
                "fails",
                "positions",
                f"the longest prompt has {max(self.prompts.lengths)} tokens and a completion up to "
                f"{self.prompts.completion}, but the model has {context} positions: lower --data.history_window, "
                "--model.policy.prompt.longest_title or the completion's length",
            )
        self.load = load = self._load(data, policy, options)
        if load.batch_size > load.selected:
            self._add(
                "warning",
                "batch",
                f"an epoch has {load.selected} samples, less than a batch of {load.batch_size}: "
                "lower --data.batch_size",
            )
        if load.batch_size == 1 and load.items and not policy.get("cached_negatives"):
            self._add(
                "fails",
                "batch",
                "a batch of one sample has no other item to compare its target with: raise --data.batch_size, or "
                "set --model.policy.cached_negatives",
            )
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        dtype = next(model.parameters()).dtype
        self._add("ok", "model", f"{total / 1e6:,.1f} M parameters in {str(dtype)[6:]}, {trained / 1e6:,.1f} M trained")
        reference = (options.get("beta") or 0) > 0 and trained == total
        most = (options.get("adaptive_generations") or {}).get("max", load.num_generations)
        self.memory = memory_of(model, replace(load, num_generations=most), dtype.itemsize, reference)
        need, there, where = peak(self.memory), *_device_memory(trainer.accelerator)
        if need > there:
            self._add(
                "warning",
                "memory",
                f"about {need / _GIB:.1f} GiB are needed and {where} has {there / _GIB:.1f}: lower --data.batch_size, "
                "or set --model.policy.language_model.gradient_checkpointing or --model.policy.language_model.lora",
            )

    def _saving(self, data: RecDataModule, policy: Mapping[str, Any]) -> None:
        """Works out what selection can save of a fit by GRPO with rollouts."""
        assert self.load is not None
        options, load = self._model_options(), self.load
        if not issubclass(class_of(self.config.model.class_path), GRPORecModule):
            return
        if options.get("rollouts") in WITHOUT_ROLLOUTS:
            text = (
                f"rollouts='{options['rollouts']}' draws no groups, so none is flat and selection has none to leave out"
            )
            self._add("ok", "selection", text)
            self._ids_without_rollouts(options, _id_tokens(policy) > 1 or policy.get("item_ids") == "title")
            return
        length: float = load.completion
        if self.probe:
            module = _make_module(_plain(self.config.model), _made(Policy, options["policy"]))
            self.flat_share, length = probed(module, data)
            if self.flat_share == 1.0:
                text = (
                    f"all {min(PROBED, load.pool)} groups of the probe are flat, so hardly any sample of the pool "
                    "teaches anything: warm the policy up for longer, raise --model.num_generations, or reward more "
                    "than a hit"
                )
                self._add("warning", "selection", text)
                return
        exact, known = not _retrieves(policy), self.flat_share is not None
        setting = setting_of(load, self.flat_share or 0.0, exact=exact, fed=length - int(exact))
        found = schedules_of(load, self.selection)
        self.saving = setting, found
        scores_nothing = self.selection is not None and not load.scored
        self.findings.append(finding_of(setting, known, {} if scores_nothing else found))

    def _ids_without_rollouts(self, options: Mapping[str, Any], several: bool) -> None:
        """Says what ids of several tokens go with, as the fit will."""
        if several and (options.get("beta") or 0) > 0:
            raise InputError(beta_without_rollouts(options["beta"], options["rollouts"]))
        loss_type = options.get("loss_type", "dapo")
        if several and options["rollouts"] == "expected" and loss_type != "dr_grpo":
            text = (
                f"loss_type is {loss_type}, which is refused if ids have unequal lengths, as titles have and semantic "
                "ids once items share their codes: set --model.loss_type=dr_grpo"
            )
            self._add("warning", "item ids", text)

    def _load(self, data: RecDataModule, policy: Mapping[str, Any], options: Mapping[str, Any]) -> Load:
        assert self.prompts is not None
        trainer, scoring = self.config.trainer, scoring_of(self.selection)
        pool = len(data.pool_ids)
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 1
        completion = self.prompts.completion
        accumulate = trainer.accumulate_grad_batches or 1
        language_model = policy.get("language_model") or {}
        return Load(
            pool=pool,
            selected=samples_of(self.selection, pool),
            epochs=epochs,
            num_generations=options.get("num_generations", 1),
            scoring_generations=options.get("scoring_generations", 0),
            rescored=0 if scoring is None else round(scoring.rescore_fraction * pool),
            scored=0 if scoring is None else math.ceil(scoring.score_fraction * pool),
            prompt=round(float(np.mean(self.prompts.lengths))),
            completion=completion,
            batch_size=data.batch_size,
            generated_at_once=data.batch_size * (options.get("steps_per_generation") or accumulate),
            checkpointing=bool(language_model.get("gradient_checkpointing")),
            items=len(data.catalogue) if _retrieves(policy) else 0,
        )


def run(arguments: Sequence[str]) -> int:
    """Runs `minirec check` on the words that follow it; returns 1 if the fit would fail, else 0."""
    from minirec_pl.cli.fit import parsed

    own, words = own_options(arguments)
    preflight = Preflight(parsed(["fit", *words]), own.flat_share, own.probe)
    preflight.run()
    _show(preflight)
    return int(preflight.fails)


def _show(preflight: Preflight) -> None:
    """Prints what was found, as far as it was found."""
    screen = console()
    findings, prompts, load, memory = preflight.findings, preflight.prompts, preflight.load, preflight.memory
    if prompts is not None:
        shortest, longest = min(prompts.lengths), max(prompts.lengths)
        title = f"a prompt: {prompts.lengths[0]} tokens (others {shortest} to {longest})"
        screen.print(Panel(escape(prompts.text), title=title, title_align="left"))
    if load is not None and memory is not None:
        table = Table(title="What the fit needs, at most", show_header=False)
        table.add_column("what")
        table.add_column("figure", justify="right")
        for name, size in memory._asdict().items():
            table.add_row(f"memory: {name}", f"{size / _GIB:.2f} GiB")
        table.add_row("memory at the fullest moment", f"{peak(memory) / _GIB:.2f} GiB")
        table.add_section()
        table.add_row("samples per epoch, of the pool", f"{load.selected:,} of {load.pool:,}")
        for phase, count in load.rollouts().items():
            table.add_row(f"rollouts: {phase}", f"{count:,}")
        for kind, count in load.tokens().items():
            table.add_row(f"tokens: {kind}", f"{count:,}")
        screen.print(table)
    if preflight.saving is not None:
        setting, found = preflight.saving
        screen.print(saving_table(setting, preflight.flat_share is not None, found))
    for level, what, text in findings:
        screen.print(f"[{_COLOURS[level]}]{level:8}[/] {what}: {escape(text)}", soft_wrap=True, highlight=False)
    verdict = (
        "the fit would fail"
        if any(found.level == "fails" for found in findings)
        else "nothing stands in the way of the fit"
    )
    screen.print(verdict, highlight=False)


def _plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Namespace) else value


def _made(kind: Any, value: Any) -> Any:
    """An object of a type that jsonargparse knows, from the plain values of a config.

    Raises:
        InputError: if it is refused.
    """
    parser = ArgumentParser(exit_on_error=False)
    without_types(parser.add_argument("--value", type=kind))
    try:
        return parser.instantiate_classes(parser.parse_object({"value": value})).value
    except Exception as error:
        raise InputError(sentence_of(error)) from error


def _prompt_of(policy: Mapping[str, Any]) -> PromptTemplate | None:
    """The template of the prompts; None where a prompt is nothing but item ids."""
    if policy.get("config") is not None:
        return None
    if policy.get("prompt"):
        return _made(PromptTemplate, policy["prompt"])  # type: ignore[no-any-return]
    if policy.get("language_model"):
        return PromptTemplate()
    side = policy_file(Path(_language_model(policy).name))
    stored = json.loads(side.read_text(encoding="utf-8"))
    texts = stored.get("text", stored).get("prompt")
    return PromptTemplate(**texts) if texts else None


def _make_module(config: Mapping[str, Any], policy: nn.Module) -> Any:
    kind = class_of(config["class_path"])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "model", skip={"policy"}, instantiate=False, fail_untyped=False)
    options = {key: value for key, value in config.get("init_args", {}).items() if key != "policy"}
    try:
        made = parser.instantiate_classes(parser.parse_object({"model": options})).model
        return kind(policy, **made)
    except Exception as error:
        raise InputError(sentence_of(error)) from error


def _kind_of(policy: Mapping[str, Any]) -> type[Policy]:
    """The class of a policy."""
    kind: type[Policy] = class_of(policy["class_path"])
    return kind


def _retrieves(policy: Mapping[str, Any]) -> bool:
    return issubclass(_kind_of(policy), RetrievalPolicy)


def _language_model(policy: Mapping[str, Any]) -> LanguageModel:
    if policy.get("language_model"):
        return _made(LanguageModel, policy["language_model"])  # type: ignore[no-any-return]
    folder = str(policy.get("pretrained") or "")
    if not Path(folder).is_dir():
        raise InputError(f"there is no policy in '{folder}': train it first, or fix --model.policy.pretrained")
    side = Path(folder, SIDE_FILE)
    stored = json.loads(side.read_text(encoding="utf-8")) if side.is_file() else {}
    return LanguageModel(folder, dtype=stored.get("language_model", {}).get("dtype", "float32"))


def _completion_tokens(policy: Mapping[str, Any], prompt: PromptTemplate, tokenizer: Any, catalogue: Catalogue) -> int:
    if _retrieves(policy):
        marker = tokenizer(policy.get("answer_marker") or "<answer>", add_special_tokens=False)["input_ids"]
        length = policy.get("max_completion_length")
        return (256 if length is None else length) + len(marker)
    if policy.get("item_ids") == "title" and policy.get("language_model"):
        return title_ids(tokenizer, catalogue, prompt).tokens.shape[1]
    return _id_tokens(policy)


def _id_tokens(policy: Mapping[str, Any]) -> int:
    """Tokens of an item id at most: those of a stored policy, or of new semantic ids or ids of one token."""
    if policy.get("config") is None and not policy.get("language_model"):
        stored = json.loads(policy_file(Path(policy["pretrained"])).read_text(encoding="utf-8"))
        return len(stored["item_tokens"][0])
    if policy.get("item_ids") != "semantic":
        return 1
    levels: int = (policy.get("semantic_ids") or {}).get("levels", SemanticIds.levels)
    return levels + 1  # the last one tells items of the same codes apart


def _on_meta(policy: Mapping[str, Any], vocabulary: int, tokenizer: Any) -> Any:
    """The model without its storage.

    Raises:
        InputError: if its config cannot be had, there are no weights in its folder, or its tokenizer does not fit.
    """
    if policy.get("config") is not None:
        with torch.device("meta"):
            return build_tiny(policy["config"], vocabulary)
    return _language_model(policy).on_meta(tokenizer)


def _device_memory(accelerator: str) -> tuple[int, str]:
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "the GPU"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
