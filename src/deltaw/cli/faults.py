"""An error that nobody foresaw, in words: the machine's limits, a folder that is full, or a fault of ours.

It knows exceptions; not what a verb was doing.
"""

from __future__ import annotations

import errno
import os
import traceback as tracebacks
from pathlib import Path

from deltaw.errors import UserError, as_message, clean, first_line
from deltaw.version import __version__

VARIABLE = "DELTAW_TRACEBACK"
_FULL = "free some space there, or set output or DELTAW_CACHE to another disk"
_FORBIDDEN = "set output or DELTAW_CACHE to a folder that you may write to"
# What a disk or a folder refuses, with what helps.
_REFUSED = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: _FORBIDDEN,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
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
    status, where = 1, _place(error)
    if _is_out_of_memory(error):
        what = f"the memory was not enough: {first_line(error)}"
        hint = "see what fits with 'deltaw plan --budget', or lower train.tokens_per_pass"
    elif isinstance(error, OSError) and error.errno in _REFUSED:
        status, what, hint = 2, os.strerror(error.errno), _REFUSED[error.errno]
        where = where if error.filename is None else str(error.filename)
    else:
        what = f"an unexpected {type(error).__name__}: {first_line(error)}"
        fault = f"this is a fault of deltaw {__version__} or of a library that it uses, not of your input"
        hint = f"{fault}: report what --traceback and 'deltaw doctor --json' print"
    before = clean("".join(tracebacks.format_exception(error))) if traceback else ""
    return status, before + as_message(UserError(what, where=where, hint=hint))


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
