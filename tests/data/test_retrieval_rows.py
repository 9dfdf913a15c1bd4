"""Rows for retrieval: formats, rejected rows, duplicates, splits, and data checks."""

from __future__ import annotations

import math

import pytest

from deltaw.data.bad_rows import BadRows
from deltaw.data.row_store import digest_of_rows
from deltaw.settings.data import DataSettings
from deltaw.tasks.embedding.rows import EmbeddingReader
from tests.byte_models import byte_tokenizer
from tests.data.conftest import accounted, refusal

TOKENIZER = byte_tokenizer()


@pytest.fixture
def reader(write):
    def make(rows, name="d.jsonl", *, prompts=("", ""), score_range=(-1.0, 1.0), **settings):
        data = DataSettings(train=write(rows, name), **{"eval": None, **settings})
        return EmbeddingReader(data, TOKENIZER, prompts=prompts, score_range=score_range)

    return make


@pytest.fixture
def read(reader):
    return lambda *args, **options: reader(*args, **options).prepare()


def texts(group):
    return [TOKENIZER.decode(row.tokens) for row in group.rows]


PAIR = {"anchor": "q", "positive": "p"}
LABELS = {"query": "q", "passages": ["a", "b", "c"], "labels": [1, 0, 0.5]}
# Row, texts, and scores.
FORMATS = {
    "pairs": (PAIR, "q p", ()),
    "question, answer": ({"question": "q", "answer": "p"}, "q p", ()),
    "query, passage": ({"query": "q", "passage": "p"}, "q p", ()),
    "prompt, completion": ({"prompt": "q", "completion": "p"}, "q p", ()),
    "text, positive": ({"text": "q", "positive": "p"}, "q p", ()),
    "triplets": (PAIR | {"negative": "n"}, "q p n", ()),
    "a list of negatives": (PAIR | {"negatives": ["n", "m"]}, "q p n m", ()),
    "numbered negatives": (PAIR | {f"negative_{n}": f"n{n}" for n in (10, 2, 1)}, "q p n1 n2 n10", ()),
    "a list with labels": (LABELS, "q a b c", (1.0, 0.0, 0.5)),
    "a list with scores": ({"query": "q", "documents": ["a", "b"], "scores": [1, -1]}, "q a b", (1.0, -1.0)),
    "scored pairs": ({"sentence1": "q", "sentence2": "p", "score": 0.25}, "q p", (0.25,)),
    "pairs that fit or do not": ({"premise": "q", "hypothesis": "p", "label": True}, "q p", (1.0,)),
    "a triplet with the teacher's margin": (PAIR | {"negative": "n", "score": 7.5}, "q p n", (7.5,)),
    "a triplet with the teacher's scores": (PAIR | {"negative": "n", "score": [0.75, 0.5]}, "q p n", (0.75, 0.5)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_have_query_passages_and_scores(read, name):
    row, expected, scores = FORMATS[name]
    data = read([row | {"source": "x"}])
    (group,) = data.train
    assert texts(group) == expected.split() and group.scores == scores and group.label is None
    form = "queries with passages and negatives" if len(expected) > 3 else "queries with passages"
    assert data.report.form == ("queries and passages with scores" if scores else form)
    assert data.report.unused_columns == ("source",)


def test_rows_can_have_different_numbers_of_negatives(read):
    rows = [PAIR | {"negative_1": "n", "negative_2": "m"}, {"anchor": "r", "positive": "s", "negative_1": "o"}]
    assert [texts(group) for group in read(rows).train] == [["q", "p", "n", "m"], ["r", "s", "o"]]
    table = "anchor,positive,negative_1,negative_2\nq,p,n,m\nr,s,o,\n"
    assert [texts(group) for group in read(table, "d.csv").train] == [["q", "p", "n", "m"], ["r", "s", "o"]]


def test_classes_can_be_names_or_numbers(read):
    rows = [{"text": "a", "label": "sport"}, {"text": "b", "label": "news"}, {"text": "c", "label": "sport"}]
    data = read(rows)
    assert [(texts(group), group.label) for group in data.train] == [(["a"], 0), (["b"], 1), (["c"], 0)]
    assert data.report.form == "texts with classes"
    rows = [{"sentence": "a", "label": 7}, {"sentence": "b", "label": 3}]
    assert [group.label for group in read(rows).train] == [0, 1]


def test_table_scores_are_parsed_as_numbers(read):
    data = read("sentence1,sentence2,score\na,b,0.5\nc,d,-1\n", "d.csv")
    assert [group.scores for group in data.train] == [(0.5,), (-1.0,)]
    assert "must be a number" in refusal(read, "sentence1,sentence2,score\na,b,0.5\nc,d,high\n", "d.csv").message


def test_columns_can_be_mapped(read):
    row = {"positive": "a decoy", "title": "q", "body": "p", "wrong": "n", "quality": 0.5}
    columns = {"anchor": "title", "positive": "body", "negative": "wrong", "score": "quality"}
    data = read([row], columns=columns)
    (group,) = data.train
    assert texts(group) == ["q", "p", "n"] and group.scores == (0.5,) and data.report.unused_columns == ("positive",)
    error = refusal(read, [{"title": "q", "body": "p"}])
    assert "do not fit the task embedding" in error.message and "queries with passages (anchor, positive)" in error.hint
    assert "'title', 'body'" in error.location and "data.columns" in error.hint
    assert "do not fit" in refusal(read, [{"anchor": "q", "negative": "n"}]).message


def test_prompts_are_prepended_to_asymmetric_texts_only(read):
    prompts = ("ask: ", "doc: ")
    assert texts(read([PAIR | {"negative": "n"}], prompts=prompts).train[0]) == ["ask: q", "doc: p", "doc: n"]
    assert texts(read([PAIR | {"score": 0.5}], prompts=prompts).train[0]) == ["q", "p"]
    assert texts(read([{"text": "a", "label": 1}], prompts=prompts).train[0]) == ["a"]


WRONG_TYPE = "a value of the wrong type"
PAIRS = [{"anchor": f"q{n}", "positive": f"p{n}"} for n in range(4)]
TRIPLETS = [row | {"negative": f"n{n}"} for n, row in enumerate(PAIRS)]
NEGATIVES = [PAIR | {"negatives": ["n"]}]
SCORED = [row | {"score": 0.25} for row in PAIRS]
LISTS = [{"query": f"q{n}", "passages": [f"p{n}", f"n{n}"], "scores": [1, 0]} for n in range(4)]
CLASSES = [{"text": f"t{n}", "label": n % 2} for n in range(4)]
BAD = {
    "empty query": (PAIRS, {"anchor": ""}, "an empty text"),
    "empty passage": (PAIRS, {"positive": ""}, "an empty text"),
    "passage that is no text": (PAIRS, {"positive": 3}, WRONG_TYPE),
    "negative that is the query": (TRIPLETS, {"negative": "q"}, "a text that is its own negative"),
    "negative that is the passage": (TRIPLETS, {"negative": "p"}, "a text that is its own negative"),
    "passage among negatives": (NEGATIVES, {"negatives": ["n", "p"]}, "a text that is its own negative"),
    "no negatives": (NEGATIVES, {"negatives": []}, WRONG_TYPE),
    "passages without scores": (PAIRS, {"positive": ["p", "r"]}, "passages without scores"),
    "score that is text": (SCORED, {"score": "high"}, "a score that is no number"),
    "no score": (SCORED, {"score": None}, "a score that is no number"),
    "NaN": (SCORED, {"score": math.nan}, "a score that is no number"),
    "score above the range": (SCORED, {"score": 1.5}, "a score outside of its range"),
    "one of several scores above the range": (LISTS, {"scores": [1, 5]}, "a score outside of its range"),
    "too few scores": (LISTS, {"passages": ["p", "n", "m"]}, "scores that do not fit"),
    "no passages": (LISTS, {"passages": []}, WRONG_TYPE),
    "no class": (CLASSES, {"label": None}, "no class"),
    "class that is a list": (CLASSES, {"label": [1]}, "a label that is no class or number"),
    "empty text": (CLASSES, {"text": ""}, "an empty text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_row_is_rejected_or_skipped_with_its_reason(read, write, name):
    good, changes, reason = BAD[name]
    texts_by_column = {"anchor": "q", "positive": "p", "query": "q", "text": "t"}
    bad = {**good[0], **{key: text for key, text in texts_by_column.items() if key in good[0]}, **changes}
    rows = [*good, bad, *({**row, next(iter(row)): f"more {n}"} for n, row in enumerate(good))]
    error = refusal(read, rows)
    location, _, line = error.location.partition(" (")
    assert location.endswith(f"row {len(good) + 1}") and line == f"line {len(good) + 1})" and error.hint
    data = read(rows, bad_rows="skip")
    (line,) = data.skipped.lines()
    assert (line["reason"], line["where"], line["error"]) == (reason, location, error.message)
    assert data.report.bad_rows == {reason: 1} and data.report.rows_read == accounted(data.report) == 2 * len(good) + 1
    assert [group.row for group in data.train] == [n for n in range(1, 2 * len(good) + 2) if n != len(good) + 1]


def test_score_range_is_configurable(read):
    rows = [row | {"score": 4} for row in PAIRS]
    error = refusal(read, rows)
    assert "scores must be between -1 and 1" in error.message and "embedding.score_range" in error.hint
    assert read(rows, score_range=(0.0, 5.0)).train[0].scores == (4.0,)


@pytest.mark.parametrize(("way", "lengths"), [("cut", [[2, 6], [2, 2]]), ("drop", [[2, 2]])])
def test_long_texts_are_rejected_truncated_or_dropped(read, way, lengths):
    rows = [{"anchor": "q0", "positive": "p" * 9}, {"anchor": "q1", "positive": "p1"}]
    error = refusal(read, rows, max_length=6)
    assert "row 1" in error.location and "longer than 6 tokens" in error.message
    data = read(rows, max_length=6, long_rows=way)
    assert [[len(row) for row in group.rows] for group in data.train] == lengths
    counts = data.report.cut, data.report.tokens_cut, data.report.dropped_long
    assert counts == ((1, 3, 0) if way == "cut" else (0, 0, 1))
    assert "cannot be divided" in refusal(read, rows, long_rows="split").message


def test_duplicates_have_equal_texts_and_scores(read):
    rows = [*SCORED, SCORED[0], SCORED[1] | {"score": 0.5}]
    data = read(rows)
    assert [group.row for group in data.train] == [1, 2, 3, 4, 6] and data.report.duplicates == 1
    assert len(read(rows, duplicates="keep").train) == 6
    assert len(read([PAIRS[0], PAIRS[0] | {"positive": "other"}, PAIRS[0]]).train) == 2
    assert len(read([*CLASSES, CLASSES[0], CLASSES[0] | {"label": 1}]).train) == 5


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_a_query_are_on_one_side_of_the_split(reader, seed):
    rows = [{"anchor": f"q{n % 12}", "positive": f"p{n}"} for n in range(120)]
    data = reader(rows, eval=0.3).prepare(seed)
    sides = [{texts(group)[0] for group in side} for side in (data.train, data.held_out)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 12 and 0.1 < len(data.held_out) / 120 < 0.5
    assert data.report.rows_read == accounted(data.report)


def test_overlap_with_the_evaluation_file_is_counted(reader, write):
    eval_file = write([*PAIRS[:2], {"anchor": "new", "positive": "one"}], "eval.jsonl")
    data = reader(PAIRS, eval=eval_file).prepare()
    assert data.report.overlap == 2 and len(data.held_out) == 3
    assert any("2 " in line and "training" in line for line in data.report.lines())


def test_evaluation_file_uses_the_classes_of_training(reader, write):
    eval_file = write([{"text": "x", "label": "b"}, {"text": "y", "label": "a"}], "eval.jsonl")
    data = reader([{"text": "1", "label": "a"}, {"text": "2", "label": "b"}], eval=eval_file).prepare()
    assert [group.label for group in data.held_out] == [1, 0]


def test_digest_includes_scores_and_classes(read):
    """Resuming a run is therefore rejected if its file changed."""
    changed = [[*SCORED[:3], SCORED[3] | {"score": 0.5}], [*CLASSES[:3], CLASSES[3] | {"label": 2}]]
    for rows, others in zip((SCORED, CLASSES), changed, strict=True):
        ours = digest_of_rows(read(rows).train)
        assert ours == digest_of_rows(read(rows).train) != digest_of_rows(read(others).train)


def test_check_reports_bad_rows_duplicates_contradictions_and_shared_passages(reader, write):
    rows = [*SCORED, SCORED[0], SCORED[1] | {"score": 0.5}, {"anchor": "other", "positive": "p2", "score": 0.0}]
    rows.append(SCORED[0] | {"score": 3})
    eval_file = write([SCORED[0], SCORED[2] | {"score": 0.0}, SCORED[3] | {"positive": ""}], "eval.jsonl")
    check = reader(rows, eval=eval_file).check([eval_file])
    findings = {finding.name: (finding.count, finding.level) for finding in check.findings}
    assert findings["duplicates"] == (1, "warning") and findings["contradictions"][0] == 1
    assert findings["overlap"] == (1, "warning") and findings["prompt_overlap"][0] == 1
    assert findings["shared_passages"][1] == "note"
    bad = [finding for finding in check.findings if finding.name == "bad_rows"]
    assert [(entry.count, entry.level) for entry in bad] == [(1, "error"), (1, "error")]
    assert "outside of its range" in bad[0].text and "an empty text" in bad[1].text


def test_preview_rows_have_texts_and_scores(reader):
    def labels(rows):
        return [[example.label for example in row.examples] for row in reader(rows).rows(BadRows("skip"))]

    previewed = list(reader([*SCORED[:2], SCORED[2] | {"positive": ""}]).rows(bad := BadRows("skip")))
    shown = [[("".join(p.text for p in e.spans), e.label) for e in row.examples] for row in previewed]
    assert shown == [[(f"q{n}", "query"), (f"p{n}", "0.25")] for n in range(2)]
    assert len(bad) == 1 and [row.row for row in previewed] == [1, 2]
    assert labels(TRIPLETS[:1]) == [["query", "passage", "negative"]]
    assert labels([TRIPLETS[0] | {"score": 7}]) == [["query", "7", "negative"]]
    assert labels(LISTS[:1]) == [["query", "1", "0"]]
    assert labels([{"text": "a", "label": "sport"}, {"text": "b", "label": "news"}]) == [["sport"], ["news"]]
