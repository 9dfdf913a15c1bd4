"""A store's vectors on the device that uses them, besides where they are kept.

The first epoch writes them to both. Later epochs gather them on the device, so that a step neither copies
vectors nor waits for one. Vectors of an earlier run are brought over as they are asked for.

Knows stores and devices; not what the vectors mean.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deltaw.kernels.transfer import to_device
from deltaw.training.features.store import FeatureStore

# Share of the device's free memory that vectors may take; the rest is for training.
SHARE = 0.25


class DeviceStore:
    """``inner`` with a copy of its vectors on ``device``."""

    def __init__(self, inner: FeatureStore, device: torch.device) -> None:
        self.inner = inner
        self.device = device
        self.shape = shape = inner.shape
        self.done = inner.done  # one array for both: what is done is done in both
        self.resident_bytes = inner.resident_bytes
        self._values = torch.empty(shape.units, shape.width, dtype=shape.torch_dtype, device=device)
        self._there = np.zeros(shape.units, bool)

    def read(self, places: np.ndarray) -> Tensor:
        """(n,) places to (n, width) on the device."""
        missing = np.unique(places[~self._there[places]])
        if len(missing):
            self._put(missing, to_device(self.inner.read(missing), self.device))
        return self._values.index_select(0, to_device(torch.from_numpy(places), self.device))

    def write(self, rows: np.ndarray, places: np.ndarray, values: Tensor) -> None:
        """As the inner store does."""
        self._put(places, values.detach().to(self.device))
        self.inner.write(rows, places, values)

    def _put(self, places: np.ndarray, values: Tensor) -> None:
        self._values.index_copy_(0, to_device(torch.from_numpy(places), self.device), values)
        self._there[places] = True

    def forget(self) -> None:
        """No row has its values any longer."""
        self._there[:] = False
        self.inner.forget()

    def mark(self) -> None:
        """Bring everything to the disk."""
        self.inner.mark()

    def close(self) -> None:
        """Let others have the inner store, and the device its memory."""
        self._values = self._values[:0].clone()
        self._there[:] = False
        self.inner.close()


def on_device(store: FeatureStore, device: torch.device) -> FeatureStore:
    """The store with its vectors on the device too, where that has memory of its own and room for them."""
    if device.type != "cuda":
        return store
    free, _ = torch.cuda.mem_get_info(device)
    return DeviceStore(store, device) if store.shape.bytes <= SHARE * free else store
