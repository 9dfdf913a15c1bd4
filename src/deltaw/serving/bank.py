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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.errors import UserError, did_you_mean
from deltaw.kernels.decode import PackedAdapter
from deltaw.lora.attachment import attachment, unwrapped
from deltaw.lora.factors import Factors, more_than_factors
from deltaw.lora.layers import LoRAConv1D, LoRALayer, LoRALinear
from deltaw.runtime.recognition import BlockRoles, part
from deltaw.serving.adapters import (
    PATIENCE,
    STAYS,
    ActiveAdapter,
    AdapterParts,
    FolderFacts,
    FolderReader,
    Room,
    Version,
    Weights,
    refuse_missing,
    stat_of,
    too_large,
)
from deltaw.serving.request import UnknownAdapterError

# ---- Where a low-rank update goes in a packed decoding step: from a layer's name to a block's part.
#
# A decoder knows the parts of its blocks (query, key, value, output, gate, up, down) and the output head, not
# the names of a model's modules. A layer that gives several parts (Phi-3's ``qkv_proj`` and ``gate_up_proj``,
# GPT-2's ``c_attn``) is the first of them there as well, with outputs in the same order. Knows descriptions of
# blocks, and factors; not files, nor how a step computes.


# What a decoder takes: by block and part, A (in, r), B (r, out) and the scaling.
Placed = dict[tuple[int, str], tuple[Tensor, Tensor, float]]
Packed = TypeVar("Packed", covariant=True)
# The output head's place: it is in no block.
HEAD = (-1, "head")


class FactorPlaces:
    """The places of a model's linear layers in a decoder.

    Args:
        model: with its head; an adapter may be on it.
        blocks: in order, as the decoder has them. roles: the description of each.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], roles: Sequence[BlockRoles]) -> None:
        names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(name)
        self._places: dict[str, tuple[int, str]] = {}
        for number, (block, described) in enumerate(zip(blocks, roles, strict=True)):
            for path, what in _parts_of(described).items():
                self._places |= dict.fromkeys(names[id(part(block, path))], (number, what))
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._places |= dict.fromkeys(names.get(id(head), ()), HEAD)

    def placed(self, layers: Mapping[str, Factors]) -> Placed:
        """The factors of layers, by their names in the model, as a decoder takes them.

        Raises:
            UserError: a layer is in no block, and not the head.
        """
        found: Placed = {}
        for name, factors in layers.items():
            place = self._places.get(name)
            if place is None:
                raise UserError(
                    f"it adapts '{name}', which is no part of the model's blocks and not its head",
                    where=name,
                    hint="merge the adapter into a model of its own: deltaw merge",
                )
            found[place] = (factors.lora_A, factors.lora_B, factors.scaling)
        return found


class Decoder(Protocol[Packed]):
    """What is asked of a decoder here."""

    def pack_adapter(self, factors: Placed) -> Packed:
        """An adapter in the form that its steps take."""


def packing(places: FactorPlaces, decoder: Decoder[Packed]) -> Callable[[Mapping[str, Factors]], Packed]:
    """How a bank packs factors for a decoder."""
    return lambda layers: decoder.pack_adapter(places.placed(layers))


def packed_from_model(model: nn.Module, places: FactorPlaces, decoder: Decoder[Packed]) -> Packed | str | None:
    """The adapter that is on a live model, for a decoder of the model's own weights.

    Returns:
        the adapter; None where there is none; or why its factors do not say all that it does.
    """
    layers = factors_on(model)
    if isinstance(layers, str):
        return layers
    try:
        return decoder.pack_adapter(places.placed(layers)) if layers else None
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
        layers[name] = _detached(layer)
    return layers


def _detached(layer: LoRALayer) -> Factors:
    return Factors(layer.lora_A.detach().float(), layer.lora_B.detach().float(), layer.scaling)


def _parts_of(roles: BlockRoles) -> dict[str, str]:
    """By the path of each layer of a block: its part."""
    attention, mlp = roles.attention, roles.mlp
    parts = {attention.output: "output", mlp.output: "down"}
    # One layer that gives several parts stands for the first of them.
    parts |= dict(zip(attention.inputs, ("query", "key", "value"), strict=False))
    return parts | dict(zip(mlp.inputs, ("gate", "up"), strict=False))


# ---- bank


LONGEST_NAME = 200


@dataclass(frozen=True)
class BankStatus:
    """What a bank holds, and what it did so far.

    Attributes:
        adapters: names. versions: that requests may still come for, or use. loaded: those in memory.
        bytes: that they take, and that a load in hand will take. budget_bytes: the most of them.
        loads: from a folder. dropped: to make room.
    """

    adapters: int
    versions: int
    loaded: int
    bytes: int
    budget_bytes: int
    loads: int
    dropped: int


class AdapterBank:
    """Adapters by name. All functions may be called from any thread.

    Args:
        model: the base, without an adapter. tokenizer: its own.
        pack: makes of factors, by layers' names, what a decoder takes; see
            :func:`deltaw.serving.bank.packing`.
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
        self._room: Room = Room(budget_bytes)
        self._reader, self._pack = FolderReader(model, tokenizer), pack
        self._changed = threading.Condition()
        self._reading = threading.Lock()  # one folder at a time
        self._names: dict[str, Version] = {}
        self._in_use: dict[int, Version] = {}  # by number, what was acquired and not released
        self._in_hand: set[str] = set()  # names that are added or swapped at the moment
        self._wanted: deque[Version] = deque()
        self._loader: threading.Thread | None = None
        self._numbers = itertools.count(1)
        self._loads = 0
        self._closed = False

    def names(self) -> tuple[str, ...]:
        """The names that can be asked for, in the order in which they were added."""
        with self._changed:
            return tuple(self._names)

    def facts(self, name: str) -> FolderFacts:
        """What is known of an adapter; nothing is loaded.

        Raises:
            UserError: there is none of this name.
        """
        with self._changed:
            return self._named(name).facts

    def acquire(self, name: str, timeout: float = 0.0) -> ActiveAdapter | None:
        """An adapter for one request, in memory until :meth:`release`.

        Args:
            timeout: seconds to wait for it.

        Returns:
            None where it is not in memory by then: it is being loaded, or others must be released before. It
            has been asked for; ask again within some seconds.

        Raises:
            UserError: there is none of this name, or it cannot be loaded any more.
        """
        with self._changed:
            until = time.monotonic() + timeout
            while (version := self._in_memory(name)) is None:
                left = until - time.monotonic()
                if left <= 0:
                    return None
                # Whoever waits says so again, before he is believed to be gone.
                self._changed.wait(min(left, PATIENCE / 4))
            weights = version.weights
            assert weights is not None
            version.users += 1
            self._room.touch(version)
            self._in_use[version.number] = version
            return ActiveAdapter(version.number, version.facts, weights.packed, weights.prompt)

    def release(self, adapter: ActiveAdapter) -> None:
        """A request that :meth:`acquire` was called for is done with it."""
        with self._changed:
            version = self._in_use[adapter.number]
            version.users -= 1
            if not version.users:
                del self._in_use[adapter.number]
            self._room.touch(version)
            self._room.leave_if_done(version)
            self._changed.notify_all()

    def add(self, name: str, folder: Path, *, pinned: bool = False) -> FolderFacts:
        """Take in the adapter in ``folder``.

        Args:
            pinned: whether it stays in memory once it is there.

        Raises:
            UserError: the name is taken or none, the adapter cannot be served on this base, or it has no room
                in the budget. Then nothing has changed.
        """
        _refuse_name(name)
        with self._changing(name):
            with self._changed:
                if name in self._names:
                    raise UserError(
                        f"there is an adapter '{name}' already", where=name, hint="swap it, or remove it first"
                    )
            return self._put(name, folder, pinned)

    def swap(self, name: str, folder: Path | None = None, *, pinned: bool | None = None) -> FolderFacts:
        """Let a name stand for the adapter in ``folder``; requests in hand end with the one from before.

        Args:
            folder: None reads the one that it has again. pinned: None leaves it as it is.

        Raises:
            UserError: as :meth:`add`, or there is no such name. Then the one from before stays.
        """
        with self._changing(name):
            with self._changed:
                before = self._named(name)
            return self._put(name, folder or before.facts.folder, before.pinned if pinned is None else pinned, before)

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
            room = self._room
            return BankStatus(
                len(self._names),
                len(room.versions),
                room.loaded(),
                room.taken(),
                room.budget_bytes,
                self._loads,
                room.dropped,
            )

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
                raise UserError(
                    f"adapter '{name}' is being added or swapped at the moment", where=name, hint="try again"
                )
            self._in_hand.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._in_hand.discard(name)

    def _put(self, name: str, folder: Path, pinned: bool, before: Version | None = None) -> FolderFacts:
        """Read a folder and let ``name`` stand for it; ``before`` is what it stands for until then."""
        self._refuse_size(name, folder)
        with self._reading:
            parts, weights = self._read(folder)
            version = Version(name, next(self._numbers), parts.facts, weights.bytes, pinned, None)
            with self._changed:
                if before is not None and self._names.get(name) is not before:
                    raise UserError(f"adapter '{name}' was removed meanwhile", where=name, hint="add it anew")
                self._room.refuse(version, (v for v in self._names.values() if v is not before))
                if before is not None:
                    self._retire(before)
                self._names[name] = version
                self._room.versions.add(version)
                self._room.touch(version)
                if self._room.make(version.bytes):
                    version.weights = weights
        return parts.facts

    def _read(self, folder: Path, known: FolderFacts | None = None) -> tuple[AdapterParts, Weights]:
        """An adapter with its weights in the form in which they stay."""
        parts = self._reader.read(folder, None if known is None else known.state)
        packed = self._pack(parts.layers) if parts.layers else None
        self._loads += 1
        return parts, Weights(packed, parts.prompt)

    def _refuse_size(self, name: str, folder: Path) -> None:
        """Refuse files that cannot fit, before they are read: a number takes half of its bytes at the least,
        fp32 as bf16."""
        refuse_missing(folder)
        if sum(size for size, *_ in stat_of(folder)) > 4 * self._room.budget_bytes:
            raise too_large(name, self._room.budget_bytes)

    def _named(self, name: str) -> Version:
        version = self._names.get(name)
        if version is None:
            raise UnknownAdapterError(
                f"there is no adapter '{name}'", where=name, hint=did_you_mean(name, list(self._names))
            )
        return version

    def _retire(self, version: Version) -> None:
        version.current = False
        self._room.leave_if_done(version)
        self._changed.notify_all()

    def _in_memory(self, name: str) -> Version | None:
        """The version of a name where it is in memory; else it is asked for."""
        version = self._named(name)
        if version.weights is not None:
            return version
        if version.error is not None:
            error, version.error = version.error, None  # whoever comes next tries again
            raise error
        if self._closed:
            raise UserError("no more adapters are loaded: the server ends", where=name)
        self._room.ask(version)
        if not version.loading and version not in self._wanted:
            self._wanted.append(version)
            self._start_loader()
            self._changed.notify_all()
        return None

    def _start_loader(self) -> None:
        if self._loader is None:
            self._loader = threading.Thread(target=self._load_wanted, name="adapters", daemon=True)
            self._loader.start()

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
                error = UserError(
                    f"adapter '{version.name}' cannot be loaded: {type(failed).__name__}: {failed}",
                    where=str(version.facts.folder),
                    hint="look at its folder",
                )
            with self._changed:
                self._room.fill(version, weights)
                version.error = error
                self._changed.notify_all()
            del weights

    def _next_has_room(self) -> bool:
        """Whether the next version that is waited for has room now; it is made."""
        while self._wanted:
            version = self._wanted[0]
            if version.current and version.weights is None and self._room.is_asked_for(version):
                return self._room.make(version.bytes)
            self._wanted.popleft()
        return False

    def _loaded_again(self, version: Version) -> Weights:
        known = version.facts
        with self._reading:
            parts, weights = self._read(known.folder, known)
        if parts.facts.state.digest != known.state.digest:
            raise UserError(
                f"the files of adapter '{version.name}' are not those that were added",
                where=str(known.folder),
                hint="swap the adapter, to take what is there now",
            )
        return weights


def _refuse_name(name: str) -> None:
    if not name or len(name) > LONGEST_NAME or not name.isprintable() or name != name.strip():
        raise UserError(
            f"'{name[:40]}' cannot name an adapter", where="name", hint=f"give 1 to {LONGEST_NAME} printable characters"
        )
