"""An error that nobody foresaw, in words: the machine's limits, a folder that is full, or a fault of ours.

It knows exceptions; not what a verb was doing.
"""

from __future__ import annotations

import errno
import os
import traceback as tracebacks
from pathlib import Path

from deltaw.version import __version__

VARIABLE = "DELTAW_TRACEBACK"
# What a disk or a folder refuses, with what helps.
_REFUSED = {
    errno.ENOSPC: "free some space there, or set output or DELTAW_CACHE to another disk",
    errno.EDQUOT: "free some space there, or set output or DELTAW_CACHE to another disk",
    errno.EROFS: "set output or DELTAW_CACHE to a folder that you may write to",
    errno.EACCES: "set output or DELTAW_CACHE to a folder that you may write to",
    errno.EPERM: "set output or DELTAW_CACHE to a folder that you may write to",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "a link there leads to itself: give the path of the file",
}
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "cannot allocate memory")


def explained(error: Exception, *, traceback: bool) -> tuple[int, str]:
    """The exit status and the message for an exception that no code of ours expected.

    Args:
        traceback: whether the message begins with the traceback.
    """
    status, told = _told(error)
    if traceback:
        told = "".join(tracebacks.format_exception(error)) + told
    return status, told


def _told(error: Exception) -> tuple[int, str]:
    if _is_out_of_memory(error):
        return 1, _message(
            f"the memory was not enough: {_first_line(error)}",
            _place(error),
            "see what fits with 'deltaw plan --budget', or lower train.tokens_per_pass",
        )
    if isinstance(error, OSError) and error.errno in _REFUSED:
        where = str(error.filename) if error.filename is not None else _place(error)
        return 2, _message(os.strerror(error.errno), where, _REFUSED[error.errno])
    return 1, _message(
        f"an unexpected {type(error).__name__}: {_first_line(error)}",
        _place(error),
        f"this is a fault of deltaw {__version__} or of a library that it uses, not of your input: run the "
        "command again with --traceback, and report what it prints together with the output of "
        "'deltaw doctor --json'",
    )


def _message(what: str, where: str, hint: str) -> str:
    return f"error: {what}\n  where: {where}\n  hint:  {hint}"


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def _place(error: Exception) -> str:
    """The last line of ours that the error came through, else the last line of all."""
    frames = tracebacks.extract_tb(error.__traceback__)
    if not frames:
        return "unknown"
    package = Path(__file__).resolve().parents[1]
    own = [frame for frame in frames if package in Path(frame.filename).resolve().parents]
    last = (own or frames)[-1]
    file = Path(last.filename).resolve()
    shown = file.relative_to(package.parent) if own else file
    return f"{shown}, line {last.lineno}, in {last.name}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no more is said"
