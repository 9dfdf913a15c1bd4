"""Tests of combined adapters: each method against the weighted sum of ΔW, and reduction to lower ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deltaw.errors import UserError
from deltaw.export.as_adapter import write_adapter
from deltaw.export.combine import METHODS, Recipe, dare, ties, trim
from deltaw.export.merge import merge_run
from deltaw.export.merge_plan import MergeOptions
from deltaw.lora import read_adapter
from deltaw.lora.peft_updates import read_content
from tests.export.merge_cases import (
    adapter_folder,
    assert_merged,
    base_folder,
    load_adapted,
    load_model,
    logits,
    read_tensors,
    relative_difference,
)

WEIGHTS = (1.0, -0.5)


@pytest.fixture(scope="module")
def adapter_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("two")
    base = base_folder(folder / "base")
    first = adapter_folder(base, folder / "first", seed=1, target_modules=["q_proj", "up_proj"])
    second = adapter_folder(base, folder / "second", seed=2, rank=2, alpha=2, target_modules=["q_proj", "v_proj"])
    return base, first, second


def deltas(adapter: Path) -> dict[str, Tensor]:
    """Return ΔW (out, in) of each module in float64, computed from the file's factors."""
    return {
        update.name: update.scaling * update.factor_B.double() @ update.factor_A.double()
        for update in read_content(read_adapter(adapter)).updates
    }


def weighted_sum(first: Path, second: Path) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for weight, adapter in zip(WEIGHTS, (first, second), strict=True):
        for name, delta in deltas(adapter).items():
            total[name] = total.get(name, 0.0) + weight * delta
    return total


def combine_options(second: Path, method: str, **recipe: object) -> MergeOptions:
    return MergeOptions(additional_adapters=(second,), recipe=Recipe(method, WEIGHTS, **recipe))


def merged_deltas(base: Path, out: Path) -> dict[str, Tensor]:
    before = read_tensors(base)
    after = read_tensors(out)
    differences = {name.removesuffix(".weight"): after[name].double() - before[name].double() for name in before}
    return {name: delta for name, delta in differences.items() if bool(delta.any())}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


@pytest.mark.parametrize("method", METHODS)
def test_reported_errors_match_explicit_difference(method, adapter_pair, tmp_path):
    base, first, second = adapter_pair
    result = merge_run(first, tmp_path / "out", combine_options(second, method, rank=3 if method == "svd" else None))
    exact = weighted_sum(first, second)
    actual = merged_deltas(base, tmp_path / "out")
    # The difference includes the fp32 rounding of W + ΔW.
    expected = {f"{name}.weight": pytest.approx(relative_error(actual[name], exact[name]), abs=1e-5) for name in exact}
    assert actual.keys() == exact.keys() and result.errors == expected
    flat_actual, flat_exact = (torch.cat([deltas[name].flatten() for name in exact]) for deltas in (actual, exact))
    assert result.error == pytest.approx(relative_error(flat_actual, flat_exact), abs=1e-5)
    assert result.error < 1e-6 if method in ("concat", "linear") else result.error > 0.01


def test_svd_error_is_optimal_for_rank(adapter_pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, first, second = adapter_pair
    result = merge_run(first, tmp_path / "out", combine_options(second, "svd", rank=3))
    for name, delta in weighted_sum(first, second).items():
        values = torch.linalg.svdvals(delta)
        assert result.errors[f"{name}.weight"] == pytest.approx(float(values[3:].norm() / values.norm()), abs=1e-6)
    actual = merged_deltas(base, tmp_path / "out")["model.layers.0.self_attn.q_proj"]
    assert int((torch.linalg.svdvals(actual) > 1e-4).sum()) == 3


def test_ties_matches_small_example() -> None:
    first = torch.tensor([4.0, -3.0, 0.1, 2.0])
    second = torch.tensor([2.0, 5.0, 0.2, -0.3])
    # Trimming to the larger half leaves (4, −3, 0, 0) and (2, 5, 0, 0). Both elected signs are +.
    assert ties([first, second], 0.5).tolist() == [3.0, 5.0, 0.0, 0.0]
    assert ties([first], 1.0).tolist() == first.tolist()
    assert ties([first, -first], 1.0).tolist() == [0.0] * 4


@pytest.mark.parametrize("density", [0.1, 0.37, 1.0])
def test_trim_selects_largest_values(density: float) -> None:
    delta = torch.randn(17, 9, generator=torch.Generator().manual_seed(0))
    trimmed = trim(delta, density)
    mask = trimmed != 0
    assert int(mask.sum()) == round(density * delta.numel())
    assert torch.equal(trimmed[mask], delta[mask])
    assert not mask.logical_not().any() or delta[mask].abs().min() >= delta[~mask].abs().max()


def test_dare_preserves_mean_and_is_deterministic() -> None:
    delta = torch.ones(200, 200)
    dropped = dare(delta, 0.25, seed=3)
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    # The mean of n independent values that are 4 with probability 1/4: standard error √(3/n).
    assert float(dropped.mean()) == pytest.approx(1.0, abs=5 * (3 / delta.numel()) ** 0.5)
    assert torch.equal(dropped, dare(delta, 0.25, seed=3))
    assert not torch.equal(dropped, dare(delta, 0.25, seed=4))
    assert torch.equal(dare(delta, 1.0, seed=0), delta)


def test_concat_adapter_equals_weighted_sum(adapter_pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, first, second = adapter_pair
    result = write_adapter(first, tmp_path / "both", combine_options(second, "concat"), rank=None)
    assert result.rank == 6 and result.error == 0.0
    exact = weighted_sum(first, second)
    actual = deltas(tmp_path / "both")
    for name, delta in exact.items():
        torch.testing.assert_close(actual[name], delta, rtol=1e-5, atol=1e-6)
    settings = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (6, 6, {})
    merge_run(first, tmp_path / "model", combine_options(second, "concat"))
    assert_merged(base, tmp_path / "both", tmp_path / "model")


def test_peft_loads_combined_adapter(adapter_pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="compares with PEFT")
    base, first, second = adapter_pair
    write_adapter(first, tmp_path / "both", combine_options(second, "linear"), rank=None)
    theirs = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "both")
    assert relative_difference(logits(theirs), logits(load_adapted(base, tmp_path / "both"))) < 1e-5


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_full_rank_methods_truncate_the_merged_update(method, adapter_pair, tmp_path):
    base, first, second = adapter_pair
    merge_run(first, tmp_path / "model", combine_options(second, method))
    write_adapter(first, tmp_path / "full", combine_options(second, method), rank=32)
    for name, delta in merged_deltas(base, tmp_path / "model").items():
        torch.testing.assert_close(deltas(tmp_path / "full")[name], delta, rtol=1e-3, atol=1e-5)
    narrow = write_adapter(first, tmp_path / "narrow", combine_options(second, method), rank=2)
    exact = weighted_sum(first, second)
    for name, full in deltas(tmp_path / "full").items():
        cut = deltas(tmp_path / "narrow")[name]
        lost = torch.linalg.svdvals(full)[2:].norm()
        assert float((cut - full).norm()) == pytest.approx(float(lost), rel=1e-4)
        assert narrow.errors[f"{name}.weight"] == pytest.approx(relative_error(cut, exact[name]), rel=1e-4)


MIXED = {"rslora": True, "rank_pattern": {"v_proj": 6}}
NORMS = {"train_modules": ["norm"], "target_modules": ["q_proj"]}


@pytest.mark.parametrize(("family", "settings"), [("llama", MIXED), ("gpt2", {"lora_bias": True}), ("llama", NORMS)])
def test_lower_rank_drops_only_smallest_singular_values(family, settings, tmp_path):
    base = base_folder(tmp_path / "base", family)
    small = tmp_path / "small"
    adapter = adapter_folder(base, tmp_path / "adapter", **settings)
    result = write_adapter(adapter, small, MergeOptions(), rank=2)
    after = deltas(small)
    for name, delta in deltas(adapter).items():
        values = torch.linalg.svdvals(delta)
        expected = float(values[2:].norm())
        assert float((after[name] - delta).norm()) == pytest.approx(expected, rel=1e-4)
        assert result.errors[name] == pytest.approx(expected / float(values.norm()), rel=1e-4)
    biases = [read_content(read_adapter(folder)).biases for folder in (adapter, small)]
    assert all(torch.allclose(biases[0][name], biases[1][name]) for name in biases[0])
    assert read_adapter(small).config.rank == 2
    before, stored = (load_file(f / "adapter_model.safetensors") for f in (adapter, small))
    norms = [name for name in before if name.endswith("norm.weight")]
    assert bool(norms) == (settings is NORMS) and all(torch.equal(before[name], stored[name]) for name in norms)
    merge_run(small, tmp_path / "out")
    assert_merged(base, small, tmp_path / "out")


def test_unsupported_combinations_are_rejected(adapter_pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, first, _ = adapter_pair
    out = tmp_path / "out"
    defaults = MergeOptions()
    dora = adapter_folder(base, tmp_path / "dora", dora=True)
    merge_run(first, tmp_path / "linear", combine_options(dora, "linear"))
    with pytest.raises(UserError, match="is not a low-rank update"):
        merge_run(first, out, combine_options(dora, "concat"))
    as_adapters = [(combine_options(dora, "linear"), None, "an adapter cannot contain it")]
    as_adapters += [(defaults, None, "needs no conversion")]
    for merge_options, rank, message in (*as_adapters, (defaults, 4, "is not lower")):
        with pytest.raises(UserError, match=message):
            write_adapter(first, out, merge_options, rank=rank)
    for method, density, message in (("ties", 0.0, "density"), ("magic", 0.5, "unknown method 'magic'")):
        with pytest.raises(UserError, match=message):
            Recipe(method, WEIGHTS, density=density)
    assert not out.exists() and not list(tmp_path.glob(".out*"))
