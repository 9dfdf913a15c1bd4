"""Unusual values of rows are rejected or read as written."""

from __future__ import annotations

import pytest

from deltaw.data import sources
from deltaw.data.json_values import LEVELS
from deltaw.data.row_selection import choose_rows
from deltaw.data.sources import open_source, read_rows
from deltaw.data.stored_rows import TextReader
from deltaw.reports.starter import preview_data
from deltaw.settings.data import DataSettings
from deltaw.tasks.classification.rows import LabelReader, RewardReader
from tests.data.conftest import make_tokenizer, refusal


@pytest.mark.parametrize("levels", [LEVELS + 1, 985, 5000])
@pytest.mark.parametrize("row", ['{"text": X}', '{"text": "a", "more": X}', '{"messages": [X]}'])
def test_deeply_nested_rows_are_bad_rows(levels: int, row: str, write) -> None:
    path = write(row.replace("X", "[" * levels + "]" * levels) + '\n{"text": "b"}\n{"messages": 1}\n')
    assert "levels" in refusal(TextReader(DataSettings(path, eval=None), make_tokenizer()).prepare).message
    data = TextReader(DataSettings(path, eval=None, bad_rows="skip", form="text"), make_tokenizer()).prepare()
    assert len(data.train) == 1 and data.report.bad_rows["not JSON"] == 1


def test_deeply_nested_arguments_are_not_parsed(write) -> None:
    """JSON text in a row is parsed too. A template would fail on such arguments."""
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a":' * 500 + "1" + "}" * 500}}
    template = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.tool_calls | tojson }}<|im_end|>{% endfor %}"
    path = write([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}])
    refusal(TextReader(DataSettings(path, eval=None), make_tokenizer(template)).prepare)


def test_unrepresentable_values_are_bad_rows(write) -> None:
    path = write('{"text": "\\ud800", "label": 1}\n{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n')
    settings = DataSettings(path, eval=None, bad_rows="skip")
    assert len(LabelReader(settings, make_tokenizer(), "regression").prepare().train) == 2
    huge = "9" * 4000
    path = write(f'{{"prompt": "p", "chosen": "a", "rejected": "b", "margin": {huge}}}\n')
    reader = RewardReader(DataSettings(path, eval=None), make_tokenizer())
    assert "'margin' must be a number" in refusal(reader.prepare).message
    path = write(f'{{"text": "a", "label": {huge}}}\n{{"text": "b", "label": 1}}\n')
    assert preview_data(path).task == "sequence-classification"


def test_row_error_truncates_long_values(write) -> None:
    path = write([{"messages": [{"role": "x" * 50_000, "content": "a"}]}])
    error = refusal(TextReader(DataSettings(path, eval=None), make_tokenizer()).prepare)
    assert "the role is 'xxx" in error.message and len(str(error)) < 2000


def test_total_length_of_column_names_is_limited(write) -> None:
    path = write([{f"{n:090}": 1} for n in range(99)])
    error = refusal(open_source(path, max_bytes=1000).scan)
    assert "the column names of the rows" in error.message and error.location == f"{path}, row 12"


@pytest.mark.parametrize(
    ("name", "text"), [("d.jsonl", '{"text": "a", "label": 1}\n' * 1000), ("d.csv", "text,label\n" + "a,1\n" * 1000)]
)
def test_rows_that_exceed_free_memory_are_rejected(name: str, text: str, write, monkeypatch) -> None:
    path = write(text, name)
    monkeypatch.setattr(sources, "_CHECK_BYTES", 2000)
    assert len(read_rows(path)) == 1000
    monkeypatch.setattr(sources, "free_memory_bytes", lambda: 2**20)
    error = refusal(read_rows, path)
    assert "do not fit into memory" in error.message and error.location == path


def test_sampling_few_of_many_rows_needs_little_memory() -> None:
    assert len(choose_rows(10**12, 10, 0)) == 10
