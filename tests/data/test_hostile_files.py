"""Files that are small on the disk and large in memory are refused by name, before they are in memory."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from deltaw.data import DataSettings, arrow_rows, pixels, prepare, row_files, sources
from deltaw.data.classes import LabelColumns
from deltaw.data.images import ImageEncoder
from deltaw.data.labels import LabelReader
from deltaw.data.pixels import ImageExample, image_rows, read_images
from deltaw.data.report import TOO_LONG
from deltaw.data.reward_pairs import RewardReader
from deltaw.data.row_files import LEVELS
from deltaw.data.sources import choose, open_source, read_rows
from deltaw.errors import UserError
from deltaw.hub import packages
from deltaw.reports.starter import look_at
from tests.data import hostile_files
from tests.data.conftest import make_tokenizer
from tests.data.hostile_files import HOSTILE

_MEASURED = """
import json, os, sys
from pathlib import Path
import pyarrow
from deltaw.data.sources import open_source, read_rows
from deltaw.errors import UserError
from deltaw.machine.memory import peak_resident_bytes, resident_bytes
from tests.data.hostile_files import HOSTILE

def in_child(work):
    receive, send = os.pipe()
    if not os.fork():
        os.write(send, json.dumps(work()).encode()[:4000])
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as told:
        answer = told.read()
    os.wait()
    return json.loads(answer or "null")

def read(path, most):
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    where = None
    try:
        stream = open_source(str(path), max_bytes=most)
        stream.scan()
        said = sum(len(chunk) for chunk in stream.chunks())
    except UserError as error:
        said, where = error.what, error.where
    return said, where, peak_resident_bytes() - before

folder = Path(sys.argv[1])
results = {}
for name, make in HOSTILE.items():
    in_child(lambda: make(folder / name))
    results[name] = in_child(lambda: read(folder / name, 2**20))
results["by default"] = in_child(lambda: read(folder / "line.jsonl.gz", 16 * 2**20))
print(json.dumps(results))
"""
_ROOT = Path(__file__).parents[2]
# What is said of each file, and of where; a number of rows for one that is read, in little memory.
EXPECTED: dict[str, tuple[str | int, str]] = {
    **{
        f"line.jsonl{packed}": ("line 2 has more than the 1,048,576 bytes", "line 2 (from byte 14")
        for packed in ("", ".gz", ".bz2", ".xz", ".zst")
    },
    "objects.jsonl.gz": ("line 1 has more than", "line 1 (from byte 0"),
    "list.json.gz": ("row 2 has more than", "row 2"),
    "objects.json.zst": ("the file is not a list of objects", "objects.json.zst"),
    "cell.csv.gz": ("row 2 has more than", "row 2 (lines 3 to 3)"),
    "cells.csv.gz": ("row 2 has more than", "row 2 (lines 3 to 3)"),
    "quoted.csv.gz": ("row 2 has more than", "row 2 (lines 3 to"),
    "quote.csv.gz": ("row 2 has more than", "row 2 (lines 3 to"),
    "window.jsonl.xz": ("Memory usage limit exceeded", "window.jsonl.xz"),
    "text.parquet": ("row 2 has 33,554,432 bytes", "row 2"),
    "entry.parquet": ("row 1 has 33,554,432 bytes", "row 1"),
    "repeated.parquet": ("row 1 has 2,097,152 bytes", "row 1"),
    "list.parquet": ("row 2001 has", "row 2001"),
    "texts.parquet": ("row 2001 has", "row 2001"),
    "beginnings.parquet": (400, ""),
    "text.arrow": ("row 2 has 33,554,432 bytes", "row 2"),
    "repeated.arrow": ("row 1 has 2,097,152 bytes", "row 1"),
    "views.arrow": (500, ""),
    "nulls.arrow": ("row 2001 has", "row 2001"),
    "lists.arrow": ("row 2001 has", "row 2001"),
    "by default": ("line 2 has more than the 16,777,216 bytes", "line 2"),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str | int, str | None, int]]:
    """What is said of each hostile file, of which place, and how much memory reading it took."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = os.pathsep.join([str(_ROOT), str(_ROOT / "src")])
    command = [sys.executable, "-c", _MEASURED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a peak is reset through Linux's /proc")
@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_that_becomes_large_is_refused_in_little_memory(name: str, measured: dict) -> None:
    """Read without a limit, these take from 100 MB to 8 GB."""
    said, where, peak = measured[name]
    expected, place = EXPECTED[name]
    if isinstance(expected, int):
        assert said == expected
    else:
        assert expected in said and place in where
    is_text = not name.endswith((".parquet", ".arrow"))
    assert peak < (64 if is_text else 400) * 2**20, f"{peak / 2**20:.0f} MiB"


def test_every_hostile_file_is_tried() -> None:
    assert set(EXPECTED) == {*HOSTILE, "by default"}


# Skipped where rows may be


def _skipping(path: Path, most: int) -> tuple[list[dict], list[tuple[str, str | None]]]:
    told: list[tuple[str, str | None]] = []
    stream = open_source(str(path), lambda e, row: told.append((e.reason, e.where)), max_bytes=most)
    stream.scan()
    return [row for chunk in stream.chunks() for _, row in chunk], told


def _jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def _parquet(path: Path, texts: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=3)


@pytest.mark.parametrize(("name", "write"), [("d.jsonl", _jsonl), ("d.parquet", _parquet)])
def test_rows_that_are_too_long_are_passed_over_to_the_next(name, write, tmp_path):
    path = tmp_path / name
    texts = ["a", "b" * 300_000, "c" * 90, "d" * 100, "e", "f" * 1000]
    write(path, texts)
    rows, told = _skipping(path, 101 + (12 if name == "d.jsonl" else -2))  # a line of 101 characters
    kept = [texts[0], texts[2], *([texts[3]] if name == "d.jsonl" else []), texts[4]]
    assert [row["text"] for row in rows] == kept
    assert {reason for reason, _ in told} == {TOO_LONG} and len(told) == len(texts) - len(kept)


def test_a_line_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "abc"}\n{"text": "abc"}')
    assert len(read_rows(str(path), max_bytes=16)) == 2
    with pytest.raises(UserError, match="line 1 has more than the 15 bytes"):
        read_rows(str(path), max_bytes=15)


def test_the_setting_reaches_every_reader(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    row = {"text": "a" * 50, "label": 0, "prompt": "b", "chosen": "c", "rejected": "d", "completion": "e"}
    path.write_text(f"{json.dumps(row)}\n{json.dumps({**row, 'label': 1, 'text': 'z'})}\n")
    short, long = (
        DataSettings(str(path), max_row_bytes=most, eval=None, columns={"text": "text"}) for most in (99, 999)
    )
    tokenizer = make_tokenizer()
    for read in (
        lambda settings: prepare(settings, tokenizer),
        lambda settings: LabelReader(settings, tokenizer, "sequence-classification").prepared(),
        lambda settings: RewardReader(settings, tokenizer).prepared(),
    ):
        with pytest.raises(UserError, match="line 1 has more than the 99 bytes"):
            read(short)
    assert len(prepare(long, tokenizer).train) == 2


# Decoding in proportion


@pytest.mark.parametrize("name", ["text.parquet", "list.parquet", "beginnings.parquet", "text.arrow"])
def test_what_would_become_a_thousand_times_larger_is_refused_before_it_is_decoded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_rows, "LEAST", 2**20)
    HOSTILE[name](tmp_path / name)
    with pytest.raises(UserError, match="bytes of the file would become") as refused:
        open_source(str(tmp_path / name), lambda *told: None).scan()
    assert "group 1 of rows" in str(refused.value.where) or "message 1" in str(refused.value.where)


@functools.cache
def _table() -> pyarrow.Table:
    """Every kind of column, with nulls, empty lists and repeated values."""
    pick = random.Random(0)
    rows = [
        {
            "text": pick.choice([None, "", "é" * pick.randrange(200), str(pick.random())]),
            "code": pick.choice(["a", "bb", None]),
            "number": pick.choice([None, 1, 2**60]),
            "messages": [
                {"role": pick.choice(["user", "tool"]), "content": "x" * pick.randrange(2000), "n": None}
                for _ in range(pick.randrange(4))
            ],
            "image": {"bytes": bytes(pick.randrange(3000)), "path": None},
            "pixels": [[pick.randrange(256) for _ in range(4)] for _ in range(pick.randrange(3))],
            "names": pick.choice([None, [], ["a", "b" * 90]]),
            "nothing": None,
        }
        for _ in range(700)
    ]
    table = pyarrow.Table.from_pylist(rows)
    pairs = pyarrow.array([[("k", "v" * n)] for n in range(700)], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    fixed = pyarrow.array([["a", "b" * n] for n in range(700)], pyarrow.list_(pyarrow.string(), 2))
    views = pyarrow.array([None if n % 3 == 0 else "v" * n for n in range(700)], pyarrow.string_view())
    packed = pyarrow.array(["p" * (n % 5) for n in range(700)]).dictionary_encode()
    for name, column in (("pairs", pairs), ("fixed", fixed), ("views", views), ("packed", packed)):
        table = table.append_column(name, column)
    return table


_OPTIONS = [
    {},
    {"data_page_version": "2.0", "compression": "zstd", "row_group_size": 100},
    {"use_dictionary": False, "compression": "gzip", "data_page_size": 1000},
    {"compression": "none", "dictionary_pagesize_limit": 1000, "write_batch_size": 16},
    {"compression": "lz4", "use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    {"compression": "brotli", "write_page_index": True, "store_schema": False},
]


@pytest.mark.parametrize("options", _OPTIONS)
@pytest.mark.parametrize("budget", [2**26, 2000])
@pytest.mark.each_value
def test_parquet_of_every_kind_gives_its_rows(options, budget, tmp_path, monkeypatch):
    """Also where columns are read as dictionaries, in batches of a row."""
    monkeypatch.setattr(arrow_rows, "_BATCH_BYTES", budget)
    table, path = _table().slice(37, 150), tmp_path / "d.parquet"
    if options.get("column_encoding"):
        table = table.drop_columns(["packed"])
    pyarrow.parquet.write_table(table, path, **options)
    assert [row for _, row in read_rows(str(path))] == table.to_pylist()


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("form", ["file", "stream"])
def test_arrow_of_every_kind_gives_its_rows(form: str, compression: str | None, tmp_path: Path) -> None:
    table, path = _table(), tmp_path / "d.arrow"
    hostile_files.write_arrow(path, table, compression, form, max_chunksize=300)
    assert [row for _, row in read_rows(str(path))] == table.to_pylist()


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damaged_files_are_refused_or_read(kind: str, tmp_path: Path) -> None:
    path, table = tmp_path / f"d.{kind}", _table().slice(0, 40)
    write = hostile_files.write_parquet if kind == "parquet" else hostile_files.write_arrow
    write(path, table, compression="zstd")
    whole, pick = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(100):
        at = pick.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([pick.randrange(256)]) + whole[at + 1 :])
        try:
            read_rows(str(path))
        except UserError:
            refused += 1
    assert refused > 20


# A JSON list, read as it is parsed


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_a_json_list_gives_the_same_rows_however_it_is_read(block, tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "_BLOCK", block)
    pick = random.Random(block)
    path = tmp_path / "d.json"
    for _ in range(30):
        values = [None, True, -1.5e-9, 12345, 'é\\"\n\u2028', [], {"a": [1, {"b": "]}"}]}, float("-inf")]
        rows = [{f"k{n}": pick.choice(values) for n in range(pick.randrange(4))} for _ in range(5)]
        ascii, indent = pick.random() < 0.5, pick.choice([None, 1])
        path.write_text("\ufeff" * (block % 2) + json.dumps(rows, ensure_ascii=ascii, indent=indent) + " \n")
        assert [row for _, row in read_rows(str(path))] == rows


@pytest.mark.parametrize(
    ("text", "said", "where"),
    [
        ('[{"a": 1},\n {"a": tru}]', "Expecting value", "row 2 (line 2)"),
        ('[{"a": 1}\n {"a": 2}]', "Expecting ',' delimiter", "row 1 (line 2)"),
        ('[{"a": 1},', "Expecting value", "row 2 (line 1)"),
        ('[{"a": 1}, {"a": "b', "Unterminated string", "row 2 (line 1)"),
        ('[{"a": 1}]\n\n{"a": 2}', "Extra data", "(line 3)"),
        ('[{"a": ' + "[" * 5000 + "]" * 5000 + "}]", f"more than {LEVELS} levels", "row 1 (line 1)"),
        ('[{"a": ' + "[" * 200 + "]" * 200 + "}]", f"more than {LEVELS} levels", "row 1 (line 1)"),
        ('[{"a": ' + "9" * 5000 + "}]", "integer string conversion", "row 1 (line 1)"),
    ],
)
@pytest.mark.parametrize("block", [1, 2**18])
def test_what_is_wrong_with_a_json_list_is_said_with_its_row(text, said, where, block, tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "_BLOCK", block)
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_rows(str(path))
    assert said in refused.value.what and where in str(refused.value.where)


# Values


@pytest.mark.parametrize("levels", [LEVELS + 1, 300, 985, 5000])
@pytest.mark.parametrize("row", ['{"text": X}', '{"text": "a", "more": X}', '{"messages": [X]}'])
def test_rows_of_many_levels_are_bad_rows(levels: int, row: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(row.replace("X", "[" * levels + "]" * levels) + '\n{"text": "b"}\n{"messages": 1}\n')
    with pytest.raises(UserError, match="levels"):
        prepare(DataSettings(str(path), eval=None), make_tokenizer())
    found = prepare(DataSettings(str(path), eval=None, bad_rows="skip", form="text"), make_tokenizer())
    assert len(found.train) == 1 and found.report.bad_rows["not JSON"] == 1


def test_arguments_of_many_levels_stay_text(tmp_path: Path) -> None:
    """JSON text in a row is parsed too; a template would fail on these."""
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a":' * 500 + "1" + "}" * 500}}
    template = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.tool_calls | tojson }}<|im_end|>{% endfor %}"
    path = tmp_path / "d.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(UserError):
        prepare(DataSettings(str(path), eval=None), make_tokenizer(template))


def test_half_a_surrogate_pair_is_a_bad_row_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "\\ud800", "label": 1}\n{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n')
    settings = DataSettings(str(path), eval=None, bad_rows="skip")
    assert len(LabelReader(settings, make_tokenizer(), "regression").prepared().train) == 2


def test_numbers_beyond_floats_are_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    huge = "9" * 4000
    path.write_text(f'{{"prompt": "p", "chosen": "a", "rejected": "b", "margin": {huge}}}\n')
    with pytest.raises(UserError, match="'margin' must be a number"):
        RewardReader(DataSettings(str(path), eval=None), make_tokenizer()).prepared()
    path.write_text(f'{{"text": "a", "label": {huge}}}\n{{"text": "b", "label": 1}}\n')
    assert look_at(str(path)).task == "sequence-classification"


def test_what_is_said_of_a_row_does_not_repeat_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "x" * 50_000, "content": "a"}]}) + "\n")
    with pytest.raises(UserError) as refused:
        prepare(DataSettings(str(path), eval=None), make_tokenizer())
    assert "the role is 'xxx" in refused.value.what and len(str(refused.value)) < 2000


def test_names_of_columns_do_not_add_up_without_end(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"{n:090}": 1}}\n' for n in range(99)))
    with pytest.raises(UserError, match="the names of the rows' columns") as refused:
        open_source(str(path), max_bytes=1000).scan()
    assert refused.value.where == f"{path}, row 12"


def test_rows_kept_in_memory_are_refused_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a", "label": 1}\n' * 1000)
    monkeypatch.setattr(sources, "_LOOK_BYTES", 2000)
    assert len(read_rows(str(path))) == 1000
    monkeypatch.setattr(sources, "free_memory_bytes", lambda: 2**20)
    with pytest.raises(UserError, match="do not fit into memory") as refused:
        read_rows(str(path))
    assert refused.value.where == str(path)
    (tmp_path / "d.csv").write_text("text,label\n" + "a,1\n" * 1000)
    with pytest.raises(UserError, match="do not fit into memory"):
        read_rows(str(tmp_path / "d.csv"))


def test_few_rows_of_very_many_are_chosen_in_little_memory() -> None:
    assert len(choose(10**12, 10, 0)) == 10


# Images and packages


def _read_one(image: object) -> None:
    rows = sources.Rows("d", [("d", [1], [{"image": image}])])
    list(read_images(rows, [0], LabelColumns("label", image="image"), [0]))


def test_images_of_formats_that_run_programs_are_not_opened(tmp_path: Path) -> None:
    """Pillow hands PostScript to Ghostscript."""
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path, "EPS")
    for image in (path, path.read_bytes()):
        with pytest.raises(UserError, match="unknown image format"):
            _read_one(image)


def test_an_image_that_is_no_file_or_larger_than_any_is_refused(tmp_path, monkeypatch):
    if os.path.exists("/dev/zero"):
        with pytest.raises(UserError, match="is not a file"):
            _read_one(Path("/dev/zero"))
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(path)
    _read_one(path)
    monkeypatch.setattr(pixels, "_MOST_BYTES", 1000)
    with pytest.raises(UserError, match="has more than 1,000 bytes"):
        _read_one(path)


def test_an_image_of_more_pixels_than_pillow_allows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name in ("a/0.png", "b/0.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (100, 100)).save(tmp_path / name)
    rows, _ = image_rows(str(tmp_path))
    with pytest.raises(UserError, match="decompression bomb"):
        list(read_images(rows, [0], LabelColumns("label", image="image"), [0]))


def test_a_batch_of_images_is_resized_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit", "image_size": 8, "patch_size": 4}')
    encoder = ImageEncoder(tmp_path)
    draw = np.random.default_rng(0)
    examples = [ImageExample(n, draw.integers(0, 255, (9 + n, 20, 3), np.uint8), 0) for n in range(3)]
    whole = encoder._encode([example.decoded() for example in examples])
    seen: list[int] = []
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda images: seen.append(len(images)) or encode(images))
    assert (encoder.encode(examples) == whole).all() and seen == [1, 1, 1]


@pytest.mark.parametrize("fault", ["encrypted", "cut", "long name"])
def test_a_wheel_with_a_member_that_cannot_be_unpacked_is_refused(fault, tmp_path, monkeypatch):
    path = tmp_path / "w.whl"
    name = "some/" + ("n" * 300 if fault == "long name" else "d.jsonl")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, "abc" * 1000)
    data = bytearray(path.read_bytes())
    if fault == "encrypted":
        at = data.index(b"PK\x01\x02")
        data[6] |= 1
        data[at + 8] |= 1
    if fault == "cut":
        at = data.index(b"PK\x01\x02") - 8
        data[at : at + 8] = b"\xff" * 8
    path.write_bytes(data)
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "_download_with_pip", lambda wanted, folder: path)
    with pytest.raises(UserError, match="name too long" if fault == "long name" else "the wheel is damaged"):
        packages.member(f"pypi:some==1.0/{name}")
