"""Every row is accounted for: used, unrolled, divided, truncated, dropped or skipped, and labels lost."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from deltaw.data import DataSettings, Report, prepare, prepare_file
from deltaw.data.report import BadRowError
from deltaw.errors import UserError
from tests.data.chat_templates import tokenizer_of

Write = Callable[..., str]


def accounted(report: Report) -> int:
    """What ``rows_read`` must be."""
    drawn = report.held_out if report.held_out_source is None else 0
    duplicates = 0 if report.duplicates_kept else report.duplicates
    used = report.rows_kept + drawn + duplicates + report.not_chosen + report.other_classes
    return used + report.skipped + report.dropped_long + report.without_label - report.added


def messages(*contents: str, **more: object) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": c} for n, c in enumerate(contents)], **more}


BAD = [
    messages("a", "b"),
    messages("a", "b", "c", "d"),
    {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
    {"messages": "no list"},
    {"messages": None},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]},
    {"messages": [{"role": "system", "content": "s"}, *messages("a", "b")["messages"]]},  # type: ignore[misc]
    messages("e", "f"),
]


def test_the_first_row_that_cannot_be_used_is_an_error(write: Write) -> None:
    with pytest.raises(BadRowError, match="'user' cannot follow 'user'") as refused:
        prepare(DataSettings(write(BAD)), tokenizer_of("gemma2"))
    assert str(refused.value.where).endswith("row 3, turn 2")


def test_rows_that_cannot_be_used_are_skipped_listed_and_counted_by_reason(write: Write) -> None:
    path = write(BAD)
    prepared = prepare(DataSettings(path, bad_rows="skip", eval=None), tokenizer_of("gemma2"))
    assert [example.row for example in prepared.train] == [1, 2, 8]
    assert prepared.report.bad_rows == {
        "turns out of order": 1,
        "a value of the wrong type": 1,
        "'messages' is empty (null)": 1,
        "a weight other than 0 and 1": 1,
        "refused by the chat template": 1,
    }
    assert accounted(prepared.report) == prepared.report.rows_read == 8
    listed = {str(line["where"]): line for line in prepared.skipped.lines()}
    assert set(listed) == {f"{path}, row {n}" for n in (4, 5, 7)} | {f"{path}, row 3, turn 2", f"{path}, row 6, turn 2"}
    assert listed[f"{path}, row 4"]["row"] == {"messages": "no list"}
    said = "\n".join(prepared.report.lines())
    assert "1 row skipped: turns out of order" in said
    json.dumps(prepared.report.as_dict())


def test_no_row_left_is_an_error_even_if_bad_rows_are_skipped(write: Write) -> None:
    with pytest.raises(UserError, match="no row is left"):
        prepare(DataSettings(write(BAD[2:6]), bad_rows="skip"), tokenizer_of("gemma2"))


def test_bad_rows_of_an_evaluation_file_are_skipped_too(write: Write) -> None:
    train, apart = write(BAD[:2]), write(BAD, "test.jsonl")
    prepared = prepare(DataSettings(train, bad_rows="skip", eval=apart), tokenizer_of("gemma2"))
    assert prepared.report.evaluation is not None
    assert prepared.report.evaluation.skipped == 5 == len(prepared.skipped)
    assert prepared.report.skipped == 0


# Unrolled rows


def thoughts(number: int, turns: int) -> dict[str, object]:
    """A conversation of so many turns, which Qwen 3's template renders without its earlier thoughts."""
    contents = []
    for turn in range(turns):
        contents += [f"question {number}-{turn}", f"<think>\nhm {turn}\n</think>\n\nanswer {number}-{turn}"]
    return messages(*contents)


def test_rows_whose_turns_are_rewritten_become_several_examples_of_one_row(write: Write) -> None:
    rows = [thoughts(1, 3), thoughts(2, 1), thoughts(3, 2)]
    prepared = prepare(DataSettings(write(rows), eval=None), tokenizer_of("qwen3"))
    assert [example.row for example in prepared.train] == [1, 1, 1, 2, 3, 3]
    report = prepared.report
    assert (report.rows_read, report.rows_kept, report.unrolled, report.unrolled_examples) == (3, 6, 2, 5)
    assert accounted(report) == 3
    assert "2 rows became 5 examples, since the template rewrites earlier turns" in "\n".join(report.lines())
    assert [example.answer for example in prepared.train][:3] == [
        f"<think>\nhm {turn}\n</think>\n\nanswer 1-{turn}" for turn in range(3)
    ]


@pytest.mark.parametrize("kind", ["rewritten", "divided"])
def test_examples_of_one_row_are_never_on_both_sides_of_the_split(kind: str, write: Write) -> None:
    if kind == "rewritten":
        rows, family, settings = [thoughts(number, 1 + number % 4) for number in range(40)], "qwen3", {}
    else:
        rows = [{"text": f"{number} " + "abcdefghij" * (number % 5)} for number in range(40)]
        family, settings = "base", {"max_length": 16, "long_rows": "split"}
    path = write(rows)
    for seed in range(4):
        chosen = DataSettings(path, eval=0.3, **settings)  # type: ignore[arg-type]
        prepared = prepare(chosen, tokenizer_of(family), seed=seed)
        train, held_out = ({example.row for example in side} for side in (prepared.train, prepared.held_out))
        assert train and held_out and not train & held_out
        assert accounted(prepared.report) == 40


def test_weights_choose_the_turns_that_are_trained(write: Write) -> None:
    row = messages("a", "b", "c", "d", "e", "f")
    turns = row["messages"]
    assert isinstance(turns, list)
    turns[1]["weight"], turns[5]["weight"] = 0, 0
    tokenizer = tokenizer_of("chatml")
    (example,) = prepare(DataSettings(write([row]), eval=None), tokenizer).train
    assert tokenizer.decode(example.tokens[example.is_label]) == "d<|im_end|>"
    # Nothing is learned from what follows the last label, so it is not computed.
    assert tokenizer.decode(example.tokens).endswith("assistant\nd<|im_end|>")
    assert example.answer == "d"


# Long rows


def test_truncated_and_dropped_rows_are_counted_with_the_labels_they_lose(write: Write) -> None:
    rows = [
        {"prompt": "a", "completion": "b" * 9},
        {"prompt": "a" * 9, "completion": "b"},
        {"prompt": "a", "completion": "b"},
    ]
    settings = {"train": write(rows), "max_length": 6, "template": "plain", "eval": None}
    tokenizer = tokenizer_of("base")
    cut = prepare(DataSettings(**settings, long_rows="cut"), tokenizer).report  # type: ignore[arg-type]
    assert (cut.cut, cut.tokens_cut, cut.labels_cut, cut.without_label) == (1, 5, 5 + 2, 1)
    assert "1 row truncated to data.max_length: 5 tokens lost, 7 of them labels" in "\n".join(cut.lines())
    dropped = prepare(DataSettings(**settings, long_rows="drop"), tokenizer).report  # type: ignore[arg-type]
    assert (dropped.dropped_long, dropped.labels_dropped) == (2, 10 + 2)
    assert "2 rows dropped: longer than data.max_length (12 labels lost)" in "\n".join(dropped.lines())
    split = prepare(DataSettings(**settings, long_rows="split"), tokenizer)  # type: ignore[arg-type]
    report = split.report
    whole = prepare_file(str(settings["train"]), DataSettings("x", template="plain"), tokenizer)[1]
    assert report.label_tokens == whole.label_tokens
    assert (report.split, report.split_examples) == (2, report.rows_kept - 1)
    assert (report.labels_cut, report.labels_dropped, report.longest) == (0, 0, 6)
    assert accounted(cut) == accounted(dropped) == accounted(report) == 3
    assert f"2 rows longer than data.max_length became {report.split_examples} examples" in "\n".join(report.lines())


def test_rewritten_turns_that_are_too_long_are_treated_one_by_one(write: Write) -> None:
    row = messages("question", "short", "question", "long " * 30)
    tokenizer = tokenizer_of("qwen3")
    settings = DataSettings(write([row]), max_length=120, long_rows="drop", eval=None)
    prepared = prepare(settings, tokenizer)
    assert len(prepared.train) == 1
    assert (prepared.report.unrolled_examples, prepared.report.dropped_long) == (2, 1)
    assert accounted(prepared.report) == 1
    assert prepared.report.labels_dropped > 100
    np.testing.assert_array_equal([len(example) <= 120 for example in prepared.train], True)
