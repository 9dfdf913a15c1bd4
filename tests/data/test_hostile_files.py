"""Files that are small on disk and large in memory are rejected before they are loaded."""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import json
import lzma
import os
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, PngImagePlugin

from deltaw.data import arrow_rows, formats, image_files, row_files, sources
from deltaw.data.images import ImageEncoder
from deltaw.data.pixels import ImageExample, LabelColumns, read_images
from deltaw.data.prepare import prepare
from deltaw.data.report import TOO_LONG
from deltaw.data.row_files import LEVELS
from deltaw.data.sources import choose_rows, open_source, read_rows
from deltaw.errors import UserError
from deltaw.hub import packages
from deltaw.reports.starter import preview_data
from deltaw.settings.data import DataSettings
from deltaw.tasks.classification.rows import LabelReader, RewardReader
from tests.data.conftest import make_tokenizer, refusal
from tests.data.hostile_files import HOSTILE, write_arrow, write_parquet

_MEASURED = """
import json, os, resource, sys
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
    with os.fdopen(receive) as pipe:
        answer = pipe.read()
    os.wait()
    return json.loads(answer or "null")

def read(path, max_bytes):
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    try:
        stream = open_source(str(path), max_bytes=max_bytes)
        stream.scan()
        result, location = sum(len(chunk) for chunk in stream.chunks()), None
    except UserError as error:
        result, location = error.message, error.location
    decoder_peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return result, location, peak_resident_bytes() - before, decoder_peak

folder = Path(sys.argv[1])
results = {}
pyarrow.table({"text": ["a"]})  # import modules that would count as memory of each file
for name, (make, *_) in HOSTILE.items():
    in_child(lambda: make(folder / name))
    results[name] = in_child(lambda: read(folder / name, 2**20))
results["by default"] = in_child(lambda: read(folder / "line.jsonl.gz", 16 * 2**20))
print(json.dumps(results))
"""
_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str | int, str | None, int, int]]:
    """Message or number of rows, location, and peak memory of reading each hostile file and of its decoder."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = os.pathsep.join([str(_ROOT), str(_ROOT / "src")])
    command = [sys.executable, "-c", _MEASURED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a peak is reset through Linux's /proc")
@pytest.mark.parametrize("name", [*HOSTILE, "by default"])
def test_expanding_file_is_rejected_within_little_memory(name: str, measured: dict) -> None:
    """Without a limit, reading these files takes 100 MB to 8 GB."""
    result, location, peak, decoder_peak = measured[name]
    _, expected, expected_location = HOSTILE.get(name, (None, "line 2 has more than the 16,777,216 bytes", "line 2"))
    assert result == expected or (expected in str(result) and expected_location in location)
    assert peak < 80 * 2**20, f"{peak / 2**20:.0f} MiB"
    assert decoder_peak < 640 * 2**20, f"{decoder_peak / 2**20:.0f} MiB"


# Skipping long rows


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
        lambda settings: prepare(settings, tokenizer),
        lambda settings: LabelReader(settings, tokenizer, "sequence-classification").prepare(),
        lambda settings: RewardReader(settings, tokenizer).prepare(),
    ):
        assert "line 1 has more than the 99 bytes" in refusal(read, short).message
    assert len(prepare(long, tokenizer).train) == 2


# Decoding in proportion


@pytest.mark.parametrize("name", ["text.parquet", "list.parquet", "beginnings.parquet", "text.arrow"])
def test_high_expansion_ratio_is_rejected(name, tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_rows, "MIN_DECODED_BYTES", 2**20)
    HOSTILE[name][0](tmp_path / name)
    error = refusal(open_source(str(tmp_path / name), lambda *args: None).scan)
    assert "bytes of the file become" in error.message
    assert "group 1 of rows" in str(error.location) or "message 1" in str(error.location)


@functools.cache
def _table() -> pyarrow.Table:
    """Return a table with every kind of column, with nulls, empty lists and repeated values."""
    pick = random.Random(0)
    count = 250
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
        for _ in range(count)
    ]
    text = pyarrow.string()
    more = {
        "pairs": pyarrow.array([[("k", "v" * n)] for n in range(count)], pyarrow.map_(text, text)),
        "fixed": pyarrow.array([["a", "b" * n] for n in range(count)], pyarrow.list_(text, 2)),
        "views": pyarrow.array([None if n % 3 == 0 else "v" * n for n in range(count)], pyarrow.string_view()),
        "packed": pyarrow.array(["p" * (n % 5) for n in range(count)]).dictionary_encode(),
    }
    table = pyarrow.Table.from_pylist(rows)
    return pyarrow.table({**{name: table[name] for name in table.column_names}, **more})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data_page_version": "2.0", "compression": "zstd", "row_group_size": 100},
        {"use_dictionary": False, "compression": "gzip", "data_page_size": 1000},
        {"compression": "none", "dictionary_pagesize_limit": 1000, "write_batch_size": 16},
        {"compression": "lz4", "use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        {"compression": "brotli", "write_page_index": True, "store_schema": False},
    ],
)
@pytest.mark.parametrize("batch_rows", [1024, 1])
def test_parquet_variants_return_all_rows(options, batch_rows, tmp_path, monkeypatch):
    """In batches of one row, text is read as dictionaries."""
    monkeypatch.setattr(arrow_rows, "_ATTEMPTS", (batch_rows,))
    table = _table().slice(37, 110)
    path = tmp_path / "d.parquet"
    if options.get("column_encoding"):
        table = table.drop_columns(["packed"])
    pyarrow.parquet.write_table(table, path, **options)
    assert [row for _, row in read_rows(str(path))] == table.to_pylist()


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("form", ["file", "stream"])
@pytest.mark.each_value
def test_arrow_variants_return_all_rows(form: str, compression: str | None, tmp_path: Path) -> None:
    table = _table()
    path = tmp_path / "d.arrow"
    write_arrow(path, table, compression, form, max_chunksize=100)
    assert [row for _, row in read_rows(str(path))] == table.to_pylist()


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_damaged_files_raise_user_error_or_are_read(write: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / f"d.{write.__name__.removeprefix('write_')}"
    write(path, _table().slice(0, 40), compression="zstd")
    content = path.read_bytes()
    pick = random.Random(0)
    rejected = 0
    for _ in range(16):  # each starts a process
        offset = pick.randrange(len(content))
        path.write_bytes(content[:offset] + bytes([pick.randrange(256)]) + content[offset + 1 :])
        try:
            read_rows(str(path))
        except UserError:
            rejected += 1
    assert rejected > 3


def test_batch_that_exceeds_the_limit_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the group that precede the batch are not repeated."""
    monkeypatch.setattr(arrow_rows, "MIN_DECODED_BYTES", 16 * 2**20)
    monkeypatch.setattr(arrow_rows, "MAX_EXPANSION", 1)
    texts = [*map(str, range(1500)), *["a" * 2**19] * 100, *map(str, range(1500))]
    write_parquet(tmp_path / "d.parquet", pyarrow.table({"text": texts}), row_group_size=2000)
    assert [row["text"] for _, row in read_rows(str(tmp_path / "d.parquet"))] == texts


@pytest.fixture
def started(tmp_path: Path) -> tuple[Generator[Any, None, None], psutil.Process]:
    """A reader after the first row of a file with several batches, and the process that decodes the file."""
    path = tmp_path / "d.parquet"
    write_parquet(path, pyarrow.table({"text": ["a" * 1000] * 5000}))
    before = set(psutil.Process().children())
    rows = arrow_rows.read_arrow(path, "d.parquet", "parquet", None)
    next(rows)
    (decoder,) = set(psutil.Process().children()) - before
    return rows, decoder


def test_killed_decoder_raises_user_error(started: tuple[Generator[Any, None, None], psutil.Process]) -> None:
    rows, decoder = started
    decoder.kill()
    error = refusal(list, rows)
    assert "exited with status" in error.message and error.location == "d.parquet" and error.hint


def test_closed_reader_stops_its_decoder(started: tuple[Generator[Any, None, None], psutil.Process]) -> None:
    rows, decoder = started
    rows.close()
    assert not decoder.is_running()


# A JSON list, read as it is parsed


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_json_list_rows_do_not_depend_on_the_block_size(block, write, monkeypatch):
    monkeypatch.setattr(row_files, "_BLOCK", block)
    pick = random.Random(block)
    values = [None, True, -1.5e-9, 12345, 'é\\"\n\u2028', [], {"a": [1, {"b": "]}"}]}, float("-inf")]
    for _ in range(30):
        rows = [{f"k{n}": pick.choice(values) for n in range(pick.randrange(4))} for _ in range(5)]
        text = json.dumps(rows, ensure_ascii=pick.random() < 0.5, indent=pick.choice([None, 1]))
        path = write("\ufeff" * (block % 2) + text + " \n", "d.json")
        assert [row for _, row in read_rows(path)] == rows


@pytest.mark.parametrize(
    ("text", "message", "location"),
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
def test_json_list_error_has_a_row_location(text, message, location, block, write, monkeypatch):
    monkeypatch.setattr(row_files, "_BLOCK", block)
    error = refusal(read_rows, write(text, "d.json"))
    assert message in error.message and location in str(error.location)


# Values


@pytest.mark.parametrize("levels", [LEVELS + 1, 985, 5000])
@pytest.mark.parametrize("row", ['{"text": X}', '{"text": "a", "more": X}', '{"messages": [X]}'])
def test_deeply_nested_rows_are_bad_rows(levels: int, row: str, write) -> None:
    path = write(row.replace("X", "[" * levels + "]" * levels) + '\n{"text": "b"}\n{"messages": 1}\n')
    assert "levels" in refusal(prepare, DataSettings(path, eval=None), make_tokenizer()).message
    data = prepare(DataSettings(path, eval=None, bad_rows="skip", form="text"), make_tokenizer())
    assert len(data.train) == 1 and data.report.bad_rows["not JSON"] == 1


def test_deeply_nested_arguments_are_not_parsed(write) -> None:
    """JSON text in a row is parsed too. A template would fail on such arguments."""
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a":' * 500 + "1" + "}" * 500}}
    template = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.tool_calls | tojson }}<|im_end|>{% endfor %}"
    path = write([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}])
    refusal(prepare, DataSettings(path, eval=None), make_tokenizer(template))


def test_unrepresentable_values_are_bad_rows(write) -> None:
    path = write('{"text": "\\ud800", "label": 1}\n{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n')
    settings = DataSettings(path, eval=None, bad_rows="skip")
    assert len(LabelReader(settings, make_tokenizer(), "regression").prepare().train) == 2
    huge = "9" * 4000
    path = write(f'{{"prompt": "p", "chosen": "a", "rejected": "b", "margin": {huge}}}\n')
    reader = RewardReader(DataSettings(path, eval=None), make_tokenizer())
    assert "'margin' must be a number" in refusal(reader.prepare).message
    path = write(f'{{"text": "a", "label": {huge}}}\n{{"text": "b", "label": 1}}\n')
    assert preview_data(path).task == "sequence-classification"


def test_row_error_truncates_long_values(write) -> None:
    path = write([{"messages": [{"role": "x" * 50_000, "content": "a"}]}])
    error = refusal(prepare, DataSettings(path, eval=None), make_tokenizer())
    assert "the role is 'xxx" in error.message and len(str(error)) < 2000


def test_total_length_of_column_names_is_limited(write) -> None:
    path = write([{f"{n:090}": 1} for n in range(99)])
    error = refusal(open_source(path, max_bytes=1000).scan)
    assert "the column names of the rows" in error.message and error.location == f"{path}, row 12"


@pytest.mark.parametrize(
    ("name", "text"), [("d.jsonl", '{"text": "a", "label": 1}\n' * 1000), ("d.csv", "text,label\n" + "a,1\n" * 1000)]
)
def test_rows_that_exceed_free_memory_are_rejected(name: str, text: str, write, monkeypatch) -> None:
    path = write(text, name)
    monkeypatch.setattr(sources, "_CHECK_BYTES", 2000)
    assert len(read_rows(path)) == 1000
    monkeypatch.setattr(sources, "free_memory_bytes", lambda: 2**20)
    error = refusal(read_rows, path)
    assert "do not fit into memory" in error.message and error.location == path


def test_sampling_few_of_many_rows_needs_little_memory() -> None:
    assert len(choose_rows(10**12, 10, 0)) == 10


# Images and packages


def _read_one(image: object) -> None:
    rows = sources.NumberedRows("d", [("d", [1], [{"image": image}])])
    list(read_images(rows, [0], LabelColumns("label", image="image"), [0]))


def _encoded(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (_encoded("ICO"), "ICO"),
        (_encoded("JPEG2000"), "JPEG 2000"),
        (b"\0\0\0\x18ftypavif" + bytes(40), "AVIF"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        (b'<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"<?>" * 10_000, "unknown"),
    ],
)
def test_unsupported_image_formats_are_rejected_by_name(content: bytes, name: str) -> None:
    error = refusal(_read_one, content)
    assert f"{name} " in error.message and "PNG" in str(error.hint)


def _many_scans() -> bytes:
    jpeg = _encoded("JPEG", progressive=True)
    start = jpeg.index(b"\xff\xda")
    return jpeg[:-2] + jpeg[start:-2] * 100 + jpeg[-2:]


def _many_strips(count: int = 70_000) -> bytes:
    after = 8 + 2 + 8 * 12 + 4
    tags = [(256, 16), (257, 16), (258, 8), (259, 1), (262, 1), (278, 1)]
    entries = [(tag, 4, 1, value) for tag, value in tags] + [(tag, 4, count, after) for tag in (273, 279)]
    body = b"".join(struct.pack(">HHLL", *entry) for entry in sorted(entries))
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + body + bytes(4) + b"\0\0\0\x08" * count


def _large_text() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "a" * (1 << 23), zip=True)
    return _encoded("PNG", pnginfo=text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_many_scans(), "100 scans"),
        (_many_strips(), "65,536 strips"),
        (_large_text(), "too large"),
        (_encoded("PNG", exif=b"Exif\0\0MM"), "cannot be decoded"),
    ],
)
@pytest.mark.filterwarnings("ignore:Tag data larger")
def test_images_that_take_long_to_decode_or_are_damaged_are_rejected(content: bytes, words: str) -> None:
    assert words in refusal(_read_one, content).message


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_images_are_decoded_or_rejected(kind: str) -> None:
    original = _encoded(kind)
    rng = np.random.default_rng(0)
    for _ in range(150):
        content = np.frombuffer(original, np.uint8).copy()
        places = rng.integers(0, min(len(content), 400), rng.integers(1, 6))
        content[places] = rng.integers(0, 256, len(places))
        with contextlib.suppress(UserError):
            image_files.decode(content.tobytes()[: rng.integers(1, 2 * len(content))], "a")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_first_frame_of_an_animation_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (value, value, value)) for value in (250, 10)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    assert np.asarray(image_files.decode(file.getvalue(), "a").convert("L")).min() > 240


def test_unsafe_or_oversized_images_are_not_opened(tmp_path, monkeypatch):
    """Pillow passes PostScript to Ghostscript."""
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path, "EPS")
    for image in (path, path.read_bytes()):
        assert "unknown image format" in refusal(_read_one, image).message
    if os.path.exists("/dev/zero"):
        assert "is not a file" in refusal(_read_one, Path("/dev/zero")).message
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(path)
    _read_one(path)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        assert "it has more than 178,956,970 pixels" in refusal(_read_one, path).message
    monkeypatch.setattr(image_files, "_MAX_IMAGE_BYTES", 1000)
    assert "has more than 1,000 bytes" in refusal(_read_one, path).message


def test_images_of_a_batch_are_resized_individually(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit", "image_size": 8, "patch_size": 4}')
    encoder = ImageEncoder(tmp_path)
    draw = np.random.default_rng(0)
    examples = [ImageExample(n, draw.integers(0, 255, (9 + n, 20, 3), np.uint8), 0) for n in range(3)]
    expected = encoder._encode([example.decoded() for example in examples])
    batch_sizes: list[int] = []
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda images: batch_sizes.append(len(images)) or encode(images))
    assert (encoder.encode(examples) == expected).all() and batch_sizes == [1, 1, 1]


@pytest.mark.parametrize("fault", ["encrypted", "cut", "long name"])
def test_wheel_with_an_invalid_member_is_rejected(fault, tmp_path, monkeypatch):
    path = tmp_path / "w.whl"
    name = "some/" + ("n" * 300 if fault == "long name" else "d.jsonl")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, "abc" * 1000)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    if fault == "encrypted":
        data[6] |= 1
        data[at + 8] |= 1
    if fault == "cut":
        data[at - 8 : at] = b"\xff" * 8
    path.write_bytes(data)
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "_download_with_pip", lambda reference, folder: path)
    error = refusal(packages.member, f"pypi:some==1.0/{name}")
    assert ("name too long" if fault == "long name" else "the wheel is damaged") in error.message


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_compressed_text_may_not_expand_out_of_proportion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    module = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix]
    path = tmp_path / f"d.json{suffix}"
    path.write_bytes(module.compress(b"[" + b'{"text":"a"},' * 100_000 + b'{"text":"a"}]'))
    assert len(read_rows(str(path))) == 100_001
    monkeypatch.setattr(row_files, "MIN_EXPANDED_BYTES", 2**20)
    assert "256 times its size" in refusal(read_rows, str(path)).message


def test_number_of_columns_is_limited_and_names_are_compared_in_linear_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d.csv"
    path.write_text(",".join(f"c{i}" for i in range(3000)) + "\n" + ",".join(["x"] * 3000) + "\n")
    compared: list[str] = []
    monkeypatch.setattr(formats, "did_you_mean", lambda name, names: compared.append(name) or "")
    assert "no format" in refusal(preview_data, str(path)).message
    assert len(compared) <= 100
    monkeypatch.setattr(row_files, "MAX_COLUMNS", 2999)
    assert "3,000 columns" in refusal(read_rows, str(path)).message
