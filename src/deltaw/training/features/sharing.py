"""One store for all processes of a machine that train together: the first opens it, the others join.

Values and marks are mapped files, so what one process writes is there for the others. Which rows have their
values is told by a mapped file of its own, which lasts as long as the run: marks for later runs are written
once values are on the disk. Processes of a step have different rows; two that write the same row write equal
values up to rounding.

Knows stores and processes; not models, batches or what the values mean.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from deltaw.errors import UserError
from deltaw.training.features.store import DiskStore, Shape, is_whole
from deltaw.training.parallel.reducer import ALONE, Reducer

_SEEN = "seen-"


class Sharing:
    """How a process comes by its store.

    Args:
        processes: that train together, each of which asks the same.

    Attributes:
        leads: whether this process opens the store of its machine.
    """

    def __init__(self, processes: Reducer = ALONE) -> None:
        self._processes = processes
        self._place: tuple[Path, str] | None = None
        self.leads = processes.local_rank == 0

    def opened(self, store: DiskStore) -> None:
        """Let the others join a store that this process opened."""
        if self._processes.local_size == 1:
            return
        for old in store.folder.glob(f"{_SEEN}*"):  # of runs that were killed
            old.unlink(missing_ok=True)
        name = f"{_SEEN}{os.getpid()}.bin"
        (store.folder / name).write_bytes(store.done.astype(np.uint8).tobytes())
        _use_seen(store, name)
        store.of_run = store.folder / name
        self._place = store.folder, name

    def tell(self, *, keeps: bool) -> bool:
        """Once by each process, the first of each machine after it opened its store: whether features are
        kept on this machine."""
        processes = self._processes
        if processes.size == 1:
            return keeps
        place = None if self._place is None else [str(self._place[0]), self._place[1]]
        told = processes.texts(json.dumps([keeps, place]))
        keeps, place = json.loads(told[processes.rank - processes.local_rank])
        if place is not None:
            self._place = Path(place[0]), place[1]
        return keeps

    def join(self, shape: Shape) -> DiskStore | None:
        """The store that the first process of this machine opened; None where it has none on the disk.

        Raises:
            UserError: it is another one than this process would make.
        """
        if self._place is None:
            return None
        folder, name = self._place
        if not is_whole(folder, shape):
            raise UserError(
                "the features that the first process of this machine keeps are not those of this one",
                where=str(folder),
                hint="let all processes of a machine see the same folder, or set train.keep_features: false",
            )
        store = DiskStore(folder, shape, None)
        _use_seen(store, name)
        return store


def _use_seen(store: DiskStore, name: str) -> None:
    mapped = np.memmap(store.folder / name, np.uint8, "r+", shape=(store.shape.rows,))
    store.done = np.asarray(mapped).view(bool)
