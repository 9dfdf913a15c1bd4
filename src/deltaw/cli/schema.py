"""`deltaw schema`: print the JSON schema of the settings file."""

from __future__ import annotations

import click


@click.command("schema")
@click.option("--output", type=click.Path(), help="output file  [default: standard output]")
def command(output: str | None) -> None:
    """Print the JSON schema of the settings file, for completion and validation in editors."""
    from deltaw.atomic_files import write_text
    from deltaw.settings.schema import schema_text

    if output is None:
        click.echo(schema_text(), nl=False)
        return
    write_text(output, schema_text())
    click.echo(f"written to {output}; add this line at the top of a settings file:")
    click.echo(f"# yaml-language-server: $schema={output}")
