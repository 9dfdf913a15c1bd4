"""`deltaw push`: upload a run to a model hub."""

from __future__ import annotations

from typing import Any

import click

from deltaw.cli.options import console, json_flag, print_json
from deltaw.cli.suggestions import AdapterArgument
from deltaw.progress import track_progress

FOLDER = click.Path(exists=True, file_okay=False)


@click.command("push")
@click.argument("run", type=AdapterArgument())
@click.argument("repository", metavar="USER/NAME")
@click.option("--public", is_flag=True, help="create a public repository  [default: private]")
@click.option("--revision", metavar="BRANCH", help="branch to push to, created if missing  [default: main]")
@click.option("--merged", type=FOLDER, help="folder of the run's merged model, uploaded instead of the adapter")
@click.option("--base-model", "base", metavar="USER/NAME", help="hub id of the base model, if it is a file or package")
@click.option("--dry-run", is_flag=True, help="list the files without uploading them")
@json_flag
def command(run: str, repository: str, as_json: bool, **options: Any) -> None:
    """Upload RUN's adapter to the hub as USER/NAME, with a model card, its settings and its tokenizer. Rows are never
    uploaded. The token is read from HF_TOKEN or the login of 'hf auth login'.
    """
    out = console(as_json)
    notes = console(True)
    with track_progress("starting"):
        from deltaw.export.push import push
        from deltaw.reports.tables import table
    result = push(run, repository, log=notes.print_line, **options)
    if as_json:
        print_json(result.as_dict())
        return
    out.print(table(["file", "bytes"], [(name, f"{size:,}") for name, size in sorted(result.files.items())]))
    visibility = "private" if result.private else "public"
    summary = f"uploaded to {result.url}, commit {result.commit}" if result.url else "dry run: no files were uploaded"
    out.print_line(f"{summary} ({visibility})")
