"""Mirror of a store's vectors on the device.

The first epoch writes to both. Later epochs gather on the device without copies or synchronization. Vectors of an
earlier run are copied on first use.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deltaw.kernels.layout import to_device
from deltaw.machine.cards import card_memory
from deltaw.training.features.store import FeatureStore, WrappedStore

# Maximum share of the device's free memory for vectors. The rest is for training.
MAX_MEMORY_SHARE = 0.25


class DeviceStore(WrappedStore):
    """Store with a copy of its vectors on ``device``."""

    def __init__(self, inner: FeatureStore, device: torch.device) -> None:
        super().__init__(inner)
        self.device = device
        shape = inner.shape
        self._values = torch.empty(shape.units, shape.width, dtype=shape.torch_dtype, device=device)
        self._present = np.zeros(shape.units, bool)

    def read(self, indices: np.ndarray) -> Tensor:
        """Return (n, width) the vectors at (n,) indices, on the device."""
        missing = np.unique(indices[~self._present[indices]])
        if len(missing):
            self._put(missing, to_device(self.inner.read(missing), self.device))
        return self._values.index_select(0, to_device(torch.from_numpy(indices), self.device))

    def write(self, rows: np.ndarray, indices: np.ndarray, values: Tensor) -> None:
        self._put(indices, values.detach().to(self.device))
        self.inner.write(rows, indices, values)

    def _put(self, indices: np.ndarray, values: Tensor) -> None:
        self._values.index_copy_(0, to_device(torch.from_numpy(indices), self.device), values)
        self._present[indices] = True

    def clear(self) -> None:
        self._present[:] = False
        super().clear()

    def close(self) -> None:
        """Release the device memory and the inner store."""
        self._values = self._values[:0].clone()
        self._present[:] = False
        super().close()


def with_device_copy(store: FeatureStore, device: torch.device) -> FeatureStore:
    """Mirror the store on the device, if the device has separate memory and enough of it."""
    card = card_memory(str(device)) if device.type == "cuda" else None
    fits = card is not None and store.shape.bytes <= MAX_MEMORY_SHARE * card[0]
    return DeviceStore(store, device) if fits else store
