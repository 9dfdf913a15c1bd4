"""Regular expressions over module names, under limits that end them.

An adapter's settings hold expressions, and adapters come from anywhere. Python's engine backtracks: for some
expressions its time grows as 2 to the power of a name's length, and while it works nothing else in the
process runs. So expressions with repetitions or groups are matched in a process of their own, which the
system ends at :data:`SECONDS` of processor time or :data:`BYTES` of memory. They mean what ``re`` says they
mean, look-ahead included. Names, and choices of names, are matched here. It knows names as text, no modules.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from deltaw.errors import UserError

SECONDS = 5.0
"""Processor time for all expressions of one setting, compiling included."""
BYTES = 1 << 30
WAITED = 120
"""Seconds on the clock, for systems that do not limit a process's time, or have none left for it."""
LONGEST = 100_000
"""Characters of an expression that is no choice of names."""
MOST = 20_000
"""Expressions of one setting."""

# Names whose dots may be escaped, and a choice of such names.
_PLAIN = re.compile(r"(?:[\w|.-]|\\[.-])*")
# Characters that are compiled here: a class of most letters, in either case, takes a hundredth of a second.
_COMPILED_HERE = 500

_CHILD = """
import contextlib, json, re, signal, sys
seconds, size, expressions, names = json.load(sys.stdin)
if hasattr(signal, "setitimer"):  # elsewhere the parent's clock is the limit
    signal.setitimer(signal.ITIMER_PROF, seconds)  # processor time; nothing handles its signal
with contextlib.suppress(ImportError, OSError, ValueError):  # some systems do not limit memory
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
found = []
for number, expression in enumerate(expressions):
    try:
        compiled = re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        found = {"number": number, "why": str(error)}
        break
    found.append([place for place, name in enumerate(names) if compiled.fullmatch(name)])
json.dump(found, sys.stdout)
"""


def check_expressions(key: str, expressions: Sequence[str]) -> None:
    """Refuse what is not a regular expression.

    Args:
        key: the setting that holds them.

    Raises:
        UserError: one is none, is longer than :data:`LONGEST`, or they are more than :data:`MOST`.
    """
    asked = [expression for expression in expressions if not _PLAIN.fullmatch(expression)]
    if len(expressions) > MOST or sum(map(len, asked)) > _COMPILED_HERE:
        matches(key, expressions, [])
        return
    for expression in asked:
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise _no_expression(key, expression, str(error)) from error


def matches(
    key: str, expressions: Iterable[str], names: Iterable[str], *, endings: bool = False
) -> list[frozenset[str]]:
    """The names that each expression matches.

    Args:
        key: the setting that holds the expressions.
        endings: an expression may also match the end of a name, after a dot, which is PEFT's rule for keys of
            patterns; otherwise it is for full names.

    Raises:
        UserError: an expression is none, or they take more than the limits.
    """
    return list(_matches(key, tuple(expressions), tuple(dict.fromkeys(names)), endings))


@functools.lru_cache(maxsize=64)
def _matches(
    key: str, expressions: tuple[str, ...], names: tuple[str, ...], endings: bool
) -> tuple[frozenset[str], ...]:
    if len(expressions) > MOST:
        raise _too_large(key, f"{len(expressions):,} expressions, and {MOST:,} are the most")
    plain = {expression for expression in expressions if _PLAIN.fullmatch(expression)}
    others = [expression for expression in expressions if expression not in plain]
    longest = max(map(len, others), default=0)
    if longest > LONGEST:
        raise _too_large(key, f"an expression of {longest:,} characters, and {LONGEST:,} are the most")
    found = dict(zip(others, _elsewhere(key, others, names, endings), strict=True)) if others else {}
    by_length = _by_length(names, endings)
    found |= {expression: _of_choice(expression, by_length) for expression in plain}
    return tuple(found[expression] for expression in expressions)


def _by_length(names: Iterable[str], endings: bool) -> Mapping[int, list[tuple[str, str]]]:
    """(what an expression may match, the name) by the length of the first."""
    found: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for name in names:
        starts = [0, *(at + 1 for at, char in enumerate(name) if char == ".")] if endings else [0]
        for start in starts:
            found[len(name) - start].append((name[start:], name))
    return found


def _of_choice(expression: str, by_length: Mapping[int, list[tuple[str, str]]]) -> frozenset[str]:
    """The names that a choice of names matches; all that a dot matches is one character."""
    found: set[str] = set()
    for part in expression.split("|"):
        compiled = re.compile(part)
        length = len(part.replace("\\", ""))
        found.update(name for text, name in by_length.get(length, ()) if compiled.fullmatch(text))
    return frozenset(found)


def _elsewhere(key: str, expressions: Sequence[str], names: Sequence[str], endings: bool) -> list[frozenset[str]]:
    """The names that each expression matches, from a process of its own."""
    full = [rf"(.*\.)?({expression})$" if endings else expression for expression in expressions]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([SECONDS, BYTES, full, names]),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=WAITED,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _ended(key, expressions) from error
    if done.returncode < 0 or (done.returncode and "MemoryError" in done.stderr):
        raise _ended(key, expressions)
    if done.returncode:
        raise RuntimeError(f"the process that matches expressions failed: {done.stderr[-300:]}")
    found = json.loads(done.stdout)
    if isinstance(found, dict):
        raise _no_expression(key, expressions[found["number"]], found["why"])
    return [frozenset(names[place] for place in places) for places in found]


def _no_expression(key: str, expression: str, why: str) -> UserError:
    hint = "close its brackets, and write \\ before a character that stands for itself"
    return UserError(f"'{_shown(expression)}' is no regular expression: {why}", where=key, hint=hint)


def _ended(key: str, expressions: Sequence[str]) -> UserError:
    shown = f"'{_shown(expressions[0])}'" if len(expressions) == 1 else f"{len(expressions):,} expressions"
    what = f"{key}: matching {shown} was ended after {SECONDS:g} seconds of processor time, or at {BYTES >> 20:,} MiB"
    hint = "write it without repetitions inside repetitions, or name the modules in a list"
    return UserError(what, where=key, hint=hint)


def _too_large(key: str, what: str) -> UserError:
    return UserError(f"{key} holds {what}", where=key, hint="name the modules in a list")


def _shown(expression: str) -> str:
    return expression if len(expression) <= 100 else expression[:99] + "…"
