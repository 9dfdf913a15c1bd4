"""Initialization from activations: values of A, unchanged state, and errors."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import EvaConfig, initialize_lora_eva_weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.errors import UserError
from deltaw.lora import LoRAConfig, attach, count_parameters, initialize_from_activations
from tests.lora.models import inputs, logits, peft_factors, tiny, with_peft


def _rows(count: int, size: int, seed: int) -> Tensor:
    """Create rows with a nonzero mean whose variance decreases along random directions."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(7))).Q
    scale = 1.0 / torch.arange(1, size + 1)
    return torch.randn(count, size, generator=generator) * scale @ rotation + 0.5


def _top_directions(rows: Tensor, rank: int) -> Tensor:
    """Return the right-singular vectors of the centered rows, (in, rank), in fp64."""
    rows = rows.double()
    return torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:rank].t()


def _subspace_cosine(first: Tensor, second: Tensor) -> float:
    """Return the cosine of the largest angle between the spans of two orthonormal bases."""
    return float(torch.linalg.svdvals(first.double().t() @ second.double()).min())


def _model(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 8), nn.Tanh(), Conv1D(6, 8))
    attach(model, LoRAConfig(**{"rank": 4, "init": "eva", **settings}))
    return model


@pytest.mark.parametrize("sizes", [[200], [60, 1, 90, 49], [3] * 40])
def test_factor_A_contains_top_singular_vectors_of_all_batches(sizes):
    model = _model()
    batches = [_rows(n, 24, seed) for seed, n in enumerate(sizes)]
    x = batches[0]
    before = model(x)
    initialized = initialize_from_activations(model, lambda: [model(batch) for batch in batches] and None)
    rows = torch.cat(batches)
    for layer, layer_inputs in ((model[0], rows), (model[2], torch.tanh(model[0](rows)).detach())):
        factor = layer.lora_A.detach()
        torch.testing.assert_close(factor.t() @ factor, torch.eye(4), atol=1e-5, rtol=0)
        assert _subspace_cosine(factor, _top_directions(layer_inputs, 4)) > 0.999
    assert torch.equal(model(x), before) and not model[0].lora_B.any()
    assert initialized.initialized == 2 and initialized.tokens == (len(rows), len(rows)) and not initialized.short
    share = torch.linalg.svdvals((rows - rows.mean(0)).double()).square()
    assert 0 < initialized.explained <= 1 and float(share[:4].sum() / share.sum()) > 0.5
    assert "2 layers" in str(initialized)


def test_initialization_is_deterministic_and_nearly_independent_of_seed():
    models = [_model() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        initialize_from_activations(model, lambda model=model: model(_rows(300, 24, 0)), seed=seed)
    assert torch.equal(models[0][0].lora_A, models[1][0].lora_A)
    assert _subspace_cosine(models[0][0].lora_A.detach(), models[2][0].lora_A.detach()) > 0.999


@pytest.mark.filterwarnings("ignore")  # PEFT warns that this model has no loss
def test_directions_match_peft():
    base = nn.Sequential(nn.Linear(24, 8))
    rows = _rows(400, 24, 0)
    attach(ours := copy.deepcopy(base), LoRAConfig(rank=4, init="eva"))
    initialize_from_activations(ours, lambda: ours(rows))
    eva = EvaConfig(rho=1.0, tau=0.999)
    theirs = with_peft(base, r=4, target_modules=["0"], init_lora_weights="eva", eva_config=eva)
    plain = dict.fromkeys(("prepare_model_inputs_fn", "prepare_layer_inputs_fn"))
    plain |= {"forward_fn": lambda model, batch: model(batch), "show_progress_bar": False}
    initialize_lora_eva_weights(theirs, [rows] * 4, **plain)
    assert _subspace_cosine(ours[0].lora_A.detach(), peft_factors(theirs)["0"][0].detach().t()) > 0.999


def test_layers_with_same_input_share_statistics(monkeypatch):
    from deltaw.lora import activations

    merges: list[int] = []
    plain = activations._ActivationStatistics.merge
    monkeypatch.setattr(activations._ActivationStatistics, "merge", lambda self, x: merges.append(1) or plain(self, x))
    model = tiny("llama")
    attach(model, LoRAConfig(rank=4, init="eva"))
    initialize_from_activations(model, lambda: model(**inputs("llama")))
    attention = model.model.layers[0].self_attn
    assert len(merges) == 2 * 4  # a block has seven layers but four inputs: q k v, o, gate up, down
    assert torch.equal(attention.q_proj.lora_A, attention.v_proj.lora_A)


class _Branches(nn.Module):
    """Two layers that first share an input and later get different ones."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(24, 4)
        self.right = nn.Linear(24, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.left(x) + self.right(input=y)


def test_layers_that_stop_sharing_input_get_separate_statistics():
    model = _Branches()
    attach(model, LoRAConfig(rank=4, init="eva"))
    first = _rows(50, 24, 0)
    x = _rows(400, 24, 1)
    y = torch.randn(400, 24) * torch.arange(24)
    initialize_from_activations(model, lambda: [model(first, first), model(x, y)])
    assert _subspace_cosine(model.left.lora_A.detach(), _top_directions(torch.cat([first, x]), 4)) > 0.999
    assert _subspace_cosine(model.right.lora_A.detach(), _top_directions(torch.cat([first, y]), 4)) > 0.99


def test_input_changed_in_place_is_not_shared():
    model = _Branches()
    attach(model, LoRAConfig(rank=4, init="eva"))
    x = _rows(100, 24, 0)
    scale = torch.arange(24)
    later = x * scale
    initialize_from_activations(model, lambda: [model.left(x), model.right(x.mul_(scale))])
    assert _subspace_cosine(model.right.lora_A.detach(), _top_directions(later, 4)) > 0.999


def test_too_few_tokens_are_reported_and_completed_orthogonally():
    model = _model(rank=6)
    initialized = initialize_from_activations(model, lambda: model(_rows(3, 24, 0)))
    factor = model[0].lora_A.detach()
    torch.testing.assert_close(factor.t() @ factor, torch.eye(6), atol=1e-5, rtol=0)
    assert _subspace_cosine(factor[:, :2], _top_directions(_rows(3, 24, 0), 2)) > 0.999
    assert initialized.short == ("0", "2") and "too few tokens" in str(initialized)


def test_rank_above_input_size_leaves_remaining_columns_unchanged():
    model = nn.Sequential(nn.Linear(3, 8))
    attach(model, LoRAConfig(rank=5, init="eva"), seed=0)
    before = model[0].lora_A.detach().clone()
    initialized = initialize_from_activations(model, lambda: model(_rows(50, 3, 0)))
    factor = model[0].lora_A.detach()
    torch.testing.assert_close(factor[:, :3].t() @ factor[:, :3], torch.eye(3), atol=1e-5, rtol=0)
    assert torch.equal(factor[:, 3:], before[:, 3:]) and initialized.short == ("0",)


def test_unused_layers_retain_uniform_initialization():
    model = _model()
    before = model[2].lora_A.detach().clone()
    initialized = initialize_from_activations(model, lambda: model[0](_rows(50, 24, 0)))
    assert initialized.unseen == ("2",) and torch.equal(model[2].lora_A, before) and "not run" in str(initialized)


def test_failed_initialization_names_cause_and_removes_hooks():
    model = _model()
    with pytest.raises(ZeroDivisionError):
        initialize_from_activations(model, lambda: 1 / 0)
    assert not model[0]._forward_pre_hooks and not model[2]._forward_pre_hooks
    with pytest.raises(UserError, match="none of the adapted layers"):
        initialize_from_activations(model, lambda: None)
    with pytest.raises(UserError, match="'0' are not finite"):
        initialize_from_activations(model, lambda: model(torch.full((3, 24), float("inf"))))
    with torch.no_grad():
        model[0].lora_B.fill_(1.0)
    with pytest.raises(UserError, match="'0' is trained already"):
        initialize_from_activations(model, lambda: model(_rows(50, 24, 0)))
    with pytest.raises(UserError, match=r"'wte'.*linear layers"):
        attach(nn.ModuleDict({"wte": nn.Embedding(5, 4)}), LoRAConfig(init="eva", target_modules=["wte"]))


def test_half_precision_inputs_and_magnitudes_are_supported():
    model = tiny("llama").to(torch.bfloat16)
    assert "initialize_from_activations" in str(attach(model, LoRAConfig(rank=4, init="eva", dora=True)))
    before = logits(model, "llama")
    with torch.inference_mode():
        initialize_from_activations(model, lambda: model(**inputs("llama")))
    torch.testing.assert_close(logits(model, "llama"), before)
    model(**inputs("llama")).logits.float().pow(2).mean().backward()
    assert count_parameters(model).trained > 0
