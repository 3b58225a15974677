"""What a pretrained language model writes for an item: its title, codes of its meaning, or a token of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from minirec_pl.data.samples import Catalogue
from minirec_pl.policy.catalogue_text import check_rows, encode_catalogue, rows_of
from minirec_pl.policy.folder import Chat, StoredPolicy
from minirec_pl.policy.language_models.causal_lm import body_of, by_length, pad_left, places
from minirec_pl.policy.language_models.model_config import text_config
from minirec_pl.policy.language_models.model_support import check_support
from minirec_pl.policy.language_models.pretrained import LanguageModel, grow
from minirec_pl.policy.language_models.tiny import item_token
from minirec_pl.policy.prompt import PromptTemplate
from minirec_pl.policy.semantic_ids import SemanticIds, code_names, item_factors, read_embeddings, residual_codes
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.modules import evaluation_mode

_START_LENGTH = 0.3
_TOKENS = 4096  # of a batch, padding included
_LONGEST = 256  # tokens of a text

IdKind = Literal["title", "semantic", "token"]
ID_KINDS = ("title", "semantic", "token")


class ItemIds(NamedTuple):
    """The ids of a catalogue.

    Attributes:
        tokens: int64 [n_items, L], padded with -1.
        texts: the same for people and for prompts, [n_items].
    """

    tokens: Tensor
    texts: list[str]


def check_id_options(
    in_words: bool, built: bool, kind: str, semantic_ids: SemanticIds | None, prompt: PromptTemplate | None
) -> None:
    """Refuses options that do not go together.

    Args:
        in_words: whether there is a language model to be loaded.
        built: whether a small model is built from a config.
        kind: of the ids.
        semantic_ids: as given.
        prompt: as given.

    Raises:
        InputError: naming the option.
    """
    if kind not in ID_KINDS:
        raise InputError(f"item_ids is {kind!r}: choose one of {', '.join(ID_KINDS)}")
    if semantic_ids is not None and not ((in_words or built) and kind == "semantic"):
        raise InputError("semantic_ids goes with a language_model or a config and item_ids 'semantic': leave it out")
    if prompt is not None and not in_words:
        raise InputError("prompt goes with a language_model; a folder of `pretrained` has its own: leave it out")


def title_ids(tokenizer: Any, catalogue: Catalogue, prompt: PromptTemplate) -> ItemIds:
    """The tokens of each title as prompts show it, and the end of a sequence.

    Titles that come to the same tokens get a number in the order of the catalogue, from the second one on: ` (2)`.
    """
    titles = [prompt.title_of(catalogue, item) for item in range(len(catalogue))]

    taken: set[tuple[int, ...]] = set()
    numbers: dict[str, int] = {}
    ids, texts = [], []
    for title, row in zip(titles, encode_catalogue(tokenizer, titles), strict=True):
        text = title
        while tuple(row) in taken:
            numbers[title] = numbers.get(title, 1) + 1
            text = f"{title} ({numbers[title]})"
            row = encode_catalogue(tokenizer, [text])[0]
        taken.add(tuple(row))
        ids.append([*row, tokenizer.eos_token_id])
        texts.append(text)
    return ItemIds(_padded(ids), texts)


def added_ids(
    model: Any, tokenizer: Any, catalogue: Catalogue, kind: Literal["semantic", "token"], options: SemanticIds
) -> tuple[ItemIds, list[int]]:
    """Ids of new tokens, which are added to model and tokenizer, and these tokens.

    A new token's row in the embedding, and in the head where that has its own, starts in the direction of the mean of
    the text tokens of the items that have it. It is 0.3 times as long as other rows are on average, so that no item
    begins as a near certainty: the 1,682 of MovieLens-100K cost SmolLM2-135M 7.8 nats then, and 14.1 at full length.

    Args:
        model: without adapters.
        tokenizer: its tokenizer.
        catalogue: of titles and texts.
        kind: `semantic`, see `SemanticIds`, or `token`, one for each item.
        options: of `semantic`.
    """
    if kind == "token":
        names = [[item_token(item_id)] for item_id in catalogue.item_ids]
    else:
        if options.embeddings is None:
            embeddings = text_states(model, tokenizer, catalogue.texts)
        else:
            embeddings = read_embeddings(Path(options.embeddings), len(catalogue))
        names = code_names(residual_codes(embeddings, options.levels, options.codes, options.seed))
    text_tokens = encode_catalogue(tokenizer, catalogue.texts)
    new = _add_tokens(model, tokenizer, sorted({name for row in names for name in row}))
    tokens = [[new[name] for name in row] for row in names]
    _start_rows(model, tokens, [row or [tokenizer.eos_token_id] for row in text_tokens])
    return ItemIds(_padded(tokens), ["".join(row) for row in names]), sorted(new.values())


class BuiltIds(NamedTuple):
    """The ids of a small model of their own vocabulary.

    Attributes:
        tokens: int64 [n_items, L], padded with -1, from 0.
        words: names of the tokens, in order.
    """

    tokens: Tensor
    words: list[str]


def built_ids(catalogue: Catalogue, kind: IdKind, options: SemanticIds | None) -> BuiltIds:
    """Makes the ids of a model that is built from a config: one token an item, or several of shared codes.

    Args:
        catalogue: whose log gives the codes where `options` names no embeddings.
        kind: `semantic` for codes; one token otherwise.
        options: of `semantic`; None for the defaults.

    Raises:
        InputError: if there is neither a log nor a file of embeddings.
    """
    if kind != "semantic":
        return BuiltIds(torch.arange(len(catalogue))[:, None], [item_token(item_id) for item_id in catalogue.item_ids])
    options = options or SemanticIds()
    if options.embeddings is not None:
        embeddings = read_embeddings(Path(options.embeddings), len(catalogue))
    elif catalogue.interactions is not None:
        embeddings = item_factors(catalogue.interactions(), len(catalogue), options.seed)
    else:
        raise InputError(
            "item_ids 'semantic' of a config takes its codes from the log: fit with a RecDataModule, or give "
            "semantic_ids.embeddings"
        )
    names = code_names(residual_codes(embeddings, options.levels, options.codes, options.seed))
    words = sorted({name for row in names for name in row})
    place = {word: number for number, word in enumerate(words)}
    return BuiltIds(_padded([[place[name] for name in row] for row in names]), words)


def _padded(ids: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, ids))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in ids])


def _add_tokens(model: Any, tokenizer: Any, names: list[str]) -> dict[str, int]:
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    twice = [name for name in names if name in known]
    if twice:
        raise InputError(
            f"the tokenizer has the token {twice[0]} already: take a model that was not trained with item ids, or go "
            "on with its policy folder as `pretrained`"
        )
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    grow(model, tokenizer)
    return dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))


@torch.no_grad()
def _start_rows(model: Any, ids: list[list[int]], texts: list[list[int]]) -> None:
    ends = [model.get_input_embeddings().weight]
    if not text_config(model).tie_word_embeddings:
        ends.append(model.get_output_embeddings().weight)
    lengths = torch.tensor([len(text) for text in texts])
    used, places = torch.unique(torch.tensor([token for text in texts for token in text]), return_inverse=True)
    tokens, column = torch.unique(torch.tensor([token for row in ids for token in row]), return_inverse=True)
    item = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(row) for row in ids]))
    for weight in ends:
        known = weight[used.to(weight.device)].float().cpu()
        starts = torch.cumsum(lengths, 0) - lengths
        of_items = torch.nn.functional.embedding_bag(places, known, starts, mode="mean")
        rows = known.new_zeros(len(tokens), known.shape[1]).index_add_(0, column, of_items[item])
        rows = torch.nn.functional.normalize(rows, dim=1) * (_START_LENGTH * known.norm(dim=1).mean())
        weight[tokens.to(weight.device)] = rows.to(weight)


def load_with_ids(
    language_model: LanguageModel, catalogue: Catalogue, kind: IdKind, options: SemanticIds, prompt: PromptTemplate
) -> StoredPolicy:
    """A language model ready to write the ids of a catalogue.

    Args:
        language_model: which.
        catalogue: of titles and texts.
        kind: of the ids.
        options: of `semantic` ids.
        prompt: what will be asked; titles are cut as it cuts them.

    Raises:
        InputError: if the model cannot be had, or has no chat template.
    """
    made: list[ItemIds] = []

    def extend(model: Any, tokenizer: Any) -> list[int]:
        check_support(model, cache=kind != "token")
        prompt.render(tokenizer, "")
        if kind == "title":
            made.append(title_ids(tokenizer, catalogue, prompt))
            return []
        ids, new = added_ids(model, tokenizer, catalogue, kind, options)
        made.append(ids)
        return new

    model, tokenizer = language_model.load(extend)
    check_rows(int(made[0].tokens.max()), rows_of(model), tokenizer)
    return StoredPolicy(
        model, catalogue, made[0].tokens, {}, Chat(language_model, tokenizer, prompt, kind, made[0].texts)
    )


def text_states(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The mean of the last hidden states over the first 256 tokens of each text, in batches of similar length.

    Args:
        model: a causal language model of transformers, also inside peft.
        tokenizer: its tokenizer.
        texts: at least one; control tokens in them are plain text.

    Returns:
        float32 [n, D].

    Raises:
        InputError: if there is no text.
    """
    if not texts:
        raise InputError("there is no text to encode: give at least one")
    ids = [row[:_LONGEST] or [tokenizer.eos_token_id] for row in encode_catalogue(tokenizer, texts)]
    device = model.get_input_embeddings().weight.device
    with evaluation_mode(model):
        body = body_of(model)

        def means(rows: Tensor) -> Tensor:
            tokens, mask = pad_left([ids[row] for row in rows.tolist()], tokenizer.pad_token_id, device)
            body.rules.check(mask.sum(dim=1), 0, "a text of the catalogue".format)
            last = body(input_ids=tokens, attention_mask=mask, position_ids=places(mask), use_cache=False)
            states: Tensor = last.last_hidden_state.float()
            return (states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)

        return by_length(torch.tensor([len(row) for row in ids]), means, _TOKENS)
