"""JSON answers on a page are formatted, compared by line, and harmless for any model output."""

from __future__ import annotations

import json

import pytest

from deltaw.reports.page.learned import MAX_LENGTH, marked_lines, pretty_json


def test_object_has_line_per_key():
    assert pretty_json('{"a":1,"b":["x"]}') == ["{", '  "a": 1,', '  "b": [', '    "x"', "  ]", "}"]


@pytest.mark.parametrize(
    "text",
    [
        *(None, "", "plain text", '{"a": 1} and more', "12", '"text"', "null", "{'a': 1}", "[1, 2"),
        *('{"a": NaN}', "[Infinity]", "[1e999]", '{"a": 1, "a": 2}', "9" * 5000, f"[{'9' * 5000}]"),
        *("[" * 900 + "]" * 900, "[" * 100_000, '{"a":' * 700 + "1" + "}" * 700),
        f'["{"x" * MAX_LENGTH}"]',
        "[" + "1," * 3000 + "1]",
    ],
    ids=lambda text: str(text)[:12],
)
def test_other_text_and_large_json_is_not_formatted(text):
    assert pretty_json(text) is None


def test_unsafe_characters_are_escaped():
    lines = pretty_json(json.dumps({"a": "\u202eevil\u2066", "b": "\ud800", "c": "ä ☃"}))
    assert lines == ["{", '  "a": "\\u202eevil\\u2066",', '  "b": "\\ud800",', '  "c": "ä ☃"', "}"]
    "\n".join(lines).encode()


def test_differing_lines_are_marked():
    expected = pretty_json('{"a": 1, "b": 2, "c": 3}')
    answer = pretty_json('{"a": 1, "b": 9, "c": 3, "d": 4}')
    marks = marked_lines(answer, expected)
    assert [line for mark, line in marks if mark == "-"] == ['  "b": 2,', '  "c": 3']
    assert [line for mark, line in marks if mark == "+"] == ['  "b": 9,', '  "c": 3,', '  "d": 4']
    assert [line for mark, line in marks if mark != "-"] == answer


def test_equal_answers_have_no_marks():
    lines = pretty_json('{"a": [1, {"b": null}]}')
    assert {mark for mark, _ in marked_lines(lines, lines)} == {mark for mark, _ in marked_lines(lines, None)} == {" "}
