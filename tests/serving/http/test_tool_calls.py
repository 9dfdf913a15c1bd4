"""Tests of parsing tool calls from text in the formats of known templates, at once and incrementally."""

from __future__ import annotations

import json

import jsonschema
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
# Format, text, text before the calls, and number of calls.
TEXTS_WITH_CALLS: list[tuple[CallForm, str, str, int]] = [
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
# Texts without a valid call.
TEXTS_WITHOUT_CALLS = {
    HERMES: [
        "no call",
        '<tool_call>{"name": "f", "arguments": {"x": </tool_call>',
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        f"<tool_call>{F} and more</tool_call>",
        "<tool_call>" + "[" * 5000,
    ],
    MISTRAL: ["[TOOL_CALLS]"],
    LLAMA: ["I would write " + P, '{"a": 1}'],
    FORCED: [F[:-3]],
}
ALL_CASES = TEXTS_WITH_CALLS + [(form, text, text, 0) for form, texts in TEXTS_WITHOUT_CALLS.items() for text in texts]


@pytest.mark.parametrize(("form", "text", "before", "count"), ALL_CASES)
def test_calls_are_parsed_at_once_and_incrementally(form, text, before, count):
    prefix, calls = parse_calls(text, form, ["f", "g"])
    assert prefix == before and [call.name for call in calls] == ["f"] * count
    assert all(json.loads(call.arguments) == {"x": 1} for call in calls)
    for width in (1, 2, 7, 1000):
        scan = CallScan(form, ["f", "g"])
        emitted = [scan.feed(text[offset : offset + width]) for offset in range(0, len(text), width)]
        rest, streamed_calls = scan.end()
        assert [call.arguments for call in streamed_calls] == [call.arguments for call in calls]
        assert ("".join(emitted) + rest).strip() == before.strip()
        # No part of a call is emitted before it is complete.
        assert not count or not form.opening or form.opening[0] not in "".join(emitted)


def test_text_that_cannot_be_a_call_is_emitted_immediately():
    scan = CallScan(HERMES, ["f"])
    assert [scan.feed(text) for text in ("a < b", " and <tool", "s>")] == ["a < b", " and ", "<tools>"]
    scan = CallScan(LLAMA, ["f"])
    assert [scan.feed(text) for text in ("Let", " {")] == ["Let", " {"]


def test_invisible_marker_is_detected_by_token():
    scan = CallScan(CallForm("[TOOL_CALLS]", mark=9), ["f"])
    steps = (("So. ", (4, 5)), ("", (9,)), (f"[{F}]", (7,)))
    assert [scan.feed(text, tokens) for text, tokens in steps] == ["So. ", "", ""]
    assert [call.name for call in scan.end()[1]] == ["f"]


def test_call_format_is_detected_from_template():
    parameters = 'Respond in the format {"name": function name, "parameters": dictionary of argument name'
    expected = {"... <tool_call>\n{...}\n</tool_call>": HERMES, "<tool_call>\n<function=name>": None}
    expected |= {"<|tool|>...<|/tool|> <|tool_call|>": PIPED, "[AVAILABLE_TOOLS] [TOOL_CALLS]": MISTRAL}
    expected |= {parameters: LLAMA, "{% for m in messages %}": None}
    assert {template: form_of(template) for template in expected} == expected


def test_forced_call_schema_accepts_every_tool():
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/$defs/d"}}, "$defs": {"d": {"type": "integer"}}}
    schema = forced_schema([("f", parameters), ("g", None)])
    is_valid = jsonschema.Draft202012Validator(schema).is_valid
    assert is_valid({"name": "f", "arguments": {"a": 1}}) and is_valid({"name": "g", "arguments": {}})
    invalid = ({"name": "f", "arguments": {"a": "x"}}, {"name": "h", "arguments": {}}, {"name": "g"})
    assert not any(map(is_valid, invalid))
    with pytest.raises(UserError, match="define 'd' differently"):
        forced_schema([("f", parameters), ("g", {"type": "object", "$defs": {"d": {"type": "string"}}})])
