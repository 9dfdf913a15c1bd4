"""Greedy completions and token counts of llama.cpp, which runs in a child process.

llama.cpp aborts its process if a file is invalid, so it must not run in the process of a test. Run as a program, this
module reads a request as JSON from standard input and prints the response as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

SPECIAL = 4  # number of special tokens, which have the lowest ids in every tokenizer of these tests
ROOT = Path(__file__).parent.parent.parent


def request(message: dict[str, Any], seconds: float = 300) -> dict[str, Any]:
    """Start llama.cpp, send it a request and return the response of :func:`answer`.

    Raises:
        RuntimeError: if the process failed. The message contains the last lines of its output.
    """
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.export.llama_cpp"]
    text = {"input": json.dumps(message), "text": True}
    options = {"errors": "replace", "env": {**os.environ, "PYTHONPATH": paths}, "cwd": ROOT, "check": False}
    process = subprocess.run(command, capture_output=True, timeout=seconds, **text, **options)
    lines = [line for line in process.stdout.splitlines() if line.startswith('{"llama.cpp":')]
    if process.returncode or not lines:
        raise RuntimeError(f"llama.cpp exited with status {process.returncode}:\n{process.stderr[-2000:]}")
    return json.loads(lines[-1])["llama.cpp"]


def greedy(model: Path, prompts: list[list[int]], tokens: int, lora: Path | None = None) -> list[list[int]]:
    """Return the ids that llama.cpp generates for each prompt of ids, without special tokens."""
    message = {"model": str(model), "prompts": prompts, "tokens": tokens, "lora": lora and str(lora)}
    return request({**message, "never": list(range(SPECIAL))})["answers"]


def top_logprobs(
    model: Path, contexts: list[list[int]], count: int, lora: Path | None = None
) -> list[dict[int, float]]:
    """Return the log-probabilities of the ``count`` most likely tokens after each context of ids."""
    message = {"model": str(model), "prompts": contexts, "tokens": 1, "lora": lora and str(lora)}
    positions = request({**message, "likeliest": count})["likeliest"]
    return [{int(token): value for token, value in pairs} for pairs in positions]


def about_images(
    model: Path,
    vision: Path,
    prompts: list[tuple[str, str, str]],
    tokens: int,
    lora: Path | None = None,
    *,
    ignore_eos: bool = True,
) -> list[list[int]]:
    """Return the ids that llama.cpp generates greedily for each prompt.

    Args:
        vision: File with the vision tower.
        prompts: Text before the image, encoded image in base64, and text after it.
        ignore_eos: Never generate the end of the text.
    """
    message = {"model": str(model), "prompts": prompts, "tokens": tokens, "lora": lora and str(lora)}
    return request({**message, "vision": str(vision), "ignore_eos": ignore_eos})["answers"]


def answer(message: dict[str, Any]) -> dict[str, Any]:
    """Continue each of ``prompts`` (ids or texts) greedily by ``tokens`` tokens.

    If ``likeliest`` is set, also return that number of most likely first tokens with their log-probabilities. If
    ``vision`` is set, the prompts are images with a text before and after each.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = message["model"]
    parameters.n_ctx = 512
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.verbosity = 0
    parameters.warmup = False
    # fp32 keys and values. The default rounds them to fp16.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if message.get("lora"):
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(message["lora"], 1.0)]
    if message.get("vision"):
        parameters.mmproj.path = message["vision"]
        os.environ["LLAMA_MEDIA_MARKER"] = "<__media__>"  # random by default
    server = xllamacpp.Server(parameters)
    if message.get("vision"):
        return {"answers": [_about_image(server.listening_address, *prompt, message) for prompt in message["prompts"]]}
    answers = []
    prompts = []
    top_tokens = []
    options = {"n_predict": message["tokens"], "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    options |= {"logit_bias": [[token, False] for token in message.get("never", [])], "verbose": True}
    options |= {"logprobs": message["likeliest"]} if message.get("likeliest") else {}
    for prompt in message["prompts"]:
        response = server.handle_completions({"prompt": prompt, "return_tokens": True, **options})
        response = response if isinstance(response, dict) else json.loads(response)
        if "tokens" not in response.get("__verbose", {}):
            raise RuntimeError(f"{list(response)} {str(response)[:500]}")
        answers.append(response["__verbose"]["tokens"])
        prompts.append(response["usage"]["prompt_tokens"])
        if message.get("likeliest"):
            top = response["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            top_tokens.append([[each["id"], each["logprob"]] for each in top])
    return {"answers": answers, "prompt_tokens": prompts, "likeliest": top_tokens}


def _about_image(address: str, before: str, image: str, after: str, message: dict[str, Any]) -> list[int]:
    prompt = {"prompt_string": f"{before}<__media__>{after}", "multimodal_data": [image]}
    options = {"n_predict": message["tokens"], "temperature": 0, "cache_prompt": False}
    options["ignore_eos"] = message["ignore_eos"]
    content = json.dumps({"prompt": prompt, "return_tokens": True, **options}).encode()
    query = urllib.request.Request(f"{address}/completion", content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(query) as response:
        return json.load(response)["tokens"]


if __name__ == "__main__":
    response = answer(json.load(sys.stdin))
    print(json.dumps({"llama.cpp": response}), flush=True)
    os._exit(0)  # the library's threads may abort during interpreter shutdown
