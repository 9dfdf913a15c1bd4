"""The OpenAI API over HTTP for any :class:`~deltaw.serving.request.TextEngine`.

:mod:`served` says what the application is given: an engine, how prompts become tokens, and what else it may
do, and :mod:`opening` makes it of models on disk. :mod:`app` puts the routes together, :mod:`server` runs
them with uvicorn. The routes know no models and no kernels. FastAPI, uvicorn and prometheus-client come with
the extra ``serve``; this file imports none of them, so that a command line can say what is missing.
"""

from __future__ import annotations

import importlib.util

from deltaw.errors import UserError

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def require_packages() -> None:
    """Raise a UserError where a package that the server needs is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}", hint='pip install "deltaw[serve]"')
