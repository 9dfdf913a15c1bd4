"""Limits of processors and memory that a container or a batch system sets.

They are set through control groups, which neither torch nor ``/proc/meminfo`` reports. Every group from the process's
group up to the root can set a limit, and the tightest applies. Versions 1 and 2, and hybrid mounts of both, are
supported.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Mount points relative to the root: of version 2, without and with version 1, and of version 1.
_UNIFIED_MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
_CONTROLLER_MOUNT = "sys/fs/cgroup"


def processor_quota(root: Path = Path("/")) -> float | None:
    """Return the CPU quota of the process in processors, or None if it is unlimited.

    Version 2 writes ``quota period`` in ``cpu.max``. Version 1 has ``cpu.cfs_quota_us`` (−1 if unlimited) and
    ``cpu.cfs_period_us``. All values are in microseconds.
    """
    quotas = []
    for folder in _group_folders(root, "cpu"):
        # Version 2 has both numbers in one file, version 1 has a file for each.
        unified = _words(folder / "cpu.max")
        for quota in (unified, [*_words(folder / "cpu.cfs_quota_us")[:1], *_words(folder / "cpu.cfs_period_us")[:1]]):
            if len(quota) == 2 and all(word.isdigit() and int(word) > 0 for word in quota):
                quotas.append(int(quota[0]) / int(quota[1]))
    return min(quotas, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the memory limit of the process's control groups in bytes, or None if they set no limit.

    ``memory.high`` counts as a limit too, because the kernel slows a process down severely above it. Version 1 writes a
    number near 2⁶³ for "no limit", so callers compare the result with the physical memory.
    """
    return min((limit for folder in _group_folders(root, "memory") for limit in _limits(folder)), default=None)


def memory_free(root: Path = Path("/")) -> int | None:
    """Return the bytes that the process's control groups can still allocate, or None if they set no limit.

    Page cache that the kernel can drop immediately counts as free.
    """
    free = []
    for folder in _group_folders(root, "memory"):
        limits = _limits(folder)
        used = _positive(folder / "memory.current") or _positive(folder / "memory.usage_in_bytes")
        if limits and used is not None:
            stat = dict(line.split()[:2] for line in read_lines(folder / "memory.stat") if " " in line)
            droppable = stat.get("total_inactive_file") or stat.get("inactive_file") or "0"
            free.append(max(0, min(limits) - used + int(droppable)))
    return min(free, default=None)


def _limits(folder: Path) -> list[int]:
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    return [limit for name in names if (limit := _positive(folder / name))]


def _group_folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of the process's control group and of all groups above it for one controller."""
    for line in read_lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            mounts = [root / mount for mount in _UNIFIED_MOUNTS]
        elif controller in controllers.split(","):
            mounts = [root / _CONTROLLER_MOUNT / name for name in dict.fromkeys((controllers, controller))]
        else:
            continue
        parts = PurePosixPath(group).parts[1:]
        if ".." in parts:  # the group is outside this namespace: only its mount point is visible
            parts = ()
        for mount in mounts:
            # In a container the path may be the host's. Folders that do not exist in the container are skipped.
            for depth in range(len(parts), -1, -1):
                folder = mount.joinpath(*parts[:depth])
                if folder.is_dir():
                    yield folder


def read_lines(path: Path) -> list[str]:
    """Return the lines of a small kernel file, or an empty list if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    lines = read_lines(path)
    return lines[0].split() if lines else []


def _positive(path: Path) -> int | None:
    """Return the integer in a file if it is positive, else None (for ``max``, −1 and missing files)."""
    words = _words(path)
    return int(words[0]) if words and words[0].isdigit() and int(words[0]) > 0 else None
