"""Translation of errors of the system during a run to messages for the user."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from deltaw.errors import UserError, first_line

_DISK_ERRORS = {
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
# Messages of torch's CPU allocator if memory is exhausted, on Linux and on Windows, and of cuBLAS.
_OUT_OF_MEMORY_MESSAGES = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory", "_ALLOC_FAILED")


@contextlib.contextmanager
def translate_errors(run: Path, *, location: Callable[[], str], last: Callable[[], Path | None]) -> Iterator[None]:
    """Translate out-of-memory and disk errors into a UserError with instructions.

    Args:
        run: Folder that is written to.
        location: Returns the current position in the training.
        last: Returns the newest checkpoint, or None.

    Raises:
        UserError: If memory or disk space is exhausted, or a file has disappeared.
    """
    try:
        yield
    except UserError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        hint = "lower train.tokens_per_pass, set train.checkpointing: true, or train fewer parameters"
        name = "machine"
        if isinstance(error, torch.OutOfMemoryError) or "CUBLAS" in str(error):
            name = "card"
            hint = f"set memory to less than the card has, such as 20GB, {hint}"
        message = f"the {name} is out of memory: {first_line(error)}"
        raise UserError(message, location=location(), hint=f"{hint}; {_resume_hint(last())}") from error
    except (OSError, SafetensorError) as error:
        if (problem := _disk_error(error)) is None:
            raise
        file = getattr(error, "filename", None)
        hint = f"make it writable and free some space; {_resume_hint(last())}"
        raise UserError(f"{problem}, so the run cannot continue", location=str(file or run), hint=hint) from error


def _resume_hint(last: Path | None) -> str:
    if last is None:
        return "the run has no checkpoint yet and will start over"
    return f"repeat the command to resume from {last.name}"


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in _OUT_OF_MEMORY_MESSAGES)


def _disk_error(error: Exception) -> str | None:
    """Return the meaning of a disk error, or None for other errors."""
    if isinstance(error, OSError):
        return _DISK_ERRORS.get(error.errno or 0)
    number = str(error).rpartition("os error ")[2].partition(")")[0]  # format of safetensors
    return _DISK_ERRORS.get(int(number)) if number.isdigit() else None
