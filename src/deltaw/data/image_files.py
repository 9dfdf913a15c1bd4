"""Images in files and in cells of rows: the values that denote them, their decoding, and its limits."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from deltaw.data.bad_rows import BadRowError
from deltaw.data.rows import RowFolder
from deltaw.errors import UserError
from deltaw.untrusted_paths import AllowedFolders

# Supported image formats. Other formats of Pillow start external programs or decode images before their size is known.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Starts of files in common formats that are not supported, for messages.
_OTHER_FORMATS = {
    "AVIF": rb"....ftypavi",
    "HEIC": rb"....ftyp(?:he|mif|msf)",
    "ICO": rb"\0\0\x01\0",
    "JPEG 2000": rb"\0\0\0\x0cjP|\xff\x4f\xff\x51",
    "SVG": rb"\s*(?:<[?!][^>]*>\s*)*<(?:\w+:)?svg\b",
}
# Maximum number of pixels that Pillow accepts, and maximum size of an image file: about three times this number.
_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
_MAX_IMAGE_BYTES = 2**29
# Maximum number of strips or tiles of a TIFF file, and of scans of a JPEG file, each of which takes time.
_MAX_TILES = 1 << 16
_MAX_SCANS = 100
# Errors of Pillow for images that cannot be decoded. Damaged metadata causes errors of various types.
BROKEN = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, SyntaxError, TypeError, ValueError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def image_of(value: object, folder: RowFolder, location: str) -> Path | bytes | Image.Image | None:
    """Return the image of a cell, or None if the value is not an image.

    Args:
        value: Path, encoded bytes, data URL, decoded image, or a dictionary with ``bytes`` or ``path``.
        folder: Folder of the row. It decides which paths are allowed.
        location: Location of the cell, for messages.

    Raises:
        UserError: if it is a URL other than a data URL, an invalid data URL, or a path that is not allowed.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | Image.Image):
        return value
    if not isinstance(value, str | Path) or not value:
        return None
    if isinstance(value, str) and value[:5].lower() == "data:":
        header, _, text = value.partition(",")
        with contextlib.suppress(ValueError):
            if header.lower().endswith(";base64"):
                return base64.b64decode(text, validate=True)
        hint = "write it as data:image/png;base64,…"
        raise UserError("the data URL of the image is not valid base64", location=location, hint=hint)
    if url := _URL.match(str(value)):
        message = f"the image is a URL ({url[1].lower()}), and images are not downloaded"
        raise UserError(message, location=location, hint="give a local file or a data URL")
    path = folder.find(value)
    if path is None:
        raise _outside_error(folder.path is None, location)
    return path


def _outside_error(rejects_all: bool, location: str) -> UserError:
    """Return the error for a path that is not allowed. It does not reveal if the file exists."""
    if rejects_all:
        return UserError("the image is a path, which is not allowed here", location=location, hint="give a data URL")
    hint = "copy it into the folder of the rows, and give its relative path; or give a data URL"
    return UserError("the image is outside of the folders that are allowed", location=location, hint=hint)


def decode(image: np.ndarray | Path | bytes | Image.Image, location: str) -> Image.Image:
    """Decode an image to RGB or grayscale ("L"), rotated upright by its EXIF orientation.

    Raises:
        UserError: if it cannot be decoded.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    try:
        with (
            contextlib.nullcontext(image)
            if isinstance(image, Image.Image)
            else open_image(read_content(image, location)) as opened
        ):
            upright = _with_8_bits(ImageOps.exif_transpose(opened), location)
            mode = "L" if upright.mode in ("1", "L") else "RGB"
            return upright if upright.mode == mode else upright.convert(mode)
    except BROKEN as error:
        raise decode_error(error, location) from error


def _with_8_bits(image: Image.Image, location: str) -> Image.Image:
    """Convert integer pixels to 8 bits. If any exceeds 255, divide all by 256; Pillow would clip them.

    Raises:
        UserError: if the pixels are floating-point numbers.
    """
    if image.mode == "F":
        raise UserError("the image has floating-point pixels", location=location, hint="save it with 8 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    return Image.fromarray((values >> 8 if values.max(initial=0) > 255 else values).clip(0, 255).astype(np.uint8))


def read_content(image: Path | bytes, location: str) -> bytes:
    """Return the encoded image.

    Raises:
        UserError: if the file cannot be read or is too large.
    """
    if isinstance(image, bytes):
        return image
    allowed = AllowedFolders.of_process()
    # Paths of rows have no links (RowFolder.find), unless a file or folder was replaced by a link since then.
    if allowed is not None and Path(os.path.realpath(image)) != image:
        raise _outside_error(False, location)
    try:
        if not image.is_file() or image.stat().st_size > _MAX_IMAGE_BYTES:
            problem = f"has more than {_MAX_IMAGE_BYTES:,} bytes" if image.is_file() else "is not a file"
            raise UserError(f"the image {problem}", location=location, hint="check its path")
        return image.read_bytes()
    except OSError as error:
        message = f"the image cannot be read: {error.strerror or error}"
        raise UserError(message, location=location, hint="check its path") from error


def open_image(content: bytes) -> Image.Image:
    """Open an encoded image without decoding it.

    Raises:
        Exception: one of :data:`BROKEN` if it is damaged, has an unsupported format, or would take long to decode.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Image.UnidentifiedImageError as error:
        matches = [name for name, start in _OTHER_FORMATS.items() if re.match(start, content[:4096], re.DOTALL)]
        message = f"{matches[0]} is not a supported image format" if matches else "unknown image format"
        raise Image.UnidentifiedImageError(message) from error
    if len(getattr(image, "tile", ())) > _MAX_TILES:
        raise ValueError(f"it has more than {_MAX_TILES:,} strips or tiles")
    # Data after the image, such as a video, contains the marker by chance once in 65,536 bytes. Allow twice that rate.
    if image.format in ("JPEG", "MPO") and content.count(b"\xff\xda") > _MAX_SCANS + len(content) // 2**15:
        raise ValueError(f"it has more than {_MAX_SCANS} scans")
    return image


def decode_error(error: BaseException, location: str) -> UserError:
    """Return the error for an image that cannot be decoded."""
    hint = f"use {', '.join(_FORMATS)}" if isinstance(error, Image.UnidentifiedImageError) else "replace or remove it"
    is_large = isinstance(error, Image.DecompressionBombError)
    problem = f"it has more than {_MAX_PIXELS:,} pixels" if is_large else str(error) or type(error).__name__
    return UserError(f"the image cannot be decoded: {problem}", location=location, hint=hint)


def unreadable_image(error: UserError) -> BadRowError:
    """Return the error of a row for the error of its image."""
    reason = "an image that cannot be read"
    return BadRowError(error.message, reason=reason, location=error.location, hint=error.hint)
