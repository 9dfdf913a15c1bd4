"""`deltaw serve`: serve a base model and its adapters with the OpenAI API."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from deltaw.cli.options import Command, GroupedCommand, console, model_flags, verbose_flag, with_options
from deltaw.cli.suggestions import RunArgument
from deltaw.progress import track_progress
from deltaw.serving.http.settings import Limits, ServerSettings, read_adapter_folders, read_keys

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
POOLING = click.Choice(["auto", "mean", "first", "last"])
KEY_HELP = "API key; visible to other users of this machine, so prefer DELTAW_API_KEY or --api-key-file"
SECONDS = click.FloatRange(0, min_open=True)
# Limits by field name of Limits: flag, type and description.
LIMITS: dict[str, tuple[str, click.ParamType, str]] = {
    "queue": ("--queue", click.IntRange(1), "maximum number of queued and running texts; then status 429"),
    "new_tokens": ("--max-new-tokens", click.IntRange(1), "maximum number of generated tokens per text"),
    "prompt": ("--max-prompt-tokens", click.IntRange(1), "maximum number of tokens per prompt"),
    "choices": ("--max-choices", click.IntRange(1, 1024), "maximum number of texts per request (prompts times n)"),
    "body": ("--max-body", click.IntRange(1024), "maximum size of a request body in bytes"),
    "bodies": ("--max-bodies", click.IntRange(1024), "maximum bytes of all request bodies; then status 429"),
    "depth": ("--max-depth", click.IntRange(4, 200), "maximum nesting depth of JSON"),
    "connections": ("--max-connections", click.IntRange(1), "maximum number of open connections"),
    "seconds": ("--request-seconds", SECONDS, "time limit of a request in seconds"),
    "body_seconds": ("--body-seconds", SECONDS, "time limit in seconds to receive a header, and to receive a body"),
    "write_seconds": ("--write-seconds", SECONDS, "time limit in seconds for a client to read the response"),
    "keep_alive": ("--keep-alive", click.IntRange(1), "timeout of idle connections in seconds"),
    "shutdown_seconds": ("--shutdown-seconds", click.FloatRange(0), "time limit in seconds for texts at shutdown"),
}


GROUPS = {
    "Common": (
        "adapters",
        "name",
        "host",
        "port",
        "keys",
        "model",
        "precision",
        "device",
        "sampler",
        "no_system",
        "no_page",
    ),
    "Access": (
        *("api_key_file", "without_key", "hosts", "origins", "certificate", "certificate_key", "share_cache"),
        *("log", "log_prompts"),
    ),
    "Adapters and memory": ("adapters_from", "max_adapters", "running", "cache_memory", "adapter_memory"),
    "Model": ("trust_remote_code", "pooling", "no_normalize"),
    "Limits": tuple(LIMITS),
}


def _limit_flags(command: Command) -> Command:
    """Add a flag for each limit of the server."""
    options = [
        click.option(flag, name, default=getattr(Limits, name), show_default=True, type=kind, help=description)
        for name, (flag, kind, description) in LIMITS.items()
    ]
    return with_options(command, *options)


@click.command("serve", cls=GroupedCommand, groups=GROUPS)
@click.argument("base", type=RunArgument())
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=FOLDER", help="adapter to serve; can be repeated")
@click.option("--name", help="name of the base model in requests  [default: BASE]")
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="port; 0: a free one")
@click.option("--api-key", "keys", multiple=True, help=KEY_HELP)
@click.option("--api-key-file", type=FILE, help="file with one API key per line")
@click.option("--without-key", is_flag=True, help="allow requests without a key on addresses other than loopback")
@click.option("--adapters-from", type=FOLDER, help="folder from which requests may load and unload adapters")
@click.option("--max-adapters", default=1000, show_default=True, type=click.IntRange(1), help="maximum loaded adapters")
@click.option("--share-cache", is_flag=True, help="share the prefix cache between API keys; timing reveals prompts")
@click.option("--allow-host", "hosts", multiple=True, help="name allowed in Host headers in addition to loopback names")
@click.option("--cors-origin", "origins", multiple=True, help="origin of web pages that may send requests")
@click.option("--certificate", type=FILE, help="TLS certificate (PEM)")
@click.option("--certificate-key", type=FILE, help="key of the TLS certificate (PEM)")
@click.option("--log", default="json", show_default=True, type=click.Choice(["json", "off"]), help="log on stderr")
@click.option("--log-prompts", is_flag=True, help="also log prompts")
@click.option("--running", default=64, show_default=True, type=click.IntRange(1), help="maximum concurrent texts")
@click.option("--cache-memory", help="memory for the KV cache, such as 2GB  [default: a quarter of the free memory]")
@click.option("--adapter-memory", default="1GB", show_default=True, help="memory for adapters; the rest stays on disk")
@click.option("--no-system", is_flag=True, help="do not add a run's system prompt to chats without one")
@click.option("--no-page", is_flag=True, help="disable the web page at /")
@click.option("--pooling", default="auto", show_default=True, type=POOLING, help="pooling of token vectors")
@click.option("--no-normalize", is_flag=True, help="do not normalize the vectors of an encoder")
@_limit_flags
@model_flags
@verbose_flag
def command(base: str, adapters: tuple[str, ...], name: str | None, log: str, without_key: bool, **flags: Any) -> None:
    """Serve BASE, a model or the folder of a run, and adapters over HTTP with the OpenAI API. In requests, `model` is
    the name of the base model or an adapter. Encoders serve embeddings, classifiers serve classes. Ctrl-C or SIGTERM
    finishes running texts before exiting.
    """
    from deltaw.memory.plan import parse_bytes
    from deltaw.serving.http import require_packages

    require_packages()
    names = ("model", "trust_remote_code", "precision", "device", "sampler", "pooling", "running")
    open_options = {key: flags.pop(key) for key in names}
    open_options |= {key: not flags.pop(f"no_{key}") for key in ("page", "system", "normalize")}
    for kind in ("cache", "adapter"):
        memory = flags.pop(f"{kind}_memory")
        open_options[f"{kind}_bytes"] = None if memory is None else parse_bytes(memory, f"--{kind}-memory")
    limits = Limits(**{key: flags.pop(key) for key in LIMITS})
    settings = ServerSettings(keys=read_keys(flags.pop("keys"), flags.pop("api_key_file")), limits=limits, **flags)
    settings.check(without_key=without_key)
    folders = read_adapter_folders(adapters)
    notes = console(True)
    with track_progress("starting"):
        from deltaw.serving.http import server
        from deltaw.serving.http.app import create_app
        from deltaw.serving.http.guard import request_log
        from deltaw.serving.http.opening import OpenOptions, open_any
    listening = server.listening_socket(settings)  # before the model is loaded, to fail early if the port is taken
    opened = open_any(base, folders, OpenOptions(name=name, **open_options), settings.limits, log=notes.print_line)
    try:
        app, request_queue = create_app(opened, settings)
        for line in settings.summary_lines():
            notes.print_line(line)
        url = server.server_url(settings, listening)

        def ready() -> None:
            click.echo(f"serving {', '.join([opened.name, *opened.adapters()])} at {url}")
            sys.stdout.flush()

        with request_log(sys.stderr if log == "json" else None):
            interrupted = server.run(app, request_queue, settings, listening, ready)
    finally:
        opened.close()
    if request_queue is not None:
        request_queue.close()
    if interrupted:
        raise KeyboardInterrupt
