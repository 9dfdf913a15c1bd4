"""`deltaw completion`: shell completion of commands, flags and choices."""

from __future__ import annotations

import click


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL. For bash: eval "$(deltaw completion bash)" in ~/.bashrc."""
    from click.shell_completion import get_completion_class

    completion_class = get_completion_class(shell)
    assert completion_class is not None  # all choices are supported
    # Avoids click's check of the installed bash version: the script may be used on another machine.
    source = completion_class(context.find_root().command, {}, "deltaw", "_DELTAW_COMPLETE")
    click.echo(source.source_template % source.source_vars())
