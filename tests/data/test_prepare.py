"""Preparation of examples from a file: limits, duplicates, splits, and complete row accounting."""

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

from deltaw.data.example import Example
from deltaw.data.prompt_tokens import encode_prompt
from deltaw.data.row_reader import RunData
from deltaw.data.stored_rows import TextReader
from deltaw.settings.data import DataSettings
from tests.conftest import write_rows
from tests.data.conftest import accounted, make_tokenizer, refusal

Write = Callable[..., str]
TOKENIZER = make_tokenizer()


def texts(*contents: str) -> list[dict[str, str]]:
    return [{"text": content} for content in contents]


def ids(examples: Iterable[Example]) -> list[tuple[int, bytes]]:
    return [(example.row, example.tokens.tobytes() + example.is_label.tobytes()) for example in examples]


def prepared(train: str, tokenizer: PreTrainedTokenizerFast = TOKENIZER, seed: int = 0, **values: object) -> RunData:
    """Return training rows, without a split unless ``eval`` is passed."""
    return TextReader(DataSettings(train, **{"eval": None, **values}), tokenizer).prepare(seed)  # type: ignore[arg-type]


def numbers(examples: Iterable[Example]) -> list[int]:
    return [example.row for example in examples]


def test_example_has_tokens_labels_prompt_and_answer(write: Write) -> None:
    (example,) = prepared(write([{"prompt": "hi", "completion": "yes"}])).train
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    assert (example.tokens.dtype, example.is_label.dtype) == (np.int32, bool)
    assert TOKENIZER.decode(example.tokens) == text
    assert TOKENIZER.decode(example.tokens[example.is_label]) == "yes<|im_end|>"
    assert TOKENIZER.decode(example.tokens[: example.prompt_length]) == text.removesuffix("yes<|im_end|>")
    assert (example.row, example.answer, len(example), example.label_count) == (1, "yes", example.tokens.size, 4)


def test_long_rows_are_rejected_with_a_working_hint(write: Write) -> None:
    path = write(texts("abc", "a" * 20, "b" * 30))
    error = refusal(prepared, path, max_length=10)
    assert error.message == "2 rows are longer than 10 tokens; the first has 21"
    assert error.location == f"{path}, row 2 (line 2)" and "data.max_length: 31" in str(error.hint)
    assert prepared(path, max_length=31).report.longest == 31


def test_unlabeled_data_and_oversized_splits_are_rejected(write: Write) -> None:
    rows = [{"prompt": "a" * 30, "completion": "b"}, {"prompt": "a", "completion": " "}]
    cut = {"max_length": 10, "long_rows": "cut", "template": "plain"}
    assert "no usable rows" in refusal(prepared, write(rows), **cut).message
    assert "no usable rows" in refusal(prepared, write(texts("", " "))).message
    message = refusal(prepared, write(texts("a1", "b1", "c1")), eval=3).message
    assert "requests 3 of 3 distinct rows" in message


# Duplicates and the split


def test_duplicates_are_dropped_and_counted(write: Write) -> None:
    path = write(texts("a1", "b1", "a1", "a1", "c1"))
    unique, full = (prepared(path, duplicates=mode) for mode in ("drop", "keep"))
    assert numbers(unique.train) == [1, 2, 5] and numbers(full.train) == [1, 2, 3, 4, 5]
    assert (unique.report.duplicates, full.report.duplicates, accounted(full.report)) == (2, 2, 5)
    # Rows with equal tokens and different labels are not duplicates.
    rows = [{"prompt": "a", "completion": "bc"}, {"prompt": "ab", "completion": "c"}]
    report = prepared(write(rows), template="plain").report
    assert (report.rows_kept, report.duplicates) == (2, 0)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text(alphabet="abc", min_size=1, max_size=3), min_size=2, max_size=30),
    st.floats(0.01, 0.99),
    st.integers(0, 2**40),
    st.sampled_from(["drop", "keep"]),
)
def test_evaluation_rows_are_disjoint_and_all_rows_are_counted(tmp_path_factory, contents, share, seed, duplicates):
    path = str(write_rows(tmp_path_factory.mktemp("split") / "d.jsonl", texts(*contents)))
    options = {"eval": share, "duplicates": duplicates, "seed": seed}
    data = prepared(path, **options)
    train, held_out = ({example.tokens.tobytes() for example in side} for side in (data.train, data.held_out))
    distinct = len(set(contents))
    assert train and not train & held_out and len(train) + len(held_out) == distinct
    assert len(held_out) == min(max(1, round(share * distinct)), distinct - 1)
    assert accounted(data.report) == data.report.rows_read == len(contents)
    if duplicates == "keep":
        assert len(data.train) + len(data.held_out) == len(contents)
    assert ids(prepared(path, **options).held_out) == ids(data.held_out)


def test_split_and_selection_depend_on_seed_and_settings(write: Write) -> None:
    path = write(texts(*(f"row {i}" for i in range(60))))
    held_out = [numbers(prepared(path, eval=10.0, seed=seed).held_out) for seed in (0, 0, 1)]
    assert held_out[0] == held_out[1] != held_out[2] and len(held_out[0]) == 10
    # Numbers can be text.
    assert [len(prepared(path, eval=value).held_out) for value in ("0.25", "3", 0)] == [15, 3, 0]
    data, other, all_of_them = (prepared(path, rows=rows, seed=seed) for rows, seed in ((10, 0), (10, 1), (99, 0)))
    used = numbers(data.train)
    assert len(used) == 10 and used == sorted(used) != numbers(other.train)
    assert (data.report.not_selected, all_of_them.report.not_selected) == (50, 0)


def test_separate_evaluation_file_is_complete_and_overlap_is_reported(write: Write) -> None:
    train = write(texts("a1", "b1", "c1", "c1"))
    eval_file = write(texts("b1", "z1", "b1"), "test.jsonl")
    assert numbers(prepared(train, eval=eval_file, rows=3).held_out) == [1, 2, 3]
    full = prepared(train, eval=eval_file).report
    assert (full.rows_kept, full.held_out, full.overlap, full.held_out_source) == (3, 3, 2, eval_file)
    assert accounted(full) == 4 and full.evaluation is not None
    assert (full.evaluation.duplicates, full.evaluation.rows_kept) == (1, 3)
    assert any("also training rows" in line for line in full.lines())
    path = write(texts("a1", "a1", "bcd"))
    examples, report = TextReader(DataSettings("elsewhere.jsonl", rows=1), TOKENIZER).file(path)
    assert numbers(examples) == [1, 2, 3]
    assert (report.rows_kept, report.duplicates, report.tokens, report.longest) == (3, 1, 10, 4)
    assert report.label_tokens == 7


# The account


def test_report_counts_match_the_examples(write: Write) -> None:
    data = prepared(write([{"prompt": f"p{i}", "completion": "c" * i, "id": i} for i in range(1, 30)]), eval=4)
    report = data.report
    assert report.tokens == sum(len(example) for example in data.train)
    assert report.label_tokens == sum(int(example.is_label.sum()) for example in data.train)
    assert report.longest == max(len(example) for example in [*data.train, *data.held_out])
    assert (report.rows_read, report.rows_kept, report.held_out) == (29, 25, 4)
    assert (report.form, report.template, report.unused_columns) == ("prompt-completion", "chat", ("id",))
    assert json.loads(json.dumps(report.as_dict()))["rows_kept"] == 25


def test_report_lines_contain_totals_and_actual_losses_only(write: Write) -> None:
    clean = "\n".join(prepared(write(texts("abc", "bcd"))).report.lines())
    assert "2 kept" in clean
    assert not any(word in clean for word in ("cut", "same as", "left out", "held out", "columns"))
    lossy = prepared(write(texts("a1", "a1", "b" * 20)), max_length=9, long_rows="cut").report
    lossy_lines = "\n".join(lossy.lines())
    assert "1 row dropped: the same as an earlier row" in lossy_lines
    assert "1 row truncated to data.max_length: 12 tokens lost" in lossy_lines
    # Turns without an assistant answer.
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": messages}, {"messages": [*messages, {"role": "user", "content": "c"}]}]
    report = prepared(write(rows)).report
    assert (report.trailing_turns, report.duplicates) == (1, 1)
    assert any("after the assistant's last turn" in line for line in report.lines())


# Prompts


@pytest.mark.parametrize("prompt", ["hi", [{"role": "user", "content": "hi"}]])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, make_tokenizer(None, bos=True)])
def test_prompt_is_rendered_as_in_training(prompt: object, tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    (example,) = prepared(write([{"prompt": prompt, "completion": "yes"}]), tokenizer).train
    encoded = encode_prompt(prompt, DataSettings("x"), tokenizer)  # type: ignore[arg-type]
    assert encoded.dtype == np.int32
    np.testing.assert_array_equal(encoded, example.tokens[: example.prompt_length])


def test_text_format_uses_raw_prompts_and_prompts_end_with_a_user_turn() -> None:
    assert TOKENIZER.decode(encode_prompt("once", DataSettings("x", form="text"), TOKENIZER)) == "once"
    refusal(encode_prompt, [{"role": "assistant", "content": "hi"}], "chat", TOKENIZER)


# Settings


OUT_OF_RANGE = [({"max_length": 1}, "data.max_length is 1"), ({"rows": 0}, "data.rows is 0")]
OUT_OF_RANGE += [({"max_row_bytes": 0}, "data.max_row_bytes is 0"), ({"eval": -1}, "data.eval is -1")]
OUT_OF_RANGE += [({"eval": 1.5}, "data.eval is 1.5"), ({"eval": float("nan")}, "data.eval is nan")]
OUT_OF_RANGE += [({"columns": {"promt": "a"}}, "unknown column 'promt'")]


@pytest.mark.parametrize(("values", "message"), OUT_OF_RANGE)
def test_out_of_range_values_are_rejected(values: dict[str, object], message: str) -> None:
    assert message in refusal(DataSettings, "x", **values).message


def test_settings_accept_yaml_values_and_reject_unknown_keys() -> None:
    adapter = pydantic.TypeAdapter(DataSettings)
    assert [adapter.validate_python({"train": "x", "eval": value}).eval for value in (200, None)] == [200, None]
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python({"train": "x", "max_lenght": 3})
    described = adapter.json_schema()["properties"]
    assert all(part["description"] for part in described.values())


def test_missing_chat_template_is_rejected_before_reading_the_file(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.jsonl")
    assert "no chat template" in refusal(prepared, missing, make_tokenizer(None), template="chat").message
