"""Dry run of a program on fake tensors: real code, no arithmetic, no memory.

Floating tensors are fake: they have a shape, a type and a storage of the right size with nothing behind it
(torch's ``FakeTensorMode``). Whole numbers and booleans (token ids, positions, masks, layouts) are computed
for real, since programs branch on them. Where a program asks a fake tensor for a number, it gets 1.

Knows torch alone; not what is run.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deltaw.kernels.torch_private import (
    GROUPED_PRODUCT,
    LOCAL_SCALAR,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    require_dry_runs,
    tree_map_only,
    without_dispatch,
)
from deltaw.memory.footprint import Footprint
from deltaw.memory.shapes import Answers, tensors_in
from deltaw.memory.tracker import MemoryTracker

_aten = torch.ops.aten
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_GROUPED: Any = getattr(GROUPED_PRODUCT, "default", None)
# Made from another tensor's shape or size alone: of whole numbers they can be real though that tensor is not.
_LIKE = {
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.full_like.default,
    _aten.empty_like.default,
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
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
    getattr(getattr(_aten, name), overload)
    for name, overload in (
        ("normal_", "default"),
        ("uniform_", "default"),
        ("bernoulli_", "float"),
        ("bernoulli_", "Tensor"),
        ("exponential_", "default"),
        ("zero_", "default"),
        ("fill_", "Scalar"),
    )
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


class _FakeTensors(TorchDispatchMode):
    """Sends each operator to real or to fake tensors. Is entered after the FakeTensorMode, above it."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.answers = Answers(fake)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and guarding every call costs time

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
            return self._real(
                _aten.full.default, (list(result.shape), _ANSWERED[func]), {"dtype": torch.bool}
            )
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
            (:func:`deltaw.hub.skeleton.skeleton`).
        known: tensors from before ``run`` by kind (:data:`deltaw.memory.footprint.KINDS`); a later kind wins.
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
