"""Figures of an adapter equal those of its dense ΔW."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from deltaw.lora import LoRAConfig, LoRAParameter, attach, load_adapter, save_adapter
from deltaw.reports.inspect import effective_rank, inspect_adapter, singular_values, stable_rank
from tests.cli.conftest import update_file
from tests.lora.models import mixture, tiny
from tests.reports.consoles import render_text


def make_model() -> nn.Module:
    """Return a model of twelve blocks between embeddings and a head."""
    sizes = {"q_proj": (8, 8), "up_proj": (8, 20), "out": (20, 8)}
    blocks = [nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()}) for _ in range(12)]
    return nn.ModuleDict({"embed": nn.Embedding(30, 8), "layers": nn.ModuleList(blocks), "head": nn.Linear(8, 3)})


def save_peft_adapter(folder: Path, fill: bool = True, **changes: object) -> nn.Module:
    """Save an adapter with PEFT. Its random factors grow with the layer."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    model = get_peft_model(make_model(), LoraConfig(**options | changes))
    if fill:
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_" in name:
                layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else 0
                parameter.data.normal_(std=0.1 * (1 + layer))
    model.save_pretrained(folder)
    return model


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 99), st.floats(0.1, 8))
def test_norm_and_singular_values_equal_dense_update(n, m, r, seed, scale) -> None:
    torch.manual_seed(seed)
    a = torch.randn(r, n)
    b = torch.randn(m, r)
    dense_updates = scale * (b.double() @ a.double())
    expected = torch.linalg.svdvals(dense_updates)
    values = singular_values(a, b, scale)
    common = min(len(values), len(expected))
    torch.testing.assert_close(values[:common], expected[:common], rtol=1e-9, atol=1e-9)
    assert float(values[common:].sum()) < 1e-9 and float(expected[common:].sum()) < 1e-9
    assert float(values.norm()) == pytest.approx(float(dense_updates.norm()), rel=1e-9)


def test_grouped_convolution_is_measured_per_group() -> None:
    a = torch.randn(4, 3, 3, 3)
    b = torch.randn(10, 2, 1, 1)
    left = b.flatten(1).double()
    right = a.flatten(1).double()
    dense_updates = torch.block_diag(left[:5] @ right[:2], left[5:] @ right[2:])
    expected = torch.linalg.svdvals(dense_updates)[:4]
    torch.testing.assert_close(singular_values(a, b, 1.0), expected, rtol=1e-9, atol=1e-9)


def test_ranks_of_known_spectra() -> None:
    assert effective_rank(torch.ones(5, dtype=torch.float64)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)) == pytest.approx(1)
    half = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)  # shares 1/2, 1/4, 1/4: entropy 1.5 ln 2
    assert effective_rank(half) == pytest.approx(2**1.5)
    assert stable_rank(half) == pytest.approx(1.5)
    assert effective_rank(torch.zeros(3)) == stable_rank(torch.zeros(3)) == 0


@pytest.mark.parametrize("rslora", [False, True])
def test_report_equals_dense_updates_of_peft(tmp_path: Path, rslora: bool) -> None:
    model = save_peft_adapter(tmp_path, use_rslora=rslora, target_modules=["q_proj", "up_proj", "embed"])
    report = inspect_adapter(tmp_path)
    by_name = {module.module: module for module in report.modules}
    assert len(by_name) == 25
    total = 0.0
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach()
            total += float(delta.double().square().sum())
            assert by_name[name].norm == pytest.approx(float(delta.norm()), rel=1e-5)
            assert by_name[name].largest == pytest.approx(float(torch.linalg.svdvals(delta)[0]), rel=1e-5)
    assert report.norm == pytest.approx(math.sqrt(total), rel=1e-6)
    assert report.scalings == pytest.approx([6 / math.sqrt(4) if rslora else 6 / 4])
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert report.trained_parameters == sum(tensor.numel() for tensor in stored.values())
    assert report.size_bytes > report.trained_parameters * 4


def test_patterns_set_rank_and_alpha_of_modules(tmp_path: Path) -> None:
    model = save_peft_adapter(tmp_path, rank_pattern={"up_proj": 2}, alpha_pattern={r"layers\.3\.q_proj": 16})
    report = inspect_adapter(tmp_path)
    assert report.ranks == [2, 4]
    assert report.scalings == pytest.approx([1.5, 3, 4])
    module = model.base_model.model.layers[3].q_proj
    changed_module = next(entry for entry in report.modules if entry.module == "layers.3.q_proj")
    assert changed_module.norm == pytest.approx(float(module.get_delta_weight("default").detach().norm()), rel=1e-5)


def make_attention() -> nn.Module:
    return nn.ModuleDict({"attn": nn.MultiheadAttention(12, 3, batch_first=True), "out": nn.Linear(12, 5)})


def randomize(model: nn.Module) -> None:
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "trainable_tokens", "trained_tokens")):
            parameter.data.normal_(std=0.2)


def save_random_adapter(model: nn.Module, folder: Path, **settings: object) -> nn.Module:
    """Save an adapter with random factors with PEFT and return the model."""
    adapted = get_peft_model(model, LoraConfig(lora_alpha=6, **settings))
    randomize(adapted)
    adapted.save_pretrained(folder)
    return adapted


def dense_updates(base: nn.Module, folder: Path) -> list[torch.Tensor]:
    """Return each ΔW of the adapter in float64, applied to the base model, in module order."""
    load_adapter(base, folder)
    base.double()
    return [m.delta_weight().double() for m in base.modules() if hasattr(m, "delta_weight")]


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("rslora", [False, True])
def test_experts_are_measured_per_matrix(tmp_path, kind, rslora):
    base = mixture(kind)
    options = {"r": 4, "use_rslora": rslora, "target_modules": ["q_proj"], "target_parameters": EXPERTS}
    save_random_adapter(mixture(kind), tmp_path, **options)
    report = inspect_adapter(tmp_path)
    assert report.ranks == [4] and report.scalings == [6 / math.sqrt(4) if rslora else 6 / 4]
    assert not report.warnings
    deltas = dense_updates(base, tmp_path)
    assert sorted(m.norm for m in report.modules) == pytest.approx(sorted(float(d.norm()) for d in deltas))
    for module in report.modules:
        delta = next(d for d in deltas if float(d.norm()) == pytest.approx(module.norm))
        values = torch.linalg.svdvals(delta)
        assert module.largest == pytest.approx(float(values.max()))
        assert (module.experts or 1) == (len(delta) if delta.dim() == 3 else 1)
        each = values if delta.dim() == 3 else values[None]
        mean = sum(effective_rank(row[:4]) for row in each) / len(each)
        assert module.effective_rank == pytest.approx(mean, rel=1e-5)
    assert {"experts #1", "experts #2", "q_proj"} == {entry.kind for entry in report.kinds()}


def save_own_adapter(model: nn.Module, folder: Path, **changes: object) -> list[float]:
    """Save an adapter with random factors in deltaw's format and return the norms of its parameter updates."""
    attach(model, LoRAConfig(rank=4, alpha=6, **changes))  # type: ignore[arg-type]
    randomize(model)
    save_adapter(model, folder)
    return [float(m.delta_weight().double().norm()) for m in model.modules() if isinstance(m, LoRAParameter)]


def test_parameter_patterns_are_applied_or_reported_as_uncertain(tmp_path):
    experts = {"target_modules": [], "target_parameters": EXPERTS}
    ranks = {r"experts.down_proj": 2}
    expected = save_own_adapter(mixture("mixtral"), tmp_path / "ranks", rank_pattern=ranks, **experts)
    report = inspect_adapter(tmp_path / "ranks")
    assert report.ranks == [2, 4] and report.scalings == [1.5, 3] and not report.warnings
    assert sorted(m.norm for m in report.modules) == pytest.approx(sorted(expected), rel=1e-5)
    save_own_adapter(mixture("mixtral"), tmp_path / "alphas", alpha_pattern={r"experts.down_proj": 2}, **experts)
    assert any("uncertain" in warning for warning in inspect_adapter(tmp_path / "alphas").warnings)


def test_single_parameter_has_full_name(tmp_path):
    parameters = ["mlp.up_proj.weight"]
    expected = save_own_adapter(tiny("llama"), tmp_path, target_modules=["q_proj"], target_parameters=parameters)
    by_name = {module.module: module.norm for module in inspect_adapter(tmp_path).modules}
    norms = [by_name[f"model.layers.{number}.mlp.up_proj.weight"] for number in range(len(expected))]
    assert norms == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("version", ["0.21.2", "0.22.0"])
def test_output_projection_counts_as_often_as_in_peft(tmp_path, version):
    base = make_attention()
    save_random_adapter(make_attention(), tmp_path, r=2, target_modules=["attn", "out"], alpha_pattern={"attn": 5})
    update_file(tmp_path / "adapter_config.json", peft_version=version)
    by_name = {module.module: module for module in inspect_adapter(tmp_path).modules}
    assert by_name["attn"].scaling == by_name["attn.out_proj"].scaling == 2.5
    assert by_name["out"].scaling == 3
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.attn.base_layer.out_proj.lora_"
    b = tensors[prefix + "B.weight"].double()
    a = tensors[prefix + "A.weight"].double()
    times = 2 if version == "0.21.2" else 1
    assert by_name["attn.out_proj"].norm == pytest.approx(float((times * 2.5 * b @ a).norm()))
    expected_norms = sorted(float(delta.norm()) for delta in dense_updates(base, tmp_path))
    assert sorted(module.norm for module in by_name.values()) == pytest.approx(expected_norms)


def test_lora_bias_and_token_rows_are_reported(tmp_path):
    model = save_random_adapter(tiny("vit"), tmp_path / "bias", r=4, target_modules=["q_proj", "fc1"], lora_bias=True)
    report = inspect_adapter(tmp_path / "bias")
    biases = [p.detach().double() for n, p in model.named_parameters() if "lora_B" in n and "bias" in n]
    assert report.bias_parameters == report.other_parameters == sum(b.numel() for b in biases) > 0
    assert report.bias_norm == pytest.approx(1.5 * float(torch.cat(biases).norm()))
    assert "bias on B" in render_text(report.render(), 100)

    model = tiny("gpt2")
    rows = {"wte": [3, 8], "wpe": [2]}
    attach(model, LoRAConfig(rank=4, target_modules=["c_fc"], trainable_token_indices=rows, bias="none"))
    save_adapter(model, tmp_path / "tokens")
    report = inspect_adapter(tmp_path / "tokens")
    assert report.token_rows == {"transformer.wte": 2, "transformer.wpe": 1}
    assert report.other_parameters == 3 * model.config.n_embd
    assert "2 of transformer.wte" in render_text(report.render(), 100)
    assert report.warnings == ["B is zero in all modules: only its other tensors change the model"]
    json.dumps(report.as_dict(), allow_nan=False)


def test_norms_of_kinds_and_layers_sum_to_total(tmp_path: Path) -> None:
    save_peft_adapter(tmp_path)
    report = inspect_adapter(tmp_path)
    kinds = {kind.kind: kind for kind in report.kinds()}
    assert {name: kind.count for name, kind in kinds.items()} == {"q_proj": 12, "up_proj": 12}
    assert math.hypot(*(kind.norm for kind in kinds.values())) == pytest.approx(report.norm)
    layers = report.layers()
    assert list(layers) == [f"layers.{number}" for number in range(12)]
    assert math.hypot(*layers.values()) == pytest.approx(report.norm)
    assert report.largest_changes() == sorted(layers.items(), key=lambda layer: -layer[1])[:5]


def test_equal_module_names_get_parent_name(tmp_path: Path) -> None:
    block = {parent: nn.ModuleDict({"c_proj": nn.Linear(4, 4)}) for parent in ("attn", "mlp")}
    model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict(block)])})
    get_peft_model(model, LoraConfig(r=2, target_modules=["c_proj"])).save_pretrained(tmp_path)
    assert {kind.kind for kind in inspect_adapter(tmp_path).kinds()} == {"attn.c_proj", "mlp.c_proj"}


def test_report_is_short_and_json_is_plain(tmp_path: Path) -> None:
    save_peft_adapter(tmp_path, modules_to_save=["head"])
    report = inspect_adapter(tmp_path)
    page = render_text(report.render(), 100)
    assert len(page.splitlines()) < 24
    assert all(word in page for word in ("q_proj", "up_proj", "layers.11", "█", "head"))
    values = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert values["other_parameters"] == 8 * 3 + 3 and values["norm"] == pytest.approx(report.norm)
    assert len(values["modules"]) == 24 and len(values["layers"]) == 12


def test_untrained_adapter_is_reported(tmp_path: Path) -> None:
    save_peft_adapter(tmp_path, fill=False)
    report = inspect_adapter(tmp_path)
    (warning,) = report.warnings
    assert report.norm == 0 and "untrained" in warning and "untrained" in render_text(report.render(), 100)


def test_non_finite_values_are_reported_without_failure(tmp_path: Path) -> None:
    save_peft_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.2.q_proj.lora_B" in name)
    tensors[name][0, 0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    report = inspect_adapter(tmp_path)
    assert any("not finite" in warning and "layers.2.q_proj" in warning for warning in report.warnings)
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["norm"] is None
    assert "layers.2.q_proj" in render_text(report.render(), 100)
