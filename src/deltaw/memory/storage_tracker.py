"""Tracking of storages: allocated bytes over time by kind, and their peak.

A dispatch mode sees the tensors that operators return, and a weak reference reports when a storage is freed. This
works for real and fake tensors. Temporary buffers inside operators are added by :mod:`deltaw.memory.scratch`.

Tensors are classified after the run by :meth:`MemoryTracker.footprint`, since it is not known earlier which tensors
become gradients or are saved for a backward pass.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from deltaw.kernels.torch_private import ENGINE, DispatchMode, in_backward, tree_leaves
from deltaw.machine.memory import MAX_RETAINED_BYTES, trim_listeners
from deltaw.memory.caching import CachingAllocator
from deltaw.memory.operator_cache import tensors_in
from deltaw.memory.plan import KINDS, PHASES, Footprint, downsample
from deltaw.memory.scratch import arena_bytes, device_scratch_bytes, scratch_bytes

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
        self._peak_phase = _FORWARD
        self._peak_module = ""
        self._stack: list[str] = []
        self._backward_module = ""
        self._forward_start = 0
        self._optimizing = False
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
        is_tracked = self._allocator is None or uses_device(kwargs) or any(map(self._lifetime_of, tensors_in(args)))
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
        life = entry[1]
        size = storage.nbytes()
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
        key = id(storage)
        has_classes = tensor.dim() and tensor.shape[-1] in self._vocabularies
        kind = "logits" if has_classes and tensor.is_floating_point() else "workspace"
        recomputed = bool(self._stack) and self._phase == _BACKWARD
        life = _StorageLifetime(
            bytes=0,
            allocated_at=self._operator_index,
            phase=self._phase,
            module=self._module(),
            kind=kind,
            recomputed=recomputed,
        )

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
            self._peak = self._current_bytes + scratch
            self._peak_at = self._operator_index
            self._scratch_at_peak = scratch
            self._peak_phase = self._phase
            self._peak_module = self._module()

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
        resident_peak = self._resident_peak if self._allocator is None else self._allocator.reserved_bytes
        return Footprint(
            peak_bytes=self._peak,
            parts=parts,
            phase=PHASES[self._peak_phase],
            module=self._peak_module,
            activations_by_module=dict(sorted(saved.items(), key=lambda item: -item[1])),
            timeline=downsample(self._timeline),
            steady_bytes=self._current_bytes,
            arena_bytes=self._arenas,
            retained_bytes=resident_peak - self._peak,
        )


def _tensors(result: object) -> Iterable[Tensor]:
    if isinstance(result, Tensor):
        return (result,)
    if isinstance(result, (tuple, list)) and all(isinstance(r, Tensor) for r in result):
        return result
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def uses_device(kwargs: dict[str, Any]) -> bool:
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
