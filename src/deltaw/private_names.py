"""Looking up private names of other libraries, which may be missing.

Names that begin with an underscore change without notice. Those of a library are gathered in one module
(:mod:`deltaw.kernels.torch_private`, :mod:`deltaw.hub.transformers_private`) and looked up when that is
imported. Each has a stand-in there: it takes more time, or refuses by name what cannot be done without it.
"""

from __future__ import annotations

from typing import Any


def look_up(owner: object, path: str) -> Any:
    """What stands behind dotted names of a library, as in ``look_up(torch, "_C._DisableTorchDispatch")``;
    None where this version has one of them no longer."""
    found: Any = owner
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
