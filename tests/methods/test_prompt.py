"""Prompt tuning matches PEFT and works with packing, generation and adapter files."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace

import numpy as np
import peft
import pydantic
import pytest
import safetensors.torch
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from deltaw.data.example import Example
from deltaw.data.packing import pack, pad
from deltaw.decoding.generation import generate
from deltaw.errors import UserError
from deltaw.lora.fingerprint import base_fingerprint
from deltaw.methods.base import Method
from deltaw.methods.prompt import SoftPrompt
from deltaw.methods.settings import PromptSettings
from deltaw.runtime.packed import packed_rows
from deltaw.runtime.virtual_tokens import attached
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.evaluation.answers import answers
from tests.byte_models import byte_tokenizer, tiny_llama
from tests.conftest import refusal
from tests.methods.rows import classifier
from tests.tiny_models import VOCABULARY, causal_model

K = 5
FAMILIES = ("llama", "gpt2", "gemma3")
# transformers 5 warns about the type of PEFT's mask, and PEFT warns about arguments that it drops.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def ids(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def with_virtual_tokens(method: Method, tokens: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.stack([method.with_virtual_tokens(row) for row in tokens.numpy()]))


def prompt_of(model: nn.Module) -> nn.Parameter:
    layer = attached(model)
    assert layer is not None
    return layer.prompt


def prepare_model(model: PreTrainedModel, *extra_modules: str, seed: int = 0) -> tuple[PreTrainedModel, SoftPrompt]:
    """Attach a prompt of K vectors and return the model and the method."""
    method = SoftPrompt(PromptSettings(length=K))
    method.prepare(model, seed=seed, extra_modules=extra_modules)
    return model, method


def peft_prompt(theirs: nn.Module) -> nn.Parameter:
    """Return PEFT's prompt."""
    return theirs.prompt_encoder["default"].embedding.weight


def ours_and_peft(family: str) -> tuple[PreTrainedModel, SoftPrompt, peft.PeftModel]:
    """Create a model with our prompt and one with PEFT's, with equal trainable values."""
    model, method = prepare_model(causal_model(family), seed=4)
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=K)
    theirs = peft.get_peft_model(causal_model(family), settings).eval()
    with torch.no_grad():
        peft_prompt(theirs).copy_(prompt_of(model))
    return model, method, theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_gradients_and_ten_adamw_steps_match_peft(family):
    model, method, theirs = ours_and_peft(family)
    tokens = ids()
    weight = prompt_of(model)
    other = peft_prompt(theirs)
    assert [p for p in model.parameters() if p.requires_grad] == [weight]
    optimizers = [torch.optim.AdamW([p], lr=0.01) for p in (weight, other)]
    for step in range(10):
        logits = model(input_ids=with_virtual_tokens(method, tokens)).logits
        reference = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        torch.testing.assert_close(logits, reference, atol=1e-5, rtol=1e-5)
        logits.square().mean().backward()
        reference.square().mean().backward()
        if step == 0:
            torch.testing.assert_close(weight.grad, other.grad, atol=1e-6, rtol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(weight, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_files_load_in_both_libraries(family, tmp_path):
    model, method, theirs = ours_and_peft(family)
    tokens = ids()
    with torch.no_grad():
        prompt_of(model).normal_()
        expected = model(input_ids=with_virtual_tokens(method, tokens)).logits
        method.save(model, tmp_path / "ours", base_model="a-base")
        loaded = peft.PeftModel.from_pretrained(causal_model(family), tmp_path / "ours").eval()
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-5)

        theirs.save_pretrained(tmp_path / "theirs")
        reloaded = causal_model(family)
        ours = SoftPrompt()
        assert f"{K} vectors" in ours.load(reloaded, tmp_path / "theirs")
        assert ours.virtual_tokens == K and not any(p.requires_grad for p in reloaded.parameters())
        actual = reloaded(input_ids=with_virtual_tokens(ours, tokens)).logits
        expected = theirs(input_ids=tokens).logits
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_adapter_config_has_keys_of_peft(tmp_path):
    model, method, theirs = ours_and_peft("llama")
    method.save(model, tmp_path / "ours", base_model="a-base", metadata={"deltaw.classes": "[]"})
    theirs.save_pretrained(tmp_path / "theirs")
    ours, reference = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    differing = {key for key in ours.keys() | reference.keys() if ours.get(key) != reference.get(key)}
    assert ours.keys() == reference.keys() and differing == {"base_model_name_or_path", "prompt_tuning_init"}
    with safetensors.safe_open(tmp_path / "ours" / "adapter_model.safetensors", "pt") as file:
        fingerprint = base_fingerprint(causal_model("llama"))
        expected = {"format": "pt", "deltaw.classes": "[]", "deltaw.base_fingerprint": fingerprint}
        assert file.metadata() == expected


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "llama"])
def test_classifier_and_head_round_trip_through_peft(kind, tmp_path):
    head = "score" if kind == "llama" else "classifier"
    model, method = prepare_model(classifier(kind, VOCABULARY), head)
    names = [name for name, _ in method.parameters(model)]
    assert names[0] == "prompt" and all(n.startswith(head) for n in names[1:]) and len(names) > 1
    tokens = ids()
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        for _, parameter in method.parameters(model):
            parameter.normal_()
        expected = model(input_ids=with_virtual_tokens(method, tokens)).logits
        method.save(model, tmp_path / "ours", base_model="a-base")
        theirs = peft.PeftModel.from_pretrained(classifier(kind, VOCABULARY), tmp_path / "ours").eval()
        torch.testing.assert_close(theirs(**inputs).logits, expected, atol=1e-5, rtol=1e-5)

        theirs.save_pretrained(tmp_path / "theirs")
        reloaded = classifier(kind, VOCABULARY)
        ours = SoftPrompt()
        before = reloaded(input_ids=tokens).logits
        assert head in ours.load(reloaded, tmp_path / "theirs")
        torch.testing.assert_close(reloaded(input_ids=with_virtual_tokens(ours, tokens)).logits, expected)
        with ours.base_model_active(reloaded):
            assert torch.equal(reloaded(input_ids=tokens).logits, before)
        torch.testing.assert_close(reloaded(input_ids=with_virtual_tokens(ours, tokens)).logits, expected)


def test_classifier_on_padded_rows_matches_peft():
    model, method = prepare_model(classifier("bert", VOCABULARY), "classifier")
    settings = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=K)
    theirs = peft.get_peft_model(classifier("bert", VOCABULARY), settings).eval()
    with torch.no_grad():
        peft_prompt(theirs).copy_(prompt_of(model))
    tokens = ids()
    mask = torch.ones(2, 9, dtype=torch.long)
    tokens[1, 6:] = 0
    mask[1, 6:] = 0
    longer = torch.cat([torch.ones(2, K, dtype=torch.long), mask], 1)
    labels = torch.tensor([0, 2])
    ours_loss = model(input_ids=with_virtual_tokens(method, tokens), attention_mask=longer, labels=labels).loss
    their_loss = theirs(input_ids=tokens, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(ours_loss, their_loss, atol=1e-6, rtol=1e-6)
    ours_loss.backward()
    their_loss.backward()
    torch.testing.assert_close(prompt_of(model).grad, peft_prompt(theirs).grad, atol=1e-6, rtol=1e-4)
    head = dict(theirs.named_parameters())["base_model.classifier.modules_to_save.default.weight"]
    torch.testing.assert_close(model.classifier.weight.grad, head.grad, atol=1e-6, rtol=1e-4)


def _examples() -> list[Example]:
    generator = np.random.default_rng(0)
    common = generator.integers(3, VOCABULARY, 6)
    examples = []
    for row, length in enumerate((4, 7, 5)):
        tokens = np.concatenate([common, generator.integers(3, VOCABULARY, length)]).astype(np.int32)
        examples.append(Example(row + 1, tokens, np.arange(len(tokens)) >= 8, 8, "answer"))
    return examples


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_with_shared_prompt_match_separate_rows(family):
    model, method = prepare_model(causal_model(family))
    objective = CausalObjective(model)
    rows = [e.with_prefix(K, method.with_virtual_tokens(e.tokens)) for e in _examples()]

    def gradient(parts: list, flat: bool) -> tuple[float, torch.Tensor]:
        prompt_of(model).grad = None
        with packed_rows(model) if flat else contextlib.nullcontext():
            losses = [objective(part) for part in parts]
            sum(losses).backward()
        return float(sum(losses)), prompt_of(model).grad

    shared = pack(rows, share=True)
    layout = shared.inputs["packed_layout"]
    assert layout.parents[0] == -1 and layout.stops[0] >= K  # the prompt is stored only once
    assert shared.tokens < sum(len(row) for row in rows) - K
    loss, expected = gradient([pad([row]) for row in rows], flat=False)
    for parts, flat in (
        ([shared], True),
        (list(CausalMicroBatcher(64, padded=False).batches(rows)), True),
        ([pad(rows)], False),
    ):
        packed_loss, actual = gradient(parts, flat)
        assert packed_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_batched_generation_with_cache_matches_greedy_decoding():
    model, method = prepare_model(tiny_llama())
    tokenizer = byte_tokenizer()
    prompts = [method.with_virtual_tokens(np.array(row, np.int32)) for row in ([9, 8, 7], [30, 31, 32, 33, 34], [100])]
    batched = generate(model, tokenizer, prompts, max_new_tokens=8, stop_ids=[0])
    for prompt, answer in zip(prompts, batched, strict=True):
        row = torch.from_numpy(prompt).long()[None]
        with torch.no_grad():
            for _ in range(8):
                following = model(input_ids=row, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                if following.item() == 0:
                    break
                row = torch.cat([row, following], 1)
        assert answer.tokens.tolist() == row[0, len(prompt) :].tolist()
        (single,) = generate(model, tokenizer, [prompt], max_new_tokens=8, stop_ids=[0])
        assert single.tokens.tolist() == answer.tokens.tolist()


def test_evaluation_uses_virtual_tokens_and_omits_them_from_questions():
    model, method = prepare_model(tiny_llama())
    tokenizer = byte_tokenizer()
    options = {"add_generation_prompt": True, "return_dict": False}
    question = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], **options)
    tokens = np.array([*question, 50, 51], np.int32)
    example = Example(1, tokens, np.arange(len(tokens)) >= len(question), len(question), "x")
    versions = (example, replace(example, prompt_length=0))
    prefixed, plain = (e.with_prefix(K, method.with_virtual_tokens(tokens)) for e in versions)
    assert (prefixed.prompt_length, plain.prompt_length) == (K + len(question), 0)
    (answer,) = answers(model, tokenizer, [prefixed])
    assert answer.question.splitlines()[0] == "hello"


def test_initial_prompt_is_sampled_token_embeddings():
    starts = [prompt_of(prepare_model(causal_model("gemma3"), seed=seed)[0]).detach() for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    table = causal_model("gemma3").get_input_embeddings()(torch.arange(VOCABULARY)).detach()
    assert all((table == row).all(1).any() for row in starts[0])


TEXTS = [("abcde", "with prompt.text$"), ("ab", "repeated"), ("abcdefgh", "first 5 of")]


@pytest.mark.parametrize(("text", "message"), TEXTS)
def test_prompt_initialized_from_text_matches_peft(text, message, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = tiny_llama()
    method = SoftPrompt(PromptSettings(K, "text", text))
    method.tokenizer = tokenizer
    assert re.search(message, method.prepare(model, seed=0))
    start = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text, "tokenizer_name_or_path": str(tmp_path)}
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=K, **start)
    assert torch.equal(prompt_of(model), peft_prompt(peft.get_peft_model(tiny_llama(), settings)))
    method.save(model, tmp_path / "ours", base_model="pypi:a-package==1.0")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    assert torch.equal(peft_prompt(theirs), prompt_of(model))
    restored = SoftPrompt()
    restored.load(tiny_llama(), tmp_path / "ours")
    assert restored.settings == method.settings


def test_prompt_trains_on_fake_tensors():
    with FakeTensorMode():
        model, method = prepare_model(classifier("bert", VOCABULARY), "classifier")
        rows = torch.zeros(2, 8, dtype=torch.long)
        model(input_ids=rows, labels=torch.zeros(2, dtype=torch.long)).loss.backward()
        assert all(parameter.grad is not None for _, parameter in method.parameters(model))


@pytest.mark.parametrize("settings", [{"length": 0}, {"init": "text"}, {"text": "without init"}, {"lenght": 4}])
def test_invalid_settings_are_rejected(settings):
    with pytest.raises((UserError, pydantic.ValidationError)):
        pydantic.TypeAdapter(PromptSettings).validate_python(settings)


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"peft_type": "P_TUNING"}, {}, "P_TUNING"),
        ({"peft_type": "LORA"}, {}, "LORA"),
        ({"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2}, {}, "SEQ_2_SEQ_LM"),
        ({"num_virtual_tokens": K + 1}, {}, r"\(5, 32\).*\(6, 32\)"),
        ({"token_dim": 16}, {"prompt_embeddings": torch.zeros(K, 16)}, "32 wide"),
        ({}, {"base_model.score.weight": torch.zeros(3, 32)}, "score.weight"),
        ({}, {"base_model.lm_head.weight": torch.zeros(3, 32)}, r"\(3, 32\)"),
        ({}, {"lm_head.weight": torch.zeros(3, 32)}, "not part of a soft prompt"),
    ],
)
def test_incompatible_adapters_raise_and_leave_model_unchanged(settings, tensors, message, tmp_path):
    model, method = prepare_model(causal_model("llama"))
    method.save(model, tmp_path, base_model="a-base")
    path = tmp_path / "adapter_config.json"
    weights = tmp_path / "adapter_model.safetensors"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    safetensors.torch.save_file({**safetensors.torch.load_file(weights), **tensors}, weights)
    model = causal_model("llama")
    refusal(SoftPrompt().load, model, tmp_path, match=message)
    assert attached(model) is None


def test_pickle_missing_and_damaged_files_are_rejected(tmp_path):
    model, method = prepare_model(causal_model("llama"))
    method.save(model, tmp_path, base_model="a-base")
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refusal(SoftPrompt().load, causal_model("llama"), tmp_path, match="damaged")
    path.rename(tmp_path / "adapter_model.bin")
    refusal(SoftPrompt().load, causal_model("llama"), tmp_path, match="pickle")
    refusal(SoftPrompt().load, causal_model("llama"), tmp_path / "nowhere", match="the folder has no")
