"""`deltaw push`: a run to a model hub."""

from __future__ import annotations

from typing import Any

import click

from deltaw.cli.mistakes import AdapterArgument
from deltaw.cli.options import console, json_flag, print_json
from deltaw.working import working

FOLDER = click.Path(exists=True, file_okay=False)


@click.command("push")
@click.argument("run", type=AdapterArgument())
@click.argument("repository", metavar="USER/NAME")
@click.option("--public", is_flag=True, help="let everybody see it  [default: private]")
@click.option("--revision", metavar="BRANCH", help="the branch to push to, made if there is none  [default: main]")
@click.option("--merged", type=FOLDER, help="send this merged model of the run instead of its adapter")
@click.option("--base", metavar="USER/NAME", help="the base model on the hub, if the run names a file or a package")
@click.option("--dry-run", is_flag=True, help="list what would be sent, and send nothing")
@json_flag
def command(run: str, repository: str, as_json: bool, **how: Any) -> None:
    """Send RUN's adapter to the hub as USER/NAME, with a model card, its settings and its tokenizer, never its rows.
    The token is that of HF_TOKEN or of 'hf auth login'."""
    out, notes = console(as_json), console(True)
    with working("starting"):
        from deltaw.export.push import push
        from deltaw.reports.tables import table
    done = push(run, repository, say=notes.say, **how)
    if as_json:
        print_json(done.as_dict())
        return
    out.print(table(["file", "bytes"], [(name, f"{size:,}") for name, size in sorted(done.files.items())]))
    seen = "private" if done.private else "public"
    out.say(f"sent to {done.url} ({seen}), commit {done.commit}" if done.url else f"nothing was sent ({seen})")
