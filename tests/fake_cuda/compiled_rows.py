"""Compile the row functions to machine code for an NVIDIA GPU, without a GPU, and print the names of their kernels.

    python -m tests.fake_cuda.compiled_rows 90

Prints a JSON object: for each function and kind of arguments, the kernels compiled for a first and for a second length.
"""

from __future__ import annotations

import json
import sys

from tests.fake_cuda.compiled import KERNELS, install

if __name__ == "__main__":
    install(int(sys.argv[1]))

    import torch

    from deltaw.kernels import compiled
    from tests.kernels.row_arguments import arguments

    # One process compiles more kinds of arguments here than a model has.
    torch._dynamo.config.recompile_limit = 100
    torch._dynamo.config.automatic_dynamic_shapes = False
    results = {}
    for name, function, values in arguments(torch.bfloat16, "cuda", compiled.TRIAL_ROWS, 512):
        run = compiled.compile_function(function.function)
        names = []
        for repeats in (1, 3):
            is_rows = {k: isinstance(v, torch.Tensor) and k not in compiled.SHARED for k, v in values.items()}
            copies = {k: torch.cat([v] * repeats) if is_rows[k] else v for k, v in values.items()}
            for key in [key for key in copies if is_rows[key] and repeats == 1]:
                compiled.mark_dynamic(copies[key], 0)
            KERNELS.clear()
            run(**copies)
            names.append(sorted({kernel["name"] for kernel in KERNELS}))
        results[f"{function.function.__name__}: {name}"] = names
    print(json.dumps(results))
