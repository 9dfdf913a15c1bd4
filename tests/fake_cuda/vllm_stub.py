"""Stand-in for vLLM 0.33: signatures and checks of the functions that deltaw calls, over transformers on the CPU.

Like vLLM, it identifies adapters by id and cached prefixes by the adapter's name and path, rejects unknown arguments
and unsupported adapters, and returns terminators among the tokens.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        assert self.seed is None or -(2**63) <= self.seed < 2**63  # int64 on the device
        self.seed = None if self.seed == -1 else self.seed


@dataclass(eq=False)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        assert self.lora_path


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: LoRARequest | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class _Request:
    prompt: list[int]
    params: SamplingParams
    lora: LoRARequest | None
    salt: str | None
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.params.seed or 0)


def _add_update(factors_A, factors_B, module, inputs, output):
    return output + inputs[0] @ factors_A.T @ factors_B.T


class LLMEngine:
    """Engine that loads up to ``max_loras`` adapters, at the latest when a request needs them."""

    def __init__(self, model: PreTrainedModel, max_model_len: int, max_loras: int, max_rank: int, max_logprobs: int):
        self.model_config = SimpleNamespace(max_model_len=max_model_len)
        self._base = model
        self._max_loras = max_loras
        self._max_rank = max_rank
        self._max_logprobs = max_logprobs
        self._adapted: dict[int, PreTrainedModel] = {}
        self.prefixes: dict[tuple, torch.Tensor] = {}
        self.requests: dict[str, _Request] = {}
        self.max_concurrent = 0

    def add_request(
        self,
        request_id: str,
        prompt: dict[str, Any],
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: LoRARequest | None = None,
    ) -> str:
        tokens = prompt["prompt_token_ids"]
        salt = prompt.get("cache_salt")
        assert prompt["type"] == "token" and (salt is None or salt)
        if len(tokens) >= self.model_config.max_model_len:
            raise ValueError(f"The decoder prompt (length {len(tokens)}) is longer than the maximum model length.")
        if (params.logprobs or 0) > self._max_logprobs:
            raise ValueError(f"Requested sample logprobs of {params.logprobs}, which is greater than max allowed")
        if lora_request is not None and not self._max_loras:
            raise ValueError(f"Got lora_request {lora_request} but LoRA is not enabled!")
        assert params.output_kind == RequestOutputKind.DELTA and not params.detokenize and params.ignore_eos
        self.requests[request_id] = _Request(tokens, params, lora_request, salt)
        return request_id

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        for name in request_ids:
            self.requests.pop(name, None)

    def add_lora(self, lora_request: LoRARequest) -> bool:
        if lora_request.lora_int_id in self._adapted:
            return False
        folder = Path(lora_request.lora_path)
        config = json.loads((folder / "adapter_config.json").read_text())
        unsupported = [key for key in ("use_dora", "modules_to_save", "lora_bias") if config.get(key)]
        if unsupported or config["bias"] != "none" or config["r"] > self._max_rank:
            raise ValueError(f"unsupported adapter: {unsupported}, rank {config['r']}")
        model = copy.deepcopy(self._base)
        factors = load_file(folder / "adapter_model.safetensors")
        names = {key.rsplit(".lora_", 1)[0] for key in factors}
        for name in names:
            module = model.get_submodule(name.removeprefix("base_model.model."))
            if module.weight.dtype == torch.float32:
                raise AssertionError("inputs.dtype in [torch.float16, torch.bfloat16]")
            assert name.rsplit(".", 1)[-1] in config["target_modules"]
            factors_A, factors_B = (factors[f"{name}.lora_{part}.weight"].to(module.weight.dtype) for part in "AB")
            scaled = config["lora_alpha"] / config["r"] * factors_B
            module.register_forward_hook(partial(_add_update, factors_A, scaled))
        while len(self._adapted) >= self._max_loras:
            del self._adapted[next(iter(self._adapted))]
        self._adapted[lora_request.lora_int_id] = model
        return True

    def remove_lora(self, lora_id: int) -> bool:
        return self._adapted.pop(lora_id, None) is not None

    def list_loras(self) -> set[int]:
        return set(self._adapted)

    def step(self) -> list[RequestOutput]:
        self.max_concurrent = max(
            self.max_concurrent, len({r.lora and r.lora.lora_name for r in self.requests.values()})
        )
        return [self._advance(name, request) for name, request in list(self.requests.items())]

    def _advance(self, name: str, request: _Request) -> RequestOutput:
        logits = self._logits(request)
        params = request.params
        logprobs = logits.log_softmax(-1)  # raw_logprobs
        if params.temperature == 0:
            token = int(logits.argmax())
        else:
            scaled = logits / params.temperature
            if params.top_k:
                scaled[scaled < scaled.topk(params.top_k).values[-1]] = -torch.inf
            token = int(torch.multinomial(scaled.softmax(-1), 1, generator=request.random))
        request.tokens.append(token)
        entries = None
        if params.logprobs is not None:
            ids = dict.fromkeys([token, *logprobs.topk(params.logprobs).indices.tolist()])
            entries = [{i: Logprob(float(logprobs[i]), int((logprobs > logprobs[i]).sum()) + 1) for i in ids}]
        reason = "stop" if token in (params.stop_token_ids or ()) else None
        length = len(request.prompt) + len(request.tokens)
        if reason is None and (len(request.tokens) == params.max_tokens or length == self.model_config.max_model_len):
            reason = "length"
        if reason:
            del self.requests[name]
        output = CompletionOutput(
            0, "", [token], None, entries, reason, token if reason == "stop" else None, request.lora
        )
        return RequestOutput(name, request.prompt, [output], reason is not None)

    def _logits(self, request: _Request) -> torch.Tensor:
        tokens = [*request.prompt, *request.tokens]
        model = self._base
        if request.lora is not None:
            self.add_lora(request.lora)
            model = self._adapted[request.lora.lora_int_id]
        adapter = request.lora and (request.lora.lora_name, request.lora.lora_path)
        key = adapter, request.salt, tuple(tokens)
        if key not in self.prefixes:
            with torch.no_grad():
                self.prefixes[key] = model(torch.tensor([tokens])).logits[0, -1].float()
        return self.prefixes[key].clone()


class LLM:
    """Offline entry point. ``instances`` contains all created objects."""

    instances: ClassVar[list[LLM]] = []

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        kv_cache_memory_bytes: int | None = None,
        max_model_len: int | None = None,
        enable_prefix_caching: bool | None = None,
        max_logprobs: int = 20,
        logprobs_mode: str = "raw_logprobs",
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
    ) -> None:
        assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512) and 0 < gpu_memory_utilization <= 1
        assert logprobs_mode == "raw_logprobs"
        free, total = torch.cuda.mem_get_info()
        if gpu_memory_utilization * total > free:
            raise ValueError(f"Free memory on device is {free}, less than desired GPU memory utilization")
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        limit = loaded.config.max_position_embeddings
        length = limit if max_model_len in (None, -1) else max_model_len
        if length > limit:
            raise ValueError(f"User-specified max_model_len ({length}) is greater than the derived max_model_len")
        self.llm_engine = LLMEngine(loaded, length, max_loras if enable_lora else 0, max_lora_rank, max_logprobs)
        LLM.instances.append(self)


def modules() -> dict[str, ModuleType]:
    """Return the stub's modules by name, for ``sys.modules``."""
    stub = ModuleType("vllm")
    lora = ModuleType("vllm.lora")
    request = ModuleType("vllm.lora.request")
    stub.__spec__ = ModuleSpec("vllm", None)
    stub.__path__ = []
    stub.LLM = LLM
    stub.SamplingParams = SamplingParams
    request.LoRARequest = LoRARequest
    return {
        "vllm": stub,
        "vllm.lora": lora,
        "vllm.lora.request": request,
        "vllm.sampling_params": sys.modules[__name__],
    }
