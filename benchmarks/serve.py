"""A real server under load: is every answer right, is none lost, is its memory flat, and how fast is it?

    python benchmarks/serve.py [--requests 10000] [--clients 64] [--adapters 8] [--model tiny]

Starts `deltaw serve` with adapters of different ranks and random factors. First each case (a model, a prompt,
a length) is written alone. Then clients ask for cases at random, 15 % of them give up, guests among the
adapters are unloaded and loaded again, and every answer is compared with the one written alone. At the end,
the server and llama.cpp's (xllamacpp, the same base model as its GGUF file, the same adapters as GGUF) answer
the same requests in turn, each request with the next of the adapters, in rounds one after the other.

Exits with 1 where an answer was wrong or lost, or the memory grew.
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
from serve_load import Case, Counts, LoadTest, client_of, growth, load_guest, written_alone
from serve_models import SMOLLM2, make_tiny_base, prompts, write_adapters

GUESTS = 3
# Memory that may come and go without being a leak: pages of keys and values in use, parts of the allocator's.
FLAT_MIB, FLAT_SHARE = 48.0, 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="a reference, or tiny")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8, help="besides those that come and go")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=16, help="the most tokens of an answer")
    parser.add_argument("--adapter-memory", default="1GB", help="less than all need lets them come and go")
    parser.add_argument("--cache-memory", default="256MB", help="for keys and values: full soon, then flat")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rival", default="on", choices=["on", "off"])
    parser.add_argument("--rounds", type=int, default=3, help="against the rival")
    parser.add_argument("--rival-requests", type=int, default=64, help="of a round")
    parser.add_argument("--rival-clients", type=int, default=16)
    parser.add_argument("--rival-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print_machine(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(0 if run(given, Path(scratch).resolve()) else 1)


def run(given: argparse.Namespace, scratch: Path) -> bool:
    """Both parts; whether all was as it must be."""
    tiny = given.model == "tiny"
    base = make_tiny_base(scratch / "base") if tiny else given.model
    folders = write_adapters(base, scratch / "adapters", given.adapters + GUESTS)
    guests = dict(list(folders.items())[given.adapters :])
    regulars = {name: folder for name, folder in folders.items() if name not in guests}
    with serving(base, regulars, scratch / "adapters", given) as (url, process):
        counts = asyncio.run(under_load(url, process, regulars, guests, given))
        good = report(counts, given)
        if given.rival == "on" and not tiny:
            beside_llama_cpp(url, base, regulars, scratch, given)
    return good


@contextlib.contextmanager
def serving(
    base: str, adapters: dict[str, Path], below: Path, given: argparse.Namespace
) -> Iterator[tuple[str, psutil.Process]]:
    """A server's address and process while the block is open."""
    command = [sys.executable, "-m", "deltaw", "serve", base, "--name", "base", "--port", "0", "--log", "off"]
    command += ["--precision", given.precision, "--adapters-from", str(below)]
    command += ["--adapter-memory", given.adapter_memory, "--cache-memory", given.cache_memory]
    command += ["--queue", str(4 * given.clients)]
    for name, folder in adapters.items():
        command += ["--adapter", f"{name}={folder}"]
    threads = {"OMP_NUM_THREADS": str(given.threads)}
    with started(command, threads) as (url, process):
        yield url, psutil.Process(process.pid)
        process.terminate()
        if process.wait(60) not in (0, 130):
            raise SystemExit(f"the server ended with {process.returncode}")


@contextlib.contextmanager
def started(command: list[str], variables: dict[str, str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A program that prints a line with ` at ADDRESS` when it can be asked, until the block is left."""
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
            raise SystemExit(f"{' '.join(command[:4])} ended with {process.wait()}")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


async def under_load(
    url: str, process: psutil.Process, regulars: dict[str, Path], guests: dict[str, Path], given: argparse.Namespace
) -> Counts:
    """Every case alone, then all clients at once."""
    async with client_of(url) as client:
        for name, folder in guests.items():
            await load_guest(client, name, folder)
    cases = [
        Case(model, prompt, max(1, given.tokens - place % 8))
        for model in ("base", *regulars, *guests)
        for place, prompt in enumerate(prompts(given.prompts))
    ]
    began = time.perf_counter()
    answers = await written_alone(url, cases)
    seconds = time.perf_counter() - began
    print(f"{len(cases)} cases written alone in {seconds:.0f} s, {len(set(answers.values()))} texts", flush=True)
    test = LoadTest(
        url, answers, guests, requests=given.requests, clients=given.clients, process=process, seed=given.seed
    )
    return await test.run()


def report(counts: Counts, given: argparse.Namespace) -> bool:
    """Print what came of it; whether nothing was wrong or lost and the memory stayed."""
    for kind, lines in (("wrong", counts.wrong), ("lost", counts.lost)):
        for line in lines[:5]:
            print(f"{kind}: {line}"[:600])
    print(
        f"{given.requests:,} requests from {given.clients} clients in {counts.seconds:.0f} s: "
        f"{counts.right:,} right, {counts.cancelled:,} given up, {counts.unknown:,} to a guest who was away, "
        f"{len(counts.wrong)} wrong, {len(counts.lost)} lost; guests loaded {counts.loads} times"
    )
    first = sorted(counts.first)
    if first:
        median, late = first[len(first) // 2], first[int(0.99 * len(first))]
        print(f"first token: median {1000 * median:.0f} ms, 99th percentile {1000 * late:.0f} ms")
    each, tokens = given.requests / counts.seconds, counts.tokens / counts.seconds
    print(f"{each:.1f} requests a second, {tokens:.0f} tokens of whole answers")
    middle, grown = growth(counts.memory)
    peak = max(size for _, size in counts.memory) / 2**20
    print(
        f"memory: {middle:.0f} MiB in the second quarter, {grown:+.1f} MiB in the last, peak {peak:.0f} MiB", flush=True
    )
    tenths = [counts.memory[len(counts.memory) * n // 10][1] / 2**20 for n in range(10)]
    print(f"memory by tenths of the time: {' '.join(f'{size:.0f}' for size in tenths)} MiB")
    accounted = counts.right + counts.cancelled + counts.unknown + len(counts.wrong) + len(counts.lost)
    if accounted < given.requests:
        print(f"{given.requests - accounted} requests are not accounted for")
    flat = grown <= max(FLAT_MIB, FLAT_SHARE * middle)
    return not counts.wrong and not counts.lost and accounted >= given.requests and flat


def beside_llama_cpp(url: str, base: str, adapters: dict[str, Path], scratch: Path, given: argparse.Namespace) -> None:
    """Requests a second of both servers, in rounds one after the other."""
    from deltaw.export.formats import export
    from deltaw.hub.folders import resolve

    files = []
    for name, folder in adapters.items():
        files.append(str(scratch / f"{name}.gguf"))
        export(str(folder), "gguf-adapter", files[-1], model=base, say=lambda line: None)
    rival = Path(__file__).with_name("serve_rival.py")
    command = [
        sys.executable,
        str(rival),
        str(resolve(base).location),
        str(given.rival_clients),
        str(given.threads),
        *files,
    ]
    with started(command, {}) as (other, process):
        ratios = []
        for number in range(given.rounds + 1):
            ours, theirs = (asyncio.run(rate(u, list(adapters), u == other, given)) for u in (url, other))
            if number:  # the first one warms up
                ratios.append(ours / theirs)
                both = f"deltaw {ours:.2f} requests/s, llama.cpp {theirs:.2f}"
                print(f"round {number}: {both}, ratio {ratios[-1]:.2f}", flush=True)
        process.kill()
    ratios.sort()
    print(
        f"{len(adapters)} adapters in turn, {given.rival_clients} clients, {given.rival_tokens} tokens: "
        f"{ratios[len(ratios) // 2]:.2f} times llama.cpp's requests a second (median of {len(ratios)} rounds)"
    )


async def rate(url: str, adapters: list[str], is_rival: bool, given: argparse.Namespace) -> float:
    """Requests a second over a round; each has its own prompt and the next of the adapters."""
    texts = prompts(given.rival_requests)
    waiting = iter(range(given.rival_requests))

    async def client() -> None:
        async with client_of(url) as http:
            for number in waiting:
                place = number % len(adapters)
                body: dict[str, object] = {"prompt": texts[number], "max_tokens": given.rival_tokens}
                body |= {"temperature": 0, "ignore_eos": True, "model": "base" if is_rival else adapters[place]}
                if is_rival:
                    body["lora"] = [{"id": place, "scale": 1.0}]
                await asked(http, body, given.rival_tokens)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(given.rival_clients)))
    return given.rival_requests / (time.perf_counter() - began)


async def asked(http: httpx.AsyncClient, body: dict[str, object], tokens: int) -> None:
    """One request, which must bring as many tokens as it asked for."""
    answer = await http.post("/v1/completions", json=body)
    answer.raise_for_status()
    written = answer.json()["usage"]["completion_tokens"]
    if written != tokens:
        raise SystemExit(f"{written} tokens instead of {tokens}: {answer.text[:300]}")


if __name__ == "__main__":
    main()
