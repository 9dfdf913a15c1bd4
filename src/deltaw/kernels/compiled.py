"""Row-wise functions that ``torch.compile`` turns into one kernel each on CUDA devices.

A compiled function must pass a trial for each combination of shapes, types and options: its results for a few rows are
compared with those of torch's operators on the same device. If the trial fails, torch's operators are used and
:func:`notes` reports the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltaw.kernels.operators import PLAIN_TYPES
from deltaw.kernels.torch_private import compile_errors, in_dispatch_mode, mark_dynamic

# Device types with a compiler for kernels.
DEVICES = ("cuda",)
# Names of tensor arguments that all rows share.
SHARED = ("weight", "bias")
# Maximum number of rows in a trial.
TRIAL_ROWS = 48
# Maximum norm of the difference from torch's operators, relative to the norm of their result, by type.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}

_REASONS: dict[str, None] = {}


def notes() -> list[str]:
    """Return messages for the user: the functions that are not compiled, each with the reason."""
    return list(_REASONS)


class CompiledFunction:
    """Function that is compiled at the first call.

    Args:
        function: Takes keyword arguments: tensors with a row per token, which it may overwrite, :data:`SHARED` tensors,
            and options.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._selected: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, **arguments: Any) -> Any:
        """Call the function without recording a graph. The first argument must be a tensor of rows."""
        first: Any = next(iter(arguments.values()))
        is_real = first.device.type in DEVICES and type(first) in PLAIN_TYPES and not in_dispatch_mode()
        if not is_real or first.dtype not in TOLERANCE or len(first) < 2:  # torch compiles a size of 1 separately
            return self.function(**arguments)
        arguments = {name: v.detach() if isinstance(v, Tensor) else v for name, v in arguments.items()}
        key = (first.device, *map(_kind, arguments.values()))
        with torch.no_grad():
            if key not in self._selected:
                self._selected[key] = self._select(arguments)
            try:
                return self._selected[key](**arguments)
            except compile_errors() as error:  # compilation precedes the computation
                self._selected[key] = self._reject(error)
                return self.function(**arguments)

    def _select(self, arguments: dict[str, Any]) -> Callable[..., Any]:
        """Return the compiled function if it computes the same for sample rows, else the function itself."""
        sample = _first_rows(arguments)
        reference_sample = _first_rows(arguments)
        try:
            compiled = compile_function(self.function)
            for name, value in sample.items():
                if isinstance(value, Tensor) and name not in SHARED:
                    mark_dynamic(value, 0)
            results = compiled(**sample)
            expected = self.function(**reference_sample)
            if not _is_close([results, *sample.values()], [expected, *reference_sample.values()]):
                raise ValueError("its results differ from those of torch's operators")
        except Exception as error:  # compilers raise many types; torch's operators remain as fallback
            return self._reject(error)
        return compiled

    def _reject(self, error: Exception) -> Callable[..., Any]:
        brief = (str(error).splitlines() or [""])[0][:100]
        _REASONS[f"{self.function.__name__} is not compiled ({type(error).__name__}: {brief})"] = None
        return self.function


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function without splitting reductions, because a split reduction needs two kernels."""
    return torch.compile(function, fullgraph=True, options={"split_reductions": False})


def _first_rows(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with row tensors replaced by copies of their first rows."""
    return {k: v[:TRIAL_ROWS].clone() if isinstance(v, Tensor) and k not in SHARED else v for k, v in arguments.items()}


def _kind(value: Any) -> Any:
    """Return the properties of an argument that are compiled into the function."""
    return (value.dtype, *value.shape[1:]) if isinstance(value, Tensor) else value


def _is_close(result: Any, reference: Any) -> bool:
    if isinstance(result, (list, tuple)):
        return all(map(_is_close, result, reference))
    if not isinstance(result, Tensor):
        return True
    difference = float((result.float() - reference.float()).norm())
    return difference <= TOLERANCE.get(result.dtype, 0.0) * float(reference.float().norm())
