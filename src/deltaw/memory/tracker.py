"""Every storage of tensors from birth to end: how many bytes are alive, of what kind, and when the peak is.

A dispatch mode sees what each operator returns; a weak reference to the storage tells of its end. It is the
same on real tensors and on fake tensors. What operators allocate inside and give back before they
return is added by :mod:`deltaw.memory.scratch`.

Nothing is decided while the program runs: all births and deaths are kept, and :meth:`MemoryTracker.footprint`
reads them afterwards, when it is known which tensors turned out to be gradients or were kept for a backward.
It knows modules, optimizers and storages; not training, methods or data.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from deltaw.kernels.torch_private import ENGINE, TorchDispatchMode, in_backward, tree_leaves
from deltaw.memory.footprint import KINDS, PHASES, Footprint, coarse
from deltaw.memory.kernel_scratch import arena_bytes
from deltaw.memory.scratch import scratch_bytes

_FORWARD, _BACKWARD, _OPTIMIZER = range(3)


@dataclass(slots=True, eq=False)
class _Life:
    """One storage: its bytes, when it was made and gone (numbers of operators), and where.

    Attributes:
        recomputed: made by a module's forward during a backward (activation checkpointing).
        kept: alive when a backward began after the forward that made it.
    """

    bytes: int
    born: int
    phase: int
    module: str
    kind: str
    recomputed: bool
    died: int | None = None
    kept: bool = False


class MemoryTracker(TorchDispatchMode):
    """While open, follow every storage that an operator returns or that was made known by :meth:`track`.

    Open it above any other dispatch mode. Not for use from several threads.
    """

    def __init__(self, *, vocabularies: Iterable[int] = ()) -> None:
        """``vocabularies``: floating tensors whose last size is one of these count as logits."""
        super().__init__()
        self._lives: dict[int, tuple[weakref.ref[torch.UntypedStorage], _Life]] = {}
        self._all: list[_Life] = []
        self._vocabularies = set(vocabularies)
        self._names: dict[int, str] = {}
        self._trained: list[weakref.ref[Tensor]] = []
        self._now = self._peak = self._peak_at = self._scratch_at_peak = self._arenas = 0
        self._at = 0
        self._phase = _FORWARD
        self._peak_phase, self._peak_module = _FORWARD, ""
        self._stack: list[str] = []
        self._backward_module = ""
        self._forward_from = 0
        self._optimizing = False
        self._line: list[tuple[int, int]] = []
        self._pending: tuple[_Life | None, int] | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    # --- what is known beforehand -------------------------------------------------------------------------

    def track(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count ``tensors``, and let their storages be of this ``kind``, one of :data:`KINDS`."""
        if kind not in KINDS:
            raise ValueError(f"'{kind}' is no kind of tensor: {', '.join(KINDS)}")
        for tensor in tensors:
            life = self._life(tensor) or self._born(tensor)
            life.kind = kind
            if kind == "trained":
                self._trained.append(weakref.ref(tensor))

    def track_model(self, model: nn.Module) -> None:
        """Count the parameters and buffers of ``model`` by whether they are trained, and learn its names."""
        parameters = list(model.parameters())
        self.track((p for p in parameters if not p.requires_grad), "weights")
        self.track(model.buffers(), "weights")
        self.track((p for p in parameters if p.requires_grad), "trained")
        for name, module in model.named_modules():
            self._names[id(module)] = name

    # --- while the program runs ---------------------------------------------------------------------------

    def __enter__(self) -> MemoryTracker:
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._begin_step),
            register_optimizer_step_post_hook(self._end_step),
        ]
        super().__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)  # type: ignore[arg-type]
        for hook in self._hooks:
            hook.remove()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and guarding every call costs time

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # a fake tensor's device is asked for more often than anything else
        phase = self._current_phase()
        if phase != self._phase:
            self._change_phase(phase)
        self._resolve()
        for value in args:
            if type(value) is Tensor and self._life(value) is None and not value.is_floating_point():
                # Whole numbers that no operator made: token ids, places and masks that came from NumPy.
                self._born(value).kind = "batch"
        result = func(*args, **kwargs)
        self._at += 1
        for tensor in _tensors(result):
            if self._life(tensor) is None:
                self._born(tensor)
        if func is torch.ops.aten.add.Tensor and phase == _BACKWARD and _called_by_engine(sys._getframe(1)):
            self._pending = (self._life(args[0]), self._now)
        else:
            self._note_peak(scratch_bytes(func, args, kwargs))
        self._arenas = max(self._arenas, arena_bytes(func, args, kwargs))
        self._line.append((phase, self._now))
        return result

    def _life(self, tensor: Tensor) -> _Life | None:
        """What is known of the storage of ``tensor``, brought up to date; None for a new one."""
        storage = tensor.untyped_storage()
        known = self._lives.get(id(storage))
        if known is None or known[0]() is not storage:
            return None
        life = known[1]
        size = storage.nbytes()
        if size != life.bytes:
            self._now += size - life.bytes
            life.bytes = size
        return life

    def _born(self, tensor: Tensor) -> _Life:
        storage = tensor.untyped_storage()
        key = id(storage)
        kind = "workspace"
        if self._vocabularies and tensor.dim() and tensor.shape[-1] in self._vocabularies:
            kind = "logits" if tensor.is_floating_point() else kind
        recomputed = bool(self._stack) and self._phase == _BACKWARD
        if self._phase == _BACKWARD and not self._stack:
            module = self._backward_module
        else:
            module = self._stack[-1] if self._stack else ""
        life = _Life(storage.nbytes(), self._at, self._phase, module, kind, recomputed)

        def end(gone: weakref.ref[torch.UntypedStorage]) -> None:
            life.died = self._at
            self._now -= life.bytes
            known = self._lives.get(key)
            if known is not None and known[0] is gone:
                del self._lives[key]

        self._lives[key] = (weakref.ref(storage, end), life)
        self._all.append(life)
        self._now += life.bytes
        return life

    def _resolve(self) -> None:
        """Whether the engine's last sum of two gradients of one tensor took memory of its own.

        The engine adds in place where nobody else holds the first, but never while a dispatch mode looks on.
        So if the first is gone by the next operator, it would not have been beside the sum.
        """
        if self._pending is not None:
            first, size = self._pending
            self._pending = None
            if first is None or first.died is None:
                self._note_peak(size - self._now)

    def _note_peak(self, scratch: int) -> None:
        if self._now + scratch > self._peak:
            self._peak, self._peak_at, self._scratch_at_peak = self._now + scratch, self._at, scratch
            self._peak_phase = self._phase
            in_backward = self._phase == _BACKWARD and not self._stack
            self._peak_module = self._backward_module if in_backward else "".join(self._stack[-1:])

    # --- phases and modules -------------------------------------------------------------------------------

    def _current_phase(self) -> int:
        if self._optimizing:
            return _OPTIMIZER
        return _BACKWARD if in_backward() else _FORWARD

    def _change_phase(self, phase: int) -> None:
        if self._phase == _FORWARD and phase == _BACKWARD:
            for _, life in self._lives.values():
                if life.born > self._forward_from and life.phase == _FORWARD:
                    life.kept = True
        if self._phase == _BACKWARD:
            self._mark_gradients(p for p in (ref() for ref in self._trained) if p is not None)
            self._forward_from = self._at
        self._phase = phase

    def _mark_gradients(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                (self._life(parameter.grad) or self._born(parameter.grad)).kind = "gradients"

    def _begin_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._phase == _BACKWARD:
            self._change_phase(_FORWARD)
        self._optimizing = True
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.track(parameters, "trained")
        self._mark_gradients(parameters)

    def _end_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._optimizing = False
        for state in optimizer.state.values():
            self.track((value for value in state.values() if isinstance(value, Tensor)), "optimizer")

    def _enter_module(self, module: nn.Module, inputs: object) -> None:
        self._stack.append(self._names.get(id(module), type(module).__name__))

    def _leave_module(self, module: nn.Module, inputs: object, output: object) -> None:
        if not self._stack:
            return
        name = self._stack.pop()
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(self._backward_enters(name))

    def _backward_enters(self, name: str) -> Callable[[Sequence[Tensor]], None]:
        def enter(gradients: Sequence[Tensor]) -> None:
            self._backward_module = name

        return enter

    # --- afterwards ---------------------------------------------------------------------------------------

    @property
    def current_bytes(self) -> int:
        """What lives now."""
        return self._now

    @property
    def peak_bytes(self) -> int:
        """The most that lived at one time so far."""
        return self._peak

    def footprint(self) -> Footprint:
        """What was seen so far, at the moment of the peak."""
        parts = dict.fromkeys(KINDS, 0)
        saved: dict[str, int] = {}
        for life in self._all:
            if life.born > self._peak_at or (life.died is not None and life.died < self._peak_at):
                continue
            kind = life.kind
            if kind == "workspace" and (life.kept or life.recomputed):
                kind = "activations"
                saved[life.module] = saved.get(life.module, 0) + life.bytes
            parts[kind] += life.bytes
        parts["workspace"] += self._scratch_at_peak
        return Footprint(
            peak_bytes=self._peak,
            parts=parts,
            phase=PHASES[self._peak_phase],
            module=self._peak_module,
            activations_by_module=dict(sorted(saved.items(), key=lambda item: -item[1])),
            timeline=coarse(self._line),
            steady_bytes=self._now,
            arena_bytes=self._arenas,
        )


def _tensors(result: object) -> Iterable[Tensor]:
    if isinstance(result, Tensor):
        return (result,)
    if isinstance(result, (tuple, list)) and all(isinstance(r, Tensor) for r in result):
        return result
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _called_by_engine(frame: FrameType | None) -> bool:
    """Whether an operator comes out of the autograd engine itself and not out of Python code it called.

    Between the two may stand other dispatch modes that look on.
    """
    while frame is not None and (
        frame.f_code.co_name == "__torch_dispatch__"
        or frame.f_code.co_filename.endswith(("_python_dispatch.py", "_ops.py"))
    ):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == ENGINE
