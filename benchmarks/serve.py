"""Correctness, memory and speed of a server under load.

    python benchmarks/serve.py [--requests 10000] [--clients 64] [--adapters 8] [--model tiny]

Starts `deltaw serve` with random adapters of different ranks. Each case (model, prompt, length) is first answered
without other requests. Then clients request random cases and 15 % of the requests are canceled. Guest adapters are
unloaded and reloaded meanwhile. Every answer is compared with the first one. Finally the server and llama.cpp's server
(xllamacpp, with the same base model and adapters as GGUF files) answer the same requests in alternating rounds, with
the adapters in turn.

Exits with status 1 if an answer was wrong or lost, or if memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
from machine import print_machine
from serve_load import Case, Counts, LoadTest, answer_sequentially, client_of, growth, load_guest
from serve_models import SMOLLM2, make_tiny_base, prompts, write_adapters

GUESTS = 3
# Memory growth that is not a leak: key-value pages in use and memory retained by the allocator.
FLAT_MIB = 48.0
FLAT_SHARE = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="model reference, or tiny")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8, help="number of adapters that remain loaded")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=16, help="maximum number of tokens of an answer")
    parser.add_argument(
        "--adapter-memory", default="1GB", help="if it is too small for all adapters, they are evicted and reloaded"
    )
    parser.add_argument("--cache-memory", default="256MB", help="memory for keys and values")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rival", default="on", choices=["on", "off"])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the comparison with the rival")
    parser.add_argument("--rival-requests", type=int, default=64, help="requests per round of the comparison")
    parser.add_argument("--rival-clients", type=int, default=16)
    parser.add_argument("--rival-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print_machine(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(0 if run(args, Path(scratch).resolve()) else 1)


def run(args: argparse.Namespace, scratch: Path) -> bool:
    """Run the load test and the comparison. Return True if the load test passed."""
    tiny = args.model == "tiny"
    base = make_tiny_base(scratch / "base") if tiny else args.model
    folders = write_adapters(base, scratch / "adapters", args.adapters + GUESTS)
    guests = dict(list(folders.items())[args.adapters :])
    regulars = {name: folder for name, folder in folders.items() if name not in guests}
    with start_server(base, regulars, scratch / "adapters", args) as (url, process):
        counts = asyncio.run(run_load_test(url, process, regulars, guests, args))
        good = report(counts, args)
        if args.rival == "on" and not tiny:
            compare_with_llama_cpp(url, base, regulars, scratch, args)
    return good


@contextlib.contextmanager
def start_server(
    base: str, adapters: dict[str, Path], below: Path, args: argparse.Namespace
) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server and yield its address and process."""
    command = [sys.executable, "-m", "deltaw", "serve", base, "--name", "base", "--port", "0", "--log", "off"]
    command += ["--precision", args.precision, "--adapters-from", str(below)]
    command += ["--adapter-memory", args.adapter_memory, "--cache-memory", args.cache_memory]
    command += ["--queue", str(4 * args.clients)]
    for name, folder in adapters.items():
        command += ["--adapter", f"{name}={folder}"]
    threads = {"OMP_NUM_THREADS": str(args.threads)}
    with start_program(command, threads) as (url, process):
        yield url, psutil.Process(process.pid)
        process.terminate()
        if process.wait(60) not in (0, 130):
            raise SystemExit(f"the server exited with status {process.returncode}")


@contextlib.contextmanager
def start_program(command: list[str], variables: dict[str, str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start a program, wait until it prints a line with ` at ADDRESS`, and yield the address and the process."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | variables
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if " at http" in f" {line}":
                yield line.rsplit("at ", 1)[1].strip(), process
                break
        else:
            raise SystemExit(f"{' '.join(command[:4])} exited with status {process.wait()}")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


async def run_load_test(
    url: str, process: psutil.Process, regulars: dict[str, Path], guests: dict[str, Path], args: argparse.Namespace
) -> Counts:
    """Answer every case without other requests, then run all clients at once."""
    async with client_of(url) as client:
        for name, folder in guests.items():
            await load_guest(client, name, folder)
    cases = [
        Case(model, prompt, max(1, args.tokens - index % 8))
        for model in ("base", *regulars, *guests)
        for index, prompt in enumerate(prompts(args.prompts))
    ]
    start = time.perf_counter()
    answers = await answer_sequentially(url, cases)
    seconds = time.perf_counter() - start
    print(
        f"{len(cases)} cases answered sequentially in {seconds:.0f} s, {len(set(answers.values()))} texts", flush=True
    )
    test = LoadTest(url, answers, guests, requests=args.requests, clients=args.clients, process=process, seed=args.seed)
    return await test.run()


def report(counts: Counts, args: argparse.Namespace) -> bool:
    """Print the results. Return True if no answer was wrong or lost and memory did not grow."""
    for kind, lines in (("wrong", counts.wrong), ("lost", counts.lost)):
        for line in lines[:5]:
            print(f"{kind}: {line}"[:600])
    print(
        f"{args.requests:,} requests from {args.clients} clients in {counts.seconds:.0f} s: "
        f"{counts.right:,} right, {counts.cancelled:,} canceled, {counts.unknown:,} to an unloaded guest adapter, "
        f"{len(counts.wrong)} wrong, {len(counts.lost)} lost; guests loaded {counts.loads} times"
    )
    first_token_seconds = sorted(counts.first)
    if first_token_seconds:
        median = first_token_seconds[len(first_token_seconds) // 2]
        percentile_99 = first_token_seconds[int(0.99 * len(first_token_seconds))]
        print(f"first token: median {1000 * median:.0f} ms, 99th percentile {1000 * percentile_99:.0f} ms")
    request_rate = args.requests / counts.seconds
    tokens = counts.tokens / counts.seconds
    print(f"{request_rate:.1f} requests/s, {tokens:.0f} tokens/s of complete answers")
    middle, grown = growth(counts.memory)
    peak = max(size for _, size in counts.memory) / 2**20
    print(
        f"memory: {middle:.0f} MiB in the second quarter, {grown:+.1f} MiB in the last, peak {peak:.0f} MiB", flush=True
    )
    tenths = [counts.memory[len(counts.memory) * n // 10][1] / 2**20 for n in range(10)]
    print(f"memory by tenths of the time: {' '.join(f'{size:.0f}' for size in tenths)} MiB")
    accounted = counts.right + counts.cancelled + counts.unknown + len(counts.wrong) + len(counts.lost)
    if accounted < args.requests:
        print(f"{args.requests - accounted} requests are not accounted for")
    flat = grown <= max(FLAT_MIB, FLAT_SHARE * middle)
    return not counts.wrong and not counts.lost and accounted >= args.requests and flat


def compare_with_llama_cpp(
    url: str, base: str, adapters: dict[str, Path], scratch: Path, args: argparse.Namespace
) -> None:
    """Print the requests per second of both servers in alternating rounds."""
    from deltaw.export.formats import export
    from deltaw.hub.folders import resolve

    files = []
    for name, folder in adapters.items():
        files.append(str(scratch / f"{name}.gguf"))
        export(str(folder), "gguf-adapter", files[-1], model=base, log=lambda line: None)
    rival = Path(__file__).with_name("serve_rival.py")
    command = [
        sys.executable,
        str(rival),
        str(resolve(base).location),
        str(args.rival_clients),
        str(args.threads),
        *files,
    ]
    with start_program(command, {}) as (rival_url, process):
        ratios = []
        for round_index in range(args.rounds + 1):
            deltaw_rate, llama_rate = (
                asyncio.run(rate(u, list(adapters), u == rival_url, args)) for u in (url, rival_url)
            )
            if round_index:  # the first round is a warm-up
                ratios.append(deltaw_rate / llama_rate)
                rates_text = f"deltaw {deltaw_rate:.2f} requests/s, llama.cpp {llama_rate:.2f}"
                print(f"round {round_index}: {rates_text}, ratio {ratios[-1]:.2f}", flush=True)
        process.kill()
    ratios.sort()
    print(
        f"{len(adapters)} adapters in turn, {args.rival_clients} clients, {args.rival_tokens} tokens: "
        f"{ratios[len(ratios) // 2]:.2f} times llama.cpp's requests per second (median of {len(ratios)} rounds)"
    )


async def rate(url: str, adapters: list[str], is_rival: bool, args: argparse.Namespace) -> float:
    """Return the requests per second of a round. Each request has its own prompt and uses the next adapter."""
    texts = prompts(args.rival_requests)
    remaining = iter(range(args.rival_requests))

    async def client() -> None:
        async with client_of(url) as http:
            for index in remaining:
                adapter_index = index % len(adapters)
                body: dict[str, object] = {"prompt": texts[index], "max_tokens": args.rival_tokens}
                body |= {"temperature": 0, "ignore_eos": True, "model": "base" if is_rival else adapters[adapter_index]}
                if is_rival:
                    body["lora"] = [{"id": adapter_index, "scale": 1.0}]
                await request_completion(http, body, args.rival_tokens)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(args.rival_clients)))
    return args.rival_requests / (time.perf_counter() - start)


async def request_completion(http: httpx.AsyncClient, body: dict[str, object], tokens: int) -> None:
    """Send a request and check the number of generated tokens."""
    answer = await http.post("/v1/completions", json=body)
    answer.raise_for_status()
    generated = answer.json()["usage"]["completion_tokens"]
    if generated != tokens:
        raise SystemExit(f"{generated} tokens instead of {tokens}: {answer.text[:300]}")


if __name__ == "__main__":
    main()
