"""Rows above the size limit are skipped with a reason."""

from __future__ import annotations

import pyarrow
import pyarrow.parquet
import pytest

from deltaw.data.bad_rows import TOO_LONG
from deltaw.data.sources import open_source, read_rows
from deltaw.data.stored_rows import TextReader
from deltaw.settings.data import DataSettings
from deltaw.tasks.classification.rows import LabelReader, RewardReader
from tests.data.conftest import make_tokenizer, refusal


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_long_rows_are_skipped(kind, write, tmp_path):
    texts = ["a", "b" * 300_000, "c" * 90, "d" * 100, "e", "f" * 1000]
    path = write([{"text": text} for text in texts], f"d.{kind}")
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=3)
    reasons: list[str] = []
    max_bytes = 113 if kind == "jsonl" else 99  # a line of 101 characters and its key
    stream = open_source(path, lambda error, row: reasons.append(error.reason), max_bytes=max_bytes)
    stream.scan()
    expected = [text for text in texts if len(text) <= (100 if kind == "jsonl" else 99)]
    assert [row["text"] for chunk in stream.chunks() for _, row in chunk] == expected
    assert reasons == [TOO_LONG] * (len(texts) - len(expected))


def test_row_limit_applies_to_every_reader_and_is_inclusive(write) -> None:
    path = write(b'{"text": "abc"}\n{"text": "abc"}')
    assert len(read_rows(path, max_bytes=16)) == 2
    assert "line 1 has more than the 15 bytes" in refusal(read_rows, path, max_bytes=15).message
    row = {"text": "a" * 50, "label": 0, "prompt": "b", "chosen": "c", "rejected": "d", "completion": "e"}
    path = write([row, {**row, "label": 1, "text": "z"}])
    short, long = (DataSettings(path, max_row_bytes=m, eval=None, columns={"text": "text"}) for m in (99, 999))
    tokenizer = make_tokenizer()
    for read in (
        lambda settings: TextReader(settings, tokenizer).prepare(),
        lambda settings: LabelReader(settings, tokenizer, "sequence-classification").prepare(),
        lambda settings: RewardReader(settings, tokenizer).prepare(),
    ):
        assert "line 1 has more than the 99 bytes" in refusal(read, short).message
    assert len(TextReader(long, tokenizer).prepare().train) == 2
