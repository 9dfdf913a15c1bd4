"""`deltaw completion`: the script with which a shell completes verbs, flags and choices."""

from __future__ import annotations

import click


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL. For bash: eval "$(deltaw completion bash)" in ~/.bashrc."""
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None  # of the shells above
    # Without asking a bash of the system for its version, which the machine of the script need not have.
    source = made(context.find_root().command, {}, "deltaw", "_DELTAW_COMPLETE")
    click.echo(source.source_template % source.source_vars())
