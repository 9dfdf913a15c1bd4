"""Image rows: class folders, encoded images in a column, arrays, or tables of pixels.

Every image is decoded once when it is read, so that damaged images are found before training. Paths, encoded bytes or
8-bit pixels remain in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from deltaw.data.bad_rows import OnBad, OnBadRow, raise_error
from deltaw.data.example import LabeledExample
from deltaw.data.image_files import BROKEN, decode, decode_error, image_of, open_image, read_content, unreadable_image
from deltaw.data.row_files import KINDS
from deltaw.data.rows import NumberedRows
from deltaw.data.sources import read_rows, walk
from deltaw.errors import UserError
from deltaw.hub import packages
from deltaw.settings.data import MAX_ROW_BYTES

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
_PARTS = frozenset(("train", "training", "test", "val", "valid", "validation", "dev", "eval"))


@dataclass(frozen=True)
class LabelColumns:
    """Columns of labeled rows. Either ``text``, ``image`` or ``pixels`` (one column per pixel) is set."""

    label: str
    text: str | None = None
    text_pair: str | None = None
    image: str | None = None
    pixels: tuple[str, ...] = ()

    def texts(self) -> tuple[str, ...]:
        """Return the columns of the text or the two texts."""
        return tuple(column for column in (self.text, self.text_pair) if column)

    def used(self) -> set[str]:
        columns = (self.label, self.text, self.text_pair, self.image, *self.pixels)
        return {column for column in columns if column is not None}


@dataclass(frozen=True, eq=False)
class ImageExample:
    """One image with its class.

    Attributes:
        row: Row number in the file, or number of the file in the folder, from 1.
        image: (height, width) or (height, width, channels) uint8 pixels, a path, or an encoded image.
        label: Class index.
        size: Height and width in pixels.
        digest: Hash of the content.
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
        """Return the image in upright orientation.

        Raises:
            UserError: if it cannot be read anymore.
        """
        return decode(self.image, str(self.image) if isinstance(self.image, Path) else f"row {self.row}")


# Labeled text or image.
AnyExample = LabeledExample | ImageExample


def image_rows(
    reference: str, on_bad: OnBad | None = None, *, max_bytes: int = MAX_ROW_BYTES, labeled: bool = True
) -> tuple[NumberedRows, int]:
    """Read a folder with one subfolder per class, or any reference of :func:`read_rows`.

    Args:
        labeled: False to read all images of a folder and its subfolders.

    Returns:
        The rows, and the number of skipped files that are not images. For a folder, ``image`` is a path and ``label``
        the name of the subfolder.

    Raises:
        UserError: if the reference does not exist, a class folder has no image, or the data cannot be read.
    """
    path = packages.local_path(reference)
    if not path.is_dir():
        return read_rows(reference, on_bad, max_bytes=max_bytes), 0
    if not labeled and (images := [file for file in walk(path) if file.suffix.lower() in IMAGE_SUFFIXES]):
        rows: list[dict[str, object]] = [{"image": file} for file in images]
        return NumberedRows(reference, [(reference, range(1, len(rows) + 1), rows)], ["image"]), 0
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    folders = [entry for entry in entries if entry.is_dir()]
    if any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries):
        hint = "put the images of each class into a subfolder named after it"
        raise UserError("images in the folder itself have no class", location=reference, hint=hint)
    if not folders or any(entry.suffix.lower() in KINDS for entry in entries if entry.is_file()):
        return read_rows(reference, on_bad, max_bytes=max_bytes), 0
    if _PARTS.issuperset(folder.name.lower() for folder in folders):
        message = f"the folder has splits of a data set, not classes: {', '.join(f.name for f in folders)}"
        hint = f"set data.train: {reference.rstrip('/')}/{folders[-1].name}, and data.eval to another"
        raise UserError(message, location=reference, hint=hint)
    rows = []
    num_other_files = sum(entry.is_file() for entry in entries)
    for folder in folders:
        files = walk(folder)
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            message = f"the folder of the class '{folder.name}' has no image"
            hint = "put its images there, or remove the folder; images end in " + ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(message, location=f"{reference.rstrip('/')}/{folder.name}", hint=hint)
        num_other_files += len(files) - len(images)
        rows += [{"image": file, "label": folder.name} for file in images]
    return NumberedRows(reference, [(reference, range(1, len(rows) + 1), rows)], ["image", "label"]), num_other_files


def read_images(
    rows: NumberedRows,
    indices: Sequence[int],
    columns: LabelColumns,
    labels: Sequence[int],
    on_bad: OnBadRow = raise_error,
) -> Iterator[ImageExample | None]:
    """Yield the images of the rows at ``indices`` with their class indices, or None for rows that were passed to
    ``on_bad``.

    Raises:
        UserError: if an image cannot be read, or arrays of a file differ in shape. The message names the row or path.
    """
    count = len(columns.pixels)
    shape = None
    if math.isqrt(count) ** 2 != count:
        message = f"{count:,} columns besides the label '{columns.label}' do not make a square image"
        hint = "a table of pixels has height × width columns and the label; name the label's column in data.columns: "
        raise UserError(message, location=rows.name, hint=hint + "{label: …}, or a column of images in {image: …}")
    for position, (index, label) in enumerate(zip(indices, labels, strict=True)):
        try:
            image, is_array = _row_image(rows, index, columns)
            location = str(image) if isinstance(image, Path) else rows.row_location(index)
            if isinstance(image, np.ndarray):
                if is_array and shape is not None and image.shape != shape:
                    hint = "arrays of one file must have one shape; give images of different sizes as files"
                    message = f"the image is {_by(image.shape)}, those before it {_by(shape)}"
                    raise UserError(message, location=location, hint=hint)
                shape = image.shape if is_array else shape
                size = (image.shape[0], image.shape[1])
                content = image.tobytes() + repr(image.shape).encode()
            else:
                content = read_content(image, location)
                size = _decoded_size(content, location)
        except UserError as error:
            on_bad(position, unreadable_image(error))
            yield None
            continue
        yield ImageExample(rows.number(index), image, label, size, hashlib.blake2b(content, digest_size=16).digest())


def _row_image(rows: NumberedRows, index: int, columns: LabelColumns) -> tuple[np.ndarray | Path | bytes, bool]:
    """Return the image of a row, and True if it is an array.

    A column contains paths, encoded bytes, decoded images or lists of numbers. Alternatively, a table has one column
    per pixel of a square grayscale image, in row-major order.
    """
    row = rows[index][1]
    location = rows.row_location(index)
    if columns.pixels:
        try:
            return _array([float(row.get(column)) for column in columns.pixels], location), True  # type: ignore[arg-type]
        except (ValueError, TypeError) as error:
            hint = "if a column is the label, name it in data.columns: {label: …}"
            raise UserError(f"a pixel is not a number: {error}", location=location, hint=hint) from error
    value = row.get(str(columns.image))
    image = image_of(value, rows.folder(index), location)
    if isinstance(image, Image.Image):
        return np.asarray(decode(image, location)), False
    if image is not None:
        return image, False
    if isinstance(value, list | np.ndarray):
        return _array(value, location), True
    problem = "is empty" if value is None or value == "" else f"is a {type(value).__name__}"
    hint = "give an encoded image, a path relative to the file's folder, or rows of numbers 0 to 255"
    raise UserError(f"'{columns.image}' {problem}, which is not an image", location=location, hint=hint)


def _decoded_size(content: bytes, location: str) -> tuple[int, int]:
    """Return height and width of an encoded image, after decoding it completely."""
    try:
        with open_image(content) as opened:
            width, height = opened.size
            # Decoding JPEG at 1/8 scale reads the entire file in a fraction of the time.
            opened.draft(None, (max(1, width // 8), max(1, height // 8)))
            opened.load()
            turned = opened.getexif().get(0x0112, 1) >= 5
    except BROKEN as error:
        raise decode_error(error, location) from error
    return (width, height) if turned else (height, width)


def _array(value: object, location: str) -> np.ndarray:
    """Convert nested or flat lists of numbers to (height, width) or (height, width, channels) 8-bit pixels."""
    try:
        numbers = np.asarray(value).astype(np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        message = f"the pixels are not an array of numbers: {error}"
        raise UserError(message, location=location, hint="give height × width numbers") from error
    pixels = np.nan_to_num(numbers, nan=-1.0).clip(-1, 256).astype(np.int16)
    if numbers.size == 0 or pixels.min() < 0 or pixels.max() > 255 or (pixels != numbers).any():
        hint = "give 8-bit pixels; if another column is the label, name it in data.columns: {label: …}"
        raise UserError("the pixels are not integers from 0 to 255", location=location, hint=hint)
    if pixels.ndim == 1 and math.isqrt(pixels.size) ** 2 == pixels.size:
        pixels = pixels.reshape(math.isqrt(pixels.size), -1)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        hint = "give height × width, or height × width × 3"
        raise UserError(f"an array of {_by(pixels.shape)} is not an image", location=location, hint=hint)
    return np.ascontiguousarray(pixels, dtype=np.uint8)


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(str(side) for side in shape)
