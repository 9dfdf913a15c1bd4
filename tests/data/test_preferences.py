"""Rows with a chosen and a rejected answer: formats, validation, accounting and splits."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.data.example import RowGroup
from deltaw.runs.data_checks import check_data, preview_rows
from deltaw.settings.config import RunConfig
from deltaw.settings.data import DataSettings
from deltaw.tasks.preference.rows import PairReader
from tests.byte_models import byte_tokenizer
from tests.conftest import COLORS, write_rows
from tests.data.conftest import assistant, refusal, user

PROMPT = "<|im_start|>user\npaint it<|im_end|>\n<|im_start|>assistant\n"
PLAIN = {"prompt": "paint it ", "chosen": "red", "rejected": "blue"}


CHAT = {"prompt": [user("paint it")], "chosen": [assistant("red")], "rejected": [assistant("blue")]}


@pytest.fixture
def read(tmp_path):
    def make(rows, **settings):
        path = write_rows(tmp_path / "pairs.jsonl", rows)
        options = {"eval": None, **settings}
        return PairReader(DataSettings(train=str(path), **options), byte_tokenizer()).prepare()

    return make


def texts(pair):
    """Return (prompt, labels) of both answers."""
    return [tuple(byte_tokenizer().decode(row.tokens[row.is_label == s]) for s in (False, True)) for row in pair.rows]


@pytest.mark.parametrize(
    ("row", "template", "prompt"),
    [
        (PLAIN, "plain", "paint it "),
        ({"chosen": "paint it red", "rejected": "paint it blue"}, "plain", "paint it"),
        (CHAT, "auto", PROMPT),
        ({**CHAT, "prompt": "paint it"}, "auto", PROMPT),
        ({**CHAT, "chosen": "red", "rejected": "blue"}, "auto", PROMPT),
        ({side: CHAT["prompt"] + CHAT[side] for side in ("chosen", "rejected")}, "auto", PROMPT),
        ({"prompt": "paint it", "chosen": "red", "rejected": "blue"}, "auto", PROMPT),
    ],
    ids=["plain", "no prompt", "messages", "text prompt", "text answers", "whole conversations", "text"],
)
def test_pairs_are_read_in_every_format(read, row, template, prompt):
    (pair,) = read([row], template=template).train
    space = " " * (prompt == "paint it")
    end = "<|endoftext|>" if template == "plain" else "<|im_end|>"
    assert texts(pair) == [(prompt, f"{space}{answer}{end}") for answer in ("red", "blue")]
    chosen, rejected = pair.rows
    assert isinstance(pair, RowGroup) and pair.row == 1
    assert (chosen.prompt_length, chosen.answer) == (rejected.prompt_length, space + "red")
    assert np.array_equal(chosen.tokens[: chosen.prompt_length], rejected.tokens[: chosen.prompt_length])


def test_only_the_last_turn_of_a_conversation_is_labeled(read):
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


@pytest.mark.parametrize("message", list(BAD))
def test_bad_row_is_rejected_or_skipped_with_its_reason(read, message):
    error = refusal(read, [PLAIN, BAD[message]])
    assert message in error.message and "pairs.jsonl, row 2" in error.location
    data = read([PLAIN, BAD[message]], bad_rows="skip")
    assert (data.report.rows_read, len(data.train), data.report.skipped, len(data.skipped)) == (2, 1, 1, 1)


def test_columns_can_be_mapped_and_missing_ones_are_reported(read):
    row = {"question": "paint it ", "good": "red", "bad": "blue", "more": 1}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    prepared = read([row], columns=columns, template="plain")
    assert texts(prepared.train[0]) == texts(read([PLAIN], template="plain").train[0])
    assert prepared.report.unused_columns == ("more",)
    error = refusal(read, [row])
    assert "need the column 'chosen'" in error.message and "data.columns" in error.hint


def test_system_prompt_is_detected_or_added(read):
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(4)]
    shared = read([{**row, "system": "Be brief."} for row in rows], eval=None)
    assert (shared.report.system, shared.report.system_rows) == ("Be brief.", 4)
    configured = read(rows, eval=None, system="Be brief.")
    assert configured.report.system == "Be brief." and read(rows, eval=None).report.system is None
    for pair, shared_pair in zip(configured.train, shared.train, strict=True):
        assert [row.tokens.tolist() for row in pair.rows] == [row.tokens.tolist() for row in shared_pair.rows]


def test_duplicates_empty_answers_and_long_rows_are_counted(read):
    long = {"prompt": "paint it ", "chosen": "r" * 60, "rejected": "blue"}
    empty = {**PLAIN, "rejected": ""}
    rows = [PLAIN, PLAIN, long, empty]
    limited = {"template": "plain", "max_length": 40}
    data = read(rows, **limited, long_rows="drop")
    assert (data.report.duplicates, data.report.dropped_long) == (1, 1)
    assert len(data.train) == data.report.rows_kept == data.report.without_label == 1  # an answer is empty
    cut = read(rows, **limited, long_rows="cut")
    assert (cut.report.cut, cut.report.longest) == (1, 40)
    assert max(len(row) for pair in cut.train for row in pair.rows) == 40
    assert read([empty, PLAIN]).report.without_label == 1
    nearly_equal = {"prompt": "p", "chosen": "same" * 9 + "a", "rejected": "same" * 9 + "b"}
    assert read([nearly_equal, PLAIN], template="plain", max_length=20, long_rows="cut").report.without_label == 1
    error = refusal(read, rows, **limited)
    assert "1 row is longer than 40 tokens" in error.message and "row 3" in error.location and "split" not in error.hint
    assert "cannot be divided" in refusal(read, rows, long_rows="split").message
    assert "no usable rows" in refusal(read, [long], **limited, long_rows="drop").message


def test_pairs_of_a_prompt_are_on_one_side_of_the_split(read):
    rows = [{"prompt": f"paint {c} ", "chosen": f"yes {n}", "rejected": f"no {n}"} for c in COLORS for n in range(3)]
    prepared = read(rows, template="plain", eval=0.3)
    sides = [{texts(pair)[0][0] for pair in side} for side in (prepared.train, prepared.held_out)]
    assert len(prepared.held_out) == 9 and not sides[0] & sides[1]


def test_evaluation_file_contains_duplicates(tmp_path):
    path = write_rows(tmp_path / "e.jsonl", [PLAIN, PLAIN])
    pairs, report = PairReader(DataSettings(train="x"), byte_tokenizer()).file(str(path))
    assert len(pairs) == 2 and report.duplicates == 1 and report.duplicates_kept


def test_data_check_and_preview_support_pairs(tmp_path, settings):
    rows = [{**PLAIN, "prompt": f"paint {n} "} for n in range(20)]
    swapped = {**rows[0], "chosen": "blue", "rejected": "red"}
    longer = [{**row, "chosen": "r" * 9} for row in rows]
    path = write_rows(tmp_path / "p.jsonl", [*longer, rows[0], swapped, longer[1], {"prompt": "x"}])
    config = settings(tmp_path / "run", task="preference", data={"train": str(path), "eval": None})
    findings = {finding.name: finding for finding in check_data(RunConfig.read(config)).findings}
    assert findings["bad_rows"].level == "error" and findings["duplicates"].count == 1
    assert findings["contradictions"].count == 2 and len(findings["contradictions"].rows) == 2
    assert findings["longer_chosen"].count == 22
    (row,) = preview_rows(RunConfig.read(config), 3, 1)
    assert row.row == 3 and len(row.examples) == 2 and "chosen" in row.notes[0]
    assert next(piece.text for piece in row.examples[1].spans if piece.label) == "blue"
