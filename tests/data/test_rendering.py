"""Chat templates: what they render is what transformers renders, and none of them goes on for ever."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from deltaw.data import rendering
from deltaw.data.messages import Conversation
from deltaw.data.rendering import FAULTS, LONGEST_TEMPLATE, TemplateLimitError, rendered
from deltaw.data.templates import Encoder
from tests.byte_models import byte_tokenizer
from tests.data.chat_templates import FAMILIES, tokenizer_of
from tests.data.conftest import assistant, refusal, user

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": CITY}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
QUESTION = user("What is 2 + 2?")
CONVERSATIONS = {
    "turns": [QUESTION, assistant("4."), user("And\n3?")],
    "system": [{"role": "system", "content": " Be brief. "}, QUESTION],
    "tools": [QUESTION, assistant("", tool_calls=[CALL]), {"role": "tool", "name": "weather", "content": "sun"}],
    "thought": [QUESTION, assistant("<think>\nhm\n</think>\n\n4."), QUESTION],
    "reasoning": [QUESTION, assistant("4.", reasoning="two and two")],
    "parts": [user([{"type": "text", "text": "Hello"}, {"type": "image"}])],
}


def _theirs(template: str, messages: list, tools: list, special: dict, generation: bool) -> str:
    found = render_jinja_template(
        [messages], tools=tools or None, chat_template=template, add_generation_prompt=generation, **special
    )
    return found[0][0]


def _text_or_fault(render: Callable[..., str], *given: object, **more: object) -> str | type[Exception]:
    try:
        return render(*given, **more)
    except FAULTS as error:
        return type(error)


@pytest.mark.parametrize("family", [family for family in FAMILIES if tokenizer_of(family).chat_template])
def test_templates_render_as_in_transformers(family):
    tokenizer = tokenizer_of(family)
    special = dict(tokenizer.special_tokens_map)
    for messages, tools, generation in itertools.product(CONVERSATIONS.values(), ([], [TOOL]), (True, False)):
        template = tokenizer.get_chat_template(None, tools or None)
        theirs = _text_or_fault(_theirs, template, messages, tools, special, generation)
        given = {"generation": generation, "tools": tools, "variables": special}
        assert _text_or_fault(rendered, template, messages, **given) == theirs


# What a template may do, each in a few operators, filters and functions.
SPEECH = """
{%- macro shown(value, depth=0) %}{{ '  ' * depth }}{{ value | string | trim | upper }}
{%- if depth < 2 %}{{ shown(value ~ depth, depth + 1) }}{% endif %}{% endmacro -%}
{%- set ns = namespace(text='', n=0, all=[]) -%}
{%- for m in messages if m.role != 'system' -%}
{%- set ns.text = ns.text + m['content'] + '|' -%}{%- set ns.n = ns.n + 2 * loop.index - 1 -%}
{%- set ns.all = ns.all + [m] -%}{% if loop.index0 % 2 == 1 %}{% continue %}{% endif -%}
{{ shown(m.content) }}{{ loop.length - loop.index0 }}{{ m.content[::-1][1:3] }}{{ 7 // 2 ** 2 }}
{%- endfor -%}
{% set block %}{{ ns.text | replace('|', ' ; ') }}{% endset %}{{ block }}
{%- macro called() %}{{ caller(2) }}{% endmacro %}{% call(x) called() %}{{ x + ns.n }}{% endcall %}
{{- ns.all | map(attribute='role') | join(', ') }}{{ dict(a=1, b=[2, ns.n]) | tojson(indent=2) }}
{{- '%s and %d' % ('one', 2) }}{{ '10000% *{{{:>5}}}*'.format(7) }}{{ '20000%% %(a)s*' % {'a': 1} }}
{{ '{} {x}'.format(1, x='é') }}{{ 'a,b'.split(',') | join('-') }}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'x'.center(5) }}{{ 'y'.ljust(3) }}
{{- 'user' in messages | map(attribute='role') | list }}{{ 1 < ns.n <= 100 }}{{ messages[0] == messages[-1] }}
{{- {'b': 1, 'a': 2} | dictsort }}{{ [3, 1, 2] | sort | reverse | list }}{{ 'ß<' | e }}{{ 2.5 | round | int }}
{{- 'text' is in ['text'] }}{{ 'A' is upper }}{{ range(3) | list }}{{ ', '.join(['a', 'b']) }}
{%- for k, v in {'a': {'b': 1}}.items() recursive %}{{ k }}
{%- if v is mapping %}{{ loop(v.items()) }}{% endif %}{% endfor %}
{%- filter lower %}ABC{% endfilter %}{% generation %}{{ messages[1:] | length }}{% endgeneration %}
{{- '\\n  x\\ny' | indent(2) }}{{ none is none }}{{ missing is defined }}{{ missing | default('d') }}
"""


def test_all_of_the_language_is_as_in_transformers():
    for name in ("turns", "system"):
        messages = CONVERSATIONS[name]
        assert rendered(SPEECH, messages, generation=True, variables={}) == _theirs(SPEECH, messages, [], {}, True)


TEN = "{% for i in range(100000) %}{% for j in range(100000) %}"
END = "{% endfor %}{% endfor %}"
MANY = "{% set ns = namespace(x=1, y='ab', z=[1]) %}{% for i in range(100) %}"
LONG = "{% set a = 'a' * 100000 %}{% for i in range(100000) %}"
ENDLESS = {
    "loops": TEN + END,
    "a loop whose condition never holds": "{% for i in range(100000) %}{% for j in range(100000) if j < 0 %}" + END,
    "text": TEN + "a" * 40 + END,
    "a text in a value": "{% set x %}" + TEN + "abc" + END + "{% endset %}",
    "a text in a filter": "{% filter upper %}" + TEN + "abc" + END + "{% endfilter %}",
    "the assistant's text": "{% generation %}" + TEN + "abc" + END + "{% endgeneration %}",
    "calls": TEN + "{{ ''.strip() }}" + END,
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a product": "{{ 'a' * 10**9 }}",
    "a product with a list": "{{ ([1] * 10**9) | length }}",
    "a product of unknown size": "{{ 'a' * (messages | length * 10**10) }}",
    "a power": "{{ 10 ** 10000000 }}",
    "a square of squares": MANY + "{% set ns.x = ns.x * ns.x + 1 %}{% endfor %}",
    "a sum of sums": MANY + "{% set ns.y = ns.y + ns.y %}{% endfor %}",
    "texts joined": MANY + "{% set ns.y = ns.y ~ ns.y %}{% endfor %}",
    "lists added": MANY + "{% set ns.z = ns.z + ns.z %}{% endfor %}",
    "lists within lists": MANY + "{% set ns.z = [ns.z, ns.z] %}{% endfor %}{{ ns.z }}",
    "pairs within pairs": MANY + "{% set ns.z = (ns.z, ns.z) %}{% endfor %}{{ ns.z == ns.z }}",
    "dictionaries": MANY + "{% set ns.z = {'a': ns.z, 'b': ns.z} %}{% endfor %}{{ ns.z | tojson }}",
    "dictionaries called": MANY + "{% set ns.z = dict(a=ns.z, b=ns.z) %}{% endfor %}{{ ns.z }}",
    "keys": MANY + "{% set ns.z = dict.fromkeys([1, 2], ns.z) %}{% endfor %}{{ ns.z }}",
    "namespaces": "{% set a = namespace() %}{% set b = namespace(a=a, b=a) %}{{ b }}",
    "long numbers": MANY.replace("100", "9999") + "{% set ns.x = ns.x - (0 - ns.x) %}{% endfor %}",
    "numbers read": "{{ ('f' * 100000) | int(0, 16) }}",
    "a rounding": "{{ 1.5 | round(10**9, 'floor') }}",
    "a width": "{{ 'a'.ljust(10**10) }}",
    "zeros": "{{ '1'.zfill(10**10) }}",
    "a field": "{{ '{:10000000000}'.format(1) }}",
    "a computed field": "{{ '{:{}}'.format(1, 10**10) }}",
    "a field of percent": "{{ '%10000000000d' % 1 }}",
    "a computed field of percent": "{{ '%*d' % (10**10, 1) }}",
    "a field of a filter": "{{ '%10000000000d' | format(1) }}",
    "replacing": "{% set a = 'a' * 10000 %}{{ a.replace('a', a) }}",
    "replacing by a filter": "{% set a = 'a' * 10000 %}{{ a | replace('a', a) }}",
    "joining": "{% set a = 'a' * 10000 %}{{ a.join(range(100000) | map('string')) }}",
    "joining by a filter": "{% set a = 'a' * 10000 %}{{ range(100000) | map('string') | join(a) }}",
    "defaults": "{% set a = 'a' * 10000 %}{{ range(100000) | map(attribute='z', default=a) | join }}",
    "a list of defaults": "{% set a = 'a' * 10000 %}{{ range(99999) | map(attribute='z', default=a)|list }}",
    "indents": "{{ ('a\n' * 10000) | indent(100000) }}",
    "JSON": "{{ [[[1]]] | tojson(indent=10**9) }}",
    "JSON with much between": "{% set s = 'a' * 10000 %}{{ range(1000) | list | tojson(separators=(s, s)) }}",
    "splitting": "{% set a = 'a b ' * 100000 %}{{ a.split() }}{{ a.split('b') }}",
    "a date": "{{ strftime_now('%Y' * 10000) }}",
    "reading": LONG + "{% if 'b' in a %}{% endif %}{% endfor %}",
    "comparing": LONG + "{% if a + 'b' == a + 'c' %}{% endif %}{% endfor %}",
    "comparing twice": LONG + "{% if 'a' < a < a[1:] %}{% endif %}{% endfor %}",
    "looking through lists": "{% set a = range(10000) | list %}" + LONG + "{{ 'x' in a }}{% endfor %}",
    "tests": "{% set a = 'a' * 100000 %}{{ range(100000) | map('string') | select('in', a) | list }}",
    "tests of case": LONG + "{% if a is lower %}{% endif %}{% endfor %}",
    "counting": LONG + "{{ a.count('b') }}{% endfor %}",
    "parts": LONG + "{% set b = a[1:] %}{% endfor %}",
    "generators": "{% for i in range(100000) %}{{ range(100000) | select('none') | list }}{% endfor %}",
    "sorting": "{% set a = range(10000) | list %}" + LONG + "{% set b = a | sort %}{% endfor %}",
    "a very long template": " " * (LONGEST_TEMPLATE + 1),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_too_much_is_ended(name, monkeypatch):
    monkeypatch.setattr(rendering, "STEPS", 1 << 15)
    caught = refusal(rendered, ENDLESS[name], [QUESTION], generation=True, variables={})
    assert isinstance(caught, TemplateLimitError)
    assert "the chat template was ended: it" in str(caught) and "data.chat_template" in str(caught)


@pytest.mark.parametrize(
    "template",
    [
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
        "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ [1]" + " | list" * 4000 + " }}",
        "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
        "{{ 'a' | center(10) }}",
        "{{ lipsum(10**6) }}",
        "{{ 'a'.encode() }}",
        "{{ (1).from_bytes([255], 'big') }}",
        "{% macro m(n) %}{{ varargs }}{% endmacro %}{{ m(1, 2) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(__class__=1) }}",
        "{% include 'other' %}",
    ],
    ids=lambda template: template[:20],
)
def test_a_template_that_cannot_be_followed_is_refused(template):
    with pytest.raises(FAULTS):
        rendered(template, [QUESTION], generation=True, variables={})


def test_long_conversations_are_no_reason_to_end():
    template = tokenizer_of("qwen3").get_chat_template()
    many = [turn for _ in range(1500) for turn in (user("word " * 10), assistant("word " * 10))]
    for messages in (many, [user("word " * 400_000), assistant("yes")]):
        text = rendered(template, messages, generation=False, variables={})
        assert text == _theirs(template, messages, [], {}, False)


def test_an_endless_template_ends_the_reading_of_rows(monkeypatch):
    monkeypatch.setattr(rendering, "STEPS", 1 << 14)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if messages[0].content == 'go' %}" + TEN + END + "{% endif %}x"
    encoder = Encoder(tokenizer, "chat")
    row = Conversation((user("go"), assistant("a")), (False, True))
    told: list[object] = []
    refused = refusal(encoder.encode, [row], ["row 1"], on_bad=lambda place, error: told.append(error))
    assert "the chat template was ended" in refused.what and not told
    assert "the chat template was ended" in refusal(encoder.prompt, "go").what
