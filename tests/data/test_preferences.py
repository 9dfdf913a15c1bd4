"""Rows with a chosen and a rejected answer: forms, checks, account, splits."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.data.example import RowGroup
from deltaw.data.preferences import PairReader
from deltaw.data.settings import DataSettings
from deltaw.settings import RunConfig
from deltaw.training.data_view import check_data, shown_rows
from tests.byte_models import byte_tokenizer
from tests.conftest import COLORS, write_rows
from tests.data.conftest import assistant, refusal, user

ASKED = "<|im_start|>user\npaint it<|im_end|>\n<|im_start|>assistant\n"
PLAIN = {"prompt": "paint it ", "chosen": "red", "rejected": "blue"}


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
    return [
        tuple(byte_tokenizer().decode(row.tokens[row.is_label == side]) for side in (False, True)) for row in pair.rows
    ]


@pytest.mark.parametrize(
    ("row", "template", "prompt"),
    [
        (PLAIN, "plain", "paint it "),
        ({"chosen": "paint it red", "rejected": "paint it blue"}, "plain", "paint it"),
        (CHAT, "auto", ASKED),
        ({**CHAT, "prompt": "paint it"}, "auto", ASKED),
        ({**CHAT, "chosen": "red", "rejected": "blue"}, "auto", ASKED),
        ({side: CHAT["prompt"] + CHAT[side] for side in ("chosen", "rejected")}, "auto", ASKED),
        ({"prompt": "paint it", "chosen": "red", "rejected": "blue"}, "auto", ASKED),
    ],
    ids=["plain", "no prompt", "messages", "text prompt", "text answers", "whole conversations", "text"],
)
def test_pairs_in_every_form(read, row, template, prompt):
    (pair,) = read([row], template=template).train
    space, end = (" " * (prompt == "paint it"), "<|endoftext|>" if template == "plain" else "<|im_end|>")
    assert texts(pair) == [(prompt, f"{space}{answer}{end}") for answer in ("red", "blue")]
    chosen, rejected = pair.rows
    assert isinstance(pair, RowGroup) and pair.row == 1
    assert (chosen.prompt_length, chosen.answer) == (rejected.prompt_length, space + "red")
    assert np.array_equal(chosen.tokens[: chosen.prompt_length], rejected.tokens[: chosen.prompt_length])


def test_a_conversation_of_several_turns_prefers_the_last_one_only(read):
    before = [user("hi"), assistant("hello"), user("paint it")]
    row = {"chosen": [*before, assistant("red")], "rejected": [*before, assistant("blue")]}
    (pair,) = read([row]).train
    assert [labels for _, labels in texts(pair)] == ["red<|im_end|>", "blue<|im_end|>"]


BAD = {
    "the same": {"prompt": "a", "chosen": "b", "rejected": [assistant("b")]},
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
    told = refusal(read, [PLAIN, BAD[what]])
    assert what in told.what and "pairs.jsonl, row 2" in told.where
    found = read([PLAIN, BAD[what]], bad_rows="skip")
    assert (found.report.rows_read, len(found.train), found.report.skipped, len(found.skipped)) == (2, 1, 1, 1)


def test_columns_may_have_other_names_and_are_missed_by_name(read):
    row = {"question": "paint it ", "good": "red", "bad": "blue", "more": 1}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    prepared = read([row], columns=columns, template="plain")
    assert texts(prepared.train[0]) == texts(read([PLAIN], template="plain").train[0])
    assert prepared.report.unused_columns == ("more",)
    told = refusal(read, [row])
    assert "need the column 'chosen'" in told.what and "data.columns" in told.hint


def test_a_shared_system_prompt_is_found_and_one_is_given_to_rows_that_have_none(read):
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(4)]
    shared = read([{**row, "system": "Be brief."} for row in rows], eval=None)
    assert (shared.report.system, shared.report.system_rows) == ("Be brief.", 4)
    given = read(rows, eval=None, system="Be brief.")
    assert given.report.system == "Be brief." and read(rows, eval=None).report.system is None
    for one, other in zip(given.train, shared.train, strict=True):
        assert [row.tokens.tolist() for row in one.rows] == [row.tokens.tolist() for row in other.rows]


def test_duplicates_empty_answers_and_long_rows_are_counted(read):
    long, empty = {"prompt": "paint it ", "chosen": "r" * 60, "rejected": "blue"}, {**PLAIN, "rejected": ""}
    rows = [PLAIN, PLAIN, long, empty]
    limited = {"template": "plain", "max_length": 40}
    found = read(rows, **limited, long_rows="drop")
    assert (found.report.duplicates, found.report.dropped_long) == (1, 1)
    assert len(found.train) == found.report.rows_kept == found.report.without_label == 1  # an answer is empty
    cut = read(rows, **limited, long_rows="cut")
    assert (cut.report.cut, cut.report.longest) == (1, 40)
    assert max(len(row) for pair in cut.train for row in pair.rows) == 40
    assert read([empty, PLAIN]).report.without_label == 1
    alike = {"prompt": "p", "chosen": "same" * 9 + "a", "rejected": "same" * 9 + "b"}
    assert read([alike, PLAIN], template="plain", max_length=20, long_rows="cut").report.without_label == 1
    told = refusal(read, rows, **limited)
    assert "1 row is longer than 40 tokens" in told.what and "row 3" in told.where and "split" not in told.hint
    assert "cannot be divided" in refusal(read, rows, long_rows="split").what
    assert "no usable rows" in refusal(read, [long], **limited, long_rows="drop").what


def test_pairs_of_one_prompt_are_on_one_side_of_the_split(read):
    rows = [{"prompt": f"paint {c} ", "chosen": f"yes {n}", "rejected": f"no {n}"} for c in COLORS for n in range(3)]
    prepared = read(rows, template="plain", eval=0.3)
    sides = [{texts(pair)[0][0] for pair in side} for side in (prepared.train, prepared.held_out)]
    assert len(prepared.held_out) == 9 and not sides[0] & sides[1]


def test_a_file_to_evaluate_on_keeps_duplicates(tmp_path):
    path = write_rows(tmp_path / "e.jsonl", [PLAIN, PLAIN])
    pairs, report = PairReader(DataSettings(train="x"), byte_tokenizer()).file(str(path))
    assert len(pairs) == 2 and report.duplicates == 1 and report.duplicates_kept


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
