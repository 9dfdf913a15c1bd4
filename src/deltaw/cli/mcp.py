"""`deltaw mcp`: tools for an agent, over the Model Context Protocol."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click

from deltaw.errors import UserError


@click.command("mcp")
@click.option(
    "--allow", "folders", multiple=True, required=True, type=click.Path(path_type=Path),
    help="a folder in which the agent may name files; may be given several times",
)  # fmt: skip
@click.option("--allow-models", is_flag=True, help="models and rows may also come from packages and from a hub")
@click.option("--seconds", default=600, show_default=True, type=click.IntRange(1), help="that a call may take")
def command(folders: tuple[Path, ...], allow_models: bool, seconds: int) -> None:
    """Serve tools on standard input and output to an agent: check rows, plan, train, evaluate, generate. Paths must
    lie in the folders that --allow names; one training at a time."""
    if find_spec("mcp") is None:
        raise UserError("the server needs the package mcp", hint="pip install 'deltaw[mcp]'")
    from deltaw.serving.mcp_server import Allowed, serve

    serve(Allowed(folders, allow_models), seconds)
