"""Detection of changed inputs of a stored result."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from deltaw.experiments.folder import content_hash


def test_content_hash_detects_changed_weight(tmp_path: Path) -> None:
    weights = torch.randn(64, 64)
    save_file({"weight": weights}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    before = content_hash(str(tmp_path))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert before == content_hash(str(tmp_path))
    weights[17, 3] += 1
    save_file({"weight": weights}, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size == size
    assert content_hash(str(tmp_path)) != before
    assert content_hash("owner/name") == ""
