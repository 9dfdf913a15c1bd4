"""Every row is accounted for: used, unrolled, split, truncated, dropped or skipped. Lost labels are counted."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from deltaw.data.bad_rows import BadRowError
from deltaw.data.row_reader import RunData
from deltaw.data.stored_rows import TextReader
from deltaw.settings.data import DataSettings
from tests.data.chat_templates import tokenizer_of
from tests.data.conftest import accounted, refusal

Write = Callable[..., str]


def messages(*contents: str, **more: object) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": c} for n, c in enumerate(contents)], **more}


def prepared(path: str, family: str, seed: int = 0, **settings: object) -> RunData:
    config = DataSettings(path, **{"eval": None, **settings})  # type: ignore[arg-type]
    return TextReader(config, tokenizer_of(family)).prepare(seed)


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


def test_bad_rows_raise_or_are_skipped_and_counted_by_reason(write: Write) -> None:
    path = write(BAD)
    error = refusal(TextReader(DataSettings(path), tokenizer_of("gemma2")).prepare)
    assert isinstance(error, BadRowError) and "'user' cannot follow 'user'" in error.message
    assert error.location == f"{path}, row 3 (line 3), turn 2"
    data = prepared(path, "gemma2", bad_rows="skip")
    assert [example.row for example in data.train] == [1, 2, 8]
    reasons = ["turns out of order", "a value of the wrong type", "'messages' is empty (null)"]
    reasons += ["a weight other than 0 and 1", "refused by the chat template"]
    assert data.report.bad_rows == dict.fromkeys(reasons, 1) and accounted(data.report) == data.report.rows_read == 8
    listed = {str(line["where"]): line for line in data.skipped.lines()}
    assert set(listed) == {f"{path}, row {n}" for n in ("3, turn 2", 4, 5, "6, turn 2", 7)}
    assert listed[f"{path}, row 4"]["row"] == {"messages": "no list"}
    assert f"5 rows skipped: {', '.join(data.report.bad_rows)}" in data.report.lines()
    json.dumps(data.report.as_dict())
    # Bad rows of an evaluation file are skipped too. An empty result is still an error.
    with_eval = prepared(write(BAD[:2], "train.jsonl"), "gemma2", bad_rows="skip", eval=path)
    assert with_eval.report.evaluation is not None and with_eval.report.skipped == 0
    assert with_eval.report.evaluation.skipped == 5 == len(with_eval.skipped)
    assert "no usable rows" in refusal(prepared, write(BAD[2:6]), "gemma2", bad_rows="skip").message


def thoughts(number: int, turns: int) -> dict[str, object]:
    """Return a conversation whose earlier thoughts Qwen 3's template omits."""
    contents = []
    for turn in range(turns):
        contents += [f"question {number}-{turn}", f"<think>\nhm {turn}\n</think>\n\nanswer {number}-{turn}"]
    return messages(*contents)


def test_rewritten_turns_become_several_examples_of_one_row(write: Write) -> None:
    data = prepared(write([thoughts(1, 3), thoughts(2, 1), thoughts(3, 2)]), "qwen3")
    assert [example.row for example in data.train] == [1, 1, 1, 2, 3, 3]
    report = data.report
    assert (report.rows_read, report.rows_kept, report.unrolled, report.unrolled_examples) == (3, 6, 2, 5)
    assert accounted(report) == 3
    assert "2 rows became 5 examples, since the template rewrites earlier turns" in "\n".join(report.lines())
    answers = [example.answer for example in data.train][:3]
    assert answers == [f"<think>\nhm {turn}\n</think>\n\nanswer 1-{turn}" for turn in range(3)]


@pytest.mark.parametrize("kind", ["rewritten", "divided"])
def test_examples_of_one_row_are_on_one_side_of_the_split(kind: str, write: Write) -> None:
    if kind == "rewritten":
        rows = [thoughts(number, 1 + number % 4) for number in range(40)]
        family = "qwen3"
        settings = {}
    else:
        rows = [{"text": f"{number} " + "abcdefghij" * (number % 5)} for number in range(40)]
        family = "base"
        settings = {"max_length": 16, "long_rows": "split"}
    path = write(rows)
    for seed in range(3):
        data = prepared(path, family, seed, eval=0.3, **settings)
        train, held_out = ({example.row for example in side} for side in (data.train, data.held_out))
        assert train and held_out and not train & held_out and accounted(data.report) == 40


def test_truncated_and_dropped_rows_are_counted_with_lost_labels(write: Write) -> None:
    texts = (("a", "b" * 9), ("a" * 9, "b"), ("a", "b"))
    path = write([{"prompt": prompt, "completion": completion} for prompt, completion in texts])
    limits = {"max_length": 6, "template": "plain"}
    cut, dropped, split = (prepared(path, "base", long_rows=w, **limits).report for w in ("cut", "drop", "split"))
    reference = TextReader(DataSettings("x", template="plain"), tokenizer_of("base")).file(path)[1]
    assert (cut.cut, cut.tokens_cut, cut.labels_cut, cut.without_label) == (1, 5, 5 + 2, 1)
    assert (dropped.dropped_long, dropped.labels_dropped) == (2, 10 + 2)
    assert split.label_tokens == reference.label_tokens
    assert (split.split, split.split_examples) == (2, split.rows_kept - 1)
    assert (split.labels_cut, split.labels_dropped, split.longest) == (0, 0, 6)
    for report, message in (
        (cut, "1 row truncated to data.max_length: 5 tokens lost, 7 of them labels"),
        (dropped, "2 rows dropped: longer than data.max_length (12 labels lost)"),
        (split, f"2 rows longer than data.max_length became {split.split_examples} examples"),
    ):
        assert accounted(report) == 3 and message in "\n".join(report.lines())


def test_long_rewritten_turns_are_dropped_individually(write: Write) -> None:
    row = messages("question", "short", "question", "long " * 30)
    data = prepared(write([row]), "qwen3", max_length=120, long_rows="drop")
    report = data.report
    assert (report.unrolled_examples, report.dropped_long, accounted(report)) == (2, 1, 1)
    assert report.labels_dropped > 100 and [len(example) <= 120 for example in data.train] == [True]
