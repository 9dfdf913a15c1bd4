"""What trains over two processes as in one: precisions, kinds of adapters, accumulated and recomputed
gradients, and steps that are not finite in one process alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from deltaw.training.fit import fit
from tests.conftest import laid_over
from tests.training.test_parallel import (
    ADAPTER,
    assert_same_run,
    ended,
    free_port,
    metrics,
    of,
    start,
    train,
    uneven,  # noqa: F401  (a fixture)
    write_settings,
)

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)
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
def test_two_processes_train_as_one(settings, uneven, tmp_path, name):  # noqa: F811
    made = laid_over(of(settings, uneven, tmp_path / "one"), METHODS[name])
    fit(made)
    path = write_settings(tmp_path / "run.yaml", made | {"output": str(tmp_path / "two")})
    told = train(path, 2)
    assert [status for status, *_ in told] == [0, 0], told
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_in_low_precision_they_agree_up_to_its_rounding(settings, uneven, tmp_path, precision):  # noqa: F811
    """Rows that meet in other microbatches are rounded otherwise: in bf16 by about 2^-8 of a value each time,
    in int8 gradients by about 2 % (docs/performance.md), of a loss that moves by less than itself."""
    tolerance = {"bf16": 2**-8, "int8": 2e-2}[precision]
    made = of(settings, uneven, tmp_path / "one") | {"precision": precision}
    fit(made)
    path = write_settings(tmp_path / "run.yaml", made | {"output": str(tmp_path / "two")})
    told = train(path, 2)
    assert [status for status, *_ in told] == [0, 0], told
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours.get("loss", 0.0) == pytest.approx(theirs.get("loss", 0.0), rel=tolerance)
        assert ours.get("label_tokens") == theirs.get("label_tokens")
    factors, expected = (load_file(tmp_path / name / ADAPTER) for name in ("two", "one"))
    moved = torch.cat([t.float().flatten() for name, t in expected.items() if "lora_B" in name])
    off = torch.cat([(factors[n] - t).float().flatten() for n, t in expected.items() if "lora_B" in n])
    assert off.norm() <= 0.1 * moved.norm()


def test_a_step_that_is_not_finite_in_one_process_is_left_out_by_all(settings, uneven, tmp_path):  # noqa: F811
    made = laid_over(of(settings, uneven, tmp_path / "run"), {"train": {"not_finite": "skip"}})
    path = write_settings(tmp_path / "run.yaml", made)
    port = free_port()
    zero, one = ended([start(0, 2, port, ["train", path]), start(1, 2, port, ["train", path], BREAKS_AT="2")])
    assert zero[0] == 0 and one == (0, "", ""), (zero, one)
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line or "skipped" in line]
    assert [line["step"] for line in lines if "skipped" in line] == [3]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 5, 6]


@pytest.mark.slow
def test_a_step_that_is_not_finite_in_one_process_ends_all(settings, uneven, tmp_path):  # noqa: F811
    path = write_settings(tmp_path / "run.yaml", of(settings, uneven, tmp_path / "run"))
    port = free_port()
    zero, one = ended([start(0, 2, port, ["train", path]), start(1, 2, port, ["train", path], BREAKS_AT="2")])
    assert zero[0] == 2 and one == (2, "", ""), (zero, one)
    assert "step 3" in zero[2] and "Traceback" not in zero[2]
    assert max(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")) == "step-000002"
