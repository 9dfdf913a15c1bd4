"""Files whose contents do not match their names, and line numbers of rows."""

from __future__ import annotations

import gzip
import io
import json
import random
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from deltaw.data.bad_rows import BadRows
from deltaw.data.sources import open_source, read_rows, with_lines
from tests.conftest import refusal

ROWS = "".join(json.dumps({"text": f"row {n} é", "label": "x"}, ensure_ascii=False) + "\n" for n in range(9))


def parquet() -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), buffer)
    return buffer.getvalue()


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.jsonl", ROWS)
    return buffer.getvalue()


CONTENTS = {
    **{f"UTF-16 {end}": (ROWS.encode(f"utf-16{end}"), "text in UTF-16") for end in ("", "-le", "-be")},
    **{f"UTF-32 {end}": (ROWS.encode(f"utf-32{end}"), "text in UTF-32") for end in ("", "-le", "-be")},
    "gzip": (gzip.compress(ROWS.encode()), "compressed with gzip"),
    "ZIP": (archive(), "a ZIP archive"),
    "Parquet": (parquet(), "a Parquet file"),
    "random bytes": (random.Random(0).randbytes(4000), "binary"),
    "zeros": (bytes(500), "binary"),
    "blank lines": (b"\n  \n\n", "no row: it contains only blank lines"),
    "nothing": (b"", "no row: it is empty"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
@pytest.mark.parametrize("name", CONTENTS)
def test_non_text_file_is_reported_with_its_type(tmp_path, name, suffix):
    content, message = CONTENTS[name]
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(content)
    for read in (read_rows, lambda path: read_rows(path, BadRows("skip").add), lambda path: open_source(path).scan()):
        error = refusal(read, str(file))
        assert message in error.message and str(file) in error.location and error.hint


BROKEN = {
    "deep": ('{"text": ' + "[" * 200 + "]" * 200 + "}\n", "100 levels"),
    "huge": (json.dumps({"text": "a" * 5000}) + "\n", "more than the 1,000 bytes"),
    "Latin-1": ("é\n", "not UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_file_without_usable_rows_reports_the_first_reason(tmp_path, name):
    text, message = BROKEN[name]
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(text.encode("latin-1")))
    error = refusal(read_rows, str(file), BadRows("skip").add, max_bytes=1000, match="no row can be read")
    assert message in error.message and "line 1" in error.location


def test_text_in_any_script_is_accepted(tmp_path):
    for text in ("тест 日本語 עברית", "👩‍👩‍👧 emoji", "control \\u0000 escape"):
        file = tmp_path / "rows.jsonl"
        file.write_text(f'{{"text": "{text}"}}\n', encoding="utf-8")
        assert len(read_rows(str(file))) == 1


LINES = {
    "a.jsonl": ('{"text": "a"}\n\n\n{"text": "b"}\n', 4, 4),
    "a.csv": ('text,label\n"a\nb",x\n\nc,y\nd,z\n', 3, 6),
    "b.csv": ("1,2\n3,4\n", 2, 2),  # without a header
    "a.json": ('[\n{"text": "a",\n "label": "x"},\n\n{"text": "b"}]', 2, 5),
}


@pytest.mark.parametrize("name", LINES)
def test_row_line_is_its_first_line_in_the_file(tmp_path, name):
    text, row, line = LINES[name]
    file = tmp_path / name
    file.write_text(text)
    location = f"{file}, row {row}"
    expected = f"{location} (line {line})"
    assert with_lines([location, f"{location}, turn 2", "model"]) == [expected, f"{expected}, turn 2", "model"]


def test_locations_without_lines_are_unchanged(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet())
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    names = ("a.parquet, row 1", "none.csv, row 1", "a.csv, row 2 (ends in line 3)")
    locations = [f"{tmp_path}/{name}" for name in names]
    assert with_lines(locations) == locations
