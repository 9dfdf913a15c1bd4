"""Tests of ``deltaw deploy``: models of Ollama and LM Studio, and the comparison of their answers with the run's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltaw.export.deploy import DeploymentResult, deploy
from deltaw.export.formats import export
from deltaw.export.programs import LMStudio, Ollama
from deltaw.inference.prompting import Prompting, write_prompting
from tests.cli.conftest import assert_refused, call
from tests.data.conftest import refusal
from tests.export import models, ollama_server
from tests.export.ollama_server import LlamaCpp, Models
from tests.hub.app_stores import add_model

__all__ = ["call"]
RENDERED_PROMPT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = models.saved_run(tmp_path_factory.mktemp("deployed"), "qwen3")[1]
    write_prompting(folder, Prompting("Be brief."))
    return folder


@pytest.fixture
def ollama(tmp_path: Path) -> Iterator[Models]:
    (tmp_path / "blobs").mkdir()
    with ollama_server.running(tmp_path / "blobs", lambda file, prompt, options, stops: prompt) as server:
        yield server


def test_ollama_receives_file_template_stops_and_system_prompt(run: Path, ollama: Models) -> None:
    result = deploy(str(run), Ollama(ollama.url), name="me/brief:v1", questions=2)
    model = ollama.created["me/brief:v1"]
    (blob,) = model["files"].values()
    assert ollama.blobs[blob].read_bytes()[:4] == b"GGUF"
    assert model["system"] == "Be brief." and "<|im_end|>" in model["parameters"]["stop"]
    # The fake server returns the rendered prompt, which must equal the run's own prompt.
    expected = [RENDERED_PROMPT.format(answer.question) for answer in result.asked]
    assert [answer.program for answer in result.asked] == expected
    payloads = [value for path, value in ollama.requests if path == "/v1/chat/completions"]
    assert len(payloads) == 2 and all(answer["temperature"] == 0 for answer in payloads)
    assert model["parameters"]["repeat_penalty"] == 1
    assert result.held_out == 0 and not any(answer.exact for answer in result.asked)
    assert "rounding" in result.lines()[-1]


def test_model_is_replaced_only_with_overwrite_and_uploaded_once(run: Path, ollama: Models) -> None:
    deploy(str(run), Ollama(ollama.url), questions=0)
    error = refusal(deploy, str(run), Ollama(ollama.url))
    assert "already has a model 'run'" in error.message and "--overwrite" in str(error.hint)
    (blob,) = ollama.blobs.values()
    modified_ns = blob.stat().st_mtime_ns
    deploy(str(run), Ollama(ollama.url), questions=0, overwrite=True)
    assert blob.stat().st_mtime_ns == modified_ns
    ollama.rejection = "unsupported architecture"
    assert "unsupported architecture" in refusal(deploy, str(run), Ollama(ollama.url), name="b", questions=0).message


def test_command_output_fits_80_columns(run: Path, ollama: Models, call) -> None:
    result = call("deploy", "ollama", run, "--server", ollama.url, "--questions", 3, status=0)
    assert "3 questions (0 held-out prompts): 0 equal answers" in result.out and "q8_0" in result.out
    assert max(map(len, result.out.splitlines())) <= 80
    flags = ("--server", ollama.url, "--name", "x", "--questions", 1, "--json")
    output = json.loads(call("deploy", "ollama", run, *flags).out)
    assert output["name"] == "x" and output["asked"][0]["exact"] is False


def test_unreachable_programs_and_unsupported_exports_are_rejected(run: Path, tmp_path: Path, call) -> None:
    address = "127.0.0.1:9"
    result = call("deploy", "ollama", run, "--server", address)
    assert_refused(result, "Ollama does not respond at http://127.0.0.1:9", "hint")
    assert_refused(call("deploy", "ollama", run, "--server", "ftp://x"), "is not an address")
    assert_refused(call("deploy", "ollama", run, "--server", address, "--name", "../x"), "is not a valid model name")
    result = call("deploy", "lmstudio", run, "--models", tmp_path / "none")
    assert_refused(result, "model folder does not exist", "lmstudio.ai")
    assert_refused(call("deploy"), "ollama", "RUN")
    assert_refused(call("deploy", "lmstudio", run, "--models", tmp_path, "--type", "q3_k"), "q3_k")
    assert not list(tmp_path.iterdir())  # no partial output remains


def test_lm_studio_receives_folder_and_answers_if_server_runs(run: Path, ollama: Models, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    lines: list[str] = []
    program = LMStudio(ollama.url, tmp_path / "models")
    result = deploy(str(run), program, name="brief", questions=1, log=lines.append)
    (file,) = (path for path in tmp_path.joinpath("models").rglob("*") if path.is_file())
    assert file == tmp_path / "models/deltaw/brief/brief.gguf" and str(file) in result.place
    assert not result.asked and "does not list 'brief' yet" in lines[-1]
    ollama.created["deltaw/brief"] = {"files": {"": "b"}, "template": chatml_template(), "model": "deltaw/brief"}
    ollama.blobs["b"] = file
    result = deploy(str(run), program, name="brief", questions=1, overwrite=True)
    expected = [RENDERED_PROMPT.format(answer.question) for answer in result.asked]
    assert [answer.program for answer in result.asked] == expected


def chatml_template() -> str:
    return "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"


def test_held_out_prompts_are_selected_first(settings, ollama: Models, tmp_path: Path) -> None:
    from deltaw.export.deploy import select_questions
    from deltaw.inference.open_run import open_run
    from deltaw.runs.fit import fit

    output = fit(settings(tmp_path / "run")).output
    session = open_run(str(output), log=lambda line: None)
    questions, held_out = select_questions(session, 4)
    assert held_out == 2 and all(text.startswith("paint it ") for text in questions[:2]) and len(set(questions)) == 4


@pytest.mark.slow
def test_llama_cpp_behind_ollama_api_matches_run_answers(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    server = LlamaCpp()
    try:
        with ollama_server.running(tmp_path, server) as models_server:
            result: DeploymentResult = deploy(str(run), Ollama(models_server.url), kind="f32", precision="fp32")
    finally:
        server.close()
    assert len(result.asked) == 20
    assert sum(answer.exact for answer in result.asked) >= 18, result.lines()


def saved_run_in_ollama(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> tuple[Path, Path]:
    """Save an adapter of ``ollama:tiny:1b``. Return its folder, and the blob of the base model in a fake store."""
    _, run = models.saved_run(folder, "qwen3", **settings)
    config = json.loads((run / "adapter_config.json").read_text())
    blob = add_model(folder / "ollama", "tiny:1b", models.base_gguf(run).read_bytes(), {"template": b"x"})
    (run / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "ollama:tiny:1b"}))
    write_prompting(run, Prompting("Be brief."))
    monkeypatch.setenv("OLLAMA_MODELS", str(folder / "ollama"))
    return run, blob


@pytest.fixture(scope="module")
def store_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield saved_run_in_ollama(tmp_path_factory.mktemp("stored"), monkeypatch)


def test_only_the_adapter_is_imported_if_ollama_has_the_base(store_run: tuple[Path, Path], ollama: Models) -> None:
    run, blob = store_run
    ollama.add_base("tiny:1b", blob)
    lines: list[str] = []
    result = deploy(str(run), Ollama(ollama.url), questions=2, log=lines.append)
    payload = dict(ollama.requests)["/api/create"]
    (digest,) = payload["adapters"].values()
    assert payload["from"] == "tiny:1b" and "files" not in payload and [*payload["adapters"]] == ["adapter.gguf"]
    assert ollama.blobs[digest].stat().st_size < blob.stat().st_size / 2 and ollama.blobs[digest] != blob
    assert payload["system"] == "Be brief." and "<|im_end|>" in payload["parameters"]["stop"]
    assert result.base == "tiny:1b" and result.kind == "f32" and "an adapter of 'tiny:1b'" in result.place
    assert [answer.program for answer in result.asked] == [RENDERED_PROMPT.format(a.question) for a in result.asked]
    assert result.as_dict()["base"] == "tiny:1b" and "Ollama runs tiny:1b" in result.lines()[-1]
    assert not any("merging" in line for line in lines)


@pytest.mark.parametrize(
    ("base", "texts", "error", "reason"),
    [
        ("other", {}, "", "has no model 'tiny:1b'"),
        ("tiny:1b", {}, "adapters are not supported", "adapters are not supported"),
        ("changed", {}, "", "has other weights"),
    ],
)
def test_weights_are_merged_if_ollama_cannot_apply_the_adapter(
    store_run: tuple[Path, Path],
    ollama: Models,
    tmp_path: Path,
    base: str,
    texts: dict[str, str],
    error: str,
    reason: str,
) -> None:
    run, blob = store_run
    if base == "changed":
        base = "tiny:1b"
        blob = add_model(tmp_path / "changed", base, b"GGUF")
    ollama.add_base(base, blob, **texts)
    ollama.adapter_error = error
    lines: list[str] = []
    result = deploy(str(run), Ollama(ollama.url), questions=0, log=lines.append)
    assert result.base is None and result.kind == "q8_0" and "adapters" not in ollama.created["run"] | {"from": ""}
    assert any("merging the adapter" in line and reason in line for line in lines), lines


def test_base_with_system_prompt_is_used_only_if_the_run_replaces_it(
    store_run: tuple[Path, Path], ollama: Models, tmp_path: Path
) -> None:
    run, blob = store_run
    ollama.add_base("tiny:1b", blob, system="You are Tiny.")
    assert deploy(str(run), Ollama(ollama.url), questions=0).base == "tiny:1b"
    write_prompting(run, Prompting(""))
    lines: list[str] = []
    assert deploy(str(run), Ollama(ollama.url), questions=0, name="plain", log=lines.append).base is None
    write_prompting(run, Prompting("Be brief."))
    assert any("contains messages" in line for line in lines)


def test_explicit_type_merges_the_weights(store_run: tuple[Path, Path], ollama: Models, call) -> None:
    run, blob = store_run
    ollama.add_base("tiny:1b", blob)
    flags = ("--server", ollama.url, "--questions", 0, "--json")
    result = json.loads(call("deploy", "ollama", run, "--name", "a", *flags, "--type", "f16", status=0).out)
    assert (result["base"], result["kind"]) == (None, "f16")
    assert json.loads(call("deploy", "ollama", run, *flags, status=0).out)["base"] == "tiny:1b"


def test_adapter_that_a_gguf_file_cannot_contain_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ollama: Models
) -> None:
    run, blob = saved_run_in_ollama(tmp_path, monkeypatch, use_dora=True)
    ollama.add_base("tiny:1b", blob)
    lines: list[str] = []
    result = deploy(str(run), Ollama(ollama.url), questions=0, log=lines.append)
    assert result.base is None and result.kind == "q8_0" and "files" in ollama.created["run"]
    assert any("merging the adapter" in line and "DoRA" in line for line in lines), lines


def test_lm_studio_receives_merged_weights(store_run: tuple[Path, Path], tmp_path: Path, ollama: Models) -> None:
    (tmp_path / "models").mkdir()
    result = deploy(str(store_run[0]), LMStudio(ollama.url, tmp_path / "models"), questions=0)
    assert result.base is None and result.kind == "q8_0"


def test_modelfile_of_adapter_names_the_model_of_ollama(store_run: tuple[Path, Path], tmp_path: Path) -> None:
    export(store_run[0], "gguf-adapter", tmp_path / "out")
    lines = (tmp_path / "out/Modelfile").read_text().splitlines()
    assert lines[:2] == ["FROM tiny:1b", "ADAPTER ./run-f32.gguf"]


@pytest.mark.slow
def test_llama_cpp_with_base_and_adapter_matches_run_answers(store_run: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    server = LlamaCpp()
    try:
        with ollama_server.running(tmp_path, server) as models_server:
            models_server.add_base("tiny:1b", store_run[1])
            result = deploy(str(store_run[0]), Ollama(models_server.url), precision="fp32")
    finally:
        server.close()
    assert result.base == "tiny:1b" and len(result.asked) == 20
    assert sum(answer.exact for answer in result.asked) >= 18, result.lines()
