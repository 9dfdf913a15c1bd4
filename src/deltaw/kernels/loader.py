"""Loading and selection of the compiled kernels.

Each variant (``variants.py``) is a shared library of plain C functions that is independent of the versions of torch and
Python. On Linux it uses the threads of torch's OpenMP library, because two thread pools would compete for the cores. On
macOS and Windows that library cannot be shared. There the kernels have a thread pool, which sleeps while torch
computes.

``DELTAW_KERNELS=NAME`` forces a variant and raises an error if it cannot run. ``NAME:ARITHMETIC`` also forces the
arithmetic of products (``arithmetic.py``). ``none`` or ``DELTAW_NATIVE=0`` disables the compiled kernels. By default
the variant with the highest rank is used until :func:`use_arithmetic` activates a measured choice.
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
from deltaw.kernels import busy_machine, variants
from deltaw.kernels.arithmetic import TORCH, WEIGHT_TYPES, Arithmetic, default_arithmetic, set_arithmetic
from deltaw.kernels.processor import processor_flags, second_level_cache
from deltaw.kernels.variants import Variant

_P = ctypes.c_void_p
_L = ctypes.c_int64
_F = ctypes.c_float
_I = ctypes.c_int


def _fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    """Return ctypes field definitions from groups of space-separated names of one type."""
    return [(name, kind) for kind, names in groups for name in names.split()]


class Layer(ctypes.Structure):
    """A linear layer with its low-rank update."""

    _fields_ = _fields(
        (_P, "weight scale smooth bias A B"),
        (_L, "inputs outputs rank weight_type by_column bias_f32 in_blocks"),
        (_F, "scaling"),
    )


class RowNorm(ctypes.Structure):
    """A norm over the last dimension. ``used`` is 0 if the norm is absent."""

    _fields_ = _fields((_P, "weight bias"), (_F, "eps offset"), (_L, "centered used"))


class HalfNormsStruct(ctypes.Structure):
    """The norms of half a block."""

    _fields_ = _fields((RowNorm, "before after post"))


class BlockParts(ctypes.Structure):
    """A transformer block."""

    _fields_ = _fields(
        (_L, "type heads key_heads head_size activation window rotary_dims causal split gated parallel int8_gradients"),
        (_F, "scaling softcap"),
        (HalfNormsStruct, "first second"),
        (RowNorm, "query_norm key_norm"),
        (Layer, "query key value output gate up down"),
    )


class DecodeLinear(ctypes.Structure):
    """A linear layer of a decoder."""

    _fields_ = _fields((_P, "weight scale columns bias sums"), (_L, "inputs outputs type"))


class DecodeBlock(ctypes.Structure):
    """A block of a decoder."""

    _fields_ = _fields(
        (_L, "heads key_heads head_size activation window rotary_dims table split gated parallel cache_offset"),
        (_F, "scaling softcap"),
        (HalfNormsStruct, "first second"),
        (RowNorm, "query_norm key_norm"),
        (DecodeLinear, "query key value output gate up down"),
    )


class DecodeModel(ctypes.Structure):
    """A decoder."""

    _fields_ = _fields(
        (_P, "blocks cosines sines"),
        (_L, "count tables positions hidden cache_type page_tokens page_numbers"),
        (_F, "logits_scale logits_softcap"),
        (RowNorm, "final_norm"),
        (DecodeLinear, "head"),
    )


class DecodeFactors(ctypes.Structure):
    """Low-rank factors of one layer."""

    _fields_ = _fields((_P, "A B"), (_L, "rank"))


class DecodeStep(ctypes.Structure):
    """Inputs and outputs of one decoding step."""

    _fields_ = _fields(
        (_P, "hidden positions sequence adapter page_table output_rows adapters pages out logits"),
        (_L, "rows sequences pages_per_sequence output_count adapter_count page_count"),
    )


class BlockData(ctypes.Structure):
    """A weight stored in blocks."""

    _fields_ = _fields((_P, "data absmax group_scale codes offset"))


# In the order of the struct numbers of dw_struct_layout.
MIRRORED_STRUCTS: tuple[type[ctypes.Structure], ...] = (
    *(Layer, RowNorm, HalfNormsStruct, BlockParts),
    *(DecodeLinear, DecodeBlock, DecodeModel, DecodeFactors, DecodeStep),
    BlockData,
)


def mismatched_struct(library: ctypes.CDLL) -> str | None:
    """Return the name of the first struct with a different layout in the library, or None if all layouts agree."""
    max_fields = 64
    offsets = (_L * max_fields)()
    for struct_index, struct in enumerate(MIRRORED_STRUCTS):
        expected = [ctypes.sizeof(struct), *(getattr(struct, name).offset for name, *_ in struct._fields_)]
        count = library.dw_struct_layout(struct_index, offsets, max_fields)
        if list(offsets[: min(count, max_fields)]) != expected:
            return struct.__name__
    return None


# Expected result of dw_abi(). Increment it in csrc/kernels.h too when functions or structs change.
ABI = 14
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 2}

# Result and argument types of functions that do not return a status, then the argument types of all functions. See
# csrc/kernels.h.
_RESULTS: dict[str, tuple[type, list[type]]] = {
    "dw_linear_scratch_size": (_L, [_I, _L, _L, _L, _I, _I, _I, _I, _L, _I, _I]),
    "dw_factors_scratch_size": (_L, [_I, _L, _L]),
    "dw_class_gradient_scratch_size": (_L, [_L, _L, _L]),
    "dw_head_gradient_scratch_size": (_L, [_L, _L]),
    "dw_attention_scratch_size": (_L, [_I, _L, _L, _L, _L, _L]),
    "dw_attention_backward_scratch_size": (_L, [_I, _L, _L, _L, _L, _L]),
    "dw_recurrence_scratch_size": (_L, [_I, _P, *[_L] * 6]),
    "dw_abi": (_I, []),
    "dw_build_info": (_L, [_P, _L]),
    "dw_count_threads": (_L, []),
    "dw_struct_layout": (_L, [_I, _P, _L]),
    "dw_scratch_bytes": (_L, [_I]),
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
    "dw_quantize_nf4": [_I, _L, _L, _P, _P, _P, _P],
    "dw_norm": [_I, _L, _L, _P, _L, _P, _P, _F, _F, _I, _P, _P],
    "dw_norm_backward": [_I, _L, _L, _P, _P, _L, _P, _F, _I, _P, _P, _P],
    "dw_add": [_I, _L, _P, _P, _P],
    "dw_dropout": [_I, _L, _P, _L, _F, _F, _P],
    "dw_activation": [_I, _I, _L, _L, _P, _P, _P],
    "dw_activation_backward": [_I, _I, _L, _L, _P, _P, _P, _P, _P, _P],
    "dw_rotate": [_I, _L, _L, _L, _L, _P, _L, _P, _P, _I, _P, _L],
    "dw_cross_entropy": [_I, _L, _L, _P, _P, _P, _F, _F, _I, _P],
    "dw_attention": [_I, _P, _L, _L, _L, _I, _L, _L, _L, _L, _F, _F, _P, _L, *[_P] * 6],
    "dw_attention_backward": [_I, _P, _L, _L, _L, _I, _L, _L, _L, _L, _F, _F, _P, _L, *[_P] * 10],
    "dw_recurrence": [_I, _P, *[_L] * 6, _F, _I, *[_P] * 7],
    "dw_recurrence_backward": [_I, _P, *[_L] * 6, _F, _I, *[_P] * 11],
    "dw_convolution": [_I, _L, _L, _L, _I, *[_P] * 5],
    "dw_convolution_backward": [_I, _L, _L, _L, _I, *[_P] * 8],
    "dw_block_sizes": [_P, _L, _L, _P],
    "dw_block": [_P, _L, _P, _P, _L, _P, _L, *[_P] * 5],
    "dw_block_backward": [_P, _L, _P, _P, _L, _P, _L, *[_P] * 7],
    "dw_decode": [_P, _P],
    "dw_decode_attention": [*[_P] * 6],
}


@dataclass(frozen=True)
class LoadedVariant:
    """A loaded variant with callable functions.

    Attributes:
        variant: Variant that was loaded.
        library: Its shared library.
        threads_note: Reason why it runs on one thread, or None if it is multithreaded.
    """

    variant: Variant
    library: ctypes.CDLL
    threads_note: str | None


class _Process:
    """Kernel state of this process.

    Attributes:
        loaded: Loaded variants by name.
        active: Variant in use, or None for torch's operators.
        arithmetic: Arithmetic in use.
        torch_types: Type codes of weights with products that torch computes.
        unavailable_reason: Reason why no compiled kernels are used.
        is_settled: True if the fields above have been determined.
    """

    loaded: dict[str, LoadedVariant] = {}  # noqa: RUF012
    active: LoadedVariant | None = None
    arithmetic = Arithmetic()
    torch_types: frozenset[int] = frozenset()
    unavailable_reason: str | None = None
    is_settled = False


def library() -> ctypes.CDLL | None:
    """Return the active kernel library, or None if there is a reason in :func:`unavailable_reason`.

    Raises:
        UserError: if ``DELTAW_KERNELS`` requests kernels that cannot run here.
    """
    return active.library if (active := _active_variant()) else None


def kernels() -> ctypes.CDLL:
    """Return the active kernel library. Raises RuntimeError if it is unavailable; check :func:`supports` first."""
    if (active := library()) is None:
        raise RuntimeError(unavailable_reason())
    return active


def variant() -> str | None:
    """Return the name of the active variant, or None without compiled kernels."""
    return active.variant.name if (active := _active_variant()) else None


def unavailable_reason() -> str | None:
    """Return in one line why compiled kernels are not used, or None if they are."""
    return _Process.unavailable_reason if _active_variant() is None else None


def threads_note() -> str | None:
    """Return in one line why the kernels run on one thread, or None if they do not."""
    return active.threads_note if (active := _active_variant()) else None


def notes() -> list[str]:
    """Return the warnings about the kernels that a run should log, one line each."""
    return [note for note in (unavailable_reason(), threads_note()) if note is not None]


def arithmetic() -> Arithmetic:
    """Return the arithmetic in use."""
    _active_variant()
    return _Process.arithmetic


def multiplies(type_code: int) -> bool:
    """True if the active kernels compute products with weights of this type code; see :func:`dtype_code`."""
    return _active_variant() is not None and type_code not in _Process.torch_types


def use_arithmetic(arithmetic: Arithmetic | None) -> None:
    """Use this arithmetic from now on. None restores the default.

    Raises:
        UserError: if the variant cannot run here.
        OSError, RuntimeError: if its library cannot be used.
        ValueError: if the variant does not support the arithmetic.
    """
    if arithmetic is None:
        _Process.is_settled = False
    elif arithmetic.kernels is None:
        _settle(None, arithmetic, unavailable_reason() or "compiled kernels are not used")
    else:
        _settle(open_variant(arithmetic.kernels), arithmetic, None)


@contextlib.contextmanager
def temporary_arithmetic(arithmetic: Arithmetic | None = None) -> Iterator[None]:
    """Restore the current arithmetic on exit. If ``arithmetic`` is not None, use it in the meantime."""
    names = ("active", "arithmetic", "torch_types", "unavailable_reason", "is_settled")
    saved = {name: getattr(_Process, name) for name in names}
    try:
        if arithmetic is not None:
            use_arithmetic(arithmetic)
        yield
    finally:
        for name, value in saved.items():
            setattr(_Process, name, value)
        if _Process.is_settled and _Process.active is not None:
            set_arithmetic(_Process.active.library, _Process.arithmetic)


def _settle(loaded: LoadedVariant | None, arithmetic: Arithmetic, unavailable_reason: str | None) -> None:
    if loaded is not None:
        set_arithmetic(loaded.library, arithmetic)
    _Process.active = loaded
    _Process.arithmetic = arithmetic
    _Process.unavailable_reason = unavailable_reason
    _Process.torch_types = frozenset(n for n, stored in enumerate(WEIGHT_TYPES) if arithmetic.for_type(stored) == TORCH)
    _Process.is_settled = True


def open_variant(name: str) -> LoadedVariant:
    """Load the variant ``name``. A process can load several variants and use one.

    Raises:
        UserError: if the variant is unknown, was not built, or the CPU does not support it.
        OSError, RuntimeError: if its library cannot be used.
    """
    if name not in _Process.loaded:
        variant = variants.require_variant(name, processor_flags())
        _Process.loaded[name] = open_file(variants.file_of(variant), variant)
    return _Process.loaded[name]


def open_file(path: Path, variant: Variant) -> LoadedVariant:
    """Load the shared library at ``path`` as ``variant`` without activating it.

    Raises:
        UserError: if the operating system denies a required feature.
        OSError, RuntimeError: if the library cannot be used.
    """
    kernels = load(path)
    if kernels.dw_ready() != 0:
        message = f"kernels '{variant.name}' cannot run: the operating system denies a CPU feature that they need"
        raise UserError(message, location=variants.VARIABLE, hint=f"use another variant, or unset {variants.VARIABLE}")
    if (threads := openmp_functions()) is not None:
        kernels.dw_threads(*threads)
        parallel, thread_number = threads[:2]
        if parallel is not None and thread_number is not None:
            busy_machine.watch_load(parallel.value or 0, thread_number.value or 0)
    if (cache := second_level_cache()) is not None:
        kernels.dw_set_cache(cache)
    note = "compiled kernels run on one thread: torch's OpenMP library was not found"
    return LoadedVariant(variant, kernels, None if threads is not None else note)


def activate(loaded: LoadedVariant) -> None:
    """Use a variant loaded by :func:`open_file` from now on. :func:`open_variant` then returns it for its name."""
    name = loaded.variant.name
    _Process.loaded[name] = loaded
    _settle(loaded, default_arithmetic(name, loaded.library), None)


def usable_variants() -> list[Variant]:
    """Return the variants that were built, can be loaded, and run on this CPU, best first."""
    return [variant for variant in variants.allowed(processor_flags()) if _unusable_reason(variant) is None]


def _unusable_reason(variant: Variant) -> str | None:
    """Return why a variant that the CPU supports cannot be used, or None if it can."""
    if not variants.file_of(variant).is_file():
        return "compiled kernels were not built (install a C++ compiler, then install deltaw again)"
    try:
        open_variant(variant.name)
    except (OSError, AttributeError, RuntimeError) as error:
        return f"compiled kernels cannot be loaded: {error}"
    except UserError as error:
        return error.message
    return None


def _active_variant() -> LoadedVariant | None:
    if not _Process.is_settled:
        loaded, unavailable_reason = _select()
        forced = variants.kernel_overrides().arithmetic
        arithmetic = Arithmetic() if loaded is None else default_arithmetic(loaded.variant.name, loaded.library, forced)
        _settle(loaded, arithmetic, unavailable_reason)
    return _Process.active


def _select() -> tuple[LoadedVariant | None, str | None]:
    """Return the forced or best variant, or None with the reason."""
    overrides = variants.kernel_overrides()
    if overrides.kernels == variants.NONE:
        return None, f"compiled kernels are switched off ({overrides.source})"
    if overrides.kernels is not None:
        try:
            return open_variant(overrides.kernels), None
        except (OSError, AttributeError, RuntimeError) as error:
            message = f"kernels '{overrides.kernels}' cannot be loaded: {error}"
            raise UserError(message, location=variants.VARIABLE, hint="install deltaw again to rebuild them") from error
    if not is_platform_supported():
        return None, f"compiled kernels are not for {platform.system()} on {platform.machine()}"
    reasons = []
    for variant in variants.allowed(processor_flags()):
        if (reason := _unusable_reason(variant)) is None:
            return open_variant(variant.name), None
        reasons.append(reason)
    # A failure to load is more informative than a variant that was not built.
    return None, next((reason for reason in reasons if "not built" not in reason), reasons[0])


def is_platform_supported() -> bool:
    """True if the kernels are built for this operating system."""
    return platform.system() in ("Linux", "Darwin", "Windows")


def dtype_code(dtype: torch.dtype) -> int:
    """Return the kernels' code of a type."""
    return _DTYPE_CODES[dtype]


def address(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's first element, or None."""
    return None if tensor is None else tensor.data_ptr()


def supports(*tensors: Tensor | None) -> bool:
    """True if the kernels are available and accept these tensors: on the CPU, all bf16 or all fp32. None is ignored."""
    if library() is None:
        return False
    dtype = None
    for tensor in tensors:
        if tensor is not None:
            if tensor.device.type != "cpu" or tensor.dtype not in (dtype or torch.bfloat16, dtype or torch.float32):
                return False
            dtype = tensor.dtype
    return True


def load(path: Path) -> ctypes.CDLL:
    """Load the library at ``path``, check its ABI, and declare its functions.

    Raises:
        OSError: if it cannot be loaded.
        RuntimeError: if it was built from other sources.
    """
    kernels = ctypes.CDLL(os.fspath(path))
    abi = kernels.dw_abi() if hasattr(kernels, "dw_abi") else 0
    if abi != ABI:
        rebuild = "install deltaw again to rebuild them"
        raise RuntimeError(f"the library was built from other sources (ABI {abi}, not {ABI}); {rebuild}")
    for name, arguments in _SIGNATURES.items():
        function = getattr(kernels, name)
        function.argtypes = arguments
        if name in _RESULTS:
            function.restype, _ = _RESULTS[name]
        else:
            function.restype = _I
            function.errcheck = _check_status
    if (struct := mismatched_struct(kernels)) is not None:
        raise RuntimeError(f"the library has a different layout of {struct}; install deltaw again to rebuild it")
    return kernels


def _check_status(status: int, function: Any, arguments: tuple[Any, ...]) -> int:
    """Raise a Python exception for a kernel's error status; see csrc/status.h."""
    if status == 0:
        return status
    kinds = {1: (MemoryError, "could not allocate scratch memory"), 2: (IndexError, "received an index out of bounds")}
    kind, message = kinds.get(status, (RuntimeError, f"failed (status {status})"))
    raise kind(f"{function.__name__} {message}")


def release_scratch() -> None:
    """Free the scratch memory of the kernels' threads. It is allocated again on demand."""
    for loaded in _Process.loaded.values():
        loaded.library.dw_release()


def openmp_functions() -> list[ctypes.c_void_p | None] | None:
    """Return GOMP_parallel and three standard functions of the OpenMP library that torch is linked with.

    None if the library was not found. On macOS and Windows, where torch links LLVM's or Intel's OpenMP, only the last
    function is returned and the others are None: the kernels use it to choose the size of their thread pool.

    Symbols are looked up through torch's library and its dependencies, so another OpenMP library of the process is
    never used. On Windows the library next to torch's is used.
    """
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_get_max_threads")
    required = names if sys.platform == "linux" else names[-1:]
    folder = Path(torch.__file__).parent / "lib"
    libraries = [folder / name for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "libiomp5md.dll")]
    fallbacks = [None] if sys.platform != "win32" else []
    for name in [*(os.fspath(path) for path in libraries if path.is_file()), *fallbacks]:
        functions = ctypes.CDLL(name)
        if all(hasattr(functions, symbol) for symbol in required):
            addresses = [ctypes.cast(getattr(functions, symbol), ctypes.c_void_p) for symbol in required]
            return [*[None] * (len(names) - len(required)), *addresses]
    return None
