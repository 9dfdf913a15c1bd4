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
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from deltaw.kernels.operators import simulated_device
from deltaw.kernels.torch_private import (
    ENGINE,
    GROUPED_PRODUCT,
    LOCAL_SCALAR,
    PIN_MEMORY,
    TO_COPY,
    DispatchMode,
    FakeTensor,
    FakeTensorMode,
    as_fake,
    in_backward,
    require_dry_runs,
    tree_leaves,
    tree_map_only,
    without_dispatch,
)
from deltaw.machine.cards import compiles_kernels
from deltaw.machine.memory import MAX_RETAINED_BYTES, trim_listeners
from deltaw.memory.caching import CachingAllocator
from deltaw.memory.plan import KINDS, PHASES, Footprint, downsample
from deltaw.memory.scratch import arena_bytes, device_scratch_bytes, scratch_bytes

# Cache of the results of operators by input shapes, since the layers of a model repeat the same operators.
#
# At the first call, torch's ``FakeTensorMode`` computes the result, and each output is recorded as a new tensor, a view
# of an input, or an input modified in place. Later calls with the same shapes, strides and dtypes construct the outputs
# from this record in a fraction of the time.


_CPU = torch.device("cpu")
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
# Operators on lists of tensors. Optimizers pass hundreds of tensors to them.
_LIST_PREFIXES = ("aten::_foreach_", "aten::_fused_")
# Operators that change the metadata of a tensor.
_RESHAPING_NAMES = ("resize_", "set_", "transpose_", "unsqueeze_", "squeeze_", "t_", "as_strided_", "swap")


class _NewTensor(NamedTuple):
    """A new tensor, or a view of the input with index ``of``."""

    of: int | None
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


_Output = _NewTensor | int | None  # an integer is the index of an input that is returned


class OperatorCache:
    """Runs operators on fake tensors and caches the shapes of their results."""

    def __init__(self, fake: FakeTensorMode) -> None:
        self._fake = fake
        self._attributes: dict[str, Any] | None = None
        self._templates: dict[Hashable, tuple[type, list[_Output]] | None] = {}

    def __call__(self, func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Return the result of ``func``. At least one argument is a fake tensor."""
        name = _name(func)
        if name.startswith(_LIST_PREFIXES):
            if name.endswith("_"):
                return None  # it modifies only values, which fake tensors do not have
            if name == "aten::_foreach_norm":
                return self._norms(args, kwargs)
        parts: list[Hashable] = [func]
        tensors: list[Tensor] = []
        if not _describe(args, parts, tensors) or not _describe((*kwargs, *kwargs.values()), parts, tensors):
            return func(*args, **kwargs)
        key = tuple(parts)
        if key not in self._templates:
            self._templates[key] = self._infer(func, args, kwargs, tensors)
        if (template := self._templates[key]) is None:
            return func(*args, **kwargs)
        kind, outputs = template
        if kind is Tensor:
            return self._materialize(outputs[0], tensors)
        results = [self._materialize(output, tensors) for output in outputs]
        return results if kind is list else tuple(results)

    def _norms(self, args: tuple, kwargs: dict) -> list[Tensor]:
        """Return the norm of each tensor, so that tensors of one shape share a cache entry."""
        dtype = kwargs.get("dtype")
        order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
        norm = torch.ops.aten.linalg_vector_norm.default
        return [self(norm, (tensor, order), {"dtype": dtype} if dtype else {}) for tensor in args[0]]

    def _infer(
        self, func: Callable[..., Any], args: tuple, kwargs: dict, tensors: list[Tensor]
    ) -> tuple[type, list[_Output]] | None:
        """Run an operator on copies of the fake tensors and return a template of its results.

        Copies are needed because torch leaves weak references on tensors that it inspects, and a parameter with a weak
        reference can no longer be swapped (``Module.to``).
        """
        copies = {id(t): self._copy_fake(t) if isinstance(t, FakeTensor) else t for t in tensors}
        args, kwargs = tree_map_only(Tensor, lambda t: copies[id(t)], (args, kwargs))
        return _outputs(func, func(*args, **kwargs), [copies[id(t)] for t in tensors])

    def _copy_fake(self, tensor: Tensor) -> Tensor:
        reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        count = tensor.storage_offset() + reach + 1
        with without_dispatch():
            base = torch.empty(count, dtype=tensor.dtype, device="meta")
            return self._as_fake(base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).detach())

    def _materialize(self, output: _Output, tensors: list[Tensor]) -> Tensor | None:
        if not isinstance(output, _NewTensor):
            return None if output is None else tensors[output]
        with without_dispatch():
            if output.of is None:
                meta = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta")
            else:
                meta = torch.empty(0, dtype=output.dtype, device="meta")
                storage = tensors[output.of].untyped_storage()
                meta.set_(storage, output.offset, output.shape, output.stride)  # type: ignore[call-overload]
            return self._as_fake(meta)

    def _as_fake(self, meta: Tensor) -> Tensor:
        """Return ``meta`` as a fake tensor, without the checks in the constructor of ``FakeTensor``."""
        if self._attributes is None:
            self._attributes = dict(vars(FakeTensor(self._fake, meta, _CPU)))
        return as_fake(self._fake, self._attributes, meta, _CPU)


def _name(func: Any) -> str:
    """Return an operator's name without its overload, for example ``aten::add``."""
    return str(func.name()).partition(".")[0]


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors in an operator's arguments, including those in nested lists."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors += tensors_in(value)
    return tensors


def _describe(values: Any, parts: list[Hashable], tensors: list[Tensor]) -> bool:
    """Append the cache key of the arguments to ``parts`` and their tensors to ``tensors``.

    Returns:
        False if the result depends on more than shapes.
    """
    for value in values:
        if isinstance(value, Tensor):
            if isinstance(value, FakeTensor):
                if value.constant is not None:
                    return False
            elif value.is_floating_point() or value.dtype == torch.bool or value.is_complex():
                return False
            parts += (value.dtype, value.shape, value.stride(), value.storage_offset())
            tensors.append(value)
        elif isinstance(value, _PLAIN):
            # 1, 1.0 and True are equal, but lead to different result types.
            parts.append((type(value), value))
        elif isinstance(value, (list, tuple)):
            parts.append(len(value))
            if not _describe(value, parts, tensors):
                return False
        else:
            return False
    return True


def _outputs(func: Callable[..., Any], result: Any, tensors: list[Tensor]) -> tuple[type, list[_Output]] | None:
    """Return a template that reconstructs ``result`` from ``tensors``, or None if that is impossible."""
    single = isinstance(result, Tensor) or result is None
    if _name(func).rpartition("::")[2] in _RESHAPING_NAMES or not (single or isinstance(result, (list, tuple))):
        return None
    outputs: list[_Output] = []
    for value in [result] if single else result:
        if value is None:
            outputs.append(None)
        elif isinstance(value, FakeTensor) and value.constant is None and value.layout == torch.strided:
            outputs.append(_output(value, tensors))
        else:
            return None
    return (Tensor if single else type(result)), outputs


def _output(value: FakeTensor, tensors: list[Tensor]) -> _Output:
    for index, tensor in enumerate(tensors):
        if tensor is value:
            return index
    storage = value.untyped_storage()
    base = next((index for index, tensor in enumerate(tensors) if tensor.untyped_storage() is storage), None)
    return _NewTensor(base, value.shape, value.stride(), int(value.storage_offset()), value.dtype)


# Tracking of storages: allocated bytes over time by kind, and their peak.
#
# A dispatch mode sees the tensors that operators return, and a weak reference reports when a storage is freed. This
# works for real and fake tensors. Temporary buffers inside operators are added by :mod:`deltaw.memory.scratch`.
#
# Tensors are classified after the run by :meth:`MemoryTracker.footprint`, since it is not known earlier which tensors
# become gradients or are saved for a backward pass.


_FORWARD, _BACKWARD, _OPTIMIZER = range(3)


@dataclass(slots=True, eq=False)
class _StorageLifetime:
    """Lifetime of one storage. Times are numbers of operators since the start.

    Attributes:
        bytes: Size of the block in bytes. On the CPU it is that of the storage.
        allocated_at: Time of the allocation.
        phase: Phase of the allocation.
        module: Module that allocated the storage.
        kind: One of :data:`KINDS`.
        recomputed: True if a module's forward allocated it during a backward pass (activation checkpointing).
        freed_at: Time when it was freed, or None if it is alive.
        saved_for_backward: True if it was alive when the backward pass of its forward pass started.
        storage_bytes: Size of the storage in bytes.
        start: Address of the block on a device.
    """

    bytes: int
    allocated_at: int
    phase: int
    module: str
    kind: str
    recomputed: bool
    freed_at: int | None = None
    saved_for_backward: bool = False
    storage_bytes: int = 0
    start: int = 0


class MemoryTracker(DispatchMode):
    """Context manager that tracks every storage returned by an operator or registered with :meth:`track`.

    Enter it after all other dispatch modes. Not thread-safe.

    Args:
        vocabularies: Floating-point tensors whose last dimension has one of these sizes count as logits.
        device: Device whose memory is tracked. On CUDA, sizes are those of its caching allocator, and tensors on the
            host are not tracked.
    """

    def __init__(self, *, vocabularies: Iterable[int] = (), device: str = "cpu") -> None:
        super().__init__()
        self._allocator = CachingAllocator() if device.startswith("cuda") else None
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], _StorageLifetime]] = {}
        self._all: list[_StorageLifetime] = []
        self._vocabularies = set(vocabularies)
        self._names: dict[int, str] = {}
        self._trainable: list[weakref.ref[Tensor]] = []
        self._current_bytes = self._peak = self._peak_at = self._scratch_at_peak = self._arenas = 0
        # Bytes of blocks that the allocator retains when they are freed: current, peak, and peak with all other blocks.
        self._retainable_bytes = self._peak_retainable_bytes = self._resident_peak = 0
        self._operator_index = 0
        self._phase = _FORWARD
        self._peak_phase, self._peak_module = _FORWARD, ""
        self._stack: list[str] = []
        self._backward_module, self._forward_start, self._optimizing = "", 0, False
        self._timeline: list[tuple[int, int]] = []
        self._pending: tuple[_StorageLifetime | None, int] | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def track(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count the storages of ``tensors`` as ``kind``, one of :data:`KINDS`.

        Raises:
            ValueError: if the kind is unknown.
        """
        if kind not in KINDS:
            raise ValueError(f"'{kind}' is not a kind of tensor: {', '.join(KINDS)}")
        for tensor in tensors:
            (self._lifetime_of(tensor) or self._add_storage(tensor)).kind = kind
            if kind == "trained":
                self._trainable.append(weakref.ref(tensor))

    def track_model(self, model: nn.Module) -> None:
        """Count the parameters and buffers of a model as trainable or as weights, and record its module names."""
        self.track((p for p in model.parameters() if not p.requires_grad), "weights")
        self.track(model.buffers(), "weights")
        self.track((p for p in model.parameters() if p.requires_grad), "trained")
        self._names |= {id(module): name for name, module in model.named_modules()}

    def __enter__(self) -> MemoryTracker:
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._enter_optimizer),
            register_optimizer_step_post_hook(self._leave_optimizer),
        ]
        trim_listeners.append(self._trim)
        super().__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)  # type: ignore[arg-type]
        trim_listeners.remove(self._trim)
        for hook in self._hooks:
            hook.remove()

    def _trim(self) -> None:
        self._peak_retainable_bytes = self._retainable_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # fast path: this is the most frequent operator
        phase = self._current_phase()
        if phase != self._phase:
            self._change_phase(phase)
        self._resolve_gradient_sum()
        is_tracked = self._allocator is None or _uses_device(kwargs) or any(map(self._lifetime_of, tensors_in(args)))
        for value in args if self._allocator is None else ():
            if type(value) is Tensor and self._lifetime_of(value) is None and not value.is_floating_point():
                # Integers that no operator returned: token ids, positions and masks converted from NumPy.
                self._add_storage(value).kind = "batch"
        result = func(*args, **kwargs)
        self._operator_index += 1
        for tensor in _tensors(result) if is_tracked else ():
            if self._lifetime_of(tensor) is None:
                self._add_storage(tensor)
        if func is torch.ops.aten.add.Tensor and phase == _BACKWARD and _called_by_engine(sys._getframe(1)):
            self._pending = (self._lifetime_of(args[0]), self._current_bytes)
        else:
            self._update_peak((scratch_bytes if self._allocator is None else device_scratch_bytes)(func, args))
        if self._allocator is None:
            self._arenas = max(self._arenas, arena_bytes(func, args))
        self._timeline.append((phase, self._current_bytes))
        return result

    def _lifetime_of(self, tensor: Tensor) -> _StorageLifetime | None:
        """Return the lifetime of the tensor's storage with its size updated, or None if the storage is new."""
        storage = tensor.untyped_storage()
        entry = self._alive.get(id(storage))
        if entry is None or entry[0]() is not storage:
            return None
        life, size = entry[1], storage.nbytes()
        if size != life.storage_bytes:
            self._free(life)
            self._allocate(life, size)
        return life

    def _allocate(self, life: _StorageLifetime, size: int) -> None:
        life.storage_bytes = life.bytes = size
        if self._allocator is not None and size:
            life.start, life.bytes = self._allocator.allocate(size)
        self._add_bytes(life.bytes)

    def _free(self, life: _StorageLifetime) -> None:
        self._add_bytes(-life.bytes)
        if self._allocator is not None and life.bytes:
            self._allocator.free(life.start, life.bytes)

    def _add_bytes(self, size: int) -> None:
        """Add the bytes of a new storage, or subtract those of a freed storage."""
        self._current_bytes += size
        if abs(size) < MAX_RETAINED_BYTES:
            self._retainable_bytes += size
            self._peak_retainable_bytes = max(self._peak_retainable_bytes, self._retainable_bytes)

    def _add_storage(self, tensor: Tensor) -> _StorageLifetime:
        storage = tensor.untyped_storage()
        key, has_classes = id(storage), tensor.dim() and tensor.shape[-1] in self._vocabularies
        kind = "logits" if has_classes and tensor.is_floating_point() else "workspace"
        recomputed = bool(self._stack) and self._phase == _BACKWARD
        life = _StorageLifetime(0, self._operator_index, self._phase, self._module(), kind, recomputed)

        def on_freed(reference: weakref.ref[torch.UntypedStorage]) -> None:
            life.freed_at = self._operator_index
            self._free(life)
            entry = self._alive.get(key)
            if entry is not None and entry[0] is reference:
                del self._alive[key]

        self._alive[key] = (weakref.ref(storage, on_freed), life)
        self._all.append(life)
        self._allocate(life, storage.nbytes())
        return life

    def _resolve_gradient_sum(self) -> None:
        """Update the peak for the engine's last sum of two gradients, if it needed memory.

        The engine adds in place if it has the only reference to the first gradient, but never under a dispatch mode. If
        the first gradient is freed by the next operator, the sum would have been in place and needs no memory.
        """
        if self._pending is not None:
            first, size = self._pending
            self._pending = None
            if first is None or first.freed_at is None:
                self._update_peak(size - self._current_bytes)

    def _update_peak(self, scratch: int) -> None:
        resident = self._current_bytes - self._retainable_bytes + self._peak_retainable_bytes + scratch
        self._resident_peak = max(self._resident_peak, resident)
        if self._current_bytes + scratch > self._peak:
            self._peak, self._peak_at = self._current_bytes + scratch, self._operator_index
            self._scratch_at_peak, self._peak_phase, self._peak_module = scratch, self._phase, self._module()

    def _module(self) -> str:
        """Return the name of the innermost running module."""
        if self._stack:
            return self._stack[-1]
        return self._backward_module if self._phase == _BACKWARD else ""

    def _current_phase(self) -> int:
        if self._optimizing:
            return _OPTIMIZER
        return _BACKWARD if in_backward() else _FORWARD

    def _change_phase(self, phase: int) -> None:
        if self._phase == _FORWARD and phase == _BACKWARD:
            for _, life in self._alive.values():
                if life.allocated_at > self._forward_start and life.phase == _FORWARD:
                    life.saved_for_backward = True
        if self._phase == _BACKWARD:
            self._mark_gradients(p for p in (ref() for ref in self._trainable) if p is not None)
            self._forward_start = self._operator_index
        self._phase = phase

    def _mark_gradients(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                (self._lifetime_of(parameter.grad) or self._add_storage(parameter.grad)).kind = "gradients"

    def _enter_optimizer(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._phase == _BACKWARD:
            self._change_phase(_FORWARD)
        self._optimizing = True
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.track(parameters, "trained")
        self._mark_gradients(parameters)

    def _leave_optimizer(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._optimizing = False
        for state in optimizer.state.values():
            self.track((value for value in state.values() if isinstance(value, Tensor)), "optimizer")

    def _enter_module(self, module: nn.Module, inputs: object) -> None:
        self._stack.append(self._names.get(id(module), type(module).__name__))

    def _leave_module(self, module: nn.Module, inputs: object, output: object) -> None:
        if not self._stack:
            return
        name = self._stack.pop()

        def enter(gradients: Sequence[Tensor]) -> None:
            self._backward_module = name

        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(enter)

    def footprint(self) -> Footprint:
        """Return the footprint of the run so far at its peak."""
        parts = dict.fromkeys(KINDS, 0)
        saved: dict[str, int] = {}
        for life in self._all:
            if life.allocated_at > self._peak_at or (life.freed_at is not None and life.freed_at < self._peak_at):
                continue
            kind = life.kind
            if kind == "workspace" and (life.saved_for_backward or life.recomputed):
                kind = "activations"
                saved[life.module] = saved.get(life.module, 0) + life.bytes
            parts[kind] += life.bytes
        parts["workspace"] += self._scratch_at_peak
        phase, by_module = PHASES[self._peak_phase], dict(sorted(saved.items(), key=lambda item: -item[1]))
        resident_peak = self._resident_peak if self._allocator is None else self._allocator.reserved_bytes
        others = self._current_bytes, self._arenas, resident_peak - self._peak
        return Footprint(self._peak, parts, phase, self._peak_module, by_module, downsample(self._timeline), *others)


def _tensors(result: object) -> Iterable[Tensor]:
    if isinstance(result, Tensor):
        return (result,)
    if isinstance(result, (tuple, list)) and all(isinstance(r, Tensor) for r in result):
        return result
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _uses_device(kwargs: dict[str, Any]) -> bool:
    """True if an operator creates or copies to a tensor on the simulated device."""
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"


def _called_by_engine(frame: FrameType | None) -> bool:
    """True if the autograd engine itself called the operator, rather than Python code called by the engine.

    Frames of dispatch modes in between are skipped.
    """
    modes = "_python_dispatch.py", "_ops.py"
    while frame and (frame.f_code.co_name == "__torch_dispatch__" or frame.f_code.co_filename.endswith(modes)):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == ENGINE


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
        self.fake, self.answers = fake, OperatorCache(fake)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        if getattr(_THREAD_STATE, "device", None) is None:
            return self._dispatch(func, args, kwargs)
        device, _THREAD_STATE.device = _THREAD_STATE.device, None
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
        if _uses_device(kwargs):
            kwargs = {**kwargs, "device": _CPU}
            if func is TO_COPY and isinstance(args[0], FakeTensor) and kwargs.get("dtype") in (None, args[0].dtype):
                func, kwargs = _aten.alias.default, {}
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
        """Run an operator without tensor arguments. It creates a tensor, or computes nothing."""
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
            (:func:`deltaw.hub.loading.skeleton`).
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
