"""Rows for retrieval: their forms, which are refused and why, duplicates, the split, and what a check says of them."""

from __future__ import annotations

import math

import pytest

from deltaw.data import DataSettings
from deltaw.data.embedding import EmbeddingReader
from deltaw.data.report import BadRows
from deltaw.data.row_store import digest_of_rows
from tests.byte_models import byte_tokenizer
from tests.data.conftest import accounted, refusal

TOKENIZER = byte_tokenizer()


@pytest.fixture
def reader(write):
    def make(rows, name="d.jsonl", *, prompts=("", ""), score_range=(-1.0, 1.0), **settings):
        given = {"eval": None, **settings}
        how = {"prompts": prompts, "score_range": score_range}
        return EmbeddingReader(DataSettings(train=write(rows, name), **given), TOKENIZER, **how)

    return make


@pytest.fixture
def read(reader):
    return lambda *given, **how: reader(*given, **how).prepared()


def texts(group):
    return [TOKENIZER.decode(row.tokens) for row in group.rows]


PAIR = {"anchor": "q", "positive": "p"}
FORMS = {
    "pairs": (PAIR, ["q", "p"], (), "queries with passages"),
    "question, answer": ({"question": "q", "answer": "p"}, ["q", "p"], (), "queries with passages"),
    "query, passage": ({"query": "q", "passage": "p"}, ["q", "p"], (), "queries with passages"),
    "prompt, completion": ({"prompt": "q", "completion": "p"}, ["q", "p"], (), "queries with passages"),
    "text, positive": ({"text": "q", "positive": "p"}, ["q", "p"], (), "queries with passages"),
    "triplets": (PAIR | {"negative": "n"}, ["q", "p", "n"], (), "queries with passages and negatives"),
    "a list of negatives": (
        PAIR | {"negatives": ["n", "m"]},
        ["q", "p", "n", "m"],
        (),
        "queries with passages and negatives",
    ),
    "numbered negatives, by their numbers": (
        PAIR | {f"negative_{n}": f"n{n}" for n in (10, 2, 1)},
        ["q", "p", "n1", "n2", "n10"],
        (),
        "queries with passages and negatives",
    ),
    "a list with labels": (
        {"query": "q", "passages": ["a", "b", "c"], "labels": [1, 0, 0.5]},
        ["q", "a", "b", "c"],
        (1.0, 0.0, 0.5),
        "queries and passages with scores",
    ),
    "a list with scores": (
        {"query": "q", "documents": ["a", "b"], "scores": [1, -1]},
        ["q", "a", "b"],
        (1.0, -1.0),
        "queries and passages with scores",
    ),
    "scored pairs": (
        {"sentence1": "q", "sentence2": "p", "score": 0.25},
        ["q", "p"],
        (0.25,),
        "queries and passages with scores",
    ),
    "pairs that fit or do not": (
        {"premise": "q", "hypothesis": "p", "label": True},
        ["q", "p"],
        (1.0,),
        "queries and passages with scores",
    ),
    "a triplet with the teacher's margin, of any size": (
        PAIR | {"negative": "n", "score": 7.5},
        ["q", "p", "n"],
        (7.5,),
        "queries and passages with scores",
    ),
    "a triplet with the teacher's scores": (
        PAIR | {"negative": "n", "score": [0.75, 0.5]},
        ["q", "p", "n"],
        (0.75, 0.5),
        "queries and passages with scores",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_row_becomes_its_query_its_passages_and_their_scores(read, name):
    row, expected, scores, form = FORMS[name]
    data = read([row | {"source": "x"}])
    (group,) = data.train
    assert texts(group) == expected and group.scores == scores and group.label is None
    assert data.report.form == form and data.report.unused_columns == ("source",)


def test_rows_may_have_different_numbers_of_numbered_negatives(read):
    rows = [PAIR | {"negative_1": "n", "negative_2": "m"}, {"anchor": "r", "positive": "s", "negative_1": "o"}]
    assert [texts(group) for group in read(rows).train] == [["q", "p", "n", "m"], ["r", "s", "o"]]
    table = "anchor,positive,negative_1,negative_2\nq,p,n,m\nr,s,o,\n"
    assert [texts(group) for group in read(table, "d.csv").train] == [["q", "p", "n", "m"], ["r", "s", "o"]]


def test_texts_have_classes_by_name_or_number(read):
    rows = [{"text": "a", "label": "sport"}, {"text": "b", "label": "news"}, {"text": "c", "label": "sport"}]
    data = read(rows)
    assert [(texts(group), group.label) for group in data.train] == [(["a"], 0), (["b"], 1), (["c"], 0)]
    assert data.report.form == "texts with classes"
    rows = [{"sentence": "a", "label": 7}, {"sentence": "b", "label": 3}]
    assert [group.label for group in read(rows).train] == [0, 1]


def test_scores_of_a_table_are_numbers(read):
    data = read("sentence1,sentence2,score\na,b,0.5\nc,d,-1\n", "d.csv")
    assert [group.scores for group in data.train] == [(0.5,), (-1.0,)]
    assert "must be a number" in refusal(read, "sentence1,sentence2,score\na,b,0.5\nc,d,high\n", "d.csv").what


def test_columns_with_other_names_are_mapped(read):
    row = {"positive": "a decoy", "title": "q", "body": "p", "wrong": "n", "quality": 0.5}
    columns = {"anchor": "title", "positive": "body", "negative": "wrong", "score": "quality"}
    data = read([row], columns=columns)
    (group,) = data.train
    assert texts(group) == ["q", "p", "n"] and group.scores == (0.5,)
    assert data.report.unused_columns == ("positive",)
    told = refusal(read, [{"title": "q", "body": "p"}])
    assert "do not fit the task embedding" in told.what and "queries with passages (anchor, positive)" in told.hint
    assert "'title', 'body'" in told.where and "data.columns" in told.hint
    assert "do not fit" in refusal(read, [{"anchor": "q", "negative": "n"}]).what


def test_queries_and_passages_begin_with_their_prompts_and_texts_compared_both_ways_do_not(read):
    prompts = ("ask: ", "doc: ")
    assert texts(read([PAIR | {"negative": "n"}], prompts=prompts).train[0]) == ["ask: q", "doc: p", "doc: n"]
    assert texts(read([PAIR | {"score": 0.5}], prompts=prompts).train[0]) == ["q", "p"]
    assert texts(read([{"text": "a", "label": 1}], prompts=prompts).train[0]) == ["a"]


WRONG = "a value of the wrong type"
PAIRS = [{"anchor": f"q{n}", "positive": f"p{n}"} for n in range(4)]
TRIPLETS = [row | {"negative": f"n{n}"} for n, row in enumerate(PAIRS)]
SCORED = [row | {"score": 0.25} for row in PAIRS]
LISTS = [{"query": f"q{n}", "passages": [f"p{n}", f"n{n}"], "scores": [1, 0]} for n in range(4)]
CLASSES = [{"text": f"t{n}", "label": n % 2} for n in range(4)]
BAD = {
    "empty query": (PAIRS, {"anchor": ""}, "an empty text"),
    "empty passage": (PAIRS, {"positive": ""}, "an empty text"),
    "blank passage": (PAIRS, {"positive": " \n"}, "an empty text"),
    "null passage": (PAIRS, {"positive": None}, WRONG),
    "passage that is no text": (PAIRS, {"positive": 3}, WRONG),
    "null negative": (TRIPLETS, {"negative": None}, WRONG),
    "negative that is the query": (TRIPLETS, {"negative": "q"}, "a text that is its own negative"),
    "negative that is the passage": (TRIPLETS, {"negative": "p"}, "a text that is its own negative"),
    "list of negatives with the passage": (
        [PAIR | {"negatives": ["n"]}],
        {"negatives": ["n", "p"]},
        "a text that is its own negative",
    ),
    "no negatives": ([PAIR | {"negatives": ["n"]}], {"negatives": []}, WRONG),
    "list of passages and nothing that says which are right": (
        PAIRS,
        {"positive": ["p", "r"]},
        "passages without scores",
    ),
    "score that is text": (SCORED, {"score": "high"}, "a score that is no number"),
    "no score": (SCORED, {"score": None}, "a score that is no number"),
    "NaN": (SCORED, {"score": math.nan}, "a score that is no number"),
    "infinite score": (SCORED, {"score": math.inf}, "a score that is no number"),
    "score above the range": (SCORED, {"score": 1.5}, "a score outside of its range"),
    "score below the range": (SCORED, {"score": -1.01}, "a score outside of its range"),
    "one of several scores above the range": (LISTS, {"scores": [1, 5]}, "a score outside of its range"),
    "too few scores": (LISTS, {"passages": ["p", "n", "m"]}, "scores that do not fit"),
    "too many scores": (LISTS, {"scores": [1, 0, 0]}, "scores that do not fit"),
    "no passages": (LISTS, {"passages": []}, WRONG),
    "empty passage in a list": (LISTS, {"passages": ["p", ""]}, "an empty text"),
    "no class": (CLASSES, {"label": None}, "no class"),
    "empty class": (CLASSES, {"label": ""}, "no class"),
    "class that is a list": (CLASSES, {"label": [1]}, "a label that is no class or number"),
    "empty text": (CLASSES, {"text": ""}, "an empty text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_used_is_refused_with_its_reason_or_skipped_and_counted(read, write, name):
    good, wrong, reason = BAD[name]
    named = {"anchor": "q", "positive": "p", "query": "q", "text": "t"}
    bad = {**good[0], **{key: text for key, text in named.items() if key in good[0]}, **wrong}
    rows = [*good, bad, *({**row, next(iter(row)): f"more {n}"} for n, row in enumerate(good))]
    refused = refusal(read, rows)
    place, _, line = refused.where.partition(" (")
    assert place.endswith(f"row {len(good) + 1}") and line == f"line {len(good) + 1})" and refused.hint
    data = read(rows, bad_rows="skip")
    (line,) = data.skipped.lines()
    assert (line["reason"], line["where"], line["error"]) == (reason, place, refused.what)
    assert data.report.bad_rows == {reason: 1}
    assert data.report.rows_read == accounted(data.report) == 2 * len(good) + 1
    assert [group.row for group in data.train] == [n for n in range(1, 2 * len(good) + 2) if n != len(good) + 1]


def test_scores_may_have_another_range(read):
    rows = [row | {"score": 4} for row in PAIRS]
    told = refusal(read, rows)
    assert "scores lie between -1 and 1" in told.what and "embedding.score_range" in told.hint
    assert read(rows, score_range=(0.0, 5.0)).train[0].scores == (4.0,)


@pytest.mark.parametrize(("way", "lengths"), [("cut", [[2, 6], [2, 2]]), ("drop", [[2, 2]])])
def test_long_texts_are_refused_cut_or_dropped(read, way, lengths):
    rows = [{"anchor": "q0", "positive": "p" * 9}, {"anchor": "q1", "positive": "p1"}]
    told = refusal(read, rows, max_length=6)
    assert "row 1" in told.where and "longer than 6 tokens" in told.what
    data = read(rows, max_length=6, long_rows=way)
    assert [[len(row) for row in group.rows] for group in data.train] == lengths
    if way == "cut":
        assert (data.report.cut, data.report.tokens_cut) == (1, 3)
    else:
        assert data.report.dropped_long == 1
    assert "cannot be divided" in refusal(read, rows, long_rows="split").what


def test_duplicates_are_dropped_or_kept_and_the_same_texts_with_another_score_are_no_duplicates(read):
    rows = [*SCORED, SCORED[0], SCORED[1] | {"score": 0.5}]
    data = read(rows)
    assert [group.row for group in data.train] == [1, 2, 3, 4, 6] and data.report.duplicates == 1
    assert len(read(rows, duplicates="keep").train) == 6
    assert len(read([PAIRS[0], PAIRS[0] | {"positive": "other"}, PAIRS[0]]).train) == 2
    assert len(read([*CLASSES, CLASSES[0], CLASSES[0] | {"label": 1}]).train) == 5


@pytest.mark.parametrize("seed", range(4))
def test_rows_with_the_same_query_stay_on_one_side_of_the_split(reader, seed):
    rows = [{"anchor": f"q{n % 12}", "positive": f"p{n}"} for n in range(120)]
    data = reader(rows, eval=0.3).prepared(seed)
    sides = [{texts(group)[0] for group in side} for side in (data.train, data.held_out)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 12
    assert 0.1 < len(data.held_out) / 120 < 0.5
    assert data.report.rows_read == accounted(data.report)


def test_training_rows_in_the_evaluation_file_are_counted(reader, write):
    apart = write([*PAIRS[:2], {"anchor": "new", "positive": "one"}], "eval.jsonl")
    data = reader(PAIRS, eval=apart).prepared()
    assert data.report.overlap == 2 and len(data.held_out) == 3
    assert any("2 " in line and "training" in line for line in data.report.lines())


def test_classes_of_the_evaluation_file_are_those_of_the_training_rows(reader, write):
    apart = write([{"text": "x", "label": "b"}, {"text": "y", "label": "a"}], "eval.jsonl")
    data = reader([{"text": "1", "label": "a"}, {"text": "2", "label": "b"}], eval=apart).prepared()
    assert [group.label for group in data.held_out] == [1, 0]


def test_rows_with_other_scores_or_classes_are_other_rows(read):
    """So that a resumed run whose file changed is refused."""
    changed = [[*SCORED[:3], SCORED[3] | {"score": 0.5}], [*CLASSES[:3], CLASSES[3] | {"label": 2}]]
    for rows, others in zip((SCORED, CLASSES), changed, strict=True):
        ours = digest_of_rows(read(rows).train)
        assert ours == digest_of_rows(read(rows).train) != digest_of_rows(read(others).train)


def test_a_check_names_bad_rows_duplicates_contradictions_and_shared_passages(reader, write):
    rows = [*SCORED, SCORED[0], SCORED[1] | {"score": 0.5}, {"anchor": "other", "positive": "p2", "score": 0.0}]
    rows.append(SCORED[0] | {"score": 3})
    apart = write([SCORED[0], SCORED[2] | {"score": 0.0}, SCORED[3] | {"positive": ""}], "eval.jsonl")
    check = reader(rows, eval=apart).check([apart])
    found = {finding.name: (finding.count, finding.level) for finding in check.findings}
    assert found["duplicates"] == (1, "warning") and found["contradictions"][0] == 1
    assert found["overlap"] == (1, "warning") and found["prompt_overlap"][0] == 1
    assert found["shared_passages"][1] == "note"
    bad = [finding for finding in check.findings if finding.name == "bad_rows"]
    assert [(one.count, one.level) for one in bad] == [(1, "error"), (1, "error")]
    assert "outside of its range" in bad[0].text and "an empty text" in bad[1].text


def test_shown_rows_have_their_texts_and_scores(reader):
    def labels(rows):
        return [[example.label for example in row.examples] for row in reader(rows).rows(BadRows("skip"))]

    shown = list(reader([*SCORED[:2], SCORED[2] | {"positive": ""}]).rows(bad := BadRows("skip")))
    assert [[("".join(p.text for p in e.pieces), e.label) for e in row.examples] for row in shown] == [
        [(f"q{n}", "query"), (f"p{n}", "0.25")] for n in range(2)
    ]
    assert len(bad) == 1
    assert [row.row for row in shown] == [1, 2]
    assert labels(TRIPLETS[:1]) == [["query", "passage", "negative"]]
    assert labels([TRIPLETS[0] | {"score": 7}]) == [["query", "7", "negative"]]
    assert labels(LISTS[:1]) == [["query", "1", "0"]]
    assert labels([{"text": "a", "label": "sport"}, {"text": "b", "label": "news"}]) == [["sport"], ["news"]]
