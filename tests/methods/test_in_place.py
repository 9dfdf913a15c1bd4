"""Methods that train the model's own weights: changed values, stored gradients, and saved adapters."""

from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from deltaw.data.packing import pad
from deltaw.lora import OtherBaseModelWarning
from deltaw.methods.base import Method
from deltaw.methods.files import method_from_folder
from deltaw.methods.settings import HeadSettings, LastSettings, RandomSettings
from deltaw.methods.single_weights import Random
from deltaw.methods.whole_parameters import Bias, Full, Head, Last
from deltaw.training.causal_objective import CausalObjective
from tests.conftest import refusal
from tests.methods.rows import random_rows
from tests.methods.test_trained_exactly import METHODS, run
from tests.tiny_models import causal_model


def train_model(model: PreTrainedModel, method: Method, **options: float) -> PreTrainedModel:
    """Train the model with the method and return it."""
    run(model, method, **options)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**pad(random_rows()).inputs).logits


@pytest.mark.each_value
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("lora", "prompt")])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_adapter_restores_trained_model_and_base(family: str, name: str, dtype: torch.dtype, tmp_path) -> None:
    base = causal_model(family).to(dtype)
    method = METHODS[name]()
    model = train_model(copy.deepcopy(base), method)
    assert not torch.equal(logits(model), logits(base))
    method.save(model, tmp_path, base_model="tiny")
    loaded = copy.deepcopy(base)
    restored = method_from_folder(tmp_path, None)
    restored.load(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ZeroDivisionError), restored.base_model_active(loaded):
        assert torch.equal(logits(loaded), logits(base))
        raise ZeroDivisionError
    assert torch.equal(logits(loaded), logits(model)) and not any(p.requires_grad for p in loaded.parameters())
    with restored.base_model_active(loaded.double()):
        assert {p.dtype for p in loaded.parameters()} == {torch.float64}


def test_random_stores_gradients_only_for_chosen_weights() -> None:
    model = causal_model("llama")
    method = Random(RandomSettings(weights=500))
    method.prepare(model, seed=0)
    values = [p for _, p in method.parameters(model)]
    assert sum(p.numel() for p in values) == 500
    dense = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
    alive = {id(p) for p in model.parameters()}
    CausalObjective(model)(pad(random_rows())).backward()
    gc.collect()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.shape == p.shape for p in values)
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and tuple(t.shape) in dense]
    assert all(id(t) in alive for t in tensors)


def test_random_gradients_match_dense_backward() -> None:
    dense = causal_model("llama")
    sparse = copy.deepcopy(dense)
    method = Random(RandomSettings(weights=0.1))
    method.prepare(sparse, seed=0)
    dense.requires_grad_(True)
    for model in (dense, sparse):
        for batch in (pad(random_rows()[:3]), pad(random_rows()[3:])):
            CausalObjective(model)(batch).backward()
    expected = {n: p.grad.flatten() for n, p in dense.named_parameters()}
    tensors = method.tensors()
    for name, values in method.parameters(sparse):
        indices = tensors[name.removesuffix("values") + "indices"].long()
        torch.testing.assert_close(values.grad, expected[name.removesuffix(".values")][indices])


def test_training_tied_head_leaves_embedding_unchanged() -> None:
    model = causal_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    before = model.transformer.wte.weight.detach().clone()
    train_model(model, Head(HeadSettings()))
    assert torch.equal(model.transformer.wte.weight, before) and not torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("method", [Head(HeadSettings()), Full()], ids=["head", "full"])
def test_loading_adapter_onto_other_base_warns(method: Head | Full, tmp_path: Path) -> None:
    model = causal_model("llama")
    method.prepare(model, seed=0)
    method.save(model, tmp_path, base_model="tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method_from_folder(tmp_path, None).load(causal_model("llama"), tmp_path)
    modified = causal_model("llama")
    with torch.no_grad():
        modified.model.norm.weight[-1] += 1e-3
    with pytest.warns(OtherBaseModelWarning, match=r"another base model \(tiny\)"):
        method_from_folder(tmp_path, None).load(modified, tmp_path)


def test_full_training_preserves_tied_weights(tmp_path: Path) -> None:
    loaded = causal_model("gpt2")
    method = Full()
    model = train_model(causal_model("gpt2"), method)
    method.save(model, tmp_path, base_model="tiny")
    method_from_folder(tmp_path, None).load(loaded, tmp_path)
    assert all(tied.lm_head.weight is tied.transformer.wte.weight for tied in (model, loaded))


def test_bias_method_adds_zero_biases_to_model_without_biases() -> None:
    base = causal_model("llama")
    model = copy.deepcopy(base)
    method = Bias()
    assert "zero bias was added" in method.prepare(model, seed=0) and torch.equal(logits(model), logits(base))
    assert all(name.endswith(".bias") for name, _ in method.parameters(model))


def test_low_precision_weights_accumulate_small_steps() -> None:
    """A single step of 3e-4 is lost in a bf16 weight of 1, but fifteen of them are not."""
    before = causal_model("llama").to(torch.bfloat16)
    model = train_model(copy.deepcopy(before), Full(), steps=15, rate=3e-4)
    norms = [name for name, _ in model.named_parameters() if name.endswith("norm.weight")]
    moved = [(model.get_parameter(n).float() - before.get_parameter(n).float()).abs().max() for n in norms]
    assert max(moved) > 1e-3


def test_invalid_settings_and_adapters_raise(tmp_path: Path) -> None:
    model = causal_model("llama")
    for invalid, message in (
        (Last(LastSettings(blocks=3)), r"last\.blocks is 3"),
        (Head(HeadSettings(modules=["lm_heat"])), "the model has no module"),
        (Random(RandomSettings(weights=10**9)), "weights, but the model has"),
    ):
        refusal(invalid.prepare, model, seed=0, match=message)
    method = Full()
    method.prepare(model, seed=0)
    method.save(model, tmp_path, base_model="tiny")
    refusal(Full().load, causal_model("gpt2"), tmp_path, match=r"does not have|in the adapter and")
    refusal(Last(LastSettings()).load, model, tmp_path, match="its method is 'full'")
