"""The compiled kernels: where they are, whether this processor can run them, and how they are called.

The extension is plain C++ behind C functions, so it is bound to no version of torch or Python. It has no
threads of its own: it is handed those of torch's OpenMP library, since two pools would fight for the cores.
Set ``DELTAW_NATIVE=0`` to do without.

Knows addresses and types of numbers; what the kernels compute is said where they are called.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.kernels.processor import processor_flags
from deltaw.kernels.structs import differing

# What the library must answer; raised in csrc/kernels.h whenever its functions or structs change.
ABI = 2
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni")
_NUMBER = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 2}

_I, _L, _F, _P = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
# What functions return beside a status, and what each is given; see csrc/kernels.h.
_RESULTS: dict[str, type] = {"dw_abi": _I, "dw_layout_of": _L, "dw_scratch_held": _L}
_SIGNATURES: dict[str, list[type]] = {
    "dw_abi": [],
    "dw_layout_of": [_I, _P, _L],
    "dw_threads": [_P] * 4,
    "dw_release": [],
    "dw_scratch_held": [_I],
    "dw_linear": [
        *(_I, _L, _L, _L, _P, _I, _P, _I, _P, _P, _P, _I),
        *(_P, _P, _L, _F, _P, _P, _P, _I, _P, _P),
    ],
    "dw_linear_backward": [_I, _L, _L, _L, _P, _P, _I, _P, _P, _P, _P, _L, _F, *[_P] * 5],
    "dw_factors_backward": [_I, _L, _L, _L, _L, _P, _P, _P, _P, _F, _P, _P],
    "dw_class_gradient": [_L, _L, _L, *[_P] * 6],
    "dw_quantize": [_I, _L, _L, _P, _P, _P, _P],
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
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, ready to be called; None where :func:`why_not` says why."""
    return _found()[0]


def kernels() -> ctypes.CDLL:
    """The kernels, for those who have asked :func:`serves`; an error where there are none."""
    found = library()
    if found is None:
        raise RuntimeError(why_not())
    return found


def why_not() -> str | None:
    """Why the compiled kernels are not used, in one line; None where they are."""
    return _found()[1]


def threads_note() -> str | None:
    """Why the kernels run on one thread, in one line; None where they do not, or are not used."""
    return _found()[2]


def notes() -> list[str]:
    """What a run should say about the kernels, a line each; nothing where they run as they should."""
    return [note for note in (why_not(), threads_note()) if note is not None]


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


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, str | None, str | None]:
    """The library, why there is none, and why it runs on one thread."""
    reason = _unsuitable()
    if reason is not None:
        return None, reason, None
    path = _extension()
    if path is None:
        return (
            None,
            "compiled kernels were not built (install a C++ compiler, then install deltaw again)",
            None,
        )
    try:
        kernels = load(path)
    except (OSError, AttributeError, RuntimeError) as error:
        return None, f"compiled kernels cannot be loaded: {error}", None
    threads = openmp_functions()
    if threads is None:
        return kernels, None, "compiled kernels run on one thread: torch's OpenMP library was not found"
    kernels.dw_threads(*threads)
    return kernels, None, None


def _unsuitable() -> str | None:
    """Why kernels are not even looked for."""
    if os.environ.get("DELTAW_NATIVE", "1") == "0":
        return "compiled kernels are switched off (DELTAW_NATIVE=0)"
    if not platform_is_served():
        return f"compiled kernels are for Linux on x86-64, not {platform.system()} on {platform.machine()}"
    lacking = [flag for flag in NEEDED if flag not in processor_flags()]
    return f"compiled kernels need a processor with {', '.join(lacking)}" if lacking else None


def platform_is_served() -> bool:
    """Whether the extension is built for this system at all."""
    return platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")


def load(path: Path) -> ctypes.CDLL:
    """The library at ``path``, its functions declared, after it was found to be the one that this code calls.

    Raises:
        OSError: it cannot be loaded. RuntimeError: it was built from other sources.
    """
    kernels = ctypes.CDLL(os.fspath(path))
    abi = kernels.dw_abi() if hasattr(kernels, "dw_abi") else 0
    if abi != ABI:
        raise RuntimeError(
            f"they were built from other sources (ABI {abi}, not {ABI}); install deltaw again to rebuild them"
        )
    for name, arguments in _SIGNATURES.items():
        function = getattr(kernels, name)
        function.argtypes, function.restype = arguments, _RESULTS.get(name, _I)
        if name not in _RESULTS:
            function.errcheck = _check_status
    struct = differing(kernels)
    if struct is not None:
        raise RuntimeError(f"they lay out {struct} otherwise; install deltaw again to rebuild them")
    return kernels


def _check_status(status: int, function: Any, arguments: tuple[Any, ...]) -> int:
    """What a kernel reports, as Python's own errors; see csrc/status.h."""
    if status == 0:
        return status
    name = function.__name__
    if status == 1:
        raise MemoryError(f"{name} found no memory to work in")
    if status == 2:
        raise IndexError(f"{name} was given an index out of bounds")
    raise RuntimeError(f"{name} failed (status {status})")


def release_scratch() -> None:
    """Give back the memory that the kernels' threads keep to work in; it is taken again when needed."""
    found = library()
    if found is not None:
        found.dw_release()


def _extension() -> Path | None:
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_native{suffix}"
        if path.is_file():
            return path
    return None


def openmp_functions() -> list[ctypes.c_void_p] | None:
    """GOMP_parallel and three standard functions of the OpenMP library that torch is linked with.

    GNU's, LLVM's and Intel's libraries all export them. A symbol that is asked of torch's own library is
    looked for in what that one is linked with, so no other OpenMP library of the process is taken by mistake.
    """
    wanted = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_get_max_threads")
    torch_itself = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for name in ([os.fspath(torch_itself)] if torch_itself.is_file() else []) + [None]:
        functions = ctypes.CDLL(name)
        if all(hasattr(functions, symbol) for symbol in wanted):
            return [ctypes.cast(getattr(functions, symbol), ctypes.c_void_p) for symbol in wanted]
    return None
