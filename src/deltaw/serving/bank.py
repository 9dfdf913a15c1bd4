"""Many adapters on one base: by name, within a number of bytes, changed while requests run.

A name stands for a version, the content of a folder at one moment. A request uses the version that its name
stands for when it starts. Removing or swapping the name lets that version end with its last request; a new
version has a new number, so that keys and values of the two never meet. What no request uses leaves memory
when others need the room, least recently used first, and comes back from its folder. A folder that changed
meanwhile is refused, not silently taken.

Folders are read outside of the lock, one at a time, so that memory holds the budget and one adapter more at
most. Knows folders and bytes; not tokens, steps or HTTP.
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

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.errors import UserError
from deltaw.kernels.decode import PackedAdapter
from deltaw.lora.attachment import attachment, unwrapped
from deltaw.lora.factors import Factors, more_than_factors
from deltaw.lora.layers import LoRAConv1D, LoRALinear
from deltaw.runtime.recognition import part
from deltaw.serving.adapters import (
    ActiveAdapter,
    AdapterFacts,
    FolderReader,
    FolderState,
    no_adapter,
    refuse_missing,
    stat_of,
)
from deltaw.serving.decodable import Decodable

# The output head's place: it is in no block.
HEAD = (-1, "head")


class Packer:
    """Packs the factors of a model's linear layers for its decoder.

    A decoder knows the parts of its blocks (query, key, value, output, gate, up, down) and the output head, not
    the names of a model's modules. A layer that gives several parts (Phi-3's ``qkv_proj`` and ``gate_up_proj``,
    GPT-2's ``c_attn``) is the first of them there as well, with outputs in the same order.

    Args:
        model: with its head; an adapter may be on it.
        made: its decoder, with its blocks and their descriptions.
    """

    def __init__(self, model: nn.Module, made: Decodable) -> None:
        self._pack = made.decoder.pack_adapter
        names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(name)
        self._places: dict[str, tuple[int, str]] = {}
        for number, (block, described) in enumerate(zip(made.blocks, made.roles, strict=True)):
            attention, mlp = described.attention, described.mlp
            parts = {attention.output: "output", mlp.output: "down"}
            # One layer that gives several parts stands for the first of them.
            parts |= dict(zip(attention.inputs, ("query", "key", "value"), strict=False))
            parts |= dict(zip(mlp.inputs, ("gate", "up"), strict=False))
            for path, what in parts.items():
                self._places |= dict.fromkeys(names[id(part(block, path))], (number, what))
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._places |= dict.fromkeys(names.get(id(head), ()), HEAD)

    def __call__(self, layers: Mapping[str, Factors]) -> PackedAdapter:
        """The factors of layers, by their names in the model, in the form that the decoder's steps take.

        Raises:
            UserError: a layer is in no block, and not the head.
        """
        placed = {}
        for name, factors in layers.items():
            if name not in self._places:
                what = f"it adapts '{name}', which is no part of the model's blocks and not its head"
                raise UserError(what, where=name, hint="merge the adapter into a model of its own: deltaw merge")
            placed[self._places[name]] = (factors.lora_A, factors.lora_B, factors.scaling)
        return self._pack(placed)


def packed_from_model(model: nn.Module, packer: Packer) -> PackedAdapter | str | None:
    """The adapter that is on a live model, for a decoder of the model's own weights.

    Returns:
        the adapter; None where there is none; or why its factors do not say all that it does.
    """
    layers = factors_on(model)
    if isinstance(layers, str):
        return layers
    try:
        return packer(layers) if layers else None
    except UserError as error:
        return error.what


def factors_on(model: nn.Module) -> dict[str, Factors] | str:
    """The factors of the adapter that is on a model, by names of its layers, sharing memory with it; empty
    without one. Or why factors do not say all that the adapter does."""
    record = attachment(unwrapped(model))
    if record is None:
        return {}
    if (reason := more_than_factors(record.config)) is not None:
        return reason
    layers: dict[str, Factors] = {}
    for name, layer in record.adapted():
        if not isinstance(layer, LoRALinear | LoRAConv1D) or type(layer) not in (LoRALinear, LoRAConv1D):
            return f"it adapts '{name}' as a {type(layer).__name__}"
        if layer.merged or layer.changed_init is not None:
            return f"the weight of '{name}' is not the base model's own"
        layers[name] = Factors(layer.lora_A.detach().float(), layer.lora_B.detach().float(), layer.scaling)
    return layers


# Seconds after which a request that asked for a version, and did not ask again, is believed to be gone; and
# after which a version that was loaded for it gives way to others.
PATIENCE, STAYS = 10.0, 3.0
NEVER = float("-inf")
LONGEST_NAME = 200


@dataclass(frozen=True)
class BankStatus:
    """What a bank holds, and what it did so far.

    Attributes:
        versions: of adapters, that requests may still come for, or use. loaded: those in memory.
        bytes: that they take, and that a load in hand will take.
        loads: from a folder. dropped: to make room.
    """

    versions: int
    loaded: int
    bytes: int
    loads: int
    dropped: int


@dataclass(eq=False)
class _Version:
    """One content of a name.

    Attributes:
        number: that no other version has. bytes: of the weights.
        weights: the adapter where it is in memory.
        current: whether its name still stands for it. loading: whether it has room that is not filled yet.
        users: requests that use it. used: when one did last, by the bank's count.
        asked: when a request last asked for it while it was not in memory, in seconds. came: when it was
            loaded for a request that has not come yet.
        error: why it could not be loaded, until somebody is told.
    """

    name: str
    number: int
    facts: AdapterFacts
    bytes: int
    weights: ActiveAdapter | None = None
    current: bool = True
    loading: bool = False
    users: int = 0
    used: int = 0
    asked: float = NEVER
    came: float = NEVER
    error: UserError | None = field(default=None, repr=False)

    @property
    def stays(self) -> bool:
        """Whether its weights must not go. What was loaded for a request stays until the request comes, or
        two adapters that are asked for would drive each other out for ever."""
        return self.users > 0 or (self.current and time.monotonic() - self.came < STAYS)


class AdapterBank:
    """Adapters by name. All functions may be called from any thread.

    Args:
        model: the base, without an adapter. tokenizer: its own.
        pack: makes of factors, by layers' names, what a decoder takes; see
            :class:`Packer`.
        budget_bytes: the most bytes that adapters have in memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        pack: Callable[[Mapping[str, Factors]], PackedAdapter],
        *,
        budget_bytes: int,
    ) -> None:
        self._budget = budget_bytes
        self._versions: set[_Version] = set()  # those that are current or held
        self._reader, self._pack = FolderReader(model, tokenizer), pack
        self._changed = threading.Condition()
        self._reading = threading.Lock()  # one folder at a time
        self._names: dict[str, _Version] = {}
        self._in_use: dict[int, _Version] = {}  # by number, what was acquired and not released
        self._in_hand: set[str] = set()  # names that are added or swapped at the moment
        self._wanted: deque[_Version] = deque()
        self._loader: threading.Thread | None = None
        self._numbers = itertools.count(1)
        self._clock = itertools.count(1)
        self._loads = self._dropped = 0
        self._closed = False

    def names(self) -> tuple[str, ...]:
        """The names that can be asked for, in the order in which they were added."""
        with self._changed:
            return tuple(self._names)

    def facts(self, name: str) -> AdapterFacts:
        """What is known of an adapter; nothing is loaded.

        Raises:
            UserError: there is none of this name.
        """
        with self._changed:
            return self._named(name).facts

    @property
    def loaded(self) -> int:
        """How many versions are in memory."""
        with self._changed:
            return sum(version.weights is not None for version in self._versions)

    def acquire(self, name: str) -> ActiveAdapter | None:
        """An adapter for one request, in memory until :meth:`release`.

        Returns:
            None where it is not in memory: it is being loaded, or others must be released before. It has been
            asked for; ask again within some seconds.

        Raises:
            UserError: there is none of this name, or it cannot be loaded any more.
        """
        with self._changed:
            version = self._in_memory(name)
            if version is None:
                return None
            version.users += 1
            self._touch(version)
            self._in_use[version.number] = version
            return version.weights

    def release(self, adapter: ActiveAdapter) -> None:
        """A request that :meth:`acquire` was called for is done with it."""
        with self._changed:
            version = self._in_use[adapter.number]
            version.users -= 1
            if not version.users:
                del self._in_use[adapter.number]
            self._touch(version)
            self._leave_if_done(version)

    def add(self, name: str, folder: Path) -> AdapterFacts:
        """Take in the adapter in ``folder``.

        Raises:
            UserError: the name is taken or none, the adapter cannot be served on this base, or it has no room
                in the budget. Then nothing has changed.
        """
        if not name or len(name) > LONGEST_NAME or not name.isprintable() or name != name.strip():
            hint = f"give 1 to {LONGEST_NAME} printable characters"
            raise UserError(f"'{name[:40]}' cannot name an adapter", where="name", hint=hint)
        with self._changing(name):
            if name in self.names():
                what = f"there is an adapter '{name}' already"
                raise UserError(what, where=name, hint="swap it, or remove it first")
            return self._put(name, folder)

    def swap(self, name: str, folder: Path) -> AdapterFacts:
        """Let a name stand for the adapter in ``folder``; requests in hand end with the one from before.

        Raises:
            UserError: as :meth:`add`, or there is no such name. Then the one from before stays.
        """
        with self._changing(name):
            with self._changed:
                before = self._named(name)
            return self._put(name, folder, before)

    def remove(self, name: str) -> None:
        """Take no more requests for a name; those in hand end with it.

        Raises:
            UserError: there is none of this name.
        """
        with self._changed:
            self._retire(self._named(name))
            del self._names[name]

    def status(self) -> BankStatus:
        """Numbers for whoever watches."""
        with self._changed:
            return BankStatus(len(self._versions), self.loaded, self._taken(), self._loads, self._dropped)

    def close(self) -> None:
        """Load nothing any more; whoever waits for an adapter is told so."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            loader = self._loader
        if loader is not None:
            loader.join()

    @contextlib.contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """Nobody else adds or swaps this name meanwhile."""
        with self._changed:
            if name in self._in_hand:
                what = f"adapter '{name}' is being added or swapped at the moment"
                raise UserError(what, where=name, hint="try again")
            self._in_hand.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._in_hand.discard(name)

    def _put(self, name: str, folder: Path, before: _Version | None = None) -> AdapterFacts:
        """Read a folder and let ``name`` stand for it; ``before`` is what it stands for until then."""
        refuse_missing(folder)
        # Files that cannot fit are not read: a number takes half of its bytes at the least, fp32 as bf16.
        if sum(size for size, *_ in stat_of(folder)) > 4 * self._budget:
            raise self._too_large(name)
        with self._reading:
            active = self._read(folder, next(self._numbers))
            version = _Version(name, active.number, active.facts, active.bytes)
            with self._changed:
                if before is not None and self._names.get(name) is not before:
                    raise UserError(f"adapter '{name}' was removed meanwhile", where=name, hint="add it anew")
                if version.bytes > self._budget:
                    raise self._too_large(name)
                if before is not None:
                    self._retire(before)
                self._names[name] = version
                self._versions.add(version)
                self._touch(version)
                if self._make_room(version.bytes):
                    version.weights = active
        return active.facts

    def _read(self, folder: Path, number: int, known: FolderState | None = None) -> ActiveAdapter:
        """An adapter with its weights in the form in which they stay."""
        parts = self._reader.read(folder, known)
        packed = self._pack(parts.layers) if parts.layers else None
        self._loads += 1
        return ActiveAdapter(number, parts.facts, packed, parts.prompt)

    def _touch(self, version: _Version) -> None:
        """A request uses it now."""
        version.used, version.asked, version.came = next(self._clock), NEVER, NEVER

    def _taken(self) -> int:
        """The bytes of weights in memory, and of those that are being loaded."""
        return sum(v.bytes for v in self._versions if v.weights is not None or v.loading)

    def _make_room(self, wanted: int) -> bool:
        """Let weights go that nobody uses, the least recently used first, until so many bytes are free. None
        goes where all of them would not be enough."""
        free, going = self._budget - self._taken(), []
        idle = [v for v in self._versions if v.weights is not None and not v.stays]
        for version in sorted(idle, key=lambda v: v.used):
            if free < wanted:
                free += version.bytes
                going.append(version)
        if free < wanted:
            return False
        for version in going:
            version.weights = None
        self._dropped += len(going)
        return True

    def _leave_if_done(self, version: _Version) -> None:
        """A version without a name ends with its last request."""
        if not version.current and not version.users:
            version.weights = None
            self._versions.discard(version)
        self._changed.notify_all()

    def _too_large(self, name: str) -> UserError:
        what = f"adapter '{name}' has no room in the {self._budget / 1e6:,.1f} MB for adapters"
        return UserError(what, where=name, hint="give adapters more memory")

    def _named(self, name: str) -> _Version:
        if name not in self._names:
            raise no_adapter(name, self._names)
        return self._names[name]

    def _retire(self, version: _Version) -> None:
        version.current = False
        self._leave_if_done(version)

    def _in_memory(self, name: str) -> _Version | None:
        """The version of a name where it is in memory; else it is asked for."""
        version = self._named(name)
        if version.weights is not None:
            return version
        if version.error is not None:
            error, version.error = version.error, None  # whoever comes next tries again
            raise error
        if self._closed:
            raise UserError("no more adapters are loaded: the server ends", where=name)
        version.asked = time.monotonic()
        if not version.loading and version not in self._wanted:
            self._wanted.append(version)
            if self._loader is None:
                self._loader = threading.Thread(target=self._load_wanted, name="adapters", daemon=True)
                self._loader.start()
            self._changed.notify_all()
        return None

    def _load_wanted(self) -> None:
        """The loader's thread: what is asked for first is loaded first, when there is room."""
        while True:
            with self._changed:
                while not (self._closed or self._next_has_room()):
                    # What nobody came for gives way without anybody saying so.
                    self._changed.wait(STAYS / 4 if self._wanted else None)
                if self._closed:
                    return
                version = self._wanted.popleft()
                version.loading = True
            weights, error = None, None
            try:
                weights = self._loaded_again(version)
            except UserError as refused:
                error = refused
            except Exception as failed:  # a request is told of it; the thread has others to load
                what = f"adapter '{version.name}' cannot be loaded: {type(failed).__name__}: {failed}"
                error = UserError(what, where=str(version.facts.folder), hint="look at its folder")
            with self._changed:
                version.loading, version.error = False, error
                if version in self._versions:
                    version.weights, version.came = weights, time.monotonic()
                self._changed.notify_all()
            del weights

    def _next_has_room(self) -> bool:
        """Whether the next version that is waited for has room now; it is made."""
        while self._wanted:
            version = self._wanted[0]
            waited_for = time.monotonic() - version.asked < PATIENCE
            if version.current and version.weights is None and waited_for:
                return self._make_room(version.bytes)
            self._wanted.popleft()
        return False

    def _loaded_again(self, version: _Version) -> ActiveAdapter:
        known = version.facts
        with self._reading:
            active = self._read(known.folder, version.number, known.state)
        if active.facts.state.digest != known.state.digest:
            what = f"the files of adapter '{version.name}' are not those that were added"
            raise UserError(what, where=str(known.folder), hint="swap the adapter, to take what is there now")
        return active
