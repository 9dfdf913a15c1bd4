"""`deltaw inspect A B` compares two adapters by their factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deltaw.reports.adapter_comparison import _shared_prefix, compare_adapters
from tests.export.merge_cases import adapter_folder, base_folder
from tests.export.test_merge_combine import deltas
from tests.reports.consoles import render_text


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("compared")
    base = base_folder(folder / "base")
    first = adapter_folder(base, folder / "first", seed=1, target_modules=["q_proj", "up_proj"])
    second = adapter_folder(base, folder / "second", seed=2, rank=2, target_modules=["q_proj", "v_proj"])
    return first, second


def test_norms_cosines_and_overlaps_equal_dense_matrices(folders: tuple[Path, Path]) -> None:
    comparison = compare_adapters(*folders)
    first, second = (deltas(folder) for folder in folders)
    assert [layer.module for layer in comparison.layers] == sorted(first.keys() & second.keys())
    for layer in comparison.layers:
        a = first[layer.module]
        b = second[layer.module]
        assert layer.norms == pytest.approx((float(a.norm()), float(b.norm())))
        assert layer.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()))
        for matrices, overlap in (((a, b), layer.output_overlap), ((a.T, b.T), layer.input_overlap)):
            bases = [torch.linalg.svd(m)[0][:, :r] for m, r in zip(matrices, layer.ranks, strict=True)]
            expected = torch.linalg.svdvals(bases[0].T @ bases[1]).square().mean()
            assert overlap == pytest.approx(float(expected), abs=1e-6)
    total = [sum(float(d.square().sum()) for d in deltas.values()) ** 0.5 for deltas in (first, second)]
    assert comparison.norms == pytest.approx(tuple(total))
    product = sum(float((first[name] * second[name]).sum()) for name in first.keys() & second.keys())
    assert comparison.cosine == pytest.approx(product / total[0] / total[1])


def test_differing_settings_and_exclusive_modules_are_reported(folders: tuple[Path, Path]) -> None:
    comparison = compare_adapters(*folders)
    assert comparison.same_base is True and comparison.settings["rank"] == (4, 2)
    assert [{name.rpartition(".")[2] for name in only} for only in comparison.only] == [{"up_proj"}, {"v_proj"}]
    assert json.loads(json.dumps(comparison.as_dict()))["settings"]["rank"] == [4, 2]


def test_adapter_compared_with_itself_is_equal(folders: tuple[Path, Path]) -> None:
    comparison = compare_adapters(folders[0], folders[0])
    assert comparison.settings == {} and comparison.only == ([], [])
    assert comparison.cosine == pytest.approx(1.0)
    for layer in comparison.layers:
        assert (layer.cosine, layer.output_overlap, layer.angle) == pytest.approx((1.0, 1.0, 0.0), abs=1e-4)


def test_tables_distinguish_modules_in_narrow_terminal(folders: tuple[Path, Path]) -> None:
    comparison_text, self_text = (render_text(compare_adapters(folders[0], f).render()) for f in reversed(folders))
    assert all(text in comparison_text for text in ("only A has", "cosine", "settings that differ"))
    assert "module, in model.layers" in self_text
    assert all(f"{layer}.{name} " in self_text for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj"))


def test_shared_prefix_of_module_names() -> None:
    assert _shared_prefix(["model.layers.10.q", "model.layers.2.q", "model.layers.2.k"]) == "model.layers"
    assert _shared_prefix(["model.head"]) == "model"
    assert _shared_prefix(["a.q", "b.q"]) == _shared_prefix(["q"]) == ""
