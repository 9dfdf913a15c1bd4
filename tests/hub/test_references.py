"""Model references are resolved, or rejected with a hint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltaw.hub import packages
from deltaw.hub.folders import ModelSource, resolve
from tests.data.conftest import refusal


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def test_folder_file_and_hub_id_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "mine")
    file = tmp_path / "Small-1B.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(str(folder)) == ModelSource("folder", folder, "mine")
    assert resolve(str(file)) == ModelSource("gguf", file, "Small-1B.Q4_1")
    assert resolve("owner/name-1.5") == ModelSource("hub", "owner/name-1.5", "name-1.5")
    assert resolve("owner/name@refs/pr/3") == ModelSource("hub", "owner/name", "name", "refs/pr/3")
    # A local folder has precedence over a hub id.
    make_model(tmp_path / "owner/name")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").kind == "folder"


@pytest.mark.parametrize(
    "reference", ["gpt2", "./nowhere/x", "a/b/c", "owner/model.gguf", "owner/name@../../x", "owner/name@/etc/x"]
)
def test_missing_reference_is_rejected(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no model found at" in refusal(resolve, reference).message


def test_folder_without_a_model_is_rejected_with_the_reason(tmp_path: Path) -> None:
    make_model(tmp_path / "smollm-base")
    assert "smollm-base" in str(refusal(resolve, str(tmp_path / "smolm-base")).hint)
    files = (
        ("adapter_config.json", json.dumps({"base_model_name_or_path": "owner/base"}), "owner/base"),
        ("config.json", "{}", "no weights"),
        ("pytorch_model.bin", "pickle", "pickle"),
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "config.json" in refusal(resolve, str(folder)).message
    for name, content, message in files:
        (folder / name).write_text(content)
        assert message in str(refusal(resolve, str(folder)))
        (folder / "adapter_config.json").unlink(missing_ok=True)
    error = refusal(resolve, str(folder / "pytorch_model.bin"))
    assert "not a model" in error.message and "safetensors" in str(error.hint)


def test_missing_shard_is_reported(llama_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "copy"))
    missing = sorted(folder.glob("model-*.safetensors"))[1]
    missing.unlink()
    assert missing.name in refusal(resolve, str(folder)).message
    (folder / "model.safetensors.index.json").write_text("{")
    assert "index" in refusal(resolve, str(folder)).message


def test_model_in_a_package_is_unique_or_selected_by_path(tmp_path: Path, monkeypatch) -> None:
    """The package folder is a stub. Fetching is tested elsewhere."""
    monkeypatch.setattr(packages, "member", lambda reference: tmp_path / packages.parse(reference).path)
    package = "pypi:some-llm==1.0"
    assert "no model" in refusal(resolve, package).message
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/m.gguf").write_bytes(b"GGUF")
    assert resolve(package) == ModelSource("gguf", tmp_path / "inner/m.gguf", "m")
    (tmp_path / "inner/m.gguf").unlink()
    model = make_model(tmp_path / "model")
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling/config.json").write_text("{}")
    assert resolve(package) == ModelSource("folder", model, "some-llm")
    make_model(tmp_path / "b")
    assert resolve(f"{package}/b").location == tmp_path / "b"
    (tmp_path / "c.gguf").write_bytes(b"GGUF")
    error = refusal(resolve, package)
    assert "'c.gguf', 'b', 'model'" in error.message and f"{package}/c.gguf" in str(error.hint)
