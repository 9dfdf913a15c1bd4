"""`deltaw mcp`: serve tools for agents with the Model Context Protocol."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click

from deltaw.errors import UserError


@click.command("mcp")
@click.option(
    "--allow", "folders", multiple=True, required=True, type=click.Path(path_type=Path),
    help="folder that the agent may access; can be repeated",
)  # fmt: skip
@click.option("--allow-models", is_flag=True, help="also allow models and rows from packages and from a hub")
@click.option("--seconds", default=600, show_default=True, type=click.IntRange(1), help="time limit of a call")
def command(folders: tuple[Path, ...], allow_models: bool, seconds: int) -> None:
    """Serve tools to an agent on standard input and output: check rows, plan, train, evaluate and generate. Paths must
    be inside the folders given by --allow. Only one training runs at a time.
    """
    if find_spec("mcp") is None:
        raise UserError("the server requires the package mcp", hint="pip install 'deltaw[mcp]'")
    from deltaw.cli.mcp_server import serve
    from deltaw.runs.permissions import FolderPermissions

    serve(FolderPermissions(folders, allow_models), seconds)
