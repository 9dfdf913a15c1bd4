"""Text generation with vLLM on CUDA devices. vLLM is optional (``pip install vllm``).

vLLM loads the base model from its files. Adapters are written to temporary folders in PEFT's format, with a single rank
and with the scaling multiplied into B, so there is no option of an adapter that vLLM could ignore.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deltaw.atomic_files import write_text
from deltaw.decoding.attached_adapter import attached_factors
from deltaw.decoding.model import AdaptedModel
from deltaw.decoding.probes import NotDecodable
from deltaw.decoding.request import TokenLogprob, UnsupportedError
from deltaw.decoding.sampling import MAX_LOGPROBS, MIN_LOGPROB
from deltaw.decoding.sequences import SequenceScheduler, SequenceState
from deltaw.errors import UserError
from deltaw.lora.files import CONFIG_NAME, WEIGHTS_NAME, Factors
from deltaw.lora.kinds import get_output_head
from deltaw.lora.peft_format import DEFAULTS, PREFIX
from deltaw.lora.stored import weight_shape
from deltaw.tensor_files import save_tensors

# Factors by the names of layers.
Layers = Mapping[str, Factors]
# Values that vLLM accepts as maximum rank.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Fraction of the free GPU memory for keys and values.
_CACHE_SHARE = 0.25
# Sampling parameters with the same name and meaning in vLLM.
_SHARED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def prefers_vllm(session: AdaptedModel) -> bool:
    """True if vLLM should generate if it supports the model."""
    return session.sampler == "vllm" or (session.sampler == "auto" and session.model.device.type == "cuda")


def session_layers(session: AdaptedModel, name: str | None) -> dict[str, Layers]:
    """Return the factors of the session's current adapter under ``name``. Empty if ``name`` is None.

    Raises:
        NotDecodable: if the adapter contains more than LoRA factors.
    """
    layers = {} if name is None else attached_factors(session.model)
    if isinstance(layers, str):
        raise NotDecodable(layers)
    return {} if name is None else {name: layers}


class VLLMScheduler(SequenceScheduler):
    """Scheduler that decodes with vLLM, which batches requests continuously and reuses prefixes of prompts.

    Args:
        session: Inference session of the base model.
        adapters: Factors of adapters by name. :meth:`set_adapter` may replace them.
        cache_bytes: Memory for keys and values, or None for a quarter of the free GPU memory.

    Raises:
        NotDecodable: if vLLM does not support the model or an adapter.
    """

    scores_prompts = False

    def __init__(self, session: AdaptedModel, adapters: Mapping[str, Layers], cache_bytes: int | None = None) -> None:
        model = session.model
        _require_supported(session, adapters)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        free, total = torch.cuda.mem_get_info(model.device)
        size = 1.2 * sum(parameter.nbytes for parameter in model.parameters()) + _CACHE_SHARE * free
        options: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch."), "logprobs_mode": "raw_logprobs"}
        options |= {"gpu_memory_utilization": min(0.9 * free, size) / total, "kv_cache_memory_bytes": cache_bytes}
        options |= {"max_logprobs": MAX_LOGPROBS, "max_model_len": -1}  # -1: as many positions as fit into the cache
        if adapters:
            rank = max(factors.lora_A.shape[1] for layers in adapters.values() for factors in layers.values())
            max_rank = next((supported for supported in _RANKS if supported >= rank), rank)
            options |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": max_rank}
        try:
            import vllm
            from vllm.lora.request import LoRARequest
            from vllm.sampling_params import RequestOutputKind

            self._engine = vllm.LLM(str(model.name_or_path), enable_prefix_caching=True, **options).llm_engine
        except Exception as error:  # vLLM reports missing support, invalid files and a lack of memory in many ways
            raise NotDecodable(f"vLLM cannot load the model: {_first_line(error)}") from error
        self._params = vllm.SamplingParams
        self._lora_request = LoRARequest
        self._delta = RequestOutputKind.DELTA
        num_tokens = weight_shape(model.get_input_embeddings())[0]
        head = get_output_head(model)
        vocabulary = num_tokens if head is None else weight_shape(head)[0]
        super().__init__(num_tokens, vocabulary, self._engine.model_config.max_model_len)
        self._folder = tempfile.TemporaryDirectory(prefix="deltaw-vllm-")
        self._numbers = itertools.count(1)
        self._adapters: dict[str, Any] = {}
        self._requests: dict[str, SequenceState] = {}  # by vLLM's name of the request
        for name, layers in adapters.items():
            self.set_adapter(name, layers)

    def set_adapter(self, name: str, layers: Layers) -> None:
        """Set the factors of an adapter.

        Raises:
            NotDecodable: if vLLM rejects the adapter.
        """
        number = next(self._numbers)  # vLLM identifies cached prefixes by the adapter's name and path
        folder = Path(self._folder.name, str(number))
        _save_adapter(folder, layers)
        previous = self._adapters.get(name)
        request = self._lora_request(f"{name}-{number}", number, str(folder))
        try:
            if previous is not None:
                self._engine.remove_lora(previous.lora_int_id)
                Path(previous.lora_path, WEIGHTS_NAME).unlink()
            self._engine.add_lora(request)
        except Exception as error:
            raise NotDecodable(f"vLLM cannot load the adapter: {_first_line(error)}") from error
        self._adapters[name] = request

    def step(self) -> None:
        """Start queued requests and run one step of vLLM."""
        now = time.monotonic()
        self.sweep_waiting(now)
        while self.waiting:
            self._start(self.waiting.popleft())
        for sequence in self._requests.values():
            self.end(sequence, sequence.stop_reason(now))
        self._remove_finished()
        for output in self._engine.step() if self._requests else ():
            if (running := self._requests.get(output.request_id)) is not None:
                self._receive(running, output)
        self._remove_finished()

    def _remove_finished(self) -> None:
        """Remove finished requests, and abort those that vLLM still runs."""
        finished = [name for name, sequence in self._requests.items() if sequence.handle.done]
        self._engine.abort_request(finished)
        self._requests = {name: sequence for name, sequence in self._requests.items() if name not in finished}
        self.running = list(self._requests.values())

    def _start(self, sequence: SequenceState) -> None:
        if not sequence.token_limit:
            sequence.finish("length")
            return
        if sequence.matcher is not None:
            message = "constraints are not supported with vLLM"
            hint = "use --sampler transformers"
            self.end(sequence, UnsupportedError(message, location="constraint", hint=hint))
            return
        request = sequence.request
        sampling = sequence.request.sampling
        name = f"request-{next(self._numbers)}"
        adapter = None if request.adapter is None else self._adapters[request.adapter]
        options = {key: getattr(sampling, key) for key in _SHARED} | {"logprobs": sampling.logprobs}
        # All terminators are stop tokens. Seeds have 63 bits, because -1 means no seed.
        options |= {"ignore_eos": True, "stop_token_ids": sorted(sequence.terminators), "seed": sampling.seed % 2**63}
        options |= {"logit_bias": dict(sampling.logit_bias) or None, "detokenize": False, "output_kind": self._delta}
        try:
            sequence.prepare(None)
            params = self._params(max_tokens=sequence.token_limit, **options)
            prompt = {"type": "token", "prompt_token_ids": np.asarray(request.tokens).tolist()}
            prompt["cache_salt"] = str(request.owner)  # prefixes are never shared between owners
            self._engine.add_request(name, prompt, params, lora_request=adapter)
            self._requests[name] = sequence
        except Exception as error:  # for example a temperature above 2; affects only this sequence
            self.end(sequence, UserError(f"vLLM rejected the request: {_first_line(error)}", location="sampling"))

    def _receive(self, sequence: SequenceState, output: Any) -> None:
        """Append new tokens of a request."""
        completion = output.outputs[0]
        top = sequence.request.sampling.logprobs
        for index, token in enumerate(completion.token_ids):
            logprob = None
            if top is not None:
                entries = sorted(completion.logprobs[index].items(), key=lambda entry: entry[1].rank)
                values = {key: max(float(entry.logprob), MIN_LOGPROB) for key, entry in entries}
                logprob = TokenLogprob(token, values[token], tuple(values.items())[:top])
            self.append(sequence, token, logprob)
        self.end(sequence, "length" if output.finished else None)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _require_supported(session: AdaptedModel, adapters: Mapping[str, Layers]) -> None:
    """Raise NotDecodable if vLLM would generate with other weights, or without a part of an adapter."""
    model = session.model
    method = session.method if adapters else None
    types = {tensor.dtype for tensor in itertools.chain(model.parameters(), model.buffers())}
    head = {id(module) for module in (get_output_head(model), model.get_input_embeddings())}
    outer = {name for name, module in model.named_modules(remove_duplicate=False) if id(module) in head}
    reasons = {
        "vLLM needs a CUDA device": model.device.type != "cuda",
        "vLLM runs only on the first GPU": model.device.index not in (None, 0),
        "vLLM is not installed (pip install vllm)": importlib.util.find_spec("vllm") is None,
        "vLLM is used only for text models": session.text_tokenizer is None,
        "vLLM would load the weights without quantization": bool(types & {torch.int8, torch.uint8}),
        "vLLM supports only adapters of the method lora": not all(adapters.values()),
        "vLLM would apply the adapter to all tokens": method is not None and method.invocation is not None,
        "vLLM needs bf16 or fp16 weights for adapters": bool(adapters) and model.dtype == torch.float32,
        "vLLM does not adapt embeddings and heads": any(outer & layers.keys() for layers in adapters.values()),
    }
    if (reason := next((text for text, applies in reasons.items() if applies), None)) is not None:
        raise NotDecodable(reason)


def _save_adapter(folder: Path, layers: Layers) -> None:
    """Save factors as a PEFT adapter with alpha equal to the rank."""
    rank = max(factors.lora_A.shape[1] for factors in layers.values())
    tensors = {}
    for name, factors in layers.items():
        padding = rank - factors.lora_A.shape[1]
        scaled = factors.lora_B * factors.scaling
        tensors[f"{PREFIX}{name}.lora_A.weight"] = nn.functional.pad(factors.lora_A, (0, padding)).t().cpu()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(scaled, (0, 0, 0, padding)).t().cpu()
    folder.mkdir()
    save_tensors(
        folder / WEIGHTS_NAME, {name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"}
    )
    targets = sorted({name.rpartition(".")[2] for name in layers})
    write_text(folder / CONFIG_NAME, json.dumps(DEFAULTS | {"r": rank, "lora_alpha": rank, "target_modules": targets}))
