"""Texts that must match: whatever is drawn, the text does; and what a hostile schema may cost."""

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

from deltaw.errors import UserError
from deltaw.serving.constraints import ConstraintLimits, Grammars, Matcher, ProcessLimits
from deltaw.serving.request import BusyError, Constraint, Sampling, UnsupportedError
from deltaw.serving.sampling import SamplingState, choose
from tests.byte_models import byte_tokenizer
from tests.serving.http.hostile import explodes_at_once, explodes_later
from tests.serving.http.waiting import until

TOKENIZER = byte_tokenizer()
V = 300  # more logits than the tokenizer has tokens, as models have
END, TURN = 0, 2

NAME, AGE = {"type": "string", "maxLength": 6}, {"type": "integer", "minimum": 0, "maximum": 120}
TAGS = {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}
PERSON = {"type": "object", "properties": {"name": NAME, "age": AGE, "tags": TAGS}}
PERSON |= {"required": ["name", "age"], "additionalProperties": False}


def made_with(each: ProcessLimits | None = None, **all_together: int) -> contextlib.closing[Grammars]:
    limits = ConstraintLimits(each or ProcessLimits(), **all_together)
    return contextlib.closing(Grammars(TOKENIZER, V, limits))


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    with made_with(ProcessLimits(seconds=0.4)) as made:
        yield made


@pytest.fixture(scope="module")
def few() -> Iterator[Grammars]:
    """Constraints that may have little of everything but time."""
    with made_with(ProcessLimits(seconds=60, memory=16 << 20, states=300), processes=2) as made:
        yield made


def begun(grammars: Grammars, value: str, kind: str = "regex", end: int = END, owner: int = 0) -> Matcher:
    """A new text."""
    return grammars.compile(Constraint(kind, value), [end], owner)  # type: ignore[arg-type]


def exploding(grammars: Grammars, number: int = 0) -> Matcher:
    """A text whose next letter x takes longer than is allowed."""
    matcher = begun(grammars, explodes_later(number), "grammar")
    follow(matcher, "xxxx")
    return matcher


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def follow(matcher: Matcher, text: str) -> None:
    for token in ids(text):
        matcher.accept(token)


def drawn(matchers: list[Matcher]) -> list[str]:
    """Texts drawn from logits that know nothing: only the constraint gives them form."""
    states = [SamplingState(Sampling(temperature=1.0, seed=n), np.array([5]), V) for n in range(len(matchers))]
    random = np.random.default_rng(0)
    texts: list[list[int]] = [[] for _ in matchers]
    for _ in range(400):
        going = [n for n, matcher in enumerate(matchers) if not matcher.ended and texts[n][-1:] != [END]]
        if not going:
            return [TOKENIZER.decode(text, skip_special_tokens=True) for text in texts]
        logits = random.normal(size=(len(going), V)).astype(np.float32)
        chosen = choose(logits, [states[n] for n in going], {p: matchers[n].allowed() for p, n in enumerate(going)})
        for n, token in zip(going, chosen.tokens.tolist(), strict=True):
            texts[n].append(token)
            if token != END:
                matchers[n].accept(token)
                assert matchers[n].failed is None
    raise AssertionError("a text did not end")


def test_texts_drawn_at_random_match_the_schema(grammars):
    texts = drawn([begun(grammars, json.dumps(PERSON), "json_schema") for _ in range(12)])
    for person in map(json.loads, texts):
        assert set(person) <= {"name", "age", "tags"} and set(person.get("tags", [])) <= {"a", "b"}
        assert isinstance(person["name"], str) and 0 <= person["age"] <= 120
    assert len(set(texts)) > 6


def test_texts_drawn_at_random_match_expression_and_grammar(grammars):
    for kind, value, pattern in (
        ("regex", r"(yes|no), [a-c]{2,4}\d", r"(yes|no), [a-c]{2,4}\d"),
        ("regex", "[é漢]{3}/x", "[é漢]{3}/x"),
        ("grammar", 'start: "a" b\nb: "(" b ")" | "x"', r"a\(*x\)*"),
    ):
        assert all(re.fullmatch(pattern, text) for text in drawn([begun(grammars, value, kind) for _ in range(8)]))


def test_any_json_object_is_one_and_stands_on_one_line(grammars):
    whole, list_of, *spaced = (begun(grammars, "", "json_object") for _ in range(6))
    *most, last = ids('{"a": [1, {"b": null}], "c": "x"}')
    for token in most:
        whole.accept(token)
        assert not whole.ended
    whole.accept(last)
    assert whole.ended
    follow(list_of, "[")
    assert list_of.failed
    for matcher, text in zip(spaced, ("{", '{"a"', '{"a": 1,', '{"a": 1'), strict=True):
        follow(matcher, text)
        assert [allows(matcher, *ids(blank)) for blank in " \n\t"] == [text.endswith(","), False, False]


def allows(matcher: Matcher, token: int) -> bool:
    words = matcher.allowed()
    assert words.shape == ((V + 31) // 32,)
    return bool(words.view(np.uint8)[token // 8] >> token % 8 & 1)


def allowed(matcher: Matcher) -> set[int]:
    return {token for token in range(V) if allows(matcher, token)}


def test_terminators_are_the_requests_own_and_come_only_where_the_text_may_end(grammars):
    matcher = begun(grammars, "ab*", end=TURN)
    a, b = ids("ab")
    assert allowed(matcher) == {a}
    matcher.accept(a)
    assert allowed(matcher) == {b, TURN}, "not the tokenizer's own, which this request does not end with"
    assert not matcher.ended


def test_tokens_beyond_the_tokenizer_and_special_ones_are_never_allowed(grammars):
    assert allowed(begun(grammars, "(.|\n)*")) <= {END, *range(3, len(TOKENIZER))}


def test_same_constraint_again_starts_anew_with_its_own_terminators(grammars):
    a, b, c = ids("abc")
    first = begun(grammars, "abc?")
    first.accept(a)
    second = begun(grammars, "abc?", end=TURN)
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
    # An unknown rule, an endless one, and one that includes a file.
    "grammar": ["start: a", "start: start", 'start: "a" %include "/etc/passwd"'],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_cannot_be_compiled_is_refused_by_name(grammars, kind):
    for value in HOSTILE[kind]:
        with pytest.raises(UserError) as error:
            begun(grammars, value, kind)
        assert error.value.where == kind and error.value.hint
        assert "\n" not in error.value.what and len(error.value.what) < 600


SLOW_ELSEWHERE = [("regex", "(a+)+b"), ("regex", "(.*a.{200})"), ("regex", "((a|b|ab){1,50}c?){1,50}z")]
SLOW_ELSEWHERE += [("regex", "(a{1000}){1000}"), ("json_schema", '{"type": "array", "minItems": 100000000}')]
SLOW_ELSEWHERE += [("json_schema", '{"type": "string", "pattern": "(a|b|ab)*c{200}(x+x+)+y"}')]
SLOW_ELSEWHERE += [("grammar", 'start: start start | "a"'), ("grammar", 'start: "a"{1000000}')]


@pytest.mark.parametrize(("kind", "value"), SLOW_ELSEWHERE)
def test_what_is_slow_elsewhere_either_goes_on_or_says_that_it_does_not(grammars, kind, value):
    try:
        matcher = begun(grammars, value, kind)
    except UserError as error:
        assert "takes more than" in error.what
        return
    random = np.random.default_rng(0)
    for _ in range(40):
        tokens = sorted(allowed(matcher) - {END})
        if matcher.failed or matcher.ended or not tokens:
            break
        matcher.accept(int(random.choice(tokens)))
    assert not matcher.failed or (not matcher.allowed().any() and not matcher.ended)


def test_what_takes_too_long_to_compile_is_ended(grammars):
    for _ in range(2):  # the second time it is known
        with pytest.raises(UserError, match=r"it takes more than 0.4 s of work") as error:
            begun(grammars, explodes_at_once(0), "grammar")
        assert error.value.where == "grammar" and error.value.hint


def test_what_takes_too_long_later_ends_its_own_texts_alone(grammars):
    other, beside = begun(grammars, "x*"), begun(grammars, explodes_later(0), "grammar")
    hostile = exploding(grammars)
    assert allows(hostile, *ids("x")) and hostile.failed is None
    follow(hostile, "x")
    assert "it takes more than" in str(hostile.failed) and not hostile.allowed().any()
    assert beside.failed is not None  # a text of the same process
    follow(other, "x" * 9)
    assert other.failed is None and exploding(grammars).failed is None


def test_texts_of_a_busy_process_are_asked_without_waiting(grammars):
    held = [exploding(grammars, 1), *(begun(grammars, explodes_later(1), "grammar") for _ in range(300))]
    for matcher in held:
        follow(matcher, "x")  # of the first one, work for as long as there may be
    assert not held[0].ready and not held[0].wait(0.0) and held[0].late
    assert held[0].wait() and not held[0].late and all(matcher.failed for matcher in held)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere time alone bounds memory")
def test_what_takes_too_much_memory_is_ended(few):
    with pytest.raises(UserError, match="16 MiB of memory"):
        begun(few, explodes_at_once(0), "grammar")
    assert begun(few, "a")


def grown(matcher: Matcher) -> str:
    """Why a text of letters fails whose constraint has a state for each 15 letters a or b."""
    random = np.random.default_rng(0)
    while matcher.failed is None:
        matcher.accept(int(random.choice(ids("ab"))))
    return matcher.failed


GROWING = "[ab]*a[ab]{14}c"


def test_what_texts_together_have_worn_out_begins_anew(few):
    assert "too many states" in grown(begun(few, GROWING))
    fresh = begun(few, GROWING)
    follow(fresh, "a")
    assert fresh.failed is None


def test_constraints_in_use_have_a_bound(few):
    first, second = begun(few, "a"), begun(few, "b")
    with pytest.raises(BusyError, match="in use"):
        begun(few, "c")
    assert begun(few, "a").failed is None
    del first
    third = begun(few, "c")  # in the place of one that has no text any more
    assert second.failed is third.failed is None


def test_nobody_waits_in_a_long_line():
    told: queue.Queue[str] = queue.Queue()
    with made_with(ProcessLimits(seconds=60, memory=8 << 30), compiling=1, waiting=1) as slow:
        known = begun(slow, "a")

        def ask(number: int) -> None:
            try:
                begun(slow, explodes_at_once(number), "grammar")
            except UserError as error:
                told.put(f"{type(error).__name__} {error.what}")

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        assert told.get(timeout=60).startswith("BusyError")  # one is compiled, one waits
        assert begun(slow, "a").failed is known.failed is None
    for thread in threads:  # closing ends the wait of the other two
        thread.join(60)
        assert not thread.is_alive()
    assert told.qsize() == 2 and all("shut down" in told.get() for _ in "ab")


def test_owners_do_not_share_what_is_compiled(grammars):
    one, other, again = (begun(grammars, GROWING, owner=owner) for owner in (1, 2, 2))
    assert one.process is not other.process is again.process


def test_processes_go_where_memory_is_short_after_a_while_and_at_the_end():
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    def started() -> int:
        return sum(child.pid not in before for child in psutil.Process().children(recursive=True))

    with made_with(ProcessLimits(idle_seconds=0.05), memory=12 << 20) as made:
        honest = begun(made, "a*")
        assert started() == 2  # one launches the others
        assert grown(begun(made, GROWING)) == "all constraints together take too much memory", "the largest goes"
        time.sleep(0.2)
        follow(honest, "aaa")
        assert honest.failed is None  # it has a text
        del honest
        assert until(lambda: started() == 1)
        held = begun(made, "a*")
    assert until(lambda: not started() and held.failed == "the engine is shut down")


def test_a_text_in_a_circle_of_references_does_not_hold_its_process():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with made_with(ProcessLimits(idle_seconds=0.05)) as made:
        gc.disable()  # as if nothing else were made that would have it collected
        try:
            circle: list[object] = [begun(made, "a*")]
            circle.append(circle)
            del circle
            # What launches the others stays.
            assert until(lambda: len({one.pid for one in psutil.Process().children(recursive=True)} - before) == 1)
        finally:
            gc.enable()


def test_a_tokenizer_that_cannot_be_read_is_said():
    words = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))
    with contextlib.closing(Grammars(PreTrainedTokenizerFast(tokenizer_object=words), 2)) as made:
        for _ in range(2):
            with pytest.raises(UnsupportedError, match="this model's tokenizer") as error:
                begun(made, "a")
            assert error.value.hint


def test_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("deltaw.serving.constraints.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="llguidance") as error:
        begun(Grammars(TOKENIZER, V), "a")
    assert "serve" in str(error.value.hint)
