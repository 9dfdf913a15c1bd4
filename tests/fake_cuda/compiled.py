"""Compile attention to machine code for NVIDIA GPUs, without a GPU, and print the resources of the kernels.

    python -m tests.fake_cuda.compiled [--capabilities 75 80 89 90 120] [--heads 32/8/128 9/3/64] [--lengths 36 8192]

Cells contain registers per thread, shared memory per block, and stack per thread.

torch.compile, Triton and ptxas generate the code on the fake device. Nothing is executed: values are not compared, and
nothing is timed. Each capability is compiled in its own process. Requires triton.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import unittest.mock
from pathlib import Path
from typing import Any

# Opt-in limit of shared memory per block in KiB, by compute capability (CUDA C++ Programming Guide, technical
# specifications).
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
HEADS = ("32/8/64", "32/8/128", "16/8/128", "9/3/64", "4/1/256")
# Names of the entries of BLOCK_OPTIONS.
BLOCKS = ("torch's", "smaller backward", "smallest")
NOT_COMPILED = "not compiled"
LENGTHS = (36, 80, 127, 257, 8192)
HEADER = "| GPU | heads | lengths | blocks | forward | backward |\n| --- | --- | --- | --- | --- | --- |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(SHARED_MEMORY)
    default = [75, 80, 89, 90, 120]
    parser.add_argument("--capabilities", type=int, nargs="+", choices=known, default=default)
    parser.add_argument("--heads", nargs="+", default=HEADS, metavar="HEADS/KEYS/SIZE")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        (capability,) = args.capabilities
        install(capability)
        for heads in args.heads:
            print("\n".join(compile_attention(capability, heads, args.lengths)), flush=True)
        return
    print(HEADER, flush=True)
    shared = ["--heads", *args.heads, "--lengths", *map(str, args.lengths), "--child", "--capabilities"]
    for capability in args.capabilities:
        subprocess.run([sys.executable, "-m", "tests.fake_cuda.compiled", *shared, str(capability)], check=True)


# Kernels in the order of their compilation: name, resources in bytes, and whether they fit into the shared memory.
KERNELS: list[dict[str, Any]] = []


def install(capability: int) -> None:
    """Install the fake device with a compute capability, and replace the loading of compiled kernels by recording."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    # torch's CPU build does not distinguish GPUs in its cache of generated code.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"deltaw-compiled-sm_{capability}")
    from tests.fake_cuda import device

    limit = SHARED_MEMORY[capability] * 1024
    device.properties.shared_memory_per_block_optin = limit
    if not device.is_installed:
        device.install()
    device.configure(capability=divmod(capability, 10))
    import torch
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        """Triton's view of the device."""

        utils = type("Utils", (), {"get_device_properties": lambda index: {"max_shared_mem": limit}})
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda index=0: 0)
        get_device_interface = staticmethod(lambda: torch.cuda)
        get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
        is_active = staticmethod(lambda: True)
        get_benchmarker = staticmethod(lambda: lambda function, **options: [1.0])

    def make_launcher(self: Any) -> Any:
        used = resources(self.kernel.asm["cubin"]) | {"shared": self.kernel.metadata.shared}
        KERNELS.append({"name": self.inductor_meta.get("kernel_name"), **used, "loaded": used["shared"] <= limit})
        if used["shared"] > limit:
            raise triton_heuristics.OutOfResources(used["shared"], limit, "shared memory")

        def launch(*args: Any, **kwargs: Any) -> None:
            """Do nothing: the fake device cannot run the kernel."""

        launch.config = self.config
        launch.cache_hash = ""
        launch.store_cubin = False
        launch.n_regs = used["REG"]
        launch.n_spills = used["STACK"] // 4
        launch.shared = used["shared"]
        launch._is_static = False
        return launch

    driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = lambda: None
    triton_heuristics.TritonCompileResult.make_launcher = make_launcher
    triton_heuristics.StaticTritonCompileResult.can_statically_launch = staticmethod(lambda *args: None)
    triton_heuristics.CachingAutotuner.bench = lambda self, launcher, *args, **kwargs: 1.0
    torch._C._dynamo.guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers and stack (in bytes) per thread of a compiled kernel."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}


def compile_attention(capability: int, heads: str, lengths: list[int]) -> list[str]:
    """Return rows of the table for one shape of heads, with gradients and a shared prefix."""
    import torch

    from deltaw.kernels import gpu_attention
    from deltaw.kernels.layout import Layout

    compare = gpu_attention._difference

    def ignore_values(implementation: Any, case: Any, reference: Any) -> str | None:
        problem = compare(implementation, case, lambda q, k, v, layout, **options: q + k.sum() + v.sum())
        return problem if problem is not None and "results differ" not in problem else None

    num_heads, key_heads, size = map(int, heads.split("/"))
    dtype = torch.bfloat16 if capability >= 80 else torch.float16  # as in runs
    rows: dict[bool, str] = {}
    lengths_by_row: dict[str, list[str]] = {}
    for length in lengths:
        layout = Layout.of_lengths([length // 2, length - length // 2], [-1, 0])
        layout.device = torch.device("cuda")
        first = len(KERNELS)
        is_short = length < gpu_attention.BLOCK
        shapes = [(count, length, size) for count in (num_heads, key_heads, key_heads)]
        inputs = [torch.zeros(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
        with unittest.mock.patch.object(gpu_attention, "_difference", ignore_values):
            out = gpu_attention.attend(*inputs, layout, lambda: None, size**-0.5)
        if out is not None:
            out.sum().backward()
        case = next(case for case in gpu_attention._TRIALS if case.short == is_short and case.sizes[0] == size)
        if is_short not in rows:
            row = _describe(gpu_attention._TRIALS[case], KERNELS[first:])
            # If no attention kernel was compiled, the code of the other length class runs.
            rows[is_short] = rows[not is_short] if rows and NOT_COMPILED in row else row
        elif len(KERNELS) != first:
            raise RuntimeError(f"length {length} did not use the kernels of its class")
        lengths_by_row.setdefault(rows[is_short], []).append(str(length))
    gpu_attention._TRIALS.clear()
    return [f"| sm_{capability} | {heads} | {', '.join(names)} | {row}" for row, names in lengths_by_row.items()]


def _describe(trial: Any, kernels: list[dict[str, Any]]) -> str:
    """Return the columns of a row: the blocks, and the last forward and backward kernel compiled with them."""
    from deltaw.kernels import gpu_attention
    from deltaw.kernels.flex_attention import CompiledAttention

    chosen = trial.attend.kernel_options if isinstance(trial.attend, CompiledAttention) else None
    columns = ["tiles" if chosen is None else BLOCKS[gpu_attention.BLOCK_OPTIONS.index(chosen)]]
    if trial.problem is not None:
        columns[0] += f" ({trial.problem})"
    for is_backward in (False, True):
        compiled = [k for k in kernels if "tem" in k["name"] and ("backward" in k["name"]) == is_backward]
        cells = [f"{k['REG']}, {k['shared'] / 1024:.0f} KB, {k['STACK']:,} B" for k in compiled[-1:]]
        columns.append(cells[0] if cells else NOT_COMPILED)
    return " | ".join(columns) + " |"


if __name__ == "__main__":
    main()
