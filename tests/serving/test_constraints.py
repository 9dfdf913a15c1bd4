"""Texts that must match: whatever is drawn, the text does; and what a hostile schema may cost."""

from __future__ import annotations

import contextlib
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

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    with contextlib.closing(Grammars(TOKENIZER, V)) as made:
        yield made


def schema(value: object) -> Constraint:
    return Constraint("json_schema", json.dumps(value))


def drawn(matchers: list[Matcher], ends: list[int], *, most: int = 400, seed: int = 0) -> list[str]:
    """Texts drawn from logits that know nothing: only the constraint gives them form."""
    states = [SamplingState(Sampling(temperature=1.0, seed=n), np.array([5]), V) for n in range(len(matchers))]
    random = np.random.default_rng(seed)
    texts: list[list[int]] = [[] for _ in matchers]
    for _ in range(most):
        going = [n for n, matcher in enumerate(matchers) if not matcher.ended and texts[n][-1:] != [END]]
        if not going:
            break
        logits = random.normal(size=(len(going), V)).astype(np.float32)
        chosen = choose(logits, [states[n] for n in going], {p: matchers[n].allowed() for p, n in enumerate(going)})
        for n, token in zip(going, chosen.tokens.tolist(), strict=True):
            texts[n].append(token)
            if token in ends:
                texts[n][-1] = END
            else:
                matchers[n].accept(token)
                assert matchers[n].failed is None
    else:
        raise AssertionError("a text did not end")
    return [TOKENIZER.decode(text, skip_special_tokens=True) for text in texts]


def test_texts_drawn_at_random_match_the_schema(grammars: Grammars) -> None:
    texts = drawn([grammars.compile(schema(PERSON), [END]) for _ in range(12)], [END])
    for text in texts:
        person = json.loads(text)
        assert set(person) <= {"name", "age", "tags"}
        assert isinstance(person["name"], str)
        assert 0 <= person["age"] <= 120
        assert set(person.get("tags", [])) <= {"a", "b"}
    assert len(set(texts)) > 6


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (Constraint("regex", r"(yes|no), [a-c]{2,4}\d"), r"(yes|no), [a-c]{2,4}\d"),
        (Constraint("regex", "[é漢]{3}/x"), "[é漢]{3}/x"),
        (Constraint("grammar", 'start: "a" b\nb: "(" b ")" | "x"'), r"a\(*x\)*"),
    ],
)
def test_texts_drawn_at_random_match_expression_and_grammar(
    grammars: Grammars, constraint: Constraint, pattern: str
) -> None:
    for text in drawn([grammars.compile(constraint, [END]) for _ in range(8)], [END]):
        assert re.fullmatch(pattern, text)


def test_any_json_object_is_one(grammars: Grammars) -> None:
    matcher = grammars.compile(Constraint("json_object"), [END])
    for token in TOKENIZER('{"a": [1, {"b": null}], "c": "x"}')["input_ids"]:
        assert not matcher.ended
        matcher.accept(token)
    assert matcher.ended
    other = grammars.compile(Constraint("json_object"), [END])
    other.accept(TOKENIZER("[")["input_ids"][0])
    assert other.failed


def allows(matcher: Matcher, token: int) -> bool:
    words = matcher.allowed()
    assert words.shape == ((V + 31) // 32,)
    return bool(words.view(np.uint8)[token // 8] >> token % 8 & 1)


def test_terminators_are_the_requests_own_and_come_only_where_the_text_may_end(grammars: Grammars) -> None:
    matcher = grammars.compile(Constraint("regex", "ab*"), [TURN])
    a, b = TOKENIZER("ab")["input_ids"]
    assert allows(matcher, a)
    assert not any(allows(matcher, token) for token in (b, END, TURN))
    matcher.accept(a)
    assert allows(matcher, b)
    assert allows(matcher, TURN)
    assert not allows(matcher, END)  # the tokenizer's own, which this request does not end with
    assert not matcher.ended


def test_tokens_beyond_the_tokenizer_are_never_allowed(grammars: Grammars) -> None:
    matcher = grammars.compile(Constraint("regex", "(.|\n)*"), [END])
    assert allows(matcher, TOKENIZER("a")["input_ids"][0])
    assert not any(allows(matcher, token) for token in range(len(TOKENIZER), V))
    assert not allows(matcher, 1)  # a special token is no text


def test_same_constraint_again_starts_anew_with_its_own_terminators(grammars: Grammars) -> None:
    constraint = Constraint("regex", "abc?")
    first = grammars.compile(constraint, [END])
    a, b, c = TOKENIZER("abc")["input_ids"]
    first.accept(a)
    second = grammars.compile(constraint, [TURN])
    assert allows(first, b)
    assert allows(second, a)
    second.accept(a)
    second.accept(b)
    assert allows(second, c)
    assert allows(second, TURN)
    assert not allows(second, END)
    assert not allows(first, c)


def test_white_space_is_bounded(grammars: Grammars) -> None:
    matcher = grammars.compile(Constraint("json_object"), [END])
    brace, space = TOKENIZER("{ ")["input_ids"]
    matcher.accept(brace)
    spaces = 0
    while allows(matcher, space):
        matcher.accept(space)
        spaces += 1
        assert spaces < 40
    assert spaces > 0


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
def test_what_cannot_be_compiled_is_refused_by_name(grammars: Grammars, kind: str) -> None:
    for value in HOSTILE[kind]:
        with pytest.raises(UserError) as error:
            grammars.compile(Constraint(kind, value), [END])  # type: ignore[arg-type]
        assert error.value.where == kind and error.value.hint
        assert "\n" not in error.value.what and len(error.value.what) < 600


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("regex", "(a+)+b"),
        Constraint("regex", "(.*a.{200})"),
        Constraint("regex", "((a|b|ab){1,50}c?){1,50}z"),
        schema({"type": "array", "minItems": 10**8}),
        schema({"type": "string", "pattern": "(a|b|ab)*c{200}(x+x+)+y"}),
        Constraint("grammar", 'start: start start | "a"'),
        Constraint("regex", "(a{1000}){1000}"),
        Constraint("grammar", 'start: "a"{1000000}'),
    ],
    ids=lambda constraint: constraint.value[:20],
)
def test_what_is_slow_elsewhere_either_goes_on_or_says_that_it_does_not(
    grammars: Grammars, constraint: Constraint
) -> None:
    try:
        matcher = grammars.compile(constraint, [END])
    except UserError as error:
        assert "takes more than" in error.what
        return
    random = np.random.default_rng(0)
    for _ in range(40):
        tokens = np.flatnonzero(np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little"))
        if matcher.failed or matcher.ended or not len(set(tokens) - {END}):
            break
        matcher.accept(int(random.choice([token for token in tokens if token != END])))
    if matcher.failed:
        assert not matcher.allowed().any()
        assert not matcher.ended


def grammar(text: str) -> Constraint:
    return Constraint("grammar", text)


def followed(matcher: Matcher, letter: str, count: int) -> None:
    for token in TOKENIZER(letter * count)["input_ids"]:
        matcher.accept(token)


def test_what_takes_too_long_to_compile_is_ended(grammars: Grammars) -> None:
    for _ in range(2):  # the second time it is known
        with pytest.raises(UserError, match="it takes more than 1 s of work") as error:
            grammars.compile(grammar(explodes_at_once(0)), [END])
        assert error.value.where == "grammar" and error.value.hint


def test_what_takes_too_long_later_ends_its_own_texts_alone(grammars: Grammars) -> None:
    other = grammars.compile(Constraint("regex", "x*"), [END])
    hostile, beside = (grammars.compile(grammar(explodes_later(0)), [END]) for _ in "ab")
    followed(hostile, "x", 4)
    assert allows(hostile, TOKENIZER("x")["input_ids"][0]) and hostile.failed is None
    followed(hostile, "x", 1)
    assert "it takes more than" in str(hostile.failed) and not hostile.allowed().any()
    assert beside.failed is not None  # a text of the same process
    followed(other, "x", 9)
    assert other.failed is None
    anew = grammars.compile(grammar(explodes_later(0)), [END])
    followed(anew, "x", 4)
    assert anew.failed is None


def test_a_text_is_asked_without_waiting(grammars: Grammars) -> None:
    matcher = grammars.compile(grammar(explodes_later(1)), [END])
    followed(matcher, "x", 4)
    matcher.accept(TOKENIZER("x")["input_ids"][0])  # a second of work
    assert not matcher.ready and not matcher.wait(0.0) and matcher.late
    assert matcher.wait() and not matcher.late and matcher.failed


def test_many_texts_of_a_busy_process_are_asked_without_waiting(grammars: Grammars) -> None:
    hostile = grammar(explodes_later(2))
    held = [grammars.compile(hostile, [END]) for _ in range(1000)]
    for matcher in held[:2]:
        followed(matcher, "x", 4)
        assert matcher.failed is None
    for matcher in held:
        matcher.accept(TOKENIZER("x")["input_ids"][0])  # of the first one, a second of work
    assert not held[0].ready
    assert all(matcher.failed for matcher in held)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere time alone bounds memory")
def test_what_takes_too_much_memory_is_ended() -> None:
    limits = ConstraintLimits(ProcessLimits(seconds=60, memory=16 << 20))
    with contextlib.closing(Grammars(TOKENIZER, V, limits)) as small:
        with pytest.raises(UserError, match="16 MiB of memory"):
            small.compile(grammar(explodes_at_once(0)), [END])
        assert small.compile(Constraint("regex", "a"), [END])


def test_the_work_for_one_text_is_bounded() -> None:
    limits = ConstraintLimits(ProcessLimits(text_seconds=0.0001))
    with contextlib.closing(Grammars(TOKENIZER, V, limits)) as short:
        matcher = short.compile(Constraint("regex", "x*"), [END])
        while matcher.failed is None:
            followed(matcher, "x", 1)
        assert "more than 0.0001 s" in matcher.failed
        assert short.compile(Constraint("regex", "x*"), [END]).failed is None


def grown(matcher: Matcher) -> str:
    """Why a text of letters fails whose constraint has a state for each 15 letters a or b."""
    letters = TOKENIZER("ab")["input_ids"]
    random = np.random.default_rng(0)
    while matcher.failed is None:
        matcher.accept(int(random.choice(letters)))
    return matcher.failed


GROWING = Constraint("regex", "[ab]*a[ab]{14}c")


def test_what_texts_together_have_worn_out_begins_anew() -> None:
    with contextlib.closing(Grammars(TOKENIZER, V, ConstraintLimits(ProcessLimits(states=300)))) as few:
        assert "too many states" in grown(few.compile(GROWING, [END]))
        fresh = few.compile(GROWING, [END])
        followed(fresh, "a", 1)
        assert fresh.failed is None


def test_constraints_in_use_have_a_bound() -> None:
    with contextlib.closing(Grammars(TOKENIZER, V, ConstraintLimits(processes=2))) as few:
        first = few.compile(Constraint("regex", "a"), [END])
        second = few.compile(Constraint("regex", "b"), [END])
        with pytest.raises(BusyError, match="in use"):
            few.compile(Constraint("regex", "c"), [END])
        assert few.compile(Constraint("regex", "a"), [END]).failed is None
        del first
        third = few.compile(Constraint("regex", "c"), [END])  # in the place of one that has no text any more
        assert second.failed is third.failed is None


def test_where_all_take_too_much_memory_the_largest_goes() -> None:
    with contextlib.closing(Grammars(TOKENIZER, V, ConstraintLimits(memory=8 << 20))) as little:
        honest = little.compile(Constraint("regex", "a*"), [END])
        assert grown(little.compile(GROWING, [END])) == "all constraints together take too much memory"
        followed(honest, "a", 3)
        assert honest.failed is None


def test_nobody_waits_in_a_long_line(grammars: Grammars) -> None:
    limits = ConstraintLimits(ProcessLimits(seconds=60, memory=8 << 30), compiling=1, waiting=1)
    told: queue.Queue[str] = queue.Queue()
    with contextlib.closing(Grammars(TOKENIZER, V, limits)) as slow:
        known = slow.compile(Constraint("regex", "a"), [END])

        def ask(number: int) -> None:
            try:
                slow.compile(grammar(explodes_at_once(number)), [END])
            except UserError as error:
                told.put(f"{type(error).__name__} {error.what}")

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        assert told.get(timeout=60).startswith("BusyError")  # one is compiled, one waits
        assert slow.compile(Constraint("regex", "a"), [END]).failed is known.failed is None
    for thread in threads:  # closing ends the wait of the other two
        thread.join(60)
        assert not thread.is_alive()
    assert told.qsize() == 2 and all("shut down" in told.get() for _ in "ab")


def test_owners_do_not_share_what_is_compiled(grammars: Grammars) -> None:
    one, other = (grammars.compile(GROWING, [END], owner) for owner in (1, 2))
    assert one.process is not other.process
    assert grammars.compile(GROWING, [END], 2).process is other.process


def test_processes_go_after_a_while_and_at_the_end() -> None:
    limits = ConstraintLimits(ProcessLimits(idle_seconds=0.05))
    made = Grammars(TOKENIZER, V, limits)
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    def started() -> list[psutil.Process]:
        return [child for child in psutil.Process().children(recursive=True) if child.pid not in before]

    matcher = made.compile(Constraint("regex", "a*"), [END])
    assert len(started()) == 2  # one launches the others
    time.sleep(0.3)
    followed(matcher, "a", 1)
    assert matcher.failed is None  # it has a text
    del matcher
    assert until(lambda: len(started()) == 1)
    held = made.compile(Constraint("regex", "a*"), [END])
    made.close()
    assert until(lambda: not started())
    assert held.failed == "the engine is shut down"


def test_a_tokenizer_that_cannot_be_read_is_said() -> None:
    words = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))
    unread = PreTrainedTokenizerFast(tokenizer_object=words)
    with contextlib.closing(Grammars(unread, 2)) as made:
        for _ in range(2):
            with pytest.raises(UnsupportedError, match="this model's tokenizer") as error:
                made.compile(Constraint("regex", "a"), [])
            assert error.value.hint


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaw.serving.constraints.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="llguidance") as error:
        Grammars(TOKENIZER, V).compile(Constraint("regex", "a"), [END])
    assert "serve" in str(error.value.hint)
