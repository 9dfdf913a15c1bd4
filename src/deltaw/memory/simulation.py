"""Dry run of a program on fake tensors: it executes the real code without arithmetic and without allocating memory.

Floating-point tensors are fake: they have a shape, a dtype and a storage size, but no data (torch's
``FakeTensorMode``). Integers and booleans (token ids, positions, masks, layouts) are computed, because programs branch
on them. Reading a number from a fake tensor yields 1.

A run on another device is simulated on fake CPU tensors that report this device to Python code. Python code takes the
branches of that device, and neither the device nor a torch build for it is required.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.kernels.operators import simulated_device
from deltaw.kernels.torch_private import (
    GROUPED_PRODUCT,
    LOCAL_SCALAR,
    PIN_MEMORY,
    TO_COPY,
    DispatchMode,
    FakeTensor,
    FakeTensorMode,
    require_dry_runs,
    tree_map_only,
    without_dispatch,
)
from deltaw.machine.cards import compiles_kernels
from deltaw.memory.operator_cache import CPU, OperatorCache, tensors_in
from deltaw.memory.plan import Footprint
from deltaw.memory.storage_tracker import MemoryTracker, uses_device

_aten = torch.ops.aten
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_GROUPED: Any = getattr(GROUPED_PRODUCT, "default", None)
# Operators that use only the shape of their input. Integer results are real even if the input is fake.
_LIKE_NAMES = ("zeros_like", "ones_like", "full_like", "empty_like")
_NEW_NAMES = ("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided")
_LIKE = {getattr(_aten, name).default for name in (*_LIKE_NAMES, *_NEW_NAMES)}
# Operators that return indices along a dimension: position of the ``dim`` argument, and its default.
_INDEX_OPERATORS: dict[Any, tuple[int, int | None]] = {
    _aten.topk.default: (2, -1),
    _aten.sort.default: (1, -1),
    _aten.argsort.default: (1, -1),
    _aten.argmax.default: (1, None),
    _aten.argmin.default: (1, None),
    _aten.max.dim: (1, -1),
    _aten.min.dim: (1, -1),
    _aten.multinomial.default: (-1, -1),
}


# Operators that only fill a tensor with values.
_FILL_OPERATORS = {
    *(getattr(_aten, name).default for name in ("normal_", "uniform_", "exponential_", "zero_")),
    _aten.bernoulli_.float,
    _aten.bernoulli_.Tensor,
    _aten.fill_.Scalar,
}


# Integral types that are not used for indices: masks, and weights and activations in int8.
_NON_INDEX_DTYPES = (torch.bool, torch.int8, torch.uint8)

# Results of predicates on fake values: no value is exceptional.
_FIXED_RESULTS = {
    **{getattr(_aten.all, name): True for name in ("default", "dim", "dims")},
    **{getattr(_aten.any, name): False for name in ("default", "dim", "dims")},
}


# Thread-local, because dispatch modes are.
_THREAD_STATE = threading.local()


class _FakeTensorRouter(DispatchMode):
    """Runs each operator on real or on fake tensors. Enter it after the FakeTensorMode."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.answers = OperatorCache(fake)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        if getattr(_THREAD_STATE, "device", None) is None:
            return self._dispatch(func, args, kwargs)
        device = _THREAD_STATE.device
        _THREAD_STATE.device = None
        try:
            return self._dispatch_on_device(func, args, kwargs)
        finally:
            _THREAD_STATE.device = device

    def _dispatch_on_device(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run an operator of a program on another device, whose tensors are fake CPU tensors here."""
        if func in (_aten.is_pinned.default, PIN_MEMORY):  # pinned host memory
            return True if func is _aten.is_pinned.default else args[0]
        if func is _aten.histc.default and _is_integral(args[0].dtype):  # only devices have it
            with without_dispatch():
                return func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
        if uses_device(kwargs):
            kwargs = {**kwargs, "device": CPU}
            if func is TO_COPY and isinstance(args[0], FakeTensor) and kwargs.get("dtype") in (None, args[0].dtype):
                func = _aten.alias.default
                kwargs = {}
        return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: tuple, kwargs: dict) -> Any:
        tensors = tensors_in((*args, *kwargs.values()))
        fake = any(isinstance(t, FakeTensor) for t in tensors)
        if func is LOCAL_SCALAR and fake:
            return _scalar_value(args[0])
        if func is _aten.equal.default and fake:
            return args[0].shape == args[1].shape
        if func in _FILL_OPERATORS and isinstance(args[0], FakeTensor):
            args[0].constant = None
            return args[0]
        if fake:
            if func in _LIKE and _is_integral(kwargs.get("dtype")):
                return self._run_real(func, (_real_placeholder(args[0]), *args[1:]), kwargs)
            return self._run_fake(func, args, kwargs)
        if not tensors:
            return self._create(func, args, kwargs)
        if all(_is_integral(t.dtype) for t in tensors):
            return self._to_fake(self._run_real(func, args, kwargs))
        return self._run_fake(func, args, kwargs)

    @staticmethod
    def _run_real(func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        with without_dispatch():
            return func(*args, **kwargs)

    def _create(self, func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Run an operator without tensor arguments. It creates a tensor, or has no result."""
        if kwargs.get("dtype") is not None and _is_integral(kwargs["dtype"]):
            return self._run_real(func, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, FakeTensor) and _is_integral(result.dtype):
            return self._run_real(func, args, kwargs)  # arange(8), full(…, True): the dtype depends on the values
        return result

    def _run_fake(self, func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if isinstance(kwargs.get("generator"), torch.Generator):
            kwargs = {**kwargs, "generator": None}  # a CPU generator, not needed because no values are sampled
        if func is _aten.nonzero.default or func is _aten.masked_select.default:
            return self._select_by_mask(func, args)
        if func in _INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1]):
            args = (args[0], self._expand_masks(args[1]), *args[2:])
        if func is _GROUPED and args[0].dtype != torch.bfloat16:
            return self._grouped_product(args, kwargs)
        result = self.answers(func, args, kwargs)
        if func in _FIXED_RESULTS:
            return self._run_real(_aten.full.default, (list(result.shape), _FIXED_RESULTS[func]), {"dtype": torch.bool})
        if func in _INDEX_OPERATORS:
            return tree_map_only(FakeTensor, lambda t: _spread_indices(func, args, kwargs, t), result)
        if isinstance(result, FakeTensor) and result.dtype not in _NON_INDEX_DTYPES and _is_integral(result.dtype):
            return self._run_real(_aten.zeros.default, (list(result.shape),), {"dtype": result.dtype})
        return result

    def _select_by_mask(self, func: Callable[..., Any], args: tuple) -> Tensor:
        """Return the elements selected by a mask. A fake mask selects all elements."""
        mask = args[-1]
        if isinstance(mask, FakeTensor):
            mask = self._run_real(_aten.ones.default, (list(mask.shape),), {"dtype": torch.bool})
        if func is _aten.nonzero.default:
            return self._run_real(func, (mask,), {})
        count = self._run_real(_aten.sum.default, (mask.expand(args[0].shape),), {}).item()
        return torch.empty(count, dtype=args[0].dtype)

    def _expand_masks(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Replace each mask in the indices by the indices that it selects, one tensor per dimension of the mask."""
        expanded: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                expanded += self._select_by_mask(_aten.nonzero.default, (index,)).unbind(1)
            else:
                expanded.append(index)
        return expanded

    def _grouped_product(self, args: tuple, kwargs: dict) -> Tensor:
        """Run the grouped product of experts in bf16, the only type that torch infers shapes for."""
        result = self.answers(_GROUPED, (*(t.to(torch.bfloat16) for t in args[:2]), *args[2:]), kwargs)
        return torch.empty_strided(result.shape, result.stride(), dtype=args[0].dtype)

    def _to_fake(self, result: Any) -> Any:
        """Convert floating-point results of operators on integers to fake tensors."""

        def convert(tensor: Tensor) -> Tensor:
            if isinstance(tensor, FakeTensor) or _is_integral(tensor.dtype):
                return tensor
            with self.fake:
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

        return tree_map_only(Tensor, convert, result)


def _is_integral(dtype: torch.dtype | None) -> bool:
    return dtype is not None and not dtype.is_floating_point and not dtype.is_complex


def _scalar_value(tensor: FakeTensor) -> float | int | bool:
    if tensor.constant is not None:
        return tensor.constant.item()
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1


def _real_placeholder(tensor: Tensor) -> Tensor:
    """Return a real tensor of the same shape that occupies one element."""
    with without_dispatch():
        return torch.empty((), dtype=torch.bool).expand(tensor.shape)


def _spread_indices(func: object, args: tuple, kwargs: dict, result: FakeTensor) -> Tensor:
    """Return evenly spread indices along a dimension, so that a router assigns equal shares to the experts."""
    if not _is_integral(result.dtype):
        return result
    at, default = _INDEX_OPERATORS[func]
    dim = args[at] if 0 <= at < len(args) else kwargs.get("dim", default)
    size = args[0].numel() if dim is None else args[0].shape[dim]
    with without_dispatch():
        return (torch.arange(result.numel()) % max(1, size)).to(result.dtype).reshape(result.shape)


@functools.cache
def _modes() -> tuple[FakeTensorMode, _FakeTensorRouter]:
    """Return the modes, one pair per process, because tensors of two fake modes cannot be combined."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    return fake, _FakeTensorRouter(fake)


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Context manager in which new floating-point tensors are fake, so that models can be built and runs simulated.

    Existing real floating-point tensors can be used and are not modified. Can be nested.

    Raises:
        RuntimeError: if this version of torch does not support it.
    """
    require_dry_runs()
    if getattr(_THREAD_STATE, "is_open", False):
        yield
        return
    fake, mode = _modes()
    _THREAD_STATE.is_open = True
    try:
        with fake, mode:
            yield
    finally:
        _THREAD_STATE.is_open = False


def with_index(device: str) -> str:
    """Return ``cuda:0`` for ``cuda``. Without a CUDA build, torch cannot move a tensor to a device without index."""
    return f"{device}:0" if device == "cuda" else device


def _reported_device(tensor: Tensor) -> torch.device:
    device = getattr(_THREAD_STATE, "device", None)
    return Tensor.device.__get__(tensor) if device is None else device


@contextlib.contextmanager
def _on_device(device: str) -> Iterator[None]:
    """Context in which fake tensors report ``device`` to Python code of this thread, but not inside operators."""
    if device == "cpu":
        yield
        return
    simulated_device.compiles = compiles_kernels()
    FakeTensor.device, _THREAD_STATE.device = property(_reported_device), torch.device(with_index(device))
    # Checkpointing saves the random state of the device with this index.
    FakeTensor.get_device = lambda tensor: -1 if (index := tensor.device.index) is None else index
    try:
        yield
    finally:
        _THREAD_STATE.device = simulated_device.compiles = None
        del FakeTensor.device, FakeTensor.get_device


def simulate(
    run: Callable[[], object],
    *,
    models: Iterable[nn.Module] = (),
    vocabularies: Iterable[int] = (),
    device: str = "cpu",
) -> Footprint:
    """Run ``run`` on fake tensors and return its footprint.

    Args:
        run: Function that is called once, under :func:`fake_tensors`. Create its models under it too
            (:func:`deltaw.hub.skeletons.skeleton`).
        models: Existing models. Their parameters and buffers count as weights or trainable parameters, and modules are
            reported by their names in them.
        vocabularies: Floating-point tensors whose last dimension has one of these sizes count as logits.
        device: Device of the run. It does not have to exist on this machine.
    """
    with fake_tensors(), _on_device(device), MemoryTracker(vocabularies=vocabularies, device=device) as tracker:
        for model in models:
            tracker.track_model(model)
        run()
    return tracker.footprint()
