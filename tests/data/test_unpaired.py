"""Rows with one answer each: formats, labels, rejected rows, and mismatched answers."""

from __future__ import annotations

import pytest

from deltaw.runs.data_checks import check_data, preview_rows
from deltaw.settings.config import RunConfig
from deltaw.settings.data import DataSettings
from deltaw.tasks.preference.rows import UnpairedReader
from tests.byte_models import byte_tokenizer
from tests.conftest import COLORS, write_rows
from tests.data.conftest import refusal

TOKENIZER = byte_tokenizer()


@pytest.fixture
def read(tmp_path):
    def prepare(rows, **settings):
        path = write_rows(tmp_path / "answers.jsonl", rows)
        options = {"eval": None, "template": "plain", **settings}
        return UnpairedReader(DataSettings(train=str(path), **options), TOKENIZER).prepare()

    return prepare


def decode_parts(row):
    """Return prompt and labels as text."""
    return tuple(TOKENIZER.decode(row.tokens[row.is_label == side]) for side in (False, True))


def answer(prompt, completion, label=True):
    return {"prompt": prompt, "completion": completion, "label": label}


def test_each_row_has_a_mismatched_answer(read):
    rows = [answer(f"paint {c} ", c[::-1], n % 2 == 0) for n, c in enumerate(COLORS)]
    prepared = read(rows)
    assert [group.rows[0].desired for group in prepared.train] == [n % 2 == 0 for n in range(len(rows))]
    desired_pairs = [decode_parts(group.rows[0]) for group in prepared.train]
    mixed = [decode_parts(group.rows[1]) for group in prepared.train]
    assert [prompt for prompt, _ in mixed] == [prompt for prompt, _ in desired_pairs]
    assert sorted(text for _, text in mixed) == sorted(text for _, text in desired_pairs)
    assert all(pair != other for pair, other in zip(desired_pairs, mixed, strict=True))
    assert prepared.report.form == "unpaired answers" and prepared.report.rows_kept == len(rows)
    again = read(rows)
    assert [decode_parts(group.rows[1]) for group in again.train] == mixed


def test_mismatched_answer_belongs_to_another_prompt_if_possible(read):
    rows = [answer(f"paint {c} ", f"{c}{n}") for c in COLORS[:4] for n in range(3)]
    rows += [answer("paint it ", f"x{n}") for n in range(5)]
    for group in read(rows).train:
        matched, other = (decode_parts(row) for row in group.rows)
        source = next(row for row in rows if other[1].startswith(row["completion"]))
        assert source["prompt"] != matched[0]


def test_labels_must_be_boolean(read):
    rows = [answer("a ", "b"), answer("c ", "d", 0), answer("e ", "f", "True")]
    assert [group.rows[0].desired for group in read(rows).train] == [True, False, True]
    error = refusal(read, [*rows, answer("g ", "h", 2)])
    assert "must be true or false" in error.message and "4" in error.location
    assert "'label' is empty" in refusal(read, [*rows, answer("g ", "h", None)]).message
    assert "need the column 'label'" in refusal(read, [{"prompt": "a", "completion": "b"}]).message
    skipping = read([*rows, answer("g ", "h", "maybe")], bad_rows="skip")
    assert len(skipping.train) == 3 and skipping.report.skipped == 1


def test_duplicates_splits_limits_and_single_rows_are_handled(read):
    rows = [answer(f"paint {c} ", text, label) for c in COLORS for text, label in (("x", True), ("y", False))]
    prepared = read([*rows, rows[0]], eval=4)
    assert prepared.report.duplicates == 1 and len(prepared.held_out) == 4
    train = {decode_parts(group.rows[0])[0] for group in prepared.train}
    assert not train & {decode_parts(group.rows[0])[0] for group in prepared.held_out}
    cut = read([answer("a ", "b" * 40), answer("c ", "d")], long_rows="cut", max_length=20)
    assert max(len(row) for group in cut.train for row in group.rows) == 20 and cut.report.cut == 1
    assert "a single row" in refusal(read, [answer("a ", "b")]).message


def test_data_check_reports_contradictions_and_imbalance(tmp_path, settings):
    rows = [answer(f"paint {c} ", "x") for c in COLORS]
    rows += [answer(f"paint {COLORS[0]} ", "x", False), answer("paint it ", "y", False), rows[1]]
    data = {"train": str(write_rows(tmp_path / "answers.jsonl", rows)), "eval": None, "max_length": 1000}
    run_settings = settings(tmp_path / "run", task="preference", preference={"loss": "kto"}, data=data)
    config = RunConfig.read(run_settings)
    findings = {finding.name: finding for finding in check_data(config).findings}
    assert findings["contradictions"].count == 1 and findings["duplicates"].count == 1
    assert "undesirable_weight: 5.5" in findings["unbalanced"].hint
    previewed = list(preview_rows(config, 11, 1))
    assert previewed[0].notes == ("not desired",) and len(previewed[0].examples) == 1
