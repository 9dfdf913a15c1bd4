"""Calls that need torch, in a worker process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deltaw.errors import UserError
from deltaw.studio.workspace import Workspace

# Functions that run in the worker process, by name.
CALLS: dict[str, Callable[..., dict[str, Any]]] = {}


@dataclass(frozen=True)
class Pending:
    """A call that is not finished after this number of seconds."""

    seconds: float


class Worker:
    """Client of the worker process, which is started on first use.

    Args:
        workspace: Folder of the studio.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def result(self, call: str, arguments: Mapping[str, Any]) -> Pending | dict[str, Any]:
        """Return the result of a call, or Pending. The call is started if it is not known.

        Raises:
            UserError: if the call failed.
        """
        raise UserError(f"the worker cannot {call} yet")

    def cancel(self, call: str) -> None:
        """Kill the process of a running call."""

    def close(self) -> None:
        """Kill the worker."""
