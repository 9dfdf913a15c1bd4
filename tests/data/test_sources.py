"""References become rows, and what is wrong with a file is said with its place."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from deltaw.data.sources import read_rows
from deltaw.errors import UserError
from deltaw.hub import packages

ROWS = [{"prompt": 'a,\n"b"', "completion": "é"}, {"prompt": "", "completion": "NA"}]


def refusal(reference: object) -> UserError:
    with pytest.raises(UserError) as refused:
        read_rows(str(reference))
    return refused.value


def zstd(data: bytes) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as file:
        file.write(data)
    return buffer.getvalue().to_pybytes()


def as_csv(path: Path, delimiter: str = ",") -> bytes:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path.read_bytes()


NAMES = ["r.jsonl", "r.json", "r.csv", "r.tsv", "r.parquet", "r.csv.gz", "r.jsonl.bz2", "r.json.xz", "R.TSV.GZ"]
NAMES += ["r.jsonl.zst", "r.csv.zst"]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    lowered = name.lower()
    if "parquet" in lowered:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        if ".csv" in lowered or ".tsv" in lowered:
            data = as_csv(tmp_path / "plain", "\t" if ".tsv" in lowered else ",")
        elif ".jsonl" in lowered or ".ndjson" in lowered:
            data = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
        else:
            data = json.dumps(ROWS).encode()
        packs = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
        path.write_bytes(packs.get(path.suffix.lower(), bytes)(data))
    rows = read_rows(str(path))
    assert list(rows) == [(1, ROWS[0]), (2, ROWS[1])]
    assert rows.columns == ["prompt", "completion"]
    assert rows[1] == rows[-1] == (2, ROWS[1])
    assert rows[0:2] == list(rows)


def test_json_lines_count_lines_and_pass_over_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"text": "a"}\r\n\n  \n{"text": "b", "more": 1}')
    rows = read_rows(str(path))
    assert list(rows) == [(2, {"text": "a"}), (5, {"text": "b", "more": 1})]
    assert rows.columns == ["text", "more"]
    assert rows.place(1) == f"{path}, row 5"


@pytest.mark.parametrize(
    ("line", "said"), [('["a"]', "is not a JSON object"), ("null", "is not a JSON object"), ('{"text": }', "column 10")]
)
def test_a_line_that_is_no_object_is_refused(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n\n' + line)
    error = refusal(path)
    assert "line 3" in error.what and said in error.what and error.where == f"{path}, line 3"


def test_deeply_nested_json_is_refused_and_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("[" * 200_000)
    assert "line 1 is not JSON" in refusal(path).what


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.json"])
def test_bytes_that_are_not_utf8_are_named_by_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    error = refusal(path)
    assert "line 2 is not UTF-8 (byte 0xe9)" in error.what
    assert "UTF-8" in str(error.hint)


@pytest.mark.parametrize(
    ("name", "content"), [("d.jsonl", "\n\n"), ("d.json", ""), ("d.json", "[]"), ("d.csv", ""), ("d.csv", "text\n")]
)
def test_an_empty_file_is_refused(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert "empty" in refusal(path).what


def test_a_json_file_of_lines_is_told_to_be_named_so(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert ".jsonl" in str(refusal(path).hint)
    path.write_text('{"data": [{"text": "a"}]}')
    assert "'data'" in str(refusal(path).hint)
    path.write_text('[{"text": "a"}, 3]')
    assert refusal(path).where == f"{path}, row 2"


def test_tables_with_uneven_rows_or_broken_quotes_are_refused_by_row(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('prompt,completion\n"a\nb",c\nd,e,f\n')
    error = refusal(path)
    assert "row 2 has 3 cells, the header has 2" in error.what
    assert "line 4" in str(error.where)
    path.write_text('prompt,completion\na,"b\n')
    assert "row 1" in str(refusal(path).where)
    path.write_text("text,text\na,b\n")
    assert "'text' appears twice" in refusal(path).what


@pytest.mark.parametrize("name", ["d.csv.gz", "d.jsonl.bz2", "d.jsonl.xz", "d.jsonl.zst", "d.parquet"])
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"not what the name says")
    error = refusal(path)
    assert error.where == str(path)
    if name.endswith((".gz", ".zst")):
        pack = gzip.compress if name.endswith(".gz") else zstd
        path.write_bytes(pack(b"".join(b'{"text": "%d"}\n' % n for n in range(2000)))[:-9])
        assert str(refusal(path).where).startswith(str(path))


def test_zstd_files_joined_end_to_end_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.zst"
    path.write_bytes(zstd(b'{"text": "1"}\n') + zstd(b'{"text": "2"}\n'))
    assert [row["text"] for _, row in read_rows(str(path))] == ["1", "2"]


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "headlines.jsonl").write_text("{}")
    assert "headlines.jsonl" in str(refusal(tmp_path / "headline.jsonl").hint)
    assert "headlines.jsonl" in str(refusal(tmp_path / "zzz").hint)
    assert "folder" in refusal(tmp_path / "nowhere" / "x.jsonl").what


@pytest.mark.parametrize("name", ["d.xlsx", "d.zip"])
def test_a_kind_of_file_that_is_not_known_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("x")
    error = refusal(path)
    assert f"'{path.suffix}'" in error.what and "parquet" in str(error.hint)


def test_a_folder_of_nothing_of_several_kinds_or_with_test_data_is_refused(tmp_path: Path) -> None:
    assert "no data file" in refusal(tmp_path).what
    (tmp_path / "train.jsonl").write_text('{"text": "1"}\n')
    (tmp_path / "test-00.jsonl").write_text('{"text": "1"}\n')
    assert "also holds evaluation data ('test-00.jsonl')" in refusal(tmp_path).what
    (tmp_path / "c.csv").write_text("text\na\n")
    error = refusal(tmp_path)
    assert "several types (csv, jsonl)" in error.what
    assert "a list" in str(error.hint) and "c.csv" in str(error.hint)


def test_folders_inside_a_folder_are_read_too(tmp_path: Path) -> None:
    for name in (
        "en/2.jsonl",
        "en/1.jsonl.gz",
        "de/old/1.jsonl",
        ".git/x.jsonl",
        "__MACOSX/y.jsonl",
        ".h.jsonl",
        "README.md",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"text": name}).encode()
        path.write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
    rows = read_rows(str(tmp_path))
    assert [row["text"] for _, row in rows] == ["de/old/1.jsonl", "en/1.jsonl.gz", "en/2.jsonl"]
    assert rows.place(1) == f"{tmp_path}/en/1.jsonl.gz, row 1"


def test_evaluation_data_in_a_folder_inside_is_refused(tmp_path: Path) -> None:
    for name in ("train/a.jsonl", "validation/a.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('{"text": "1"}\n')
    assert "('validation/a.jsonl')" in refusal(tmp_path).what
    assert len(read_rows(str(tmp_path / "train"))) == 1


def test_a_member_of_a_package_is_read_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n')
    asked = []
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
    error = refusal("owner/name")
    assert error.what.endswith("Couldn't reach the hub")
    assert "file" in str(error.hint)
