"""Messages for unexpected exceptions: limits of the machine, full disks, and bugs in deltaw."""

from __future__ import annotations

import errno
import os
import sysconfig
import traceback as tracebacks
from importlib import metadata
from pathlib import Path

from deltaw.errors import UserError, clean, first_line, format_error
from deltaw.version import __version__

VARIABLE = "DELTAW_TRACEBACK"
_FREE_SPACE = "free some space there, or set output or DELTAW_CACHE to another disk"
_NEED_PERMISSION = "set output or DELTAW_CACHE to a folder with write permission"
# Hints for errors of the operating system.
_OS_ERROR_HINTS = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EROFS: _NEED_PERMISSION,
    errno.EACCES: _NEED_PERMISSION,
    errno.EPERM: _NEED_PERMISSION,
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "a symbolic link refers to itself: use the path of the file",
}
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "cannot allocate memory")


def describe(error: Exception, *, traceback: bool) -> tuple[int, str]:
    """Return the exit status and the message for an unexpected exception.

    Args:
        error: The exception.
        traceback: Include the traceback in the message.
    """
    status = 1
    location = _error_location(error)
    if _is_out_of_memory(error):
        message = f"out of memory: {first_line(error)}"
        hint = "find settings that fit with 'deltaw plan --fit-memory', or lower train.tokens_per_pass"
    elif isinstance(error, OSError) and error.errno in _OS_ERROR_HINTS:
        status = 2
        message = os.strerror(error.errno)
        hint = _OS_ERROR_HINTS[error.errno]
        location = location if error.filename is None else str(error.filename)
    elif (foreign := _foreign_location(error)) is not None:
        message = f"{type(error).__name__}: {first_line(error)}"
        location = foreign
        hint = "this code is not part of deltaw; --traceback prints all lines"
    else:
        message = f"an unexpected {type(error).__name__}: {first_line(error)}"
        explanation = f"this is a bug in deltaw {__version__} or one of its libraries"
        hint = f"{explanation}: report it with the output of --traceback and 'deltaw doctor --json'"
    prefix = clean("".join(tracebacks.format_exception(error))) if traceback else ""
    return status, prefix + format_error(UserError(message, location=location, hint=hint))


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def _foreign_location(error: Exception) -> str | None:
    """Return the line of a reward, a task or a method outside of deltaw that deltaw called last, or None.

    Code in the folders of Python and of installed packages is foreign only if a package registered it.
    """
    frames = tracebacks.extract_tb(error.__traceback__)
    package = Path(__file__).resolve().parents[1]
    is_own = [package in Path(frame.filename).resolve().parents for frame in frames]
    if not any(is_own) or is_own[-1]:
        return None
    called = frames[len(frames) - is_own[::-1].index(True)]
    file = Path(called.filename).resolve()
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
    registered = {
        point.value.partition(":")[0].partition(".")[0]
        for group in ("deltaw.methods", "deltaw.tasks")
        for point in metadata.entry_points(group=group)
    }
    is_installed = any(folder in file.parents for folder in installed) or not file.is_file()
    if is_installed and not registered & {file.stem, *(parent.name for parent in file.parents)}:
        return None
    return f"{file}, line {called.lineno}, in {called.name}"


def _error_location(error: Exception) -> str:
    """Return the innermost source line in deltaw, otherwise the innermost line."""
    frames = tracebacks.extract_tb(error.__traceback__)
    if not frames:
        return "unknown"
    package = Path(__file__).resolve().parents[1]
    package_frames = [frame for frame in frames if package in Path(frame.filename).resolve().parents]
    innermost = (package_frames or frames)[-1]
    file = Path(innermost.filename).resolve()
    relative_path = file.relative_to(package.parent) if package_frames else file
    return f"{relative_path}, line {innermost.lineno}, in {innermost.name}"
