"""Several adapters as one: each method on ΔW, measured against the weighted sum; and lower ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deltaw.errors import UserError
from deltaw.export.as_adapter import write_adapter
from deltaw.export.base import MergeOptions
from deltaw.export.combine import METHODS, Recipe, dare, ties, trim
from deltaw.export.merge import merge_run
from deltaw.lora import read_adapter
from deltaw.lora.peft_updates import content_of
from tests.export.merge_cases import adapter_folder, assert_merged, base_folder, loaded, logits, off, pair, tensors_of

WEIGHTS = (1.0, -0.5)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("two")
    base = base_folder(folder / "base")
    first = adapter_folder(base, folder / "first", seed=1, target_modules=["q_proj", "up_proj"])
    second = adapter_folder(base, folder / "second", seed=2, rank=2, alpha=2, target_modules=["q_proj", "v_proj"])
    return base, first, second


def deltas(adapter: Path) -> dict[str, Tensor]:
    """ΔW (out, in) of each module, in float64, straight from the file's factors."""
    return {
        update.name: update.scaling * update.factor_B.double() @ update.factor_A.double()
        for update in content_of(read_adapter(adapter)).updates
    }


def weighted_sum(first: Path, second: Path) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for weight, adapter in zip(WEIGHTS, (first, second), strict=True):
        for name, delta in deltas(adapter).items():
            total[name] = total.get(name, 0.0) + weight * delta
    return total


def options(second: Path, method: str, **recipe: object) -> MergeOptions:
    return MergeOptions(others=(second,), recipe=Recipe(method, WEIGHTS, **recipe))


def merged_deltas(base: Path, out: Path) -> dict[str, Tensor]:
    before, after = tensors_of(base), tensors_of(out)
    found = {name.removesuffix(".weight"): after[name].double() - before[name].double() for name in before}
    return {name: delta for name, delta in found.items() if bool(delta.any())}


def error_of(made: Tensor, exact: Tensor) -> float:
    return float((made - exact).norm() / exact.norm())


@pytest.mark.parametrize("method", METHODS)
def test_reported_errors_are_those_of_the_explicit_difference(method, two, tmp_path):
    base, first, second = two
    result = merge_run(first, tmp_path / "out", options(second, method, rank=3 if method == "svd" else None))
    exact, made = weighted_sum(first, second), merged_deltas(base, tmp_path / "out")
    # The weights are stored in fp32, whose rounding of W + ΔW is in the difference too.
    expected = {f"{name}.weight": pytest.approx(error_of(made[name], exact[name]), abs=1e-5) for name in exact}
    assert made.keys() == exact.keys() and result.errors == expected
    flat_made, flat_exact = (torch.cat([deltas[name].flatten() for name in exact]) for deltas in (made, exact))
    assert result.error == pytest.approx(error_of(flat_made, flat_exact), abs=1e-5)
    assert result.error < 1e-6 if method in ("concat", "linear") else result.error > 0.01


def test_svd_is_the_best_of_its_rank(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, first, second = two
    result = merge_run(first, tmp_path / "out", options(second, "svd", rank=3))
    for name, delta in weighted_sum(first, second).items():
        values = torch.linalg.svdvals(delta)
        assert result.errors[f"{name}.weight"] == pytest.approx(float(values[3:].norm() / values.norm()), abs=1e-6)
    made = merged_deltas(base, tmp_path / "out")["model.layers.0.self_attn.q_proj"]
    assert int((torch.linalg.svdvals(made) > 1e-4).sum()) == 3


def test_ties_on_a_small_example() -> None:
    first = torch.tensor([4.0, -3.0, 0.1, 2.0])
    second = torch.tensor([2.0, 5.0, 0.2, -0.3])
    # Of each the larger half stays: (4, −3, 0, 0) and (2, 5, 0, 0). Signs elected: +, +.
    assert ties([first, second], 0.5).tolist() == [3.0, 5.0, 0.0, 0.0]
    assert ties([first], 1.0).tolist() == first.tolist()
    assert ties([first, -first], 1.0).tolist() == [0.0] * 4


@pytest.mark.parametrize("density", [0.1, 0.37, 1.0])
def test_trim_keeps_the_largest(density: float) -> None:
    delta = torch.randn(17, 9, generator=torch.Generator().manual_seed(0))
    made = trim(delta, density)
    kept = made != 0
    assert int(kept.sum()) == round(density * delta.numel())
    assert torch.equal(made[kept], delta[kept])
    assert not kept.logical_not().any() or delta[kept].abs().min() >= delta[~kept].abs().max()


def test_dare_keeps_the_mean_and_its_seed() -> None:
    delta = torch.ones(200, 200)
    made = dare(delta, 0.25, seed=3)
    assert set(made.unique().tolist()) == {0.0, 4.0}
    # The mean of n independent values that are 4 with probability 1/4: standard error √(3/n).
    assert float(made.mean()) == pytest.approx(1.0, abs=5 * (3 / delta.numel()) ** 0.5)
    assert torch.equal(made, dare(delta, 0.25, seed=3))
    assert not torch.equal(made, dare(delta, 0.25, seed=4))
    assert torch.equal(dare(delta, 1.0, seed=0), delta)


def test_an_adapter_of_two_is_their_sum(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, first, second = two
    result = write_adapter(first, tmp_path / "both", options(second, "concat"), rank=None)
    assert result.rank == 6 and result.error == 0.0
    exact, made = weighted_sum(first, second), deltas(tmp_path / "both")
    for name, delta in exact.items():
        torch.testing.assert_close(made[name], delta, rtol=1e-5, atol=1e-6)
    settings = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (6, 6, {})
    merge_run(first, tmp_path / "model", options(second, "concat"))
    assert_merged(base, tmp_path / "both", tmp_path / "model")


def test_peft_loads_the_adapter_of_two(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="compares with PEFT")
    base, first, second = two
    write_adapter(first, tmp_path / "both", options(second, "linear"), rank=None)
    theirs = peft.PeftModel.from_pretrained(loaded(base), tmp_path / "both")
    assert off(logits(theirs), logits(pair(base, tmp_path / "both"))) < 1e-5


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_full_rank_methods_as_adapter_are_cut_from_the_same_update(method, two, tmp_path):
    base, first, second = two
    merge_run(first, tmp_path / "model", options(second, method))
    write_adapter(first, tmp_path / "whole", options(second, method), rank=32)
    for name, delta in merged_deltas(base, tmp_path / "model").items():
        torch.testing.assert_close(deltas(tmp_path / "whole")[name], delta, rtol=1e-3, atol=1e-5)
    narrow = write_adapter(first, tmp_path / "narrow", options(second, method), rank=2)
    exact = weighted_sum(first, second)
    for name, whole in deltas(tmp_path / "whole").items():
        cut = deltas(tmp_path / "narrow")[name]
        lost = torch.linalg.svdvals(whole)[2:].norm()
        assert float((cut - whole).norm()) == pytest.approx(float(lost), rel=1e-4)
        assert narrow.errors[f"{name}.weight"] == pytest.approx(error_of(cut, exact[name]), rel=1e-4)


MIXED = {"rslora": True, "rank_pattern": {"v_proj": 6}}
NORMS = {"train_modules": ["norm"], "target_modules": ["q_proj"]}


@pytest.mark.parametrize(("family", "settings"), [("llama", MIXED), ("gpt2", {"lora_bias": True}), ("llama", NORMS)])
def test_a_lower_rank_loses_the_smallest_singular_values_and_nothing_beside_the_factors(family, settings, tmp_path):
    base, small = base_folder(tmp_path / "base", family), tmp_path / "small"
    adapter = adapter_folder(base, tmp_path / "adapter", **settings)
    result = write_adapter(adapter, small, MergeOptions(), rank=2)
    after = deltas(small)
    for name, delta in deltas(adapter).items():
        values = torch.linalg.svdvals(delta)
        expected = float(values[2:].norm())
        assert float((after[name] - delta).norm()) == pytest.approx(expected, rel=1e-4)
        assert result.errors[name] == pytest.approx(expected / float(values.norm()), rel=1e-4)
    biases = [content_of(read_adapter(folder)).biases for folder in (adapter, small)]
    assert all(torch.allclose(biases[0][name], biases[1][name]) for name in biases[0])
    assert read_adapter(small).config.rank == 2
    before, kept = (load_file(f / "adapter_model.safetensors") for f in (adapter, small))
    norms = [name for name in before if name.endswith("norm.weight")]
    assert bool(norms) == (settings is NORMS) and all(torch.equal(before[name], kept[name]) for name in norms)
    merge_run(small, tmp_path / "out")
    assert_merged(base, small, tmp_path / "out")


def test_refusals(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, first, _ = two
    out, alone = tmp_path / "out", MergeOptions()
    dora = adapter_folder(base, tmp_path / "dora", dora=True)
    merge_run(first, tmp_path / "linear", options(dora, "linear"))
    with pytest.raises(UserError, match="not changed by a low-rank update alone"):
        merge_run(first, out, options(dora, "concat"))
    as_adapters = [(options(dora, "linear"), None, "fits into no adapter"), (alone, None, "is an adapter already")]
    for given, rank, what in (*as_adapters, (alone, 4, "is not lower")):
        with pytest.raises(UserError, match=what):
            write_adapter(first, out, given, rank=rank)
    for method, density, what in (("ties", 0.0, "density"), ("magic", 0.5, "no method 'magic'")):
        with pytest.raises(UserError, match=what):
            Recipe(method, WEIGHTS, density=density)
    assert not out.exists() and not list(tmp_path.glob(".out*"))
