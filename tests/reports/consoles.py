"""Rendering of rich objects as text."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def render_text(renderable: RenderableType, width: int = 80, **settings: bool) -> str:
    file = io.StringIO()
    Console(file=file, width=width, **settings).print(renderable)  # type: ignore[arg-type]
    return file.getvalue()
