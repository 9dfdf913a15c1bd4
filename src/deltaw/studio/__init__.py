"""Web page for training without programming: rows, model, settings, training, trying, and export.

:mod:`app` assembles the routes, and each module of pages has a function ``router``. The server imports no torch: slow
work runs in a worker process, a job or a trial. All state is in one folder, so a restart loses nothing.
"""

from __future__ import annotations

import importlib.util

from deltaw.errors import UserError

NEEDED = ("fastapi", "uvicorn", "httpx", "prometheus_client", "python_calamine")


def require_packages() -> None:
    """Raise a UserError if a package that the studio needs is not installed."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"the studio needs {', '.join(missing)}", hint='pip install "deltaw[studio]"')
