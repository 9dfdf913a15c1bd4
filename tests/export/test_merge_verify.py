"""Tests of merge verification: rounding errors pass, larger errors are rejected without leaving a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.errors import UserError
from deltaw.export.combine import Recipe
from deltaw.export.merge import merge_run
from deltaw.export.merge_plan import MergeOptions, MergePlan
from deltaw.export.verify import SMALL_SAMPLE, MergeVerifier, SampleSize, Verification
from tests.export.merge_cases import adapter_folder, text_base


class CorruptingVerifier(MergeVerifier):
    """Verifier that first multiplies one weight of the folder by ``factor``."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def __call__(self, job: MergePlan, folder: Path) -> Verification:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"] *= self.factor
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return super().__call__(job, folder)


@pytest.fixture(autouse=True)
def _small_large_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaw.export.verify.LARGE_SAMPLE", SampleSize(12, 64))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    return adapter_folder(text_base(folder / "base"), folder / "adapter", size=0.05)


@pytest.mark.parametrize("precision", ["keep", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_correct_merge_passes_and_reports_divergence(precision: str, run: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options = MergeOptions(precision=precision)
    verification = merge_run(run, tmp_path / "out", options, verify=MergeVerifier(lines.append)).verification
    assert isinstance(verification, Verification) and verification.passed
    assert verification.rows == "general prompts" and verification.count == SMALL_SAMPLE.rows
    assert any("has no data settings" in line for line in lines)
    assert verification.adapter is not None and verification.adapter.mean > 10 * verification.merged.mean
    if precision != "keep":
        assert 0 < verification.merged.mean < verification.allowed_mean
        assert verification.merged.mean > 0.1 * verification.rounding.mean  # the bound is not too loose
    assert json.dumps(verification.as_dict())


@pytest.mark.parametrize("precision, factor, keep", [("keep", 1.0005, False), ("bf16", 1.3, True)])
def test_error_beyond_rounding_is_rejected(precision, factor, keep, run: Path, tmp_path: Path) -> None:
    options = MergeOptions(precision=precision)
    with pytest.raises(UserError, match="differs from base model and adapter"):
        merge_run(run, tmp_path / "out", options, verify=CorruptingVerifier(factor), keep=keep)
    assert [file.name for file in tmp_path.iterdir()] == ["out"] * keep


def test_combination_is_verified_against_unrounded_sum(run: Path, tmp_path: Path) -> None:
    base = run.parent / "base"
    other = adapter_folder(base, tmp_path / "other", seed=3, size=0.05)
    options = MergeOptions(precision="bf16", additional_adapters=(other,), recipe=Recipe("ties", (1.0, 0.5)))
    before = torch.get_rng_state()
    verification = merge_run(run, tmp_path / "out", options, verify=MergeVerifier()).verification
    assert isinstance(verification, Verification) and verification.passed and verification.adapter is None
    assert verification.merged.mean > 0
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UserError):
        merge_run(run, tmp_path / "bad", options, verify=CorruptingVerifier(1.3))


def test_result_near_bound_is_verified_on_more_rows(monkeypatch, run: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    monkeypatch.setattr("deltaw.export.verify.NEAR_BOUND", 1e-3)
    options = MergeOptions(precision="bf16")
    verification = merge_run(run, tmp_path / "out", options, verify=MergeVerifier(lines.append)).verification
    assert isinstance(verification, Verification) and verification.passed
    assert verification.count == 12 and verification.positions > SMALL_SAMPLE.rows * SMALL_SAMPLE.positions / 2
    assert len(set(lines)) == len(lines)  # no line is logged twice
