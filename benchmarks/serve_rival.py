"""Run llama.cpp's server with LoRA adapters (package xllamacpp) until standard input is closed.

    python benchmarks/serve_rival.py BASE.gguf PARALLEL THREADS ADAPTER.gguf …

Prints its address. Requests select an adapter with llama.cpp's field ``lora``.
"""

from __future__ import annotations

import sys


def main() -> None:
    import xllamacpp

    base, parallel, threads, *adapters = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = base
    params.n_parallel = int(parallel)
    params.n_ctx = 512 * int(parallel)
    params.n_batch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.verbosity = 0
    params.port = 0
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in adapters]
    server = xllamacpp.Server(params)
    print(f"at {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
