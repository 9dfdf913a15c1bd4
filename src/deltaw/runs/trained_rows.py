"""Digests of the rows that a run trained on, to report evaluation on training rows.

``trained_rows.bin`` contains sorted 64-bit digests of tokens and labels, and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.atomic_files import atomic_path
from deltaw.data.row_store import row_keys
from deltaw.untrusted_paths import read_contained

FILE = "trained_rows.bin"
# Maximum number of digests. With more rows, the smallest digests are stored, which are a random sample.
MAX_ROWS = 1 << 20
_DIGEST = np.dtype("<u8")


def write_trained_rows(folder: Path, rows: Sequence[Any]) -> None:
    """Write the digests of the training rows to the folder of a run."""
    with atomic_path(folder / FILE) as temporary:
        temporary.write_bytes(np.unique(row_keys(rows))[:MAX_ROWS].astype(_DIGEST).tobytes())


def count_trained_rows(folder: Path, rows: Sequence[Any]) -> int:
    """Return the number of rows that the run trained on. A lower bound if the run had more than :data:`MAX_ROWS` rows.

    Returns 0 if the run stored no digests.

    Raises:
        UserError: if the file is a link that leaves the folder.
    """
    content = read_contained(folder, FILE, MAX_ROWS * _DIGEST.itemsize) or b""
    trained = np.frombuffer(content[: len(content) // _DIGEST.itemsize * _DIGEST.itemsize], _DIGEST)
    return int(np.isin(row_keys(rows), trained).sum())
