"""The sides of the GPU benchmark train the same model on the same rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> dict:
    """A prepared job of the tiny model."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(FOLDER))
        import gpu_sides

        folder = tmp_path_factory.mktemp("models") / "tiny"
        job = {"fake": True, "seconds": 0.0, "size": "tiny", "folder": str(folder)}
        gpu_sides.prepare(job, lambda result: None)
        yield job
    for name in ("gpu_sides", "step_models", "machine"):
        sys.modules.pop(name, None)


def measured(job: dict, **side: object) -> dict[str, dict]:
    import gpu_sides

    results: list[dict] = []
    gpu_sides.measure({**job, **side}, results.append)
    return {result.pop("kind"): result for result in results}


def test_sides_have_equal_losses_and_count_launches(job):
    pytest.importorskip("peft")
    import figure_tables
    import gpu_sides

    deltaw = measured(job, side="deltaw")
    peft = measured(job, side="peft", attention="sdpa")
    assert list(deltaw) == list(peft) == list(gpu_sides.KINDS)
    for kind, result in deltaw.items():
        assert figure_tables.loss_difference([result], [peft[kind]]) < 2e-3
        assert result["losses"][0] > result["losses"][-1]  # all later losses depend on updates
        for side in (result, peft[kind]):
            assert side["rows_per_second"] > 0 and side["launches"] > 100 and side["synchronizations"] > 0
            assert 0 < side["peak_bytes"] <= side["reserved_bytes"]
            assert len(side["seconds"]) == gpu_sides.WARM + 2  # without the profiled step


def test_peers_use_smaller_microbatches_if_memory_is_insufficient(job, monkeypatch):
    pytest.importorskip("peft")
    import gpu_sides

    whole = measured(job, side="peft", attention="sdpa")
    train = gpu_sides.train_peer

    def limited(model, batches, recorder):
        if len(batches) < 4:
            raise torch.OutOfMemoryError("too many rows")
        train(model, batches, recorder)

    monkeypatch.setattr(gpu_sides, "train_peer", limited)
    for kind, result in measured(job, side="peft", attention="sdpa").items():
        assert (whole[kind]["microbatch"], result["microbatch"]) == (4, 1)
        assert result["losses"] == pytest.approx(whole[kind]["losses"], abs=2e-3)


def test_flattened_rows_have_the_labels_of_padded_rows(job):
    import gpu_sides

    examples = [([5, 6, 7], 0), ([8, 9, 10, 11], 2)]
    padded = gpu_sides.tensors(examples, flatten=False)
    flat = gpu_sides.tensors(examples, flatten=True)
    assert padded["labels"].tolist() == [[-100, 6, 7, -100], [-100, -100, 10, 11]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert flat["labels"].tolist() == [[-100, 6, 7, -100, -100, 10, 11]]
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
