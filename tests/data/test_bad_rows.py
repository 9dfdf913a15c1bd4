"""Rows that cannot be used: an error at the first one, or skipped with the reason."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from deltaw.data.bad_rows import BadRowError, BadRows
from deltaw.data.sources import read_rows, row_errors
from deltaw.errors import UserError


def error(reason: str) -> BadRowError:
    return BadRowError("it is odd", reason=reason, location="d.jsonl, row 3", hint="make it even")


def test_skipped_rows_are_counted_and_listed_with_locations() -> None:
    bad = BadRows("skip")
    for reason in ("odd", "odd", "even"):
        bad.add(error(reason), {"text": 1})
    assert (len(bad), dict(bad.counts)) == (3, {"odd": 2, "even": 1})
    expected = {"where": "d.jsonl, row 3", "reason": "even", "error": "it is odd", "row": {"text": 1}}
    assert list(bad.lines())[2] == expected


def test_skipped_rows_round_trip_with_long_rows_truncated(tmp_path: Path) -> None:
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


def test_row_error_mentions_the_skip_setting_once(tmp_path: Path) -> None:
    with pytest.raises(BadRowError) as raised, row_errors(), row_errors():
        raise error("odd")
    assert raised.value.hint == "make it even; or leave such rows out with data.bad_rows: skip"
    with pytest.raises(UserError) as raised, row_errors():
        raise error("odd").of_file()
    assert raised.value.hint == "make it even"


LINES = {
    "comma": ("text,label", 'a;b,"c"', [{"text": "a;b", "label": "c"}]),
    "semicolon": ('"question";answer', "one, two;b", [{"question": "one, two", "answer": "b"}]),
    "tab": ("question\tanswer", "a\tb", [{"question": "a", "answer": "b"}]),
    "one column": ("a text; of one column", "only this", [{"a text; of one column": "only this"}]),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".csv.xz", ".csv.bz2"])
def test_cell_delimiter_is_detected(tmp_path: Path, name: str, suffix: str) -> None:
    header, line, rows = LINES[name]
    open_file = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(suffix[4:], open)
    with open_file(tmp_path / f"rows{suffix}", "wt") as file:
        file.write(f"{header}\n{line}\n")
    assert [row for _, row in read_rows(str(tmp_path / f"rows{suffix}"))] == rows
