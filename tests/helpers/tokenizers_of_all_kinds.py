"""Small tokenizers of many kinds with the same added tokens, and the same ones without any control token."""

import functools

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

START, END, PAD, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<unk>"
CONTROL = [
    AddedToken(PAD, special=True, normalized=False),
    AddedToken(START, special=True, normalized=False),
    AddedToken(END, special=True, normalized=False),
    AddedToken(UNKNOWN, special=True, normalized=False),
    AddedToken("<|start_header_id|>", special=True, normalized=False),
    AddedToken("</s>", special=True, normalized=True),
    AddedToken("<think>", special=False, normalized=False),
    AddedToken("[inst]", special=False, normalized=True),
    AddedToken("<item:50>", special=False, normalized=False),
    AddedToken("<a_3>", special=False, normalized=False),
    AddedToken("<mask>", special=True, normalized=False, lstrip=True, rstrip=True),
    AddedToken("[S]", special=True, normalized=False, single_word=True),
]
WORDS = [
    AddedToken("\n\n", special=False, normalized=False),
    AddedToken("film", special=False, normalized=False),
]
NAMES = [token.content for token in CONTROL]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["th", "in", "the", "im", "im_", "|>", "<|", "</", "end", "In", "en"]
CHARACTERS = [chr(code) for code in range(33, 127)] + ["é", "▁", "Ｉ"]
_BYTES_TO_TEXT = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _byte_level(names, ignore_merges):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("i", "n"), ("i", "m"), ("Ġ", "t"), ("<", "|"), ("|", ">"), ("e", "n"), ("en", "d")]
    pieces = [*names, *alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, ignore_merges=ignore_merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if ignore_merges:  # each word is one that the vocabulary may hold
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\s+|<[^<>]*>|\[[^\[\]]*\]"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    core.decoder = decoders.ByteLevel()
    return core


def _unigram(names, scheme):
    scores = [*((name, -1.0) for name in names), *((byte, -20.0) for byte in BYTES)]
    scores += [*((c, -9.0) for c in CHARACTERS), *((piece, -5.0) for piece in PIECES), ("▁the", -4.0)]
    core = Tokenizer(models.Unigram(scores, unk_id=NAMES.index(UNKNOWN), byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = _BYTES_TO_TEXT
    return core


def _word_piece(names):
    characters = [c for c in CHARACTERS if c == c.lower()]
    pieces = [*names, *characters, *(f"##{c}" for c in characters), "the", "##ink", "inst"]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token=names[3]))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return core


def _prepended(names):
    merges = [("t", "h"), ("i", "n"), ("<", "|"), ("|", ">"), ("▁", "t"), ("▁", "<")]
    pieces = [*names, *BYTES, *CHARACTERS, *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token=names[3], fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = _BYTES_TO_TEXT
    return core


def _word_level(names):
    pieces = [*names, *CHARACTERS, "the", "im_start", "im_end", "user", "Seen"]
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=names[3]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return core


KINDS = {
    "byte-level": lambda names: _byte_level(names, False),
    "ignore-merges": lambda names: _byte_level(names, True),
    "unigram-first": lambda names: _unigram(names, "first"),
    "unigram-always": lambda names: _unigram(names, "always"),
    "unigram-never": lambda names: _unigram(names, "never"),
    "word-piece": _word_piece,
    "prepended": _prepended,
    "word-level": _word_level,
}


@functools.cache
def tokenizer_of(kind, template):
    core = KINDS[kind](NAMES)
    core.add_tokens(CONTROL + WORDS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=START, eos_token=END, pad_token=PAD, unk_token=UNKNOWN
    )
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def bare(kind):
    """One that has no name for a control token, with the ids of the other."""
    core = KINDS[kind]([f"\0{i}\0" for i in range(len(NAMES))])
    size = core.get_vocab_size()
    core.add_tokens(WORDS)
    assert [core.token_to_id(word.content) for word in WORDS] == [size, size + 1]
    return core


def plain_ids(kind, text, at_start=False):
    """Tokens of a stretch of text without control tokens."""
    if kind == "unigram-first" and not at_start:
        kind = "unigram-never"
    return bare(kind).encode(text, add_special_tokens=False).ids if text else []
