"""`deltaw inspect A B`: two adapters compared by their factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deltaw.reports.inspect import _shared_prefix, compare_adapters
from tests.export.merge_cases import adapter_folder, base_folder
from tests.export.test_merge_combine import deltas
from tests.reports.consoles import printed


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("compared")
    base = base_folder(folder / "base")
    first = adapter_folder(base, folder / "first", seed=1, target_modules=["q_proj", "up_proj"])
    second = adapter_folder(base, folder / "second", seed=2, rank=2, target_modules=["q_proj", "v_proj"])
    return first, second


def test_norms_cosines_and_overlaps_are_those_of_the_whole_matrices(folders: tuple[Path, Path]) -> None:
    found = compare_adapters(*folders)
    one, other = (deltas(folder) for folder in folders)
    assert [layer.module for layer in found.layers] == sorted(one.keys() & other.keys())
    for layer in found.layers:
        a, b = one[layer.module], other[layer.module]
        assert layer.norms == pytest.approx((float(a.norm()), float(b.norm())))
        assert layer.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()))
        for matrices, overlap in (((a, b), layer.output_overlap), ((a.T, b.T), layer.input_overlap)):
            bases = [torch.linalg.svd(m)[0][:, :r] for m, r in zip(matrices, layer.ranks, strict=True)]
            expected = torch.linalg.svdvals(bases[0].T @ bases[1]).square().mean()
            assert overlap == pytest.approx(float(expected), abs=1e-6)
    total = [sum(float(d.square().sum()) for d in own.values()) ** 0.5 for own in (one, other)]
    assert found.norms == pytest.approx(tuple(total))
    product = sum(float((one[name] * other[name]).sum()) for name in one.keys() & other.keys())
    assert found.cosine == pytest.approx(product / total[0] / total[1])


def test_what_differs_and_what_only_one_has(folders: tuple[Path, Path]) -> None:
    found = compare_adapters(*folders)
    assert found.same_base is True and found.settings["rank"] == (4, 2)
    assert [{name.rpartition(".")[2] for name in only} for only in found.only] == [{"up_proj"}, {"v_proj"}]
    assert json.loads(json.dumps(found.as_dict()))["settings"]["rank"] == [4, 2]


def test_an_adapter_and_itself(folders: tuple[Path, Path]) -> None:
    found = compare_adapters(folders[0], folders[0])
    assert found.settings == {} and found.only == ([], [])
    assert found.cosine == pytest.approx(1.0)
    for layer in found.layers:
        assert (layer.cosine, layer.output_overlap, layer.angle) == pytest.approx((1.0, 1.0, 0.0), abs=1e-4)


def test_the_tables_tell_modules_apart_on_a_narrow_terminal(folders: tuple[Path, Path]) -> None:
    other, own = (printed(compare_adapters(folders[0], folder).render()) for folder in reversed(folders))
    assert all(said in other for said in ("only A has", "cosine", "settings that differ"))
    assert "module, in model.layers" in own
    assert all(f"{layer}.{name} " in own for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj"))


def test_what_all_names_lie_in() -> None:
    assert _shared_prefix(["model.layers.10.q", "model.layers.2.q", "model.layers.2.k"]) == "model.layers"
    assert _shared_prefix(["model.head"]) == "model"
    assert _shared_prefix(["a.q", "b.q"]) == _shared_prefix(["q"]) == ""
