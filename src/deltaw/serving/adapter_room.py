"""The versions of adapters that there are, and which of them have room in memory.

The least recently used version that no request uses gives way first. Knows sizes and uses; not threads or
folders.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from deltaw.errors import UserError
from deltaw.kernels.decode import PackedAdapter
from deltaw.serving.adapter_folder import FolderFacts

# Seconds after which a request that asked for a version, and did not ask again, is believed to be gone; and
# after which a version that was loaded for it gives way to others.
PATIENCE, STAYS = 10.0, 3.0
NEVER = float("-inf")


@dataclass(frozen=True)
class Weights:
    """What of an adapter is in memory.

    Attributes:
        packed: its factors; None where it has none. prompt: (k, D) fp32, see :class:`AdapterParts`.
    """

    packed: PackedAdapter | None
    prompt: Tensor | None

    @property
    def bytes(self) -> int:
        factors = 0 if self.packed is None else self.packed.bytes
        return factors + (0 if self.prompt is None else self.prompt.nbytes)


@dataclass(eq=False)
class Version:
    """One content of a name.

    Attributes:
        number: that no other version has. bytes: of the weights.
        current: whether its name still stands for it. loading: whether it has room that is not filled yet.
        users: requests that use it. used: when one did last, by the room's count.
        asked: when a request last asked for it while it was not in memory, in seconds. came: when it was
            loaded for a request that has not come yet.
        error: why it could not be loaded, until somebody is told.
    """

    name: str
    number: int
    facts: FolderFacts
    bytes: int
    pinned: bool
    weights: Weights | None
    current: bool = True
    loading: bool = False
    users: int = 0
    used: int = 0
    asked: float = NEVER
    came: float = NEVER
    error: UserError | None = field(default=None, repr=False)


class Room:
    """The versions that are current or held, within a number of bytes.

    Args:
        budget_bytes: the most that their weights take.

    Attributes:
        versions: all of them. dropped: how many left memory to make room.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.versions: set[Version] = set()
        self.dropped = 0
        self._clock = itertools.count(1)

    def touch(self, version: Version) -> None:
        """A request uses it now."""
        version.used, version.asked, version.came = next(self._clock), NEVER, NEVER

    def ask(self, version: Version) -> None:
        """A request waits for it."""
        version.asked = time.monotonic()

    def is_asked_for(self, version: Version) -> bool:
        """Whether a request waits for it, as far as one can tell."""
        return time.monotonic() - version.asked < PATIENCE

    def fill(self, version: Version, weights: Weights | None) -> None:
        """Its weights are loaded; None where they cannot be."""
        version.loading = False
        if version in self.versions:
            version.weights, version.came = weights, time.monotonic()

    def stays(self, version: Version) -> bool:
        """Whether its weights must not go. What was loaded for a request stays until the request comes, or
        two adapters that are asked for would drive each other out for ever."""
        pinned = version.pinned and version.current
        return version.users > 0 or pinned or (version.current and time.monotonic() - version.came < STAYS)

    def taken(self) -> int:
        """The bytes of weights in memory, and of those that are being loaded."""
        return sum(v.bytes for v in self.versions if v.weights is not None or v.loading)

    def loaded(self) -> int:
        """How many versions have their weights in memory."""
        return sum(v.weights is not None for v in self.versions)

    def make(self, wanted: int) -> bool:
        """Let weights go that nobody uses, until so many bytes are free. None goes where all of them would
        not be enough."""
        free = self.budget_bytes - self.taken()
        going = []
        idle = [v for v in self.versions if v.weights is not None and not self.stays(v)]
        for version in sorted(idle, key=lambda v: v.used):
            if free >= wanted:
                break
            free += version.bytes
            going.append(version)
        if free < wanted:
            return False
        for version in going:
            version.weights = None
        self.dropped += len(going)
        return True

    def leave_if_done(self, version: Version) -> None:
        """A version without a name ends with its last request."""
        if not version.current and not version.users:
            version.weights = None
            self.versions.discard(version)

    def refuse(self, version: Version, others: Iterable[Version]) -> None:
        """Raise a UserError where, beside ``others``, some version would have no room even when nothing but
        the pinned ones is in memory."""
        after = [*others, version]
        pinned = sum(v.bytes for v in after if v.pinned)
        if pinned + max((v.bytes for v in after if not v.pinned), default=0) > self.budget_bytes:
            raise too_large(version.name, self.budget_bytes)


def too_large(name: str, budget: int) -> UserError:
    """The error for an adapter that cannot be in memory."""
    return UserError(
        f"adapter '{name}' has no room in the {budget / 1e6:,.1f} MB for adapters",
        where=name,
        hint="give adapters more memory, or pin fewer of them",
    )
