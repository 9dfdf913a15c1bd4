"""Calls of tools in texts, in the forms of known templates, whole and in parts."""

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
# Texts with the words before their calls, and how many calls there are.
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
# Texts without a call.
TEXTS = {
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
ALL = FOUND + [(form, text, text, 0) for form, texts in TEXTS.items() for text in texts]


@pytest.mark.parametrize(("form", "text", "before", "count"), ALL)
def test_calls_are_found_in_the_whole_text_and_in_parts_of_any_length(form, text, before, count):
    found, calls = parse_calls(text, form, ["f", "g"])
    assert found == before and [call.name for call in calls] == ["f"] * count
    assert all(json.loads(call.arguments) == {"x": 1} for call in calls)
    for width in (1, 2, 7, 1000):
        scan = CallScan(form, ["f", "g"])
        said = [scan.feed(text[at : at + width]) for at in range(0, len(text), width)]
        rest, again = scan.end()
        assert [call.arguments for call in again] == [call.arguments for call in calls]
        assert ("".join(said) + rest).strip() == before.strip()
        # Of a call, nothing was said before it was whole.
        assert not count or not form.opening or form.opening[0] not in "".join(said)


def test_text_that_cannot_become_a_call_is_not_held_back():
    scan = CallScan(HERMES, ["f"])
    assert [scan.feed(text) for text in ("a < b", " and <tool", "s>")] == ["a < b", " and ", "<tools>"]
    scan = CallScan(LLAMA, ["f"])
    assert [scan.feed(text) for text in ("Let", " {")] == ["Let", " {"]


def test_a_mark_that_texts_do_not_show_is_seen_by_its_token():
    scan = CallScan(CallForm("[TOOL_CALLS]", mark=9), ["f"])
    fed = (("So. ", (4, 5)), ("", (9,)), (f"[{F}]", (7,)))
    assert [scan.feed(text, tokens) for text, tokens in fed] == ["So. ", "", ""]
    assert [call.name for call in scan.end()[1]] == ["f"]


def test_a_template_tells_its_form():
    parameters = 'Respond in the format {"name": function name, "parameters": dictionary of argument name'
    forms = {
        "... <tool_call>\n{...}\n</tool_call>": HERMES,
        "<tool_call>\n<function=name>": None,
        "<|tool|>...<|/tool|> <|tool_call|>": PIPED,
        "[AVAILABLE_TOOLS] [TOOL_CALLS]": MISTRAL,
        parameters: LLAMA,
        "{% for m in messages %}": None,
    }
    assert {template: form_of(template) for template in forms} == forms


def test_the_schema_of_a_forced_call_offers_all_tools():
    uses = {"type": "object", "properties": {"a": {"$ref": "#/$defs/d"}}, "$defs": {"d": {"type": "integer"}}}
    schema = forced_schema([("f", uses), ("g", None)])
    fits = jsonschema.Draft202012Validator(schema).is_valid
    assert fits({"name": "f", "arguments": {"a": 1}}) and fits({"name": "g", "arguments": {}})
    wrong = ({"name": "f", "arguments": {"a": "x"}}, {"name": "h", "arguments": {}}, {"name": "g"})
    assert not any(map(fits, wrong))
    with pytest.raises(UserError, match="define 'd' differently"):
        forced_schema([("f", uses), ("g", {"type": "object", "$defs": {"d": {"type": "string"}}})])
