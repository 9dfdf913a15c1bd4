"""Models without weights (skeletons) match loaded models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltaw.hub.loading import load
from deltaw.hub.skeletons import has_values, skeleton
from deltaw.memory.simulation import fake_tensors
from deltaw.runtime.packing_checks import can_pack
from tests.data.conftest import refusal
from tests.memory.conftest import model_of
from tests.tiny_models import PADDED, causal_model

TASKS = {"bert": "sequence-classification", "vit": "image-classification"}


def _shapes(model: torch.nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "tied llama", "gemma", "gpt2", "bert", "vit"])
@pytest.mark.each_value
def test_skeleton_has_the_tensors_of_the_loaded_model(family: str, dtype: str, tmp_path: Path) -> None:
    model_of(family, "fp32").save_pretrained(tmp_path)
    task = TASKS.get(family, "causal-lm")
    loaded = load(str(tmp_path), precision=dtype, device="cpu", threads=1, task=task, log=lambda line: None)
    with fake_tensors():
        empty = skeleton(tmp_path, dtype=dtype, task=task)
    assert _shapes(empty) == _shapes(loaded.model)
    assert not has_values(empty) and has_values(loaded.model)
    assert not empty.training and not any(p.requires_grad for p in empty.parameters())
    assert empty.config._attn_implementation == loaded.model.config._attn_implementation


def test_skeleton_needs_only_a_configuration_for_the_task(tmp_path: Path) -> None:
    for family in ("llama", "vit"):
        model_of(family, "fp32").config.save_pretrained(tmp_path / family)
    with fake_tensors():
        assert not has_values(skeleton(tmp_path / "llama", dtype="bf16"))
        assert "does not" in refusal(skeleton, tmp_path / "vit", dtype="fp32", task="causal-lm").message


@pytest.mark.parametrize("family", ["llama", *PADDED])
def test_packing_decision_is_equal_on_fake_tensors(family: str) -> None:
    real = can_pack(causal_model(family))
    with fake_tensors():
        assert can_pack(causal_model(family)).value == real.value
