"""Where a run learned: norms and singular values equal those of ΔW formed in full."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.reports.page.learned import learned_figures, what_was_learned
from tests.reports.run_folders import write_factors, write_run


def test_norms_and_singular_values_are_those_of_the_whole_update(tmp_path):
    folder = write_factors(write_run(tmp_path / "run"), layers=3)
    learned = what_was_learned(folder)
    assert learned.is_update and learned.layers() == [0, 1, 2] and learned.kinds() == ["q_proj", "down_proj"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(learned.parts) == 6
    for part in learned.parts:
        a, b = (tensors[f"base_model.model.{part.name}.lora_{f}.weight"].double() for f in "AB")
        values = torch.linalg.svdvals(2.0 * b @ a)[:4]
        assert part.norm == pytest.approx(float(values.norm()), rel=1e-9)
        assert part.values == pytest.approx(values.tolist(), rel=1e-9)
        assert part.layer == int(part.name.split(".")[2]) and part.name.endswith(part.kind)
    layers = learned.by_layer()
    assert [layer for layer, *_ in layers] == [0, 1, 2] and layers[0][1] < layers[2][1]
    assert layers[2][2][0] == max(part.values[0] for part in learned.parts if part.layer == 2)


def test_the_darkest_cell_is_the_largest_norm(tmp_path):
    learned = what_was_learned(write_factors(write_run(tmp_path / "run"), layers=5))
    norms, spectrum = learned_figures(learned)
    opacity = [float(part.partition('"')[0]) for part in str(norms.drawing).split('fill-opacity="')[1:]]
    assert len(opacity) == 10 and max(opacity) == 1.0 and min(opacity) < 0.5
    assert max(learned.parts, key=lambda part: part.norm).name in norms.text
    assert len(norms.numbers.rows) == 5 and "out of 4" in spectrum.text


def test_a_method_without_factors_shows_the_norms_of_what_it_saved(tmp_path):
    folder = write_run(tmp_path / "run", settings={"method": "bias"})
    tensors = {f"model.layers.{n}.mlp.up_proj.bias": torch.full((4,), float(n)) for n in range(3)}
    save_file({**tensors, "lm_head.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"method": "bias"}))
    learned = what_was_learned(folder)
    assert not learned.is_update and "method bias" in learned.note
    norms = {**{name: float(t.norm()) for name, t in tensors.items()}, "lm_head.weight": 2.0}
    assert {part.name: part.norm for part in learned.parts} == pytest.approx(norms)
    (figure,) = learned_figures(learned)
    assert "outside of layers" in str(figure.drawing)


def test_an_adapter_that_is_not_there_untrained_or_not_finite(tmp_path):
    folder = write_run(tmp_path / "run")
    assert what_was_learned(folder) is None
    write_factors(folder, layers=2)
    tensors = load_file(folder / "adapter_model.safetensors")
    zero = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in tensors.items()}
    save_file(zero, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "B is zero" in learned_figures(what_was_learned(folder))[1].text
    broken = {name: t * torch.nan for name, t in tensors.items()}
    save_file(broken, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert what_was_learned(folder).parts == []
