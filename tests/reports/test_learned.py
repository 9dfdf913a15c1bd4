"""Norms and singular values by layer equal those of the dense ΔW."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.reports.page.learned import learned_figures, measure_adapter
from tests.reports.run_folders import write_factors, write_run


def test_norms_and_singular_values_equal_dense_update(tmp_path):
    folder = write_factors(write_run(tmp_path / "run"), layers=3)
    learned = measure_adapter(folder)
    assert learned.is_update and learned.layers() == [0, 1, 2] and learned.kinds() == ["q_proj", "down_proj"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(learned.modules) == 6
    for module in learned.modules:
        a, b = (tensors[f"base_model.model.{module.name}.lora_{f}.weight"].double() for f in "AB")
        values = torch.linalg.svdvals(2.0 * b @ a)[:4]
        assert module.norm == pytest.approx(float(values.norm()), rel=1e-9)
        assert module.values == pytest.approx(values.tolist(), rel=1e-9)
        assert module.layer == int(module.name.split(".")[2]) and module.name.endswith(module.kind)
    layers = learned.by_layer()
    assert [layer for layer, *_ in layers] == [0, 1, 2] and layers[0][1] < layers[2][1]
    assert layers[2][2][0] == max(module.values[0] for module in learned.modules if module.layer == 2)


def test_darkest_cell_is_largest_norm(tmp_path):
    learned = measure_adapter(write_factors(write_run(tmp_path / "run"), layers=5))
    norms, spectrum = learned_figures(learned)
    opacity = [float(module.partition('"')[0]) for module in str(norms.drawing).split('fill-opacity="')[1:]]
    assert len(opacity) == 10 and max(opacity) == 1.0 and min(opacity) < 0.5
    assert max(learned.modules, key=lambda module: module.norm).name in norms.text
    assert len(norms.numbers.rows) == 5 and "out of 4" in spectrum.text


def test_method_without_factors_shows_norms_of_saved_tensors(tmp_path):
    folder = write_run(tmp_path / "run", settings={"method": "bias"})
    tensors = {f"model.layers.{n}.mlp.up_proj.bias": torch.full((4,), float(n)) for n in range(3)}
    save_file({**tensors, "lm_head.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"method": "bias"}))
    learned = measure_adapter(folder)
    assert not learned.is_update and "method bias" in learned.note
    norms = {**{name: float(t.norm()) for name, t in tensors.items()}, "lm_head.weight": 2.0}
    assert {module.name: module.norm for module in learned.modules} == pytest.approx(norms)
    (figure,) = learned_figures(learned)
    assert "outside of layers" in str(figure.drawing)


def test_missing_untrained_or_non_finite_adapter(tmp_path):
    folder = write_run(tmp_path / "run")
    assert measure_adapter(folder) is None
    write_factors(folder, layers=2)
    tensors = load_file(folder / "adapter_model.safetensors")
    zero = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in tensors.items()}
    save_file(zero, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "B is zero" in learned_figures(measure_adapter(folder))[1].text
    broken = {name: t * torch.nan for name, t in tensors.items()}
    save_file(broken, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert measure_adapter(folder).modules == []
