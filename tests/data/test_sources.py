"""References become rows, and what is wrong with a file is said with its place."""

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


PACKS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


def content(kind: str) -> bytes:
    """The rows as a file of this kind."""
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
def test_every_kind_of_file_gives_the_same_rows(name: str, write: Write) -> None:
    _, kind, *pack = name.lower().split(".")
    rows = read_rows(write(PACKS[pack[0]](content(kind)) if pack else content(kind), name))
    assert list(rows) == [(1, ROWS[0]), (2, ROWS[1])]
    assert rows.columns == ["prompt", "completion"]
    assert rows[1] == rows[-1] == (2, ROWS[1])
    assert rows[0:2] == list(rows)


def test_json_lines_count_lines_and_pass_over_blank_ones(write: Write) -> None:
    path = write(b'\xef\xbb\xbf\n{"text": "a"}\r\n\n  \n{"text": "b", "more": 1}')
    rows = read_rows(path)
    assert list(rows) == [(2, {"text": "a"}), (5, {"text": "b", "more": 1})]
    assert (rows.columns, rows.place(1)) == (["text", "more"], f"{path}, row 5")


def test_zstd_files_joined_end_to_end_are_one_file(write: Write) -> None:
    path = write(zstd(b'{"text": "1"}\n') + zstd(b'{"text": "2"}\n'), "d.jsonl.zst")
    assert [row["text"] for _, row in read_rows(path)] == ["1", "2"]


LINES = b"".join(b'{"text": "%d"}\n' % n for n in range(2000))
NOT_UTF8 = b'{"text": "a"}\n{"text": "\xe9"}\n'
JUNK = b"not what the name says"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("d.jsonl", b'{"text": "a"}\n\n["a"]', "line 3 is not a JSON object"),
        ("d.jsonl", b'{"text": "a"}\n\nnull', "line 3 is not a JSON object"),
        ("d.jsonl", b'{"text": "a"}\n\n{"text": }', "column 10"),
        ("d.jsonl", b"[" * 200_000, "line 1 is not JSON"),  # nested too deeply to parse
        *((f"d.{kind}", NOT_UTF8, "line 2 is not UTF-8 (byte 0xe9)") for kind in ("jsonl", "csv", "json")),
        ("d.jsonl", b"\n\n", "empty"),
        ("d.json", b"", "empty"),
        ("d.json", b"[]", "empty"),
        ("d.csv", b"", "empty"),
        ("d.csv", b"text\n", "empty"),
        ("d.json", b'{"text": "a"}\n{"text": "b"}\n', ".jsonl"),
        ("d.json", b'{"data": [{"text": "a"}]}', "'data'"),
        ("d.json", b'[{"text": "a"}, 3]', ", row 2"),
        ("d.csv", b'prompt,completion\n"a\nb",c\nd,e,f\n', "row 2 has 3 cells, the header has 2"),
        ("d.csv", b'prompt,completion\n"a\nb",c\nd,e,f\n', "line 4"),
        ("d.csv", b'prompt,completion\na,"b\n', ", row 1"),
        ("d.csv", b"text,text\na,b\n", "'text' appears twice"),
        *((f"d.{kind}", JUNK, "") for kind in ("csv.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst", "parquet")),
        *((f"d.jsonl.{kind}", PACKS[kind](LINES)[:-9], "") for kind in ("gz", "zst")),
        ("d.xlsx", b"x", "'.xlsx'"),
        ("d.zip", b"x", "parquet"),
    ],
)
def test_a_file_that_is_not_one_of_rows_is_refused_with_what_and_where(name, data, said, write):
    path = write(data, name)
    error = refusal(read_rows, path)
    assert said in str(error) and (not said.startswith("line 3") or error.where == f"{path}, line 3")
    assert str(error.where).startswith(path) and (data != JUNK or error.where == path)


def test_a_missing_file_names_its_neighbours(tmp_path: Path, write: Write) -> None:
    write("{}", "headlines.jsonl")
    for name in ("headline.jsonl", "zzz"):
        assert "headlines.jsonl" in str(refusal(read_rows, str(tmp_path / name)).hint)
    assert "folder" in refusal(read_rows, str(tmp_path / "nowhere" / "x.jsonl")).what


def test_a_folder_of_nothing_of_several_kinds_or_with_test_data_is_refused(tmp_path: Path, write: Write) -> None:
    folder = str(tmp_path)
    assert "no data file" in refusal(read_rows, folder).what
    write([{"text": "1"}], "train/a.jsonl")
    write([{"text": "1"}], "validation/a.jsonl")
    assert "('validation/a.jsonl')" in refusal(read_rows, folder).what
    assert len(read_rows(f"{folder}/train")) == 1
    write([{"text": "1"}], "train/test-00.jsonl")
    assert "also holds evaluation data ('test-00.jsonl')" in refusal(read_rows, f"{folder}/train").what
    write("text\na\n", "train/c.csv")
    error = refusal(read_rows, f"{folder}/train")
    assert "several types (csv, jsonl)" in error.what
    assert "a list" in str(error.hint) and "c.csv" in str(error.hint)


def test_folders_inside_a_folder_are_read_too(tmp_path: Path, write: Write) -> None:
    read = ["de/old/1.jsonl", "en/1.jsonl.gz", "en/2.jsonl"]
    for name in (*reversed(read), ".git/x.jsonl", "__MACOSX/y.jsonl", ".h.jsonl", "README.md"):
        line = json.dumps({"text": name}).encode()
        write(gzip.compress(line) if name.endswith(".gz") else line, name)
    rows = read_rows(str(tmp_path))
    assert [row["text"] for _, row in rows] == read
    assert rows.place(1) == f"{tmp_path}/en/1.jsonl.gz, row 1"


def test_a_member_of_a_package_is_read_like_a_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = Path(write([{"text": "a"}])), []
    monkeypatch.setattr(packages, "member", lambda reference: asked.append(reference) or path)
    rows = read_rows("pypi:some==1.0/some/d.jsonl")
    assert asked == [rows.name] == ["pypi:some==1.0/some/d.jsonl"]
    assert rows.place(0) == "pypi:some==1.0/some/d.jsonl, row 1"


@pytest.mark.parametrize(
    ("reference", "asked"),
    [
        ("owner/name", {"split": "train"}),
        ("owner/name:test[:2]", {"split": "test[:2]"}),
        ("owner/name@v1.2", {"split": "train", "revision": "v1.2"}),
        ("owner/name@refs/pr/3:test", {"split": "test", "revision": "refs/pr/3"}),
        ("owner/name/20231101.en:train[:10%]", {"split": "train[:10%]", "name": "20231101.en"}),
        ("owner/name/en@5f3c:a+b", {"split": "a+b", "name": "en", "revision": "5f3c"}),
    ],
)
def test_a_hub_id_may_have_a_configuration_and_a_revision(reference, asked, monkeypatch):
    given = []

    def load(identity: str, **more: str) -> datasets.Dataset:
        given.append((identity, more))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_rows(reference)) == [(1, {"text": "a"})]
    assert given == [("owner/name", asked)]


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(identity: str, split: str) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    error = refusal(read_rows, "owner/name")
    assert error.what.endswith("Couldn't reach the hub")
    assert "file" in str(error.hint)
