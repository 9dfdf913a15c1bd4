"""Images and packages that are small on disk and large in memory are rejected."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from deltaw.data import compressed_files, formats, image_files, sources, tables
from deltaw.data.images import ImageEncoder
from deltaw.data.pixels import ImageExample, LabelColumns, read_images
from deltaw.data.sources import read_rows
from deltaw.errors import UserError
from deltaw.hub import packages
from deltaw.reports.starter import preview_data
from tests.data.conftest import refusal


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
    monkeypatch.setattr(compressed_files, "MIN_EXPANDED_BYTES", 2**20)
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
    monkeypatch.setattr(tables, "MAX_COLUMNS", 2999)
    assert "3,000 columns" in refusal(read_rows, str(path)).message
