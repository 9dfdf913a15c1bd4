"""Queries, passages and their columns, and rows that cannot be used."""

from __future__ import annotations

import gzip

import pandas
import pytest

from deltaw.data.bad_rows import BadRowError, BadRows
from deltaw.errors import UserError
from deltaw.evaluation.mining import read_pairs, read_passages, text_key
from tests.conftest import refusal, write_rows


@pytest.mark.parametrize(
    ("query", "positive"),
    [("anchor", "positive"), ("query", "passage"), ("question", "answer"), ("prompt", "completion"), ("ask", "say")],
)
def test_columns_are_detected_or_configured(tmp_path, query, positive):
    file = write_rows(tmp_path / "d.jsonl", [{"id": "7", positive: "Lima.", query: "Capital of Peru?"}])
    named = ("ask", "say") if query == "ask" else (None, None)
    assert read_pairs(str(file), BadRows(), columns=named) == [("Capital of Peru?", "Lima.")]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "txt", "txt.gz"])
def test_passages_are_read_from_any_file_type(tmp_path, suffix):
    file = tmp_path / f"corpus.{suffix}"
    rows = pandas.DataFrame({"title": ["a", "b"], "text": ["Lima is a city.", "Quito, too."]})
    if suffix == "jsonl":
        rows.to_json(file, orient="records", lines=True)
    elif suffix == "csv":
        rows.to_csv(file, index=False)
    elif suffix == "parquet":
        rows.to_parquet(file)
    else:
        text = "\ufeffLima is a city.\n\n  Quito, too.\r\n".encode()
        file.write_bytes(text if suffix == "txt" else gzip.compress(text))
    assert read_passages(str(file), BadRows()) == ["Lima is a city.", "Quito, too."]


def test_single_column_contains_the_passages(tmp_path):
    file = write_rows(tmp_path / "d.jsonl", [{"odd": "Lima."}])
    assert read_passages(str(file), BadRows()) == ["Lima."]
    file = write_rows(tmp_path / "d.jsonl", [{"odd": "Lima.", "more": "Quito."}])
    assert read_passages(str(file), BadRows(), column="more") == ["Quito."]
    error = refusal(read_passages, str(file), BadRows(), match="no column with the passage was found")
    assert "--passage-column" in error.hint and "'odd', 'more'" in error.location


def test_missing_or_shared_columns_are_rejected(tmp_path):
    file = str(write_rows(tmp_path / "d.jsonl", [{"question": "Peru?", "answer": "Lima."}]))
    error = refusal(read_pairs, file, BadRows(), columns=(None, "anwser"), match="no column 'anwser'")
    assert error.hint == "did you mean 'answer'?"
    refusal(read_pairs, file, BadRows(), columns=(None, "question"), match="is both query and passage")
    with pytest.raises(UserError, match="no column with the query"):
        read_pairs(str(write_rows(tmp_path / "e.jsonl", [{"answer": "Lima."}])), BadRows())


BAD = [
    ({"query": "Peru?"}, "'passage' is missing"),
    ({"query": "Peru?", "passage": None}, "'passage' is empty (null)"),
    ({"query": "Peru?", "passage": " \n"}, "an empty text"),
    ({"query": "", "passage": "Lima."}, "an empty text"),
    ({"query": "Peru?", "passage": ["Lima."]}, "a value of the wrong type"),
]
VALID = {"query": "Chile?", "passage": "Santiago."}


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_row_is_rejected_with_its_location(tmp_path, row, reason):
    file = write_rows(tmp_path / "d.jsonl", [VALID, row])
    with pytest.raises(BadRowError) as error:
        read_pairs(str(file), BadRows())
    assert (error.value.location, error.value.reason) == (f"{file}, row 2 (line 2)", reason)
    assert "bad_rows: skip" in error.value.hint


def test_bad_rows_can_be_skipped_and_counted(tmp_path):
    file = write_rows(tmp_path / "d.jsonl", [*(row for row, _ in BAD), VALID])
    file.write_text(file.read_text() + "not JSON\n")
    bad = BadRows("skip")
    assert read_pairs(str(file), bad) == [("Chile?", "Santiago.")]
    assert len(bad) == 6 and bad.counts["an empty text"] == 2
    with pytest.raises(UserError, match="the file has no usable row"):
        read_pairs(str(write_rows(tmp_path / "e.jsonl", [BAD[2][0]])), BadRows("skip"))


def test_text_lines_have_a_size_limit_and_must_be_utf8(tmp_path):
    file = tmp_path / "d.txt"
    file.write_bytes(b"good\n\xff\xfe\nmore\n")
    with pytest.raises(BadRowError, match="line 2 is not UTF-8") as error:
        read_passages(str(file), BadRows())
    assert "bad_rows: skip" in error.value.hint
    bad = BadRows("skip")
    assert read_passages(str(file), bad) == ["good", "more"] and len(bad) == 1
    file.write_bytes(b"x" * 100)
    refusal(read_passages, str(file), bad, max_bytes=50, match="more than the 50 bytes")
    file.write_bytes(b"\n\n")
    refusal(read_passages, str(file), bad, match="the file has no passages")


def test_case_and_spacing_do_not_change_the_key():
    assert text_key(" Lima  is\na CITY") == text_key("lima is a city") != text_key("lima is city")
