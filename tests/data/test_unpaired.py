"""Rows with one answer each: forms, labels, what is refused, and which answer comes to which other prompt."""

from __future__ import annotations

import pytest

from deltaw.data import DataSettings
from deltaw.data.preferences import UnpairedReader
from deltaw.errors import UserError
from deltaw.settings import RunConfig
from deltaw.training.data_view import check_data, shown_rows
from tests.byte_models import byte_tokenizer
from tests.conftest import COLORS, write_rows

TOKENIZER = byte_tokenizer()


@pytest.fixture
def read(tmp_path):
    def prepare(rows, **settings):
        path = write_rows(tmp_path / "answers.jsonl", rows)
        given = {"eval": None, "template": "plain", **settings}
        return UnpairedReader(DataSettings(train=str(path), **given), TOKENIZER).prepared()

    return prepare


def parts(row):
    """Prompt and labels as text."""
    tokens = row.tokens.tolist()
    return tuple(
        TOKENIZER.decode([t for t, label in zip(tokens, row.is_label, strict=True) if label == side])
        for side in (False, True)
    )


def answer(prompt, completion, label=True):
    return {"prompt": prompt, "completion": completion, "label": label}


def test_each_answer_comes_with_another_rows_answer_to_its_prompt(read):
    rows = [answer(f"paint {c} ", c[::-1], n % 2 == 0) for n, c in enumerate(COLORS)]
    prepared = read(rows)
    assert [group.rows[0].desired for group in prepared.train] == [n % 2 == 0 for n in range(len(rows))]
    given = [parts(group.rows[0]) for group in prepared.train]
    mixed = [parts(group.rows[1]) for group in prepared.train]
    assert [prompt for prompt, _ in mixed] == [prompt for prompt, _ in given]
    assert sorted(text for _, text in mixed) == sorted(text for _, text in given)
    assert all(one != other for one, other in zip(given, mixed, strict=True))
    assert prepared.report.form == "unpaired answers" and prepared.report.rows_kept == len(rows)
    again = read(rows)
    assert [parts(group.rows[1]) for group in again.train] == mixed


def test_the_other_answer_is_to_another_prompt_where_there_is_one(read):
    rows = [answer(f"paint {c} ", f"{c}{n}") for c in COLORS[:4] for n in range(3)]
    rows += [answer("paint it ", f"x{n}") for n in range(5)]
    for group in read(rows).train:
        own, other = (parts(row) for row in group.rows)
        source = next(row for row in rows if other[1].startswith(row["completion"]))
        assert source["prompt"] != own[0]


def test_labels_are_truth_values_and_others_are_refused_with_their_row(read):
    rows = [answer("a ", "b"), answer("c ", "d", 0), answer("e ", "f", "True")]
    assert [group.rows[0].desired for group in read(rows).train] == [True, False, True]
    with pytest.raises(UserError, match="must be true or false") as told:
        read([*rows, answer("g ", "h", 2)])
    assert "4" in told.value.where
    with pytest.raises(UserError, match="'label' is empty"):
        read([*rows, answer("g ", "h", None)])
    with pytest.raises(UserError, match="unpaired answers need the column 'label'"):
        read([{"prompt": "a", "completion": "b"}])
    kept = read([*rows, answer("g ", "h", "maybe")], bad_rows="skip")
    assert len(kept.train) == 3 and kept.report.skipped == 1


def test_duplicates_splits_limits_and_single_rows(read):
    rows = [answer(f"paint {c} ", text, label) for c in COLORS for text, label in (("x", True), ("y", False))]
    prepared = read([*rows, rows[0]], eval=4)
    assert prepared.report.duplicates == 1 and len(prepared.held_out) == 4
    train = {parts(group.rows[0])[0] for group in prepared.train}
    assert not train & {parts(group.rows[0])[0] for group in prepared.held_out}
    cut = read([answer("a ", "b" * 40), answer("c ", "d")], long_rows="cut", max_length=20)
    assert max(len(row) for group in cut.train for row in group.rows) == 20 and cut.report.cut == 1
    with pytest.raises(UserError, match="a single row"):
        read([answer("a ", "b")])


def test_data_check_finds_contradictions_and_kinds_out_of_balance(tmp_path, model_folder):
    rows = [answer(f"paint {c} ", "x") for c in COLORS]
    rows += [answer(f"paint {COLORS[0]} ", "x", False), answer("paint it ", "y", False), rows[1]]
    path = write_rows(tmp_path / "answers.jsonl", rows)
    given = {
        "model": str(model_folder),
        "task": "preference",
        "preference": {"loss": "kto"},
        "data": {"train": str(path), "eval": None, "max_length": 1000},
        "output": str(tmp_path / "run"),
    }
    config = RunConfig.read(given)
    found = {finding.name: finding for finding in check_data(config).findings}
    assert found["contradictions"].count == 1 and found["duplicates"].count == 1
    assert "undesirable_weight: 5.5" in found["unbalanced"].hint
    shown = list(shown_rows(config, 11, 1))
    assert shown[0].notes == ("not desired",) and len(shown[0].examples) == 1
