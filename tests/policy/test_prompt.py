import datetime
import json
import math

import pytest
import torch
import yaml
from helpers.chat_models import CATALOGUE, CHATML, NO_SYSTEM, PROMPT, chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from minirec_pl import InputError
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy.prompt import PromptTemplate, time_ago

NAN = math.nan


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "moments"), (0, "moments"), (59.9, "moments"), (60, "1 minute"), (3599, "59 minutes"), (3600, "1 hour"),
        (86_399, "23 hours"), (172_800, "2 days"), (2_629_800, "1 month"), (31_557_599, "11 months"),
        (3 * 31_557_600, "3 years"),
    ],
)  # fmt: skip
def test_time_ago(seconds, text):
    assert time_ago(seconds) == text


def test_lines_of_a_history_say_what_is_known():
    batch = {
        "history": torch.tensor([[-1, 3, 9], [-1, -1, 6]]),
        "history_rating": torch.tensor([[NAN, 4.5, NAN], [NAN, NAN, 3.0]]),
        "history_age": torch.tensor([[0.0, 7200.0, 0.0], [0.0, 0.0, NAN]]),
    }
    lines = [PROMPT.history_text(batch, row, CATALOGUE) for row in range(2)]
    assert lines == [
        "1. Get Shorty, rated 4.5, 2 hours ago\n2. Richard III, moments ago",
        "1. Babe: Pig in the City, rated 3",
    ]
    assert PROMPT.history_text({"history": batch["history"]}, 0, CATALOGUE) == "1. Get Shorty\n2. Richard III"
    quiet = PromptTemplate(item="{text} [{id}]", rating="", age="", longest_title=6)
    assert quiet.history_text(batch, 0, CATALOGUE) == "Get S… [i3]\nRicha… [i9]"
    assert quiet.history_text(batch, 1, CATALOGUE, ids=[f"<{i}>" for i in range(15)]) == "Babe:… [<6>]"


def test_items_without_a_title_are_named_by_their_id():
    batch = {"history": torch.tensor([[0, 1]])}
    assert PROMPT.history_text(batch, 0, Catalogue(["a", "b"])) == "1. a\n2. b"
    assert PROMPT.history_text(batch, 0, Catalogue(["a", "b"], [" ", "Bee\n gees"])) == "1. a\n2. Bee gees"


def test_braces_in_titles_and_templates_are_text():
    catalogue = Catalogue(["a"], ["{user} {0}"])
    template = PromptTemplate(system="{{}}", user="{{x}} {history}", item="{title}")
    text = template.render(chat_tokenizer(), template.history_text({"history": torch.tensor([[0]])}, 0, catalogue))
    assert "<|im_start|>system\n{}<|im_end|>" in text
    assert "{x} {user} {0}" in text


@pytest.mark.parametrize(
    "template", [CHATML, NO_SYSTEM, "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"]
)
def test_the_system_goes_where_the_chat_template_has_room_for_it(template):
    text = PROMPT.render(chat_tokenizer(template), "1. Seven")
    user = "Seen:\n1. Seven\nNext?"
    start, stop = "<|im_start|>", "<|im_end|>\n"
    assert text == {
        CHATML: f"{start}system\nRecommend.{stop}{start}user\n{user}{stop}{start}assistant\n",
        NO_SYSTEM: f"{start}user\nRecommend.\n\n{user}{stop}{start}assistant\n",
    }.get(template, f"Recommend.\n\n{user}")


def test_no_system_and_an_answer_that_has_begun():
    template = PromptTemplate(system="", user="{history}", answer="I say {this}: ")
    start = "<|im_start|>"
    assert template.render(chat_tokenizer(), "x") == f"{start}user\nx<|im_end|>\n{start}assistant\nI say {{this}}: "
    template = PromptTemplate(system="", user="Mine?", item="{id}", separator="; ", answer="{me} {history}; ")
    history = template.history_text({"history": torch.tensor([[3, -1, 9]])}, 0, CATALOGUE)
    opened = f"{start}user\nMine?<|im_end|>\n{start}assistant\n"
    assert template.render(chat_tokenizer(), history) == f"{opened}{{me}} i3; i9; "


def test_encoded_prompts_are_padded_on_the_left_and_shared():
    tokenizer = chat_tokenizer()
    histories = torch.tensor([[-1, 3, 9], [0, 1, 2], [-1, 3, 9], [-1, -1, -1]])
    encoded = PROMPT.encode(tokenizer, {"history": histories}, CATALOGUE)
    assert encoded.row.tolist() == [0, 1, 0, 2]
    assert encoded.input_ids.shape == encoded.mask.shape == (3, int(encoded.mask.sum(dim=1).max()))
    for row, sample in enumerate((0, 1, 3)):
        text = PROMPT.render(tokenizer, PROMPT.history_text({"history": histories}, sample, CATALOGUE))
        real = tokenizer(text, add_special_tokens=False)["input_ids"]
        padding = encoded.input_ids.shape[1] - len(real)
        assert encoded.input_ids[row].tolist() == [tokenizer.pad_token_id] * padding + real
        assert encoded.mask[row].tolist() == [0] * padding + [1] * len(real)
        assert tokenizer.decode(real) == text


DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
LLAMA = (
    "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n'
    '        {%- set date_string = "26 Jul 2024" %}\n    {%- endif %}\n{%- endif %}\n'
    "{{- 'Today Date: ' + date_string + '\\n' }}\n"
    "{% macro again() %}{{ strftime_now('%Y') }}{% endmacro %}{{ again() }}\n"
) + CHATML


@pytest.fixture
def clock(monkeypatch):
    """Sets the day of the clock that chat templates read."""
    from transformers.utils import chat_template_utils

    def set_to(year, month, day):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(year, month, day, 17, 5, 9)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_to


@pytest.mark.parametrize("template", [DATED, LLAMA])
@pytest.mark.parametrize("date", ["2026-01-01", "1987-10-09"])
def test_the_date_is_that_of_the_prompt(template, date, clock):
    """The oracle is the template with the clock of transformers at that day."""
    tokenizer, prompt = chat_tokenizer(template), PromptTemplate(system="Sys", user="{history}", date=date)
    messages = [{"role": "system", "content": "Sys"}, {"role": "user", "content": "x"}]
    year, month, day = map(int, date.split("-"))
    clock(year, month, day)
    truth = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert str(year) in truth
    clock(2031, 5, 6)
    assert prompt.render(tokenizer, "x") == truth
    encoded = prompt.encode(tokenizer, {"history": torch.tensor([[0]])}, Catalogue(["a"]))
    assert tokenizer.decode(encoded.input_ids[0]) == truth.replace("x<|im_end|>", "1. a<|im_end|>")
    assert prompt.asks_for_the_date(tokenizer)
    assert not prompt.asks_for_the_date(chat_tokenizer(CHATML + "{# strftime_now #}"))


DIRECTIVES = [f"%{flag}{code}" for flag in ("", "-", "0", "^") for code in "aAbBdHIjmMpSyY"]
FORMATS = st.lists(st.sampled_from([*DIRECTIVES, "%f", "%%", " ", "d", "-Y"]))


@settings(max_examples=100, deadline=None)
@given(day=st.dates(datetime.date(1900, 1, 1)), form=FORMATS.map("".join))
def test_dates_are_formatted_as_python_formats_them(day, form):
    tokenizer = chat_tokenizer("{{ strftime_now(" + json.dumps(form) + ") }}|{{ messages[0].content }}")
    text = PromptTemplate(system="", user="{history}", date=day.isoformat()).render(tokenizer, "x")
    assert text == datetime.datetime.combine(day, datetime.time()).strftime(form) + "|x"


@pytest.mark.parametrize("date", ["", "today", "2026-1-1", "20260101", "2026-02-30", "2026-W01-1", None, 20260101])
def test_a_date_that_is_none(date):
    with pytest.raises(InputError, match=r"prompt.date is .*: give a day as YYYY-MM-DD, for example 2026-01-01"):
        PromptTemplate(date=date)


@pytest.mark.parametrize("written", ["2031-05-06", "'2031-05-06'"])
def test_a_date_in_yaml_is_its_text(written, tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--prompt", type=PromptTemplate)
    (tmp_path / "c.yaml").write_text(f"prompt: {{date: {written}}}\n")
    options = parser.parse_args([f"--config={tmp_path / 'c.yaml'}"])
    assert options.prompt.date == "2031-05-06"
    assert yaml.safe_load(parser.dump(options))["prompt"]["date"] == "2031-05-06"


def test_a_prompt_that_is_too_long_names_its_sample():
    batch = {"history": torch.tensor([[-1, 3], [6, 8]]), "sample_id": torch.tensor([70, 71])}
    longest = int(PROMPT.encode(chat_tokenizer(), batch, CATALOGUE).mask.sum(dim=1).max())
    PROMPT.encode(chat_tokenizer(), batch, CATALOGUE, longest)
    with pytest.raises(
        InputError, match=f"the prompt of sample 71 has {longest} tokens and {longest - 1} fit .* lower"
    ):
        PROMPT.encode(chat_tokenizer(), batch, CATALOGUE, longest - 1)
    with pytest.raises(InputError, match="the prompt has"):
        PROMPT.encode(chat_tokenizer(), {"history": batch["history"]}, CATALOGUE, 3)


def test_a_tokenizer_without_a_chat_template():
    with pytest.raises(InputError, match="no chat template: take an instruction-tuned model"):
        PROMPT.render(chat_tokenizer(template=None), "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"user": "What next?"},
            r"neither --model.policy.prompt.user nor --model.policy.prompt.answer has the history: put \{history\}",
        ),
        ({"user": "{{history}}"}, "neither --model.policy.prompt.user"),
        ({"answer": "{history}"}, "both --model.policy.prompt.user and --model.policy.prompt.answer hold the history"),
        ({"user": "{history} {name}"}, r"prompt.user has the placeholder \{name\}: it takes \{history\}"),
        ({"item": "{title.__class__}"}, r"placeholder \{title.__class__\}"),
        ({"item": "{}"}, r"placeholder \{\}: it takes \{number\}, \{title\}, \{text\}, \{id\}"),
        ({"system": "{history}"}, "it takes no placeholder"),
        ({"rating": "{rating"}, r"prompt.rating cannot be read .*write \{\{ for a brace"),
        ({"rating": "{rating:.1f}"}, "prompt.rating cannot be read"),
        ({"longest_title": 0}, "keep at least 1 character"),
    ],
)
def test_templates_that_cannot_be_used(options, message):
    with pytest.raises(InputError, match=message):
        PromptTemplate(**options)
