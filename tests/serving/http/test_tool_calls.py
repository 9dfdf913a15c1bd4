"""Calls of tools in texts, in the forms of known templates, whole and in parts."""

from __future__ import annotations

import json

import pytest

from deltaw.errors import UserError
from deltaw.serving.http.tool_calls import (
    FORCED,
    HERMES,
    LLAMA,
    MISTRAL,
    PIPED,
    CallForm,
    CallScan,
    forced_schema,
    form_of,
    parse_calls,
)

F = '{"name": "f", "arguments": {"x": 1}}'
P = '{"name": "f", "parameters": {"x": 1}}'
FOUND: list[tuple[CallForm, str, str, int]] = [
    (HERMES, f"<tool_call>\n{F}\n</tool_call>", "", 1),
    (HERMES, f"Let me see.\n<tool_call>{F}</tool_call>\n<tool_call>{F}</tool_call>", "Let me see.", 2),
    (HERMES, f"<tool_call>{F}", "", 1),
    (PIPED, f"<|tool_call|>[{F}, {F}]<|/tool_call|>", "", 2),
    (PIPED, f"<|tool_call|>[{F}]", "", 1),
    (MISTRAL, f"[TOOL_CALLS][{F}, {F}]", "", 2),
    (MISTRAL, 'So: [TOOL_CALLS]f[ARGS]{"x": 1}', "So:", 1),
    (LLAMA, P, "", 1),
    (LLAMA, f"  {P}; {P}", "", 2),
    (FORCED, F, "", 1),
]
TEXT: list[tuple[CallForm, str]] = [
    (HERMES, "no call"),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"x": </tool_call>'),
    (HERMES, '<tool_call>{"name": "other", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (HERMES, f"<tool_call>{F} and more</tool_call>"),
    (HERMES, "<tool_call>" + "[" * 5000),
    (MISTRAL, "[TOOL_CALLS]"),
    (LLAMA, "I would write " + P),
    (LLAMA, '{"a": 1}'),
    (FORCED, F[:-3]),
]


@pytest.mark.parametrize(("form", "text", "said", "count"), FOUND)
def test_calls_are_found(form: CallForm, text: str, said: str, count: int) -> None:
    found, calls = parse_calls(text, form, ["f", "g"])
    assert found == said and [call.name for call in calls] == ["f"] * count
    assert all(json.loads(call.arguments) == {"x": 1} for call in calls)


@pytest.mark.parametrize(("form", "text"), TEXT)
def test_what_is_no_call_stays_text(form: CallForm, text: str) -> None:
    assert parse_calls(text, form, ["f"]) == (text, [])


@pytest.mark.parametrize("width", [1, 2, 7, 1000])
@pytest.mark.parametrize(("form", "text"), [(f, t) for f, t, _, _ in FOUND] + TEXT)
def test_parts_of_any_length_say_the_same_as_the_whole(form: CallForm, text: str, width: int) -> None:
    scan = CallScan(form, ["f", "g"])
    said = [scan.feed(text[at : at + width]) for at in range(0, len(text), width)]
    rest, calls = scan.end()
    whole, expected = parse_calls(text, form, ["f", "g"])
    assert [call.arguments for call in calls] == [call.arguments for call in expected]
    assert ("".join(said) + rest).strip() == whole.strip()
    if expected and form.opening:
        # Of a call, nothing was said before it was whole.
        assert form.opening[0] not in "".join(said)


def test_text_that_cannot_become_a_call_is_not_held_back() -> None:
    scan = CallScan(HERMES, ["f"])
    assert scan.feed("a < b") == "a < b" and scan.feed(" and <tool") == " and " and scan.feed("s>") == "<tools>"
    scan = CallScan(LLAMA, ["f"])
    assert scan.feed("Let") == "Let" and scan.feed(" {") == " {"


def test_a_mark_that_texts_do_not_show_is_seen_by_its_token() -> None:
    scan = CallScan(CallForm("[TOOL_CALLS]", mark=9), ["f"])
    assert scan.feed("So. ", (4, 5)) == "So. " and scan.feed("", (9,)) == "" and scan.feed(f"[{F}]", (7,)) == ""
    assert [call.name for call in scan.end()[1]] == ["f"]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("... <tool_call>\n{...}\n</tool_call>", HERMES),
        ("<tool_call>\n<function=name>", None),
        ("<|tool|>...<|/tool|> <|tool_call|>", PIPED),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", MISTRAL),
        ('Respond in the format {"name": function name, "parameters": dictionary of argument name', LLAMA),
        ("{% for m in messages %}", None),
    ],
)
def test_a_template_tells_its_form(template: str, form: CallForm | None) -> None:
    assert form_of(template) == form


def test_the_schema_of_a_forced_call_offers_all_tools() -> None:
    import jsonschema

    uses = {"type": "object", "properties": {"a": {"$ref": "#/$defs/d"}}, "$defs": {"d": {"type": "integer"}}}
    schema = forced_schema([("f", uses), ("g", None)])
    jsonschema.validate({"name": "f", "arguments": {"a": 1}}, schema)
    jsonschema.validate({"name": "g", "arguments": {}}, schema)
    for wrong in ({"name": "f", "arguments": {"a": "x"}}, {"name": "h", "arguments": {}}, {"name": "g"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    other = {"type": "object", "$defs": {"d": {"type": "string"}}}
    with pytest.raises(UserError, match="define 'd' differently"):
        forced_schema([("f", uses), ("g", other)])
