"""The methods that train the model's own weights: what changes, what is kept, what comes back from disk."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from deltaw.data.packing import pad
from deltaw.errors import UserError
from deltaw.lora import OtherBaseModelWarning
from deltaw.methods.base import Method
from deltaw.methods.files import method_of_folder
from deltaw.methods.in_place import Bias, Full, Head, Input, Last, Random
from deltaw.methods.settings import HeadSettings, InputSettings, LastSettings, RandomSettings
from deltaw.training.loop import train
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from deltaw.training.tasks.causal_objective import CausalObjective
from tests.methods.rows import random_rows
from tests.tiny_models import causal_model

METHODS: dict[str, Callable[[], Method]] = {
    "head": lambda: Head(HeadSettings()),
    "input": lambda: Input(InputSettings()),
    "bias": Bias,
    "random": lambda: Random(RandomSettings(weights=0.05)),
    "last": lambda: Last(LastSettings(blocks=1)),
    "full": Full,
}


def trained(model: nn.Module, method: Method, *, steps: int = 3, rate: float = 1e-2) -> None:
    method.prepare(model, seed=0)
    named = method.parameters(model)
    train(
        CausalObjective(model),
        [parameter for _, parameter in named],
        random_rows(),
        CausalMicroBatcher(1024, False, True, "cpu"),
        learning_rate=rate,
        total_steps=steps,
        batch_size=3,
        after_step=lambda: method.after_step(model),
    )


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**pad(random_rows()).inputs).logits


@pytest.mark.each_value
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_saved_gives_the_trained_model_and_without_it_the_base(
    family: str, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = causal_model(family).to(dtype)
    model = copy.deepcopy(base)
    method = METHODS[name]()
    trained(model, method)
    assert not torch.equal(logits(model), logits(base))
    method.save(model, tmp_path, base_model="tiny")
    loaded = copy.deepcopy(base)
    again = method_of_folder(tmp_path, None)
    again.load(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with again.without(loaded):
        assert torch.equal(logits(loaded), logits(base))
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_random_keeps_gradients_and_state_for_the_chosen_weights_alone() -> None:
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
    left = [t for t in gc.get_objects() if type(t) is torch.Tensor and tuple(t.shape) in dense and id(t) not in alive]
    assert left == []


def test_random_gradients_are_those_of_the_dense_backward() -> None:
    dense = causal_model("llama")
    sparse = copy.deepcopy(dense)
    method = Random(RandomSettings(weights=0.1))
    method.prepare(sparse, seed=0)
    dense.requires_grad_(True)
    for model in (dense, sparse):
        for batch in (pad(random_rows()[:3]), pad(random_rows()[3:])):
            CausalObjective(model)(batch).backward()
    whole = {n: p.grad.flatten() for n, p in dense.named_parameters()}
    tensors = method.tensors()
    for name, values in method.parameters(sparse):
        indices = tensors[name.removesuffix("values") + "indices"].long()
        torch.testing.assert_close(values.grad, whole[name.removesuffix(".values")][indices])


def test_training_a_tied_head_leaves_the_embedding_alone() -> None:
    model = causal_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    before = model.transformer.wte.weight.detach().clone()
    trained(model, Head(HeadSettings()))
    assert torch.equal(model.transformer.wte.weight, before)
    assert not torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("method", [Head(HeadSettings()), Full()], ids=["head", "full"])
def test_another_base_is_noticed_when_an_adapter_is_loaded(method: Head | Full, tmp_path: Path) -> None:
    model = causal_model("llama")
    trained(model, method)
    method.save(model, tmp_path, base_model="tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method_of_folder(tmp_path, None).load(causal_model("llama"), tmp_path)
    other = causal_model("llama")
    with torch.no_grad():
        other.model.norm.weight[-1] += 1e-3
    with pytest.warns(OtherBaseModelWarning, match=r"another base model \(tiny\)"):
        method_of_folder(tmp_path, None).load(other, tmp_path)


def test_full_training_keeps_tied_weights_tied(tmp_path: Path) -> None:
    base = causal_model("gpt2")
    model = copy.deepcopy(base)
    method = Full()
    trained(model, method)
    assert model.lm_head.weight is model.transformer.wte.weight
    method.save(model, tmp_path, base_model="tiny")
    loaded = copy.deepcopy(base)
    method_of_folder(tmp_path, None).load(loaded, tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_model_without_biases_is_given_some_that_change_nothing_at_first() -> None:
    base = causal_model("llama")
    model = copy.deepcopy(base)
    method = Bias()
    assert "given one of zeros" in method.prepare(model, seed=0)
    assert torch.equal(logits(model), logits(base))
    assert all(name.endswith(".bias") for name, _ in method.parameters(model))


def test_low_precision_weights_learn_from_steps_smaller_than_their_resolution() -> None:
    """One step of 3e-4 vanishes in a bf16 weight of 1; fifteen of them do not."""
    model = causal_model("llama").to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    trained(model, Full(), steps=15, rate=3e-4)
    moved = max(
        float((model.state_dict()[n].float() - before[n].float()).abs().max())
        for n in before
        if n.endswith("norm.weight")
    )
    assert moved > 1e-3


def test_errors_name_what_is_wrong_with_a_hint(tmp_path: Path) -> None:
    model = causal_model("llama")
    with pytest.raises(UserError, match=r"last\.blocks asks for 3"):
        Last(LastSettings(blocks=3)).prepare(model, seed=0)
    with pytest.raises(UserError, match="no module of the model"):
        Head(HeadSettings(modules=["lm_heat"])).prepare(model, seed=0)
    with pytest.raises(UserError, match="weights, and there are"):
        Random(RandomSettings(weights=10**9)).prepare(model, seed=0)
    method = Full()
    method.prepare(model, seed=0)
    method.save(model, tmp_path, base_model="tiny")
    with pytest.raises(UserError, match=r"does not have|in the adapter and"):
        Full().load(causal_model("gpt2"), tmp_path)
    with pytest.raises(UserError, match="its method is 'full'"):
        Last(LastSettings()).load(model, tmp_path)
