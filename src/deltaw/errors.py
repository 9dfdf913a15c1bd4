"""The error for wrong user input, with a hint.

All code in deltaw that refuses a user's input raises :class:`UserError`. The command line turns it into one
message and exit status 2. Any other exception is a bug in deltaw.
"""

from __future__ import annotations

import base64
import difflib
import functools
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

# Environment variables whose values are secrets. Shorter values are not removed: they would match ordinary words.
_SECRET_VARIABLE = re.compile(r"(?:TOKEN|SECRET|PASSWORD|KEY)\Z", re.IGNORECASE)
_SHORTEST_SECRET, _SHORTEST_VALUE, _SHORTEST_TRUNCATED = 6, 8, 16
# Ends of texts that begin as a secret does, which other programs may have truncated.
_TAIL = r"[^\s\"'<>\\]*"
# User names, passwords and keys in URLs.
_PATTERNS = {
    r"(?<=//)[^/\s\"'<>]+(?=@)": None,
    r"(?<=[?&])[\w-]*(?:token|key|secret|password|signature)=[^\s&\"'<>]+": None,
}


class UserError(Exception):
    """The user's input cannot be used.

    Args:
        what: what is wrong, in one sentence.
        where: the file, row, key or module that it concerns.
        hint: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        what, where, hint = clean(what), where and clean(where), hint and clean(hint)
        self.what, self.where, self.hint = what, where, hint
        more = f"\n  where: {where}" if where else ""
        more += "\n  hint:  " + hint.replace("\n", "\n         ") if hint else ""
        super().__init__(what + more)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled whole, for other processes."""
        return _not_yet_made, (type(self), self.args), self.__dict__


# ASCII and C1 control characters except tab and newline, line separators, and marks that change the reading direction.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escape_control_characters(text: str) -> str:
    """Replace characters that a terminal would execute by their escapes, such as ``\\x1b``."""
    text = str(text).replace("\r\n", "\n")
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _not_yet_made(kind: type[UserError], args: tuple[Any, ...]) -> UserError:
    """An error without its attributes; its class may be made of other arguments."""
    return kind.__new__(kind, *args)


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The entries of ``known`` most similar to ``name``, best first; empty if none is similar."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'a' or 'b'?"``, or a list of the known names if none is similar."""
    known = list(known)
    near = nearest(name, known)
    if near:
        return "did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
    shown = ", ".join(f"'{n}'" for n in known[:12])
    return f"there is {shown}" + (", …" if len(known) > 12 else "") if shown else "there is none"


def files_near(path: Path, fits: Callable[[Path], bool]) -> list[str]:
    """Names beside ``path`` that look like its own, else those that fit; empty if there are none."""
    try:
        beside = [entry for entry in sorted(path.parent.iterdir()) if not entry.name.startswith(".")]
    except OSError:
        return []
    return nearest(path.name, [entry.name for entry in beside]) or [entry.name for entry in beside if fits(entry)]


def as_message(error: UserError, width: int = 80) -> str:
    """What a person reads of an error, in lines of at most ``width`` characters if no word is longer."""
    parts = [("error: ", error.what), ("  where: ", error.where), ("  hint:  ", error.hint)]
    lines = []
    for head, text in parts:
        for number, line in enumerate((text or "").splitlines()):
            begin, indent = " " * len(head) if number else head, " " * len(head)
            how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
            kept = re.sub(r"(--[\w.-]+) (?=[\w/'.])", "\\1\0", line)  # a flag and its value stay together
            lines += textwrap.wrap(kept, width, initial_indent=begin, subsequent_indent=indent, **how)
    return "\n".join(lines).replace("\0", " ")


def first_line(error: BaseException) -> str:
    """Return the first line of an error, without secrets, as a part of another message."""
    lines = redact(str(error)).strip().splitlines()
    return escape_control_characters(lines[0][:300]) if lines else type(error).__name__


def clean(text: str) -> str:
    """Return a text without secrets and control characters, for messages."""
    return escape_control_characters(redact(str(text)))


def redact(text: str, mark: str = "…") -> str:
    """Replace registered secrets by ``mark``, also if they are quoted, URL-encoded or truncated, and users in URLs."""
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


def read_key(variable: str, where: str) -> str:
    """Return the API key in an environment variable.

    Raises:
        UserError: if the variable is not set, or if its value cannot be a key.
    """
    if not (value := os.environ.get(variable)):
        raise UserError(f"{variable} is not set", where=where, hint=f"set {variable} to the key")
    return checked_key(value, variable, where)


def checked_key(value: str, source: str, where: str | None = None) -> str:
    """Return an API key and register it as a secret, which no message contains.

    Raises:
        UserError: if an HTTP header cannot contain the key. The message does not contain it either.
    """
    _register(value)
    if not (value.isascii() and value.isprintable() and value == value.strip()):
        what = f"the key in {source} contains a line break, a space at an end, or a character that is not ASCII"
        raise UserError(
            what, where=where or source, hint="set it to the key alone, for example without the final newline"
        )
    return value


def first_names(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
