"""Token ids beyond the vocabulary use a separate embedding table, and real tokens are unaffected."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deltaw.errors import UserError
from deltaw.runtime.virtual_tokens import attach, attached, detach, input_embedding, original_embedding
from tests.byte_models import tiny_llama
from tests.tiny_models import VOCABULARY, causal_model

FAMILIES = ("llama", "gpt2", "gemma2", "gemma3", "neox", "bloom")


def _prompt(rows: int = 3, width: int = 32) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_real_and_virtual_tokens_use_separate_tables(family):
    model = causal_model(family)
    original = model.get_input_embeddings()
    ids = torch.arange(3, 13).view(2, 5)
    prompt = _prompt()
    expected = original(ids)
    before = model(input_ids=ids).logits
    layer = attach(model, prompt)
    assert model.get_input_embeddings() is layer and isinstance(layer, type(original))
    mixed = torch.cat([torch.tensor([[VOCABULARY, VOCABULARY + 2]] * 2), ids], 1)
    assert torch.equal(layer(mixed), torch.cat([prompt[[0, 2]].expand(2, -1, -1), expected], 1))
    assert torch.equal(model(input_ids=ids).logits, before)


def test_gradient_matches_concatenated_table():
    model = nn.Module()
    model.get_input_embeddings = lambda: model.tokens  # type: ignore[assignment]
    model.tokens = embedding = nn.Embedding(11, 4)
    layer = attach(model, _prompt(3, 4))
    joined = torch.cat([embedding.weight, layer.prompt]).detach().requires_grad_(True)
    ids = torch.tensor([[11, 13, 11, 0, 10], [11, 4, 13, 13, 1]])
    weights = torch.randn(2, 5, 4)
    for out in (layer(ids), nn.functional.embedding(ids, joined)):
        (out * weights).sum().backward()
    torch.testing.assert_close(torch.cat([embedding.weight.grad, layer.prompt.grad]), joined.grad)
    assert not layer.prompt.grad[1].any() and layer.prompt.grad[[0, 2]].all()  # vector 1 is unused


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_detach_restores_original_embedding_everywhere(family):
    model = causal_model(family)
    original = model.second = model.get_input_embeddings()
    keys = list(model.state_dict())
    layer = attach(model, _prompt())
    assert model.second is layer
    with original_embedding(model):
        assert model.get_input_embeddings() is original
    assert model.get_input_embeddings() is layer
    model.to(torch.float64)
    for _ in range(2):
        detach(model)
        assert model.get_input_embeddings() is original is model.second and attached(model) is None
        assert list(model.state_dict()) == keys
    assert original.weight.dtype == model(input_ids=torch.arange(4)[None]).logits.dtype == torch.float64


def test_tied_output_layer_remains_tied_and_predicts_only_real_tokens():
    model = tiny_llama(tie_word_embeddings=True)
    layer = attach(model, _prompt())
    assert model.lm_head.weight is layer.weight
    assert model(input_ids=torch.tensor([[259, 261, 7]])).logits.shape == (1, 3, 259)


def test_table_is_fp32_and_outputs_follow_bf16_weight():
    model = causal_model("llama").to(torch.bfloat16)
    layer = attach(model, _prompt())
    assert (layer.prompt.dtype, model.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(layer(torch.tensor([VOCABULARY]))[0], _prompt()[0].to(torch.bfloat16))


def test_model_copies_have_separate_tables():
    model = causal_model("llama")
    attach(model, _prompt())
    reference = copy.deepcopy(model)
    with torch.no_grad():
        attached(reference).prompt.zero_()
    assert reference.get_input_embeddings() is attached(reference)
    assert torch.equal(attached(model).prompt, _prompt())
    detach(reference)
    assert type(reference.get_input_embeddings()) is nn.Embedding


def test_only_table_gets_gradient_on_fake_tensors():
    with FakeTensorMode():
        model = causal_model("llama").requires_grad_(False)
        attach(model, torch.randn(3, 32))
        model(input_ids=torch.zeros(1, 6, dtype=torch.long)).logits.sum().backward()
    trained = {name: tuple(p.grad.shape) for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"model.embed_tokens.prompt": (3, 32)}


def _config_of(kind: str, **settings: object) -> nn.Module:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **small, **settings))


def _two_tables_model() -> nn.Module:
    model = causal_model("llama")
    model.model.embed_tokens_per_layer = nn.Embedding(VOCABULARY - 9, 8)
    return model


UNSUPPORTED_MODELS = [(nn.Identity, "does not define its token embedding")]
UNSUPPORTED_MODELS += [(lambda: _config_of("vit", image_size=32), "does not read tokens")]
UNSUPPORTED_MODELS += [(lambda: _config_of("t5", vocab_size=50, d_ff=16), "separate encoder and decoder")]
UNSUPPORTED_MODELS += [(_two_tables_model, "embed_tokens_per_layer")]


@pytest.mark.parametrize(("make", "message"), UNSUPPORTED_MODELS)
def test_models_without_single_token_embedding_are_rejected(make, message):
    with pytest.raises(UserError, match=message):
        input_embedding(make())


def test_wrong_width_and_second_table_raise():
    model = causal_model("llama")
    with pytest.raises(UserError, match="32 wide"):
        attach(model, _prompt(3, 31))
    attach(model, _prompt())
    with pytest.raises(UserError, match="already"):
        attach(model, _prompt())
