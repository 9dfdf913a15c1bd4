"""A chat template of the user's own, and templates that write the current date."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from deltaw.data import DataSettings, prepare
from deltaw.data.chat_template import read_chat_template, with_chat_template, with_date
from deltaw.data.formats import Pair
from deltaw.data.templates import Encoder
from tests.data.chat_templates import tokenizer_of
from tests.data.conftest import refusal

OWN = "{% for m in messages %}<|im_start|>{{ m.role | upper }}: {{ m.content }}<|im_end|>{% endfor %}"
OWN += "{% if add_generation_prompt %}<|im_start|>ASSISTANT: {% endif %}"


def exchanged(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A question and its answer as text, and the answer alone."""
    (encoded,) = Encoder(tokenizer).encode([Pair("Hi", "Ho")], ["row 1"])[0]
    return tokenizer.decode(encoded.tokens), tokenizer.decode(encoded.tokens[encoded.prompt_length :])


def test_a_template_file_replaces_the_tokenizers_own_in_a_copy(tmp_path: Path, write) -> None:
    tokenizer = tokenizer_of("chatml")
    changed = with_chat_template(tokenizer, write(OWN, "own.jinja"))
    assert exchanged(changed)[0] == "<|im_start|>USER: Hi<|im_end|><|im_start|>ASSISTANT: Ho<|im_end|>"
    assert tokenizer.chat_template == tokenizer_of("chatml").chat_template != OWN
    assert with_chat_template(tokenizer, None) is tokenizer
    changed.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text(encoding="utf-8") == OWN
    # A base model gets one by it.
    own = "Q: {{ messages[0].content }}\nA:{% if messages[1] %} {{ messages[1].content }}{{ eos_token }}{% endif %}"
    base = with_chat_template(tokenizer_of("base"), write(own, "base.jinja"))
    assert exchanged(base) == ("Q: Hi\nA: Ho<|endoftext|>", " Ho<|endoftext|>")


@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ("line one\n{% for m in messages %}\n{{ m.content \n{% endfor %}", "is not Jinja", ", line 4"),
        ("{% if x %}", "is not Jinja", ", line 1"),
        ("{{ messages | nosuch }}", "is not Jinja", ", line 1"),
        (" \n", "is empty", ""),
    ],
)
def test_a_template_that_is_not_jinja_or_empty_is_refused_with_its_line(text: str, said: str, line: str, write) -> None:
    path = write(text, "own.jinja")
    refused = refusal(read_chat_template, path)
    assert said in refused.what and refused.where == path + line
    assert "cannot be read" in refusal(read_chat_template, path + "x").what


def test_a_template_that_wants_more_than_a_question_passes(write) -> None:
    strict = "{% if messages | length < 2 %}{{ raise_exception('two, please') }}{% endif %}" + OWN
    assert read_chat_template(write(strict)) == strict


def test_settings_that_exclude_each_other_or_name_no_date_are_refused() -> None:
    both = refusal(DataSettings, "d.jsonl", template="plain", chat_template="own.jinja")
    assert "data.template: plain uses none" in str(both)
    assert "data.date is 'tomorrow'" in str(refusal(DataSettings, "d.jsonl", date="tomorrow"))


def test_the_date_is_that_of_the_settings_and_todays_by_default(write) -> None:
    tokenizer = tokenizer_of("llama3.2")
    encoder = Encoder(tokenizer, date="2026-01-31")
    assert "Today Date: 31 Jan 2026\n" in tokenizer.decode(encoder.prompt("Hi"))
    assert (encoder.dated, Encoder(tokenizer_of("llama3"), date="2026-01-31").dated) == ("2026-01-31", None)
    theirs = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert Encoder(tokenizer).prompt("Hi") == theirs["input_ids"]
    # It changes nothing else of a template.
    for template in ("\n{{ strftime_now('%Y') }}|{{ strftime_now( \"%d\" ) }}", "{{ strftime_now(x) }}", "{{ 1 }}"):
        assert with_date(template, "2026-01-31").endswith(template)
    rows = write([{"prompt": "a", "completion": "b"}] * 2)
    prepared = prepare(DataSettings(rows, eval=None, date="2026-02-28"), tokenizer)
    assert "28 Feb 2026" in tokenizer.decode(prepared.train[0].tokens)
    assert prepared.report.date == "2026-02-28"
    assert "the date into each row: 2026-02-28" in "\n".join(prepared.report.lines())
    assert prepare(DataSettings(rows, eval=None, template="plain"), tokenizer).report.date is None
