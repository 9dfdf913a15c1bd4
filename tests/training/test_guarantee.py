"""A parameter that does not train although it should raises an error or warning that names it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltaw.training.trained_check import TrainedCheck, UntrainedParameterError, UntrainedParameterWarning, may_skip


def steps(network: nn.Module, loss_of, count: int = 3, rate: float = 1e-3, **settings: object) -> None:
    named = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=rate)
    check = TrainedCheck([*named], [*named.values()], **settings)
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(network).backward()
        check.before_update()
        optimizer.step()
        check.after_update()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


X = torch.ones(2, 4)


def test_parameter_without_gradient_is_named_at_first_step():
    with pytest.raises(UntrainedParameterError, match=r"'0\.weight', '0\.bias' received no gradient"):
        steps(network(), lambda n: n[1](X).square().sum(), count=1)


def test_unchanged_parameter_is_reported_after_two_steps():
    def cut(n: nn.Sequential) -> torch.Tensor:
        return (n[1](X) + 0 * n[0](X)).square().sum()

    steps(network(), cut, count=1)
    with pytest.raises(UntrainedParameterError, match=r"'0\.weight', '0\.bias' did not move in two steps"):
        steps(network(), cut, count=2)
    with pytest.raises(UntrainedParameterError, match="did not move"):
        steps(network(), lambda n: n(X).square().sum(), count=2, rate=0.0)


def test_zero_lora_factor_is_accepted():
    pair = nn.ParameterDict({"lora_A": torch.ones(4, 2), "lora_B": torch.zeros(2, 4)})
    steps(pair, lambda n: (X @ n["lora_A"] @ n["lora_B"] + X).square().sum())


def test_experts_and_embeddings_may_be_unused():
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "layers": nn.ModuleList()})
    for _ in range(2):
        model.layers.append(nn.ModuleDict({"experts": nn.ModuleList(network()), "other": nn.Linear(4, 4)}))

    def first_expert_only(m: nn.Module) -> torch.Tensor:
        x = m.words(torch.tensor([1, 2]))
        for block in m.layers:
            x = block["other"](block["experts"][0](x))
        return x.square().sum()

    with pytest.warns(UntrainedParameterWarning, match="experts.1.weight"):
        steps(model, first_expert_only, may_skip=may_skip(model))
    assert may_skip(model)("words.weight") and not may_skip(model)("layers.0.other.weight")
