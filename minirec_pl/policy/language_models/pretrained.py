"""Pretrained causal language models of Hugging Face: loaded with their tokenizer, adapted with LoRA, saved again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError

from minirec_pl.policy.language_models.adapters import PROJECTIONS, Lora
from minirec_pl.policy.language_models.causal_lm import without_adapter_wrapper
from minirec_pl.policy.language_models.generation import eos_token_ids
from minirec_pl.policy.language_models.model_config import text_config
from minirec_pl.utils.errors import InputError

ADAPTER = "adapter_config.json"

Extend = Callable[[Any, Any], Sequence[int]]
"""(model, tokenizer) -> the tokens that were added to both."""


@dataclass(frozen=True)
class LanguageModel:
    """Which language model, in which dtype, and what of it is trained.

    Args:
        name: hub name, or the folder of a model or of an adapter, which names its model.
        dtype: dtype of the weights; adapters are float32.
        lora: new adapters; None trains the whole model, or trains the adapters of the folder further.
        gradient_checkpointing: recompute layers in the backward pass, for less memory.
    """

    name: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    lora: Lora | None = None
    gradient_checkpointing: bool = False

    @property
    def is_adapter(self) -> bool:
        """Whether `name` is a folder with adapters."""
        return Path(self.name, ADAPTER).is_file()

    def tokenizer(self) -> Any:
        """The tokenizer, padding with its own pad token or, where it has none, with the end of a sequence.

        Raises:
            InputError: if it cannot be had, or has no end-of-sequence token.
        """
        from transformers import AutoTokenizer

        tokenizer: Any = self._from_pretrained(AutoTokenizer, "tokenizer")
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer of '{self.name}' has no end-of-sequence token: set eos_token in its "
                "tokenizer_config.json"
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load(self, extend: Extend | None = None) -> tuple[Any, Any]:
        """Model, in training mode, and tokenizer.

        Args:
            extend: adds tokens to both before new adapters are made; with adapters these tokens' rows are trained too.

        Raises:
            InputError: if one of them cannot be had, they do not fit, or the adapters are refused.
        """
        from transformers import AutoModelForCausalLM

        tokenizer, base = self.tokenizer(), self._base()
        model, loaded = base._from_pretrained(
            AutoModelForCausalLM,
            "model",
            dtype=getattr(torch, self.dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
        if loaded["missing_keys"]:
            missing = ", ".join(sorted(loaded["missing_keys"])[:3])
            raise InputError(f"the model in '{base.name}' lacks weights ({missing}): fetch it again")
        self._fit(model, tokenizer, base.name)
        new_tokens = [] if extend is None else extend(model, tokenizer)
        self._check_new(tokenizer, new_tokens)
        if self.gradient_checkpointing:
            recompute(model)
        if self.is_adapter:
            model = self._with_stored_adapter(model)
        elif self.lora is not None:
            model = self.lora.adapt(model, new_tokens)
            self._tell_coverage(model)
        return model.train(), tokenizer

    def on_meta(self, tokenizer: Any = None) -> Any:
        """The model of `load` without its storage and without new tokens, on the meta device.

        Args:
            tokenizer: that of the model, which is then checked against it; changed as `load` does.

        Raises:
            InputError: if its config cannot be had, there are no weights in its folder, or `load` would refuse it.
        """
        from peft import PeftConfig, get_peft_model
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        base = self._base()
        config = base._from_pretrained(AutoConfig, "config")
        if Path(base.name).is_dir() and not list(Path(base.name).glob("*.safetensors")):
            raise InputError(f"'{base.name}' holds no weights (*.safetensors): fetch the model again")
        with torch.device("meta"):
            build: Any = AutoModelForCausalLM.from_config
            model: Any = build(config, dtype=getattr(torch, self.dtype))
        with suppress(OSError):  # most models have none
            model.generation_config = GenerationConfig.from_pretrained(base.name)
        if tokenizer is not None:
            self._fit(model, tokenizer, base.name)
        if self.is_adapter:
            stored = PeftConfig.from_pretrained(self.name)
            stored.inference_mode = False
            return get_peft_model(model, stored)
        return model if self.lora is None else self.lora.adapt(model)

    def _base(self) -> LanguageModel:
        """The whole model under stored adapters, or this one."""
        if not self.is_adapter:
            return self
        if self.lora is not None:
            raise InputError(f"'{self.name}' has adapters already: leave out lora to train them further")
        return LanguageModel(self._adapted(), self.dtype)

    def _tell_coverage(self, model: Any) -> None:
        """Warns if adapters reach a part of the model only."""
        assert self.lora is not None
        coverage = self.lora.coverage(model)
        asked = coverage.unmatched and self.lora.target_modules != list(PROJECTIONS)
        if coverage.missing or asked:
            rank_zero_warn(f"LoRA on '{self.name}': {coverage.sentence()}")

    def _adapted(self) -> str:
        from peft import PeftConfig

        try:
            name = PeftConfig.from_pretrained(self.name).base_model_name_or_path
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"'{Path(self.name, ADAPTER)}' cannot be read ({_short(error)}): copy it again") from error
        if not name:
            raise InputError(f"'{Path(self.name, ADAPTER)}' names no model: set base_model_name_or_path in it")
        return str(name)

    def _stored_rows(self) -> set[int]:
        """Tokens whose rows in the embedding come with the adapters."""
        if not self.is_adapter:
            return set()
        from peft import PeftConfig

        rows: Any = getattr(PeftConfig.from_pretrained(self.name), "trainable_token_indices", None) or []
        lists = rows.values() if isinstance(rows, dict) else [rows]
        return {token for tokens in lists for token in tokens}

    def _with_stored_adapter(self, model: Any) -> Any:
        from peft import PeftModel

        try:
            return PeftModel.from_pretrained(model, self.name, is_trainable=True)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise InputError(
                f"the adapter in '{self.name}' does not fit its model ({_short(error)}): use the model it was trained "
                "with"
            ) from error

    def _from_pretrained(self, kind: Any, what: str, **options: Any) -> Any:
        try:
            return kind.from_pretrained(self.name, trust_remote_code=False, **options)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            if Path(self.name).is_dir():
                raise InputError(
                    f"the {what} in '{self.name}' cannot be read ({_short(error)}): fetch it again"
                ) from error
            folder = f"models/{Path(self.name).name}"
            raise InputError(
                f"the {what} '{self.name}' is neither a folder here nor to be had from the hub ({_short(error)}): run "
                f"`hf download {self.name} --local-dir {folder}` where there is a network, put the folder here, and "
                f"give {folder} as the name"
            ) from error

    def _fit(self, model: Any, tokenizer: Any, base: str) -> None:
        """Makes tokenizer and model fit each other: rows of stored adapters, ends of a text, padding.

        Tokens that were added to the tokenizer may lack a row: many models have some that are never used.
        """
        rows, added = model.get_input_embeddings().num_embeddings, tokenizer.added_tokens_decoder
        unknown = [token for token in tokenizer.get_vocab().values() if token >= rows and token not in added]
        if unknown:
            whose = f" of '{base}'" if self.is_adapter else ""
            raise InputError(
                f"the tokenizer of '{self.name}' has token {max(unknown)} and the model{whose} a vocabulary of "
                f"{rows}: use the {'model the adapter' if whose else 'tokenizer the model'} was trained with"
            )
        _state_tying(model)
        stored = max((token + 1 for token in self._stored_rows()), default=0)
        _add_rows(model, stored)
        rows = max(rows, stored)
        if tokenizer.eos_token_id >= rows:
            raise InputError(
                f"the tokenizer of '{self.name}' ends a text with {tokenizer.eos_token} (token "
                f"{tokenizer.eos_token_id}) and the model has {rows} rows: set eos_token in its tokenizer_config.json "
                "to a token that the model knows"
            )
        if tokenizer.pad_token_id >= rows:
            tokenizer.pad_token = tokenizer.eos_token
        ends = eos_token_ids(model)
        if tokenizer.eos_token_id not in ends:
            ends = [*ends, tokenizer.eos_token_id]
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        config = text_config(model)
        pad = getattr(config, "pad_token_id", None)
        if pad is None or not 0 <= pad < rows:
            config.pad_token_id = tokenizer.pad_token_id

    def _check_new(self, tokenizer: Any, new_tokens: Sequence[int]) -> None:
        """Refuses new tokens whose ids were taken already, as in a vocabulary with gaps."""
        if new_tokens:
            count = Counter(tokenizer.get_vocab().values())
            if any(count[token] > 1 for token in new_tokens):
                raise InputError(
                    f"the ids of the tokenizer of '{self.name}' have gaps, so that new tokens take ids of others: take "
                    "item_ids 'title' or another model"
                )


def _state_tying(model: Any) -> None:
    """Has both configs say whether embedding and head share their rows; nested ones, and some checkpoints, differ."""
    head = model.get_output_embeddings()
    if head is not None:
        tied = head.weight is model.get_input_embeddings().weight
        for config in (model.config, text_config(model)):
            config.tie_word_embeddings = tied


def recompute(model: Any) -> None:
    """Switches gradient checkpointing on; it is at work in training mode only, so that generation keeps its cache."""
    new_name = getattr(model, "activation_checkpointing_enable", None)  # of transformers 5
    if new_name is not None:
        new_name(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def grow(model: Any, tokenizer: Any) -> None:
    """Gives the model rows for all tokens of its tokenizer, after tokens were added to that.

    Rows that the model has beyond its vocabulary are used first. The others begin as copies of the first rows, so that
    a model under stored adapters is the same whenever it is loaded.

    Raises:
        InputError: if embedding and head have different numbers of rows.
    """
    _add_rows(model, max(tokenizer.get_vocab().values()) + 1)


def _add_rows(model: Any, rows: int) -> None:
    known = model.get_input_embeddings().num_embeddings
    in_head = len(model.get_output_embeddings().weight)
    if rows > min(known, in_head) and known != in_head:
        raise InputError(
            f"{type(model).__name__} has {known} rows in its embedding and {in_head} in its head, so that new tokens "
            "cannot have a row in both: set item_ids to title"
        )
    if rows > known:
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            for end in (model.get_input_embeddings(), model.get_output_embeddings()):
                end.weight[known:] = end.weight[torch.arange(rows - known) % known]


def save_language_model(
    model: Any, tokenizer: Any, folder: Path, *, merge: bool = False, dtype: torch.dtype | None = None
) -> None:
    """Writes the model, or its adapters alone where it has some, and the tokenizer as a Hugging Face folder.

    Args:
        model: of `LanguageModel.load`; unchanged afterwards.
        tokenizer: its tokenizer.
        folder: where to, made where it is missing.
        merge: write the whole model with the adapters merged into it.
        dtype: of the merged weights; None keeps that of the model.
    """
    adapted = without_adapter_wrapper(model) is not model
    if merge:
        import copy

        model = copy.deepcopy(model)
        model = (model.merge_and_unload() if adapted else model).to(dtype)
        adapted = False
    # The rows of new tokens are kept with the adapters, the others are those of the model.
    model.save_pretrained(folder, **({"save_embedding_layers": False} if adapted else {}))
    tokenizer.save_pretrained(folder)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
