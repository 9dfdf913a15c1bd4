"""References are resolved to rows, and errors have a location."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from deltaw.data.sources import read_rows
from deltaw.hub import packages
from tests.data.conftest import refusal

ROWS = [{"prompt": 'a,\n"b"', "completion": "é"}, {"prompt": "", "completion": "NA"}]
Write = Callable[..., str]


def zstd(data: bytes) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as file:
        file.write(data)
    return buffer.getvalue().to_pybytes()


COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


def content(kind: str) -> bytes:
    """Return the rows as a file of this kind."""
    if kind == "parquet":
        out = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), out)
        return out.getvalue()
    if kind.startswith("json"):
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
        return (lines if kind == "jsonl" else json.dumps(ROWS)).encode()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ROWS[0], delimiter="\t" if kind == "tsv" else ",")
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


NAMES = ["r.jsonl", "r.json", "r.csv", "r.tsv", "r.parquet", "r.csv.gz", "r.jsonl.bz2", "r.json.xz", "R.TSV.GZ"]


@pytest.mark.parametrize("name", [*NAMES, "r.jsonl.zst", "r.csv.zst"])
def test_every_file_type_returns_equal_rows(name: str, write: Write) -> None:
    _, kind, *pack = name.lower().split(".")
    rows = read_rows(write(COMPRESSORS[pack[0]](content(kind)) if pack else content(kind), name))
    assert list(rows) == [(1, ROWS[0]), (2, ROWS[1])] and rows.columns == ["prompt", "completion"]
    assert rows[1] == rows[-1] == (2, ROWS[1]) and rows[0:2] == list(rows)


def test_json_lines_skip_blank_lines_in_numbering(write: Write) -> None:
    path = write(b'\xef\xbb\xbf\n{"text": "a"}\r\n\n  \n{"text": "b", "more": 1}')
    rows = read_rows(path)
    assert list(rows) == [(2, {"text": "a"}), (5, {"text": "b", "more": 1})]
    assert (rows.columns, rows.row_location(1)) == (["text", "more"], f"{path}, row 5")


def test_concatenated_zstd_frames_are_one_file(write: Write) -> None:
    path = write(zstd(b'{"text": "1"}\n') + zstd(b'{"text": "2"}\n'), "d.jsonl.zst")
    assert [row["text"] for _, row in read_rows(path)] == ["1", "2"]


LINES = b"".join(b'{"text": "%d"}\n' % n for n in range(2000))
NOT_UTF8 = b'{"text": "a"}\n{"text": "\xe9"}\n'
JUNK = b"not what the name says"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("d.jsonl", b'{"text": "a"}\n\n["a"]', "line 3 is not a JSON object"),
        ("d.jsonl", b'{"text": "a"}\n\n{"text": }', "column 10"),
        ("d.jsonl", b"[" * 200_000, "line 1 is not JSON"),  # nested too deeply to parse
        *((f"d.{kind}", NOT_UTF8, "line 2 is not UTF-8 (byte 0xe9)") for kind in ("jsonl", "csv", "json")),
        ("d.jsonl", b"\n\n", "empty"),
        ("d.json", b"", "empty"),
        ("d.csv", b"", "empty"),
        ("d.json", b'{"text": "a"}\n{"text": "b"}\n', ".jsonl"),
        ("d.json", b'{"data": [{"text": "a"}]}', "'data'"),
        ("d.json", b'[{"text": "a"}, 3]', ", row 2"),
        ("d.csv", b'prompt,completion\n"a\nb",c\nd,e,f\n', "row 2 has 3 cells, the header has 2"),
        ("d.csv", b'prompt,completion\na,"b\n', ", row 1"),
        ("d.csv", b"text,text\na,b\n", "'text' appears twice"),
        *((f"d.{kind}", JUNK, "") for kind in ("csv.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst", "parquet")),
        *((f"d.jsonl.{kind}", COMPRESSORS[kind](LINES)[:-9], "") for kind in ("gz", "zst")),
        ("d.xlsx", b"x", "'.xlsx'"),
        ("d.zip", b"x", "parquet"),
    ],
)
def test_invalid_file_is_rejected_with_reason_and_location(name, data, message, write):
    path = write(data, name)
    error = refusal(read_rows, path)
    assert message in str(error) and (not message.startswith("line 3") or error.location == f"{path}, line 3")
    assert str(error.location).startswith(path) and (data != JUNK or error.location == path)


def test_missing_file_suggests_similar_names(tmp_path: Path, write: Write) -> None:
    write("{}", "headlines.jsonl")
    for name in ("headline.jsonl", "zzz"):
        assert "headlines.jsonl" in str(refusal(read_rows, str(tmp_path / name)).hint)
    assert "folder" in refusal(read_rows, str(tmp_path / "nowhere" / "x.jsonl")).message


def test_empty_mixed_or_evaluation_folders_are_rejected(tmp_path: Path, write: Write) -> None:
    folder = str(tmp_path)
    assert "no data file" in refusal(read_rows, folder).message
    write([{"text": "1"}], "train/a.jsonl")
    write([{"text": "1"}], "validation/a.jsonl")
    assert "('validation/a.jsonl')" in refusal(read_rows, folder).message and len(read_rows(f"{folder}/train")) == 1
    write([{"text": "1"}], "train/test-00.jsonl")
    assert "also has evaluation data ('test-00.jsonl')" in refusal(read_rows, f"{folder}/train").message
    write("text\na\n", "train/c.csv")
    error = refusal(read_rows, f"{folder}/train")
    assert "several types (csv, jsonl)" in error.message and "a list" in str(error.hint) and "c.csv" in str(error.hint)


def test_nested_folders_are_read(tmp_path: Path, write: Write) -> None:
    read = ["de/old/1.jsonl", "en/1.jsonl.gz", "en/2.jsonl"]
    for name in (*reversed(read), ".git/x.jsonl", "__MACOSX/y.jsonl", ".h.jsonl", "README.md"):
        line = json.dumps({"text": name}).encode()
        write(gzip.compress(line) if name.endswith(".gz") else line, name)
    rows = read_rows(str(tmp_path))
    assert [row["text"] for _, row in rows] == read and rows.row_location(1) == f"{tmp_path}/en/1.jsonl.gz, row 1"


def test_package_member_is_read_like_a_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write([{"text": "a"}]))
    requested = []
    monkeypatch.setattr(packages, "member", lambda reference: requested.append(reference) or path)
    rows = read_rows("pypi:some==1.0/some/d.jsonl")
    assert requested == [rows.name] == ["pypi:some==1.0/some/d.jsonl"]
    assert rows.row_location(0) == "pypi:some==1.0/some/d.jsonl, row 1"


@pytest.mark.parametrize(
    ("reference", "requested"),
    [
        ("owner/name", {"split": "train"}),
        ("owner/name:test[:2]", {"split": "test[:2]"}),
        ("owner/name@v1.2", {"split": "train", "revision": "v1.2"}),
        ("owner/name@refs/pr/3:test", {"split": "test", "revision": "refs/pr/3"}),
        ("owner/name/20231101.en:train[:10%]", {"split": "train[:10%]", "name": "20231101.en"}),
        ("owner/name/en@5f3c:a+b", {"split": "a+b", "name": "en", "revision": "5f3c"}),
    ],
)
def test_hub_id_can_have_configuration_and_revision(reference, requested, monkeypatch):
    calls = []

    def load(identity: str, **more: str) -> datasets.Dataset:
        calls.append((identity, more))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_rows(reference)) == [(1, {"text": "a"})] and calls == [("owner/name", requested)]


def test_unreachable_hub_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(identity: str, split: str) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    error = refusal(read_rows, "owner/name")
    assert error.message.endswith("Couldn't reach the hub") and "file" in str(error.hint)
