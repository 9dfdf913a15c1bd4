"""What a reference means, and what is refused with which hint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltaw.hub import packages
from deltaw.hub.folders import Source, resolve
from tests.data.conftest import refusal


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def test_a_folder_a_file_and_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, file = make_model(tmp_path / "mine"), tmp_path / "Small-1B.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(str(folder)) == Source("folder", folder, "mine")
    assert resolve(str(file)) == Source("gguf", file, "Small-1B.Q4_1")
    assert resolve("owner/name-1.5") == Source("hub", "owner/name-1.5", "name-1.5")
    assert resolve("owner/name@refs/pr/3") == Source("hub", "owner/name", "name", "refs/pr/3")
    # A folder that is here wins over a hub id.
    make_model(tmp_path / "owner/name")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").kind == "folder"


@pytest.mark.parametrize(
    "reference", ["gpt2", "./nowhere/x", "a/b/c", "owner/model.gguf", "owner/name@../../x", "owner/name@/etc/x"]
)
def test_what_is_nowhere_is_refused(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no model at" in refusal(resolve, reference).what


def test_a_folder_that_is_no_model_is_refused_with_what_it_is_or_lacks(tmp_path: Path) -> None:
    make_model(tmp_path / "smollm-base")
    assert "smollm-base" in str(refusal(resolve, str(tmp_path / "smolm-base")).hint)
    files = (
        ("adapter_config.json", json.dumps({"base_model_name_or_path": "owner/base"}), "owner/base"),
        ("config.json", "{}", "no weights"),
        ("pytorch_model.bin", "pickle", "pickle"),
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "config.json" in refusal(resolve, str(folder)).what
    for name, content, said in files:
        (folder / name).write_text(content)
        assert said in str(refusal(resolve, str(folder)))
        (folder / "adapter_config.json").unlink(missing_ok=True)
    refused = refusal(resolve, str(folder / "pytorch_model.bin"))
    assert "not a model" in refused.what and "safetensors" in str(refused.hint)


def test_missing_file_of_split_weights_is_named(llama_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "copy"))
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    assert lost.name in refusal(resolve, str(folder)).what
    (folder / "model.safetensors.index.json").write_text("{")
    assert "index" in refusal(resolve, str(folder)).what


def test_the_only_model_inside_a_package_is_found_and_of_several_one_by_name(tmp_path: Path, monkeypatch) -> None:
    """The package's folder is given; fetching it is tested elsewhere."""
    monkeypatch.setattr(packages, "member", lambda reference: tmp_path / packages.parse(reference).path)
    package = "pypi:some-llm==1.0"
    assert "no model" in refusal(resolve, package).what
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/m.gguf").write_bytes(b"GGUF")
    assert resolve(package) == Source("gguf", tmp_path / "inner/m.gguf", "m")
    (tmp_path / "inner/m.gguf").unlink()
    model = make_model(tmp_path / "model")
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling/config.json").write_text("{}")
    assert resolve(package) == Source("folder", model, "some-llm")
    make_model(tmp_path / "b")
    assert resolve(f"{package}/b").location == tmp_path / "b"
    (tmp_path / "c.gguf").write_bytes(b"GGUF")
    refused = refusal(resolve, package)
    assert "'c.gguf', 'b', 'model'" in refused.what and f"{package}/c.gguf" in str(refused.hint)
