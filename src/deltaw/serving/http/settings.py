"""What a server is told: where it listens, who may ask, and how much of everything one request may take.

Knows values and their bounds; not HTTP.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaw.errors import UserError, checked_key
from deltaw.hub.folders import resolve_hub_id

# The names that adapters may have in requests: they stand in JSON, logs and metrics, never in paths.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# An API key, besides those of flags and files.
KEY_VARIABLE = "DELTAW_API_KEY"
# The shortest key that is worth one.
SHORTEST_KEY = 8


@dataclass(frozen=True)
class Limits:
    """The most that requests may take.

    Args:
        body: bytes of a request's body. bodies: of those of all requests in hand.
        depth: JSON containers within one another.
        prompt: tokens of one prompt. new_tokens: tokens of one text.
        choices: texts of one request, over its prompts and ``n``.
        queue: texts in hand at once, waiting or being written; more are refused with 429.
        connections: open connections at once; more are answered 503.
        seconds: for one request's texts, from the submission on.
        body_seconds: for a request's header, and once more for its body, to arrive.
        write_seconds: for a client to take what was written for it, before its connection is closed.
        keep_alive: seconds that an idle connection stays open.
        shutdown_seconds: for texts in hand to end at shutdown, before they are cancelled.
    """

    body: int = 4 << 20
    bodies: int = 64 << 20
    depth: int = 64
    prompt: int = 1 << 20
    new_tokens: int = 4096
    choices: int = 16
    queue: int = 256
    connections: int = 1024
    seconds: float = 600.0
    body_seconds: float = 20.0
    write_seconds: float = 30.0
    keep_alive: int = 15
    shutdown_seconds: float = 30.0


@dataclass(frozen=True)
class ServerSettings:
    """Where a server listens and whom it answers.

    Args:
        host: an address or a host's name. port: 0 for any free one.
        keys: API keys, of which a request must bring one; none for anybody.
        hosts: names that a request's Host header may have, besides those of the loopback interface; checked
            where the server listens on the loopback interface, or where any are given. It keeps web pages
            from reaching the server through a name that they made point to it (DNS rebinding).
        origins: whose web pages may ask (CORS).
        adapters_from: the folder below which adapters may be loaded by request; None: they may not.
        share_cache: whether what was computed for the prompts of one key is used for those of others.
        max_adapters: names of adapters that there may be at once.
        log_prompts: whether the log shows what was asked.
        certificate, certificate_key: files for TLS.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    adapters_from: Path | None = None
    share_cache: bool = False
    max_adapters: int = 1000
    log_prompts: bool = False
    certificate: Path | None = None
    certificate_key: Path | None = None
    limits: Limits = Limits()

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)

    def check(self, *, without_key: bool = False) -> None:
        """Refuse settings that cannot be meant.

        Args:
            without_key: whether anybody who reaches the address may ask.

        Raises:
            UserError: a key that is too short, an address for others without keys, a folder that is none.
        """
        for key in self.keys:
            if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                what = f"an API key must have {SHORTEST_KEY} or more printable ASCII characters and no spaces"
                raise UserError(what, hint="make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'")
        if not self.loopback and not self.keys and not without_key:
            hint = "set DELTAW_API_KEY or --api-key-file, or give --without-key if another program checks who asks"
            raise UserError(f"others reach {self.host}, and there is no API key", where="--host", hint=hint)
        if self.adapters_from is not None and not self.adapters_from.is_dir():
            raise UserError("there is no such folder", where=f"--adapters-from {self.adapters_from}")
        if (self.certificate is None) != (self.certificate_key is None):
            raise UserError("TLS needs a certificate and its key", hint="give --certificate and --certificate-key")
        for path in (self.certificate, self.certificate_key):
            if path is not None and not path.is_file():
                raise UserError("there is no such file", where=str(path))

    def described(self) -> list[str]:
        """The settings as lines for a person; keys are counted, not shown."""
        limits = self.limits
        who = "an API key" if self.keys else ""
        if len(self.keys) > 1:
            cached = "one cache of prompts" if self.share_cache else "a cache of prompts for each"
            who = f"one of {len(self.keys)} API keys, with {cached}"
        lines = [
            f"requests need {who}" if who else "requests need no API key",
            f"at most {limits.queue} texts in hand, {limits.new_tokens:,} new tokens a text, "
            f"{limits.choices} texts and {limits.body:,} bytes a request, {limits.seconds:g} s for it",
        ]
        if self.adapters_from is not None:
            lines.append(f"requests may load adapters from below {self.adapters_from}")
        if not self.loopback and self.certificate is None:
            passing = "requests and keys pass unencrypted: use --certificate, or a proxy with TLS"
            lines.append(f"warning: others reach {self.host}, and {passing}")
        if not self.loopback and not self.keys:
            lines.append(f"warning: whoever reaches {self.host} may ask")
        return lines


def read_keys(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The API keys of flags, of a file with one a line, and of DELTAW_API_KEY.

    Raises:
        UserError: the file cannot be read, or holds none.
    """
    keys = [*given]
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the keys cannot be read: {error}", where=str(file)) from error
        of_file = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not of_file:
            raise UserError("there is no key in the file", where=str(file), hint="write one a line")
        keys += of_file
    if os.environ.get(KEY_VARIABLE):
        keys.append(os.environ[KEY_VARIABLE])
    return tuple(checked_key(key, "--api-key, its file or DELTAW_API_KEY") for key in dict.fromkeys(keys))


def named_folders(given: Sequence[str]) -> dict[str, Path]:
    """Adapters as they are named on the command line: ``name=folder``, or a hub id in the folder's place.

    Raises:
        UserError: one is not written so, its name is none, or is given twice.
    """
    folders: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise UserError(f"'{text}' is no adapter", where="--adapter", hint="write --adapter name=folder")
        check_name(name, "--adapter")
        if name in folders:
            raise UserError(f"two adapters are named '{name}'", where="--adapter")
        if not Path(folder).is_dir() and resolve_hub_id(folder) is None:
            raise UserError("there is no such folder", where=f"--adapter {text}")
        folders[name] = Path(folder)
    return folders


def is_loopback(host: str) -> bool:
    """Whether an address, or a host's name, is the loopback interface's."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_name(name: str, where: str) -> str:
    """A name for an adapter.

    Raises:
        UserError: it has other characters than letters, digits, ``.``, ``_`` and ``-``, or is too long.
    """
    if not NAME.fullmatch(name):
        hint = "use up to 128 letters, digits, '.', '_' and '-', the first a letter or a digit"
        raise UserError(f"{name[:80]!r} is not a valid name of an adapter", where=where, hint=hint)
    return name
