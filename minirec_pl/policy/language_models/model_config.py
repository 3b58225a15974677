"""Settings of a language model's text part, which models of several modalities keep in a nested config."""

from __future__ import annotations

from typing import Any


def text_config(model: Any) -> Any:
    """The config with the settings of the text decoder; the model's own config where it has no other.

    Args:
        model: of transformers, also inside peft.
    """
    nested = getattr(model.config, "get_text_config", None)
    return model.config if nested is None else nested()


def text_setting(model: Any, name: str) -> Any:
    """One setting of the text decoder, from the model's own config where the nested one is silent; None if unset.

    Args:
        model: of transformers, also inside peft.
        name: of the setting, for example `pad_token_id`.
    """
    value = getattr(text_config(model), name, None)
    return getattr(model.config, name, None) if value is None else value
