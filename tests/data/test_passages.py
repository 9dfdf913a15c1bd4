"""Queries, passages and their columns, and rows that cannot be used."""

from __future__ import annotations

import gzip

import pandas
import pytest

from deltaw.data.passages import read_pairs, read_passages, text_key
from deltaw.data.report import BadRowError, BadRows
from deltaw.errors import UserError
from tests.conftest import write_rows


@pytest.mark.parametrize(
    ("query", "positive"),
    [("anchor", "positive"), ("query", "passage"), ("question", "answer"), ("prompt", "completion"), ("ask", "say")],
)
def test_columns_are_found_by_usual_names_or_as_given(tmp_path, query, positive):
    file = write_rows(tmp_path / "d.jsonl", [{"id": "7", positive: "Lima.", query: "Capital of Peru?"}])
    named = ("ask", "say") if query == "ask" else (None, None)
    assert read_pairs(str(file), BadRows(), columns=named) == [("Capital of Peru?", "Lima.")]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "txt", "txt.gz"])
def test_passages_come_from_any_file(tmp_path, suffix):
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


def test_a_single_column_holds_the_passages_whatever_its_name(tmp_path):
    file = write_rows(tmp_path / "d.jsonl", [{"odd": "Lima."}])
    assert read_passages(str(file), BadRows()) == ["Lima."]
    file = write_rows(tmp_path / "d.jsonl", [{"odd": "Lima.", "more": "Quito."}])
    assert read_passages(str(file), BadRows(), column="more") == ["Quito."]
    with pytest.raises(UserError, match="no column is known to hold the passage") as error:
        read_passages(str(file), BadRows())
    assert "--passage-column" in error.value.hint and "'odd', 'more'" in error.value.where


def test_columns_that_are_not_there_or_one_for_both_are_refused(tmp_path):
    file = str(write_rows(tmp_path / "d.jsonl", [{"question": "Peru?", "answer": "Lima."}]))
    with pytest.raises(UserError, match="no column 'anwser'") as error:
        read_pairs(file, BadRows(), columns=(None, "anwser"))
    assert error.value.hint == "did you mean 'answer'?"
    with pytest.raises(UserError, match="cannot be query and passage at once"):
        read_pairs(file, BadRows(), columns=(None, "question"))
    with pytest.raises(UserError, match="hold the query"):
        read_pairs(str(write_rows(tmp_path / "e.jsonl", [{"answer": "Lima."}])), BadRows())


BAD = [
    ({"query": "Peru?"}, "'passage' is missing"),
    ({"query": "Peru?", "passage": None}, "'passage' is empty (null)"),
    ({"query": "Peru?", "passage": " \n"}, "an empty text"),
    ({"query": "", "passage": "Lima."}, "an empty text"),
    ({"query": "Peru?", "passage": ["Lima."]}, "a value of the wrong type"),
]
GOOD = {"query": "Chile?", "passage": "Santiago."}


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_row_that_cannot_be_used_is_refused_by_its_place(tmp_path, row, reason):
    file = write_rows(tmp_path / "d.jsonl", [GOOD, row])
    with pytest.raises(BadRowError) as error:
        read_pairs(str(file), BadRows())
    assert (error.value.where, error.value.reason) == (f"{file}, row 2 (line 2)", reason)
    assert "bad_rows: skip" in error.value.hint


def test_rows_that_cannot_be_used_are_skipped_and_counted_if_asked(tmp_path):
    file = write_rows(tmp_path / "d.jsonl", [*(row for row, _ in BAD), GOOD])
    file.write_text(file.read_text() + "not JSON\n")
    bad = BadRows("skip")
    assert read_pairs(str(file), bad) == [("Chile?", "Santiago.")]
    assert len(bad) == 6 and bad.counts["an empty text"] == 2
    with pytest.raises(UserError, match="no row of the file can be used"):
        read_pairs(str(write_rows(tmp_path / "e.jsonl", [BAD[2][0]])), BadRows("skip"))


def test_lines_of_text_are_bounded_and_must_be_text(tmp_path):
    file = tmp_path / "d.txt"
    file.write_bytes(b"good\n\xff\xfe\nmore\n")
    with pytest.raises(BadRowError, match="line 2 is not UTF-8") as error:
        read_passages(str(file), BadRows())
    assert "bad_rows: skip" in error.value.hint
    bad = BadRows("skip")
    assert read_passages(str(file), bad) == ["good", "more"] and len(bad) == 1
    file.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="more than the 50 bytes"):
        read_passages(str(file), bad, max_bytes=50)
    file.write_bytes(b"\n\n")
    with pytest.raises(UserError, match="it has no passage"):
        read_passages(str(file), bad)


def test_texts_that_differ_in_case_and_spacing_have_one_key():
    assert text_key(" Lima  is\na CITY") == text_key("lima is a city") != text_key("lima is city")
