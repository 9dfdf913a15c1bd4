"""Untrusted folders, passed to every command that accepts a folder.

Their code is not executed, files outside of them are not opened, and downloads do not start. The error message names
the reference and the flag that allows it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from deltaw.data import rendering
from deltaw.hub import packages
from deltaw.lora import expressions
from tests.cli.conftest import update_file
from tests.conftest import write_rows
from tests.experiments.conftest import use_local_worker

CANARY = "the canary sings"
ENDLESS_EXPRESSION = "(([a-z_0-9]+)[.]?)+!"
ENDLESS_TEMPLATE = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
)
CODE = "import pathlib\n(pathlib.Path(__file__).resolve().parent / 'ran').write_text('x')\n"

_opened_paths: list[str] = []
_watched_folders: list[str] = []


def _record_open(event: str, arguments: tuple) -> None:
    if _watched_folders and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if any(path.startswith(outside) for outside in _watched_folders):
            _opened_paths.append(path)


sys.addaudithook(_record_open)


@pytest.fixture
def outside(tmp_path: Path, model_folder: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Create a folder with a model, an adapter, rows and a text file, and record every access to it. The user has not
    referenced any of them before.
    """
    folder = tmp_path / "outside"
    shutil.copytree(model_folder, folder / "model")
    shutil.copytree(finished_run, folder / "run")
    (folder / "text").write_text(CANARY)
    write_rows(folder / "rows.jsonl", [{"prompt": "a", "completion": CANARY}] * 4)
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    monkeypatch.setattr(expressions, "SECONDS", 0.05)
    monkeypatch.setattr(packages, "_download", lambda package: pytest.fail(f"{package} was fetched"))
    _opened_paths.clear()
    _watched_folders.append(str(folder.resolve()))
    yield folder
    _watched_folders.clear()


@pytest.fixture
def assert_rejected(call, outside) -> Callable[..., None]:
    """Return a function that asserts that a command is rejected with these words and opens no file in ``outside``."""

    def check(arguments: list, *words: str) -> None:
        result = call(*arguments, stdin="hi\n")
        output = result.out + result.err + result.unwrapped
        assert result.status == 2, (arguments, output)
        assert result.err.count("error: ") == 1 and "hint: " in result.err, output
        for word in words:
            assert word in output, output
        assert "Traceback" not in output and CANARY not in output
        assert not _opened_paths, (arguments, _opened_paths)
        assert not list(outside.parent.rglob("ran"))

    return check


@pytest.fixture
def run(tmp_path: Path, finished_run: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def model(tmp_path: Path, model_folder: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def _replace_with_link(file: Path, target: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(target)


# Models


def _custom_code(auto: dict[str, object], model: Path, outside: Path, **changes: object) -> str:
    update_file(model / "tokenizer_config.json", auto_map=auto, **changes)
    if "AutoConfig" in auto:
        update_file(model / "config.json", auto_map=auto, model_type="own")
    (model / "own.py").write_text(CODE)
    return "its own Python code"


def _link(name: str, target: str, folder: Path, outside: Path) -> str:
    _replace_with_link(folder / name, outside / target)
    return "link that leads out"


def _index(model: Path, outside: Path) -> str:
    (model / "model.safetensors").unlink()
    shard = str(outside / "model" / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return "not in the model's folder"


def _named_index(model: Path, outside: Path) -> str:
    word = _index(model, outside)
    (model / "model.safetensors.index.json").rename(model / "other.safetensors.index.json")
    update_file(model / "config.json", transformers_weights="other.safetensors.index.json")
    (model / "some.safetensors").write_bytes(b"")
    return word


def _weights(name: str, model: Path, outside: Path) -> str:
    (model / "adapter_model.bin").write_bytes(b"")
    update_file(model / "config.json", transformers_weights=name)
    return "not a safetensors file in its folder"


def _vocabulary(model: Path, outside: Path) -> str:
    update_file(model / "tokenizer_config.json", vocab=str(outside / "text"), tokenizer_class="BertTokenizer")
    return "not in the model's folder"


def _add_adapter(model: Path, outside: Path) -> str:
    text = json.dumps({"peft_type": "LORA", "target_modules": ENDLESS_EXPRESSION, "r": 2})
    (model / "adapter_config.json").write_text(text)
    return "both model and adapter"


AUTO: dict[str, object] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
AUTO_TOKENIZER: dict[str, object] = {"AutoTokenizer": ["own.T", None]}
MODELS = {
    "code": partial(_custom_code, AUTO | AUTO_TOKENIZER),
    "code of another": partial(_custom_code, {"AutoConfig": "somebody/else--own.Config"}),
    "code of the tokenizer": partial(_custom_code, AUTO_TOKENIZER, tokenizer_class="T"),
    **{f: partial(_link, f, f"model/{f}") for f in ("config.json", "tokenizer.json", "model.safetensors")},
    "template": partial(_link, "chat_template.jinja", "text"),
    "more templates": partial(_link, "additional_chat_templates", ""),
    "index": _index,
    "an index by name": _named_index,
    "weights by name": partial(_weights, "../outside/model/model.safetensors"),
    "a pickle": partial(_weights, "adapter_model.bin"),
    "a vocabulary": _vocabulary,
    "an adapter in it": _add_adapter,
}


def _model_verbs(model: Path, rows: Path, output_folder: Path) -> dict[str, list]:
    trains = ["--model", model, "--data.train", rows, *OPTIONS]
    writes = [*trains, "--output", output_folder]
    return {
        "train": ["train", *writes, "--train.max_steps", "1"],
        "plan": ["plan", *trains],
        "compare": ["compare", *writes, "--methods", "lora"],
        "tune": ["tune", *writes, "--trials", "1"],
        "eval": ["eval", model, "--data", rows],
        "generate": ["generate", model, "-p", "hi"],
        "chat": ["chat", model],
        "serve": ["serve", model, "--port", "0"],
        **{f"data {verb}": ["data", verb, rows, "--model", model] for verb in ("show", "check")},
        "doctor": ["doctor", "--model", model],
        "init": ["init", output_folder, "--model", model, "--data", rows],
    }


@pytest.mark.parametrize("case", MODELS)
def test_model_folder_is_rejected_by_every_verb(
    case, tmp_path, model, rows_file, outside, assert_rejected, monkeypatch
):
    use_local_worker(monkeypatch)
    word = MODELS[case](model, outside)
    verbs = _model_verbs(model, rows_file, tmp_path / "to")
    unaffected_verbs = {
        "an adapter in it": ["eval", "generate", "chat", "serve"],  # these open the folder as an adapter
        "code of the tokenizer": ["init", "doctor"],  # init and doctor do not load the tokenizer
    }.get(case, ["init"] if case.startswith("code") else [])
    for name in verbs.keys() - unaffected_verbs:
        assert_rejected(verbs[name], word)


def test_endless_chat_template_of_model_is_stopped(tmp_path, model, rows_file, call, assert_rejected):
    (model / "chat_template.jinja").write_text(ENDLESS_TEMPLATE)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"a{n}", "completion": "b"} for n in range(4)])
    verbs = _model_verbs(model, rows, tmp_path / "to")
    for name in ("train", "plan", "eval", "generate", "data show", "data check", "init"):
        assert_rejected(verbs[name], "the chat template was stopped")
    result = call(*verbs["chat"], stdin="hi\n")
    assert result.status == 0 and "the chat template was stopped" in result.err


# Runs and adapters


def _trusted_code(run: Path, outside: Path) -> str:
    update_file(run / "run.yaml", trust_remote_code=True)
    return "the run needs Python code"


def _base_of_run(run: Path, outside: Path) -> str:
    update_file(run / "run.yaml", model=str(outside / "model"))
    return "--model"


def _base(name: str, run: Path, outside: Path) -> str:
    (run / "run.yaml").unlink()
    update_file(run / "adapter_config.json", base_model_name_or_path=name.format(outside=outside))
    return f"--model {name.format(outside=outside)}"


def _template_outside(run: Path, outside: Path) -> str:
    (run / "chat_template.jinja").unlink()
    update_file(run / "run.yaml", data={"chat_template": str(outside / "text")})
    return "chat_template"


REFERENCES = {"code": _trusted_code, "a path in run.yaml": _base_of_run, "a path": partial(_base, "{outside}/model")}
REFERENCES |= {"a GGUF file": partial(_base, "{outside}/model.gguf"), "a hub id": partial(_base, "somebody/base")}
REFERENCES |= {"another revision": partial(_base, "somebody/base@../../../outside")}
REFERENCES |= {"a package": partial(_base, "pypi:some-base==1.0"), "a host": partial(_base, "//somebody/share")}
REFERENCES |= {"a template": _template_outside}
RUN_FILES = ("run.yaml", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "metrics.jsonl")
LINKS = {name: f"run/{name}" for name in RUN_FILES} | dict.fromkeys(("chat_template.jinja", "README.md"), "text")


def _verbs_with_base(run: Path, output_folder: Path, *flags: object) -> dict[str, list]:
    formats = ("peft", "vllm", "mlx", "gguf", "gguf-adapter")
    return {
        "generate": ["generate", run, "-p", "hi", *flags],
        "chat": ["chat", run, *flags],
        "eval": ["eval", run, *flags],
        "merge": ["merge", run, "--output", output_folder, *flags],
        "merge --as-adapter": ["merge", run, "--as-adapter", "--rank", "1", "--output", output_folder, *flags],
        "serve": ["serve", run, "--port", "0", *flags],
        **{f"export {f}": ["export", run, "--format", f, "--output", output_folder, *flags] for f in formats},
    }


def _verbs_of_runs(run: Path) -> dict[str, list]:
    resume_command = ["train", "--resume", run, "--train.epochs", "9"]
    return {"data show": ["data", "show", run], "data check": ["data", "check", run], "train --resume": resume_command}


def _verbs_with_other_adapters(run: Path, base: Path, own_run: Path, output_folder: Path) -> dict[str, list]:
    """Return commands that combine an adapter with another adapter or with its base, or read only its files."""
    return {
        "merge --with": ["merge", own_run, "--with", f"{run}=0.5", "--output", output_folder, "--model", base],
        "serve --adapter": ["serve", base, "--adapter", f"x={run}", "--port", "0"],
        "inspect": ["inspect", run],
        "inspect two": ["inspect", own_run, run],
    }


@pytest.mark.parametrize("case", REFERENCES)
def test_references_in_run_are_rejected(case, tmp_path, run, outside, assert_rejected):
    word = REFERENCES[case](run, outside)
    verbs = _verbs_with_base(run, tmp_path / "to")
    if (run / "run.yaml").exists():
        verbs |= _verbs_of_runs(run)
    for arguments in verbs.values():
        assert_rejected(arguments, word)


@pytest.mark.parametrize("case", LINKS)
def test_links_in_run_are_rejected(case, tmp_path, run, finished_run, model_folder, outside, assert_rejected):
    word = _link(case, LINKS[case], run, outside)
    verbs = _verbs_with_base(run, tmp_path / "to", "--model", model_folder)
    verbs |= _verbs_of_runs(run) | _verbs_with_other_adapters(run, model_folder, finished_run, tmp_path / "to")
    verbs |= {"runs": ["runs", run], "runs --report": ["runs", run, "--report"]}
    for arguments in verbs.values():
        assert_rejected(arguments, word)


def test_links_in_checkpoints_are_rejected_on_resume(tmp_path, settings, outside, assert_rejected):
    from deltaw.runs.fit import fit

    run = fit(settings(tmp_path / "run", train={"max_steps": 1})).output
    victim = tmp_path / "outside" / "victim"
    victim.write_text(CANARY)
    _replace_with_link(run / "checkpoints" / ".lock", victim)
    _opened_paths.clear()
    assert_rejected(["train", "--resume", run, "--train.max_steps", "2"], "link that leads out")
    assert victim.read_text() == CANARY  # opening the lock would empty the file


def test_endless_regular_expression_of_adapter_is_stopped(tmp_path, run, finished_run, model_folder, assert_rejected):
    update_file(run / "adapter_config.json", target_modules=ENDLESS_EXPRESSION, alpha_pattern={ENDLESS_EXPRESSION: 2})
    verbs = _verbs_with_base(run, tmp_path / "to", "--model", model_folder)
    verbs["eval"] += ["--data", write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])]
    verbs |= _verbs_with_other_adapters(run, model_folder, finished_run, tmp_path / "to")
    for arguments in verbs.values():
        assert_rejected(arguments, "was stopped after")


def test_endless_chat_template_of_adapter_is_stopped(tmp_path, run, model_folder, rows_file, assert_rejected):
    update_file(run / "run.yaml", data={"chat_template": "somewhere.jinja"})
    (run / "chat_template.jinja").write_text(ENDLESS_TEMPLATE)
    verbs = _verbs_with_base(run, tmp_path / "to", "--model", model_folder)
    verbs["eval"] += ["--data", rows_file]
    for name, verb in _verbs_of_runs(run).items():
        verbs[name] = [*verb, "--model", model_folder, "--data", rows_file]
    writes = ("generate", "chat", "eval", "merge", "serve", "export gguf", "export gguf-adapter")
    for name in (*writes, "data show", "data check"):
        assert_rejected(verbs[name], "the chat template was stopped")


def test_links_in_data_folder_are_rejected(tmp_path, model_folder, outside, assert_rejected):
    folder = tmp_path / "rows"
    folder.mkdir()
    _replace_with_link(folder / "rows.jsonl", outside / "rows.jsonl")
    verbs = _model_verbs(model_folder, folder, tmp_path / "to")
    for name in ("data show", "data check", "train"):
        assert_rejected(verbs[name], "link that leads out")


# Allowed references

OPTIONS = ["--precision", "fp32", "--device", "cpu"]
GENERATE_OPTIONS = ["-p", "hi", "--max-new-tokens", "2", *OPTIONS]


def test_model_accepted_once_needs_no_flag_later(tmp_path, run, rows_file, outside, assert_rejected, call):
    update_file(run / "run.yaml", model=str(outside / "model"))
    _watched_folders.clear()
    assert_rejected(["generate", run, "-p", "hi", *OPTIONS], f"--model {outside / 'model'}")
    assert_rejected(["eval", run, "--model", outside / "model", *OPTIONS], "--data FILE", "data.train")
    call("eval", run, "--data", rows_file, "--no-drift", "--limit", "2", *OPTIONS, status=0)
    assert call("generate", run, *GENERATE_OPTIONS).status == 0
    assert call("generate", run.rename(tmp_path / "moved"), *GENERATE_OPTIONS).status == 0


def test_own_run_needs_no_flag(tmp_path, settings, call):
    from deltaw.runs.fit import fit

    run = fit(settings(tmp_path / "run", train={"max_steps": 1})).output
    moved = run.rename(tmp_path / "moved")
    assert call("eval", moved, "--no-drift", *OPTIONS).status == 0
    (moved / "run.yaml").unlink()
    assert call("generate", moved, *GENERATE_OPTIONS).status == 0


def test_remote_code_needs_flag_in_every_call(tmp_path, settings, model, call, assert_rejected, outside):
    from deltaw.runs.fit import fit

    (model / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    update_file(model / "config.json", model_type="own", auto_map=auto, architectures=["OwnModel"])
    config = settings(tmp_path / "run", model=str(model), trust_remote_code=True, train={"max_steps": 1})
    run = fit(config).output
    assert_rejected(["generate", run, *GENERATE_OPTIONS], "--trust-remote-code", str(model))
    assert call("generate", run, "--trust-remote-code", *GENERATE_OPTIONS).status == 0
    resume_command = ["train", "--resume", run, "--train.max_steps", "2"]
    assert_rejected(resume_command, "--trust_remote_code true")
    assert call(*resume_command, "--trust_remote_code", "true").status == 0


def test_base_model_in_hub_cache_needs_no_flag(tmp_path, run, model_folder, call, monkeypatch):
    """Links inside the hub cache are followed although they point out of the snapshot folder."""
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    cached = tmp_path / "hub" / "models--somebody--base"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = cached / "snapshots" / commit
    for folder in (snapshot, cached / "blobs", cached / "refs"):
        folder.mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(model_folder.iterdir())):
        shutil.copy(file, cached / "blobs" / f"blob{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (run / "run.yaml").unlink()
    update_file(run / "adapter_config.json", base_model_name_or_path="somebody/base")
    call("generate", run, *GENERATE_OPTIONS, status=0)
    (cached / "blobs" / "blob0").unlink()
    (cached / "blobs" / "blob0").symlink_to(model_folder / sorted(model_folder.iterdir())[0].name)
    assert call("generate", run, *GENERATE_OPTIONS).status == 2
