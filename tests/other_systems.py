"""Emulation of Windows file semantics and missing modules on Linux.

Open and mapped files are looked up in ``/proc`` and rejected as Windows does. Names that exist on POSIX only are
removed from the standard library.
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

# Modules and names missing from Python on Windows, except those that the standard library needs on Linux.
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


def open_files() -> set[str]:
    """Return the files that this process has open or mapped."""
    paths = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            paths.add(os.readlink(entry))
        except OSError:
            continue
    for line in Path("/proc/self/maps").read_text().splitlines():
        paths.add(line.split(maxsplit=5)[-1])
    return paths


def _reject_open(path: str | os.PathLike[str]) -> None:
    if str(path).endswith(".lock"):  # filelock removes its lock files differently on Windows
        return
    real_path = os.path.realpath(path)
    for open_path in open_files():
        if open_path == real_path or open_path.startswith(f"{real_path}{os.sep}"):
            raise PermissionError(errno.EACCES, f"the file {open_path} is open (WinError 32)", os.fspath(path))


def without_posix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the modules and names that Windows lacks."""
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    for module, names in NAMES.items():
        for name in names:
            monkeypatch.delattr(module, name, raising=False)


@pytest.fixture
def like_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulate Windows files and names during the test."""
    monkeypatch.setattr(platforms, "WINDOWS", True)
    monkeypatch.setattr(platforms, "LOCK_TIMEOUT", 0.0)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    if hasattr(filelock, "_unix"):  # older versions need os.fchmod on Linux
        monkeypatch.setattr(filelock._unix, "os", SimpleNamespace(**vars(os)))
    original: dict[str, Callable[..., object]] = {
        name: getattr(os, name) for name in ("rename", "replace", "unlink", "remove", "open")
    }
    flags = fcntl.fcntl
    write_only = os.O_WRONLY | os.O_RDWR

    def rename(source: str, target: str, **options: object) -> None:
        _reject_open(source)
        if os.path.exists(target):
            raise FileExistsError(errno.EEXIST, "it exists (WinError 183)", os.fspath(target))
        original["rename"](source, target, **options)

    def replace(source: str, target: str, **options: object) -> None:
        _reject_open(source)
        _reject_open(target)
        if os.path.isdir(target):
            raise PermissionError(errno.EACCES, "access is denied (WinError 5)", os.fspath(target))
        original["replace"](source, target, **options)

    def remove(path: str, **options: object) -> None:
        _reject_open(path)
        original["remove"](path, **options)

    def open_file(path: str, mode: int, *args: object, **options: object) -> object:
        # Unnamed temporary files are specific to Linux, so they are allowed.
        if os.path.isdir(path) and mode & os.O_TMPFILE != os.O_TMPFILE:
            raise PermissionError(errno.EACCES, "permission denied", os.fspath(path))
        return original["open"](path, mode, *args, **options)

    def fsync(handle: int) -> None:
        if not flags(handle, fcntl.F_GETFL) & write_only:
            raise OSError(errno.EBADF, "bad file descriptor")

    for name, replacement in {"rename": rename, "replace": replace, "unlink": remove, "remove": remove}.items():
        monkeypatch.setattr(os, name, replacement)
        if hasattr(getattr(pathlib, "_NormalAccessor", None), name):  # Python 3.10's pathlib keeps its own references
            monkeypatch.setattr(pathlib._NormalAccessor, name, staticmethod(replacement))
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", fsync)
    without_posix(monkeypatch)
