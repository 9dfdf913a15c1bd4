"""The compiled kernels: which variant of them runs here, and how they are called.

Each variant (``variants.py``) is a shared object of plain C functions, bound to no version of torch or
Python. On Linux it has no threads of its own: it is handed those of torch's OpenMP library, since two pools would
fight for the cores. On macOS and Windows that library cannot be handed over, and the kernels' own threads sleep
while torch's work.

``DELTAW_KERNELS=NAME`` forces a variant, and is refused where that one cannot run; ``NAME:ARITHMETIC`` forces
how products are computed too (``arithmetic.py``); ``none``, or ``DELTAW_NATIVE=0``, does without compiled
kernels. Otherwise the variant of the highest rank is used, until one is chosen by measuring
(:func:`compute_with`).

Knows addresses and types of numbers; what the kernels compute is said where they are called.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import UserError
from deltaw.kernels import variants
from deltaw.kernels.arithmetic import STORED, TORCH, Arithmetic, default_of, tell
from deltaw.kernels.processor import processor_flags, second_level_cache
from deltaw.kernels.structs import differing
from deltaw.kernels.variants import Variant

# What the library must answer; raised in csrc/kernels.h whenever its functions or structs change.
ABI = 9
_NUMBER = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 2}

_I, _L, _F, _P = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
# What each function is given, and what those return that return no status; see csrc/kernels.h.
_RESULTS: dict[str, tuple[type, list[type]]] = {
    "dw_linear_room": (_L, [_I, _L, _L, _L, _I, _I, _I, _I, _L, _I, _I]),
    "dw_factors_room": (_L, [_I, _L, _L]),
    "dw_class_gradient_room": (_L, [_L, _L, _L]),
    "dw_head_gradient_room": (_L, [_L, _L]),
    "dw_attention_room": (_L, [_I, _L, _L, _L, _L, _L]),
    "dw_attention_backward_room": (_L, [_I, _L, _L, _L, _L, _L]),
    "dw_abi": (_I, []),
    "dw_layout_of": (_L, [_I, _P, _L]),
    "dw_scratch_held": (_L, [_I]),
    "dw_ready": (_I, []),
    "dw_arithmetics": (_L, [_I]),
}
_SIGNATURES: dict[str, list[type]] = {
    **{name: arguments for name, (_, arguments) in _RESULTS.items()},
    "dw_threads": [_P] * 4,
    "dw_set_arithmetic": [_I, _I],
    "dw_set_cache": [_L],
    "dw_release": [],
    "dw_linear": [*(_I, _L, _L, _L, _P, _I, _P, _I, _P, _P, _P, _I), *(_P, _P, _L, _F, _P, _P, _P, _I, _I, _P, _P)],
    "dw_linear_backward": [_I, _L, _L, _L, _P, _I, _P, _I, _P, _P, _P, _P, _L, _F, *[_P] * 5],
    "dw_factors_backward": [_I, _L, _L, _L, _L, _P, _P, _P, _P, _F, _P, _P],
    "dw_class_gradient": [_L, _L, _L, *[_P] * 6],
    "dw_head_gradient": [*[_L] * 3, *[_P] * 5, _F, _F, _L, *[_P] * 4],
    "dw_dequantize": [_I, _I, _P, _L, _L, _L, _P, _L, _P],
    "dw_quantize": [_I, _L, _L, _P, _P, _I, _P, _P],
    "dw_norm": [_I, _L, _L, _P, _L, _P, _P, _F, _F, _I, _P, _P],
    "dw_norm_backward": [_I, _L, _L, _P, _P, _L, _P, _F, _I, _P, _P, _P],
    "dw_add": [_I, _L, _P, _P, _P],
    "dw_activation": [_I, _I, _L, _L, _P, _P, _P],
    "dw_activation_backward": [_I, _I, _L, _L, _P, _P, _P, _P, _P, _P],
    "dw_rotate": [_I, _L, _L, _L, _L, _P, _L, _P, _P, _I, _P, _L],
    "dw_cross_entropy": [_I, _L, _L, _P, _P, _P, _F, _F, _I, _P],
    "dw_attention": [_I, _P, _L, _L, _L, _I, _L, _L, _L, _L, _F, _F, _P, _L, *[_P] * 6],
    "dw_attention_backward": [_I, _P, _L, _L, _L, _I, _L, _L, _L, _L, _F, _F, _P, _L, *[_P] * 10],
    "dw_block_sizes": [_P, _L, _L, _P],
    "dw_block": [_P, _L, _P, _P, _L, _P, _L, *[_P] * 5],
    "dw_block_backward": [_P, _L, _P, _P, _L, _P, _L, *[_P] * 7],
    "dw_decode": [_P, _P],
}


@dataclass(frozen=True)
class Opened:
    """A variant that is loaded, and ready to be called.

    Args:
        threads_note: why it runs on one thread, in one line; None where it does not.
    """

    variant: Variant
    library: ctypes.CDLL
    threads_note: str | None


class _Process:
    """What this process computes with: the variants that are open, and the one in use once it is settled.

    ``by_torch`` are the numbers of the types whose products torch computes.
    """

    opened: dict[str, Opened] = {}  # noqa: RUF012
    using: Opened | None = None
    arithmetic = Arithmetic()
    by_torch: frozenset[int] = frozenset()
    why_not: str | None = None
    settled = False


def library() -> ctypes.CDLL | None:
    """The kernels in use, ready to be called; None where :func:`why_not` says why.

    Raises:
        UserError: ``DELTAW_KERNELS`` asks for what cannot run here.
    """
    return found.library if (found := _in_use()) else None


def kernels() -> ctypes.CDLL:
    """The kernels, for those who have asked :func:`serves`; an error where there are none."""
    if (found := library()) is None:
        raise RuntimeError(why_not())
    return found


def variant() -> str | None:
    """The name of the variant in use; None where there is none."""
    return found.variant.name if (found := _in_use()) else None


def why_not() -> str | None:
    """Why the compiled kernels are not used, in one line; None where they are."""
    return _Process.why_not if _in_use() is None else None


def threads_note() -> str | None:
    """Why the kernels run on one thread, in one line; None where they do not, or are not used."""
    return found.threads_note if (found := _in_use()) else None


def notes() -> list[str]:
    """What a run should say about the kernels, a line each; nothing where they run as they should."""
    return [note for note in (why_not(), threads_note()) if note is not None]


def arithmetic() -> Arithmetic:
    """How this process computes at present."""
    _in_use()
    return _Process.arithmetic


def multiplies(stored: int) -> bool:
    """Whether the kernels in use compute products with weights of a type, given by :func:`number`."""
    return _in_use() is not None and stored not in _Process.by_torch


def compute_with(wanted: Arithmetic | None) -> None:
    """Compute so from now on; None is the default again.

    Raises:
        UserError: the variant cannot run here. OSError, RuntimeError: its file cannot be used.
        ValueError: it has no such arithmetic.
    """
    if wanted is None:
        _Process.settled = False
        return
    if wanted.kernels is None:
        _settle(None, wanted, why_not() or "compiled kernels are not used")
    else:
        _settle(open_variant(wanted.kernels), wanted, None)


@contextlib.contextmanager
def computing(wanted: Arithmetic | None = None) -> Iterator[None]:
    """While open, products may be computed in another way; then as before."""
    names = ("using", "arithmetic", "by_torch", "why_not", "settled")
    before = {name: getattr(_Process, name) for name in names}
    try:
        if wanted is not None:
            compute_with(wanted)
        yield
    finally:
        for name, value in before.items():
            setattr(_Process, name, value)
        if _Process.settled and _Process.using is not None:
            tell(_Process.using.library, _Process.arithmetic)


def _settle(opened: Opened | None, way: Arithmetic, why_not: str | None) -> None:
    if opened is not None:
        tell(opened.library, way)
    _Process.using, _Process.arithmetic, _Process.why_not = opened, way, why_not
    _Process.by_torch = frozenset(n for n, stored in enumerate(STORED) if way.of(stored) == TORCH)
    _Process.settled = True


def open_variant(name: str) -> Opened:
    """The variant ``name``, loaded. Several can be open in one process; one is in use.

    Raises:
        UserError: there is none of the name, the processor lacks something, or it was not built.
        OSError, RuntimeError: its file cannot be used.
    """
    if name not in _Process.opened:
        found = variants.named(name, processor_flags())
        _Process.opened[name] = open_file(variants.file_of(found), found)
    return _Process.opened[name]


def open_file(path: Path, variant: Variant) -> Opened:
    """The shared object at ``path``, ready to be called as ``variant``; it is not in use yet.

    Raises:
        UserError: the operating system does not grant what it needs. OSError, RuntimeError: it cannot be
        used.
    """
    kernels = load(path)
    if kernels.dw_ready() != 0:
        what = f"kernels '{variant.name}' cannot run: the operating system does not grant what they need"
        raise UserError(what, where=variants.VARIABLE, hint=f"set {variants.VARIABLE} to another variant, or unset it")
    if (threads := openmp_functions()) is not None:
        kernels.dw_threads(*threads)
    if (cache := second_level_cache()) is not None:
        kernels.dw_set_cache(cache)
    note = "compiled kernels run on one thread: torch's OpenMP library was not found"
    return Opened(variant, kernels, None if threads is not None else note)


def adopt(opened: Opened) -> None:
    """Compute with what :func:`open_file` gave from now on; it is found by its variant's name again."""
    name = opened.variant.name
    _Process.opened[name] = opened
    _settle(opened, default_of(name, opened.library), None)


def usable() -> list[Variant]:
    """The variants that were built, can be loaded, and run on this processor, the best first."""
    return [variant for variant in variants.allowed(processor_flags()) if _reason_against(variant) is None]


def _reason_against(variant: Variant) -> str | None:
    """Why a variant that the processor allows is not used; None where it can be."""
    if not variants.file_of(variant).is_file():
        return "compiled kernels were not built (install a C++ compiler, then install deltaw again)"
    try:
        open_variant(variant.name)
    except (OSError, AttributeError, RuntimeError) as error:
        return f"compiled kernels cannot be loaded: {error}"
    except UserError as error:
        return error.what
    return None


def _in_use() -> Opened | None:
    if not _Process.settled:
        opened, why_not = _found()
        forced = variants.asked().arithmetic
        way = default_of(opened.variant.name, opened.library, forced) if opened is not None else Arithmetic()
        _settle(opened, way, why_not)
    return _Process.using


def _found() -> tuple[Opened | None, str | None]:
    """The variant that the user forces, else the best; where there is none, why."""
    asked = variants.asked()
    if asked.kernels == variants.NONE:
        return None, f"compiled kernels are switched off ({asked.said})"
    if asked.kernels is not None:
        try:
            return open_variant(asked.kernels), None
        except (OSError, AttributeError, RuntimeError) as error:
            what = f"kernels '{asked.kernels}' cannot be loaded: {error}"
            raise UserError(what, where=variants.VARIABLE, hint="install deltaw again to rebuild them") from error
    if not platform_is_served():
        return None, f"compiled kernels are not for {platform.system()} on {platform.machine()}"
    reasons = []
    for variant in variants.allowed(processor_flags()):
        if (reason := _reason_against(variant)) is None:
            return open_variant(variant.name), None
        reasons.append(reason)
    # What failed says more than what was never built.
    return None, next((reason for reason in reasons if "not built" not in reason), reasons[0])


def platform_is_served() -> bool:
    """Whether the kernels are built for this system at all."""
    return platform.system() in ("Linux", "Darwin", "Windows")


def number(dtype: torch.dtype) -> int:
    """The kernels' own number for a type."""
    return _NUMBER[dtype]


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's first element lies."""
    return None if tensor is None else tensor.data_ptr()


def serves(*tensors: Tensor | None) -> bool:
    """Whether the kernels are there and take these: on the processor, all bf16 or all fp32."""
    if library() is None:
        return False
    dtype = None
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu" or tensor.dtype not in (torch.bfloat16, torch.float32):
            return False
        if dtype is not None and tensor.dtype != dtype:
            return False
        dtype = tensor.dtype
    return True


def load(path: Path) -> ctypes.CDLL:
    """The library at ``path``, its functions declared, after it was found to be the one that this code calls.

    Raises:
        OSError: it cannot be loaded. RuntimeError: it was built from other sources.
    """
    kernels = ctypes.CDLL(os.fspath(path))
    abi = kernels.dw_abi() if hasattr(kernels, "dw_abi") else 0
    if abi != ABI:
        rebuild = "install deltaw again to rebuild them"
        raise RuntimeError(f"they were built from other sources (ABI {abi}, not {ABI}); {rebuild}")
    for name, arguments in _SIGNATURES.items():
        function = getattr(kernels, name)
        function.argtypes = arguments
        if name in _RESULTS:
            function.restype, _ = _RESULTS[name]
        else:
            function.restype, function.errcheck = _I, _check_status
    if (struct := differing(kernels)) is not None:
        raise RuntimeError(f"they lay out {struct} otherwise; install deltaw again to rebuild them")
    return kernels


def _check_status(status: int, function: Any, arguments: tuple[Any, ...]) -> int:
    """What a kernel reports, as Python's own errors; see csrc/status.h."""
    if status == 0:
        return status
    kinds = {1: (MemoryError, "found no memory to work in"), 2: (IndexError, "was given an index out of bounds")}
    kind, what = kinds.get(status, (RuntimeError, f"failed (status {status})"))
    raise kind(f"{function.__name__} {what}")


def release_scratch() -> None:
    """Give back the memory that the kernels' threads keep to work in; it is taken again when needed."""
    for opened in _Process.opened.values():
        opened.library.dw_release()


def openmp_functions() -> list[ctypes.c_void_p | None] | None:
    """GOMP_parallel and three standard functions of the OpenMP library that torch is linked with; None where it is not
    found.

    Elsewhere than on Linux, where it is LLVM's or Intel's, only the last: the kernels have threads of their own
    there, as many as it says. A symbol that is asked of torch's own library is looked for in what that one is linked
    with, so no other OpenMP library of the process is taken by mistake; on Windows the library beside it is asked.
    """
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_get_max_threads")
    wanted = names if sys.platform == "linux" else names[-1:]
    folder = Path(torch.__file__).parent / "lib"
    libraries = [folder / name for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "libiomp5md.dll")]
    anywhere = [None] if sys.platform != "win32" else []
    for name in [*(os.fspath(path) for path in libraries if path.is_file()), *anywhere]:
        functions = ctypes.CDLL(name)
        if all(hasattr(functions, symbol) for symbol in wanted):
            found = [ctypes.cast(getattr(functions, symbol), ctypes.c_void_p) for symbol in wanted]
            return [*[None] * (len(names) - len(wanted)), *found]
    return None
