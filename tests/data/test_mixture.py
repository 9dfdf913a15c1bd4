"""Weighted sources: frequency of rows, and rejected settings."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.data.row_selection import apply_weights
from deltaw.data.stored_rows import TextReader
from deltaw.settings.config import RunConfig
from deltaw.settings.data import DataSettings
from deltaw.settings.mixture import format_sources
from deltaw.tasks.classification.rows import LabelReader
from tests.data.conftest import refusal
from tests.data.label_models import word_tokenizer


def texts(prefix: str, count: int):
    return [{"text": f"{prefix} {n}"} for n in range(count)]


def occurrences(prepared, tokenizer) -> Counter[str]:
    return Counter(tokenizer.decode(e.tokens, skip_special_tokens=True) for e in prepared.train)


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0.05, 4)), min_size=1, max_size=4), st.integers(0, 2**40))
def test_weight_is_the_number_of_occurrences(sources, seed):
    source_of = np.repeat(np.arange(len(sources)), [count for count, _ in sources])
    rows = np.arange(len(source_of)) * 3
    weights = [weight for _, weight in sources]
    weighted_rows = apply_weights(rows, source_of, weights, seed)
    times = Counter(weighted_rows.tolist())
    for number, (count, weight) in enumerate(sources):
        source_counts = [times[row] for row in rows[source_of == number].tolist()]
        assert all(int(weight) <= n <= int(weight) + 1 for n in source_counts)
        assert abs(sum(source_counts) - weight * count) <= 0.5 + 1e-9
    assert (np.diff(weighted_rows) >= 0).all()
    assert (weighted_rows == apply_weights(rows, source_of, weights, seed)).all()


def test_sources_are_read_in_order_with_their_weights(write, tokenizer):
    a = write(texts("a", 4), "a.jsonl")
    b = write(texts("b", 3), "b.jsonl")
    c = write(texts("c", 10), "c.jsonl")
    train = [a, {"from": b, "weight": 2}, {"from": c, "weight": 0.5}]
    prepared = TextReader(DataSettings(train, eval=None), tokenizer).prepare(1)
    times = occurrences(prepared, tokenizer)
    counts = {"a": 4, "b": 3, "c": 10}
    occurrence_counts = {name: sorted(times[f"{name} {n}"] for n in range(count)) for name, count in counts.items()}
    assert occurrence_counts == {"a": [1] * 4, "b": [2] * 3, "c": [0] * 5 + [1] * 5}
    report = prepared.report
    assert (report.rows_read, report.rows_kept, report.repeated, report.not_sampled) == (17, 12, 3, 5)
    assert report.rows_kept + report.repeated == len(prepared.train) == 15
    assert report.tokens == sum(len(example) for example in prepared.train)
    expected = {a: (1.0, 4), b: (2.0, 6), c: (0.5, 5)}
    assert report.sources == {name: {"weight": weight, "rows": rows} for name, (weight, rows) in expected.items()}
    message = "\n".join(report.lines())
    assert f"{b}: weight 2, 6 rows in an epoch" in message and report.source == format_sources(train)
    other = TextReader(DataSettings(train, eval=None), tokenizer).prepare(2)
    assert occurrences(other, tokenizer) != times


def test_duplicates_across_sources_and_unweighted_evaluation_rows(write, tokenizer):
    a = write(texts("x", 6), "a.jsonl")
    b = write(texts("x", 8), "b.jsonl")
    prepared = TextReader(DataSettings([a, {"from": b, "weight": 3}], eval=4), tokenizer).prepare()
    assert (prepared.report.duplicates, len(prepared.held_out)) == (6, 4)
    times = occurrences(prepared, tokenizer)
    held_out = {tokenizer.decode(e.tokens, skip_special_tokens=True) for e in prepared.held_out}
    assert not held_out & times.keys() and len(held_out) == 4
    assert all(times[f"x {n}"] == (1 if n < 6 else 3) for n in range(8) if f"x {n}" not in held_out)


def test_sources_can_have_separate_columns_and_formats(write, tokenizer):
    a = write([{"question": "q", "reply": "r", "text": "t"}], "a.jsonl")
    b = write([{"text": "plain", "prompt": "p", "completion": "c"}], "b.jsonl")
    train = [{"from": a, "columns": {"prompt": "question", "completion": "reply"}}, {"from": b, "form": "text"}]
    prepared = TextReader(DataSettings(train, eval=None), tokenizer).prepare()
    first, second = (tokenizer.decode(example.tokens) for example in prepared.train)
    assert "q<|im_end|>" in first and first.endswith("r<|im_end|>") and second == "plain<|im_end|>"
    assert (prepared.report.form, prepared.report.template) == ("prompt-completion + text", "chat + plain")


def test_selected_rows_are_sampled_from_all_sources(write, tokenizer):
    a = write(texts("a", 30), "a.jsonl")
    b = write(texts("b", 30), "b.jsonl")
    prepared = TextReader(DataSettings([a, b], rows=20, eval=None), tokenizer).prepare()
    assert len(prepared.train) == 20 and prepared.report.not_selected == 40
    assert {text[0] for text in occurrences(prepared, tokenizer)} == {"a", "b"}


def test_labeled_rows_can_have_several_sources(write):
    a, b = (write([{"text": f"{x} film", "label": x}], f"{x}.jsonl") for x in ("good", "very"))
    plain, weighted = (DataSettings([a, source], eval=None) for source in (b, {"from": b, "weight": 2}))
    data = LabelReader(plain, word_tokenizer(), "sequence-classification").prepare()
    assert [example.label for example in data.train] == [0, 1]
    reader = LabelReader(weighted, word_tokenizer(), "sequence-classification")
    assert "its own weight" in refusal(reader.prepare).message


INVALID = [([], "empty list"), ([3], "with 'from'"), ([{"weight": 2}], "with 'from'")]
INVALID += [([{"from": "a", "wieght": 2}], "unknown key 'wieght'"), ([{"from": "a", "weight": 0}], "the weight is 0")]
INVALID += [([{"from": "a", "weight": "2"}], "the weight is '2'")]
INVALID += [([{"from": "a", "weight": True}], "the weight is True")]
INVALID += [([{"from": "a", "weight": float("nan")}], "the weight is nan")]
INVALID += [([{"from": "a", "form": "txt"}], "no format 'txt'")]
INVALID += [([{"from": "a", "columns": {"promt": "b"}}], "unknown column 'promt'")]
INVALID += [(["a", {"from": "b", "columns": ["c"]}], "'columns' must map")]


@pytest.mark.parametrize(("train", "message"), INVALID)
def test_invalid_source_is_rejected_with_its_entry(train, message):
    assert message in refusal(DataSettings, train).message


def test_source_list_is_accepted_as_data_section_and_flag(write):
    path = write("model: m\ndata: [a.jsonl, {from: b.jsonl, weight: 2}]\n", "run.yaml")
    config = RunConfig.read(path)
    assert config.data.train == ["a.jsonl", {"from": "b.jsonl", "weight": 2}]
    assert RunConfig.read(path, {"data": {"max_length": 9}}).data.train == config.data.train
    misspelled = {"model": "m", "data": {"train": [{"from": "a", "weigth": 1}]}}
    assert "unknown key 'weigth'" in refusal(RunConfig.read, misspelled).message
