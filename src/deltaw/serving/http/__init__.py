"""OpenAI-compatible HTTP API for any :class:`~deltaw.decoding.request.TextEngine`.

:mod:`opening` loads models, :mod:`served` describes a loaded model, :mod:`app` builds the application and :mod:`server`
runs it with uvicorn. FastAPI, uvicorn and prometheus-client are in the extra ``serve``. This module imports none of
them, so that :func:`require_packages` can report missing packages.
"""

from __future__ import annotations

import importlib.util

from deltaw.errors import UserError

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def require_packages() -> None:
    """Raise a UserError if a package that the server needs is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}", hint='pip install "deltaw[serve]"')
