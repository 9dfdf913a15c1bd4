"""All uses of private names of torch. Each name has a fallback.

A fallback is slower, or raises an error that names the missing feature. Without fake tensors, for example, there are no
dry runs (:data:`MISSING_NAME`), and training continues without a memory plan. Names that are used in each step are
looked up when this module is imported, so calls have no overhead, and torch.compile can trace them.

No other file uses names of torch with a leading underscore. ``tests/test_private_apis.py`` checks this.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deltaw.errors import UserError, look_up

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def missing_name_error(feature: str, name: str) -> UserError:
    hint = "install another version of torch, or of deltaw"
    return UserError(f"{feature} needs {name}, which torch {torch.__version__} does not have", hint=hint)


def _observer_checks() -> tuple[Callable[[], Any], Callable[[], Any]]:
    count = look_up(torch, "_C._len_torch_dispatch_stack")
    profiler = torch.autograd.profiler
    if count is None:
        return lambda: True, lambda: True
    if look_up(profiler, "_is_profiler_enabled") is None:
        return count, lambda: True

    def has_observers() -> Any:
        return count() or profiler._is_profiler_enabled

    return count, has_observers


in_dispatch_mode, is_observed = _observer_checks()
"""True if a dispatch mode observes this thread's operators; and true if a dispatch mode or a profiler does. Without the
private names both always return True, and kernels are called through torch's slower dispatcher."""

without_dispatch = look_up(torch, "_C._DisableTorchDispatch") or contextlib.nullcontext
"""Context manager that disables dispatch modes, so that new tensors have values. Only dry runs use such modes, and they
also require this name."""

functorch_is_active: Callable[[], bool] = look_up(torch, "_C._are_functorch_transforms_active") or (lambda: True)
"""True if a torch.func transform is active. Without the private name always True, which selects the reference
implementation."""

_REQUIRED = {
    "FakeTensor": look_up(torch, "_subclasses.fake_tensor.FakeTensor"),
    "FakeTensorMode": look_up(torch, "_subclasses.fake_tensor.FakeTensorMode"),
    "TorchDispatchMode": look_up(torch, "utils._python_dispatch.TorchDispatchMode"),
    "_DisableTorchDispatch": look_up(torch, "_C._DisableTorchDispatch"),
    "_current_graph_task_id": look_up(torch, "_C._current_graph_task_id"),
    "_local_scalar_dense": look_up(torch.ops.aten, "_local_scalar_dense.default"),
    "tree_map_only": look_up(torch, "utils._pytree.tree_map_only"),
    "tree_leaves": look_up(torch, "utils._pytree.tree_leaves"),
}
MISSING_NAME: str | None = next((name for name, found in _REQUIRED.items() if found is None), None)
"""First missing name that dry runs require, or None."""


def require_dry_runs() -> None:
    """Raise RuntimeError if this version of torch does not support dry runs on fake tensors."""
    if MISSING_NAME is not None:
        raise RuntimeError(f"torch {torch.__version__} has no {MISSING_NAME}, which dry runs need")


class _NoFakeTensor(Tensor):
    """Placeholder class without instances."""


class _NoDispatchMode:
    """Placeholder for a dispatch mode. Entering it raises RuntimeError."""

    def __enter__(self) -> None:
        require_dry_runs()

    def __exit__(self, *error: object) -> None:
        return None


class DispatchMode(_REQUIRED["TorchDispatchMode"] or _NoDispatchMode):  # type: ignore[misc]
    """Base class of modes that observe every operator of a thread."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # dry runs do not compile, and the guard of every call takes time


FakeTensor: Any = _REQUIRED["FakeTensor"] or _NoFakeTensor
FakeTensorMode: Any = _REQUIRED["FakeTensorMode"]
tree_map_only: Callable[..., Any] = _REQUIRED["tree_map_only"]
tree_leaves: Callable[..., list[Any]] = _REQUIRED["tree_leaves"]
LOCAL_SCALAR: Any = _REQUIRED["_local_scalar_dense"]
TO_COPY: Any = look_up(torch.ops.aten, "_to_copy.default")
PIN_MEMORY: Any = look_up(torch.ops.aten, "_pin_memory.default")
_graph_task: Callable[[], int] = _REQUIRED["_current_graph_task_id"] or (lambda: -1)

# Operators that do not exist in all versions of torch.
FLASH_FORWARD: Any = look_up(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
FLASH_BACKWARD: Any = look_up(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
GROUPED_PRODUCT: Any = look_up(torch.ops.aten, "_grouped_mm")
# Name of the autograd engine's stack frame. If it changes, a memory plan counts some gradient sums twice.
ENGINE = "_engine_run_backward"


def in_backward() -> bool:
    """True if the autograd engine is running in this thread."""
    return _graph_task() != -1


def _fake_constructor() -> Callable[[Any, dict[str, Any], Tensor, torch.device], Tensor]:
    make_subclass = look_up(Tensor, "_make_subclass")
    set_throw = look_up(torch, "_C._set_throw_on_mutable_data_ptr")

    def construct(mode: Any, attributes: dict[str, Any], meta: Tensor, device: torch.device) -> Tensor:
        return FakeTensor(mode, meta, device)

    def construct_fast(mode: Any, attributes: dict[str, Any], meta: Tensor, device: torch.device) -> Tensor:
        fake = make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device)
        set_throw(fake)
        fake.__dict__.update(attributes)
        return fake

    return construct if make_subclass is None or set_throw is None else construct_fast


to_fake_tensor = _fake_constructor()
"""(mode, attributes, meta, device): Convert ``meta`` to a fake tensor of the mode with the attributes of its fake
tensors. Equivalent to the constructor without its checks."""

_versions = itertools.count()


def version_of(tensor: Tensor) -> int:
    """Return the counter of in-place changes of a tensor. Without the private name every call returns a new value."""
    return tensor._version


if look_up(torch.ones(0), "_version") is None:

    def version_of(tensor: Tensor) -> int:
        return next(_versions)


def _unsafe_view() -> Callable[[Tensor, Any], Tensor]:
    return look_up(torch.ops.aten, "_unsafe_view.default") or (lambda tensor, shape: tensor.reshape(shape).clone())


unrecorded_view = _unsafe_view()
"""(tensor, shape): Return a view that autograd does not track as a view. Without the private name, a copy."""


def _softmax_backward() -> Callable[[Tensor, Tensor, int, torch.dtype], Tensor]:
    def formula(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        return output.mul(grad.sub(grad.mul(output).sum(dim, keepdim=True))).to(dtype)

    return look_up(torch, "_softmax_backward_data") or formula


softmax_backward = _softmax_backward()
"""(grad, output, dim, input dtype): Return the gradient of softmax's input."""

multiply_each: Callable[[list[Tensor], list[float]], list[Tensor]] = look_up(torch, "_foreach_mul") or (
    lambda tensors, factors: [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]
)
"""(tensors, factors): Return each tensor multiplied by its factor. Few kernels for any number of tensors."""

multiply_each_: Callable[[list[Tensor], list[float]], object] = look_up(torch, "_foreach_mul_") or (
    lambda tensors, factors: [tensor.mul_(factor) for tensor, factor in zip(tensors, factors, strict=True)]
)
"""The same in place."""

is_view: Callable[[Tensor], bool] = look_up(Tensor, "_is_view") or (lambda tensor: True)
"""True if autograd tracks a tensor as a view of another."""


def sized_tensor(cls: Any, size: torch.Size, dtype: torch.dtype, *, feature: str) -> Any:
    """Create a tensor of a subclass with a size and no values.

    Args:
        feature: What needs it, named in the error.

    Raises:
        UserError: if this version of torch does not support it.
    """
    if (make := look_up(Tensor, "_make_wrapper_subclass")) is None:
        raise missing_name_error(feature, "Tensor._make_wrapper_subclass")
    return make(cls, size, dtype=dtype, device="cpu")


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Let ``torch.compile`` assume that the size of a dimension varies. Without the name, it recompiles once."""
    if (mark := look_up(torch, "_dynamo.mark_dynamic")) is not None:
        mark(tensor, dim)


def compile_errors() -> tuple[type[Exception], ...]:
    """Return the exception types of torch.compile. Importing them is slow, so call this only after a failure."""
    failed = look_up(torch, "_dynamo.exc.TorchDynamoException")
    exceeded = look_up(torch, "_dynamo.exc.FailOnRecompileLimitHit")
    return tuple(filter(None, (failed, exceeded))) or (RuntimeError,)


def inductor_backend() -> Callable[..., Any]:
    """Return the function with which torch.compile compiles a graph. Importing it is slow."""
    if (find := look_up(torch, "_dynamo.lookup_backend")) is None:
        raise missing_name_error("FlexAttention", "torch._dynamo.lookup_backend")
    return find("inductor")


def compiled_modules() -> list[Any]:
    """Return the loaded modules that torch.compile generated. Without the private name the list is empty."""
    return list(look_up(torch, "_inductor.codecache.PyCodeCache.modules") or ())
