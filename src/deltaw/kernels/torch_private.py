"""All private names of torch that deltaw uses, in one place: each is looked up once, with a stand-in.

A stand-in does the same in more time, or refuses by name what cannot be done without it: without torch's fake
tensors, for example, there are no dry runs (:data:`LACKS`), and a training goes on without its plan. Which
function is used is decided when this module is imported, so that a call costs no test; each is one that
torch.compile traces.

No other file uses names of torch that begin with an underscore; ``tests/test_private_names.py`` checks it.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.private_names import look_up

_Module = TypeVar("_Module", bound=nn.Module)


def _lack(what: str, name: str) -> UserError:
    hint = "install another version of torch, or of deltaw"
    return UserError(f"{what} needs {name}, which torch {torch.__version__} does not have", hint=hint)


# Who observes operators


def _who_watches() -> tuple[Callable[[], Any], Callable[[], Any]]:
    count, profiler = look_up(torch, "_C._len_torch_dispatch_stack"), torch.autograd.profiler
    if count is None:
        return lambda: True, lambda: True
    if look_up(profiler, "_is_profiler_enabled") is None:
        return count, lambda: True

    def watched() -> Any:
        return count() or profiler._is_profiler_enabled

    return count, watched


in_dispatch_mode, watched = _who_watches()
"""Whether a dispatch mode sees every operator of this thread; and whether that or a profiler does. Without
these names both are always true: kernels are then called through torch's dispatcher, which takes longer."""

without_dispatch: Callable[[], contextlib.AbstractContextManager[Any]] = (
    look_up(torch, "_C._DisableTorchDispatch") or contextlib.nullcontext
)
"""Within, no dispatch mode sees operators, and new tensors have values. Only dry runs have modes of ours, and
there are none without this name."""

functorch_is_active: Callable[[], bool] = look_up(torch, "_C._are_functorch_transforms_active") or (lambda: True)
"""Whether a torch.func transform is active; without the name, the reference is taken that serves all."""

# Dry runs

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
LACKS: str | None = next((name for name, found in _REQUIRED.items() if found is None), None)
"""The first name that dry runs need and that is not there."""


def require_dry_runs() -> None:
    """Raise a RuntimeError where this version of torch cannot run a program on fake tensors."""
    if LACKS is not None:
        raise RuntimeError(f"torch {torch.__version__} has no {LACKS}, which dry runs need")


class _NoFakeTensor(Tensor):
    """There are none."""


class _NoDispatchMode:
    """A dispatch mode that cannot be entered."""

    def __enter__(self) -> None:
        require_dry_runs()

    def __exit__(self, *error: object) -> None:
        return None


class DispatchMode(_REQUIRED["TorchDispatchMode"] or _NoDispatchMode):  # type: ignore[misc]
    """Sees every operator of its thread while it is open."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in dry runs, and guarding every call costs time


FakeTensor: Any = _REQUIRED["FakeTensor"] or _NoFakeTensor
FakeTensorMode: Any = _REQUIRED["FakeTensorMode"]
tree_map_only: Callable[..., Any] = _REQUIRED["tree_map_only"]
tree_leaves: Callable[..., list[Any]] = _REQUIRED["tree_leaves"]
LOCAL_SCALAR: Any = _REQUIRED["_local_scalar_dense"]
_graph_task: Callable[[], int] = _REQUIRED["_current_graph_task_id"] or (lambda: -1)

# Operators that only a version that has them can meet.
FLASH_FORWARD: Any = look_up(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
FLASH_BACKWARD: Any = look_up(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
GROUPED_PRODUCT: Any = look_up(torch.ops.aten, "_grouped_mm")
# What the engine's own frame is called; under another name a plan counts some sums of gradients twice.
ENGINE = "_engine_run_backward"


def in_backward() -> bool:
    """Whether the autograd engine runs in this thread."""
    return _graph_task() != -1


def _fakes() -> Callable[[Any, dict[str, Any], Tensor, torch.device], Tensor]:
    subclass, throws = look_up(Tensor, "_make_subclass"), look_up(torch, "_C._set_throw_on_mutable_data_ptr")

    def plainly(mode: Any, attributes: dict[str, Any], meta: Tensor, device: torch.device) -> Tensor:
        return FakeTensor(mode, meta, device)

    def quickly(mode: Any, attributes: dict[str, Any], meta: Tensor, device: torch.device) -> Tensor:
        made = subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device)
        throws(made)
        made.__dict__.update(attributes)
        return made

    return plainly if subclass is None or throws is None else quickly


as_fake = _fakes()
"""(mode, attributes, meta, device): ``meta`` as a fake tensor of the mode with the attributes that its fake
tensors have: what its constructor does, without its checks of every call."""

# Tensors

_versions = itertools.count()


def version_of(tensor: Tensor) -> int:
    """Counts the changes of a tensor in place; without the name every tensor counts as changed."""
    return tensor._version


if look_up(torch.ones(0), "_version") is None:

    def version_of(tensor: Tensor) -> int:
        return next(_versions)


def _unsafe_view() -> Callable[[Tensor, Any], Tensor]:
    found = look_up(torch.ops.aten, "_unsafe_view.default")
    return found or (lambda tensor, shape: tensor.reshape(shape).clone())


unrecorded_view = _unsafe_view()
"""(tensor, shape): a view that autograd does not know as one; without it, a copy."""


def _softmax_backward() -> Callable[[Tensor, Tensor, int, torch.dtype], Tensor]:
    def formula(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        return output.mul(grad.sub(grad.mul(output).sum(dim, keepdim=True))).to(dtype)

    return look_up(torch, "_softmax_backward_data") or formula


softmax_backward = _softmax_backward()
"""(grad, output, dim, type of the input): the gradient of softmax's input."""

is_view: Callable[[Tensor], bool] = look_up(Tensor, "_is_view") or (lambda tensor: True)
"""Whether autograd knows a tensor as a view of another."""


def sized_tensor(cls: Any, size: torch.Size, dtype: torch.dtype) -> Any:
    """A tensor of a subclass that has a size and no values.

    Raises:
        UserError: this version of torch makes none.
    """
    if (make := look_up(Tensor, "_make_wrapper_subclass")) is None:
        raise _lack("train.sharding: base", "Tensor._make_wrapper_subclass")
    return make(cls, size, dtype=dtype, device="cpu")


def compile_errors() -> type[Exception]:
    """What a failing torch.compile raises; to be asked once it has failed, since the compiler is large."""
    return look_up(torch, "_dynamo.exc.TorchDynamoException") or RuntimeError


# Modules

_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
_HAS_TABLES = all(look_up(nn.Module(), name) is not None for name in _TABLES)
_HAS_HOOKS = all(look_up(nn.Module(), name) is not None for name in _HOOKS)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters that are a module's own, by name; None under a name that is kept free."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers that are a module's own, by name."""
    return module._buffers


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules that are directly inside a module, by name."""
    return module._modules


def _parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    found: dict[str, nn.Parameter | None] = {
        name: None for name in ("weight", "bias") if getattr(module, name, module) is None
    }
    return {**found, **dict(module.named_parameters(recurse=False, remove_duplicate=False))}


def _buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    return dict(module.named_buffers(recurse=False, remove_duplicate=False))


def _modules_of(module: nn.Module) -> dict[str, nn.Module | None]:
    return dict(module.named_children())


if not _HAS_TABLES:
    own_parameters, own_buffers, own_modules = _parameters_of, _buffers_of, _modules_of


def adopt(cls: type[_Module], module: nn.Module) -> _Module:
    """A new object of ``cls`` with all that ``module`` has, in tables of its own; hooks stay shared.

    Raises:
        UserError: torch keeps a module's parts elsewhere than is known here.
    """
    if not _HAS_TABLES:
        raise _lack("an adapter", "the tables of nn.Module")
    made = cls.__new__(cls)
    vars(made).update(vars(module))
    for table in _TABLES:
        vars(made)[table] = dict(vars(module)[table])
    return made


def with_tensors(
    module: _Module, parameters: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor | None] | None = None
) -> _Module:
    """A copy of a module that has these parameters, and these buffers or its own.

    Raises:
        UserError: as for :func:`adopt`.
    """
    if not _HAS_TABLES:
        raise _lack("a copy of a module", "the tables of nn.Module")
    made = copy.copy(module)
    vars(made)["_parameters"] = dict(parameters)
    vars(made)["_buffers"] = dict(own_buffers(module) if buffers is None else buffers)
    return made


def share_parameters(module: nn.Module, table: dict[str, nn.Parameter | None]) -> None:
    """Let a module find its parameters in ``table``, where another has its own.

    Raises:
        UserError: as for :func:`adopt`.
    """
    if not _HAS_TABLES:
        raise _lack("train.sharding: base", "the tables of nn.Module")
    table.update(own_parameters(module))
    vars(module)["_parameters"] = table


def are_hooked(tables: Iterable[Mapping[str, Any]]) -> bool:
    """Whether one of some modules, given by their ``vars``, has a hook; without the names, one may have."""
    if not _HAS_HOOKS:
        return True
    return any(table["_forward_hooks"] or table["_forward_pre_hooks"] or table["_backward_hooks"] for table in tables)


def remove_forward_hooks(module: nn.Module, numbers: Iterable[int]) -> None:
    """Take forward hooks from a module by their handles' numbers; where they cannot be found, they stay."""
    for number in numbers:
        for name in ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called"):
            vars(module).get(name, {}).pop(number, None)


def convolves_as(kind: type[nn.Module], convolution: Any) -> bool:
    """Whether a class computes what torch's own convolution does."""
    inner = (look_up(one, "_conv_forward") for one in (kind, convolution))
    return len(set(inner)) == 1 and kind.forward is convolution.forward


def inside_compiled(model: nn.Module) -> nn.Module | None:
    """The module that ``torch.compile`` wrapped; None where it did not wrap this one."""
    return own_modules(model).get("_orig_mod")
