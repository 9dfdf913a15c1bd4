"""Texts that must match: whatever is drawn, the text does; and what a hostile schema may cost."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("llguidance", reason="the extra serve is not installed")

from deltaw.errors import UserError
from deltaw.serving.constraints import Grammars
from deltaw.serving.matcher import Matcher, masks
from deltaw.serving.request import Constraint, Sampling, UnsupportedError
from deltaw.serving.sampling import SamplingState, choose
from tests.byte_models import byte_tokenizer

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
    states = [
        SamplingState(Sampling(temperature=1.0, seed=n), np.array([5]), V) for n in range(len(matchers))
    ]
    random = np.random.default_rng(seed)
    texts: list[list[int]] = [[] for _ in matchers]
    for _ in range(most):
        going = [n for n, matcher in enumerate(matchers) if not matcher.ended and texts[n][-1:] != [END]]
        if not going:
            break
        logits = random.normal(size=(len(going), V)).astype(np.float32)
        chosen = choose(
            logits, [states[n] for n in going], masks({p: matchers[n] for p, n in enumerate(going)})
        )
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


def test_text_that_is_whole_says_so(grammars: Grammars) -> None:
    matcher = grammars.compile(Constraint("regex", "ab"), [])
    for token in TOKENIZER("ab")["input_ids"]:
        assert not matcher.ended
        matcher.accept(token)
    assert matcher.ended
    assert matcher.failed is None


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


HOSTILE = {
    "not json": Constraint("json_schema", '{"type":'),
    "not a schema": Constraint("json_schema", "5"),
    "no such type": schema({"type": "strin"}),
    "matches nothing": schema(False),
    "cycle": schema({"$ref": "#"}),
    "cycle of two": schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    "$ref": "#/$defs/a"}),
    "from elsewhere": schema({"$ref": "https://example.com/schema.json"}),
    "a file": schema({"$ref": "file:///etc/passwd"}),
    "deep": Constraint("json_schema", nested(3000)),
    "deeper": Constraint("json_schema", nested(25_000)),
    "long": Constraint("json_schema", json.dumps({"enum": ["x" * 300_000]})),
    "properties": schema({"properties": {f"p{n}": {} for n in range(5000)}}),
    "properties in many": schema({"anyOf": [{"properties": {f"p{n}": {} for n in range(300)}}] * 20}),
    "product of choices": schema(
        {"allOf": [{"anyOf": [{"required": [f"a{n}"]}, {"required": [f"b{n}"]}]} for n in range(20)]}
    ),
    "branching references": schema(
        {
            "$defs": {f"a{n}": {key: [{"$ref": f"#/$defs/a{n + 1}"}] * 10 for key in ("anyOf", "allOf")}
            for n in range(8)} | {"a8": {"type": "string"}},
            "$ref": "#/$defs/a0",
        }
    ),
    "unclosed": Constraint("regex", "(a"),
    "look-ahead": Constraint("regex", "(?=a)b"),
    "back-reference": Constraint("regex", r"(a)\1"),
    "empty class": Constraint("regex", "[a&&b]"),
    "parentheses": Constraint("regex", "(" * 5000 + ")" * 5000),
    "unknown rule": Constraint("grammar", "start: a"),
    "endless rule": Constraint("grammar", "start: start"),
    "includes a file": Constraint("grammar", 'start: "a" %include "/etc/passwd"'),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_compiled_is_refused_by_name(grammars: Grammars, name: str) -> None:
    with pytest.raises(UserError) as error:
        grammars.compile(HOSTILE[name], [END])
    assert error.value.where == HOSTILE[name].kind
    assert error.value.hint
    assert "\n" not in error.value.what
    assert len(error.value.what) < 600


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
    matcher = grammars.compile(constraint, [END])
    random = np.random.default_rng(0)
    for _ in range(40):
        tokens = np.flatnonzero(np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little"))
        if matcher.failed or matcher.ended or not len(set(tokens) - {END}):
            break
        matcher.accept(int(random.choice([token for token in tokens if token != END])))
    if matcher.failed:
        assert not matcher.allowed().any()
        assert not matcher.ended


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaw.serving.matcher.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="llguidance") as error:
        Grammars(TOKENIZER, V).compile(Constraint("regex", "a"), [END])
    assert "serve" in str(error.value.hint)
