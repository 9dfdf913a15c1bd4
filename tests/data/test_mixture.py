"""Several sources with weights: how often rows come, and what is refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.data import DataSettings, prepare
from deltaw.data.labels import LabelReader
from deltaw.data.mixture import shown, weighted
from deltaw.settings import RunConfig
from tests.data.conftest import refusal
from tests.data.label_models import word_tokenizer


def texts(prefix: str, count: int):
    return [{"text": f"{prefix} {n}"} for n in range(count)]


def occurrences(prepared, tokenizer) -> Counter[str]:
    return Counter(tokenizer.decode(e.tokens, skip_special_tokens=True) for e in prepared.train)


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0.05, 4)), min_size=1, max_size=4), st.integers(0, 2**40))
def test_a_weight_is_how_often_rows_are_seen(sources, seed):
    source_of = np.repeat(np.arange(len(sources)), [count for count, _ in sources])
    rows = np.arange(len(source_of)) * 3
    weights = [weight for _, weight in sources]
    found = weighted(rows, source_of, weights, seed)
    times = Counter(found.tolist())
    for number, (count, weight) in enumerate(sources):
        own = [times[row] for row in rows[source_of == number].tolist()]
        assert all(int(weight) <= n <= int(weight) + 1 for n in own)
        assert abs(sum(own) - weight * count) <= 0.5 + 1e-9
    assert (np.diff(found) >= 0).all()
    assert (found == weighted(rows, source_of, weights, seed)).all()


def test_sources_are_read_one_after_another_each_with_its_weight(write, tokenizer):
    a, b, c = (write(texts("a", 4), "a.jsonl"), write(texts("b", 3), "b.jsonl"), write(texts("c", 10), "c.jsonl"))
    train = [a, {"from": b, "weight": 2}, {"from": c, "weight": 0.5}]
    prepared = prepare(DataSettings(train, eval=None), tokenizer, seed=1)
    times = occurrences(prepared, tokenizer)
    counts = {"a": 4, "b": 3, "c": 10}
    seen = {name: sorted(times[f"{name} {n}"] for n in range(count)) for name, count in counts.items()}
    assert seen == {"a": [1] * 4, "b": [2] * 3, "c": [0] * 5 + [1] * 5}
    report = prepared.report
    assert (report.rows_read, report.rows_kept, report.repeated, report.not_drawn) == (17, 12, 3, 5)
    assert report.rows_kept + report.repeated == len(prepared.train) == 15
    assert report.tokens == sum(len(example) for example in prepared.train)
    expected = {a: (1.0, 4), b: (2.0, 6), c: (0.5, 5)}
    assert report.sources == {name: {"weight": weight, "rows": rows} for name, (weight, rows) in expected.items()}
    said = "\n".join(report.lines())
    assert f"{b}: weight 2, 6 rows in an epoch" in said and report.source == shown(train)
    other = prepare(DataSettings(train, eval=None), tokenizer, seed=2)
    assert occurrences(other, tokenizer) != times


def test_a_row_of_two_sources_is_a_duplicate_and_held_out_rows_have_no_weight(write, tokenizer):
    a, b = write(texts("x", 6), "a.jsonl"), write(texts("x", 8), "b.jsonl")
    prepared = prepare(DataSettings([a, {"from": b, "weight": 3}], eval=4), tokenizer)
    assert (prepared.report.duplicates, len(prepared.held_out)) == (6, 4)
    times = occurrences(prepared, tokenizer)
    held_out = {tokenizer.decode(e.tokens, skip_special_tokens=True) for e in prepared.held_out}
    assert not held_out & times.keys() and len(held_out) == 4
    assert all(times[f"x {n}"] == (1 if n < 6 else 3) for n in range(8) if f"x {n}" not in held_out)


def test_each_source_may_have_columns_and_a_form_of_its_own(write, tokenizer):
    a = write([{"question": "q", "reply": "r", "text": "t"}], "a.jsonl")
    b = write([{"text": "plain", "prompt": "p", "completion": "c"}], "b.jsonl")
    train = [{"from": a, "columns": {"prompt": "question", "completion": "reply"}}, {"from": b, "form": "text"}]
    prepared = prepare(DataSettings(train, eval=None), tokenizer)
    first, second = (tokenizer.decode(example.tokens) for example in prepared.train)
    assert "q<|im_end|>" in first and first.endswith("r<|im_end|>") and second == "plain<|im_end|>"
    assert (prepared.report.form, prepared.report.template) == ("prompt-completion + text", "chat + plain")


def test_chosen_rows_are_drawn_over_all_sources(write, tokenizer):
    a, b = write(texts("a", 30), "a.jsonl"), write(texts("b", 30), "b.jsonl")
    prepared = prepare(DataSettings([a, b], rows=20, eval=None), tokenizer)
    assert len(prepared.train) == 20 and prepared.report.not_chosen == 40
    assert {text[0] for text in occurrences(prepared, tokenizer)} == {"a", "b"}


def test_labeled_rows_come_from_several_sources_too(write):
    a, b = (write([{"text": f"{x} film", "label": x}], f"{x}.jsonl") for x in ("good", "very"))
    plain, weighted = (DataSettings([a, source], eval=None) for source in (b, {"from": b, "weight": 2}))
    found = LabelReader(plain, word_tokenizer(), "sequence-classification").prepared()
    assert [example.label for example in found.train] == [0, 1]
    reader = LabelReader(weighted, word_tokenizer(), "sequence-classification")
    assert "no weight" in refusal(reader.prepared).what


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ([], "empty list"),
        ([3], "with 'from'"),
        ([{"weight": 2}], "with 'from'"),
        ([{"from": "a", "wieght": 2}], "unknown key 'wieght'"),
        ([{"from": "a", "weight": 0}], "the weight is 0"),
        ([{"from": "a", "weight": "2"}], "the weight is '2'"),
        ([{"from": "a", "weight": True}], "the weight is True"),
        ([{"from": "a", "weight": float("nan")}], "the weight is nan"),
        ([{"from": "a", "form": "txt"}], "no format 'txt'"),
        ([{"from": "a", "columns": {"promt": "b"}}], "no column 'promt'"),
        (["a", {"from": "b", "columns": ["c"]}], "'columns' must map"),
    ],
)
def test_what_is_no_source_is_refused_with_its_entry(train, said):
    assert said in refusal(DataSettings, train).what


def test_a_list_may_stand_for_the_section_and_in_a_flag(write):
    path = write("model: m\ndata: [a.jsonl, {from: b.jsonl, weight: 2}]\n", "run.yaml")
    config = RunConfig.read(path)
    assert config.data.train == ["a.jsonl", {"from": "b.jsonl", "weight": 2}]
    assert RunConfig.read(path, {"data": {"max_length": 9}}).data.train == config.data.train
    misspelt = {"model": "m", "data": {"train": [{"from": "a", "weigth": 1}]}}
    assert "unknown key 'weigth'" in refusal(RunConfig.read, misspelt).what
