"""UserError, the error for invalid user input, helpers for messages, and lookup of private names.

All code that rejects user input raises :class:`UserError`. The command line prints its message and exits with status
2. Any other exception is a bug in deltaw.
"""

from __future__ import annotations

import base64
import difflib
import functools
import itertools
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

# Names of environment variables with secrets. Short values are not redacted, because they would match ordinary words.
_SECRET_VARIABLE = re.compile(r"(?:TOKEN|SECRET|PASSWORD|KEY)\Z", re.IGNORECASE)
_SHORTEST_SECRET, _SHORTEST_VALUE, _SHORTEST_TRUNCATED = 6, 8, 16
# Rest of a secret that another program truncated.
_TAIL = r"[^\s\"'<>\\]*"
# User names, passwords and keys in URLs.
_PATTERNS = {
    r"(?<=//)[^/\s\"'<>]+(?=@)": None,
    r"(?<=[?&])[\w-]*(?:token|key|secret|password|signature)=[^\s&\"'<>]+": None,
}


class UserError(Exception):
    """The user's input cannot be used.

    Args:
        message: Description of the problem, in one sentence.
        location: File, row, key or module that the error refers to.
        hint: How to fix it.
    """

    def __init__(self, message: str, *, location: str | None = None, hint: str | None = None) -> None:
        message, location, hint = clean(message), location and clean(location), hint and clean(hint)
        self.message, self.location, self.hint = message, location, hint
        more = f"\n  where: {location}" if location else ""
        more += "\n  hint:  " + hint.replace("\n", "\n         ") if hint else ""
        super().__init__(message + more)

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling with all attributes, for other processes."""
        return _create_uninitialized, (type(self), self.args), self.__dict__


# ASCII and C1 control characters except tab and newline, line separators, and marks that change the reading direction.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escape_control_characters(text: str) -> str:
    """Replace characters that a terminal would execute by their escapes, such as ``\\x1b``."""
    text = str(text).replace("\r\n", "\n")
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _create_uninitialized(kind: type[UserError], args: tuple[Any, ...]) -> UserError:
    """Create an error without calling ``__init__``. Its arguments differ between subclasses."""
    return kind.__new__(kind, *args)


# Number of candidates that are compared with a misspelled name.
MAX_CANDIDATES = 2000


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """Return the candidates most similar to ``name``, best first, or an empty list."""
    return difflib.get_close_matches(name, list(itertools.islice(candidates, MAX_CANDIDATES)), n=count, cutoff=0.5)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return ``"did you mean 'a' or 'b'?"``, or a list of the candidates if none is similar."""
    candidates = list(candidates)
    similar = nearest(name, candidates)
    if similar:
        return "did you mean " + " or ".join(f"'{n}'" for n in similar) + "?"
    listing = ", ".join(f"'{n}'" for n in candidates[:12])
    return f"available: {listing}" + (", …" if len(candidates) > 12 else "") if listing else "none are available"


def find_similar_files(path: Path, matches: Callable[[Path], bool]) -> list[str]:
    """Return names of files next to ``path`` with a similar name, else those that match ``matches``."""
    try:
        siblings = [entry for entry in sorted(path.parent.iterdir()) if not entry.name.startswith(".")]
    except OSError:
        return []
    return nearest(path.name, [entry.name for entry in siblings]) or [e.name for e in siblings if matches(e)]


def format_error(error: UserError, width: int = 80) -> str:
    """Return the text of an error for a terminal, wrapped to ``width`` columns."""
    parts = [("error: ", error.message), ("  where: ", error.location), ("  hint:  ", error.hint)]
    lines = []
    for head, text in parts:
        for number, line in enumerate((text or "").splitlines()):
            initial, indent = " " * len(head) if number else head, " " * len(head)
            options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
            unbroken = re.sub(r"(--[\w.-]+) (?=[\w/'.])", "\\1\0", line)  # do not wrap between a flag and its value
            lines += textwrap.wrap(unbroken, width, initial_indent=initial, subsequent_indent=indent, **options)
    return "\n".join(lines).replace("\0", " ")


def first_line(error: BaseException) -> str:
    """Return the first line of an error, without secrets, for use in another message."""
    lines = redact(str(error)).strip().splitlines()
    return escape_control_characters(lines[0][:300]) if lines else type(error).__name__


def clean(text: str) -> str:
    """Return a text without secrets and control characters, for messages."""
    return escape_control_characters(redact(str(text)))


def redact(text: str, mark: str = "…") -> str:
    """Replace registered secrets and user information in URLs by ``mark``.

    Quoted, URL-encoded, base64-encoded and truncated forms of a secret are replaced, too.
    """
    return _compiled("|".join(_PATTERNS)).sub(mark, text)


_compiled = functools.lru_cache(maxsize=1)(re.compile)


def _register(secret: str) -> None:
    escaped = json.dumps(secret)[1:-1]
    forms = {secret, *secret.split(), quote(secret), quote(secret, safe=""), quote_plus(secret), escaped}
    forms |= {escaped.replace("/", r"\/"), secret.encode().hex()}
    forms |= {base64.b64encode(text.encode()).decode().rstrip("=") for text in (secret, f"Bearer {secret}")}
    for form in sorted((form for form in forms if len(form) >= _SHORTEST_SECRET), key=len, reverse=True):
        _PATTERNS[re.escape(form)] = None
        if len(form) >= _SHORTEST_TRUNCATED:
            _PATTERNS[re.escape(form[: len(form) // 2]) + _TAIL] = None


for _name, _value in os.environ.items():
    if _SECRET_VARIABLE.search(_name) and len(_value) >= _SHORTEST_VALUE and not _value.startswith(("/", "~", ".")):
        _register(_value)


def read_key(variable: str, location: str) -> str:
    """Return the API key in an environment variable.

    Raises:
        UserError: if the variable is not set, or if its value cannot be a key.
    """
    if not (value := os.environ.get(variable)):
        raise UserError(f"{variable} is not set", location=location, hint=f"set {variable} to the key")
    return validate_key(value, variable, location)


def validate_key(value: str, source: str, location: str | None = None) -> str:
    """Return an API key, and register it as a secret, so that no message contains it.

    Raises:
        UserError: if an HTTP header cannot contain the key. The message does not contain it either.
    """
    _register(value)
    if not (value.isascii() and value.isprintable() and value == value.strip()):
        message = f"the key in {source} contains a line break, a space at an end, or a character that is not ASCII"
        raise UserError(message, location=location or source, hint="set it to the exact key, without the final newline")
    return value


def first_names(names: Sequence[str]) -> str:
    """Return the first three names and the number of remaining ones."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def look_up(owner: object, path: str) -> Any:
    """Return an attribute by its dotted path, for example ``look_up(torch, "_C._DisableTorchDispatch")``.

    Returns None if this version of the library does not have it.
    """
    value: Any = owner
    for name in path.split("."):
        value = getattr(value, name, None)
    return value
