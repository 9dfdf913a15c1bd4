"""The limits a control group puts on this process: how many processors, how much memory.

A container or a batch system limits a process through control groups; neither torch nor ``/proc/meminfo``
sees that. A limit may sit on the process's own group or on any group above it, so the whole path up to the
root is read and the tightest value holds. Versions 1 and 2, and both mounted side by side, are understood.

It knows nothing of models. Every function takes the root of the file system, so that a test can build one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Where the two versions are mounted, relative to the root: version 2 alone, and beside version 1.
_UNIFIED_MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
_CONTROLLER_MOUNT = "sys/fs/cgroup"


def processor_quota(root: Path = Path("/")) -> float | None:
    """The processors' worth of time that the process may use, or None where nothing limits it.

    Version 2 writes ``quota period`` in ``cpu.max``; version 1 has ``cpu.cfs_quota_us`` (−1: no limit) and
    ``cpu.cfs_period_us``. Both are in microseconds; the quotient is a number of processors.
    """
    quotas = []
    for folder in _group_folders(root, "cpu"):
        unified = _words(folder / "cpu.max")
        if len(unified) == 2 and unified[0].isdigit() and int(unified[1]) > 0:
            quotas.append(int(unified[0]) / int(unified[1]))
        quota = _positive(folder / "cpu.cfs_quota_us")
        period = _positive(folder / "cpu.cfs_period_us")
        if quota and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """The bytes that the process's groups may hold together, or None where nothing limits them.

    ``memory.high`` counts as a limit too: above it the kernel reclaims so hard that a run crawls. Version 1
    writes a number near 2⁶³ for "no limit"; comparing with the physical memory is the caller's part.
    """
    limits = []
    for folder in _group_folders(root, "memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit = _positive(folder / name)
            if limit:
                limits.append(limit)
    return min(limits, default=None)


def memory_free(root: Path = Path("/")) -> int | None:
    """The bytes that the process's groups may still take, or None where nothing limits them.

    What the kernel holds of files and can drop at once counts as free.
    """
    free = []
    for folder in _group_folders(root, "memory"):
        names = ("memory.max", "memory.high", "memory.limit_in_bytes")
        limits = [limit for name in names if (limit := _positive(folder / name))]
        used = _positive(folder / "memory.current") or _positive(folder / "memory.usage_in_bytes")
        if limits and used is not None:
            stat = dict(line.split()[:2] for line in _lines(folder / "memory.stat") if " " in line)
            droppable = stat.get("total_inactive_file") or stat.get("inactive_file") or "0"
            free.append(max(0, min(limits) - used + int(droppable)))
    return min(free, default=None)


def _group_folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the process's group and of every group above it, for one controller."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            mounts = [root / mount for mount in _UNIFIED_MOUNTS]
        elif controller in controllers.split(","):
            names = dict.fromkeys((controllers, controller))
            mounts = [root / _CONTROLLER_MOUNT / name for name in names]
        else:
            continue
        parts = PurePosixPath(group).parts[1:]
        if ".." in parts:  # the group lies outside this namespace; its mount shows what applies here
            parts = ()
        for mount in mounts:
            # Inside a container the path may be the host's: the folders that do not exist here are skipped.
            for depth in range(len(parts), -1, -1):
                folder = mount.joinpath(*parts[:depth])
                if folder.is_dir():
                    yield folder


def _lines(path: Path) -> list[str]:
    """The lines of a small kernel file; none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    lines = _lines(path)
    return lines[0].split() if lines else []


def _positive(path: Path) -> int | None:
    """A file's whole number if it is above zero; None for ``max``, −1 and files that are not there."""
    words = _words(path)
    return int(words[0]) if words and words[0].isdigit() and int(words[0]) > 0 else None
