"""What is replaced in a model stands there again afterwards, wherever the model has gone meanwhile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltaw.lora.places import Place, as_before, spots_holding, spots_of


class Shared(nn.Module):
    """One layer that stands in two places, and a norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"two": self.one, "norm": nn.BatchNorm1d(4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["norm"](self.inner["two"](self.one(x)))


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def shared() -> Shared:
    torch.manual_seed(0)
    return Shared().eval()


def test_a_module_in_two_places_is_replaced_and_put_back_in_both():
    model = shared()
    original, expected = model.one, model(X)
    assert len(spots_holding(model, original)) == 2
    place = Place(("one", "inner.two"), spots_holding(model, original), original, nn.Linear(4, 4))
    place.put_current()
    assert model.one is model.inner["two"] is place.current and not torch.equal(model(X), expected)
    with as_before(model, [place]):
        assert model.one is model.inner["two"] is original and torch.equal(model(X), expected)
    assert model.one is place.current and place.name == "one"
    place.put_original(model)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("name", ["one", "inner.norm"])
def test_a_module_that_is_put_back_follows_the_model(name):
    model = shared()
    original = model.get_submodule(name)
    spots = spots_holding(model, original)
    place = Place((name,), spots, original, copy.deepcopy(original))
    place.put_current()
    model.double().train()
    place.put_original(model)
    assert model.get_submodule(name) is original and original.training
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float64}
    model(X.double())


def test_a_parameter_is_replaced_untied_and_put_back_in_the_models_dtype():
    model = shared()
    weight = model.one.weight
    place = Place(("one.weight",), spots_of(model, ["one.weight"]), weight, nn.Parameter(weight + 1))
    place.put_current()
    assert model.one.weight is place.current
    model.double()
    assert weight.dtype == torch.float32
    with as_before(model, [place]):
        assert model.one.weight is weight and weight.dtype == torch.float64
    torch.testing.assert_close(model.one.weight, weight + 1)


def test_a_parameter_that_was_not_there_is_gone_again():
    layer = nn.Linear(3, 2, bias=False)
    place = Place(("bias",), [(layer, "bias")], None, nn.Parameter(torch.ones(2)))
    place.put_current()
    with as_before(layer, [place]):
        assert layer.bias is None
    assert layer.bias is place.current


def test_what_was_replaced_stands_there_again_after_an_error():
    model = shared()
    place = Place(("one",), spots_of(model, ["one"]), model.one, nn.Linear(4, 4))
    place.put_current()
    with pytest.raises(ZeroDivisionError), as_before(model, [place]):
        raise ZeroDivisionError
    assert model.one is place.current
