"""Store that the processes of a machine share when they train together. The first one opens it, and the others join.

Values and completion flags are memory-mapped files, so writes of one process are visible in the others. The flags of
the running training are in a separate mapped file. The persistent flags are written after the values are on disk.
Processes have different rows in a step. Two processes that write the same row write equal values up to rounding.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from deltaw import platforms
from deltaw.errors import UserError
from deltaw.training.features.store import DiskStore, Shape, is_complete
from deltaw.training.reducer import SINGLE_PROCESS, Reducer

_DONE_PREFIX = "seen-"


class Sharing:
    """Shares a store between the processes of a machine.

    Args:
        processes: Processes that train together. Each creates the same object.

    Attributes:
        is_leader: True if this process opens the store of its machine.
    """

    def __init__(self, processes: Reducer = SINGLE_PROCESS) -> None:
        self._processes = processes
        self._location: tuple[str, str] | None = None
        self.is_leader = processes.local_rank == 0

    def publish(self, store: DiskStore) -> None:
        """Make a store of this process available to the other processes."""
        if self._processes.local_size == 1:
            return
        for old in store.folder.glob(f"{_DONE_PREFIX}*"):  # from killed runs
            platforms.remove_path(old)
        name = f"{_DONE_PREFIX}{os.getpid()}.bin"
        (store.folder / name).write_bytes(store.done.astype(np.uint8).tobytes())
        _map_done(store, name)
        store.run_file = store.folder / name
        self._location = str(store.folder), name

    def exchange(self, *, has_store: bool) -> bool:
        """Return True if this machine stores features.

        Each process calls it once, the leader after it opened the store.
        """
        processes = self._processes
        replies = processes.texts(json.dumps([has_store, self._location]))
        has_store, self._location = json.loads(replies[processes.rank - processes.local_rank])
        return has_store

    def join(self, shape: Shape) -> DiskStore | None:
        """Return the store of this machine's leader, or None if it has none on disk.

        Raises:
            UserError: if the store does not match the one that this process would create.
        """
        if self._location is None:
            return None
        folder, name = self._location
        if not is_complete(Path(folder), shape):
            message = "the features stored by the first process of this machine do not match those of this process"
            hint = "let all processes of a machine see the same folder, or set train.keep_features: false"
            raise UserError(message, location=folder, hint=hint)
        store = DiskStore(Path(folder), shape, None)
        _map_done(store, name)
        return store


def _map_done(store: DiskStore, name: str) -> None:
    store.done = np.asarray(np.memmap(store.folder / name, np.uint8, "r+", shape=(store.shape.rows,))).view(bool)
