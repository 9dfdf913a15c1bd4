"""Custom chat templates, and templates that render the current date."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from deltaw.data.chat_template import read_chat_template, with_chat_template, with_date
from deltaw.data.formats import Pair
from deltaw.data.stored_rows import TextReader
from deltaw.data.templates import Encoder
from deltaw.settings.data import DataSettings
from tests.data.chat_templates import tokenizer_of
from tests.data.conftest import refusal

CUSTOM = "{% for m in messages %}<|im_start|>{{ m.role | upper }}: {{ m.content }}<|im_end|>{% endfor %}"
CUSTOM += "{% if add_generation_prompt %}<|im_start|>ASSISTANT: {% endif %}"


def render_exchange(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return a question with its answer as text, and the answer only."""
    (encoded,) = Encoder(tokenizer).encode([Pair("Hi", "Ho")], ["row 1"])[0]
    return tokenizer.decode(encoded.tokens), tokenizer.decode(encoded.tokens[encoded.prompt_length :])


def test_template_file_replaces_the_template_in_a_copy(tmp_path: Path, write) -> None:
    tokenizer = tokenizer_of("chatml")
    changed = with_chat_template(tokenizer, write(CUSTOM, "own.jinja"))
    assert render_exchange(changed)[0] == "<|im_start|>USER: Hi<|im_end|><|im_start|>ASSISTANT: Ho<|im_end|>"
    assert tokenizer.chat_template == tokenizer_of("chatml").chat_template != CUSTOM
    assert with_chat_template(tokenizer, None) is tokenizer
    changed.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text(encoding="utf-8") == CUSTOM
    # A base model without a template gets this one.
    template = "Q: {{ messages[0].content }}\n"
    template += "A:{% if messages[1] %} {{ messages[1].content }}{{ eos_token }}{% endif %}"
    base = with_chat_template(tokenizer_of("base"), write(template, "base.jinja"))
    assert render_exchange(base) == ("Q: Hi\nA: Ho<|endoftext|>", " Ho<|endoftext|>")


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("line one\n{% for m in messages %}\n{{ m.content \n{% endfor %}", "is not Jinja", ", line 4"),
        ("{% if x %}", "is not Jinja", ", line 1"),
        ("{{ messages | nosuch }}", "is not Jinja", ", line 1"),
        (" \n", "is empty", ""),
    ],
)
def test_invalid_template_is_rejected_with_its_line(text: str, message: str, line: str, write) -> None:
    path = write(text, "own.jinja")
    error = refusal(read_chat_template, path)
    assert message in error.message and error.location == path + line
    assert "cannot be read" in refusal(read_chat_template, path + "x").message


def test_template_that_requires_two_messages_is_accepted(write) -> None:
    strict = "{% if messages | length < 2 %}{{ raise_exception('two, please') }}{% endif %}" + CUSTOM
    assert read_chat_template(write(strict)) == strict


def test_conflicting_settings_and_invalid_dates_are_rejected() -> None:
    error = refusal(DataSettings, "d.jsonl", template="plain", chat_template="own.jinja")
    assert "has no effect with data.template: plain" in str(error)
    assert "data.date is 'tomorrow'" in str(refusal(DataSettings, "d.jsonl", date="tomorrow"))


def test_date_defaults_to_today_and_can_be_set(write) -> None:
    tokenizer = tokenizer_of("llama3.2")
    encoder = Encoder(tokenizer, date="2026-01-31")
    assert "Today Date: 31 Jan 2026\n" in tokenizer.decode(encoder.prompt("Hi"))
    assert encoder.template_date == "2026-01-31"
    assert Encoder(tokenizer_of("llama3"), date="2026-01-31").template_date is None
    theirs = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert Encoder(tokenizer).prompt("Hi") == theirs["input_ids"]
    # The rest of the template is unchanged.
    for template in ("\n{{ strftime_now('%Y') }}|{{ strftime_now( \"%d\" ) }}", "{{ strftime_now(x) }}", "{{ 1 }}"):
        assert with_date(template, "2026-01-31").endswith(template)
    rows = write([{"prompt": "a", "completion": "b"}] * 2)
    prepared = TextReader(DataSettings(rows, eval=None, date="2026-02-28"), tokenizer).prepare()
    assert "28 Feb 2026" in tokenizer.decode(prepared.train[0].tokens) and prepared.report.date == "2026-02-28"
    assert "the date into each row: 2026-02-28" in "\n".join(prepared.report.lines())
    assert TextReader(DataSettings(rows, eval=None, template="plain"), tokenizer).prepare().report.date is None
