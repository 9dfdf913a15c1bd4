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

import torch
from torch import Tensor

from deltaw.kernels.processor import processor_flags

NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni")
_NUMBER = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 2}

_I, _L, _F, _P = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES: dict[str, list[type]] = {
    "dw_threads": [_P] * 4,
    "dw_linear": [
        *(_I, _L, _L, _L, _P, _I, _P, _I, _P, _P, _P, _I),
        *(_P, _P, _L, _F, _P, _P, _P, _I, _P, _P),
    ],
    "dw_linear_backward": [_I, _L, _L, _L, _P, _P, _I, _P, _P, _P, _P, _L, _F, *[_P] * 5],
    "dw_factors_backward": [_I, _L, _L, _L, _L, _P, _P, _P, _P, _F, _P, _P],
    "dw_class_gradient": [_L, _L, _L, *[_P] * 6],
    "dw_quantise": [_I, _L, _L, _P, _P, _P, _P],
    "dw_norm": [_I, _L, _L, _P, _L, _P, _P, _F, _F, _I, _P, _P],
    "dw_norm_backward": [_I, _L, _L, _P, _P, _L, _P, _F, _I, _P, _P, _P],
    "dw_activation": [_I, _I, _L, _L, _P, _P, _P],
    "dw_activation_backward": [_I, _I, _L, _L, _P, _P, _P, _P, _P, _P],
    "dw_rotate": [_I, _L, _L, _L, _L, _P, _L, _P, _P, _I, _P, _L],
    "dw_cross_entropy": [_I, _L, _L, _P, _P, _P, _F, _F, _I, _P],
    "dw_attention": [_I, _P, _L, _L, _L, _I, _L, _L, _L, _L, _F, _F, _P, _L, *[_P] * 6],
    "dw_block_sizes": [_P, _L, _P],
    "dw_block": [_P, _L, _P, _P, _L, *[_P] * 5],
    "dw_block_backward": [_P, _L, _P, _P, _L, *[_P] * 7],
    "dw_attention_backward": [_I, _P, _L, _L, _L, _I, _L, _L, _L, _L, _F, _F, _P, _L, *[_P] * 10],
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
def _found() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("DELTAW_NATIVE", "1") == "0":
        return None, "compiled kernels are switched off (DELTAW_NATIVE=0)"
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return (
            None,
            f"compiled kernels are for Linux on x86-64, not {platform.system()} on {platform.machine()}",
        )
    lacking = [flag for flag in NEEDED if flag not in processor_flags()]
    if lacking:
        return None, f"compiled kernels need a processor with {', '.join(lacking)}"
    path = _extension()
    if path is None:
        return None, "compiled kernels were not built (install a C++ compiler, then install deltaw again)"
    try:
        kernels = ctypes.CDLL(os.fspath(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(kernels, name)
            function.argtypes, function.restype = arguments, None
        threads = _threads()
    except (OSError, AttributeError) as error:
        return None, f"compiled kernels cannot be loaded ({error})"
    if threads is not None:
        kernels.dw_threads(*threads)
    return kernels, None


def _extension() -> Path | None:
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_native{suffix}"
        if path.is_file():
            return path
    return None


def _threads() -> list[ctypes.c_void_p] | None:
    """The functions of the OpenMP library that torch has loaded; None where it is another one than GNU's.
    Kernels run on one thread then."""
    wanted = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_get_max_threads")
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        gomp = ctypes.CDLL(os.fspath(path))
        return [ctypes.cast(getattr(gomp, name), ctypes.c_void_p) for name in wanted]
    whole = ctypes.CDLL(None)
    if all(hasattr(whole, name) for name in wanted):
        return [ctypes.cast(getattr(whole, name), ctypes.c_void_p) for name in wanted]
    return None
