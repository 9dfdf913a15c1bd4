"""Cache of the results of operators by input shapes, since the layers of a model repeat the same operators.

At the first call, torch's ``FakeTensorMode`` computes the result, and each output is recorded as a new tensor, a view
of an input, or an input modified in place. Later calls with the same shapes, strides and dtypes construct the outputs
from this record in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.torch_private import FakeTensor, FakeTensorMode, to_fake_tensor, tree_map_only, without_dispatch

CPU = torch.device("cpu")
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
            self._attributes = dict(vars(FakeTensor(self._fake, meta, CPU)))
        return to_fake_tensor(self._fake, self._attributes, meta, CPU)


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
