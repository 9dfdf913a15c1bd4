"""Which rows' features were stored at a point of a training, so that it can go on from there to the bit.

Features are computed together with those of the rows beside them, which decides their rounding. A training
that goes on from a checkpoint must find stored what was stored then, and nothing more: what a killed process
stored afterwards is computed again.

Knows stores; not what is in them.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from deltaw.training.features.store import DiskStore, FeatureStore


class FeatureRecord:
    """Remembers and restores which rows of a store are done.

    Args:
        store: None where no features are kept. kept: how far up they go, in words.
        say: told where the steps to come cannot be equal to the bit.
    """

    def __init__(self, store: FeatureStore | None, kept: str, say: Callable[[str], None]) -> None:
        self._store = store
        self._kept = kept
        self._say = say

    def state(self) -> dict[str, Any]:
        """Plain values, ready for JSON; the rows as compressed bits."""
        store = self._store
        if store is None:
            return {"kept": self._kept}
        store.mark()
        bits = zlib.compress(np.packbits(store.done).tobytes(), 1)
        return {
            "kept": self._kept,
            "folder": _folder_of(store),
            "rows": len(store.done),
            "done": base64.b64encode(bits).decode(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Have stored what was stored then, as far as it is still there."""
        store = self._store
        if state.get("kept") != self._kept:
            self._tell(f"features of frozen layers are {self._kept}, and were {state.get('kept')}")
        if store is None or state.get("rows") != len(store.done):
            return
        bits = np.frombuffer(zlib.decompress(base64.b64decode(state["done"])), np.uint8)
        then = np.unpackbits(bits, count=len(store.done)).astype(bool)
        folder = _folder_of(store)
        missing = int((then & ~store.done).sum())
        if missing and state.get("folder") is not None:
            self._tell(f"features of {missing:,} rows are no longer stored, and are computed again")
        elif missing:
            self._tell(f"features of {missing:,} rows were in memory, and are computed again")
        elif folder is not None and state.get("folder") not in (None, folder):
            self._tell("features are read from another store")
        store.done &= then

    def _tell(self, what: str) -> None:
        self._say(f"{what}: the steps to come may be rounded otherwise")


def _folder_of(store: FeatureStore) -> str | None:
    """The name of the folder that a store is in; None where it is in memory."""
    inner = getattr(store, "inner", None)
    if inner is not None:
        return _folder_of(inner)
    return store.folder.name if isinstance(store, DiskStore) else None
