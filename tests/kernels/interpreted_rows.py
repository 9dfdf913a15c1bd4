"""Run the Triton kernels of compiled row functions in Triton's interpreter, and print their relative differences.

Inductor generates the kernels for a CPU, with the options that it uses on a GPU. Prints a JSON object.
"""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}

import torch
import triton.language as tl
from torch._inductor import config
from torch._inductor.runtime import triton_helpers, triton_heuristics
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from deltaw.kernels import compiled
from tests.kernels.row_arguments import arguments


def main() -> None:
    config.cpu_backend = "triton"
    driver.set_active(
        SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    )
    # The interpreter has no functions of CUDA's library.
    triton_helpers.libdevice = SimpleNamespace(
        exp=lambda x: tl.exp(x),
        erf=lambda x: tl.erf(x),
        rsqrt=lambda x: 1 / tl.sqrt(x),
        tanh=lambda x: 2 * tl.sigmoid(2 * x) - 1,
    )
    run = triton_heuristics.CachingAutotuner.run
    kernels = []

    def run_and_count(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernels.append(self.inductor_meta["kernel_name"])
        return run(self, *args, **kwargs)

    triton_heuristics.CachingAutotuner.run = run_and_count
    compiled.DEVICES = ("cpu",)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, function, values in arguments(dtype):
            torch.compiler.reset()  # one process compiles more kinds of arguments here than a model has
            difference(function, values)  # runs the trial
            kernels.clear()
            longer = {k: torch.cat([v, v]) if is_rows(k, v) else v for k, v in values.items()}
            results[f"{name}, {dtype}"] = {"difference": difference(function, longer), "kernels": len(kernels)}
    print(json.dumps({"results": results, "notes": compiled.notes()}))


def is_rows(name: str, value: object) -> bool:
    return isinstance(value, torch.Tensor) and name not in compiled.SHARED


def difference(function: compiled.CompiledFunction, values: dict[str, Any]) -> float:
    """Return the largest relative difference of results and overwritten arguments from torch's operators."""
    copies = [{k: v.clone() if is_rows(k, v) else v for k, v in values.items()} for _ in range(2)]
    results = [*as_tuple(function(**copies[0])), *copies[0].values()]
    expected = [*as_tuple(function.function(**copies[1])), *copies[1].values()]
    pairs = [(a.float(), b.float()) for a, b in zip(results, expected, strict=True) if isinstance(a, torch.Tensor)]
    return max(float((a - b).norm() / (b.norm() + 1e-30)) for a, b in pairs)


def as_tuple(result: object) -> tuple:
    return result if isinstance(result, tuple) else (result,)


if __name__ == "__main__":
    main()
