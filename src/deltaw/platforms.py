"""What Windows and macOS do differently from Linux, where deltaw has to know it.

On Windows a file that any program has open can be neither renamed nor removed, not even for a moment; some names
mean devices or streams; programs have no SIGTERM but a Ctrl-Break; and shells quote in another way. This module
knows files, names, signals and shells; no models and no runs. :data:`WINDOWS` is asked for by attribute, so that a
test can describe a Windows.
"""

from __future__ import annotations

import gc
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path, PurePath, PureWindowsPath
from typing import TypeVar

from deltaw.errors import UserError

WINDOWS = sys.platform == "win32"
# Seconds in which scanners for viruses, indexers and readers of a file usually let it go.
PATIENCE = 2.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.2
_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³]) *(?:\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')
# What cmd and PowerShell both take as it is.
_PLAIN_WORD = re.compile(r"[\w.:\\/+=~-]+")

T = TypeVar("T")


def patiently(do: Callable[[], T]) -> T:
    """What ``do`` returns. On Windows it is tried again for :data:`PATIENCE` seconds while the system refuses it, as
    it does with a file that another program has open.

    Raises:
        OSError: whatever ``do`` raises; PermissionError if the file stayed open.
    """
    try:
        return do()
    except PermissionError:
        if not WINDOWS:
            raise
    gc.collect()  # tensors that are mapped from the file may wait for it
    ends, pause = time.monotonic() + PATIENCE, _FIRST_PAUSE
    while True:
        try:
            return do()
        except PermissionError:
            if time.monotonic() >= ends:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def renamed(source: Path, target: Path) -> None:
    """Rename a file or a folder; a file takes the place of another file, a folder that of an empty folder.

    Raises:
        OSError: it cannot be renamed.
    """
    if WINDOWS and source.is_dir() and target.is_dir():
        target.rmdir()  # refused if it holds anything
    patiently(lambda: source.replace(target))


def removed(path: Path) -> bool:
    """Remove a file, or a folder with all that is in it; missing ones count as removed. On Windows one that another
    program has open stays, and what deltaw leaves is cleared the next time.

    Raises:
        OSError: it cannot be removed for another reason.
    """
    try:
        patiently(lambda: shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True))
    except PermissionError:
        if not WINDOWS:
            raise
        return False
    return True


def refuse_names(path: str | os.PathLike[str]) -> None:
    """Refuse, on Windows, a path that the system would take for something else: ``NUL`` is a device, ``run.`` means
    ``run``, and ``a:b`` is a stream inside the file ``a``.

    Raises:
        UserError: a part of the path is such a name.
    """
    given = PureWindowsPath(os.fspath(path))
    for part in given.parts[bool(given.anchor) :] if WINDOWS else ():
        strange = _FORBIDDEN.search(part) or _DEVICE.fullmatch(part) or part[-1] in ". "
        if strange and part not in (".", ".."):
            hint = "choose a name that is not a device's, without < > : \" | ? * and without a dot or space at its end"
            raise UserError(f"Windows cannot have a file or folder named '{part}'", where=str(path), hint=hint)


def shell_word(argument: str | PurePath) -> str:
    """An argument as the user's shell takes it: quoted for a POSIX shell, or for both cmd and PowerShell."""
    text = os.fspath(argument)
    if not WINDOWS:
        return shlex.quote(text)
    if _PLAIN_WORD.fullmatch(text):
        return text
    # With a blank before it, the standard library quotes any text; the blank is taken out again.
    return subprocess.list2cmdline([f" {text}"]).replace('" ', '"', 1)


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a program to end: Ctrl-C, SIGTERM, and Ctrl-Break where there is one."""
    names = ("SIGINT", "SIGTERM", "SIGBREAK")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
