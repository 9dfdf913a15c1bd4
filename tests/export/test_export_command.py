"""Tests of the ``deltaw export`` command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw.cli import main
from deltaw.inference.prompting import Prompting, write_prompting
from tests.export import models


def run_cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    return int(exit_info.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.saved_run(tmp_path_factory.mktemp("exported"), "qwen3")[1]


def test_export_to_folder_writes_gguf_and_modelfile(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write_prompting(run, Prompting("Be brief."))
    command = ("export", run, "--format", "gguf", "--output", out)  # q8_0 by default
    assert run_cli(*command, "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert [output[name] for name in ("format", "kind", "architecture")] == ["gguf", "q8_0", "qwen3"]
    assert output["files"] == [str(out / "run-q8_0.gguf"), str(out / "Modelfile")]
    assert (out / "run-q8_0.gguf").stat().st_size == output["size"]
    content = (out / "Modelfile").read_text()
    assert content.startswith("FROM ./run-q8_0.gguf\n") and 'SYSTEM """Be brief."""\n' in content
    assert run_cli(*command) == 2 and "already" in capsys.readouterr().err
    assert run_cli(*command, "--overwrite") == 0


def test_adapter_export_to_file_names_base_in_modelfile(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.gguf"
    assert run_cli("export", run, "--format", "gguf-adapter", "--output", file) == 0
    assert "alpha 8" in capsys.readouterr().out
    assert (tmp_path / "a.Modelfile").read_text().startswith(f"FROM {run.parent / 'base'}\nADAPTER ./a.gguf\n")


@pytest.mark.parametrize("name", ["peft", "vllm", "mlx"])
def test_folder_formats_write_the_listed_files(
    run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("export", run, "--format", name, "--output", tmp_path / "out", "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert all(Path(file).is_file() for file in output["files"]) and output["rank"] == 4


UNSUPPORTED_EXPORTS = [("run", "--format onnx", "optimum-cli"), ("run", "--format gguf --type q3_k", "q3_k")]
UNSUPPORTED_EXPORTS += [("run", "--format gguf-adapter --type q8_0", "q8_0")]
UNSUPPORTED_EXPORTS += [("run", "--format peft --type f16", "--type applies only to GGUF")]
UNSUPPORTED_EXPORTS += [("base", "--format gguf", "adapter")]


@pytest.mark.parametrize(("source", "flags", "message"), UNSUPPORTED_EXPORTS)
def test_unsupported_exports_are_rejected(run, tmp_path, source, flags, message, capsys):
    assert run_cli("export", run.parent / source, *flags.split(), "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
