"""Chat templates render as in transformers, and expensive templates are stopped."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import psutil
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from deltaw import platforms
from deltaw.child_process import minimal_environment
from deltaw.data import rendering
from deltaw.data.messages import Conversation
from deltaw.data.rendering import (
    FAULTS,
    MAX_TEMPLATE_CHARS,
    ConversationPrefixes,
    TemplateLimitError,
    render_batch,
    render_conversation,
)
from deltaw.data.template_worker import MEMORY_BYTES
from deltaw.data.templates import Encoder
from tests.byte_models import byte_tokenizer
from tests.data.chat_templates import FAMILIES, tokenizer_of
from tests.data.conftest import assistant, refusal, user
from tests.serving.http.concurrency import wait_until
from tests.training.runs import slow_except

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
}


def _theirs(template: str, messages: list, tools: list, special: dict, generation: bool) -> str:
    rendered = render_jinja_template(
        [messages], tools=tools or None, chat_template=template, add_generation_prompt=generation, **special
    )
    return rendered[0][0]


def _text_or_fault(render: Callable[..., str], *args: object, **kwargs: object) -> str:
    try:
        return render(*args, **kwargs)
    except FAULTS as error:
        return f"fault: {error}"


@pytest.mark.parametrize("family", [family for family in FAMILIES if tokenizer_of(family).chat_template])
def test_templates_render_as_in_transformers(family):
    tokenizer = tokenizer_of(family)
    special = dict(tokenizer.special_tokens_map)
    for messages, tools, generation in itertools.product(CONVERSATIONS.values(), ([], [TOOL]), (True, False)):
        template = tokenizer.get_chat_template(None, tools or None)
        theirs = _text_or_fault(_theirs, template, messages, tools, special, generation)
        options = {"generation": generation, "tools": tools, "variables": special}
        assert _text_or_fault(render_conversation, template, messages, **options) == theirs


# A template with a broad set of operators, filters and functions.
LANGUAGE_TEMPLATE = """
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


def test_language_features_match_transformers():
    for name in ("turns", "system"):
        messages = CONVERSATIONS[name]
        assert render_conversation(LANGUAGE_TEMPLATE, messages, generation=True, variables={}) == _theirs(
            LANGUAGE_TEMPLATE, messages, [], {}, True
        )


LOOPS = "{% for i in range(100000) %}{% for j in range(100000) %}"
END_LOOPS = "{% endfor %}{% endfor %}"
REPEAT = "{% set ns = namespace(x=1, y='ab', z=[1]) %}{% for i in range(100) %}"
LONG_TEXT = "{% set a = 'a' * 100000 %}{% for i in range(100000) %}"
ENDLESS = {
    "loops": LOOPS + END_LOOPS,
    "a loop whose condition never holds": "{% for i in range(100000) %}{% for j in range(100000) if j < 0 %}"
    + END_LOOPS,
    "text": LOOPS + "a" * 40 + END_LOOPS,
    "a text in a value": "{% set x %}" + LOOPS + "abc" + END_LOOPS + "{% endset %}",
    "a text in a filter": "{% filter upper %}" + LOOPS + "abc" + END_LOOPS + "{% endfilter %}",
    "the assistant's text": "{% generation %}" + LOOPS + "abc" + END_LOOPS + "{% endgeneration %}",
    "calls": LOOPS + "{{ ''.strip() }}" + END_LOOPS,
    "a loop without an end": "{% for i in range(99999) %}{% for j in messages * 10**8 %}{% endfor %}{% endfor %}",
    "a deep power": "{{ 10 ** (10 ** 10) }}",
    "text without end": "{% macro m(n) %}{{ 'word ' * 1000 }}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "filler text": "{{ lipsum(10 ** 6) }}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a product": "{{ 'a' * 10**9 }}",
    "a product with a list": "{{ ([1] * 10**9) | length }}",
    "a product of unknown size": "{{ 'a' * (messages | length * 10**10) }}",
    "a power": "{{ 10 ** 10000000 }}",
    "a square of squares": REPEAT + "{% set ns.x = ns.x * ns.x + 1 %}{% endfor %}",
    "a sum of sums": REPEAT + "{% set ns.y = ns.y + ns.y %}{% endfor %}",
    "texts joined": REPEAT + "{% set ns.y = ns.y ~ ns.y %}{% endfor %}",
    "lists added": REPEAT + "{% set ns.z = ns.z + ns.z %}{% endfor %}",
    "lists within lists": REPEAT + "{% set ns.z = [ns.z, ns.z] %}{% endfor %}{{ ns.z }}",
    "dictionaries": REPEAT + "{% set ns.z = {'a': ns.z, 'b': ns.z} %}{% endfor %}{{ ns.z | tojson }}",
    "dictionaries called": REPEAT + "{% set ns.z = dict(a=ns.z, b=ns.z) %}{% endfor %}{{ ns.z }}",
    "keys": REPEAT + "{% set ns.z = dict.fromkeys([1, 2], ns.z) %}{% endfor %}{{ ns.z }}",
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
    "comparing": LONG_TEXT + "{% if a + 'b' == a + 'c' %}{% endif %}{% endfor %}",
    "tests": "{% set a = 'a' * 100000 %}{{ range(100000) | map('string') | select('in', a) | list }}",
    "tests of case": LONG_TEXT + "{% if a is lower %}{% endif %}{% endfor %}",
    "counting": LONG_TEXT + "{{ a.count('b') }}{% endfor %}",
    "generators": "{% for i in range(100000) %}{{ range(100000) | select('none') | list }}{% endfor %}",
    "sorting": "{% set a = range(10000) | list %}" + LONG_TEXT + "{% set b = a | sort %}{% endfor %}",
    "a very long template": " " * (MAX_TEMPLATE_CHARS + 1),
}


# One template per limit: of steps, of text, of each kind of value, and of time.
QUICK = ("loops", "a text in a value", "calls", "macros", "a product", "a square of squares", "lists within lists")
QUICK += ("a width", "a computed field", "a field of percent", "joining", "defaults", "JSON", "comparing", "sorting")
QUICK += ("a very long template",)


@pytest.mark.parametrize("name", slow_except(*QUICK, names=ENDLESS))
def test_expensive_template_is_stopped(name, monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    error = refusal(render_conversation, ENDLESS[name], [QUESTION], generation=True, variables={})
    assert isinstance(error, TemplateLimitError)
    assert "the chat template was stopped: it" in str(error) and "data.chat_template" in str(error)
    assert render_conversation("{{ messages | length }}", [QUESTION], generation=True, variables={}) == "1"


@pytest.mark.parametrize(
    "template",
    [
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
        "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ [1]" + " | list" * 4000 + " }}",
        "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(__class__=1) }}",
        "{% include 'other' %}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__globals__.json }}",
        "{{ ('f' * 100000) | int(0, 16) }}",
    ],
    ids=lambda template: template[:20],
)
def test_unsupported_template_raises(template):
    with pytest.raises(FAULTS):
        render_conversation(template, [QUESTION], generation=True, variables={})


def test_long_conversations_are_not_stopped():
    template = tokenizer_of("qwen3").get_chat_template()
    conversation = [turn for _ in range(1500) for turn in (user("word " * 10), assistant("word " * 10))]
    for messages in (conversation, [user("word " * 400_000), assistant("yes")]):
        text = render_conversation(template, messages, generation=False, variables={})
        assert text == _theirs(template, messages, [], {}, False)


def test_endless_template_stops_reading_rows(monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if messages[0].content == 'go' %}" + LOOPS + END_LOOPS + "{% endif %}x"
    encoder = Encoder(tokenizer, "chat")
    row = Conversation((user("go"), assistant("a")), (False, True))
    reported: list[object] = []
    error = refusal(encoder.encode, [row], ["row 1"], on_bad=lambda location, bad_row: reported.append(bad_row))
    assert "the chat template was stopped" in error.message and not reported
    assert "the chat template was stopped" in refusal(encoder.prompt, "go").message


# The worker process


def _render(template: str) -> str:
    return render_conversation(template, [QUESTION], generation=True, variables={})


@pytest.fixture
def process() -> subprocess.Popen[bytes]:
    """Worker process of this process, after a rendering."""
    _render("a")
    process = rendering._worker()._process
    assert process is not None
    return process


def test_worker_is_reused_and_restarts_after_it_was_killed(process, monkeypatch):
    assert _render("b") == "b" and rendering._worker()._process is process
    process.kill()
    process.wait()
    assert _render("c") == "c"
    monkeypatch.setattr(rendering, "SECONDS", 0.1)
    with pytest.raises(TemplateLimitError):
        _render(LOOPS + END_LOOPS)
    assert _render("d") == "d"


def test_worker_has_limited_memory_and_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a secret")
    monkeypatch.setattr(rendering, "_workers", {})
    _render("a")
    process = psutil.Process(rendering._worker()._process.pid)
    assert process.environ().keys() <= {*minimal_environment(), "LC_CTYPE"}
    if hasattr(process, "rlimit"):
        assert process.rlimit(psutil.RLIMIT_AS) == (MEMORY_BYTES, MEMORY_BYTES)
    rendering._worker().close()


def test_worker_exits_with_its_parent():
    code = "from deltaw.data import rendering as r; r.render_conversation('a', [], generation=True, variables={});"
    code += "import os; print(r._worker()._process.pid, flush=True); os.kill(os.getpid(), 9)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(result.stdout)
    assert wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_forked_process_starts_its_own_worker(process):
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(_render, map(str, range(20)))) == [str(n) for n in range(20)]
        pids = set(pool.map(_worker_pid, range(20)))
    assert process.pid not in pids and _render("e") == "e" and rendering._worker()._process is process


def _worker_pid(number: int) -> int:
    _render("a")
    return rendering._worker()._process.pid


def test_threads_share_the_worker():
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(_render, map(str, range(200)))) == [str(n) for n in range(200)]


def test_batch_returns_texts_and_errors_in_order():
    template = "{{ messages | length }}{% if not tools %}{{ 1 // (messages | length - 1) }}{% endif %}"
    messages = [QUESTION, assistant("4."), QUESTION]
    conversations = [
        ConversationPrefixes(messages, [(1, True), (2, False)]),
        ConversationPrefixes([QUESTION, "text"], [(1, True)]),
        ConversationPrefixes(messages, [(3, False)], [TOOL]),
    ]
    (fault, first), (rejected,), (last,) = render_batch(template, conversations, {})
    assert "division" in str(fault) and isinstance(rejected, TypeError) and (first, last) == ("21", "3")


def test_timer_stops_the_worker_without_poll(monkeypatch):
    monkeypatch.setattr(platforms, "WINDOWS", True)
    monkeypatch.setattr(rendering, "_workers", {})
    assert _render("a") == "a"
    monkeypatch.setattr(rendering, "TIMEOUT", 0.1)
    with pytest.raises(TemplateLimitError):
        _render(LOOPS + END_LOOPS)
    monkeypatch.setattr(rendering, "TIMEOUT", 30.0)
    assert _render("b") == "b"
    rendering._worker().close()


def test_long_output_is_received_completely():
    text = "é\n" * 500_000
    assert render_conversation("{{ messages[0].content }}", [user(text)], generation=True, variables={}) == text
