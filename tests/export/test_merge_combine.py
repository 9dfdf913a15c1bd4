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
from deltaw.export.combine import METHODS, Recipe, angles, dare, inner, norm, ties, trim, truncated
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


@pytest.mark.parametrize("method", METHODS)
def test_reported_errors_are_those_of_the_explicit_difference(
    method: str, two: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, first, second = two
    result = merge_run(first, tmp_path / "out", options(second, method, rank=3 if method == "svd" else None))
    exact, made = weighted_sum(first, second), merged_deltas(base, tmp_path / "out")
    assert made.keys() == exact.keys()
    for name, delta in exact.items():
        # The weights are stored in fp32, whose rounding of W + ΔW is in the difference too.
        expected = float((made[name] - delta).norm() / delta.norm())
        assert result.errors[f"{name}.weight"] == pytest.approx(expected, abs=1e-5)
    flat_exact, flat_made = (torch.cat([deltas[name].flatten() for name in exact]) for deltas in (exact, made))
    assert result.error == pytest.approx(float((flat_made - flat_exact).norm() / flat_exact.norm()), abs=1e-5)
    if method in ("concat", "linear"):
        assert result.error == pytest.approx(0.0, abs=1e-6)
    else:
        assert result.error > 0.01


def test_svd_is_the_best_of_its_rank(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, first, second = two
    result = merge_run(first, tmp_path / "out", options(second, "svd", rank=3))
    for name, delta in weighted_sum(first, second).items():
        values = torch.linalg.svdvals(delta)
        best = float(values[3:].square().sum().sqrt() / values.square().sum().sqrt())
        assert result.errors[f"{name}.weight"] == pytest.approx(best, abs=1e-6)
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
def test_full_rank_methods_as_adapter_are_cut_from_the_same_update(
    method: str, two: tuple[Path, Path, Path], tmp_path: Path
) -> None:
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
        error = float((cut - exact[name]).norm() / exact[name].norm())
        assert narrow.errors[f"{name}.weight"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"rslora": True, "rank_pattern": {"v_proj": 6}}, {"lora_bias": True}])
def test_a_lower_rank_loses_the_smallest_singular_values(settings: dict[str, object], tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "gpt2" if "lora_bias" in settings else "llama")
    adapter = adapter_folder(base, tmp_path / "adapter", **settings)
    result = write_adapter(adapter, tmp_path / "small", MergeOptions(), rank=2)
    before, after = deltas(adapter), deltas(tmp_path / "small")
    for name, delta in before.items():
        values = torch.linalg.svdvals(delta)
        expected = float(values[2:].square().sum().sqrt())
        assert float((after[name] - delta).norm()) == pytest.approx(expected, rel=1e-4)
        assert result.errors[name] == pytest.approx(expected / float(values.norm()), rel=1e-4)
    biases = [content_of(read_adapter(folder)).biases for folder in (adapter, tmp_path / "small")]
    assert all(torch.allclose(biases[0][name], biases[1][name]) for name in biases[0])
    assert read_adapter(tmp_path / "small").config.rank == 2


def test_what_a_lower_rank_keeps_beside_the_factors(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    adapter = adapter_folder(base, tmp_path / "adapter", train_modules=["norm"], target_modules=["q_proj"], rank=4)
    write_adapter(adapter, tmp_path / "small", MergeOptions(), rank=3)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "small"))
    kept = [name for name in before if name.endswith("norm.weight")]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    merge_run(tmp_path / "small", tmp_path / "out")
    assert_merged(base, tmp_path / "small", tmp_path / "out")


def test_factor_algebra_agrees_with_whole_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((20, 4), (4, 9)))
    other = (torch.randn(20, 3, generator=generator, dtype=torch.float64), right[:3])
    delta, second = left @ right, other[0] @ other[1]
    assert norm(left, right) == pytest.approx(float(delta.norm()))
    assert inner((left, right), other) == pytest.approx(float((delta * second).sum()))
    cut = truncated(left, right, 2)
    values = torch.linalg.svdvals(delta)
    torch.testing.assert_close(torch.cat([cut.kept, cut.discarded]), values[:4])
    assert float((cut.left @ cut.right - delta).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-4)
    same = angles(left, left @ torch.randn(4, 4, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(same, torch.ones(4, dtype=torch.float64))
    assert angles(torch.eye(6)[:, :2], torch.eye(6)[:, 2:5]).tolist() == [0.0, 0.0]


def test_refusals(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, first, _second = two
    out = tmp_path / "out"
    dora = adapter_folder(base, tmp_path / "dora", dora=True)
    with pytest.raises(UserError, match="not changed by a low-rank update alone"):
        merge_run(first, out, options(dora, "concat"))
    with pytest.raises(UserError, match="fits into no adapter"):
        write_adapter(first, out, options(dora, "linear"), rank=None)
    merge_run(first, tmp_path / "linear", options(dora, "linear"))
    with pytest.raises(UserError, match="is an adapter already"):
        write_adapter(first, out, MergeOptions(), rank=None)
    with pytest.raises(UserError, match="is not lower"):
        write_adapter(first, out, MergeOptions(), rank=4)
    with pytest.raises(UserError, match="density"):
        Recipe("ties", WEIGHTS, density=0.0)
    with pytest.raises(UserError, match="no method 'magic'"):
        Recipe("magic", WEIGHTS)
    assert not out.exists() and not list(tmp_path.glob(".out*"))
