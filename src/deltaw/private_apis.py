"""Lookup of private names in other libraries, which may be missing in some versions.

The private names of a library are collected in one module (:mod:`deltaw.kernels.torch_private`,
:mod:`deltaw.hub.transformers_private`) and resolved on import. Each has a fallback there, which is slower or raises an
error that names the missing feature.
"""

from __future__ import annotations

from typing import Any


def look_up(owner: object, path: str) -> Any:
    """Return an attribute by its dotted path, for example ``look_up(torch, "_C._DisableTorchDispatch")``.

    Returns None if this version of the library does not have it.
    """
    value: Any = owner
    for name in path.split("."):
        value = getattr(value, name, None)
    return value
