"""From a file to examples: limits, duplicates, the split, and an account in which no row is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from deltaw.data import DataSettings, Example, Report, encode_prompt, prepare, prepare_file
from deltaw.errors import UserError
from tests.data.conftest import make_tokenizer

Write = Callable[..., str]
TOKENIZER = make_tokenizer()


def texts(*contents: str) -> list[dict[str, str]]:
    return [{"text": content} for content in contents]


def ids(examples: Iterable[Example]) -> list[tuple[int, bytes]]:
    return [(example.row, example.tokens.tobytes() + example.is_label.tobytes()) for example in examples]


def accounted(report: Report) -> int:
    drawn = report.held_out if report.held_out_source is None else 0
    left_out = 0 if report.duplicates_kept else report.duplicates
    return report.rows_kept + drawn + left_out + report.not_chosen + report.dropped_long + report.without_label


def refusal(**values: object) -> UserError:
    with pytest.raises(UserError) as refused:
        prepare(DataSettings(**values), TOKENIZER)  # type: ignore[arg-type]
    return refused.value


def test_an_example_has_tokens_labels_prompt_and_answer(write: Write) -> None:
    prepared = prepare(DataSettings(write([{"prompt": "hi", "completion": "yes"}])), TOKENIZER)
    (example,) = prepared.train
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    assert example.tokens.dtype == np.int32
    assert example.is_label.dtype == bool
    assert TOKENIZER.decode(example.tokens) == text
    assert TOKENIZER.decode(example.tokens[example.is_label]) == "yes<|im_end|>"
    assert TOKENIZER.decode(example.tokens[: example.prompt_length]) == text.removesuffix("yes<|im_end|>")
    assert (example.row, example.answer, len(example), example.label_count) == (1, "yes", example.tokens.size, 4)


# Long rows


def test_long_rows_are_refused_with_their_number_and_a_hint_that_works(write: Write) -> None:
    path = write(texts("abc", "a" * 20, "b" * 30))
    error = refusal(train=path, max_length=10)
    assert error.what == "2 rows are longer than 10 tokens; the first has 21"
    assert error.where == f"{path}, row 2"
    assert "data.max_length: 31" in str(error.hint)
    assert prepare(DataSettings(path, max_length=31), TOKENIZER).report.longest == 31


def test_data_without_a_label_are_refused(write: Write) -> None:
    rows = [{"prompt": "a" * 30, "completion": "b"}, {"prompt": "a", "completion": " "}]
    error = refusal(train=write(rows), max_length=10, long_rows="cut", template="plain")
    assert "no row is left" in error.what
    refusal(train=write(texts("", " ")))


# Duplicates and the split


def test_duplicates_are_left_out_and_counted(write: Write) -> None:
    path = write(texts("a1", "b1", "a1", "a1", "c1"))
    prepared = prepare(DataSettings(path, eval=None), TOKENIZER)
    assert [example.row for example in prepared.train] == [1, 2, 5]
    assert prepared.report.duplicates == 2
    kept = prepare(DataSettings(path, eval=None, duplicates="keep"), TOKENIZER)
    assert [example.row for example in kept.train] == [1, 2, 3, 4, 5]
    assert (kept.report.duplicates, accounted(kept.report)) == (2, 5)


def test_rows_of_the_same_tokens_and_other_labels_are_no_duplicates(write: Write) -> None:
    rows = [{"prompt": "a", "completion": "bc"}, {"prompt": "ab", "completion": "c"}]
    report = prepare(DataSettings(write(rows), template="plain", eval=None), TOKENIZER).report
    assert (report.rows_kept, report.duplicates) == (2, 0)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text(alphabet="abc", min_size=1, max_size=3), min_size=2, max_size=30),
    st.floats(0.01, 0.99),
    st.integers(0, 2**40),
    st.sampled_from(["drop", "keep"]),
)
def test_held_out_rows_are_never_trained_on_and_every_row_is_accounted_for(
    tmp_path_factory, contents, share, seed, duplicates
):
    path = tmp_path_factory.mktemp("split") / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts(*contents)))
    chosen = DataSettings(str(path), eval=share, duplicates=duplicates)  # type: ignore[arg-type]
    prepared = prepare(chosen, TOKENIZER, seed=seed)
    train = {example.tokens.tobytes() for example in prepared.train}
    held_out = {example.tokens.tobytes() for example in prepared.held_out}
    distinct = len(set(contents))
    assert not train & held_out
    assert len(train) + len(held_out) == distinct
    assert len(train) >= 1
    assert len(held_out) == min(max(1, round(share * distinct)), distinct - 1)
    assert accounted(prepared.report) == prepared.report.rows_read == len(contents)
    if duplicates == "keep":
        assert len(prepared.train) + len(prepared.held_out) == len(contents)
    assert ids(prepare(chosen, TOKENIZER, seed=seed).held_out) == ids(prepared.held_out)


def test_the_seed_decides_what_is_held_out(write: Write) -> None:
    chosen = DataSettings(write(texts(*(f"row {i}" for i in range(60)))), eval=10.0)
    held_out = [[e.row for e in prepare(chosen, TOKENIZER, seed=seed).held_out] for seed in (0, 0, 1)]
    assert held_out[0] == held_out[1] != held_out[2]
    assert len(held_out[0]) == 10


def test_numbers_may_come_as_text(write: Write) -> None:
    path = write(texts(*(f"row {i}" for i in range(20))))
    assert len(prepare(DataSettings(path, eval="0.25"), TOKENIZER).held_out) == 5
    assert len(prepare(DataSettings(path, eval="3"), TOKENIZER).held_out) == 3
    assert len(prepare(DataSettings(path, eval=0), TOKENIZER).held_out) == 0


def test_more_held_out_rows_than_there_are_is_refused(write: Write) -> None:
    assert "asks for 3 rows, and there are 3 distinct" in refusal(train=write(texts("a1", "b1", "c1")), eval=3).what


def test_a_separate_evaluation_file_is_whole_and_its_overlap_is_said(write: Write) -> None:
    train = write(texts("a1", "b1", "c1", "c1"))
    apart = write(texts("b1", "z1", "b1"), "test.jsonl")
    prepared = prepare(DataSettings(train, eval=apart, rows=3), TOKENIZER)
    assert [example.row for example in prepared.held_out] == [1, 2, 3]
    full = prepare(DataSettings(train, eval=apart), TOKENIZER).report
    assert (full.rows_kept, full.held_out, full.overlap, full.held_out_source) == (3, 3, 2, apart)
    assert accounted(full) == 4
    assert full.evaluation is not None
    assert (full.evaluation.duplicates, full.evaluation.rows_kept) == (1, 3)
    assert any("also training rows" in line for line in full.lines())


def test_only_so_many_rows_are_used_as_asked(write: Write) -> None:
    path = write(texts(*(f"row {i}" for i in range(50))))
    prepared = prepare(DataSettings(path, rows=10, eval=None), TOKENIZER)
    numbers = [example.row for example in prepared.train]
    assert len(numbers) == 10
    assert numbers == sorted(numbers)
    assert prepared.report.not_chosen == 40
    other = prepare(DataSettings(path, rows=10, eval=None), TOKENIZER, seed=1)
    assert [example.row for example in other.train] != numbers
    assert prepare(DataSettings(path, rows=99, eval=None), TOKENIZER).report.not_chosen == 0


def test_one_file_is_prepared_as_evaluation_data(write: Write) -> None:
    path = write(texts("a1", "a1", "bcd"))
    examples, report = prepare_file(path, DataSettings("elsewhere.jsonl", rows=1), TOKENIZER)
    assert [example.row for example in examples] == [1, 2, 3]
    assert (report.rows_kept, report.duplicates, report.tokens, report.longest) == (3, 1, 10, 4)
    assert report.label_tokens == 7


# The account


def test_the_report_counts_what_the_examples_hold(write: Write) -> None:
    rows: list[dict[str, object]] = [{"prompt": f"p{i}", "completion": "c" * i, "id": i} for i in range(1, 30)]
    prepared = prepare(DataSettings(write(rows), eval=4), TOKENIZER)
    report = prepared.report
    assert report.tokens == sum(len(example) for example in prepared.train)
    assert report.label_tokens == sum(int(example.is_label.sum()) for example in prepared.train)
    assert report.longest == max(len(example) for example in [*prepared.train, *prepared.held_out])
    assert (report.rows_read, report.rows_kept, report.held_out) == (29, 25, 4)
    assert (report.form, report.template, report.unused_columns) == ("prompt-completion", "chat", ("id",))
    assert json.loads(json.dumps(report.as_dict()))["rows_kept"] == 25


def test_a_person_reads_totals_and_only_the_losses_there_are(write: Write) -> None:
    clean = "\n".join(prepare(DataSettings(write(texts("abc", "bcd")), eval=None), TOKENIZER).report.lines())
    assert "2 rows kept" in clean
    assert not any(word in clean for word in ("cut", "same as", "left out", "held out", "columns"))
    lossy = prepare(
        DataSettings(write(texts("a1", "a1", "b" * 20)), max_length=9, long_rows="cut", eval=None), TOKENIZER
    )
    said = "\n".join(lossy.report.lines())
    assert "1 row dropped: the same as an earlier row" in said
    assert "1 row truncated to data.max_length: 12 tokens lost" in said


def test_turns_that_no_assistant_answers_are_said(write: Write) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": messages}, {"messages": [*messages, {"role": "user", "content": "c"}]}]
    report = prepare(DataSettings(write(rows), eval=None), TOKENIZER).report
    assert (report.trailing_turns, report.duplicates) == (1, 1)
    assert any("after the assistant's last turn" in line for line in report.lines())


# Prompts


@pytest.mark.parametrize("prompt", ["hi", [{"role": "user", "content": "hi"}]])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, make_tokenizer(None, bos=True)])
def test_a_prompt_is_rendered_as_in_training(prompt: object, tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    (example,) = prepare(DataSettings(write([{"prompt": prompt, "completion": "yes"}])), tokenizer).train
    encoded = encode_prompt(prompt, DataSettings("x"), tokenizer)  # type: ignore[arg-type]
    assert encoded.dtype == np.int32
    np.testing.assert_array_equal(encoded, example.tokens[: example.prompt_length])


def test_text_runs_are_prompted_with_bare_text() -> None:
    encoded = encode_prompt("once", DataSettings("x", form="text"), TOKENIZER)
    assert TOKENIZER.decode(encoded) == "once"


def test_a_prompt_that_asks_nothing_is_refused() -> None:
    with pytest.raises(UserError):
        encode_prompt([{"role": "assistant", "content": "hi"}], "chat", TOKENIZER)


# Settings


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_length": 1}, "data.max_length is 1"),
        ({"rows": 0}, "data.rows is 0"),
        ({"max_row_bytes": 0}, "data.max_row_bytes is 0"),
        ({"eval": -1}, "data.eval is -1"),
        ({"eval": 1.5}, "data.eval is 1.5"),
        ({"eval": float("nan")}, "data.eval is nan"),
        ({"columns": {"promt": "a"}}, "deltaw reads no column 'promt'"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        DataSettings("x", **values)  # type: ignore[arg-type]


def test_settings_are_read_from_yaml_values_and_refuse_keys_they_do_not_know() -> None:
    adapter = pydantic.TypeAdapter(DataSettings)
    assert adapter.validate_python({"train": "x", "eval": 200}).eval == 200
    assert adapter.validate_python({"train": "x", "eval": None}).eval is None
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python({"train": "x", "max_lenght": 3})
    described = adapter.json_schema()["properties"]
    assert all(part["description"] for part in described.values())


def test_a_chat_template_without_a_template_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        prepare(DataSettings(str(tmp_path / "missing.jsonl"), template="chat"), make_tokenizer(None))
