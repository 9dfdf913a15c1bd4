"""Windows as far as it can be described on Linux: what it refuses about files, and what it does not have.

Nothing here is Windows. Files that this process has open or mapped are found in ``/proc``, and refused as Windows
refuses them; names that only POSIX has are taken out of the standard library.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import pathlib
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest

from deltaw import platforms

# Modules and names that Python on Windows does not have; without those that Linux's own standard library needs.
MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")
NAMES = {
    os: (
        *("chown", "chroot", "fchmod", "fchown", "fork"),
        *("forkpty", "getegid", "geteuid", "getgid", "getloadavg", "getpgid", "getuid", "killpg", "memfd_create"),
        *("mkfifo", "nice", "openpty", "posix_fadvise", "posix_fallocate", "posix_spawn", "pread", "preadv"),
        *("pwrite", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "setsid"),
        *("sync", "sysconf", "uname", "wait"),
    ),
    signal: (
        *("ITIMER_PROF", "ITIMER_REAL", "SIGALRM", "SIGCHLD", "SIGHUP", "SIGPIPE", "SIGPROF", "SIGQUIT", "SIGSTOP"),
        *("SIGUSR1", "SIGUSR2", "alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "sigwait"),
    ),
    mmap: ("MADV_DONTNEED", "MADV_HUGEPAGE", "MAP_ANONYMOUS", "MAP_PRIVATE", "MAP_SHARED", "PROT_READ", "PROT_WRITE"),
    socket: ("AF_UNIX", "recv_fds", "send_fds"),
    time: ("tzset", "clock_gettime"),
}


def held_files() -> set[str]:
    """The files that this process has open or mapped."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(os.readlink(entry))
        except OSError:
            continue
    for line in Path("/proc/self/maps").read_text().splitlines():
        found.add(line.split(maxsplit=5)[-1])
    return found


def _refuse_held(path: str | os.PathLike[str]) -> None:
    if str(path).endswith(".lock"):  # filelock's own way to remove it is another one there
        return
    place = os.path.realpath(path)
    for held in held_files():
        if held == place or held.startswith(f"{place}{os.sep}"):
            raise PermissionError(errno.EACCES, f"the file {held} is open (WinError 32)", os.fspath(path))


def without_posix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away the modules and names that Windows lacks."""
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    for module, names in NAMES.items():
        for name in names:
            monkeypatch.delattr(module, name, raising=False)


@pytest.fixture
def like_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and names as on Windows, for this test."""
    monkeypatch.setattr(platforms, "WINDOWS", True)
    monkeypatch.setattr(platforms, "PATIENCE", 0.0)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    if hasattr(filelock, "_unix"):  # older versions' code for Linux, which Windows does not run, needs os.fchmod
        monkeypatch.setattr(filelock._unix, "os", SimpleNamespace(**vars(os)))
    own: dict[str, Callable[..., object]] = {
        name: getattr(os, name) for name in ("rename", "replace", "unlink", "remove", "open")
    }
    flags, write_only = fcntl.fcntl, os.O_WRONLY | os.O_RDWR

    def rename(source: str, target: str, **how: object) -> None:
        _refuse_held(source)
        if os.path.exists(target):
            raise FileExistsError(errno.EEXIST, "it exists (WinError 183)", os.fspath(target))
        own["rename"](source, target, **how)

    def replace(source: str, target: str, **how: object) -> None:
        _refuse_held(source)
        _refuse_held(target)
        if os.path.isdir(target):
            raise PermissionError(errno.EACCES, "access is denied (WinError 5)", os.fspath(target))
        own["replace"](source, target, **how)

    def remove(path: str, **how: object) -> None:
        _refuse_held(path)
        own["remove"](path, **how)

    def opened(path: str, given: int, *more: object, **how: object) -> object:
        # Files without a name are Linux's way to what Windows has too.
        if os.path.isdir(path) and given & os.O_TMPFILE != os.O_TMPFILE:
            raise PermissionError(errno.EACCES, "permission denied", os.fspath(path))
        return own["open"](path, given, *more, **how)

    def fsync(handle: int) -> None:
        if not flags(handle, fcntl.F_GETFL) & write_only:
            raise OSError(errno.EBADF, "bad file descriptor")

    for name, instead in {"rename": rename, "replace": replace, "unlink": remove, "remove": remove}.items():
        monkeypatch.setattr(os, name, instead)
        if hasattr(getattr(pathlib, "_NormalAccessor", None), name):  # Python 3.10's pathlib keeps its own references
            monkeypatch.setattr(pathlib._NormalAccessor, name, staticmethod(instead))
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", fsync)
    without_posix(monkeypatch)
