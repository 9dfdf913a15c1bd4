"""Dry run of a program on fake tensors: real code, no arithmetic, no memory.

Floating tensors are fake: they have a shape, a type and a storage of the right size with nothing behind it
(torch's ``FakeTensorMode``). Whole numbers and booleans (token ids, positions, masks, layouts) are computed
for real, since programs branch on them. Where a program asks a fake tensor for a number, it gets 1.

Knows torch alone; not what is run.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from deltaw.kernels.torch_private import (
    ENGINE,
    GROUPED_PRODUCT,
    LOCAL_SCALAR,
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
from deltaw.machine.memory import LARGEST_KEPT, trim_listeners
from deltaw.memory.plan import KINDS, PHASES, Footprint, coarse
from deltaw.memory.scratch import arena_bytes, scratch_bytes

# What an operator returns for inputs of given shapes, remembered: models repeat themselves layer by layer.
#
# The first time, torch's own ``FakeTensorMode`` works the answer out; it is read off which outputs are new,
# which are views of an input and which are an input changed in place. Whenever the same operator comes with
# inputs of the same shapes, strides and types, such tensors are made at once, in a fraction of the time.


_CPU = torch.device("cpu")
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
# Over lists of tensors, which an optimizer hands over by the hundreds.
_LISTS = ("aten::_foreach_", "aten::_fused_")
# Change what a tensor is, not only what it holds.
_RESHAPING = ("resize_", "set_", "transpose_", "unsqueeze_", "squeeze_", "t_", "as_strided_", "swap")


class _Made(NamedTuple):
    """A new tensor, or a view ``of`` an input, by its number."""

    of: int | None
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


_Output = _Made | int | None  # a number is that of an input, which comes back


class Answers:
    """Operators on fake tensors, with a memory."""

    def __init__(self, fake: FakeTensorMode) -> None:
        self._fake = fake
        self._attributes: dict[str, Any] | None = None
        self._known: dict[Hashable, tuple[type, list[_Output]] | None] = {}

    def __call__(self, func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The answer of ``func``; at least one argument is a fake tensor."""
        name = _name(func)
        if name.startswith(_LISTS):
            if name.endswith("_"):
                return None  # it changes values alone, and there are none
            if name == "aten::_foreach_norm":
                return self._norms(args, kwargs)
        parts: list[Hashable] = [func]
        tensors: list[Tensor] = []
        if not _describe(args, parts, tensors) or not _describe((*kwargs, *kwargs.values()), parts, tensors):
            return func(*args, **kwargs)
        key = tuple(parts)
        if key not in self._known:
            self._known[key] = self._asked(func, args, kwargs, tensors)
        if (known := self._known[key]) is None:
            return func(*args, **kwargs)
        kind, outputs = known
        if kind is Tensor:
            return self._made(outputs[0], tensors)
        made = [self._made(output, tensors) for output in outputs]
        return made if kind is list else tuple(made)

    def _norms(self, args: tuple, kwargs: dict) -> list[Tensor]:
        """A list's norms, one by one: tensors of one shape have answers of one shape."""
        dtype = kwargs.get("dtype")
        order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
        norm = torch.ops.aten.linalg_vector_norm.default
        return [self(norm, (tensor, order), {"dtype": dtype} if dtype else {}) for tensor in args[0]]

    def _asked(
        self, func: Callable[..., Any], args: tuple, kwargs: dict, tensors: list[Tensor]
    ) -> tuple[type, list[_Output]] | None:
        """Work an answer out on copies of the fake tensors: torch leaves weak references on what it
        inspects, and a parameter that has one can no longer be exchanged (``Module.to``)."""
        doubles = {id(t): self._double(t) if isinstance(t, FakeTensor) else t for t in tensors}
        args, kwargs = tree_map_only(Tensor, lambda t: doubles[id(t)], (args, kwargs))
        return _outputs(func, func(*args, **kwargs), [doubles[id(t)] for t in tensors])

    def _double(self, tensor: Tensor) -> Tensor:
        reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        count = tensor.storage_offset() + reach + 1
        with without_dispatch():
            base = torch.empty(count, dtype=tensor.dtype, device="meta")
            meta = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            return self._as_fake(meta.detach())

    def _made(self, output: _Output, tensors: list[Tensor]) -> Tensor | None:
        if not isinstance(output, _Made):
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
        """``meta`` as a fake tensor: what its own constructor does, without its checks of every call."""
        if self._attributes is None:
            self._attributes = dict(vars(FakeTensor(self._fake, meta, _CPU)))
        return as_fake(self._fake, self._attributes, meta, _CPU)


def _name(func: Any) -> str:
    """An operator's name without that of its overload, as in ``aten::add``."""
    return str(func.name()).partition(".")[0]


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operator's arguments, also those in lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def _describe(values: Any, parts: list[Hashable], tensors: list[Tensor]) -> bool:
    """Append what an answer depends on; False where it depends on more than shapes."""
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
            # 1, 1.0 and True are equal, and lead to different types.
            parts.append((type(value), value))
        elif isinstance(value, (list, tuple)):
            parts.append(len(value))
            if not _describe(value, parts, tensors):
                return False
        else:
            return False
    return True


def _outputs(func: Callable[..., Any], result: Any, tensors: list[Tensor]) -> tuple[type, list[_Output]] | None:
    """How to make ``result`` again from ``tensors``; None where that is not possible."""
    single = isinstance(result, Tensor) or result is None
    if _name(func).rpartition("::")[2] in _RESHAPING or not (single or isinstance(result, (list, tuple))):
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
    for number, tensor in enumerate(tensors):
        if tensor is value:
            return number
    storage = value.untyped_storage()
    of = next((number for number, tensor in enumerate(tensors) if tensor.untyped_storage() is storage), None)
    return _Made(of, value.shape, value.stride(), int(value.storage_offset()), value.dtype)


# Every storage of tensors from birth to end: how many bytes are alive, of what kind, and when the peak is.
#
# A dispatch mode sees what each operator returns; a weak reference to the storage tells of its end. It is the
# same on real tensors and on fake tensors. What operators allocate inside and give back before they
# return is added by :mod:`deltaw.memory.scratch`.
#
# Nothing is decided while the program runs: all births and deaths are kept, and :meth:`MemoryTracker.footprint`
# reads them afterwards, when it is known which tensors turned out to be gradients or were kept for a backward.
# It knows modules, optimizers and storages; not training, methods or data.


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


class MemoryTracker(DispatchMode):
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
        # Blocks that the allocator keeps when they are freed: now, at most so far, and with the other blocks.
        self._small = self._most_small = self._resident_peak = 0
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
        self.track((p for p in model.parameters() if not p.requires_grad), "weights")
        self.track(model.buffers(), "weights")
        self.track((p for p in model.parameters() if p.requires_grad), "trained")
        self._names |= {id(module): name for name, module in model.named_modules()}

    def __enter__(self) -> MemoryTracker:
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._begin_step),
            register_optimizer_step_post_hook(self._end_step),
        ]
        trim_listeners.append(self._forget_freed)
        super().__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)  # type: ignore[arg-type]
        trim_listeners.remove(self._forget_freed)
        for hook in self._hooks:
            hook.remove()

    def _forget_freed(self) -> None:
        self._most_small = self._small

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
            self._note_peak(scratch_bytes(func, args))
        self._arenas = max(self._arenas, arena_bytes(func, args))
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
            self._count(-life.bytes)
            self._count(size)
            life.bytes = size
        return life

    def _count(self, size: int) -> None:
        """Add the bytes of a new storage, or subtract those of a freed one."""
        self._now += size
        if abs(size) < LARGEST_KEPT:
            self._small += size
            self._most_small = max(self._most_small, self._small)

    def _born(self, tensor: Tensor) -> _Life:
        storage = tensor.untyped_storage()
        key = id(storage)
        kind = "workspace"
        if self._vocabularies and tensor.dim() and tensor.shape[-1] in self._vocabularies:
            kind = "logits" if tensor.is_floating_point() else kind
        recomputed = bool(self._stack) and self._phase == _BACKWARD
        life = _Life(storage.nbytes(), self._at, self._phase, self._module(), kind, recomputed)

        def end(gone: weakref.ref[torch.UntypedStorage]) -> None:
            life.died = self._at
            self._count(-life.bytes)
            known = self._lives.get(key)
            if known is not None and known[0] is gone:
                del self._lives[key]

        self._lives[key] = (weakref.ref(storage, end), life)
        self._all.append(life)
        self._count(life.bytes)
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
        self._resident_peak = max(self._resident_peak, self._now - self._small + self._most_small + scratch)
        if self._now + scratch > self._peak:
            self._peak, self._peak_at, self._scratch_at_peak = self._now + scratch, self._at, scratch
            self._peak_phase, self._peak_module = self._phase, self._module()

    def _module(self) -> str:
        """The innermost module at work."""
        if self._stack:
            return self._stack[-1]
        return self._backward_module if self._phase == _BACKWARD else ""

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

        def enter(gradients: Sequence[Tensor]) -> None:
            self._backward_module = name

        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(enter)

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
            held_bytes=self._resident_peak - self._peak,
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


_aten = torch.ops.aten
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_GROUPED: Any = getattr(GROUPED_PRODUCT, "default", None)
# Made from another tensor's shape or size alone: of whole numbers they can be real though that tensor is not.
_MADE_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like")
_MADE_NEW = ("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided")
_LIKE = {getattr(_aten, name).default for name in (*_MADE_LIKE, *_MADE_NEW)}
# Operators that answer with places along a dimension, with the argument that names it and its default.
_PLACES: dict[Any, tuple[int, int | None]] = {
    _aten.topk.default: (2, -1),
    _aten.sort.default: (1, -1),
    _aten.argsort.default: (1, -1),
    _aten.argmax.default: (1, None),
    _aten.argmin.default: (1, None),
    _aten.max.dim: (1, -1),
    _aten.min.dim: (1, -1),
    _aten.multinomial.default: (-1, -1),
}


# Fill a tensor and change nothing else about it.
_FILLS = {
    *(getattr(_aten, name).default for name in ("normal_", "uniform_", "exponential_", "zero_")),
    _aten.bernoulli_.float,
    _aten.bernoulli_.Tensor,
    _aten.fill_.Scalar,
}


# Whole numbers that are no places: masks, and weights and activations in int8.
_NO_PLACES = (torch.bool, torch.int8, torch.uint8)

# Answers to questions about values that do not exist: nothing unusual is among them.
_ANSWERED = {
    **{getattr(_aten.all, name): True for name in ("default", "dim", "dims")},
    **{getattr(_aten.any, name): False for name in ("default", "dim", "dims")},
}


# Of each thread, since modes are a thread's own.
_OPEN = threading.local()


class _FakeTensors(DispatchMode):
    """Sends each operator to real or to fake tensors. Is entered after the FakeTensorMode, above it."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.answers = Answers(fake)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        tensors = tensors_in((*args, *kwargs.values()))
        fake = any(isinstance(t, FakeTensor) for t in tensors)
        if func is LOCAL_SCALAR and fake:
            return _number(args[0])
        if func is _aten.equal.default and fake:
            return args[0].shape == args[1].shape
        if func in _FILLS and isinstance(args[0], FakeTensor):
            args[0].constant = None
            return args[0]
        if fake:
            if func in _LIKE and _is_whole(kwargs.get("dtype")):
                return self._real(func, (_stand_in(args[0]), *args[1:]), kwargs)
            return self._faked(func, args, kwargs)
        if not tensors:
            return self._made(func, args, kwargs)
        if all(_is_whole(t.dtype) for t in tensors):
            return self._converted(self._real(func, args, kwargs))
        return self._faked(func, args, kwargs)

    @staticmethod
    def _real(func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        with without_dispatch():
            return func(*args, **kwargs)

    def _made(self, func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """An operator without tensors: it makes a tensor, or is no arithmetic at all."""
        if kwargs.get("dtype") is not None and _is_whole(kwargs["dtype"]):
            return self._real(func, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, FakeTensor) and _is_whole(result.dtype):
            return self._real(func, args, kwargs)  # arange(8), full(…, True): their type follows the values
        return result

    def _faked(self, func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if isinstance(kwargs.get("generator"), torch.Generator):
            kwargs = {**kwargs, "generator": None}  # it belongs to the processor, and nothing is drawn
        if func is _aten.nonzero.default or func is _aten.masked_select.default:
            return self._chosen(func, args)
        if func in _INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1]):
            args = (args[0], self._places_of_masks(args[1]), *args[2:])
        if func is _GROUPED and args[0].dtype != torch.bfloat16:
            return self._grouped(args, kwargs)
        result = self.answers(func, args, kwargs)
        if func in _ANSWERED:
            return self._real(_aten.full.default, (list(result.shape), _ANSWERED[func]), {"dtype": torch.bool})
        if func in _PLACES:
            return tree_map_only(FakeTensor, lambda t: _places(func, args, kwargs, t), result)
        if isinstance(result, FakeTensor) and result.dtype not in _NO_PLACES and _is_whole(result.dtype):
            return self._real(_aten.zeros.default, (list(result.shape),), {"dtype": result.dtype})
        return result

    def _chosen(self, func: Callable[..., Any], args: tuple) -> Tensor:
        """What a mask selects; a fake mask selects everything."""
        mask = args[-1]
        if isinstance(mask, FakeTensor):
            mask = self._real(_aten.ones.default, (list(mask.shape),), {"dtype": torch.bool})
        if func is _aten.nonzero.default:
            return self._real(func, (mask,), {})
        count = self._real(_aten.sum.default, (mask.expand(args[0].shape),), {}).item()
        return torch.empty(count, dtype=args[0].dtype)

    def _places_of_masks(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Each mask among the indices as the places that it picks: one index for each of its dimensions."""
        places: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                places += self._chosen(_aten.nonzero.default, (index,)).unbind(1)
            else:
                places.append(index)
        return places

    def _grouped(self, args: tuple, kwargs: dict) -> Tensor:
        """Experts' product: torch knows its shapes for bf16 alone, though the processor multiplies others."""
        half = [t.to(torch.bfloat16) for t in args[:2]]
        result = self.answers(_GROUPED, (*half, *args[2:]), kwargs)
        return torch.empty_strided(result.shape, result.stride(), dtype=args[0].dtype)

    def _converted(self, result: Any) -> Any:
        """Floating tensors that came out of whole numbers, as fake tensors."""

        def convert(tensor: Tensor) -> Tensor:
            if isinstance(tensor, FakeTensor) or _is_whole(tensor.dtype):
                return tensor
            with self.fake:
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

        return tree_map_only(Tensor, convert, result)


def _is_whole(dtype: torch.dtype | None) -> bool:
    return dtype is not None and not dtype.is_floating_point and not dtype.is_complex


def _number(tensor: FakeTensor) -> float | int | bool:
    if tensor.constant is not None:
        return tensor.constant.item()
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1


def _stand_in(tensor: Tensor) -> Tensor:
    """A real tensor of the same shape that takes one element."""
    with without_dispatch():
        return torch.empty((), dtype=torch.bool).expand(tensor.shape)


def _places(func: object, args: tuple, kwargs: dict, result: FakeTensor) -> Tensor:
    """Places along a dimension, spread evenly: experts that a router picks by them get equal shares."""
    if not _is_whole(result.dtype):
        return result
    at, default = _PLACES[func]
    dim = args[at] if 0 <= at < len(args) else kwargs.get("dim", default)
    size = args[0].numel() if dim is None else args[0].shape[dim]
    with without_dispatch():
        return (torch.arange(result.numel()) % max(1, size)).to(result.dtype).reshape(result.shape)


@functools.cache
def _modes() -> tuple[FakeTensorMode, _FakeTensors]:
    """One pair for the whole process: tensors of two fake modes cannot meet in one operator."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    return fake, _FakeTensors(fake)


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """While open, floating tensors that are made are fake; models can be built and runs can be run.

    A real floating tensor from before may take part and is not changed. May be opened again, also inside
    itself.

    Raises:
        RuntimeError: this version of torch has none.
    """
    require_dry_runs()
    if getattr(_OPEN, "is_open", False):
        yield
        return
    fake, mode = _modes()
    _OPEN.is_open = True
    try:
        with fake, mode:
            yield
    finally:
        _OPEN.is_open = False


def simulate(
    run: Callable[[], object],
    *,
    known: Mapping[str, Iterable[Tensor]] | None = None,
    models: Iterable[torch.nn.Module] = (),
    vocabularies: Iterable[int] = (),
) -> Footprint:
    """Run ``run`` on fake tensors and return what it would take.

    Args:
        run: is called once, under :func:`fake_tensors`. What it needs of models was made there as well
            (:func:`deltaw.hub.loading.skeleton`).
        known: tensors from before ``run`` by kind (:data:`deltaw.memory.plan.KINDS`); a later kind wins.
        models: models from before ``run``: their parameters and buffers count as weights or trained, and
            modules are called by their names in them.
        vocabularies: floating tensors whose last size is one of these count as logits.
    """
    with fake_tensors(), MemoryTracker(vocabularies=vocabularies) as tracker:
        for model in models:
            tracker.track_model(model)
        for kind, tensors in (known or {}).items():
            tracker.track(tensors, kind)
        run()
    return tracker.footprint()
