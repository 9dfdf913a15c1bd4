"""Verifying: what rounding explains passes, what it does not is refused and leaves no folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.errors import UserError
from deltaw.export.base import MergeOptions, Merging
from deltaw.export.combine import Recipe
from deltaw.export.merge import merge_run
from deltaw.export.verify import FEW, Amount, Verification, Verify
from tests.export.merge_cases import adapter_folder, text_base


class Spoiled(Verify):
    """Verifies a folder after ``factor`` was put on one of its weights."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def __call__(self, job: Merging, folder: Path) -> Verification:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"] *= self.factor
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return super().__call__(job, folder)


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaw.export.verify.MANY", Amount(12, 64))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    return adapter_folder(text_base(folder / "base"), folder / "adapter", size=0.05)


@pytest.mark.parametrize("precision", ["keep", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_right_merge_passes_and_says_how_far_it_moved(precision: str, run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    options = MergeOptions(precision=precision)
    found = merge_run(run, tmp_path / "out", options, verify=Verify(said.append)).verification
    assert isinstance(found, Verification) and found.passed
    assert found.rows == "general prompts" and found.count == FEW.rows
    assert any("without the settings of its data" in line for line in said)
    assert found.adapter is not None and found.adapter.mean > 10 * found.merged.mean
    if precision != "keep":
        assert 0 < found.merged.mean < found.allowed_mean
        assert found.merged.mean > 0.1 * found.rounding.mean  # the bound is of the right size
    assert json.dumps(found.as_dict())


@pytest.mark.parametrize("precision, factor, keep", [("keep", 1.0005, False), ("bf16", 1.3, True)])
def test_what_rounding_does_not_explain_is_refused(precision, factor, keep, run: Path, tmp_path: Path) -> None:
    options = MergeOptions(precision=precision)
    with pytest.raises(UserError, match="is not what base and adapter are together"):
        merge_run(run, tmp_path / "out", options, verify=Spoiled(factor), keep=keep)
    assert [file.name for file in tmp_path.iterdir()] == ["out"] * keep


def test_a_combination_is_verified_against_its_unrounded_sum(run: Path, tmp_path: Path) -> None:
    base = run.parent / "base"
    other = adapter_folder(base, tmp_path / "other", seed=3, size=0.05)
    options = MergeOptions(precision="bf16", others=(other,), recipe=Recipe("ties", (1.0, 0.5)))
    before = torch.get_rng_state()
    found = merge_run(run, tmp_path / "out", options, verify=Verify()).verification
    assert isinstance(found, Verification) and found.passed and found.adapter is None
    assert found.merged.mean > 0
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UserError):
        merge_run(run, tmp_path / "bad", options, verify=Spoiled(1.3))


def test_what_is_near_a_bound_is_compared_on_more_rows(monkeypatch, run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    monkeypatch.setattr("deltaw.export.verify.NEAR", 1e-3)
    found = merge_run(run, tmp_path / "out", MergeOptions(precision="bf16"), verify=Verify(said.append)).verification
    assert isinstance(found, Verification) and found.passed
    assert found.count == 12 and found.positions > FEW.rows * FEW.positions / 2
    assert len(set(said)) == len(said)  # nothing is said twice
