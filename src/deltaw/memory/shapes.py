"""What an operator returns for inputs of given shapes, remembered: models repeat themselves layer by layer.

The first time, torch's own ``FakeTensorMode`` works the answer out; it is read off which outputs are new,
which are views of an input and which are an input changed in place. Whenever the same operator comes with
inputs of the same shapes, strides and types, such tensors are made at once, in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.kernels.torch_private import FakeTensor, FakeTensorMode, as_fake, tree_map_only, without_dispatch

_CPU = torch.device("cpu")
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
# Over lists of tensors, which an optimizer hands over by the hundreds.
_LISTS = ("aten::_foreach_", "aten::_fused_")
# Change what a tensor is, not only what it holds.
_RESHAPING = ("resize_", "set_", "transpose_", "unsqueeze_", "squeeze_", "t_", "as_strided_", "swap")


@dataclass(frozen=True, slots=True)
class _Fresh:
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _View:
    of: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Argument:
    number: int


_Output = _Fresh | _View | _Argument | None


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
        if not _describe(args, parts, tensors) or not _describe_named(kwargs, parts, tensors):
            return func(*args, **kwargs)
        key = tuple(parts)
        if key not in self._known:
            self._known[key] = self._asked(func, args, kwargs, tensors)
        known = self._known[key]
        if known is None:
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
        if output is None:
            return None
        if type(output) is _Argument:
            return tensors[output.number]
        with without_dispatch():
            if type(output) is _Fresh:
                meta = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta")
            else:
                assert type(output) is _View
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


def _describe_named(values: dict[str, Any], parts: list[Hashable], tensors: list[Tensor]) -> bool:
    parts.extend(values)
    return _describe(values.values(), parts, tensors)


def _outputs(
    func: Callable[..., Any], result: Any, tensors: list[Tensor]
) -> tuple[type, list[_Output]] | None:
    """How to make ``result`` again from ``tensors``; None where that is not possible."""
    if _name(func).rpartition("::")[2] in _RESHAPING:
        return None
    single = isinstance(result, Tensor) or result is None
    if not single and not isinstance(result, (list, tuple)):
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
            return _Argument(number)
    storage = value.untyped_storage()
    for number, tensor in enumerate(tensors):
        if tensor.untyped_storage() is storage:
            return _View(number, value.shape, value.stride(), int(value.storage_offset()), value.dtype)
    return _Fresh(value.shape, value.stride(), value.dtype)
