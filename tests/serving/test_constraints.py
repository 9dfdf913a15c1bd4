"""Tests of constrained generation: any sampled text matches, and costs of hostile schemas are limited."""

from __future__ import annotations

import contextlib
import gc
import json
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

pytest.importorskip("llguidance", reason="the extra serve is not installed")

from deltaw.child_process import minimal_environment
from deltaw.decoding.constraints import ConstraintLimits, Grammars, Matcher, ProcessLimits
from deltaw.decoding.request import BusyError, Constraint, Sampling, UnsupportedError
from deltaw.decoding.sampling import SamplingState, choose
from deltaw.errors import UserError
from tests.byte_models import byte_tokenizer
from tests.serving.http.concurrency import wait_until
from tests.serving.http.hostile import slow_to_compile_grammar, slow_to_match_grammar

TOKENIZER = byte_tokenizer()
V = 300  # logits per row; models often have more than the tokenizer has tokens
END = 0
TURN = 2

NAME = {"type": "string", "maxLength": 6}
AGE = {"type": "integer", "minimum": 0, "maximum": 120}
TAGS = {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}
PERSON = {"type": "object", "properties": {"name": NAME, "age": AGE, "tags": TAGS}}
PERSON |= {"required": ["name", "age"], "additionalProperties": False}


def open_grammars(process_limits: ProcessLimits | None = None, **shared_limits: int) -> contextlib.closing[Grammars]:
    limits = ConstraintLimits(process_limits or ProcessLimits(), **shared_limits)
    return contextlib.closing(Grammars(TOKENIZER, V, limits))


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    with open_grammars(ProcessLimits(seconds=0.4)) as instance:
        yield instance


@pytest.fixture(scope="module")
def tight_grammars() -> Iterator[Grammars]:
    """Constraints with low limits on everything except time."""
    with open_grammars(ProcessLimits(seconds=60, memory=16 << 20, states=300), processes=2) as instance:
        yield instance


def start_matcher(grammars: Grammars, value: str, kind: str = "regex", end: int = END, owner: int = 0) -> Matcher:
    """Return the matcher of a new text."""
    return grammars.compile(Constraint(kind, value), [end], owner)  # type: ignore[arg-type]


def slow_matcher(grammars: Grammars, number: int = 0) -> Matcher:
    """Return a matcher that exceeds the time limit at the next token x."""
    matcher = start_matcher(grammars, slow_to_match_grammar(number), "grammar")
    follow(matcher, "xxxx")
    return matcher


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def follow(matcher: Matcher, text: str) -> None:
    for token in ids(text):
        matcher.accept(token)


def sample_texts(matchers: list[Matcher]) -> list[str]:
    """Sample texts from random logits, so that only the constraint determines their form."""
    states = [SamplingState(Sampling(temperature=1.0, seed=n), np.array([5]), V) for n in range(len(matchers))]
    random = np.random.default_rng(0)
    texts: list[list[int]] = [[] for _ in matchers]
    for _ in range(400):
        active = [n for n, matcher in enumerate(matchers) if not matcher.is_complete and texts[n][-1:] != [END]]
        if not active:
            return [TOKENIZER.decode(text, skip_special_tokens=True) for text in texts]
        logits = random.normal(size=(len(active), V)).astype(np.float32)
        chosen = choose(logits, [states[n] for n in active], {p: matchers[n].allowed() for p, n in enumerate(active)})
        for n, token in zip(active, chosen.tokens.tolist(), strict=True):
            texts[n].append(token)
            if token != END:
                matchers[n].accept(token)
                assert matchers[n].failed is None
    raise AssertionError("a text did not end")


def test_sampled_texts_match_schema(grammars):
    texts = sample_texts([start_matcher(grammars, json.dumps(PERSON), "json_schema") for _ in range(12)])
    for person in map(json.loads, texts):
        assert set(person) <= {"name", "age", "tags"} and set(person.get("tags", [])) <= {"a", "b"}
        assert isinstance(person["name"], str) and 0 <= person["age"] <= 120
    assert len(set(texts)) > 6


def test_sampled_texts_match_expression_and_grammar(grammars):
    for kind, value, pattern in (
        ("regex", r"(yes|no), [a-c]{2,4}\d", r"(yes|no), [a-c]{2,4}\d"),
        ("regex", "[é漢]{3}/x", "[é漢]{3}/x"),
        ("grammar", 'start: "a" b\nb: "(" b ")" | "x"', r"a\(*x\)*"),
    ):
        texts = sample_texts([start_matcher(grammars, value, kind) for _ in range(8)])
        assert all(re.fullmatch(pattern, text) for text in texts)


def test_json_object_is_complete_and_on_one_line(grammars):
    complete, array, *spaced = (start_matcher(grammars, "", "json_object") for _ in range(6))
    *prefix, last = ids('{"a": [1, {"b": null}], "c": "x"}')
    for token in prefix:
        complete.accept(token)
        assert not complete.is_complete
    complete.accept(last)
    assert complete.is_complete
    follow(array, "[")
    assert array.failed
    for matcher, text in zip(spaced, ("{", '{"a"', '{"a": 1,', '{"a": 1'), strict=True):
        follow(matcher, text)
        assert [allows(matcher, *ids(blank)) for blank in " \n\t"] == [text.endswith(","), False, False]


def allows(matcher: Matcher, token: int) -> bool:
    words = matcher.allowed()
    assert words.shape == ((V + 31) // 32,)
    return bool(words.view(np.uint8)[token // 8] >> token % 8 & 1)


def allowed(matcher: Matcher) -> set[int]:
    return {token for token in range(V) if allows(matcher, token)}


def test_only_request_terminators_are_allowed_at_text_end(grammars):
    matcher = start_matcher(grammars, "ab*", end=TURN)
    a, b = ids("ab")
    assert allowed(matcher) == {a}
    matcher.accept(a)
    assert allowed(matcher) == {b, TURN}, "the tokenizer's terminator is not one of this request"
    assert not matcher.is_complete


def test_special_and_unknown_tokens_are_never_allowed(grammars):
    assert allowed(start_matcher(grammars, "(.|\n)*")) <= {END, *range(3, len(TOKENIZER))}


def test_repeated_constraint_has_separate_state_and_terminators(grammars):
    a, b, c = ids("abc")
    first = start_matcher(grammars, "abc?")
    first.accept(a)
    second = start_matcher(grammars, "abc?", end=TURN)
    assert (allowed(first), allowed(second)) == ({b}, {a})
    follow(second, "ab")
    assert (allowed(first), allowed(second)) == ({b}, {c, TURN})


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


CHOICES = [{"anyOf": [{"required": [f"a{n}"]}, {"required": [f"b{n}"]}]} for n in range(20)]
BRANCHES = {f"a{n}": {key: [{"$ref": f"#/$defs/a{n + 1}"}] * 10 for key in ("anyOf", "allOf")} for n in range(8)}
CYCLE = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
SCHEMAS = [5, {"type": "strin"}, False, {"$ref": "#"}, {"$defs": CYCLE, "$ref": "#/$defs/a"}, {"allOf": CHOICES}]
SCHEMAS += [{"$ref": "https://example.com/schema.json"}, {"$ref": "file:///etc/passwd"}, {"enum": ["x" * 300_000]}]
SCHEMAS += [{"properties": {f"p{n}": {} for n in range(5000)}}]
SCHEMAS += [{"anyOf": [{"properties": {f"p{n}": {} for n in range(300)}}] * 20}]
SCHEMAS += [{"$defs": BRANCHES | {"a8": {"type": "string"}}, "$ref": "#/$defs/a0"}]
HOSTILE = {
    "json_schema": ['{"type":', nested(3000), nested(25_000), *map(json.dumps, SCHEMAS)],
    "regex": ["(a", "(?=a)b", r"(a)\1", "[a&&b]", "(" * 5000 + ")" * 5000],
    # An undefined rule, an infinite recursion, and a rule that includes a file.
    "grammar": ["start: a", "start: start", 'start: "a" %include "/etc/passwd"'],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_invalid_constraints_are_rejected(grammars, kind):
    for value in HOSTILE[kind]:
        with pytest.raises(UserError) as error:
            start_matcher(grammars, value, kind)
        assert error.value.location == kind and error.value.hint
        assert "\n" not in error.value.message and len(error.value.message) < 600


SLOW_IN_OTHER_ENGINES = [("regex", "(a+)+b"), ("regex", "(.*a.{200})"), ("regex", "((a|b|ab){1,50}c?){1,50}z")]
SLOW_IN_OTHER_ENGINES += [("regex", "(a{1000}){1000}"), ("json_schema", '{"type": "array", "minItems": 100000000}')]
SLOW_IN_OTHER_ENGINES += [("json_schema", '{"type": "string", "pattern": "(a|b|ab)*c{200}(x+x+)+y"}')]
SLOW_IN_OTHER_ENGINES += [("grammar", 'start: start start | "a"'), ("grammar", 'start: "a"{1000000}')]


@pytest.mark.parametrize(("kind", "value"), SLOW_IN_OTHER_ENGINES)
def test_slow_constraints_work_or_are_rejected(grammars, kind, value):
    try:
        matcher = start_matcher(grammars, value, kind)
    except UserError as error:
        assert "needs more than" in error.message
        return
    random = np.random.default_rng(0)
    for _ in range(40):
        tokens = sorted(allowed(matcher) - {END})
        if matcher.failed or matcher.is_complete or not tokens:
            break
        matcher.accept(int(random.choice(tokens)))
    assert not matcher.failed or (not matcher.allowed().any() and not matcher.is_complete)


def test_slow_compilation_is_stopped(grammars):
    for _ in range(2):  # the second failure comes from the cache
        with pytest.raises(UserError, match=r"it needs more than 0.4 s of CPU time") as error:
            start_matcher(grammars, slow_to_compile_grammar(0), "grammar")
        assert error.value.location == "grammar" and error.value.hint


def test_slow_matching_fails_only_texts_of_its_process(grammars):
    other = start_matcher(grammars, "x*")
    same_process = start_matcher(grammars, slow_to_match_grammar(0), "grammar")
    hostile = slow_matcher(grammars)
    assert allows(hostile, *ids("x")) and hostile.failed is None
    follow(hostile, "x")
    assert "it needs more than" in str(hostile.failed) and not hostile.allowed().any()
    assert same_process.failed is not None  # it shares the process
    follow(other, "x" * 9)
    assert other.failed is None and slow_matcher(grammars).failed is None


def test_texts_of_busy_process_do_not_block(grammars):
    matchers = [slow_matcher(grammars, 1)]
    matchers += [*(start_matcher(grammars, slow_to_match_grammar(1), "grammar") for _ in range(300))]
    for matcher in matchers:
        follow(matcher, "x")  # the first one computes until its time limit
    assert not matchers[0].ready and not matchers[0].wait(0.0) and matchers[0].late
    assert matchers[0].wait() and not matchers[0].late and all(matcher.failed for matcher in matchers)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory directly")
def test_memory_limit_stops_compilation(tight_grammars):
    with pytest.raises(UserError, match="16 MiB of memory"):
        start_matcher(tight_grammars, slow_to_compile_grammar(0), "grammar")
    assert start_matcher(tight_grammars, "a")


def grow_until_failure(matcher: Matcher) -> str:
    """Extend a text of letters until its constraint fails, and return the reason.

    The constraint has a state for every combination of the last 15 letters.
    """
    random = np.random.default_rng(0)
    while matcher.failed is None:
        matcher.accept(int(random.choice(ids("ab"))))
    return matcher.failed


GROWING = "[ab]*a[ab]{14}c"


def test_exhausted_constraint_is_recompiled_for_new_text(tight_grammars):
    assert "too many states" in grow_until_failure(start_matcher(tight_grammars, GROWING))
    fresh = start_matcher(tight_grammars, GROWING)
    follow(fresh, "a")
    assert fresh.failed is None


def test_number_of_active_constraints_is_limited(tight_grammars):
    first = start_matcher(tight_grammars, "a")
    second = start_matcher(tight_grammars, "b")
    with pytest.raises(BusyError, match="in use"):
        start_matcher(tight_grammars, "c")
    assert start_matcher(tight_grammars, "a").failed is None
    del first
    replacement = start_matcher(tight_grammars, "c")  # replaces the constraint without active texts
    assert second.failed is replacement.failed is None


def test_full_compilation_queue_rejects_requests():
    errors: queue.Queue[str] = queue.Queue()
    with open_grammars(ProcessLimits(seconds=60, memory=8 << 30), compiling=1, waiting=1) as slow:
        cached = start_matcher(slow, "a")

        def compile_slow(number: int) -> None:
            try:
                start_matcher(slow, slow_to_compile_grammar(number), "grammar")
            except UserError as error:
                errors.put(f"{type(error).__name__} {error.message}")

        threads = [threading.Thread(target=compile_slow, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        assert errors.get(timeout=60).startswith("BusyError")  # one is compiling and one is queued
        assert start_matcher(slow, "a").failed is cached.failed is None
    for thread in threads:  # closing wakes the other two
        thread.join(60)
        assert not thread.is_alive()
    assert errors.qsize() == 2 and all("shut down" in errors.get() for _ in "ab")


def test_owners_do_not_share_compiled_constraints(grammars):
    first, second, second_again = (start_matcher(grammars, GROWING, owner=owner) for owner in (1, 2, 2))
    assert first.process is not second.process is second_again.process


def test_launcher_has_no_secrets(grammars):
    start_matcher(grammars, "a*")
    process = psutil.Process(grammars._launcher._worker._process.pid)
    assert process.environ().keys() <= {*minimal_environment(), "LC_CTYPE"}


def test_processes_stop_on_memory_limit_idle_time_and_close():
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    def started() -> int:
        return sum(child.pid not in before for child in psutil.Process().children(recursive=True))

    with open_grammars(ProcessLimits(idle_seconds=0.05), memory=12 << 20) as instance:
        honest = start_matcher(instance, "a*")
        assert started() == 2  # one process launches the others
        assert (
            grow_until_failure(start_matcher(instance, GROWING)) == "all constraints together take too much memory"
        ), "the largest is stopped first"
        time.sleep(0.2)
        follow(honest, "aaa")
        assert honest.failed is None  # its process has an active text
        del honest
        assert wait_until(lambda: started() == 1)
        remaining = start_matcher(instance, "a*")
    assert wait_until(lambda: not started() and remaining.failed == "the engine is shut down")


def test_matcher_in_reference_cycle_does_not_block_idle_stop():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with open_grammars(ProcessLimits(idle_seconds=0.05)) as instance:
        gc.disable()  # no allocation may trigger garbage collection
        try:
            circle: list[object] = [start_matcher(instance, "a*")]
            circle.append(circle)
            del circle
            # The launcher process remains.
            assert wait_until(
                lambda: len({child.pid for child in psutil.Process().children(recursive=True)} - before) == 1
            )
        finally:
            gc.enable()


def test_unsupported_tokenizer_is_reported():
    words = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))
    with contextlib.closing(Grammars(PreTrainedTokenizerFast(tokenizer_object=words), 2)) as instance:
        for _ in range(2):
            with pytest.raises(UnsupportedError, match="this model's tokenizer") as error:
                start_matcher(instance, "a")
            assert error.value.hint


def test_missing_package_error_names_extra(monkeypatch):
    monkeypatch.setattr("deltaw.decoding.constraints.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="llguidance") as error:
        start_matcher(Grammars(TOKENIZER, V), "a")
    assert "serve" in str(error.value.hint)


# Numbers in schemas.

INEXACT = ["9007199254740993", "-9007199254740993", "9223372036854775808", "18446744073709551617", "1e300", "1e-300"]
INEXACT += ["0.12345678901234567890", "123456789.123456789", "0.30000000000000004", "12345678901234567.0", "1" * 40]
INEXACT += ["1e999999999", "1e9999999999999999999999"]
EXACT = {
    "9007199254740992": "9007199254740992",
    "-9007199254740991": "-9007199254740991",
    "0.1": "0.1",
    "1e-7": "0.0000001",
}
EXACT |= {"1.5": "1.5", "12": "12", "1e22": "1" + 22 * "0", "123456789.12345": "123456789.12345", "4E2": "400"}
EXACT |= {"1234567890123450": "1234567890123450"}


def nested(value: str) -> str:
    """Return a schema with ``const`` in a nested definition."""
    definitions = f'"$defs": {{"a": {{"properties": {{"n": {{"const": {{"b": [{value}]}}}}}}}}}}'
    return f'{{"type": "object", {definitions}, "anyOf": [{{"$ref": "#/$defs/a"}}]}}'


@pytest.mark.parametrize("number", INEXACT)
@pytest.mark.parametrize(
    "make_schema",
    [
        lambda n: f'{{"const": {n}}}',
        lambda n: f'{{"enum": ["a", 1, {n}]}}',
        lambda n: f'{{"type": "number", "minimum": {n}}}',
        lambda n: f'{{"type": "integer", "multipleOf": {n}}}',
        nested,
    ],
    ids=["const", "enum", "minimum", "multipleOf", "nested"],
)
def test_number_that_would_be_changed_is_rejected(grammars, number, make_schema):
    with pytest.raises(UserError, match=r"cannot be represented exactly|is not JSON"):
        start_matcher(grammars, make_schema(number), "json_schema")


@pytest.mark.parametrize(
    "schema",
    [
        '{"type": "integer", "exclusiveMinimum": 9007199254740992}',
        '{"const": {"maximum": 9223372036854775807}}',
        '{"enum": [{"exclusiveMaximum": 18446744073709551617}]}',
    ],
)
def test_limit_whose_neighbor_is_inexact_and_value_named_maximum_are_rejected(grammars, schema):
    with pytest.raises(UserError, match="cannot be represented exactly"):
        start_matcher(grammars, schema, "json_schema")


@pytest.mark.parametrize("number", EXACT)
def test_number_is_written_exactly(grammars, number):
    matcher = start_matcher(grammars, f'{{"enum": [{number}]}}', "json_schema")
    follow(matcher, EXACT[number])
    assert matcher.is_complete


@pytest.mark.parametrize(("key", "limit"), [("maximum", 2**63 - 1), ("maximum", 2**64), ("exclusiveMaximum", 2**63)])
def test_large_upper_limit_is_kept(grammars, key, limit):
    matcher = start_matcher(grammars, json.dumps({"type": "integer", "minimum": 0, key: limit}), "json_schema")
    follow(matcher, str(2**63 - 1))
    assert matcher.is_complete
