"""Pretrained causal language models of Hugging Face: loaded with their tokenizer, adapted with LoRA, saved again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from minirec_pl.errors import InputError
from minirec_pl.policy.causal_lm import without_adapter_wrapper
from minirec_pl.policy.generation import eos_token_ids

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ADAPTER = "adapter_config.json"


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

    def adapt(self, model: Any) -> Any:
        """The model with new adapters, which change nothing until they are trained.

        Raises:
            InputError: if the model has none of the layers, or peft refuses an option.
        """
        from peft import LoraConfig, get_peft_model

        try:
            config = LoraConfig(
                r=self.r,
                lora_alpha=self.alpha,  # type: ignore[arg-type]
                lora_dropout=self.dropout,
                target_modules=list(self.target_modules),
                task_type="CAUSAL_LM",
            )
            return get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"lora is refused by peft ({' '.join(str(error).split())}): mend policy.lora") from error


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

    def load(self) -> tuple[Any, Any]:
        """Model, in training mode, and tokenizer.

        Raises:
            InputError: if one of them cannot be had, they do not fit, or the adapters are refused.
        """
        from transformers import AutoModelForCausalLM

        tokenizer, dtype = self.tokenizer(), getattr(torch, self.dtype)
        base = self.name
        if Path(self.name, _ADAPTER).is_file():
            from peft import PeftConfig

            base = str(PeftConfig.from_pretrained(self.name).base_model_name_or_path)
        model: Any = LanguageModel(base)._from_pretrained(AutoModelForCausalLM, "model", dtype=dtype)
        self._check_fit(model, tokenizer)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        if base != self.name:
            model = self._with_stored_adapter(model)
        elif self.lora is not None:
            model = self.lora.adapt(model)
        return model.train(), tokenizer

    def _with_stored_adapter(self, model: Any) -> Any:
        from peft import PeftModel

        if self.lora is not None:
            raise InputError(f"'{self.name}' has adapters already: leave out lora to go on with them")
        try:
            return PeftModel.from_pretrained(model, self.name, is_trainable=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"the adapter in '{self.name}' does not fit its model ({reason}): use the model it was trained with"
            ) from error

    def _from_pretrained(self, kind: Any, what: str, **options: Any) -> Any:
        options |= {"use_safetensors": True} if what == "model" else {}
        try:
            return kind.from_pretrained(self.name, **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            if Path(self.name).is_dir():
                raise InputError(f"the {what} in '{self.name}' cannot be read ({reason}): fetch it again") from error
            raise InputError(
                f"the {what} '{self.name}' is neither a folder here nor to be had from the hub ({reason}): run `hf "
                f"download {self.name} --local-dir models/{Path(self.name).name}` where there is a network, copy the "
                "folder here and give its path as the name"
            ) from error

    def _check_fit(self, model: Any, tokenizer: Any) -> None:
        vocabulary, highest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
        if highest >= vocabulary and not Path(self.name, _ADAPTER).is_file():
            raise InputError(
                f"the tokenizer of '{self.name}' has token {highest} and the model a vocabulary of {vocabulary}: use "
                "the tokenizer the model was trained with"
            )
        if not eos_token_ids(model):
            model.generation_config.eos_token_id = tokenizer.eos_token_id
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id


def save_language_model(model: Any, tokenizer: Any, folder: Path, *, merge: bool = False) -> None:
    """Writes the model, or its adapters alone where it has some, and the tokenizer as a Hugging Face folder.

    Args:
        model: of `LanguageModel.load`; unchanged afterwards.
        tokenizer: its tokenizer.
        folder: where to, made where it is missing.
        merge: write the whole model with the adapters merged into it.
    """
    if merge and without_adapter_wrapper(model) is not model:
        import copy

        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
