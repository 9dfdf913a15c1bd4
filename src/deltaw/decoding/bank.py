"""Named adapters of one base model, loaded on demand within a memory budget and replaceable while requests run.

A name refers to a version: the content of a folder when it was added or swapped. A request uses the version that is
current when it starts. If the name is removed or swapped, the old version is released with its last request. Each
version has a unique number, so cached keys and values of different versions never mix. Versions without requests are
evicted in least-recently-used order and reloaded from their folder. A folder that has changed since is rejected.

Folders are read outside the lock, one at a time. Memory use is bounded by the budget plus one adapter.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.decoding.adapters import (
    ActiveAdapter,
    AdapterInfo,
    FolderReader,
    FolderState,
    file_stats,
    require_adapter_files,
    unknown_adapter_error,
)
from deltaw.decoding.model_decoder import ModelAdapter
from deltaw.errors import UserError
from deltaw.kernels.decode import PackedAdapter
from deltaw.lora.files import Factors

# PATIENCE: seconds after its last attempt to acquire a version until a request is assumed to be gone.
# MIN_RESIDENT_SECONDS: seconds that a loaded version is not evicted, so that the request can acquire it.
PATIENCE = 10.0
MIN_RESIDENT_SECONDS = 3.0
NEVER = float("-inf")
MAX_NAME_LENGTH = 200


@dataclass(frozen=True)
class BankStatus:
    """Status of an adapter bank.

    Attributes:
        versions: Number of versions that are current or in use.
        loaded: Number of versions in memory.
        bytes: Bytes of loaded versions and of the version being loaded.
        loads: Number of loads from a folder.
        dropped: Number of evictions.
    """

    versions: int
    loaded: int
    bytes: int
    loads: int
    dropped: int


@dataclass(eq=False)
class _Version:
    """Content of an adapter folder at one moment.

    Attributes:
        number: Unique number.
        bytes: Size of the weights.
        weights: The adapter if it is in memory.
        current: True if the name refers to this version.
        loading: True if memory is reserved for a load in progress.
        users: Number of requests that use it.
        last_used: Value of the bank's counter at the last use.
        requested_at: Time of the last attempt to acquire it while it was not in memory.
        loaded_at: Time at which it was loaded for a request that has not acquired it yet.
        error: Load error that was not reported to a request yet.
    """

    name: str
    number: int
    info: AdapterInfo
    bytes: int
    weights: ActiveAdapter | None = None
    current: bool = True
    loading: bool = False
    users: int = 0
    last_used: int = 0
    requested_at: float = NEVER
    loaded_at: float = NEVER
    error: UserError | None = field(default=None, repr=False)

    @property
    def is_pinned(self) -> bool:
        """True if the weights must not be evicted.

        A version that was just loaded is protected until its request acquires it. Otherwise two requested adapters
        could evict each other forever.
        """
        return self.users > 0 or (self.current and time.monotonic() - self.loaded_at < MIN_RESIDENT_SECONDS)


class AdapterBank:
    """Adapters of one base model by name. All methods are thread-safe.

    Args:
        model: Base model without an adapter.
        tokenizer: Its tokenizer.
        pack: Packs factors by layer name for the decoder (see :class:`Packer`).
        budget_bytes: Maximum size of the adapters in memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        pack: Callable[[Mapping[str, Factors]], PackedAdapter | ModelAdapter],
        *,
        budget_bytes: int,
    ) -> None:
        self._budget = budget_bytes
        self._versions: set[_Version] = set()  # current or in use
        self._reader = FolderReader(model, tokenizer)
        self._pack = pack
        self._changed = threading.Condition()
        self._reading = threading.Lock()  # one folder at a time
        self._names: dict[str, _Version] = {}
        self._in_use: dict[int, _Version] = {}  # acquired versions by number
        self._changing_names: set[str] = set()  # names that are being added or swapped
        self._load_queue: deque[_Version] = deque()
        self._loader: threading.Thread | None = None
        self._numbers = itertools.count(1)
        self._clock = itertools.count(1)
        self._loads = self._dropped = 0
        self._closed = False

    def names(self) -> tuple[str, ...]:
        """Return the names of all adapters, in the order in which they were added."""
        with self._changed:
            return tuple(self._names)

    def info(self, name: str) -> AdapterInfo:
        """Return the description of an adapter without loading it.

        Raises:
            UserError: if no adapter has this name.
        """
        with self._changed:
            return self._version(name).info

    @property
    def loaded(self) -> int:
        """Number of versions in memory."""
        with self._changed:
            return sum(version.weights is not None for version in self._versions)

    def acquire(self, name: str) -> ActiveAdapter | None:
        """Pin an adapter in memory for one request, until :meth:`release`.

        Returns:
            The adapter, or None if it is not in memory yet. Its load was requested. Call again later.

        Raises:
            UserError: if no adapter has this name, or it cannot be loaded.
        """
        with self._changed:
            version = self._resident_version(name)
            if version is None:
                return None
            version.users += 1
            self._touch(version)
            self._in_use[version.number] = version
            return version.weights

    def release(self, adapter: ActiveAdapter) -> None:
        """Unpin an adapter that a request acquired."""
        with self._changed:
            version = self._in_use[adapter.number]
            version.users -= 1
            if not version.users:
                del self._in_use[adapter.number]
            self._touch(version)
            self._discard_if_unused(version)

    def add(self, name: str, folder: Path) -> AdapterInfo:
        """Add the adapter in ``folder``.

        Raises:
            UserError: if the name is invalid or taken, the adapter does not fit this base model, or it exceeds the
                budget. The bank is unchanged then.
        """
        if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable() or name != name.strip():
            hint = f"give 1 to {MAX_NAME_LENGTH} printable characters"
            raise UserError(f"'{name[:40]}' is not a valid adapter name", location="name", hint=hint)
        with self._changing(name):
            if name in self.names():
                raise UserError(f"an adapter '{name}' exists already", location=name, hint="swap or remove it first")
            return self._put(name, folder)

    def swap(self, name: str, folder: Path) -> AdapterInfo:
        """Replace the adapter of a name by the one in ``folder``. Running requests finish with the previous one.

        Raises:
            UserError: as :meth:`add`, or if no adapter has this name. The previous adapter remains then.
        """
        with self._changing(name):
            with self._changed:
                before = self._version(name)
            return self._put(name, folder, before)

    def remove(self, name: str) -> None:
        """Remove an adapter. Running requests finish with it.

        Raises:
            UserError: if no adapter has this name.
        """
        with self._changed:
            self._retire(self._version(name))
            del self._names[name]

    def status(self) -> BankStatus:
        """Return counters for monitoring."""
        with self._changed:
            return BankStatus(len(self._versions), self.loaded, self._bytes_used(), self._loads, self._dropped)

    def close(self) -> None:
        """Stop loading adapters. Waiting requests fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            loader = self._loader
        if loader is not None:
            loader.join()

    @contextlib.contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """Prevent concurrent changes of a name."""
        with self._changed:
            if name in self._changing_names:
                raise UserError(f"adapter '{name}' is being added or swapped", location=name, hint="try again")
            self._changing_names.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._changing_names.discard(name)

    def _put(self, name: str, folder: Path, previous: _Version | None = None) -> AdapterInfo:
        """Read a folder and make it the current version of ``name``, in place of ``previous``."""
        require_adapter_files(folder)
        # Reject files that cannot fit without reading them. Packing shrinks a number by at most half.
        if sum(size for size, *_ in file_stats(folder)) > 4 * self._budget:
            raise self._too_large(name)
        with self._reading:
            active = self._read(folder, next(self._numbers))
            version = _Version(name, active.number, active.info, active.bytes)
            with self._changed:
                if previous is not None and self._names.get(name) is not previous:
                    raise UserError(f"adapter '{name}' was removed meanwhile", location=name, hint="add it again")
                if version.bytes > self._budget:
                    raise self._too_large(name)
                if previous is not None:
                    self._retire(previous)
                self._names[name] = version
                self._versions.add(version)
                self._touch(version)
                if self._evict_for(version.bytes):
                    version.weights = active
        return active.info

    def _read(self, folder: Path, number: int, state: FolderState | None = None) -> ActiveAdapter:
        """Read an adapter and pack its weights."""
        parts = self._reader.read(folder, state)
        packed = self._pack(parts.layers) if parts.layers else None
        self._loads += 1
        return ActiveAdapter(number, parts.info, packed, parts.prompt)

    def _touch(self, version: _Version) -> None:
        """Mark a version as just used."""
        version.last_used = next(self._clock)
        version.requested_at = NEVER
        version.loaded_at = NEVER

    def _bytes_used(self) -> int:
        """Return the bytes of versions that are in memory or being loaded."""
        return sum(v.bytes for v in self._versions if v.weights is not None or v.loading)

    def _evict_for(self, required: int) -> bool:
        """Evict unused versions in least-recently-used order until ``required`` bytes are free.

        Returns:
            False, without evictions, if all of them together would not suffice.
        """
        free = self._budget - self._bytes_used()
        evicted = []
        idle = [v for v in self._versions if v.weights is not None and not v.is_pinned]
        for version in sorted(idle, key=lambda v: v.last_used):
            if free < required:
                free += version.bytes
                evicted.append(version)
        if free < required:
            return False
        for version in evicted:
            version.weights = None
        self._dropped += len(evicted)
        return True

    def _discard_if_unused(self, version: _Version) -> None:
        """Discard a version that is neither current nor in use."""
        if not version.current and not version.users:
            version.weights = None
            self._versions.discard(version)
        self._changed.notify_all()

    def _too_large(self, name: str) -> UserError:
        message = f"adapter '{name}' has no room in the {self._budget / 1e6:,.1f} MB for adapters"
        return UserError(message, location=name, hint="increase the memory for adapters")

    def _version(self, name: str) -> _Version:
        if name not in self._names:
            raise unknown_adapter_error(name, self._names)
        return self._names[name]

    def _retire(self, version: _Version) -> None:
        version.current = False
        self._discard_if_unused(version)

    def _resident_version(self, name: str) -> _Version | None:
        """Return the version of a name if it is in memory. Otherwise request its load and return None."""
        version = self._version(name)
        if version.weights is not None:
            return version
        if version.error is not None:
            # the next request tries again
            error = version.error
            version.error = None
            raise error
        if self._closed:
            raise UserError("the adapter cannot be loaded: the server is shutting down", location=name)
        version.requested_at = time.monotonic()
        if not version.loading and version not in self._load_queue:
            self._load_queue.append(version)
            if self._loader is None:
                self._loader = threading.Thread(target=self._load_requested, name="adapters", daemon=True)
                self._loader.start()
            self._changed.notify_all()
        return None

    def _load_requested(self) -> None:
        """Load requested versions in request order when memory is available. Runs on the loader thread."""
        while True:
            with self._changed:
                while not (self._closed or self._reserve_for_next()):
                    # Poll: the protection of a loaded version expires without a notification.
                    self._changed.wait(MIN_RESIDENT_SECONDS / 4 if self._load_queue else None)
                if self._closed:
                    return
                version = self._load_queue.popleft()
                version.loading = True
            weights = None
            error = None
            try:
                weights = self._reload(version)
            except UserError as user_error:
                error = user_error
            except Exception as failed:  # reported to the request; the thread continues with other versions
                message = f"adapter '{version.name}' cannot be loaded: {type(failed).__name__}: {failed}"
                error = UserError(message, location=str(version.info.folder), hint="check the adapter's folder")
            with self._changed:
                version.loading = False
                version.error = error
                if version in self._versions:
                    version.weights = weights
                    version.loaded_at = time.monotonic()
                self._changed.notify_all()
            del weights

    def _reserve_for_next(self) -> bool:
        """Free memory for the next requested version. Return False if no version can be loaded now."""
        while self._load_queue:
            version = self._load_queue[0]
            if version.current and version.weights is None and time.monotonic() - version.requested_at < PATIENCE:
                return self._evict_for(version.bytes)
            self._load_queue.popleft()
        return False

    def _reload(self, version: _Version) -> ActiveAdapter:
        info = version.info
        with self._reading:
            active = self._read(info.folder, version.number, info.state)
        if active.info.state.digest != info.state.digest:
            message = f"the files of adapter '{version.name}' changed after it was added"
            raise UserError(message, location=str(info.folder), hint="swap the adapter to load the new files")
        return active
