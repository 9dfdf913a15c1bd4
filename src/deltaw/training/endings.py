"""How a run ends that cannot go on: with what happened, what to do, and where it goes on from.

Errors of the machine (memory, disk) become errors with a hint; anything else stays what it is. Knows errors;
not what was being done.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from deltaw.errors import UserError

_OF_THE_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would become larger than allowed",
    errno.EROFS: "the file system has become read-only",
    errno.EIO: "the disk fails to read or write",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "a file or folder has disappeared",
    errno.ENODEV: "a device has disappeared",
    errno.ESTALE: "a network folder has disappeared",
}
# How torch's allocator of main memory says that there is none, on Linux and on Windows.
_NO_MEMORY = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")


@contextlib.contextmanager
def clear_end(run: Path, *, where: Callable[[], str], last: Callable[[], Path | None]) -> Iterator[None]:
    """While open, errors of the machine become errors that say what to do.

    Args:
        run: the folder that is written to.
        where: the place in the training, asked when something happens.
        last: the newest checkpoint; None where there is none.

    Raises:
        UserError: the machine has no memory or no room on the disk, or a file is gone.
    """
    try:
        yield
    except UserError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            f"the machine has no memory left: {_first_line(error)}",
            where=where(),
            hint="lower train.tokens_per_pass, set train.checkpointing: true, or train fewer parameters; "
            + _goes_on(last()),
        ) from error
    except (OSError, SafetensorError) as error:
        what = _disk_error(error)
        if what is None:
            raise
        file = getattr(error, "filename", None)
        raise UserError(
            f"{what}, and the run cannot go on",
            where=str(file or run),
            hint=f"make it writable again, with room to spare; {_goes_on(last())}",
        ) from error


def _goes_on(last: Path | None) -> str:
    if last is None:
        return "the run has no checkpoint yet, and begins again with its first step"
    return f"the same command goes on from {last.name}"


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in _NO_MEMORY)


def _disk_error(error: Exception) -> str | None:
    """What an error of the disk means; None where it is none of these."""
    if isinstance(error, OSError):
        return _OF_THE_DISK.get(error.errno or 0)
    number = str(error).rpartition("os error ")[2].partition(")")[0]  # as safetensors writes it
    return _OF_THE_DISK.get(int(number)) if number.isdigit() else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
