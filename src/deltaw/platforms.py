"""Differences between Linux, Windows and macOS.

On Windows, files that another program has open can be neither renamed nor removed, some file names are reserved for
devices or streams, processes receive Ctrl-Break instead of SIGTERM, and shells quote differently. Always read
:data:`WINDOWS` as a module attribute, so that tests can patch it.
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
# Seconds after which virus scanners, indexers and other readers usually have closed a file.
LOCK_TIMEOUT = 2.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.2
_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³]) *(?:\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')
# Arguments that need no quotes in cmd and PowerShell.
_PLAIN_WORD = re.compile(r"[\w.:\\/+=~-]+")

T = TypeVar("T")


def retry_while_locked(operation: Callable[[], T]) -> T:
    """Call ``operation`` and return its result. On Windows, retry for :data:`LOCK_TIMEOUT` seconds on PermissionError.

    Windows raises that error for a file that another program has open.

    Raises:
        OSError: any error of ``operation``; PermissionError if the file is still open.
    """
    try:
        return operation()
    except PermissionError:
        if not WINDOWS:
            raise
    gc.collect()  # closes files that are mapped by unreachable tensors
    deadline, pause = time.monotonic() + LOCK_TIMEOUT, _FIRST_PAUSE
    while True:
        try:
            return operation()
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def rename_path(source: Path, target: Path) -> None:
    """Rename a file or folder. An existing file, or an existing empty folder, is replaced.

    Raises:
        OSError: if it cannot be renamed.
    """
    if WINDOWS and source.is_dir() and target.is_dir():
        target.rmdir()  # fails if the folder is not empty
    retry_while_locked(lambda: source.replace(target))


def remove_path(path: Path) -> bool:
    """Remove a file or a folder with its content. A missing path is not an error.

    Returns:
        False if another program has it open on Windows. The leftover is removed by a later call.

    Raises:
        OSError: if it cannot be removed for another reason.
    """
    try:
        retry_while_locked(lambda: shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True))
    except PermissionError:
        if not WINDOWS:
            raise
        return False
    return True


def reject_reserved_names(path: str | os.PathLike[str]) -> None:
    """Reject paths that Windows would interpret differently.

    ``NUL`` is a device, ``run.`` means ``run``, and ``a:b`` is a stream of the file ``a``.

    Raises:
        UserError: if a part of the path is reserved on this system.
    """
    windows_path = PureWindowsPath(os.fspath(path))
    for part in windows_path.parts[bool(windows_path.anchor) :] if WINDOWS else ():
        is_reserved = _FORBIDDEN.search(part) or _DEVICE.fullmatch(part) or part[-1] in ". "
        if is_reserved and part not in (".", ".."):
            hint = 'choose a name that is not a device, has none of < > : " | ? *, and has no trailing dot or space'
            raise UserError(f"Windows does not allow a file or folder named '{part}'", location=str(path), hint=hint)


def shell_word(argument: str | PurePath) -> str:
    """Quote an argument for the user's shell: a POSIX shell, or both cmd and PowerShell."""
    text = os.fspath(argument)
    if not WINDOWS:
        return shlex.quote(text)
    if _PLAIN_WORD.fullmatch(text):
        return text
    # A leading space forces list2cmdline to quote the text. It is removed afterwards.
    return subprocess.list2cmdline([f" {text}"]).replace('" ', '"', 1)


def stop_signals() -> list[signal.Signals]:
    """Return the signals that request termination: Ctrl-C, SIGTERM, and Ctrl-Break on Windows."""
    names = ("SIGINT", "SIGTERM", "SIGBREAK")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
