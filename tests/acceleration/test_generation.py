"""Generation of an accelerated trainer: greedy tokens of transformers, and samples of the same distribution."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import deltaw
from deltaw.acceleration.accelerate import Acceleration
from deltaw.acceleration.padding import PaddingUse
from tests.acceleration.batches import adapted
from tests.acceleration.test_trainers import history, make_trainer, tokenizer

__all__ = ["tokenizer"]

SAMPLED = GenerationConfig(max_new_tokens=1, do_sample=True, temperature=0.7, top_k=4, top_p=1.0, eos_token_id=3)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast):
    """A model with PEFT's LoRA and an accelerated ``generate``."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = adapted(LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes, pad_token_id=0, eos_token_id=3)))
    model.accelerated = Acceleration(model.get_base_model(), logits=True, tokenizer=tokenizer, padding=PaddingUse())
    return model


def prompts() -> dict[str, torch.Tensor]:
    tokens = torch.randint(4, 20, (5, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :4] = mask[3, :7] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def own_generate(model, **options):
    """Run transformers' method."""
    (method,) = [method for method in model.accelerated.methods if method.__name__ == "generate"]
    return method.original(**options)


@pytest.mark.parametrize("state", ["adapter", "changed", "disabled", "merged"])
def test_greedy_tokens_equal_transformers(model, state):
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=[3, 7], pad_token_id=0)
    model.generate(**prompts(), generation_config=config)
    if state == "changed":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-2)
    if state == "merged":
        model.merge_adapter()
    with torch.no_grad():
        if state == "disabled":
            with model.disable_adapter():
                computed = model.generate(**prompts(), generation_config=config)
                expected = own_generate(model, **prompts(), generation_config=config)
        else:
            computed = model.generate(**prompts(), generation_config=config)
            expected = own_generate(model, **prompts(), generation_config=config)
    assert torch.equal(computed, expected)
    assert "generation" in model.accelerated.report.parts
    assert not [reason for reason in model.accelerated.report.fallbacks if reason.startswith("generation")]


def test_samples_have_the_distribution_of_transformers(model):
    row = {name: values[:1].repeat(4000, 1) for name, values in prompts().items()}
    with torch.no_grad():
        computed = model.generate(**row, generation_config=SAMPLED)[:, -1]
        expected = own_generate(model, **row, generation_config=SAMPLED)[:, -1]
    shares = [torch.bincount(tokens, minlength=20) / len(tokens) for tokens in (computed, expected)]
    assert int((shares[0] > 0).sum()) == 4
    assert float((shares[0] - shares[1]).abs().sum()) < 0.1


def test_samples_follow_the_random_state_of_torch(model):
    config = GenerationConfig(**{**SAMPLED.to_diff_dict(), "max_new_tokens": 8})
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(model.generate(**prompts(), generation_config=config).tolist())
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": [5]}])
def test_other_settings_run_transformers(model, option):
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 3, "pad_token_id": 0, **option}
    config = GenerationConfig(**settings)
    with torch.no_grad():
        computed = model.generate(**prompts(), generation_config=config)
        expected = own_generate(model, **prompts(), generation_config=config)
    assert torch.equal(computed, expected)
    assert any(next(iter(option)) in reason for reason in model.accelerated.report.fallbacks)


def test_grpo_generates_with_the_engine(tokenizer, tmp_path):
    trainer = make_trainer("grpo", tokenizer, tmp_path)
    report = deltaw.accelerate(trainer)
    steps = history(trainer)
    assert len(steps) == 3 and "generation" in report.parts and not report.fallbacks
    assert len({step["reward"] for step in steps}) > 1
    deltaw.restore(trainer)
    assert "generate" not in vars(trainer.model.get_base_model())
