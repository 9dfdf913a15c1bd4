"""Check that the beginning of a file is text in UTF-8."""

from __future__ import annotations

import codecs
import unicodedata
from pathlib import Path

from deltaw.errors import UserError

BEGINNING_BYTES = 8192
_SIGNATURES = {
    b"PAR1\x15": "a Parquet file",
    b"ARROW1\0": "an Arrow file",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "compressed with gzip",
    b"BZh91AY&SY": "compressed with bzip2",
    b"\xfd7zXZ\0": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard",
}
_ENCODINGS = {
    "utf-32": "UTF-32",
    "utf-32-le": "UTF-32",
    "utf-32-be": "UTF-32",
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16",
    "utf-16-be": "UTF-16",
}


def check_content(beginning: bytes, path: Path) -> None:
    """Reject a text file if its first bytes are those of another file type or text encoding.

    Raises:
        UserError: if they are. The message names the actual type.
    """
    for signature, kind in _SIGNATURES.items():
        if beginning.startswith(signature):
            hint = "rename the file so that its suffix matches its content, or unpack it"
            raise UserError(f"the file is {kind}, but its name has another suffix", location=str(path), hint=hint)
    if b"\0" in beginning or beginning[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        complete = beginning[: len(beginning) // 4 * 4]
        for encoding, name in _ENCODINGS.items():
            if _unreadable_share(complete.decode(encoding, "replace")) < 0.05 and complete:
                raise UserError(f"the file is text in {name}", location=str(path), hint="save the file as UTF-8")
    if len(beginning) > 64 and _unreadable_share(beginning.decode("utf-8", "replace")) > 0.3:
        hint = "save the file as UTF-8, or rename it if it is no text"
        raise UserError("the file is binary, or text in another encoding than UTF-8", location=str(path), hint=hint)


def _unreadable_share(text: str) -> float:
    """Return the share of characters that are replaced, unassigned or control characters."""
    bad = sum((unicodedata.category(c) in ("Cc", "Cn", "Co") and c not in "\t\n\r") or c == "\ufffd" for c in text)
    return bad / max(1, len(text))
