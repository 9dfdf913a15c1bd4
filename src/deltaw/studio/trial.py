"""Process that serves a run, so that it can be tried in the browser. There is at most one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deltaw.studio.workspace import Workspace


class Trial:
    """Process that serves a run.

    Args:
        workspace: Folder of the studio.

    Attributes:
        state: ``none``, ``starting``, ``ready`` or ``failed``.
        run: Folder of the run, or None.
        message: Error message.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self.state, self.message = "none", ""
        self.run: Path | None = None

    def start(self, run: Path, others: Sequence[Path]) -> None:
        """Serve a run, and other runs next to it."""

    def stop(self) -> None:
        """Stop the process."""
