"""Figures of an adapter against the dense ΔW that they describe."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from deltaw.errors import UserError
from deltaw.reports.adapter_math import effective_rank, frobenius_norm, singular_values, stable_rank
from deltaw.reports.inspect import AdapterReport, inspect_adapter


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.up_proj = nn.Linear(8, 20)
        self.out = nn.Linear(20, 8)


class Toy(nn.Module):
    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(8, 3)


def save(folder: Path, fill: bool = True, **changes: object) -> nn.Module:
    """An adapter as PEFT writes it, with random factors that grow with the layer."""
    torch.manual_seed(0)
    given = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    model = get_peft_model(Toy(), LoraConfig(**given | changes))
    if fill:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "lora_embedding_" in name:
                    layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else 0
                    parameter.normal_(std=0.1 * (1 + layer))
    model.save_pretrained(folder)
    return model


def text_of(report: AdapterReport) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(report.render())
    return out.getvalue()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    r=st.integers(1, 12),
    seed=st.integers(0, 99),
    scale=st.floats(0.1, 8),
)
def test_norm_and_singular_values_equal_those_of_the_dense_update(
    n: int, m: int, r: int, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(r, n, generator=generator)
    b = torch.randn(m, r, generator=generator)
    dense = scale * (b.double() @ a.double())
    expected = torch.linalg.svdvals(dense)
    values = singular_values(a, b, scale)
    common = min(len(values), len(expected))
    torch.testing.assert_close(values[:common], expected[:common], rtol=1e-9, atol=1e-9)
    assert float(values[common:].sum()) < 1e-9 and float(expected[common:].sum()) < 1e-9
    assert frobenius_norm(a, b, scale) == pytest.approx(float(dense.norm()), rel=1e-9)


def test_grouped_convolution_is_measured_group_by_group() -> None:
    a, b = torch.randn(4, 3, 3, 3), torch.randn(10, 2, 1, 1)
    dense = torch.block_diag(
        b[:5].flatten(1).double() @ a[:2].flatten(1).double(),
        b[5:].flatten(1).double() @ a[2:].flatten(1).double(),
    )
    expected = torch.linalg.svdvals(dense)[:4]
    torch.testing.assert_close(singular_values(a, b, 1.0), expected, rtol=1e-9, atol=1e-9)
    assert frobenius_norm(a, b, 1.0) == pytest.approx(float(dense.norm()), rel=1e-9)


def test_ranks_of_known_spectra() -> None:
    assert effective_rank(torch.ones(5, dtype=torch.float64)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)) == pytest.approx(1)
    half = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)  # shares 1/2, 1/4, 1/4: entropy 1.5 ln 2
    assert effective_rank(half) == pytest.approx(2**1.5)
    assert stable_rank(half) == pytest.approx(1.5)
    assert effective_rank(torch.zeros(3)) == stable_rank(torch.zeros(3)) == 0


@pytest.mark.parametrize("rslora", [False, True])
def test_report_equals_pefts_dense_updates(tmp_path: Path, rslora: bool) -> None:
    model = save(tmp_path, use_rslora=rslora, target_modules=["q_proj", "up_proj", "embed"])
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
    assert report.trained_parameters == sum(
        t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values()
    )
    assert report.size_bytes > report.trained_parameters * 4


def test_patterns_give_modules_their_own_rank_and_alpha(tmp_path: Path) -> None:
    model = save(tmp_path, rank_pattern={"up_proj": 2}, alpha_pattern={r"layers\.3\.q_proj": 16})
    report = inspect_adapter(tmp_path)
    assert report.ranks == [2, 4]
    assert report.scalings == pytest.approx([1.5, 3, 4])
    module = model.base_model.model.layers[3].q_proj
    mine = next(entry for entry in report.modules if entry.module == "layers.3.q_proj")
    assert mine.norm == pytest.approx(float(module.get_delta_weight("default").detach().norm()), rel=1e-5)


def test_kinds_and_layers_add_up(tmp_path: Path) -> None:
    save(tmp_path)
    report = inspect_adapter(tmp_path)
    kinds = {kind.kind: kind for kind in report.kinds()}
    assert {name: kind.count for name, kind in kinds.items()} == {"q_proj": 12, "up_proj": 12}
    assert math.hypot(*(kind.norm for kind in kinds.values())) == pytest.approx(report.norm)
    layers = report.layers()
    assert list(layers) == [f"layers.{number}" for number in range(12)]
    assert math.hypot(*layers.values()) == pytest.approx(report.norm)
    moved = report.most_moved()
    assert [norm for _, norm in moved] == sorted(layers.values(), reverse=True)[:5]
    assert moved[0][0] == max(layers, key=lambda layer: layers[layer])


def test_kinds_of_one_name_in_two_places_are_told_apart(tmp_path: Path) -> None:
    model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"attn": nn.Module(), "mlp": nn.Module()})])})
    model["h"][0]["attn"].c_proj = nn.Linear(4, 4)
    model["h"][0]["mlp"].c_proj = nn.Linear(4, 4)
    get_peft_model(model, LoraConfig(r=2, target_modules=["c_proj"])).save_pretrained(tmp_path)
    assert {kind.kind for kind in inspect_adapter(tmp_path).kinds()} == {"attn.c_proj", "mlp.c_proj"}


def test_page_is_short_and_json_is_plain(tmp_path: Path) -> None:
    save(tmp_path, modules_to_save=["head"])
    report = inspect_adapter(tmp_path)
    page = text_of(report)
    assert len(page.splitlines()) < 24
    for word in ("q_proj", "up_proj", "layers.11", "█", "head"):
        assert word in page
    values = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert values["other_parameters"] == 8 * 3 + 3
    assert len(values["modules"]) == 24 and len(values["layers"]) == 12
    assert values["norm"] == pytest.approx(report.norm)


def test_untrained_adapter_is_called_so(tmp_path: Path) -> None:
    save(tmp_path, fill=False)
    report = inspect_adapter(tmp_path)
    assert report.norm == 0
    assert len(report.warnings) == 1 and "untrained" in report.warnings[0]
    assert "untrained" in text_of(report)


def test_broken_numbers_are_reported_and_do_not_break_the_report(tmp_path: Path) -> None:
    save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.2.q_proj.lora_B" in name)
    tensors[name][0, 0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    report = inspect_adapter(tmp_path)
    assert any("not finite" in warning and "layers.2.q_proj" in warning for warning in report.warnings)
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["norm"] is None
    assert "layers.2.q_proj" in text_of(report)


def test_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        inspect_adapter(tmp_path)
