"""Texts that are partly from a catalogue, and their tokens: what a catalogue says is never a control token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from minirec_pl.utils.errors import InputError

_RUNES = [chr(code) for code in range(0x16A0, 0x16EB)]  # letters that no normaliser changes
_DIGITS = str.maketrans("0123456789", "".join(_RUNES[:10]))
_OPEN, _BETWEEN, _CLOSE = _RUNES[10:13]
_LETTERS, _SIGNS = [*"qzxjkv", *reversed(_RUNES)], [*"~^;,", *map(chr, range(0x25A0, 0x2600))]
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Text(NamedTuple):
    """A text and which of it is from a catalogue.

    Attributes:
        text: the whole of it.
        spans: (start, stop) of each stretch from a catalogue, in order.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def joined(parts: Iterable[tuple[str, bool]]) -> Text:
    """A text out of parts, each with whether it is from a catalogue.

    Example:
        >>> joined([("1. ", False), ("Alien", True), (", ", False), ("Heat", True)])
        Text(text='1. Alien, Heat', spans=((3, 8), (10, 14)))
    """
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for text, foreign in parts:
        texts.append(text)
        stop = start + len(text)
        if foreign and text:
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
        start = stop
    return Text("".join(texts), tuple(spans))


def encode_catalogue(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of texts that are from a catalogue as a whole, without a start or end; see `encode_texts`."""
    return encode_texts(tokenizer, [Text(text, ((0, len(text)),)) for text in texts])


def encode_texts(tokenizer: Any, texts: Sequence[Text], *, add_special_tokens: bool = False) -> list[list[int]]:
    """Tokens of texts, each as the tokenizer encodes it, but for control tokens that a catalogue spells.

    Such a spelling is encoded as any other text. Control tokens are the special ones and the added ones, but for added
    tokens that are whitespace, and those that are not special and begin and end with a letter or digit.

    Args:
        tokenizer: of transformers, a fast one.
        texts: any number.
        add_special_tokens: also those that the tokenizer puts around a text.

    Raises:
        InputError: if the tokenizer is not a fast one, or its parts cannot be copied.
    """
    if not texts:
        return []
    control = _control_of(tokenizer)
    batch = tokenizer([text.text for text in texts], add_special_tokens=add_special_tokens)
    rows: list[list[int]] = batch["input_ids"]
    return [
        control.encode(tokenizer, text, add_special_tokens)
        if any(_overlaps(span, text.spans) for _, span in control.found(row, encoding, text.text))
        else row
        for text, row, encoding in zip(texts, rows, batch.encodings, strict=True)
    ]


def rows_of(model: Any) -> int:
    """Tokens that a model of transformers has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_rows(highest: int, rows: int, tokenizer: Any) -> None:
    """Refuses a token that the model has no embedding for.

    Args:
        highest: the highest token of a text.
        rows: see `rows_of`.
        tokenizer: the one that encoded the text.

    Raises:
        InputError: naming the token.
    """
    if highest >= rows:
        name = tokenizer.convert_ids_to_tokens(highest)
        raise InputError(
            f"a prompt, marker or item text has the token {name} ({highest}) and the model embeds only {rows}: leave "
            f"{name} out of prompt, answer_marker and item_prompt"
        )


def _overlaps(span: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    start, stop = span
    if not spans or stop <= spans[0][0] or start >= spans[-1][1]:
        return False
    return any(start < other_stop and other_start < stop for other_start, other_stop in spans)


Found = tuple[int, tuple[int, int]]  # a control token, and where it stands


class _Token(NamedTuple):
    content: str
    normalized: bool


class _Copy(NamedTuple):
    """A copy of a tokenizer in which each control token is spelt with runes.

    Attributes:
        core: the copy, of tokenizers.
        spelling: of each control token.
        ids: tokens of the original, for those of the copy that differ.
    """

    core: Any
    spelling: dict[int, str]
    ids: dict[int, int]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.core.encode(text, add_special_tokens=False).ids
        return [self.ids.get(token, token) for token in ids]


class _Control:
    """The control tokens of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        core = tokenizer.backend_tokenizer
        self.normalizer = core.normalizer
        self.others: dict[int, Any] = {}
        self.tokens: dict[int, _Token] = {}
        for token, added in core.get_added_tokens_decoder().items():
            if _is_control(added):
                self.tokens[token] = _Token(added.content, added.normalized)
            else:
                self.others[token] = added
        for token in tokenizer.all_special_ids:
            if token not in self.tokens and token not in self.others:
                self.tokens[token] = _Token(tokenizer.convert_ids_to_tokens(token), False)
        self.unknown = _unknown_of(core)
        spelt = "".join(token.content for token in self.tokens.values()).casefold()
        self.letter = next(letter for letter in _LETTERS if letter not in spelt)
        self.sign = next(sign for sign in _SIGNS if sign not in spelt)
        self.copies: dict[int, _Copy] = {}

    def found(self, ids: Sequence[int], encoding: Any, text: str) -> list[Found]:
        """The control tokens of an encoded text; an unknown word does not count."""
        tokens = self.tokens
        places = [(token, encoding.token_to_chars(place)) for place, token in enumerate(ids) if token in tokens]
        return [
            (token, chars[-2:])
            for token, chars in places
            if chars is not None and (token != self.unknown or self._spells(text[chars[-2] : chars[-1]]))
        ]

    def _spells(self, text: str) -> bool:
        """Whether a text that became the unknown token spells it."""
        assert self.unknown is not None
        name = self.tokens[self.unknown].content
        if self.normalizer is None or name in text:
            return name in text
        return name in (plain := self.normalizer.normalize_str(text)) or self.normalizer.normalize_str(name) in plain

    def encode(self, tokenizer: Any, text: Text, add_special_tokens: bool) -> list[int]:
        """The tokens of a text whose catalogue spells control tokens.

        The control tokens that stand outside the catalogue are found with all of the catalogue masked. In a copy of the
        tokenizer they have other spellings, which the text does not hold, so that they are the only ones there.
        """
        masked = self._masked(text)
        batch = tokenizer([masked], add_special_tokens=add_special_tokens)
        encoding, ids = batch.encodings[0], batch["input_ids"][0]
        own = [found for found in self.found(ids, encoding, masked) if _is_own(found, text.spans)]
        inside = [place for place, around in enumerate(encoding.special_tokens_mask) if not around]
        first, last = (inside[0], inside[-1] + 1) if inside else (len(ids), len(ids))
        copy = self._copy_for(tokenizer, text.text)
        made: list[int] = []
        for stripped in (True, False):
            if copy.encode("".join(self._respelt(masked, own, copy, stripped))) == ids[first:last]:
                made = copy.encode("".join(self._respelt(text.text, own, copy, stripped)))
                break
        else:
            stretches = self._respelt(text.text, own, copy, False)[::2]
            for place, stretch in enumerate(stretches):
                made += [*copy.encode(stretch), *(token for token, _ in own[place : place + 1])]
        return [*ids[:first], *made, *ids[last:]]

    def _respelt(self, text: str, own: Sequence[Found], copy: _Copy, stripped: bool) -> list[str]:
        """The text as stretches with the copy's spelling of a control token between each two.

        Args:
            text: the whole of it.
            own: its control tokens.
            copy: of the tokenizer.
            stripped: leave the space around tokens that are normalised, which may be part of how these are known.
        """
        parts, end = [], 0
        for token, (start, stop) in own:
            if stripped and self.tokens[token].normalized:
                word = text[start:stop]
                start, stop = start + len(word) - len(word.lstrip()), stop - len(word) + len(word.rstrip())
            parts += [text[end:start], copy.spelling[token]]
            end = stop
        return [*parts, text[end:]]

    def _masked(self, text: Text) -> str:
        characters = list(text.text)
        for start, stop in text.spans:
            for place in range(start, stop):
                characters[place] = self.letter if re.match(r"\w", characters[place]) else self.sign
        return "".join(characters)

    def _copy_for(self, tokenizer: Any, text: str) -> _Copy:
        """A copy whose spellings begin with what is not in the text."""
        number = 0
        while _beginning(number) in text:
            number += 1
        if number not in self.copies:
            self.copies = {number: self._copied(tokenizer, number)}
        return self.copies[number]

    def _copied(self, tokenizer: Any, number: int) -> _Copy:
        from tokenizers import Tokenizer

        spelling = {
            token: f"{_beginning(number)}{str(place).translate(_DIGITS)}{_CLOSE}"
            for place, token in enumerate(self.tokens)
        }
        renamed = {self.tokens[token].content: name for token, name in spelling.items()}
        try:
            parts = json.loads(tokenizer.backend_tokenizer.to_str())
            parts |= {"truncation": None, "padding": None, "post_processor": None, "added_tokens": []}
            parts["model"] = _renamed(parts["model"], renamed, _beginning(number))
            core: Any = Tokenizer.from_str(json.dumps(parts))
        except Exception as error:  # tokenizers raises nothing narrower
            raise InputError(
                f"the tokenizer cannot be copied to encode titles that spell control tokens "
                f"({' '.join(str(error).split())[:200]}): use a model whose tokenizer is a tokenizer.json"
            ) from error
        core.add_tokens([_added(spelling[token], old.normalized) for token, old in self.tokens.items()])
        core.add_tokens(list(self.others.values()))
        names = {**spelling, **{token: added.content for token, added in self.others.items()}}
        return _Copy(core, spelling, {core.token_to_id(name): token for token, name in names.items()})


def _unknown_of(core: Any) -> int | None:
    """The token of what a tokenizer has no piece for."""
    unknown: int | None
    if hasattr(core.model, "unk_token"):
        unknown = None if core.model.unk_token is None else core.token_to_id(core.model.unk_token)
    else:
        unknown = json.loads(core.model.__getstate__()).get("unk_id")
    return unknown


def _is_control(added: Any) -> bool:
    content = added.content
    if not content.replace("▁", " ").strip():
        return False
    return bool(added.special) or not ((content[0].isalnum() and content[-1].isalnum()) or _BYTE.fullmatch(content))


def _is_own(found: Found, spans: Sequence[tuple[int, int]]) -> bool:
    start, stop = found[1]
    return start < stop and not _overlaps((start, stop), spans)


def _beginning(number: int) -> str:
    return f"{_OPEN}{str(number).translate(_DIGITS)}{_BETWEEN}"


def _added(content: str, normalized: bool) -> Any:
    from tokenizers import AddedToken

    return AddedToken(content, normalized=normalized)


def _renamed(model: Mapping[str, Any], names: Mapping[str, str], filler: str) -> dict[str, Any]:
    """A tokenizer's model whose pieces have other names, so that no text is encoded as one of them.

    Args:
        model: of a tokenizer.json.
        names: new names of pieces.
        filler: begins the names of pieces for the numbers between those of others, which tokens that are added to the
            model would get.
    """
    made = dict(model)
    vocabulary = model["vocab"]
    if isinstance(vocabulary, Mapping):
        free = set(range(max(vocabulary.values(), default=0))).difference(vocabulary.values())
        made["vocab"] = {names.get(piece, piece): token for piece, token in vocabulary.items()}
        made["vocab"] |= {f"{filler}{token}": token for token in free}
    else:
        made["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        made["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        made["merges"] = [
            [left, right] for left, right in pairs if names.keys().isdisjoint((left, right, left + right[prefix:]))
        ]
    return made


_KNOWN: WeakKeyDictionary[Any, tuple[int, _Control]] = WeakKeyDictionary()


def _control_of(tokenizer: Any) -> _Control:
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise InputError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so titles could become control tokens: use a model "
            "that has a tokenizer.json"
        )
    size = core.get_vocab_size(with_added_tokens=True)
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != size:
        known = _KNOWN[tokenizer] = size, _Control(tokenizer)
    return known[1]
