"""What trains over two processes as in one: precisions, kinds of adapters, accumulated and recomputed
gradients, and steps that are not finite in one process alone."""

from __future__ import annotations

import pytest
import torch

from tests.training.parallel_runs import needs_gloo, train_two, trains_as_one, write_settings
from tests.training.runs import adapter, metrics

pytestmark = needs_gloo
METHODS = {
    "accumulated": {"train": {"tokens_per_pass": 64}},
    "recomputed": {"train": {"checkpointing": True, "tokens_per_pass": 64}},
    "dora": {"lora": {"dora": True}},
    "prompt": {"method": "prompt", "prompt": {"length": 4}},
    "activated": {"lora": {"activation": "completion", "invocation_tokens": [85, 67, 91]}},  # "say"
    "random": {"method": "random", "random": {"weights": 0.05}},
    "modules": {"lora": {"train_modules": ["lm_head"]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one(of, tmp_path, name):
    trains_as_one(of(tmp_path / "one", **METHODS[name]), of(tmp_path / "two", **METHODS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_in_low_precision_they_agree_up_to_its_rounding(of, tmp_path, precision):
    """Rows that meet in other microbatches are rounded otherwise: in bf16 by about 2^-8 of a value each time,
    in int8 gradients by about 2 % (docs/performance.md), of a loss that moves by less than itself."""
    tolerance = {"bf16": 2**-8, "int8": 2e-2}[precision]

    def agree(two, one):
        for ours, theirs in zip(metrics(two), metrics(one), strict=True):
            assert ours.get("loss", 0.0) == pytest.approx(theirs.get("loss", 0.0), rel=tolerance)
            assert ours.get("label_tokens") == theirs.get("label_tokens")
        factors, expected = adapter(two), adapter(one)
        moved = torch.cat([t.float().flatten() for name, t in expected.items() if "lora_B" in name])
        off = torch.cat([(factors[n] - t).float().flatten() for n, t in expected.items() if "lora_B" in n])
        assert off.norm() <= 0.1 * moved.norm()

    one, two = (of(tmp_path / name, precision=precision) for name in ("one", "two"))
    trains_as_one(one, two, same=agree)


def test_a_step_that_is_not_finite_in_one_process_is_left_out_by_all(of, tmp_path):
    path = write_settings(tmp_path / "run.yaml", of(tmp_path / "run", train={"not_finite": "skip"}))
    zero, one = train_two(path, BREAKS_AT="2")
    assert zero[0] == 0 and one == (0, "", ""), (zero, one)
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line or "skipped" in line]
    assert [line["step"] for line in lines if "skipped" in line] == [3]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 5, 6]


@pytest.mark.slow
def test_a_step_that_is_not_finite_in_one_process_ends_all(of, tmp_path):
    path = write_settings(tmp_path / "run.yaml", of(tmp_path / "run"))
    zero, one = train_two(path, BREAKS_AT="2")
    assert zero[0] == 2 and one == (2, "", ""), (zero, one)
    assert "step 3" in zero[2] and "Traceback" not in zero[2]
    assert max(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")) == "step-000002"
