"""Rows with a chosen and a rejected answer: forms, checks, account, splits."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.data.example import RowGroup
from deltaw.data.preferences import PairReader, records_of
from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from deltaw.settings import RunConfig
from deltaw.training.data_view import check_data, shown_rows
from tests.byte_models import byte_tokenizer
from tests.conftest import COLORS, write_rows

PLAIN = {"prompt": "paint it ", "chosen": "red", "rejected": "blue"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CHAT = {"prompt": [user("paint it")], "chosen": [assistant("red")], "rejected": [assistant("blue")]}


@pytest.fixture
def read(tmp_path):
    def make(rows, **settings):
        path = write_rows(tmp_path / "pairs.jsonl", rows)
        given = {"eval": None, **settings}
        return PairReader(DataSettings(train=str(path), **given), byte_tokenizer()).prepared()

    return make


def texts(pair):
    """(prompt, labels) of both answers."""
    tokenizer = byte_tokenizer()
    return [
        (tokenizer.decode(row.tokens[~row.is_label]), tokenizer.decode(row.tokens[row.is_label])) for row in pair.rows
    ]


@pytest.mark.parametrize(
    "row", [PLAIN, {"chosen": "paint it red", "rejected": "paint it blue"}], ids=["prompt", "no prompt"]
)
def test_plain_text_with_and_without_a_prompt(read, row):
    (pair,) = read([row], template="plain").train
    prompt = "paint it " if "prompt" in row else "paint it"
    words = [row["chosen"], row["rejected"]] if "prompt" in row else [" red", " blue"]
    assert texts(pair) == [(prompt, word + "<|endoftext|>") for word in words]
    assert isinstance(pair, RowGroup) and pair.row == 1


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {**CHAT, "prompt": "paint it"},
        {**CHAT, "chosen": "red", "rejected": "blue"},
        {"chosen": CHAT["prompt"] + CHAT["chosen"], "rejected": CHAT["prompt"] + CHAT["rejected"]},
        {"prompt": "paint it", "chosen": "red", "rejected": "blue"},
    ],
    ids=["messages", "text prompt", "text answers", "whole conversations", "text"],
)
def test_conversations_in_every_form_are_the_same_pair(read, row):
    (pair,) = read([row]).train
    prompt = "<|im_start|>user\npaint it<|im_end|>\n<|im_start|>assistant\n"
    assert texts(pair) == [(prompt, "red<|im_end|>"), (prompt, "blue<|im_end|>")]
    chosen, rejected = pair.rows
    assert chosen.prompt_length == rejected.prompt_length and chosen.answer == "red"
    assert np.array_equal(chosen.tokens[: chosen.prompt_length], rejected.tokens[: chosen.prompt_length])


def test_a_conversation_of_several_turns_prefers_the_last_one_only(read):
    before = [user("hi"), assistant("hello"), user("paint it")]
    row = {"chosen": [*before, assistant("red")], "rejected": [*before, assistant("blue")]}
    (pair,) = read([row]).train
    assert [labels for _, labels in texts(pair)] == ["red<|im_end|>", "blue<|im_end|>"]


BAD = {
    "'rejected' is missing": {"prompt": "a", "chosen": "b"},
    "'chosen' is empty": {"prompt": "a", "chosen": None, "rejected": "b"},
    "are the same": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "nothing in common": {"chosen": "red", "rejected": "blue"},
    "both be text": {"chosen": "red", "rejected": [assistant("blue")]},
    "must be": {"prompt": "a", "chosen": 1, "rejected": 2},
    "out of order": {"prompt": [user("a"), user("b")], "chosen": "c", "rejected": "d"},
}


@pytest.mark.parametrize("what", list(BAD))
def test_a_bad_row_is_named_or_skipped_with_its_reason(read, what):
    with pytest.raises(UserError, match=what) as told:
        read([PLAIN, BAD[what]])
    assert "pairs.jsonl, row 2" in told.value.where
    prepared = read([PLAIN, BAD[what]], bad_rows="skip")
    assert len(prepared.train) == 1 and prepared.report.skipped == 1
    assert prepared.report.rows_read == 2 and len(prepared.skipped) == 1


def test_answers_that_render_alike_are_the_same(read):
    with pytest.raises(UserError, match="are the same"):
        read([{"prompt": "a", "chosen": "b", "rejected": [assistant("b")]}])


def test_columns_may_have_other_names_and_are_missed_by_name(read):
    row = {"question": "paint it ", "good": "red", "bad": "blue", "more": 1}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    prepared = read([row], columns=columns, template="plain")
    assert texts(prepared.train[0]) == texts(read([PLAIN], template="plain").train[0])
    assert prepared.report.unused_columns == ("more",)
    with pytest.raises(UserError, match="need the column 'chosen'") as told:
        read([row])
    assert "data.columns" in told.value.hint


def test_duplicates_empty_answers_and_long_rows_are_counted(read):
    long = {"prompt": "paint it ", "chosen": "r" * 60, "rejected": "blue"}
    rows = [PLAIN, PLAIN, long, {**PLAIN, "rejected": ""}]
    prepared = read(rows, template="plain", max_length=40, long_rows="drop")
    report = prepared.report
    assert (report.duplicates, report.dropped_long) == (1, 1)
    assert len(prepared.train) == report.rows_kept == report.without_label == 1  # an answer is empty
    cut = read(rows, template="plain", max_length=40, long_rows="cut")
    assert cut.report.cut == 1 and cut.report.longest == 40
    assert max(len(row) for pair in cut.train for row in pair.rows) == 40
    assert read([{**PLAIN, "rejected": ""}, PLAIN]).report.without_label == 1
    alike = {"prompt": "p", "chosen": "same" * 9 + "a", "rejected": "same" * 9 + "b"}
    assert read([alike, PLAIN], template="plain", max_length=20, long_rows="cut").report.without_label == 1
    with pytest.raises(UserError, match="1 row is longer than 40 tokens") as told:
        read(rows, template="plain", max_length=40)
    assert "row 3" in told.value.where and "split" not in told.value.hint
    with pytest.raises(UserError, match="cannot be divided"):
        read(rows, long_rows="split")
    with pytest.raises(UserError, match="no row is left"):
        read([long], template="plain", max_length=40, long_rows="drop")


def test_pairs_of_one_prompt_are_on_one_side_of_the_split(read):
    rows = [{"prompt": f"paint {c} ", "chosen": f"yes {n}", "rejected": f"no {n}"} for c in COLORS for n in range(3)]
    prepared = read(rows, template="plain", eval=0.3)
    sides = [{texts(pair)[0][0] for pair in side} for side in (prepared.train, prepared.held_out)]
    assert len(prepared.held_out) == 9 and not sides[0] & sides[1]


def test_a_file_to_evaluate_on_keeps_duplicates(tmp_path):
    path = write_rows(tmp_path / "e.jsonl", [PLAIN, PLAIN])
    pairs, report = PairReader(DataSettings(train="x"), byte_tokenizer()).file(str(path))
    assert len(pairs) == 2 and report.duplicates == 1 and report.duplicates_kept


def test_a_space_before_the_answers_belongs_to_them():
    chosen, rejected = records_of({"chosen": "it is red", "rejected": "it is blue"}, "here")
    assert (chosen.prompt, chosen.completion, rejected.completion) == ("it is", " red", " blue")


def test_the_data_check_and_single_rows_know_pairs(tmp_path, settings):
    rows = [{**PLAIN, "prompt": f"paint {n} "} for n in range(20)]
    turned = {**rows[0], "chosen": "blue", "rejected": "red"}
    longer = [{**row, "chosen": "r" * 9} for row in rows]
    path = write_rows(tmp_path / "p.jsonl", [*longer, rows[0], turned, longer[1], {"prompt": "x"}])
    config = settings(tmp_path / "run", task="preference", data={"train": str(path), "eval": None})
    found = {finding.name: finding for finding in check_data(RunConfig.read(config)).findings}
    assert found["bad_rows"].level == "error" and found["duplicates"].count == 1
    assert found["contradictions"].count == 2 and len(found["contradictions"].rows) == 2
    assert found["longer_chosen"].count == 22
    (row,) = shown_rows(RunConfig.read(config), 3, 1)
    assert row.row == 3 and len(row.examples) == 2 and "chosen" in row.notes[0]
    assert next(piece.text for piece in row.examples[1].pieces if piece.label) == "blue"
