"""Rows with images: a folder for each class, encoded images in a column, arrays, or a table of pixels.

Every image is decoded once when it is read, so that a broken one is found before training. The path, the
encoded bytes or 8-bit pixels stay in memory. It knows no model and no preprocessor.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from deltaw.data.classes import LabelColumns
from deltaw.data.example import LabeledExample
from deltaw.data.report import MAX_ROW_BYTES, BadRowError, Refuse, refuse
from deltaw.data.row_files import OnBad
from deltaw.data.sources import KINDS, Rows, read_rows, walk
from deltaw.errors import UserError
from deltaw.hub import packages

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
_PARTS = frozenset(("train", "training", "test", "val", "valid", "validation", "dev", "eval"))
# What images are decoded as; Pillow knows more formats, some of which run other programs.
_FORMATS = frozenset(
    ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
)
# The most bytes of an image file: about three times the most pixels that Pillow decodes.
_MOST_BYTES = 2**29
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class ImageExample:
    """One image with the number of its class.

    Attributes:
        row: number of the row in its file, or of the file in its folder, from 1.
        image: uint8 (height, width) or (height, width, channels); or a file; or an encoded image.
        label: index of the class.
        size: height and width in pixels.
        digest: hash of the content.
    """

    row: int
    image: np.ndarray | Path | bytes
    label: int
    size: tuple[int, int] = (0, 0)
    digest: bytes = field(default=b"", repr=False)

    def __len__(self) -> int:
        return 1

    @property
    def label_count(self) -> int:
        return 1

    def decoded(self) -> Image.Image:
        """The image, upright.

        Raises:
            UserError: it has become unreadable since it was read.
        """
        return decode(self.image, str(self.image) if isinstance(self.image, Path) else f"row {self.row}")


# A labeled row, of text or with an image.
AnyExample = LabeledExample | ImageExample


def image_rows(
    reference: str, on_bad: OnBad | None = None, *, max_bytes: int = MAX_ROW_BYTES, labeled: bool = True
) -> tuple[Rows, int]:
    """Read a folder with a subfolder for each class, or whatever :func:`read_rows` reads.

    Args:
        labeled: False to read all images of a folder, in any subfolders.

    Returns:
        the rows (of a folder: ``image`` is a path, ``label`` the subfolder), and the number of files in the
        folder that are not images and were skipped.

    Raises:
        UserError: there is no such file or folder, a class's folder has no image, or the data cannot be read.
    """
    path = packages.local_path(reference)
    if not path.is_dir():
        return read_rows(reference, on_bad, max_bytes=max_bytes), 0
    if not labeled and (images := [file for file in walk(path) if file.suffix.lower() in IMAGE_SUFFIXES]):
        rows: list[dict[str, object]] = [{"image": file} for file in images]
        return Rows(reference, [(reference, range(1, len(rows) + 1), rows)], ["image"]), 0
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    folders = [entry for entry in entries if entry.is_dir()]
    if any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries):
        hint = "put the images of each class into a subfolder named after it"
        raise UserError("images are in the folder itself, where nothing gives their class", where=reference, hint=hint)
    if not folders or any(entry.suffix.lower() in KINDS for entry in entries if entry.is_file()):
        return read_rows(reference, on_bad, max_bytes=max_bytes), 0
    if _PARTS.issuperset(folder.name.lower() for folder in folders):
        what = f"the folder holds splits of a data set, not classes: {', '.join(f.name for f in folders)}"
        hint = f"set data.train: {reference.rstrip('/')}/{folders[-1].name}, and data.eval to another"
        raise UserError(what, where=reference, hint=hint)
    rows = []
    others = sum(entry.is_file() for entry in entries)
    for folder in folders:
        files = walk(folder)
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            what = f"the folder of the class '{folder.name}' has no image"
            hint = "put its images there, or remove the folder; images end in " + ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(what, where=f"{reference.rstrip('/')}/{folder.name}", hint=hint)
        others += len(files) - len(images)
        rows += [{"image": file, "label": folder.name} for file in images]
    return Rows(reference, [(reference, range(1, len(rows) + 1), rows)], ["image", "label"]), others


def read_images(
    rows: Rows, indices: Sequence[int], columns: LabelColumns, labels: Sequence[int], on_bad: Refuse = refuse
) -> Iterator[ImageExample | None]:
    """The images of the rows at ``indices``, whose classes are ``labels``; None for one that ``on_bad`` was
    told of.

    Raises:
        UserError: an image cannot be read, or the arrays of a file differ in shape; with the row or path.
    """
    count, shape = len(columns.pixels), None
    if math.isqrt(count) ** 2 != count:
        what = f"{count:,} columns besides the label '{columns.label}' do not make a square image"
        hint = "a table of pixels has height × width columns and the label; name the label's column in data.columns: "
        raise UserError(what, where=rows.name, hint=hint + "{label: …}, or a column of images in {image: …}")
    for place, (index, label) in enumerate(zip(indices, labels, strict=True)):
        try:
            image, is_array = _given(rows, index, columns)
            where = str(image) if isinstance(image, Path) else rows.place(index)
            if isinstance(image, np.ndarray):
                if is_array and shape is not None and image.shape != shape:
                    hint = "arrays of one file must have one shape; give images of different sizes as files"
                    what = f"the image is {_by(image.shape)}, those before it {_by(shape)}"
                    raise UserError(what, where=where, hint=hint)
                shape = image.shape if is_array else shape
                size, content = (image.shape[0], image.shape[1]), image.tobytes() + repr(image.shape).encode()
            else:
                content = _content(image, where)
                size = _searched(content, where)
        except UserError as error:
            reason = "an image that cannot be read"
            on_bad(place, BadRowError(error.what, reason=reason, where=error.where, hint=error.hint))
            yield None
            continue
        yield ImageExample(rows.number(index), image, label, size, hashlib.blake2b(content, digest_size=16).digest())


def _given(rows: Rows, index: int, columns: LabelColumns) -> tuple[np.ndarray | Path | bytes, bool]:
    """A row's image, and whether it is given as an array.

    One column holds paths, encoded bytes, decoded images or lists of numbers; or a table has a column for each pixel
    of a square grayscale image, row by row.
    """
    row, where = rows[index][1], rows.place(index)
    if columns.pixels:
        try:
            return _array([float(row.get(column)) for column in columns.pixels], where), True  # type: ignore[arg-type]
        except (ValueError, TypeError) as error:
            hint = "if a column is the label, name it in data.columns: {label: …}"
            raise UserError(f"a pixel is not a number: {error}", where=where, hint=hint) from error
    value = row.get(str(columns.image))
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Path | bytes):
        return value, False
    if isinstance(value, str) and value:
        return Path(os.path.expanduser(rows.file(index))).parent / value, False
    if isinstance(value, Image.Image):
        return np.asarray(value.convert("L" if value.mode in ("1", "L") else "RGB")), False
    if isinstance(value, list | np.ndarray):
        return _array(value, where), True
    shown = "is empty" if value is None or value == "" else f"holds a {type(value).__name__}"
    hint = "give an encoded image, a path relative to the file's folder, or rows of numbers 0 to 255"
    raise UserError(f"'{columns.image}' {shown}, which is not an image", where=where, hint=hint)


def decode(image: np.ndarray | Path | bytes, where: str) -> Image.Image:
    """An image as RGB or grayscale ("L"), rotated upright by its EXIF orientation.

    Raises:
        UserError: it cannot be decoded.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    try:
        with _opened(_content(image, where)) as opened:
            upright = ImageOps.exif_transpose(opened)
            mode = "L" if upright.mode in ("1", "L") else "RGB"
            return upright if upright.mode == mode else upright.convert(mode)
    except _BROKEN as error:
        raise _broken(error, where) from error


def _content(image: Path | bytes, where: str) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        if not image.is_file() or image.stat().st_size > _MOST_BYTES:
            found = f"has more than {_MOST_BYTES:,} bytes" if image.is_file() else "is not a file"
            raise UserError(f"the image {found}", where=where, hint="check its path")
        return image.read_bytes()
    except OSError as error:
        what = f"the image cannot be read: {error.strerror or error}"
        raise UserError(what, where=where, hint="check its path") from error


def _opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=_known_formats())


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Those that this installation of Pillow decodes."""
    Image.init()
    return tuple(sorted(_FORMATS & Image.OPEN.keys()))


def _searched(content: bytes, where: str) -> tuple[int, int]:
    """Height and width of an encoded image, after decoding all of it."""
    try:
        with _opened(content) as opened:
            width, height = opened.size
            # JPEG can be decoded at an eighth of its size, which reads all of it in a fraction of the time.
            opened.draft(None, (max(1, width // 8), max(1, height // 8)))
            opened.load()
            turned = opened.getexif().get(0x0112, 1) >= 5
    except _BROKEN as error:
        raise _broken(error, where) from error
    return (width, height) if turned else (height, width)


def _array(value: object, where: str) -> np.ndarray:
    """8-bit pixels (height, width) or (height, width, channels) from nested or flat lists of numbers."""
    try:
        numbers = np.asarray(value).astype(np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        what = f"the pixels are not an array of numbers: {error}"
        raise UserError(what, where=where, hint="give height × width numbers") from error
    pixels = np.nan_to_num(numbers, nan=-1.0).clip(-1, 256).astype(np.int16)
    if numbers.size == 0 or pixels.min() < 0 or pixels.max() > 255 or (pixels != numbers).any():
        hint = "give 8-bit pixels; if another column is the label, name it in data.columns: {label: …}"
        raise UserError("the pixels are not integers from 0 to 255", where=where, hint=hint)
    if pixels.ndim == 1 and math.isqrt(pixels.size) ** 2 == pixels.size:
        pixels = pixels.reshape(math.isqrt(pixels.size), -1)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        hint = "give height × width, or height × width × 3"
        raise UserError(f"an array of {_by(pixels.shape)} is not an image", where=where, hint=hint)
    return np.ascontiguousarray(pixels, dtype=np.uint8)


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(str(side) for side in shape)


def _broken(error: BaseException, where: str) -> UserError:
    said = "unknown image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
    return UserError(f"the image cannot be decoded: {said}", where=where, hint="replace or remove it")
