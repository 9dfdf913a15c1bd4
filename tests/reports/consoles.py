"""What a console shows."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def printed(what: RenderableType, width: int = 80, **settings: bool) -> str:
    file = io.StringIO()
    Console(file=file, width=width, **settings).print(what)  # type: ignore[arg-type]
    return file.getvalue()
