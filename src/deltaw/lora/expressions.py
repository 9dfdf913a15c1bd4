"""Match regular expressions against module names with limits on time and memory.

The expressions are part of an adapter's settings, and adapters can be untrusted. Python's regular expression engine
backtracks: some expressions take time exponential in the length of a name, and meanwhile block the process. Expressions
with repetitions or groups are therefore matched in a subprocess, limited to :data:`SECONDS` of CPU time and
:data:`BYTES` of memory. The semantics are those of ``re``, including look-ahead. Names and alternatives of names are
matched in this process.
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
"""CPU time limit for all expressions of one setting, including compilation."""
BYTES = 1 << 30
TIMEOUT = 120
"""Wall-clock limit in seconds, for systems without a CPU time limit or with no free CPU time."""
MAX_LENGTH = 100_000
"""Maximum length of an expression that is not a list of names."""
MAX_EXPRESSIONS = 20_000
"""Maximum number of expressions of one setting."""

# Names, with dots that may be escaped, and alternatives of names.
_PLAIN = re.compile(r"(?:[\w|.-]|\\[.-])*")
# Maximum number of characters compiled in this process. A large character class can take 10 ms.
_MAX_IN_PROCESS = 500

_CHILD = """
import contextlib, json, re, signal, sys
seconds, size, expressions, names = json.load(sys.stdin)
if hasattr(signal, "setitimer"):  # otherwise, the parent's timeout is the limit
    signal.setitimer(signal.ITIMER_PROF, seconds)  # CPU time; the unhandled signal terminates the process
with contextlib.suppress(ImportError, OSError, ValueError):  # some systems do not limit memory
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
matched = []
for number, expression in enumerate(expressions):
    try:
        compiled = re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        matched = {"number": number, "reason": str(error)}
        break
    matched.append([index for index, name in enumerate(names) if compiled.fullmatch(name)])
json.dump(matched, sys.stdout)
"""


def check_expressions(key: str, expressions: Sequence[str]) -> None:
    """Raise UserError for invalid regular expressions.

    Args:
        key: Setting that contains the expressions.
        expressions: Expressions to check.

    Raises:
        UserError: if an expression is invalid or longer than :data:`MAX_LENGTH`, or if there are more than
            :data:`MAX_EXPRESSIONS`.
    """
    complex_expressions = [expression for expression in expressions if not _PLAIN.fullmatch(expression)]
    if len(expressions) > MAX_EXPRESSIONS or sum(map(len, complex_expressions)) > _MAX_IN_PROCESS:
        matches(key, expressions, [])
        return
    for expression in complex_expressions:
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise _invalid_expression(key, expression, str(error)) from error


def matches(key: str, patterns: Iterable[str], names: Iterable[str], *, endings: bool = False) -> list[frozenset[str]]:
    """Return the names that each expression matches.

    Args:
        key: Setting that contains the expressions.
        patterns: Regular expressions.
        names: Names to match.
        endings: If True, an expression may also match the part of a name after a dot (PEFT's rule for keys of
            patterns). If False, it must match the full name.

    Raises:
        UserError: if an expression is invalid, or matching exceeds the limits.
    """
    return list(_matches(key, tuple(patterns), tuple(dict.fromkeys(names)), endings))


@functools.lru_cache(maxsize=64)
def _matches(key: str, patterns: tuple[str, ...], names: tuple[str, ...], endings: bool) -> tuple[frozenset[str], ...]:
    if len(patterns) > MAX_EXPRESSIONS:
        raise _too_large(key, f"{len(patterns):,} expressions, but at most {MAX_EXPRESSIONS:,} are allowed")
    plain = {expression for expression in patterns if _PLAIN.fullmatch(expression)}
    complex_expressions = [expression for expression in patterns if expression not in plain]
    longest = max(map(len, complex_expressions), default=0)
    if longest > MAX_LENGTH:
        raise _too_large(key, f"an expression of {longest:,} characters, but at most {MAX_LENGTH:,} are allowed")
    results = _match_in_child(key, complex_expressions, names, endings) if complex_expressions else []
    matched = dict(zip(complex_expressions, results, strict=True))
    by_length = _index_by_length(names, endings)
    matched |= {expression: _match_choice(expression, by_length) for expression in plain}
    return tuple(matched[expression] for expression in patterns)


def _index_by_length(names: Iterable[str], endings: bool) -> Mapping[int, list[tuple[str, str]]]:
    """Return (matchable text, full name) pairs by the length of the text."""
    pairs: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for name in names:
        starts = [0, *(position + 1 for position, char in enumerate(name) if char == ".")] if endings else [0]
        for start in starts:
            pairs[len(name) - start].append((name[start:], name))
    return pairs


def _match_choice(expression: str, by_length: Mapping[int, list[tuple[str, str]]]) -> frozenset[str]:
    """Return the names that an alternative of names matches. An unescaped dot matches one character."""
    matched: set[str] = set()
    for part in expression.split("|"):
        compiled = re.compile(part)
        length = len(part.replace("\\", ""))
        matched.update(name for text, name in by_length.get(length, ()) if compiled.fullmatch(text))
    return frozenset(matched)


def _match_in_child(key: str, expressions: Sequence[str], names: Sequence[str], endings: bool) -> list[frozenset[str]]:
    """Return the names that each expression matches, computed in a subprocess."""
    full = [rf"(.*\.)?({expression})$" if endings else expression for expression in expressions]
    try:
        process = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([SECONDS, BYTES, full, names]),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _limit_error(key, expressions) from error
    if process.returncode < 0 or (process.returncode and "MemoryError" in process.stderr):
        raise _limit_error(key, expressions)
    if process.returncode:
        raise RuntimeError(f"the process that matches expressions failed: {process.stderr[-300:]}")
    result = json.loads(process.stdout)
    if isinstance(result, dict):
        raise _invalid_expression(key, expressions[result["number"]], result["reason"])
    return [frozenset(names[index] for index in indices) for indices in result]


def _invalid_expression(key: str, expression: str, reason: str) -> UserError:
    hint = "close all brackets, and write \\ before a literal special character"
    return UserError(f"'{_shorten(expression)}' is not a regular expression: {reason}", location=key, hint=hint)


def _limit_error(key: str, expressions: Sequence[str]) -> UserError:
    text = f"'{_shorten(expressions[0])}'" if len(expressions) == 1 else f"{len(expressions):,} expressions"
    message = f"{key}: matching {text} was stopped after {SECONDS:g} seconds of CPU time, or at {BYTES >> 20:,} MiB"
    hint = "avoid nested repetitions, or name the modules in a list"
    return UserError(message, location=key, hint=hint)


def _too_large(key: str, problem: str) -> UserError:
    return UserError(f"{key} contains {problem}", location=key, hint="name the modules in a list")


def _shorten(expression: str) -> str:
    return expression if len(expression) <= 100 else expression[:99] + "…"
