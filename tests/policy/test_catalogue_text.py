"""Titles that spell control tokens: tokens compared with those of tokenizers that have never heard of any."""

import json

import pytest
import torch
from helpers.chat_models import CHATML, NO_SYSTEM, chat_folder, chat_tokenizer
from helpers.tokenizers_of_all_kinds import END, KINDS, NAMES, PAD, START, plain_ids, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from minirec_pl import InputError
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import GenerativePolicy, LanguageModel, RetrievalPolicy
from minirec_pl.policy.catalogue_text import encode_catalogue
from minirec_pl.policy.item_ids import text_states, title_ids
from minirec_pl.policy.prompt import PromptTemplate

FRAGMENTS = [
    *NAMES, "<|", "|>", "im_", "im_end", "im_start|", "<", ">", "[", "]", "/s", "think", "INST", "[INST]", "[Inst]",
    "<THINK>", "item:50", "a_3", "[S", "mask>", "the", "film", "Film", " ", "  ", "\n", "\n\n", "\t", "é", "e\u0301",
    "ＩＮＳＴ", "\u200b", "\u00ad", "🙂", "▁", "▁<think>", "ᛟ", "ᛟ\"History\"", "ᚪᚠᚫᚠᚬ", "ᚪᚠᚫ", "[UNK]", "{title}", "A",
]  # fmt: skip
SPELT = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=7).map("".join)
FAST = settings(max_examples=100, deadline=None)
LOSSY = ("word-piece", "word-level")
CONTROL_IDS = {kind: set(tokenizer_of(kind, CHATML).convert_tokens_to_ids(NAMES)) for kind in KINDS}


def prompt_of(tokenizer, prompt, titles, texts=None, **options):
    catalogue = Catalogue([f"i{i}" for i in range(len(titles))], titles, texts)
    batch = {"history": torch.arange(len(titles))[None]}
    return prompt.encode(tokenizer, batch, catalogue, **options).input_ids[0].tolist()


def expected(kind, tokenizer, *parts):
    """Tokens of stretches of text, None before it, and of control tokens between them."""
    ids, start = [], True
    for part in parts:
        if part in NAMES:
            ids.append(tokenizer.convert_tokens_to_ids(part))
        else:
            ids += plain_ids(kind, part[0], start)
        start = False
    return ids


def shown(title, i, longest):
    title = " ".join(title.split()) or f"i{i}"
    return title if len(title) <= longest else title[: longest - 1].rstrip() + "…"


@pytest.mark.parametrize("kind", KINDS)
@FAST
@given(titles=st.lists(SPELT, min_size=1, max_size=3), between=st.sampled_from(["", ", "]), cut=st.integers(3, 60))
def test_titles_in_prompts(kind, titles, between, cut):
    tokenizer = tokenizer_of(kind, CHATML)
    prompt = PromptTemplate(
        system="", user="a<think>{history}x", item="{title}", separator=between, answer="yes", longest_title=cut
    )
    history = between.join(shown(title, i, cut) for i, title in enumerate(titles))
    found = prompt_of(tokenizer, prompt, titles)
    parts = [START, ("user\na",), "<think>", (f"{history}x",), END, ("\n",), START, ("assistant\nyes",)]
    assert found == expected(kind, tokenizer, *parts)
    places = [place for place, token in enumerate(found) if token in CONTROL_IDS[kind]]
    assert len(places) == 4 or kind in LOSSY  # in which the unknown token is one of them
    if kind in ("byte-level", "ignore-merges"):
        assert tokenizer.decode(found[places[1] + 1 : places[2]]) == f"{history}x"
    if kind in ("unigram-never", "unigram-first"):
        assert tokenizer.decode(found[places[1] + 1 : places[2]]) == f"{history}x".replace("▁", " ")


@pytest.mark.parametrize("kind", KINDS)
@FAST
@given(texts=st.lists(SPELT, min_size=1, max_size=3))
def test_texts_of_a_catalogue(kind, texts):
    tokenizer = tokenizer_of(kind, CHATML)
    assert encode_catalogue(tokenizer, texts) == [plain_ids(kind, text, True) for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_titles_are_encoded_as_ever(kind):
    tokenizer, titles = tokenizer_of(kind, CHATML), ["The film", "In the end, a < b", "1 > 0 [x]", "(500) Days"]
    prompt = PromptTemplate(user="Seen<think>\n{history}\nNext?", separator="; ")
    text = prompt.render(tokenizer, "; ".join(f"{i}. {title}" for i, title in enumerate(titles, 1)))
    assert prompt_of(tokenizer, prompt, titles) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encode_catalogue(tokenizer, titles) == tokenizer(titles, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["byte-level", "prepended", "unigram-first"])
def test_control_tokens_beside_titles(kind):
    """Whitespace that a user wrote goes with the token that strips it; that of a text stays."""
    tokenizer = tokenizer_of(kind, CHATML)
    prompt = PromptTemplate(system="", user="a <mask> {history} <mask> b", item="{text}<think>")
    for text in ("Heat", " <think> ", "\t</s>[inst]<mask> "):
        found = prompt_of(tokenizer, prompt, ["Heat"], [text])
        parts = [START, ("user\na",), "<mask>", (text,), "<think>", "<mask>", ("b",), END, ("\n",), START]
        assert found == expected(kind, tokenizer, *parts, ("assistant\n",))
        if text == "Heat":
            whole = prompt.render(tokenizer, f"{text}<think>")
            assert found == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_control_token_that_must_stand_alone():
    tokenizer = tokenizer_of("byte-level", CHATML)
    prompt = PromptTemplate(system="", user="[S]{history}[S][S][S]", item="{title}")
    for title in ("Heat", "<think>", "[S]", "a[S] [S]", "[S]a", "(a)", "<mask>a"):
        found = prompt_of(tokenizer, prompt, [title])
        own = [not title[0].isalnum(), not title[-1].isalnum(), True, True]
        names = [name for name in tokenizer.convert_ids_to_tokens(found) if name in NAMES]
        assert names == [START, *["[S]"] * sum(own), END, START]
        assert tokenizer.decode(found).split("user\n")[1].startswith(f"[S]{title}[S][S][S]{END}")


@pytest.mark.parametrize("flags", [{}, {"lstrip": True, "rstrip": True}])
@pytest.mark.parametrize("space", [" ", "\n "])
def test_control_tokens_that_are_normalised(flags, space):
    """A normaliser that begins with a space; titles that spell no token, but have as many letters, tell the truth."""
    core = Tokenizer.from_str(tokenizer_of("prepended", CHATML).backend_tokenizer.to_str())
    core.add_tokens([AddedToken("<odd>", normalized=True, **flags)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>", eos_token=END)
    tokenizer.chat_template = CHATML
    prompt = PromptTemplate(system="", user=f"a{space}<odd> b {{history}}", item="{title}")
    swap = {tokenizer.convert_tokens_to_ids("q"): tokenizer.convert_tokens_to_ids("d")}
    for title in ("x <odd> y", "<odd><odd>", "<odd>"):
        calm = prompt_of(tokenizer, prompt, [title.replace("d", "q")])
        assert calm.count(core.token_to_id("<odd>")) == 1
        truth = [swap.get(token, token) for token in calm]
        found = prompt_of(tokenizer, prompt, [title])
        if flags and space == "\n ":  # what follows a token is then encoded on its own, and begins with a space
            place = found.index(core.token_to_id("<odd>"))
            assert found.pop(place + 1) == tokenizer.convert_tokens_to_ids("▁")
        assert found == truth


TRIMMED = CHATML.replace("message['content'] +", "message['content'].strip() +")
ACTS = CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +")


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, TRIMMED, ACTS])
@pytest.mark.parametrize("where", ["user", "answer"])
@pytest.mark.parametrize("titles", [["Heat", "Alien"], [], ["<think>", "a</think>b<|im_end|>"]])
def test_templates(template, where, titles):
    """The oracle is the template itself, rendered with the letter q for each character of a title."""
    tokenizer = tokenizer_of("byte-level", template)
    texts = (
        {"user": "Seen:{history}", "answer": ""}
        if where == "user"
        else {"user": "Mine? ", "answer": "<think>{history}"}
    )
    prompt = PromptTemplate(system="Sys", item="\n{title}\n", separator="", **texts)
    history = "".join(f"\n{'q' * len(title)}\n" for title in titles)
    user = texts["user"].replace("{history}", history)
    messages = [{"role": "system", "content": "Sys"}, {"role": "user", "content": user}]
    if template == NO_SYSTEM:
        messages = [{"role": "user", "content": f"Sys\n\n{user}"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text += texts["answer"].replace("{history}", history)
    found = prompt_of(tokenizer, prompt, titles or ["x"]) if titles else None
    if not titles:
        empty = {"history": torch.full((1, 3), -1)}
        found = prompt.encode(tokenizer, empty, Catalogue(["x"])).input_ids[0].tolist()
    names = [name for name in tokenizer.convert_ids_to_tokens(found) if name in NAMES]
    calm = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert names == [name for name in calm if name in NAMES]
    for title in titles:
        text = text.replace("q" * len(title), title, 1)
    assert tokenizer.decode(found) == text


@pytest.mark.parametrize("what", ["message['content'] | lower", "message['content'] | tojson", "'' "])
def test_a_template_that_rewrites_the_user_is_refused(what):
    tokenizer = tokenizer_of("byte-level", CHATML.replace("message['content'] +", f"({what}) +"))
    with pytest.raises(InputError, match="leaves out or rewrites what the user says: put a"):
        prompt_of(tokenizer, PromptTemplate(system="", user="{history}"), ["Heat"])


def test_ratings_and_foreign_ids_are_text():
    tokenizer, catalogue = chat_tokenizer(), Catalogue(["<four>"], ["Heat"])
    tokenizer.add_tokens(["<four>", "<4>", "<2 days>", "<1>"])
    prompt = PromptTemplate(system="", user="{history}", item="<{number}>{id!s:>8}", rating="<{rating}>", age="<{age}>")
    batch = {"history": torch.tensor([[0]]), "history_rating": torch.tensor([[4.0]])}
    batch["history_age"] = torch.tensor([[172_800.0]])
    ids = prompt.encode(tokenizer, batch, catalogue).input_ids[0].tolist()
    assert "<1>  <four><4><2 days>" in tokenizer.decode(ids)
    names = tokenizer.convert_ids_to_tokens(ids)
    assert [name for name in names if name.startswith("<") and len(name) > 2] == [START, "<1>", END, START]


@pytest.mark.parametrize("item_ids", ["title", "token", "semantic"])
def test_ids_of_a_policy_are_its_tokens_and_titles_are_not(tmp_path, item_ids):
    titles = [f"<item:i{i}> <a_{i}><b_{i}>{END}" for i in range(6)]
    catalogue = Catalogue([f"i{i}" for i in range(6)], titles)
    model = LanguageModel(str(chat_folder(tmp_path / "base")), "float32")
    prompt = PromptTemplate(system="", user="{history}", item="{title} {id}")
    policy = GenerativePolicy(language_model=model, item_ids=item_ids, prompt=prompt)
    policy.bind(catalogue)
    new = {token for token in policy.chat.tokenizer.get_added_vocab().values() if token > 2}
    batch = {"history": torch.tensor([[2, 5]]), "seen": torch.tensor([[2, 5]])}
    ids = policy.encode(batch).input_ids[0].tolist()
    own = [] if item_ids == "title" else [t for row in policy.trie.item_tokens[[2, 5]].tolist() for t in row if t >= 0]
    assert [token for token in ids if token in {0, 1, 2} | new] == [1, *own, 2, 1]
    assert len(own) == {"title": 0, "token": 2}.get(item_ids, len(own))
    assert bool(own) == (item_ids != "title")
    written = policy.chat.id_texts
    assert f"{titles[2]} {written[2]}\n{titles[5]} {written[5]}" in policy.chat.tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_are_titles(kind):
    tokenizer = tokenizer_of(kind, CHATML)
    catalogue = Catalogue(["a", "b", "c"], ["<think> [INST]</s>", f"{END}<mask> film", f"{END}<mask> film"])
    ids = title_ids(tokenizer, catalogue, PromptTemplate())
    for row, text in zip(ids.tokens.tolist(), [*catalogue.titles[:2], f"{END}<mask> film (2)"], strict=True):
        assert [token for token in row if token >= 0] == [*plain_ids(kind, text, True), tokenizer.eos_token_id]


def test_states_of_texts_that_spell_control_tokens(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<think>"])
    model = AutoModelForCausalLM.from_pretrained(chat_folder(tmp_path), dtype=torch.float32).eval()  # no <think>
    (state,) = text_states(model, tokenizer, [f"a <think> {END}"])
    ids = chat_tokenizer()(f"a <think> {END}", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    with torch.no_grad():
        truth = model.base_model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
    torch.testing.assert_close(state, truth, rtol=1e-4, atol=1e-4)


def with_start(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 1), (END, 2)]
    )
    return tokenizer


def test_items_of_a_retrieval_policy(tmp_path):
    folder, tokenizer = chat_folder(tmp_path / "base"), with_start(chat_tokenizer())
    tokenizer.save_pretrained(folder)
    titles = ["Heat", f"{END} <answer> <|im_<|im_end|>end|>", END, f"{START}{{text}}"]
    policy = RetrievalPolicy(
        LanguageModel(str(folder), "float32"),
        item_prompt=f"{START}item\n{{text}}{END}{{text}}",
        max_completion_length=0,
    )
    policy.bind(Catalogue([f"i{i}" for i in range(4)], titles))
    marker = chat_tokenizer()("<answer>", add_special_tokens=False)["input_ids"]

    def plain(text):
        return chat_tokenizer()(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    for title, tokens in zip(titles, policy.index.tokens, strict=True):
        assert tokens == [1, 1, *plain(f"item\n{title}"), 2, *plain(title), 2, *marker]


def test_a_token_without_an_embedding_is_refused(tmp_path):
    folder = chat_folder(tmp_path / "base")
    model, catalogue = LanguageModel(str(folder), "float32"), Catalogue(["a", "b"], ["<image>", "B"])
    batch = {"history": torch.tensor([[0]]), "seen": torch.tensor([[0]])}

    def one_more(policy, tokenizer):
        policy.bind(catalogue)
        tokenizer(policy).add_tokens(["<image>"])
        return policy

    plain = one_more(GenerativePolicy(language_model=model), lambda policy: policy.chat.tokenizer)
    assert plain.encode(batch).input_ids.max() < 330
    prompt = PromptTemplate(user="<image>{history}")
    generative = one_more(GenerativePolicy(language_model=model, prompt=prompt), lambda policy: policy.chat.tokenizer)
    short = {"max_completion_length": 0}
    retrieval = one_more(RetrievalPolicy(model, prompt=prompt, **short), lambda policy: policy.tokenizer)
    message = r"has the token <image> \(330\) and the model embeds only 330: leave <image> out of prompt"
    for policy in (generative, retrieval):
        with pytest.raises(InputError, match=message):
            policy.encode(batch)
    retrieval = one_more(RetrievalPolicy(model, item_prompt="<image>{text}"), lambda policy: policy.tokenizer)
    with pytest.raises(InputError, match="has the token <image>"):
        retrieval.bind(Catalogue(["a"], ["A"]))


def test_a_tokenizer_that_is_not_fast_is_refused():
    class Slow:
        chat_template = CHATML

    with pytest.raises(InputError, match="Slow is not a fast tokenizer, so titles could become"):
        encode_catalogue(Slow(), ["a"])


def test_tokens_that_are_added_later_are_seen():
    tokenizer = chat_tokenizer()
    before = encode_catalogue(tokenizer, ["<late>"])
    assert before == tokenizer(["<late>"])["input_ids"]
    tokenizer.add_tokens(["<late>"])
    assert encode_catalogue(tokenizer, ["<late>"]) == before != tokenizer(["<late>"])["input_ids"]


@pytest.mark.parametrize("kind", ["generative", "retrieval"])
def test_the_date_goes_with_the_folder_and_older_folders_take_the_default(tmp_path, kind):
    folder = chat_folder(tmp_path / "base", template="{{ strftime_now('%d %b %Y') }}" + CHATML)
    model, catalogue = LanguageModel(str(folder), "float32"), Catalogue(["a", "b"], ["A", "B"])
    prompt = PromptTemplate(user="{history}", date="1987-10-09")
    if kind == "generative":
        policy = GenerativePolicy(language_model=model, prompt=prompt)
    else:
        policy = RetrievalPolicy(model, prompt=prompt, max_completion_length=0)
    policy.bind(catalogue)
    policy.save_pretrained(tmp_path / "policy")
    side = tmp_path / "policy" / "minirec.json"
    for date, year in (("1987-10-09", "09 Oct 1987"), ("2026-01-01", "01 Jan 2026")):
        again = type(policy)(pretrained=str(tmp_path / "policy"))
        again.bind(catalogue)
        prompt = again.text.prompt if kind == "retrieval" else again.chat.prompt
        tokenizer = again.tokenizer if kind == "retrieval" else again.chat.tokenizer
        assert prompt.date == date
        ids = again.encode({"history": torch.tensor([[0]]), "seen": torch.tensor([[0]])}).input_ids[0]
        assert tokenizer.decode(ids).startswith(year)
        content = json.loads(side.read_text())
        (content if kind == "generative" else content["text"])["prompt"].pop("date", None)
        side.write_text(json.dumps(content))


def test_a_vocabulary_with_gaps():
    """A copy that numbered its tokens from the size of the vocabulary would take A for one of them."""
    letters = {chr(code): 3 * place for place, code in enumerate(range(33, 127))}
    vocabulary = {**letters, PAD: 1, "film": 500}
    assert letters["A"] == len(vocabulary)
    core = Tokenizer(models.BPE(vocabulary, []))
    core.add_tokens([AddedToken(PAD, special=True), AddedToken("film")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=PAD)
    tokenizer.add_tokens(["<think>"])  # numbered after the last
    tokenizer.chat_template = "{{ messages[0].content }}<think>"
    think, film = tokenizer.convert_tokens_to_ids(["<think>", "film"])
    assert (think, film) == (501, 500)
    prompt = PromptTemplate(system="", user="<think>film{history}", item="{title}")
    found = prompt_of(tokenizer, prompt, ["A<think>film"])
    assert found == [think, film, letters["A"], *(letters[letter] for letter in "<think>"), film, think]
