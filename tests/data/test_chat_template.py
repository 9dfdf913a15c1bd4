"""A chat template of the user's own, and templates that write the current date."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaw.data import DataSettings, prepare
from deltaw.data.chat_template import read_chat_template, with_chat_template, with_date
from deltaw.data.formats import Pair
from deltaw.data.templates import Encoder
from deltaw.errors import UserError
from tests.data.chat_templates import tokenizer_of

OWN = "{% for m in messages %}<|im_start|>{{ m.role | upper }}: {{ m.content }}<|im_end|>{% endfor %}"
OWN += "{% if add_generation_prompt %}<|im_start|>ASSISTANT: {% endif %}"


def written(folder: Path, text: str) -> str:
    path = folder / "own.jinja"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_template_file_replaces_the_tokenizers_own_in_a_copy(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("chatml")
    changed = with_chat_template(tokenizer, written(tmp_path, OWN))
    (encoded,) = Encoder(changed).encode([Pair("Hi", "Ho")], ["row 1"])[0]
    assert changed.decode(encoded.tokens) == "<|im_start|>USER: Hi<|im_end|><|im_start|>ASSISTANT: Ho<|im_end|>"
    assert tokenizer.chat_template == tokenizer_of("chatml").chat_template != OWN
    assert with_chat_template(tokenizer, None) is tokenizer
    changed.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text(encoding="utf-8") == OWN


def test_a_base_model_gets_a_template_by_it(tmp_path: Path) -> None:
    own = "Q: {{ messages[0].content }}\nA:{% if messages[1] %} {{ messages[1].content }}{{ eos_token }}{% endif %}"
    base = with_chat_template(tokenizer_of("base"), written(tmp_path, own))
    (encoded,) = Encoder(base).encode([Pair("Hi", "Ho")], ["row 1"])[0]
    assert base.decode(encoded.tokens) == "Q: Hi\nA: Ho<|endoftext|>"
    assert base.decode(encoded.tokens[encoded.prompt_length :]) == " Ho<|endoftext|>"


@pytest.mark.parametrize(
    "text, where",
    [
        ("line one\n{% for m in messages %}\n{{ m.content \n{% endfor %}", "line 4"),
        ("{% if x %}", "line 1"),
        ("{{ messages | nosuch }}", "line 1"),
    ],
)
def test_a_template_that_is_not_jinja_is_refused_with_its_line(tmp_path: Path, text: str, where: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError, match="is not Jinja") as refused:
        read_chat_template(path)
    assert refused.value.where == f"{path}, {where}"


def test_a_template_file_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_chat_template(str(tmp_path / "none.jinja"))
    with pytest.raises(UserError, match="is empty"):
        read_chat_template(written(tmp_path, " \n"))


def test_a_template_that_wants_more_than_a_question_passes(tmp_path: Path) -> None:
    strict = "{% if messages | length < 2 %}{{ raise_exception('two, please') }}{% endif %}" + OWN
    assert read_chat_template(written(tmp_path, strict)) == strict


def test_a_template_and_plain_text_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"data\.template: plain uses none"):
        DataSettings("d.jsonl", template="plain", chat_template="own.jinja")


def test_the_date_is_that_of_the_settings_and_todays_by_default() -> None:
    tokenizer = tokenizer_of("llama3.2")
    encoder = Encoder(tokenizer, date="2026-01-31")
    assert "Today Date: 31 Jan 2026\n" in tokenizer.decode(encoder.prompt("Hi"))
    assert encoder.dated == "2026-01-31"
    theirs = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert Encoder(tokenizer).prompt("Hi") == theirs["input_ids"]
    assert Encoder(tokenizer_of("llama3"), date="2026-01-31").dated is None


def test_the_date_changes_nothing_else_of_a_template() -> None:
    for template in ("\n{{ strftime_now('%Y') }}|{{ strftime_now( \"%d\" ) }}", "{{ strftime_now(x) }}", "{{ 1 }}"):
        dated = with_date(template, "2026-01-31")
        assert dated.endswith(template)
    with pytest.raises(UserError, match=r"data\.date is 'tomorrow'"):
        DataSettings("d.jsonl", date="tomorrow")


def test_rows_have_the_date_of_the_settings(tmp_path: Path) -> None:
    rows = tmp_path / "d.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 2, encoding="utf-8")
    tokenizer = tokenizer_of("llama3.2")
    prepared = prepare(DataSettings(str(rows), eval=None, date="2026-02-28"), tokenizer)
    assert "28 Feb 2026" in tokenizer.decode(prepared.train[0].tokens)
    assert prepared.report.date == "2026-02-28"
    assert "the date into each row: 2026-02-28" in "\n".join(prepared.report.lines())
    plain = prepare(DataSettings(str(rows), eval=None, template="plain"), tokenizer)
    assert plain.report.date is None
