"""`deltaw studio`: train, try and export from a web page."""

from __future__ import annotations

import os
import platform
import sys
import threading
import webbrowser
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from deltaw.cli.options import console

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("studio")
@click.argument("folder", default="studio", type=click.Path(file_okay=False, path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="port; 0: a free one")
@click.option("--allow-host", "hosts", multiple=True, help="name allowed in Host headers in addition to loopback names")
@click.option("--certificate", type=FILE, help="TLS certificate (PEM)")
@click.option("--certificate-key", type=FILE, help="key of the TLS certificate (PEM)")
@click.option("--max-upload", default="512MB", show_default=True, help="maximum size of an uploaded file")
@click.option("--no-browser", is_flag=True, help="do not open a browser")
def command(folder: Path, max_upload: str, no_browser: bool, **flags: Any) -> None:
    """Open a web page to train, try and export without programming. Rows, runs and exports are in FOLDER, by default
    `studio`. Trainings continue if the studio is closed.
    """
    from deltaw.memory.plan import parse_bytes
    from deltaw.studio import require_packages

    require_packages()
    from deltaw.serving.http import server
    from deltaw.serving.http.settings import ServerSettings
    from deltaw.studio.app import create_app
    from deltaw.studio.guard import Token
    from deltaw.studio.jobs import JobQueue
    from deltaw.studio.state import Studio
    from deltaw.studio.trial import TrialServer
    from deltaw.studio.worker import Worker
    from deltaw.studio.workspace import Workspace

    token = Token(lambda value: click.echo(f"open {url}/?token={value}"))
    settings = ServerSettings(keys=(token.value,), **flags)
    settings.check()
    workspace = Workspace(folder, parse_bytes(max_upload, "--max-upload"))
    listening = server.listening_socket(settings)
    url = server.server_url(settings, listening)
    studio = Studio(workspace, Worker(workspace), JobQueue(workspace), TrialServer(workspace))
    for line in settings.summary_lines():
        if line.startswith("warning"):
            console(True).print_line(line)

    def ready() -> None:
        address = f"{url}/?token={token.value}"
        click.echo(f"studio of {workspace.folder} at {address}")
        sys.stdout.flush()
        if not no_browser:
            # Other users can see the browser's command line, so it contains a file that only this user can read.
            # The call is in a thread because some browsers return only when they exit.
            page = redirect_page(file, address)
            threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()

    studio.queue.start()
    file = workspace.partial_file().with_suffix(".html")
    try:
        app = create_app(studio, replace(settings, port=listening.getsockname()[1]), token)
        server.run(app, None, settings, listening, ready)
    finally:
        file.unlink(missing_ok=True)
        studio.close()


def redirect_page(file: Path, address: str) -> str:
    """Write a page that redirects to ``address``, and return its URI. On Windows, return ``address`` itself."""
    if os.name != "posix" or "microsoft" in platform.release().lower():  # Windows browsers cannot open paths of WSL
        return address
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as page:
        page.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={address}">')
    return file.as_uri()
