"""`deltaw deploy`: models of Ollama and LM Studio, and the answers of both sides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltaw.export.deploy import Deployed, deploy
from deltaw.export.programs import LMStudio, Ollama
from deltaw.training.prompting import Prompting, write_prompting
from tests.cli.conftest import assert_refused, call
from tests.data.conftest import refusal
from tests.export import models, ollama_server
from tests.export.ollama_server import LlamaCpp, Models

__all__ = ["call"]
CHATTED = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = models.saved_run(tmp_path_factory.mktemp("deployed"), "qwen3")[1]
    write_prompting(folder, Prompting("Be brief."))
    return folder


@pytest.fixture
def ollama(tmp_path: Path) -> Iterator[Models]:
    (tmp_path / "blobs").mkdir()
    with ollama_server.running(tmp_path / "blobs", lambda file, prompt, options, stops: prompt) as made:
        yield made


def test_ollama_gets_the_file_the_template_the_stops_and_the_system_prompt(run: Path, ollama: Models) -> None:
    done = deploy(str(run), Ollama(ollama.url), name="me/brief:v1", questions=2)
    made = ollama.made["me/brief:v1"]
    (blob,) = made["files"].values()
    assert ollama.blobs[blob].read_bytes()[:4] == b"GGUF"
    assert made["system"] == "Be brief." and "<|im_end|>" in made["parameters"]["stop"]
    # The server answers with what its template made of the question: what the run itself is asked.
    assert [one.program for one in done.asked] == [CHATTED.format(one.question) for one in done.asked]
    asked = [value for path, value in ollama.requests if path == "/v1/chat/completions"]
    assert len(asked) == 2 and all(one["temperature"] == 0 for one in asked)
    assert made["parameters"]["repeat_penalty"] == 1
    assert done.held_out == 0 and not any(one.exact for one in done.asked) and "rounding" in done.lines()[-1]


def test_a_model_of_that_name_is_replaced_only_if_asked_and_its_file_sent_once(run: Path, ollama: Models) -> None:
    deploy(str(run), Ollama(ollama.url), questions=0)
    refused = refusal(deploy, str(run), Ollama(ollama.url))
    assert "has a model 'run' already" in refused.what and "--overwrite" in str(refused.hint)
    (blob,) = ollama.blobs.values()
    written = blob.stat().st_mtime_ns
    deploy(str(run), Ollama(ollama.url), questions=0, overwrite=True)
    assert blob.stat().st_mtime_ns == written
    ollama.refused = "unsupported architecture"
    assert "unsupported architecture" in refusal(deploy, str(run), Ollama(ollama.url), name="b", questions=0).what


def test_the_command_prints_a_table_of_at_most_80_columns(run: Path, ollama: Models, call) -> None:
    ended = call("deploy", "ollama", run, "--server", ollama.url, "--questions", 3, status=0)
    assert "3 questions, 0 of them held-out prompts: 0 equal answers" in ended.out and "q8_0" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
    told = json.loads(
        call("deploy", "ollama", run, "--server", ollama.url, "--name", "x", "--questions", 1, "--json").out
    )
    assert told["name"] == "x" and told["asked"][0]["exact"] is False


def test_a_program_that_is_not_there_and_what_cannot_be_exported_are_refused(run: Path, tmp_path: Path, call) -> None:
    nobody = "127.0.0.1:9"
    ended = call("deploy", "ollama", run, "--server", nobody)
    assert_refused(ended, "Ollama does not answer at http://127.0.0.1:9", "hint")
    assert_refused(call("deploy", "ollama", run, "--server", "ftp://x"), "is not an address")
    assert_refused(call("deploy", "ollama", run, "--server", nobody, "--name", "../x"), "cannot be a model's name")
    assert_refused(call("deploy", "lmstudio", run, "--models", tmp_path / "none"), "no folder of models", "lmstudio.ai")
    assert_refused(call("deploy"), "ollama", "RUN")
    assert_refused(call("deploy", "lmstudio", run, "--models", tmp_path, "--type", "q3_k"), "q3_k")
    assert not list(tmp_path.iterdir())  # nothing is left half done


def test_lm_studio_gets_a_folder_and_is_asked_where_its_server_runs(run: Path, ollama: Models, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    said: list[str] = []
    program = LMStudio(ollama.url, tmp_path / "models")
    done = deploy(str(run), program, name="brief", questions=1, say=said.append)
    (file,) = (path for path in tmp_path.joinpath("models").rglob("*") if path.is_file())
    assert file == tmp_path / "models/deltaw/brief/brief.gguf" and str(file) in done.place
    assert not done.asked and "does not list 'brief' yet" in said[-1]
    ollama.made["deltaw/brief"] = {"files": {"": "b"}, "template": models_template(), "model": "deltaw/brief"}
    ollama.blobs["b"] = file
    done = deploy(str(run), program, name="brief", questions=1, overwrite=True)
    assert [one.program for one in done.asked] == [CHATTED.format(one.question) for one in done.asked]


def models_template() -> str:
    return "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"


def test_held_out_prompts_are_asked_first(settings, ollama: Models, tmp_path: Path) -> None:
    from deltaw.export.deploy import questions_of
    from deltaw.runs.fit import fit
    from deltaw.training.origin import open_run

    output = fit(settings(tmp_path / "run")).output
    session = open_run(str(output), say=lambda line: None)
    asked, held_out = questions_of(session, 4)
    assert held_out == 2 and all(text.startswith("paint it ") for text in asked[:2]) and len(set(asked)) == 4


@pytest.mark.slow
def test_llama_cpp_behind_ollamas_api_answers_as_the_run(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    server = LlamaCpp()
    try:
        with ollama_server.running(tmp_path, server) as made:
            done: Deployed = deploy(str(run), Ollama(made.url), kind="f32", precision="fp32")
    finally:
        server.close()
    assert len(done.asked) == 20
    assert sum(one.exact for one in done.asked) >= 18, done.lines()
