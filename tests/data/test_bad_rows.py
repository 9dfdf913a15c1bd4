"""Rows that cannot be used: an error at the first, or skipped with their reason."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from deltaw.data.report import BadRowError, BadRows
from deltaw.data.sources import read_rows, skipping_named
from deltaw.errors import UserError


def error(reason: str) -> BadRowError:
    return BadRowError("it is odd", reason=reason, where="d.jsonl, row 3", hint="make it even")


def test_skipped_rows_are_counted_by_reason_and_listed_with_their_place() -> None:
    bad = BadRows("skip")
    for reason in ("odd", "odd", "even"):
        bad.add(error(reason), {"text": 1})
    assert (len(bad), dict(bad.counts)) == (3, {"odd": 2, "even": 1})
    told = {"where": "d.jsonl, row 3", "reason": "even", "error": "it is odd", "row": {"text": 1}}
    assert list(bad.lines())[2] == told


def test_the_list_is_written_and_read_again_with_long_rows_shortened_and_odd_values_shown(tmp_path: Path) -> None:
    bad = BadRows("skip")
    bad.add(error("odd"), {"text": "é" * 10_000})
    bad.add(error("odd"), {"text": "\ud800", "image": b"123", "number": float("nan")})
    bad.add(error("even"), "not JSON at all {")
    first, second, _ = bad.lines()
    assert isinstance(first["row"], str) and len(first["row"]) < 2100 and first["row"].endswith("…")
    assert "123" not in str(second["row"]) and "bytes" in str(second["row"])
    path = tmp_path / "skipped.jsonl"
    bad.write(path)
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)
    again = BadRows.read(path)
    assert again.counts == bad.counts and list(again.lines()) == list(bad.lines())


def test_an_error_of_a_row_names_the_setting_that_leaves_such_rows_out_once(tmp_path: Path) -> None:
    with pytest.raises(BadRowError) as told, skipping_named(), skipping_named():
        raise error("odd")
    assert told.value.hint == "make it even; or leave such rows out with data.bad_rows: skip"
    with pytest.raises(UserError) as told, skipping_named():
        raise error("odd").of_file()
    assert told.value.hint == "make it even"


LINES = {
    "comma": ("text,label", 'a;b,"c"', [{"text": "a;b", "label": "c"}]),
    "semicolon": ('"question";answer', "one, two;b", [{"question": "one, two", "answer": "b"}]),
    "tab": ("question\tanswer", "a\tb", [{"question": "a", "answer": "b"}]),
    "one column": ("a text; of one column", "only this", [{"a text; of one column": "only this"}]),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".csv.xz", ".csv.bz2"])
def test_a_table_says_itself_what_separates_its_cells(tmp_path: Path, name: str, suffix: str) -> None:
    header, line, rows = LINES[name]
    opened = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(suffix[4:], open)
    with opened(tmp_path / f"rows{suffix}", "wt") as file:
        file.write(f"{header}\n{line}\n")
    assert [row for _, row in read_rows(str(tmp_path / f"rows{suffix}"))] == rows
