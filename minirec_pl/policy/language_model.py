"""Pretrained causal language models of Hugging Face: loaded with their tokenizer, adapted with LoRA, saved again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from minirec_pl.errors import InputError
from minirec_pl.policy.causal_lm import without_adapter_wrapper
from minirec_pl.policy.generation import eos_token_ids

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER = "adapter_config.json"

Extend = Callable[[Any, Any], Sequence[int]]
"""(model, tokenizer) -> the tokens that were added to both."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) on linear layers, through peft; everything else stays frozen.

    Args:
        r: rank.
        alpha: the adapters' product is scaled by alpha / r.
        dropout: probability of dropping an input of an adapter, in training.
        target_modules: names of the layers, ends of the full names.
    """

    r: int = 4
    alpha: float = 128
    dropout: float = 0.05
    target_modules: list[str] = field(default_factory=lambda: list(PROJECTIONS))

    def adapt(self, model: Any, new_tokens: Sequence[int] = ()) -> Any:
        """The model with new adapters, which change nothing until they are trained.

        Args:
            model: a causal language model of transformers.
            new_tokens: tokens whose rows in the embedding and in the head are trained too.

        Raises:
            InputError: if the model has none of the layers, or peft refuses an option.
        """
        from peft import LoraConfig, get_peft_model

        rows: Any = None
        if new_tokens:
            ends = [model.get_input_embeddings()]
            if not model.config.get_text_config().tie_word_embeddings:
                ends.append(model.get_output_embeddings())
            names = {id(module): name for name, module in model.named_modules()}
            rows = {names[id(end)]: list(new_tokens) for end in ends}
        try:
            config = LoraConfig(
                r=self.r,
                lora_alpha=self.alpha,  # type: ignore[arg-type]
                lora_dropout=self.dropout,
                target_modules=list(self.target_modules),
                trainable_token_indices=rows,
                task_type="CAUSAL_LM",
            )
            return get_peft_model(model, config)
        except ValueError as error:
            raise InputError(
                f"lora is refused by peft ({' '.join(str(error).split())}): mend language_model.lora"
            ) from error


@dataclass(frozen=True)
class LanguageModel:
    """Which language model, in which dtype, and what of it is trained.

    Args:
        name: hub name, or the folder of a model or of an adapter, which names its model.
        dtype: of the weights; adapters are float32.
        lora: new adapters; None trains the whole model, or goes on with the adapters of the folder.
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

        tokenizer, base = self.tokenizer(), self
        if self.is_adapter:
            if self.lora is not None:
                raise InputError(f"'{self.name}' has adapters already: leave out lora to go on with them")
            base = LanguageModel(self._adapted())
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
        self._check_fit(model, tokenizer, base.name)
        grow(model, tokenizer)
        new_tokens = [] if extend is None else extend(model, tokenizer)
        if self.gradient_checkpointing:
            recompute(model)
        if self.is_adapter:
            model = self._with_stored_adapter(model)
        elif self.lora is not None:
            model = self.lora.adapt(model, new_tokens)
        return model.train(), tokenizer

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

    def _check_fit(self, model: Any, tokenizer: Any, base: str) -> None:
        vocabulary, highest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
        unknown = set(range(vocabulary, highest + 1)) - self._stored_rows()
        if unknown:
            whose = f" of '{base}'" if self.is_adapter else ""
            raise InputError(
                f"the tokenizer of '{self.name}' has token {max(unknown)} and the model{whose} a vocabulary of "
                f"{vocabulary}: use the {'model the adapter' if whose else 'tokenizer the model'} was trained with"
            )
        if not eos_token_ids(model):
            model.generation_config.eos_token_id = tokenizer.eos_token_id
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id


def recompute(model: Any) -> None:
    """Switches gradient checkpointing on; it is at work in training mode only, so that generation keeps its cache."""
    new_name = getattr(model, "activation_checkpointing_enable", None)  # of transformers 5
    if new_name is not None:
        new_name(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def grow(model: Any, tokenizer: Any) -> None:
    """Gives the model rows for the tokens of its tokenizer that have none.

    They begin as copies of the first rows, so that a model under stored adapters is the same whenever it is loaded.
    """
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for end in (model.get_input_embeddings(), model.get_output_embeddings()):
                end.weight[known:] = end.weight[torch.arange(len(tokenizer) - known) % known]


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
