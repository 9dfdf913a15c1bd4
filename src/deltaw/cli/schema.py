"""`deltaw schema`: the JSON schema of the settings file."""

from __future__ import annotations

import click


@click.command("schema")
@click.option("--output", type=click.Path(), help="write it to this file")
def command(output: str | None) -> None:
    """Print the JSON schema of a settings file, with which an editor completes and checks it."""
    from deltaw.durable import write_text
    from deltaw.schema import schema_text

    if output is None:
        click.echo(schema_text(), nl=False)
        return
    write_text(output, schema_text())
    click.echo(f"written to {output}; name it in the first line of a settings file:")
    click.echo(f"# yaml-language-server: $schema={output}")
