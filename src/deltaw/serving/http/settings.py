"""Settings of the HTTP server: address, authentication and limits."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaw.errors import UserError, validate_key
from deltaw.hub.folders import resolve_hub_id

# Valid adapter names. Names appear in JSON, logs and metrics, but not in paths.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Host header: a name or an address, with an optional port.
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^][:/?#]+)(?::[0-9]+)?")
# Environment variable with an API key.
KEY_VARIABLE = "DELTAW_API_KEY"
# Minimum length of an API key.
MIN_KEY_LENGTH = 8


@dataclass(frozen=True)
class Limits:
    """Limits of requests and connections.

    Args:
        body: Maximum size of a request body in bytes.
        bodies: Maximum total size of the bodies of pending requests in bytes.
        depth: Maximum nesting depth of JSON.
        prompt: Maximum number of tokens of a prompt.
        new_tokens: Maximum number of tokens to generate per completion.
        choices: Maximum number of completions per request, over all prompts and ``n``.
        queue: Maximum number of pending completions. Further requests are answered with status 429.
        connections: Maximum number of open connections. Further connections are answered with status 503.
        seconds: Time limit for generation, from submission on.
        body_seconds: Time limit for receiving a header, and for receiving a body.
        write_seconds: Time limit for a client to read sent data, after which its connection is closed.
        keep_alive: Seconds until an idle connection is closed.
        shutdown_seconds: Seconds at shutdown until pending completions are cancelled.
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
    """Settings of a server.

    Args:
        host: Address or host name to listen on.
        port: Port to listen on. 0 for any free port.
        keys: API keys, one of which a request must contain. Empty to disable authentication.
        hosts: Permitted Host headers, in addition to names of the loopback interface. The header is checked on the
            loopback interface, or if ``hosts`` is not empty. This prevents DNS rebinding attacks by web pages.
        origins: Permitted origins of web pages (CORS).
        adapters_from: Folder below which requests may load adapters, or None to disable loading.
        share_cache: Share the prefix cache between API keys.
        max_adapters: Maximum number of adapters.
        log_prompts: Log prompts.
        certificate: Certificate file for TLS, or None.
        certificate_key: Key file of the certificate, or None.
        limits: Limits of requests.
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
        """True if only this machine can connect to the server."""
        return is_loopback(self.host)

    def check(self, *, without_key: bool = False) -> None:
        """Validate the settings.

        Args:
            without_key: Allow other machines to connect without an API key.

        Raises:
            UserError: if a key is too short, an accessible address has no keys, or a file or folder does not exist.
        """
        for key in self.keys:
            if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
                message = f"an API key must have {MIN_KEY_LENGTH} or more printable ASCII characters and no spaces"
                raise UserError(message, hint="create it: python -c 'import secrets; print(secrets.token_urlsafe(32))'")
        if not self.loopback and not self.keys and not without_key:
            hint = "set DELTAW_API_KEY or --api-key-file, or use --without-key if a proxy authenticates requests"
            raise UserError(f"{self.host} accepts other machines without an API key", location="--host", hint=hint)
        if self.adapters_from is not None and not self.adapters_from.is_dir():
            raise UserError("no such folder", location=f"--adapters-from {self.adapters_from}")
        if (self.certificate is None) != (self.certificate_key is None):
            raise UserError("TLS needs a certificate and its key", hint="use --certificate and --certificate-key")
        for path in (self.certificate, self.certificate_key):
            if path is not None and not path.is_file():
                raise UserError("no such file", location=str(path))

    def summary_lines(self) -> list[str]:
        """Return a summary of the settings as text lines. Keys are only counted."""
        limits = self.limits
        keys_text = "an API key" if self.keys else ""
        if len(self.keys) > 1:
            cached = "a shared prompt cache" if self.share_cache else "separate prompt caches"
            keys_text = f"one of {len(self.keys)} API keys, with {cached}"
        lines = [
            f"requests need {keys_text}" if keys_text else "requests need no API key",
            f"limits: {limits.queue} pending completions, {limits.new_tokens:,} new tokens per completion, "
            f"{limits.choices} completions, {limits.body:,} bytes and {limits.seconds:g} s per request",
        ]
        if self.adapters_from is not None:
            lines.append(f"requests may load adapters from below {self.adapters_from}")
        if not self.loopback and self.certificate is None:
            advice = "requests and keys are unencrypted: use --certificate, or a proxy with TLS"
            lines.append(f"warning: {self.host} accepts other machines, and {advice}")
        if not self.loopback and not self.keys:
            lines.append(f"warning: {self.host} accepts requests of other machines without an API key")
        return lines


def read_keys(flag_keys: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """Return the API keys from command-line flags, a file with one key per line, and DELTAW_API_KEY.

    Raises:
        UserError: if the file cannot be read or contains no key.
    """
    keys = [*flag_keys]
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the keys cannot be read: {error}", location=str(file)) from error
        file_keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not file_keys:
            raise UserError("the file contains no key", location=str(file), hint="write one key per line")
        keys += file_keys
    keys += filter(None, [os.environ.get(KEY_VARIABLE)])
    return tuple(validate_key(key, "--api-key, its file or DELTAW_API_KEY") for key in dict.fromkeys(keys))


def read_adapter_folders(arguments: Sequence[str]) -> dict[str, Path]:
    """Parse adapters from the command line: ``name=folder`` or ``name=HUB_ID``.

    Raises:
        UserError: if an argument is malformed, or a name is invalid or used twice.
    """
    folders: dict[str, Path] = {}
    for text in arguments:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise UserError(f"'{text}' is not an adapter", location="--adapter", hint="use --adapter name=folder")
        check_name(name, "--adapter")
        if name in folders:
            raise UserError(f"two adapters are named '{name}'", location="--adapter")
        if not Path(folder).is_dir() and resolve_hub_id(folder) is None:
            raise UserError("no such folder", location=f"--adapter {text}")
        folders[name] = Path(folder)
    return folders


def is_loopback(host: str) -> bool:
    """True if an address or a host name is that of the loopback interface."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def known_host(host: str, names: Collection[str]) -> bool:
    """True if a Host header names the loopback interface or one of ``names``, which are in lower case."""
    match = _HOST.fullmatch(host.lower())
    return match is not None and (is_loopback(match[1]) or match[1] in names)


def check_name(name: str, location: str) -> str:
    """Validate the name of an adapter, and return it.

    Raises:
        UserError: if it contains characters other than letters, digits, ``.``, ``_`` and ``-``, or is too long.
    """
    if not NAME.fullmatch(name):
        hint = "use up to 128 letters, digits, '.', '_' and '-', the first a letter or a digit"
        raise UserError(f"{name[:80]!r} is not a valid adapter name", location=location, hint=hint)
    return name
