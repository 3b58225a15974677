"""From a user's history to the tokens of a chat prompt."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirec_pl.data.samples import Catalogue
from minirec_pl.errors import InputError

_UNITS = (("year", 31_557_600), ("month", 2_629_800), ("day", 86_400), ("hour", 3_600), ("minute", 60))
_FIELDS = {"system": set(), "user": {"history"}, "item": {"number", "title", "text"}, "rating": {"rating"}, "age": {"age"}}


class EncodedPrompts(NamedTuple):
    """Prompts as tokens; samples with the same prompt share one.

    Attributes:
        input_ids: int64 [U, T], padded on the left.
        mask: int64 [U, T], which tokens are real.
        row: int64 [B], the prompt of each sample.
    """

    input_ids: Tensor
    mask: Tensor
    row: Tensor


def time_ago(seconds: float) -> str:
    """A span of time in its largest unit.

    Example:
        >>> time_ago(7200), time_ago(90_000), time_ago(3)
        ('2 hours', '1 day', 'moments')
    """
    for unit, length in _UNITS:
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "moments"


@dataclass(frozen=True)
class PromptTemplate:
    """The texts of a prompt, rendered by the tokenizer's own chat template.

    Args:
        system: what the model is told first; empty for nothing. Goes before `user` where a chat template has no system.
        user: the request; `{history}` stands for the lines of the history, oldest first.
        item: a line of the history; `{number}` from 1, `{title}`, `{text}` (all of the item's text).
        rating: put after a line whose rating is known; `{rating}`.
        age: put after a line whose time is known; `{age}`, for example `3 days`.
        answer: how the model's answer begins.
        longest_title: characters that are kept of a title or text.

    Raises:
        InputError: for a text with an unknown or missing placeholder.
    """

    system: str = "You recommend items to users."
    user: str = (
        "The user's history, oldest first:\n{history}\n\nWhat will the user choose next? Think about what the user likes."
    )
    item: str = "{number}. {title}"
    rating: str = ", rated {rating}"
    age: str = ", {age} ago"
    answer: str = ""
    longest_title: int = 100

    def __post_init__(self) -> None:
        for name, known in _FIELDS.items():
            try:
                found = {part[1] for part in string.Formatter().parse(getattr(self, name)) if part[1] is not None}
            except ValueError as error:
                raise InputError(f"prompt.{name} cannot be read ({error}): write {{{{ for a brace") from error
            unknown = sorted(found - known)
            if unknown:
                takes = ", ".join(f"{{{field}}}" for field in sorted(known)) or "no placeholder"
                raise InputError(f"prompt.{name} has the placeholder {{{unknown[0]}}}: it takes {takes}")
        if "{history}" not in self.user:
            raise InputError("prompt.user does not say where the history goes: put {history} into it")
        if self.longest_title < 1:
            raise InputError(f"prompt.longest_title is {self.longest_title}: keep at least 1 character")

    def history_text(self, batch: Mapping[str, Tensor], row: int, catalogue: Catalogue) -> str:
        """The lines of one sample's history.

        Args:
            batch: `history` [B, W] padded with -1; where there are, `history_rating` [B, W] and `history_age` [B, W].
            row: which sample.
            catalogue: of titles and texts.
        """
        columns = [i for i, item in enumerate(batch["history"][row].tolist()) if item >= 0]
        lines = []
        for number, column in enumerate(columns, start=1):
            item = int(batch["history"][row, column])
            title = catalogue.item_ids[item] if catalogue.titles is None else catalogue.titles[item]
            line = self.item.format(number=number, title=self._cut(title), text=self._cut(catalogue.texts[item]))
            if self.rating and "history_rating" in batch and not batch["history_rating"][row, column].isnan():
                line += self.rating.format(rating=f"{float(batch['history_rating'][row, column]):g}")
            if self.age and "history_age" in batch:
                line += self.age.format(age=time_ago(float(batch["history_age"][row, column])))
            lines.append(line)
        return "\n".join(lines)

    def _cut(self, text: str) -> str:
        return text if len(text) <= self.longest_title else f"{text[: self.longest_title - 1].rstrip()}…"

    def render(self, tokenizer: Any, history: str) -> str:
        """The whole prompt, up to where the model goes on writing.

        Raises:
            InputError: if the tokenizer has no chat template.
        """
        user = self.user.replace("{history}", history)
        if tokenizer.chat_template is None:
            raise InputError(
                "the tokenizer has no chat template: take an instruction-tuned model, or put a chat_template.jinja into "
                "its folder"
            )
        messages = [{"role": "user", "content": user}]
        if self.system:
            with_system = [{"role": "system", "content": self.system}, *messages]
            try:
                return self._apply(tokenizer, with_system)
            except Exception as error:
                # Templates refuse the role by raising an error of jinja.
                if type(error).__module__.partition(".")[0] != "jinja2":
                    raise
                messages = [{"role": "user", "content": f"{self.system}\n\n{user}"}]
        return self._apply(tokenizer, messages)

    def _apply(self, tokenizer: Any, messages: list[dict[str, str]]) -> str:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text + self.answer

    def encode(
        self, tokenizer: Any, batch: Mapping[str, Tensor], catalogue: Catalogue, longest: int | None = None
    ) -> EncodedPrompts:
        """Prompts of a batch as tokens, on the batch's device.

        Args:
            tokenizer: of the model.
            batch: see `history_text`; `sample_id` [B] for messages.
            catalogue: of titles and texts.
            longest: tokens that a prompt may have; None for any number.

        Raises:
            InputError: if a prompt is longer, naming its sample.
        """
        texts = [
            self.render(tokenizer, self.history_text(batch, row, catalogue)) for row in range(len(batch["history"]))
        ]
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        ids: list[list[int]] = tokenizer(list(place), add_special_tokens=False)["input_ids"]
        width = max(map(len, ids))
        if longest is not None and width > longest:
            prompt = max(range(len(ids)), key=lambda i: len(ids[i]))
            sample = next(row for row, text in enumerate(texts) if place[text] == prompt)
            name = f" of sample {int(batch['sample_id'][sample])}" if "sample_id" in batch else ""
            raise InputError(
                f"the prompt{name} has {width} tokens and {longest} fit before what is generated: lower "
                "data.history_window or prompt.longest_title"
            )
        device = batch["history"].device
        input_ids = torch.full((len(ids), width), tokenizer.pad_token_id)
        mask = torch.zeros(len(ids), width, dtype=torch.int64)
        for i, tokens in enumerate(ids):
            input_ids[i, width - len(tokens) :] = torch.tensor(tokens)
            mask[i, width - len(tokens) :] = 1
        row = torch.tensor([place[text] for text in texts])
        return EncodedPrompts(input_ids.to(device), mask.to(device), row.to(device))
