"""What was measured of this machine: remembered in the cache folder, and handed from process to process.

A process that starts others tells them what it knows, and learns from them, so that all of an experiment
choose alike, also where the cache folder cannot be written to. Knows keys and JSON; not what is measured.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping

from deltaw.cache import recall, remember, stamp
from deltaw.kernels.variants import MEASURED

KIND = "products"
# Among what a process is told, an entry that stands for every key.
ANY = "*"

# By a hash of the key: the key and what this process uses of it; and what other processes measured.
_used: dict[str, tuple[object, object]] = {}
_learned: dict[str, object] = {}


def for_any() -> object:
    """What the process was told to use for every key; None where it was told nothing of the kind."""
    return _told().get(ANY)


def known(key: object, usable: Callable[[object], bool]) -> object | None:
    """What is known for ``key``: used before in this process, told, learned, or remembered; None where
    nothing of it is ``usable``."""
    name = _name(key)
    places = (
        lambda: _used[name][1] if name in _used else None,
        lambda: _told().get(name),
        lambda: _learned.get(name),
        lambda: recall(KIND, key),
    )
    for place in places:
        value = place()
        if value is not None and usable(value):
            _used[name] = (key, value)
            return value
    return None


def keep(key: object, value: object, lasting: bool) -> None:
    """Use ``value``, which JSON can hold, for ``key`` in this process and its children; where ``lasting``, in
    later ones too."""
    _used[_name(key)] = (key, value)
    if lasting:
        remember(KIND, key, value)


def used() -> dict[str, object]:
    """What this process uses, ready for JSON; :func:`learn` takes it in another process."""
    return {name: value for name, (_, value) in _used.items()}


def learn(told: object) -> None:
    """Take what another process uses: what it starts later is told of it."""
    if isinstance(told, Mapping):
        _learned.update(told)


def for_children() -> dict[str, str]:
    """Variables of the environment with which a new process makes the same choices as this one."""
    told = {**_told(), **_learned, **used()}
    return {MEASURED: json.dumps(told)} if told else {}


def basis() -> list[list[object]]:
    """What the choices of this process rest on: kind and key of each remembered result, and its state."""
    return [[KIND, key, stamp(KIND, key)] for key, _ in _used.values()]


def _told() -> Mapping[str, object]:
    """What the process was started with."""
    text = os.environ.get(MEASURED, "")
    try:
        told = json.loads(text) if text else {}
    except ValueError:
        return {}
    return told if isinstance(told, Mapping) else {}


def _name(key: object) -> str:
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
