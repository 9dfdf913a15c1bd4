"""Text generation with vLLM on CUDA devices. vLLM is optional (``pip install vllm``).

vLLM loads the files of the base model itself and reads adapters from folders in PEFT's format. The folders are written
with a single rank and with scalings folded into B, so vLLM can drop no feature of an adapter. Log-probabilities of
sampled tokens are compared with the model's own each time an adapter is set.
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
from torch import Tensor, nn

from deltaw.atomic_files import write_text
from deltaw.decoding.decodable import eval_mode, tolerance
from deltaw.decoding.generation import position_limit
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

Layers = Mapping[str, Factors]
# Maximum ranks that vLLM supports.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Fraction of the free GPU memory for keys and values.
_CACHE_SHARE = 0.25
# Mean difference of log-probabilities that rounding explains, since vLLM's attention may use TF32 for fp32.
_MIN_TOLERANCE = 0.01
# Verification: number of prompts, tokens per prompt, and sampled tokens per prompt.
_ROWS, _PROMPT, _SAMPLED = 4, 16, 16
# Sampling parameters with the same name and meaning in vLLM.
_SHARED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def prefers_vllm(session: AdaptedModel) -> bool:
    """True if the model should generate with vLLM, if possible."""
    return session.sampler == "vllm" or (session.sampler == "auto" and session.model.device.type == "cuda")


class VLLMScheduler(SequenceScheduler):
    """Scheduler that decodes with vLLM, which batches requests continuously and reuses prefixes of prompts.

    Args:
        session: Inference session of the base model.
        adapters: Factors by the names of layers, by the name of the adapter. More adapters may not be added later.
        positions: Maximum number of tokens of a sequence, or None for the largest number that fits into memory.
        cache_bytes: Memory for keys and values, or None for a quarter of the free GPU memory.

    Raises:
        NotDecodable: if vLLM does not support the model or an adapter, or its log-probabilities differ.
    """

    scores_prompts = False

    def __init__(
        self,
        session: AdaptedModel,
        adapters: Mapping[str, Layers],
        *,
        positions: int | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        model, limit = session.model, position_limit(session.model)
        _require_supported(session, adapters)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        free, total = torch.cuda.mem_get_info(model.device)
        size = 1.2 * sum(parameter.nbytes for parameter in model.parameters()) + _CACHE_SHARE * free
        options: dict[str, Any] = {"kv_cache_memory_bytes": cache_bytes, "logprobs_mode": "raw_logprobs"}
        if positions is not None:
            options["max_model_len"] = positions if limit is None else min(positions, limit)
        if adapters:
            rank = max(factors.lora_A.shape[1] for layers in adapters.values() for factors in layers.values())
            max_rank = next(supported for supported in _RANKS if supported >= rank)
            options |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": max_rank}
        try:
            import vllm  # type: ignore[import-not-found, unused-ignore]
            from vllm.lora.request import LoRARequest  # type: ignore[import-not-found, unused-ignore]
            from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found, unused-ignore]

            self._llm = vllm.LLM(
                model.name_or_path,
                dtype=str(model.dtype).removeprefix("torch."),
                gpu_memory_utilization=min(0.9 * free, size) / total,
                enable_prefix_caching=True,
                max_logprobs=MAX_LOGPROBS,
                max_model_len=options.pop("max_model_len", -1),
                **options,
            )
        except Exception as error:  # vLLM reports missing support, invalid files and a lack of memory in many ways
            raise NotDecodable(f"vLLM does not load the model: {_first_line(error)}") from error
        self._vllm, self._lora_request, self._delta = vllm, LoRARequest, RequestOutputKind.DELTA
        self._engine = self._llm.llm_engine
        num_tokens, head = weight_shape(model.get_input_embeddings())[0], get_output_head(model)
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
        # vLLM identifies cached prefixes by name and path, so both are new.
        number = next(self._numbers)
        folder = Path(self._folder.name) / str(number)
        folder.mkdir()
        _save_adapter(folder, layers)
        request = self._lora_request(f"{name}-{number}", number, str(folder))
        try:
            if (previous := self._adapters.pop(name, None)) is not None:
                self._engine.remove_lora(previous.lora_int_id)
            self._engine.add_lora(request)
        except Exception as error:
            raise NotDecodable(f"vLLM does not load the adapter: {_first_line(error)}") from error
        self._adapters[name] = request

    def verify(self, session: AdaptedModel, name: str | None) -> str:
        """Compare the log-probabilities of sampled tokens with those of the session's model in its current state.

        Args:
            session: The session.
            name: Adapter of the session's current state, or None for the base model.

        Returns:
            Result as text.

        Raises:
            NotDecodable: if they differ by more than the precision explains.
        """
        shape, generator = (_ROWS, _PROMPT), torch.Generator().manual_seed(1)
        prompts = torch.randint(0, self.num_tokens, shape, generator=generator).tolist()
        common = {"max_tokens": _SAMPLED, "ignore_eos": True, "detokenize": False, "logprobs": 0}
        params = [self._vllm.SamplingParams(temperature=1.0, seed=seed, **common) for seed in range(_ROWS)]
        inputs, adapter = [{"prompt_token_ids": prompt} for prompt in prompts], self._adapters.get(name or "")
        outputs = [o.outputs[0] for o in self._llm.generate(inputs, params, use_tqdm=False, lora_request=adapter)]
        sampled = torch.tensor([list(output.token_ids) for output in outputs])
        logprobs = [[entry[t].logprob for t, entry in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs]
        tokens = torch.cat((torch.tensor(prompts), sampled), 1).to(session.model.device)
        with eval_mode(session.model):
            expected = session.model(tokens).logits[:, _PROMPT - 1 : -1].float().log_softmax(-1)
        expected = expected.gather(-1, tokens[:, _PROMPT:, None])[..., 0].cpu()
        error = float((expected - torch.tensor(logprobs)).abs().mean())
        if not error <= max(_MIN_TOLERANCE, tolerance(session.model)):
            raise NotDecodable(f"vLLM's log-probabilities differ from the model's by {error:.1e} on average")
        return f"vLLM: log-probabilities equal the model's own (mean difference {error:.1e})"

    def step(self) -> None:
        """Start queued requests and run one step of vLLM."""
        now = time.monotonic()
        self.sweep_waiting(now)
        while self.waiting:
            self._start(self.waiting.popleft())
        for sequence in self._requests.values():
            self.end(sequence, sequence.stop_reason(now))
        self._remove_finished()
        if self._requests:
            for output in self._engine.step():
                if output.request_id in self._requests:
                    self._receive(self._requests[output.request_id], output)
            self._remove_finished()
        self.running = list(self._requests.values())

    def _remove_finished(self) -> None:
        """Remove requests that have finished, from vLLM too if they ended early."""
        finished = [name for name, sequence in self._requests.items() if sequence.handle.done]
        if finished:
            self._engine.abort_request(finished)
        for name in finished:
            del self._requests[name]

    def _start(self, sequence: SequenceState) -> None:
        request, name = sequence.request, f"request-{next(self._numbers)}"
        sampling = request.sampling
        if not sequence.token_limit:
            sequence.finish("length")
            return
        try:
            if sequence.matcher is not None:
                message, hint = "constraints are unavailable when vLLM generates", "use --sampler transformers"
                raise UnsupportedError(message, location="constraint", hint=hint)
            sequence.prepare(None)
            params = self._vllm.SamplingParams(
                **{key: getattr(sampling, key) for key in _SHARED},
                logprobs=sampling.logprobs,
                logit_bias=dict(sampling.logit_bias) or None,
                seed=sampling.seed % 2**63,  # vLLM's seeds have 64 bits with a sign, and -1 means no seed
                max_tokens=sequence.token_limit,
                stop_token_ids=sorted(sequence.terminators),
                ignore_eos=True,  # all terminators are above
                detokenize=False,
                output_kind=self._delta,
            )
            adapter = None if request.adapter is None else self._adapters[request.adapter]
            prompt = {"prompt_token_ids": np.asarray(request.tokens).tolist()}
            self._engine.add_request(name, prompt, params, lora_request=adapter)
            self._requests[name] = sequence
        except ValueError as error:  # for example a temperature above 2
            self.end(sequence, UserError(f"vLLM rejects the request: {_first_line(error)}", location="sampling"))
        except Exception as error:  # affects only this sequence
            self.end(sequence, error)

    def _receive(self, sequence: SequenceState, output: Any) -> None:
        """Append new tokens of a request."""
        completion, top = output.outputs[0], sequence.request.sampling.logprobs
        for index, token in enumerate(completion.token_ids):
            if sequence.handle.done:
                return
            logprob = None if top is None else _token_logprob(completion.logprobs[index], token, top)
            self.tokens += 1
            try:
                sequence.append_token(token, logprob)
            except Exception as error:  # affects only this sequence
                self.end(sequence, error)
        if output.finished:
            self.end(sequence, "length")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:200]}"


def _token_logprob(entries: Mapping[int, Any], token: int, top: int) -> TokenLogprob:
    """Convert vLLM's log-probabilities of the most likely tokens and the sampled token at a position."""
    values = {key: max(float(entry.logprob), MIN_LOGPROB) for key, entry in entries.items()}
    ranked = sorted((entry.rank, key) for key, entry in entries.items() if entry.rank <= top)
    return TokenLogprob(token, values[token], tuple((key, values[key]) for _, key in ranked))


def _require_supported(session: AdaptedModel, adapters: Mapping[str, Layers]) -> None:
    """Raise NotDecodable if vLLM would generate with other weights, or without a part of an adapter."""
    model, method = session.model, session.method
    stored = {tensor.dtype for tensor in itertools.chain(model.parameters(), model.buffers())}
    head = {id(module) for module in (get_output_head(model), model.get_input_embeddings())}
    outer = {name for name, module in model.named_modules(remove_duplicate=False) if id(module) in head}
    adapts_outer = any(outer & layers.keys() for layers in adapters.values())
    ranks = [factors.lora_A.shape[1] for layers in adapters.values() for factors in layers.values()]
    reasons = {
        "vLLM needs a CUDA device": model.device.type != "cuda",
        "vLLM would use the first GPU": model.device.index not in (None, 0),
        "vLLM is not installed (pip install vllm)": importlib.util.find_spec("vllm") is None,
        "vLLM reads text only": session.text_tokenizer is None,
        "vLLM would use the weights without quantization": bool(stored & {torch.int8, torch.uint8}),
        "the model was not loaded from a folder": not Path(model.name_or_path or "", "config.json").is_file(),
        "vLLM supports only adapters of the method lora": method is not None and method.name != "lora",
        "vLLM would apply the adapter to all tokens": method is not None and method.invocation is not None,
        "vLLM needs bf16 or fp16 weights for adapters": bool(adapters) and model.dtype == torch.float32,
        "vLLM does not support adapted embeddings and heads": any(
            outer & layers.keys() for layers in adapters.values()
        ),
        f"vLLM supports ranks up to {_RANKS[-1]}": bool(ranks) and max(ranks) > _RANKS[-1],
        "vLLM does not support an adapter without layers": not all(adapters.values()),
    }
    if (reason := next((text for text, applies in reasons.items() if applies), None)) is not None:
        raise NotDecodable(reason)


def _save_adapter(folder: Path, layers: Layers) -> None:
    """Save factors as a PEFT adapter with alpha equal to the rank."""
    rank = max(factors.lora_A.shape[1] for factors in layers.values())
    tensors: dict[str, Tensor] = {}
    for name, factors in layers.items():
        padding = rank - factors.lora_A.shape[1]
        scaled = factors.lora_B * factors.scaling
        tensors[f"{PREFIX}{name}.lora_A.weight"] = nn.functional.pad(factors.lora_A, (0, padding)).t().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(scaled, (0, 0, 0, padding)).t().contiguous()
    save_tensors(folder / WEIGHTS_NAME, {name: tensor.cpu() for name, tensor in tensors.items()}, {"format": "pt"})
    targets = sorted({name.rsplit(".", 1)[-1] for name in layers})
    write_text(folder / CONFIG_NAME, json.dumps(DEFAULTS | {"r": rank, "lora_alpha": rank, "target_modules": targets}))
