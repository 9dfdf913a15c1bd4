"""Token ids beyond the vocabulary: looked up in a table of their own, everything else as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deltaw.errors import UserError
from deltaw.runtime.virtual_tokens import attach, attached, detach, input_embedding, own_embedding
from tests.tiny_models import VOCABULARY, causal_model

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES = ("llama", "gpt2", "gemma2", "gemma3", "neox", "bloom")


def _prompt(rows: int = 3, width: int = 32) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_real_tokens_keep_the_models_own_embeddings_and_virtual_ones_get_the_tables(family):
    model = causal_model(family)
    own = model.get_input_embeddings()
    ids, prompt = _ids(2, 5), _prompt()
    expected, before = own(ids), model(input_ids=ids).logits
    layer = attach(model, prompt)
    assert model.get_input_embeddings() is layer and isinstance(layer, type(own))
    mixed = torch.cat([torch.tensor([[VOCABULARY, VOCABULARY + 2]] * 2), ids], 1)
    out = layer(mixed)
    assert torch.equal(out[:, 2:], expected)
    assert torch.equal(out[:, :2], prompt[[0, 2]].expand(2, -1, -1))
    assert torch.equal(model(input_ids=ids).logits, before)


def test_only_virtual_tokens_that_are_used_get_gradients():
    model = causal_model("llama").requires_grad_(False)
    layer = attach(model, _prompt())
    ids = torch.tensor([[VOCABULARY + 1, 5, 6]])
    model(input_ids=ids).logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.embed_tokens.prompt"]
    rows = layer.prompt.grad.norm(dim=1)
    assert rows[1] > 0 and rows[0] == rows[2] == 0


def test_the_gradient_is_that_of_a_table_joined_to_the_vocabulary():
    embedding = nn.Embedding(11, 4)
    model = nn.Module()
    model.get_input_embeddings = lambda: model.tokens  # type: ignore[assignment]
    model.tokens = embedding
    layer = attach(model, _prompt(3, 4))
    joined = torch.cat([embedding.weight, layer.prompt]).detach().requires_grad_(True)
    ids = torch.tensor([[11, 13, 11, 0, 10], [12, 4, 13, 13, 1]])
    weights = torch.randn(2, 5, 4)
    (layer(ids) * weights).sum().backward()
    (nn.functional.embedding(ids, joined) * weights).sum().backward()
    torch.testing.assert_close(layer.prompt.grad, joined.grad[11:])
    torch.testing.assert_close(embedding.weight.grad, joined.grad[:11])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_detach_gives_the_very_embedding_back_in_every_place(family):
    model = causal_model(family)
    own = model.second = model.get_input_embeddings()
    keys = list(model.state_dict())
    layer = attach(model, _prompt())
    assert model.second is layer
    with own_embedding(model):
        assert model.get_input_embeddings() is own
    assert model.get_input_embeddings() is layer
    model.to(torch.float64)
    for _ in range(2):
        detach(model)
        assert model.get_input_embeddings() is own is model.second and attached(model) is None
        assert list(model.state_dict()) == keys
    assert own.weight.dtype == model(input_ids=_ids(1, 4)).logits.dtype == torch.float64


def test_a_tied_output_layer_stays_tied_and_predicts_real_tokens_only():
    config = transformers.LlamaConfig(vocab_size=50, **SMALL, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).eval()
    layer = attach(model, _prompt(3, 16))
    assert model.lm_head.weight is layer.weight
    assert model(input_ids=torch.tensor([[50, 51, 7]])).logits.shape == (1, 3, 50)


def test_the_table_is_fp32_beside_a_bf16_weight_and_its_rows_come_out_in_bf16():
    model = causal_model("llama").to(torch.bfloat16)
    layer = attach(model, _prompt())
    assert layer.prompt.dtype == torch.float32 and model.dtype == torch.bfloat16
    out = layer(torch.tensor([VOCABULARY]))
    assert torch.equal(out[0], _prompt()[0].to(torch.bfloat16))


def test_copies_of_the_model_have_tables_of_their_own():
    model = causal_model("llama")
    attach(model, _prompt())
    reference = copy.deepcopy(model)
    with torch.no_grad():
        attached(reference).prompt.zero_()
    assert reference.get_input_embeddings() is attached(reference)
    assert torch.equal(attached(model).prompt, _prompt())
    detach(reference)
    assert type(reference.get_input_embeddings()) is nn.Embedding


def test_it_runs_on_tensors_on_fake_tensors():
    with FakeTensorMode():
        model = causal_model("llama").requires_grad_(False)
        layer = attach(model, torch.randn(3, 32))
        ids = torch.zeros(1, 6, dtype=torch.long)
        model(input_ids=ids).logits.sum().backward()
        assert layer.prompt.grad.shape == (3, 32)


class _Silent(nn.Module):
    """Says nothing of its embedding."""


def _image_model() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(image_size=32, **SMALL))


def _two_rows_model() -> nn.Module:
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def _two_tables_model() -> nn.Module:
    model = causal_model("llama")
    model.model.embed_tokens_per_layer = nn.Embedding(VOCABULARY - 9, 8)
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_Silent, "does not say which module"),
        (_image_model, "does not read tokens"),
        (_two_rows_model, "two places"),
        (_two_tables_model, "embed_tokens_per_layer"),
    ],
)
def test_models_that_a_prompt_cannot_be_put_before_are_refused(make, says):
    with pytest.raises(UserError, match=says):
        input_embedding(make())


def test_a_table_of_another_width_and_a_second_table_are_refused():
    model = causal_model("llama")
    with pytest.raises(UserError, match="32 wide"):
        attach(model, _prompt(3, 31))
    attach(model, _prompt())
    with pytest.raises(UserError, match="already"):
        attach(model, _prompt())
