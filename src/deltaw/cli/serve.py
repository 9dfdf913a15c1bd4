"""`deltaw serve`: the OpenAI API over a base model and its adapters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from deltaw.cli.mistakes import RunArgument
from deltaw.cli.options import Command, Verb, console, model_flags, verbose_flag, with_options
from deltaw.serving.http.settings import Limits, ServerSettings, named_folders, read_keys
from deltaw.working import working

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
POOLING = click.Choice(["auto", "mean", "first", "last"])
KEY_HELP = "a key that requests must bring; others on this machine see it: DELTAW_API_KEY or a file is better"
SECONDS = click.FloatRange(0, min_open=True)
# The limits by their names in Limits: flag, kind, and what is said of it.
LIMITS: dict[str, tuple[str, click.ParamType, str]] = {
    "queue": ("--queue", click.IntRange(1), "texts in hand at once, waiting or being written; more get 429"),
    "new_tokens": ("--max-new-tokens", click.IntRange(1), "tokens of one text"),
    "prompt": ("--max-prompt-tokens", click.IntRange(1), "tokens of one prompt"),
    "choices": ("--max-choices", click.IntRange(1, 1024), "texts of one request, over its prompts and n"),
    "body": ("--max-body", click.IntRange(1024), "bytes of a request's body"),
    "bodies": ("--max-bodies", click.IntRange(1024), "bytes of all bodies in hand; more get 429"),
    "depth": ("--max-depth", click.IntRange(4, 200), "JSON objects and lists within one another"),
    "connections": ("--max-connections", click.IntRange(1), "open connections at once"),
    "seconds": ("--request-seconds", SECONDS, "seconds for the texts of one request"),
    "body_seconds": ("--body-seconds", SECONDS, "seconds for a header, and for a body, to arrive"),
    "write_seconds": ("--write-seconds", SECONDS, "seconds for a client to read what was written"),
    "keep_alive": ("--keep-alive", click.IntRange(1), "seconds that an idle connection stays open"),
    "shutdown_seconds": ("--shutdown-seconds", click.FloatRange(0), "seconds for texts to end at shutdown"),
}


GROUPS = {
    "Common": ("adapters", "name", "host", "port", "keys", "model", "precision", "device", "no_page"),
    "Who may ask": (
        *("api_key_file", "without_key", "hosts", "origins", "certificate", "certificate_key", "share_cache"),
        *("log", "log_prompts"),
    ),
    "Adapters and memory": ("adapters_from", "max_adapters", "running", "cache_memory", "adapter_memory"),
    "Model": ("trust_remote_code", "pooling", "no_normalize"),
    "Limits": tuple(LIMITS),
}


def _limit_flags(command: Command) -> Command:
    """A flag for each of the server's limits, with its default."""
    options = [
        click.option(flag, name, default=getattr(Limits, name), show_default=True, type=kind, help=told)
        for name, (flag, kind, told) in LIMITS.items()
    ]
    return with_options(command, *options)


@click.command("serve", cls=Verb, groups=GROUPS)
@click.argument("base", type=RunArgument())
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=FOLDER", help="an adapter; several times")
@click.option("--name", help="the base model's name in requests  [default: BASE as given]")
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one")
@click.option("--api-key", "keys", multiple=True, help=KEY_HELP)
@click.option("--api-key-file", type=FILE, help="a file of keys, one a line")
@click.option("--without-key", is_flag=True, help="let anybody ask who reaches an address that is not loopback")
@click.option("--adapters-from", type=FOLDER, help="let requests load adapters from below this folder, and unload them")
@click.option("--max-adapters", default=1000, show_default=True, type=click.IntRange(1), help="adapters at once")
@click.option("--share-cache", is_flag=True, help="let API keys share computed prompts; each sees what others asked")
@click.option("--allow-host", "hosts", multiple=True, help="a name in Host headers besides the loopback's")
@click.option("--cors-origin", "origins", multiple=True, help="an origin whose web pages may ask")
@click.option("--certificate", type=FILE, help="a certificate for TLS (PEM)")
@click.option("--certificate-key", type=FILE, help="the certificate's key (PEM)")
@click.option("--log", default="json", show_default=True, type=click.Choice(["json", "off"]), help="on standard error")
@click.option("--log-prompts", is_flag=True, help="log what was asked too")
@click.option("--running", default=64, show_default=True, type=click.IntRange(1), help="texts written at once")
@click.option("--cache-memory", help="for keys and values, such as 2GB  [default: a quarter of what is free]")
@click.option("--adapter-memory", default="1GB", show_default=True, help="for adapters; others wait on disk")
@click.option("--no-page", is_flag=True, help="no page at /")
@click.option(
    "--pooling", default="auto", show_default=True, type=POOLING, help="how vectors of tokens become a text's"
)
@click.option("--no-normalize", is_flag=True, help="leave an encoder's vectors as long as they are")
@_limit_flags
@model_flags
@verbose_flag
def command(base: str, adapters: tuple[str, ...], name: str | None, log: str, without_key: bool, **given: Any) -> None:
    """Serve BASE, a model or a run's folder, and adapters over HTTP as the OpenAI API does. In
    requests, `model` names the base or an adapter. Encoders serve embeddings, classifiers
    classes. Ctrl-C or SIGTERM lets texts in hand end."""
    from deltaw.serving.http import require_packages
    from deltaw.training.planning.asked import parse_bytes

    require_packages()
    how = {key: given.pop(key) for key in ("model", "trust_remote_code", "precision", "device", "pooling", "running")}
    how |= {key: not given.pop(f"no_{key}") for key in ("page", "normalize")}
    for kind in ("cache", "adapter"):
        memory = given.pop(f"{kind}_memory")
        how[f"{kind}_bytes"] = None if memory is None else parse_bytes(memory, f"--{kind}-memory")
    limits = Limits(**{key: given.pop(key) for key in LIMITS})
    keys = read_keys(given.pop("keys"), given.pop("api_key_file"))
    settings = ServerSettings(keys=keys, limits=limits, **given)
    settings.check(without_key=without_key)
    folders = named_folders(adapters)
    notes = console(True)
    with working("starting"):
        from deltaw.serving.http import server
        from deltaw.serving.http.app import create_app
        from deltaw.serving.http.guard import request_log
        from deltaw.serving.http.opening import Opening, open_any
    bound = server.listening_socket(settings)  # before the model, which takes its time
    served = open_any(base, folders, Opening(name=name, **how), settings.limits, say=notes.say)
    try:
        app, desk = create_app(served, settings)
        for line in settings.described():
            notes.say(line)
        url = server.url_of(settings, bound)

        def ready() -> None:
            click.echo(f"serving {', '.join([served.name, *served.adapters()])} at {url}")
            sys.stdout.flush()

        with request_log(sys.stderr if log == "json" else None):
            interrupted = server.run(app, desk, settings, bound, ready)
    finally:
        served.close()
    if desk is not None:
        desk.close()
    if interrupted:
        raise KeyboardInterrupt
