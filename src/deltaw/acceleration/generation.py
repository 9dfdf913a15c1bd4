"""Generation with the decoding engine in place of transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaw.acceleration.accelerated_model import AcceleratedModel, Unsupported
from deltaw.acceleration.peft_layers import NotConvertible
from deltaw.acceleration.replaced_method import ReplacedMethod
from deltaw.acceleration.rows import NotPackable, spans_of_mask
from deltaw.acceleration.shared_copy import SharedCopy, frozen_values
from deltaw.decoding.adapters import ActiveAdapter, AdapterInfo, FixedAdapters
from deltaw.decoding.attached_adapter import Packer
from deltaw.decoding.batch import BatchLimits, RunningBatch
from deltaw.decoding.decodable import Decodable, build_decodable, eval_mode, logit_difference, tolerance
from deltaw.decoding.engine import Engine
from deltaw.decoding.generation import MAX_CONCURRENT_SAMPLES
from deltaw.decoding.probes import NotDecodable
from deltaw.decoding.request import Request, Sampling
from deltaw.errors import UserError
from deltaw.lora.files import Factors
from deltaw.lora.layers import LoRAConv1D, LoRALinear
from deltaw.machine.memory import release_free_memory

_NAME = "adapter"
# Number of tokens of the comparison with the model.
_SAMPLE = 24
# Settings of a generation that the engine supports or that do not change its tokens. Others must be unset.
_SUPPORTED = frozenset(
    {
        *("max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
        *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "use_cache", "disable_compile"),
        *("cache_implementation", "cache_config", "compile_config", "transformers_version", "_from_model_config"),
    }
)


class GenerateMethod(ReplacedMethod):
    """``generate`` of a language model, which samples from the same distribution with other random numbers.

    Args:
        model: The model.
        accelerated: Its shared copies.
        tokenizer: Tokenizer of the model.
    """

    def __init__(
        self, model: PreTrainedModel, accelerated: AcceleratedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__(model, "generate")
        self.accelerated = accelerated
        self.tokenizer = tokenizer
        self._decodable: Decodable | None = None
        self._packer: Packer | None = None
        self._weights: tuple[Any, ...] = ()
        self._number = 0

    def __call__(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        try:
            settings = _settings(self.module, generation_config)
            tokens, mask = _prompts(inputs, kwargs)
            return self._generate(tokens, mask, settings)
        except (Unsupported, NotPackable, NotConvertible, NotDecodable, UserError) as error:
            self.accelerated.report.count_fallback(f"generation: {error}")
            return self.original(inputs, generation_config, **kwargs)

    def _generate(self, tokens: Tensor, mask: Tensor, settings: Mapping[str, Any]) -> Tensor:
        prompts = [tokens[row, start:stop].numpy() for row, start, stop in spans_of_mask(mask.numpy() != 0)]
        new_tokens = int(settings["max_new_tokens"])
        length = max(map(len, prompts)) + new_tokens
        release_free_memory()
        engine = self._engine(length, len(prompts))
        terminators = _terminators(settings["eos_token_id"])
        seeds = torch.randint(0, 2**31, (len(prompts),)).tolist()
        common = {name: settings[name] for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
        requests = [
            Request(
                prompt, engine.session_adapter, Sampling(**common, seed=seed), None, new_tokens, stop_ids=terminators
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        try:
            results = engine.generate_all(requests)
        finally:
            engine.close(drain=False)
            release_free_memory()
        completions = [[*r.tokens.tolist(), *([] if r.terminator is None else [r.terminator])] for r in results]
        pad = settings["pad_token_id"]
        filled = torch.full((len(prompts), max(map(len, completions))), terminators[0] if pad is None else int(pad))
        for row, completion in enumerate(completions):
            filled[row, : len(completion)] = torch.tensor(completion, dtype=torch.long)
        return torch.cat([tokens, filled], 1)

    def _engine(self, length: int, count: int) -> Engine:
        """Return an engine for the current state of the model."""
        self.accelerated.current_copy()  # raises Unsupported for states that have no copy
        shared = SharedCopy(self.accelerated.model, None, {})
        shared.update()
        layers = _layers(shared.model)
        weights = frozen_values(self.accelerated.model)
        is_current = self._decodable is not None and self._decodable.positions >= length and weights == self._weights
        if self._decodable is None or self._packer is None or not is_current:
            base = SharedCopy(self.accelerated.model, None, {}, without_adapters=True)
            self._decodable = build_decodable(base.model.eval(), positions=length)
            self._packer = Packer(base.model, self._decodable)
            self._weights = weights
            self._number = 0
        decodable = self._decodable
        self._number += 1
        adapter = ActiveAdapter(self._number, AdapterInfo(0, None, ()), self._packer(layers) if layers else None)
        if self._number == 1:
            self._verify(decodable, shared.model, adapter)
        running = min(count, MAX_CONCURRENT_SAMPLES)
        pages = running * -(-length // decodable.decoder.page_tokens) + running
        adapters = FixedAdapters({_NAME: adapter})
        scheduler = RunningBatch(decodable, pages, adapters, BatchLimits(running))
        return Engine(scheduler, self.tokenizer, (), adapters, session_adapter=_NAME, why=decodable.why)

    def _verify(self, decodable: Decodable, model: PreTrainedModel, adapter: ActiveAdapter) -> None:
        """Compare logits with those of the model.

        Raises:
            NotDecodable: if they differ by more than rounding.
        """
        sample = torch.randint(0, decodable.entry.num_tokens, (_SAMPLE,), generator=torch.Generator().manual_seed(1))
        with eval_mode(model):
            error = logit_difference(decodable, model, adapter=adapter, tokens=sample[: decodable.positions])
        if not error < tolerance(model):
            raise NotDecodable(f"the decoder's logits differ from the model's by {error:.1e}")
        self.accelerated.report.accept("generation", f"decoding engine; logits differ by {error:.1e}")


def _layers(model: PreTrainedModel) -> dict[str, Factors]:
    """Return the factors of a shared copy by the names of its layers.

    Raises:
        Unsupported: if it has other trained parameters, which the decoder would not see.
    """
    layers: dict[str, Factors] = {}
    factors = set()
    for name, layer in model.named_modules():
        if type(layer) in (LoRALinear, LoRAConv1D):
            assert isinstance(layer, LoRALinear | LoRAConv1D)
            layers[name] = Factors(layer.lora_A.detach().float(), layer.lora_B.detach().float(), layer.scaling)
            factors |= {id(layer.lora_A), id(layer.lora_B)}
    if any(p.requires_grad and id(p) not in factors for p in model.parameters()):
        raise Unsupported("trained parameters other than low-rank factors")
    return layers


def _prompts(inputs: Tensor | None, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return token ids and mask (rows, columns) of the prompts, which end in the last column."""
    tokens = kwargs.get("input_ids", inputs)
    others = {
        name for name, value in kwargs.items() if name not in ("input_ids", "attention_mask") and value is not None
    }
    if others:
        raise Unsupported(f"calls with {', '.join(sorted(others))}")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        raise Unsupported("calls without token ids")
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(tokens) if mask is None else mask
    if not bool((mask[:, -1] != 0).all()):
        raise Unsupported("prompts that are padded on the right")
    return tokens, mask


def _settings(model: PreTrainedModel, given: GenerationConfig | None) -> dict[str, Any]:
    """Return the settings of a generation: those of the call, or of the model where they are unset.

    Raises:
        Unsupported: if a setting has no equivalent.
    """
    of_model = getattr(model, "generation_config", None)
    values: dict[str, Any] = {} if of_model is None else of_model.to_dict()
    values.update({} if given is None else {k: v for k, v in given.to_dict().items() if v is not None})
    defaults = GenerationConfig().to_dict()
    for name, value in values.items():
        if name not in _SUPPORTED and value not in (None, False, defaults.get(name)):
            raise Unsupported(f"{name} is {value}")
    if values.get("max_new_tokens") is None or values.get("eos_token_id") is None:
        raise Unsupported("a call without max_new_tokens or an end token")
    if not values.get("do_sample"):
        sampling = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    elif values.get("top_k") is None:
        raise Unsupported("the default of top_k")
    else:
        sampling = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}
        sampling = {name: default if values.get(name) is None else values[name] for name, default in sampling.items()}
        sampling["top_k"] = int(values["top_k"])
    penalty = values.get("repetition_penalty")
    rest = {name: values.get(name) for name in ("max_new_tokens", "eos_token_id", "pad_token_id")}
    return {**sampling, **rest, "repetition_penalty": 1.0 if penalty is None else float(penalty)}


def _terminators(value: Any) -> tuple[int, ...]:
    return tuple(int(token) for token in np.atleast_1d(np.asarray(value)).tolist())
