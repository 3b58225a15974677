"""From a user's history to the tokens of a chat prompt."""

from __future__ import annotations

import datetime
import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirec_pl.data.samples import Catalogue
from minirec_pl.policy.catalogue_text import Text, check_rows, encode_texts, joined
from minirec_pl.policy.language_models.causal_lm import decoder_of, pad_left
from minirec_pl.policy.language_models.model_config import text_setting
from minirec_pl.policy.language_models.positions import position_rules
from minirec_pl.utils.errors import InputError

_UNITS = (("year", 31_557_600), ("month", 2_629_800), ("day", 86_400), ("hour", 3_600), ("minute", 60))
_FIELDS: dict[str, dict[str, Any]] = {  # what each text may hold, with an example
    "system": {},
    "user": {"history": ""},
    "item": {"number": 1, "title": "", "text": "", "id": ""},
    "rating": {"rating": "4"},
    "age": {"age": "1 day"},
}
_COLUMNS = ("history", "history_rating", "history_age")
_STAND_IN = 'ᛟ"History"\nᛟ'  # of the history while a chat template is rendered
_DIRECTIVES = [f"%{flag}{code}" for flag in ("", *"-_0^#") for code in "aAbBcdDefFgGhHIjklmMnprRStTuUVwWxXyYzZ"]
# Chat templates may ask for the time through a function, and newer versions of transformers hand none over.
_DATE_MACRO = """\
{%- macro strftime_now(format) -%}
{%- set seen = namespace(code='') -%}
{%- for letter in format -%}
{%- if not seen.code and letter != '%' -%}{{ letter }}
{%- else -%}
{%- set seen.code = seen.code + letter -%}
{%- if seen.code == '%%' -%}%{%- set seen.code = '' -%}
{%- elif letter not in '%-_0^#' -%}{{ prompt_date.get(seen.code, seen.code) }}{%- set seen.code = '' -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{{ seen.code }}
{%- endmacro %}
"""


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

    Raises:
        InputError: if there is no history.
    """
    if not len(history):
        raise InputError("the batch has no prompts: give at least one sample")
    history = torch.nn.functional.pad(history, (1, 0), value=-1)  # there may be no column
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
        answer: how the model's answer begins, as it stands but for the history. With `{history}` here it continues
            with the user's own list, and each stretch of a sequence is the beginning of the next one's prompt: a warm
            start runs them all at once.
        longest_title: characters that are kept of a title or text.
        date: the day, YYYY-MM-DD, that chat templates which ask for the date are told. It is part of the policy, so
            that scores do not change overnight.

    What the catalogue says is text and nothing else: a title that spells a control token is encoded as its letters. In
    the texts above, and in the chat template, control tokens are control tokens.

    Raises:
        InputError: for a text with an unknown or missing placeholder, or a date that is not one.

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
    date: str = "2026-01-01"

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
                raise InputError(
                    f"--model.policy.prompt.{name} cannot be read ({error}): write {{{{ for a brace"
                ) from error
            if unknown:
                takes = ", ".join(f"{{{field}}}" for field in known) or "no placeholder"
                raise InputError(f"--model.policy.prompt.{name} has the placeholder {{{unknown[0]}}}: it takes {takes}")
            places += "history" in found
        if places != 1:
            where = (
                "both --model.policy.prompt.user and --model.policy.prompt.answer hold"
                if places
                else "neither --model.policy.prompt.user nor --model.policy.prompt.answer has"
            )
            raise InputError(f"{where} the history: put {{history}} into one of them")
        if self.longest_title < 1:
            raise InputError(f"--model.policy.prompt.longest_title is {self.longest_title}: keep at least 1 character")
        try:
            is_date = datetime.date.fromisoformat(self.date).isoformat() == self.date
        except (TypeError, ValueError):
            is_date = False
        if not is_date:
            raise InputError(
                f"--model.policy.prompt.date is {self.date!r}: give a day as YYYY-MM-DD, for example 2026-01-01"
            )

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
        return joined(self._history(batch, row, catalogue, ids)).text

    def _history(
        self,
        batch: Mapping[str, Tensor],
        row: int,
        catalogue: Catalogue,
        ids: Sequence[str] | None,
        own_ids: bool = False,
    ) -> list[tuple[str, bool]]:
        """Parts of a history, each with whether it is from the catalogue."""
        known = {name: batch[name][row].tolist() for name in _COLUMNS if name in batch}
        parts: list[tuple[str, bool]] = []
        number = 0
        for column, item in enumerate(known["history"]):
            if item < 0:
                continue
            if number:
                parts.append((self.separator, False))
            number += 1
            values = {
                "number": number,
                "title": self.title_of(catalogue, item),
                "text": self.cut(catalogue.texts[item]),
                "id": (catalogue.item_ids if ids is None else ids)[item],
            }
            parts += _filled(self.item, values, ("title", "text") if own_ids else ("title", "text", "id"))
            rating, age = (known[name][column] if name in known else math.nan for name in _COLUMNS[1:])
            if not math.isnan(rating):
                parts += _filled(self.rating, {"rating": f"{rating:g}"}, ("rating",))
            if not math.isnan(age):
                parts += _filled(self.age, {"age": time_ago(age)}, ("age",))
        return parts

    def title_of(self, catalogue: Catalogue, item: int) -> str:
        """The title of an item, cut; its external id where it has none."""
        title = "" if catalogue.titles is None else " ".join(catalogue.titles[item].split())
        return self.cut(title or catalogue.item_ids[item])

    def cut(self, text: str) -> str:
        """The first `longest_title` characters, the last of them an ellipsis where some are lost."""
        return text if len(text) <= self.longest_title else f"{text[: self.longest_title - 1].rstrip()}…"

    def render(self, tokenizer: Any, history: str) -> str:
        """The whole prompt, up to where the model begins to write.

        Raises:
            InputError: if the tokenizer has no chat template.
        """
        return self._conversation(tokenizer, history) + self.answer.replace("{history}", history)

    def asks_for_the_date(self, tokenizer: Any) -> bool:
        """Whether the chat template tells the model the date."""
        texts = {replace(self, date=date).render(tokenizer, "") for date in (self.date, "1999-11-23", "2003-08-04")}
        return len(texts) > 1

    def _conversation(self, tokenizer: Any, history: str) -> str:
        if tokenizer.chat_template is None:
            raise InputError(
                "the tokenizer has no chat template: take an instruction-tuned model, or put a chat_template.jinja "
                "into its folder"
            )
        system, user = self.system.format(), self.user.format(history=history)
        if system:
            with_system = [{"role": "system", "content": system}, {"role": "user", "content": user}]
            try:
                text = self._opened(tokenizer, with_system)
            except Exception as error:
                # Templates refuse the role by raising an error of jinja.
                if type(error).__module__.partition(".")[0] != "jinja2":
                    raise
                text = ""
            if system.strip() in text:
                return text
            user = f"{system}\n\n{user}"
        return self._opened(tokenizer, [{"role": "user", "content": user}])

    def _opened(self, tokenizer: Any, messages: list[dict[str, str]]) -> str:
        template, options = tokenizer.get_chat_template(), {}
        if "strftime_now" in template:
            day = datetime.datetime.combine(datetime.date.fromisoformat(self.date), datetime.time())
            options["prompt_date"] = {directive: day.strftime(directive) for directive in _DIRECTIVES}
            options["chat_template"] = _DATE_MACRO + template
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        return text

    def write(
        self,
        tokenizer: Any,
        batch: Mapping[str, Tensor],
        catalogue: Catalogue,
        ids: Sequence[str] | None = None,
        own_ids: bool = False,
    ) -> list[Text]:
        """The prompts of a batch [B] as texts that know what of them is from the catalogue.

        The chat template sees the texts around the history, and a stand-in for what is between its first and last word.

        Args:
            tokenizer: of the model.
            batch: see `history_text`.
            catalogue: of titles and texts.
            ids: see `history_text`.
            own_ids: see `encode`.

        Raises:
            InputError: if the tokenizer has no chat template, or that leaves out or rewrites what the user says.
        """
        columns = {name: batch[name].cpu() for name in _COLUMNS if name in batch}
        conversations: dict[str, list[str]] = {}
        answer = self.answer.split("{history}")
        texts = []
        for row in range(len(batch["history"])):
            history = self._history(columns, row, catalogue, ids, own_ids)
            first, inner, last = ("", [], "") if len(answer) > 1 else _core(history)
            shown = first + _STAND_IN * bool(inner) + last
            if shown not in conversations:
                conversations[shown] = self._conversation(tokenizer, shown).split(_STAND_IN)
                if inner and len(conversations[shown]) == 1:
                    raise InputError(
                        "the chat template of the tokenizer leaves out or rewrites what the user says: put a "
                        "chat_template.jinja that does not into its folder"
                    )
            texts.append(joined([*_spread(conversations[shown], inner), *_spread(answer, history)]))
        return texts

    def encode(
        self,
        tokenizer: Any,
        batch: Mapping[str, Tensor],
        catalogue: Catalogue,
        longest: int | None = None,
        ids: Sequence[str] | None = None,
        *,
        own_ids: bool = True,
        rows: int | None = None,
    ) -> EncodedPrompts:
        """Prompts of a batch as tokens, on the batch's device; what the catalogue says becomes no control token.

        Args:
            tokenizer: of the model.
            batch: see `history_text`; `sample_id` [B] for messages.
            catalogue: of titles and texts.
            longest: tokens that a prompt may have; None for any number.
            ids: see `history_text`.
            own_ids: whether `ids` are made of tokens of the policy's own, and not of titles.
            rows: tokens that the model has an embedding for; None for any number.

        Raises:
            InputError: if a prompt is longer, naming its sample, or has a token without an embedding.
        """
        texts = self.write(tokenizer, batch, catalogue, ids, own_ids and ids is not None)
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        tokens = encode_texts(tokenizer, list(place))
        if not tokens:
            raise InputError("the batch has no prompts: give at least one sample")
        width = max(map(len, tokens))
        if longest is not None and width > longest:
            prompt = max(range(len(tokens)), key=lambda i: len(tokens[i]))
            sample = next(row for row, text in enumerate(texts) if place[text] == prompt)
            name = f" of sample {int(batch['sample_id'][sample])}" if "sample_id" in batch else ""
            raise InputError(
                f"the prompt{name} has {width} tokens and {longest} fit before what is generated: lower "
                "--data.history_window or --model.policy.prompt.longest_title"
            )
        device = batch["history"].device
        input_ids, mask = pad_left(tokens, tokenizer.pad_token_id, "cpu")
        if rows is not None:
            check_rows(int(input_ids.max()), rows, tokenizer)
        row_of = torch.tensor([place[text] for text in texts])
        return EncodedPrompts(input_ids.to(device), mask.to(device), row_of.to(device))


def _filled(template: str, values: Mapping[str, Any], foreign: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Parts of a template with its placeholders filled, each with whether it is one of the `foreign` fields."""
    for literal, field, form, conversion in string.Formatter().parse(template):
        if literal:
            yield literal, False
        if field is not None:
            value = values[field]
            if form or conversion:
                value = f"{{{field}{f'!{conversion}' if conversion else ''}:{form}}}".format(**values)
            yield str(value), field in foreign


def _core(parts: Sequence[tuple[str, bool]]) -> tuple[str, list[tuple[str, bool]], str]:
    """The whitespace that a history's lines begin with, the rest, and the whitespace that they end with.

    Whitespace of the catalogue is not taken off.
    """
    rest = [part for part in parts if part[0]]
    first = last = ""
    while rest and not rest[0][1] and (word := rest[0][0].lstrip()) != rest[0][0]:
        first += rest[0][0][: len(rest[0][0]) - len(word)]
        rest[:1] = [(word, False)] if word else []
    while rest and not rest[-1][1] and (word := rest[-1][0].rstrip()) != rest[-1][0]:
        last = rest[-1][0][len(word) :] + last
        rest[-1:] = [(word, False)] if word else []
    return first, rest, last


def _spread(around: Sequence[str], inner: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The parts `around`, with `inner` between each two of them."""
    parts = [(around[0], False)]
    for text in around[1:]:
        parts += [*inner, (text, False)]
    return parts


def check_positions(model: Any, length: int) -> None:
    """Refuses `length` tokens if the model has fewer positions.

    Raises:
        InputError: if it has.
    """
    _refuse(model, length, lambda: "")


def check_prompts(model: Any, prompts: EncodedPrompts, room: int, sample_ids: Tensor | None) -> None:
    """As `check_positions`, for prompts that leave less than `room` positions; names the sample_id [B] if known."""

    def name() -> str:
        if sample_ids is None:
            return ""
        return f" of sample {int(sample_ids[prompts.mask.sum(dim=1)[prompts.row].argmax()])}"

    _refuse(model, prompts.mask.shape[1] + room, name)


def check_rules(model: Any, prompts: EncodedPrompts, room: int, sample_ids: Tensor | None) -> None:
    """Refuses prompts that do not keep to the rules of the model's positions with `room` more tokens.

    Raises:
        InputError: naming the sample_id [B] if known.
    """

    def name(row: int) -> str:
        if sample_ids is None:
            return f"prompt {row} of the batch"
        return f"the prompt of sample {int(sample_ids[(prompts.row == row).nonzero()[0, 0]])}"

    position_rules(decoder_of(model)).check(prompts.mask.sum(dim=1), room, name)


def _refuse(model: Any, length: int, name: Callable[[], str]) -> None:
    longest = text_setting(model, "max_position_embeddings")
    if longest is not None and length > longest:
        raise InputError(
            f"prompt and item id{name()} take {length} tokens and the model has {longest} positions: lower "
            "data.history_window, or train a policy with a larger max_position_embeddings"
        )
