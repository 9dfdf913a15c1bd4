"""Record of stored features in a checkpoint, so that a resumed run is bitwise equal.

The rounding of features depends on the other rows of their batch. A resumed run must therefore use exactly the features
stored at its checkpoint, and recompute those that a killed process stored later.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaw.training.features.store import FeatureStore


@dataclass(frozen=True)
class FeatureRecord:
    """Saves and restores the set of stored rows.

    Attributes:
        store: Store of the run, if any.
        level: Description of the layers that the features cover.
        log: Receives warnings if the following steps cannot be bitwise equal.
    """

    store: FeatureStore | None
    level: str
    log: Callable[[str], None]

    def state(self) -> dict[str, Any]:
        """Return JSON values, with the rows as compressed bits."""
        store = self.store
        if store is None:
            return {"kept": self.level}
        store.flush()
        folder = store.folder and store.folder.name
        bits = base64.b64encode(zlib.compress(np.packbits(store.done).tobytes(), 1)).decode()
        return {"kept": self.level, "folder": folder, "rows": len(store.done), "done": bits}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the set of stored rows, as far as they still exist."""
        store = self.store
        if state.get("kept") != self.level:
            self._warn(f"features of frozen layers are {self.level}, and were {state.get('kept')}")
        if store is None or state.get("rows") != len(store.done):
            return
        bits = np.frombuffer(zlib.decompress(base64.b64decode(state["done"])), np.uint8)
        was_done = np.unpackbits(bits, count=len(store.done)).astype(bool)
        missing = int((was_done & ~store.done).sum())
        if missing and state.get("folder") is not None:
            self._warn(f"features of {missing:,} rows are no longer stored, and are computed again")
        elif missing:
            self._warn(f"features of {missing:,} rows were in memory, and are computed again")
        elif store.folder is not None and state.get("folder") not in (None, store.folder.name):
            self._warn("features are read from another store")
        store.done &= was_done

    def _warn(self, message: str) -> None:
        self.log(f"{message}: the next steps may be rounded differently")
