"""llama.cpp, in a process of its own: what it answers, greedily, and how it splits a text into tokens.

It aborts its process where a file does not fit, so a test must not share one with it. Run as a program, it
reads a question as JSON on standard input and prints the answer as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SPECIAL = 4  # ids below are special tokens, in every tokenizer of these tests
ROOT = Path(__file__).parent.parent.parent


def ask(question: dict[str, Any], seconds: float = 300) -> dict[str, Any]:
    """Start llama.cpp and ask it; see :func:`answer`.

    Raises:
        RuntimeError: its process failed; with the end of what it printed.
    """
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command, text = [sys.executable, "-m", "tests.export.llama_cpp"], {"input": json.dumps(question), "text": True}
    how = {"errors": "replace", "env": {**os.environ, "PYTHONPATH": paths}, "cwd": ROOT, "check": False}
    done = subprocess.run(command, capture_output=True, timeout=seconds, **text, **how)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"llama.cpp":')]
    if done.returncode or not lines:
        raise RuntimeError(f"llama.cpp ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1])["llama.cpp"]


def greedy(model: Path, prompts: list[list[int]], tokens: int, lora: Path | None = None) -> list[list[int]]:
    """The ids that llama.cpp writes after each prompt of ids; none of a special token."""
    question = {"model": str(model), "prompts": prompts, "tokens": tokens, "lora": lora and str(lora)}
    return ask({**question, "never": list(range(SPECIAL))})["answers"]


def likeliest(model: Path, contexts: list[list[int]], count: int, lora: Path | None = None) -> list[dict[int, float]]:
    """The ``count`` likeliest tokens after each context of ids, with their log-probabilities."""
    question = {"model": str(model), "prompts": contexts, "tokens": 1, "lora": lora and str(lora)}
    found = ask({**question, "likeliest": count})["likeliest"]
    return [{int(token): value for token, value in each} for each in found]


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """``prompts`` (ids or texts) are continued by ``tokens`` tokens, the likeliest each time.

    With ``likeliest``, also so many of the likeliest tokens in the place of the first one, with their
    log-probabilities.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = question["model"]
    parameters.n_ctx = 512
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.verbosity = 0
    parameters.warmup = False
    # Keys and values as exact as the weights: by default they are rounded to fp16.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if question.get("lora"):
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(question["lora"], 1.0)]
    server = xllamacpp.Server(parameters)
    answers, prompts, places = [], [], []
    asked = {"n_predict": question["tokens"], "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    asked |= {"logit_bias": [[token, False] for token in question.get("never", [])], "verbose": True}
    asked |= {"logprobs": question["likeliest"]} if question.get("likeliest") else {}
    for prompt in question["prompts"]:
        found = server.handle_completions({"prompt": prompt, "return_tokens": True, **asked})
        found = found if isinstance(found, dict) else json.loads(found)
        if "tokens" not in found.get("__verbose", {}):
            raise RuntimeError(f"{list(found)} {str(found)[:500]}")
        answers.append(found["__verbose"]["tokens"])
        prompts.append(found["usage"]["prompt_tokens"])
        if question.get("likeliest"):
            top = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            places.append([[each["id"], each["logprob"]] for each in top])
    return {"answers": answers, "prompt_tokens": prompts, "likeliest": places}


if __name__ == "__main__":
    found = answer(json.load(sys.stdin))
    print(json.dumps({"llama.cpp": found}), flush=True)
    os._exit(0)  # the library's own threads may abort while the interpreter ends
