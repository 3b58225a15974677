"""From a user's history to the tokens of a chat prompt."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirec_pl.data.samples import Catalogue
from minirec_pl.errors import InputError

_UNITS = (("year", 31_557_600), ("month", 2_629_800), ("day", 86_400), ("hour", 3_600), ("minute", 60))
_FIELDS: dict[str, dict[str, Any]] = {  # what each text may hold, with an example
    "system": {},
    "user": {"history": ""},
    "item": {"number": 1, "title": "", "text": "", "id": ""},
    "rating": {"rating": "4"},
    "age": {"age": "1 day"},
}
_COLUMNS = ("history", "history_rating", "history_age")


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


def encode_ids(history: Tensor, item_tokens: Tensor, start: int, pad: int) -> EncodedPrompts:
    """Prompts without words: a start token, then the ids of the history, oldest first; equal neighbours share one.

    Args:
        history: int64 [B, W], item index padded with -1 anywhere.
        item_tokens: int64 [n_items, L], padded with -1.
        start: the start token.
        pad: the padding token.
    """
    history, row = torch.unique_consecutive(history, dim=0, return_inverse=True)
    tokens = torch.where(history[..., None] >= 0, item_tokens[history.clamp(min=0)], -1).flatten(1)
    tokens = torch.nn.functional.pad(tokens, (1, 0), value=start)
    real = tokens >= 0
    tokens = tokens.gather(1, torch.argsort(real.to(torch.int8), dim=1, stable=True))
    tokens = tokens[:, tokens.shape[1] - int(real.sum(dim=1).max()) :]
    mask = (tokens >= 0).to(torch.int64)
    return EncodedPrompts(torch.where(mask.bool(), tokens, pad), mask, row)


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
    """The texts of a prompt, rendered by the tokenizer's own chat template. Braces are doubled, as in `str.format`.

    Args:
        system: what the model is told first; empty for nothing. Goes before `user` where a chat template has no system.
        user: the request; `{history}`, here or in `answer`, stands for the lines of the history, oldest first.
        item: a line of the history; `{number}` from 1, `{title}`, `{text}` (all of the item's text), and `{id}`, what a
            generative policy writes for the item.
        rating: put after a line whose rating is known; `{rating}`.
        age: put after a line whose time is known; `{age}`, for example `3 days`.
        separator: put between the lines of the history.
        answer: how the model's answer begins, as it stands but for the history. With `{history}` here the model goes on
            with the user's own list, and each stretch of a sequence is the beginning of the next one's prompt: a warm
            start runs them all at once.
        longest_title: characters that are kept of a title or text.

    Raises:
        InputError: for a text with an unknown or missing placeholder.

    Example:
        >>> catalogue = Catalogue(["a", "b"], ["Ape", "Bee"])
        >>> batch = {"history": torch.tensor([[-1, 1, 0]]), "history_age": torch.tensor([[0.0, 172_800.0, 60.0]])}
        >>> print(PromptTemplate().history_text(batch, 0, catalogue))
        1. Bee, 2 days ago
        2. Ape, 1 minute ago
    """

    system: str = "You recommend items to users."
    user: str = (
        "The user's history, oldest first:\n{history}\n\n"
        "What will the user choose next? Think about what the user likes."
    )
    item: str = "{number}. {title}"
    rating: str = ", rated {rating}"
    age: str = ", {age} ago"
    separator: str = "\n"
    answer: str = ""
    longest_title: int = 100

    def __post_init__(self) -> None:
        places = int("{history}" in self.answer)
        for name, known in _FIELDS.items():
            text = getattr(self, name)
            try:
                found = {part[1] for part in string.Formatter().parse(text) if part[1] is not None}
                unknown = sorted(found - known.keys())
                if not unknown:
                    text.format(**known)
            except ValueError as error:
                raise InputError(f"prompt.{name} cannot be read ({error}): write {{{{ for a brace") from error
            if unknown:
                takes = ", ".join(f"{{{field}}}" for field in known) or "no placeholder"
                raise InputError(f"prompt.{name} has the placeholder {{{unknown[0]}}}: it takes {takes}")
            places += "history" in found
        if places != 1:
            where = "both prompt.user and prompt.answer hold" if places else "neither prompt.user nor prompt.answer has"
            raise InputError(f"{where} the history: put {{history}} into one of them")
        if self.longest_title < 1:
            raise InputError(f"prompt.longest_title is {self.longest_title}: keep at least 1 character")

    def history_text(
        self, batch: Mapping[str, Tensor], row: int, catalogue: Catalogue, ids: Sequence[str] | None = None
    ) -> str:
        """The lines of one sample's history.

        Args:
            batch: `history` [B, W] padded with -1; where there are, `history_rating` [B, W] and `history_age` [B, W] in
                seconds, NaN where unknown.
            row: which sample.
            catalogue: of titles and texts.
            ids: what stands for each item where the template says `{id}`; the external ids if None.
        """
        known = {name: batch[name][row].tolist() for name in _COLUMNS if name in batch}
        lines: list[str] = []
        for column, item in enumerate(known["history"]):
            if item < 0:
                continue
            line = self.item.format(
                number=len(lines) + 1,
                title=self.title_of(catalogue, item),
                text=self.cut(catalogue.texts[item]),
                id=(catalogue.item_ids if ids is None else ids)[item],
            )
            rating, age = (known[name][column] if name in known else math.nan for name in _COLUMNS[1:])
            if not math.isnan(rating):
                line += self.rating.format(rating=f"{rating:g}")
            if not math.isnan(age):
                line += self.age.format(age=time_ago(age))
            lines.append(line)
        return self.separator.join(lines)

    def title_of(self, catalogue: Catalogue, item: int) -> str:
        """The title of an item, cut; its external id where it has none."""
        title = "" if catalogue.titles is None else " ".join(catalogue.titles[item].split())
        return self.cut(title or catalogue.item_ids[item])

    def cut(self, text: str) -> str:
        """The first `longest_title` characters, the last of them an ellipsis where some are lost."""
        return text if len(text) <= self.longest_title else f"{text[: self.longest_title - 1].rstrip()}…"

    def render(self, tokenizer: Any, history: str) -> str:
        """The whole prompt, up to where the model goes on writing.

        Raises:
            InputError: if the tokenizer has no chat template.
        """
        if tokenizer.chat_template is None:
            raise InputError(
                "the tokenizer has no chat template: take an instruction-tuned model, or put a chat_template.jinja "
                "into its folder"
            )
        system, user = self.system.format(), self.user.format(history=history)
        answer = self.answer.replace("{history}", history)
        if system:
            with_system = [{"role": "system", "content": system}, {"role": "user", "content": user}]
            try:
                text = _opened(tokenizer, with_system)
            except Exception as error:
                # Templates refuse the role by raising an error of jinja.
                if type(error).__module__.partition(".")[0] != "jinja2":
                    raise
                text = ""
            if system.strip() in text:
                return text + answer
            user = f"{system}\n\n{user}"
        return _opened(tokenizer, [{"role": "user", "content": user}]) + answer

    def encode(
        self,
        tokenizer: Any,
        batch: Mapping[str, Tensor],
        catalogue: Catalogue,
        longest: int | None = None,
        ids: Sequence[str] | None = None,
    ) -> EncodedPrompts:
        """Prompts of a batch as tokens, on the batch's device. Special tokens inside an item's text are left out.

        Args:
            tokenizer: of the model.
            batch: see `history_text`; `sample_id` [B] for messages.
            catalogue: of titles and texts.
            longest: tokens that a prompt may have; None for any number.
            ids: see `history_text`.

        Raises:
            InputError: if a prompt is longer, naming its sample.
        """
        columns = {name: batch[name].cpu() for name in _COLUMNS if name in batch}
        texts = []
        for row in range(len(batch["history"])):
            history = self.history_text(columns, row, catalogue, ids)
            for token in tokenizer.all_special_tokens:
                history = history.replace(token, "")
            texts.append(self.render(tokenizer, history))
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        tokens: list[list[int]] = tokenizer(list(place), add_special_tokens=False)["input_ids"]
        width = max(map(len, tokens))
        if longest is not None and width > longest:
            prompt = max(range(len(tokens)), key=lambda i: len(tokens[i]))
            sample = next(row for row, text in enumerate(texts) if place[text] == prompt)
            name = f" of sample {int(batch['sample_id'][sample])}" if "sample_id" in batch else ""
            raise InputError(
                f"the prompt{name} has {width} tokens and {longest} fit before what is generated: lower "
                "data.history_window or prompt.longest_title"
            )
        device = batch["history"].device
        input_ids = torch.full((len(tokens), width), tokenizer.pad_token_id)
        mask = torch.zeros(len(tokens), width, dtype=torch.int64)
        for i, prompt_tokens in enumerate(tokens):
            input_ids[i, width - len(prompt_tokens) :] = torch.tensor(prompt_tokens)
            mask[i, width - len(prompt_tokens) :] = 1
        row_of = torch.tensor([place[text] for text in texts])
        return EncodedPrompts(input_ids.to(device), mask.to(device), row_of.to(device))


def _opened(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text
