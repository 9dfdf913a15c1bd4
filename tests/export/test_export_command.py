"""`deltaw export` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw.cli import main
from deltaw.training.prompting import Prompting, write_prompting
from tests.export import models


def typed(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.saved_run(tmp_path_factory.mktemp("exported"), "qwen3")[1]


def test_a_folder_gets_the_file_and_a_modelfile(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    write_prompting(run, Prompting("Be brief."))
    command = ("export", run, "--format", "gguf", "--output", out)  # by default what Ollama's own models have
    assert typed(*command, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[name] for name in ("format", "kind", "architecture")] == ["gguf", "q8_0", "qwen3"]
    assert found["files"] == [str(out / "run-q8_0.gguf"), str(out / "Modelfile")]
    assert (out / "run-q8_0.gguf").stat().st_size == found["size"]
    made = (out / "Modelfile").read_text()
    assert made.startswith("FROM ./run-q8_0.gguf\n") and 'SYSTEM """Be brief."""\n' in made
    assert typed(*command) == 2 and "already" in capsys.readouterr().err
    assert typed(*command, "--overwrite") == 0


def test_an_adapter_to_a_file_names_its_base(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.gguf"
    assert typed("export", run, "--format", "gguf-adapter", "--output", file) == 0
    assert "alpha 8" in capsys.readouterr().out
    assert (tmp_path / "a.Modelfile").read_text().startswith(f"FROM {run.parent / 'base'}\nADAPTER ./a.gguf\n")


@pytest.mark.parametrize("name", ["peft", "vllm", "mlx"])
def test_folders_of_the_other_formats(run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("export", run, "--format", name, "--output", tmp_path / "out", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert all(Path(file).is_file() for file in found["files"]) and found["rank"] == 4


@pytest.mark.parametrize(
    ("source", "flags", "told"),
    [
        ("run", "--format onnx", "optimum-cli"),
        ("run", "--format gguf --type q3_k", "q3_k"),
        ("run", "--format gguf-adapter --type q8_0", "q8_0"),
        ("run", "--format peft --type f16", "--type is for GGUF"),
        ("base", "--format gguf", "adapter"),
    ],
)
def test_what_is_not_exported_is_refused(run, tmp_path, source, flags, told, capsys):
    assert typed("export", run.parent / source, *flags.split(), "--output", tmp_path / "out") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
