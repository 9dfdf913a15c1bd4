"""Folders from somebody else, through every verb that takes a folder: nothing in them is run, no file outside
of them is opened, nothing is fetched, and the refusal says what they want and how to allow it."""

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
from tests.cli.conftest import changed
from tests.conftest import write_rows
from tests.experiments.conftest import use_worker_here

CANARY = "the canary sings"
ENDLESS_EXPRESSION = "(([a-z_0-9]+)[.]?)+!"
ENDLESS_TEMPLATE = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
)
CODE = "import pathlib\n(pathlib.Path(__file__).resolve().parent / 'ran').write_text('x')\n"

_opened: list[str] = []
_watched: list[str] = []


def _hook(event: str, arguments: tuple) -> None:
    if _watched and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if any(path.startswith(outside) for outside in _watched):
            _opened.append(path)


sys.addaudithook(_hook)


@pytest.fixture
def outside(tmp_path: Path, model_folder: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with everything that somebody may want to read: a model, an adapter, rows, a text. Opening any
    of it is noted, and the user has named none of it before."""
    folder = tmp_path / "outside"
    shutil.copytree(model_folder, folder / "model")
    shutil.copytree(finished_run, folder / "run")
    (folder / "text").write_text(CANARY)
    write_rows(folder / "rows.jsonl", [{"prompt": "a", "completion": CANARY}] * 4)
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rendering, "STEPS", 1 << 14)
    monkeypatch.setattr(expressions, "SECONDS", 0.05)
    monkeypatch.setattr(packages, "_fetched", lambda wanted: pytest.fail(f"{wanted} was fetched"))
    _opened.clear()
    _watched.append(str(folder.resolve()))
    yield folder
    _watched.clear()


@pytest.fixture
def refused(call, outside) -> Callable[..., None]:
    """Call a verb that must be refused, with these words, and without having opened what lies outside."""

    def check(arguments: list, *words: str) -> None:
        ended = call(*arguments, stdin="hi\n")
        told = ended.out + ended.err + ended.unwrapped
        assert ended.status == 2, (arguments, told)
        assert ended.err.count("error: ") == 1 and "hint: " in ended.err, told
        for word in words:
            assert word in told, told
        assert "Traceback" not in told and CANARY not in told
        assert not _opened, (arguments, _opened)
        assert not list(outside.parent.rglob("ran"))

    return check


@pytest.fixture
def run(tmp_path: Path, finished_run: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def model(tmp_path: Path, model_folder: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def _linked(file: Path, target: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(target)


# Models


def _own_code(auto: dict[str, object], model: Path, outside: Path, **changes: object) -> str:
    changed(model / "tokenizer_config.json", auto_map=auto, **changes)
    if "AutoConfig" in auto:
        changed(model / "config.json", auto_map=auto, model_type="own")
    (model / "own.py").write_text(CODE)
    return "Python code of its own"


def _link(name: str, target: str, folder: Path, outside: Path) -> str:
    _linked(folder / name, outside / target)
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
    changed(model / "config.json", transformers_weights="other.safetensors.index.json")
    (model / "some.safetensors").write_bytes(b"")
    return word


def _weights(name: str, model: Path, outside: Path) -> str:
    (model / "adapter_model.bin").write_bytes(b"")
    changed(model / "config.json", transformers_weights=name)
    return "not a safetensors file of its folder"


def _vocabulary(model: Path, outside: Path) -> str:
    changed(model / "tokenizer_config.json", vocab=str(outside / "text"), tokenizer_class="BertTokenizer")
    return "not in the model's folder"


def _with_adapter(model: Path, outside: Path) -> str:
    text = json.dumps({"peft_type": "LORA", "target_modules": ENDLESS_EXPRESSION, "r": 2})
    (model / "adapter_config.json").write_text(text)
    return "holds a model and an adapter"


AUTO: dict[str, object] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
AUTO_TOKENIZER: dict[str, object] = {"AutoTokenizer": ["own.T", None]}
MODELS = {
    "code": partial(_own_code, AUTO | AUTO_TOKENIZER),
    "code of another": partial(_own_code, {"AutoConfig": "somebody/else--own.Config"}),
    "code of the tokenizer": partial(_own_code, AUTO_TOKENIZER, tokenizer_class="T"),
    **{f: partial(_link, f, f"model/{f}") for f in ("config.json", "tokenizer.json", "model.safetensors")},
    "template": partial(_link, "chat_template.jinja", "text"),
    "more templates": partial(_link, "additional_chat_templates", ""),
    "index": _index,
    "an index by name": _named_index,
    "weights by name": partial(_weights, "../outside/model/model.safetensors"),
    "a pickle": partial(_weights, "adapter_model.bin"),
    "a vocabulary": _vocabulary,
    "an adapter in it": _with_adapter,
}


def _model_verbs(model: Path, rows: Path, to: Path) -> dict[str, list]:
    trains = ["--model", model, "--data.train", rows, *HOW]
    writes = [*trains, "--output", to]
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
        "init": ["init", to, "--model", model, "--data", rows],
    }


@pytest.mark.parametrize("what", MODELS)
def test_a_models_folder(what, tmp_path, model, rows_file, outside, refused, monkeypatch):
    use_worker_here(monkeypatch)
    word = MODELS[what](model, outside)
    verbs = _model_verbs(model, rows_file, tmp_path / "to")
    others = {
        "an adapter in it": ["eval", "generate", "chat", "serve"],  # these take the folder for the adapter
        "code of the tokenizer": ["init", "doctor"],  # init writes settings without it, doctor reads no tokenizer
    }.get(what, ["init"] if what.startswith("code") else [])
    for name in verbs.keys() - others:
        refused(verbs[name], word)


def test_an_endless_template_of_a_model(tmp_path, model, rows_file, call, refused):
    (model / "chat_template.jinja").write_text(ENDLESS_TEMPLATE)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"a{n}", "completion": "b"} for n in range(4)])
    verbs = _model_verbs(model, rows, tmp_path / "to")
    for name in ("train", "plan", "eval", "generate", "data show", "data check", "init"):
        refused(verbs[name], "the chat template was ended")
    ended = call(*verbs["chat"], stdin="hi\n")
    assert ended.status == 0 and "the chat template was ended" in ended.err


# Runs and adapters


def _consent(run: Path, outside: Path) -> str:
    changed(run / "run.yaml", trust_remote_code=True)
    return "ask to run Python code"


def _base_of_run(run: Path, outside: Path) -> str:
    changed(run / "run.yaml", model=str(outside / "model"))
    return "--model"


def _base(name: str, run: Path, outside: Path) -> str:
    (run / "run.yaml").unlink()
    changed(run / "adapter_config.json", base_model_name_or_path=name.format(outside=outside))
    return f"--model {name.format(outside=outside)}"


def _template_outside(run: Path, outside: Path) -> str:
    (run / "chat_template.jinja").unlink()
    changed(run / "run.yaml", data={"chat_template": str(outside / "text")})
    return "chat_template"


NAMES = {
    "code": _consent,
    "a path in run.yaml": _base_of_run,
    "a path": partial(_base, "{outside}/model"),
    "a GGUF file": partial(_base, "{outside}/model.gguf"),
    "a hub id": partial(_base, "somebody/base"),
    "another revision": partial(_base, "somebody/base@../../../outside"),
    "a package": partial(_base, "pypi:some-base==1.0"),
    "a host": partial(_base, "//somebody/share"),
    "a template": _template_outside,
}
RUN_FILES = ("run.yaml", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "metrics.jsonl")
LINKS = {name: f"run/{name}" for name in RUN_FILES} | dict.fromkeys(("chat_template.jinja", "README.md"), "text")


def _verbs_with_base(run: Path, to: Path, *more: object) -> dict[str, list]:
    formats = ("peft", "vllm", "mlx", "gguf", "gguf-adapter")
    return {
        "generate": ["generate", run, "-p", "hi", *more],
        "chat": ["chat", run, *more],
        "eval": ["eval", run, *more],
        "merge": ["merge", run, "--output", to, *more],
        "merge --as-adapter": ["merge", run, "--as-adapter", "--rank", "1", "--output", to, *more],
        "serve": ["serve", run, "--port", "0", *more],
        **{f"export {f}": ["export", run, "--format", f, "--output", to, *more] for f in formats},
    }


def _verbs_of_runs(run: Path) -> dict[str, list]:
    resumes = ["train", "--resume", run, "--train.epochs", "9"]
    return {"data show": ["data", "show", run], "data check": ["data", "check", run], "train --resume": resumes}


def _verbs_beside(run: Path, base: Path, own: Path, to: Path) -> dict[str, list]:
    """Those that take an adapter beside another or beside its base, or read its files alone."""
    return {
        "merge --with": ["merge", own, "--with", f"{run}=0.5", "--output", to, "--model", base],
        "serve --adapter": ["serve", base, "--adapter", f"x={run}", "--port", "0"],
        "inspect": ["inspect", run],
        "inspect two": ["inspect", own, run],
    }


@pytest.mark.parametrize("what", NAMES)
def test_what_a_run_names(what, tmp_path, run, outside, refused):
    word = NAMES[what](run, outside)
    verbs = _verbs_with_base(run, tmp_path / "to")
    if (run / "run.yaml").exists():
        verbs |= _verbs_of_runs(run)
    for arguments in verbs.values():
        refused(arguments, word)


@pytest.mark.parametrize("what", LINKS)
def test_links_in_a_run(what, tmp_path, run, finished_run, model_folder, outside, refused):
    word = _link(what, LINKS[what], run, outside)
    verbs = _verbs_with_base(run, tmp_path / "to", "--model", model_folder)
    verbs |= _verbs_of_runs(run) | _verbs_beside(run, model_folder, finished_run, tmp_path / "to")
    verbs |= {"runs": ["runs", run], "runs --report": ["runs", run, "--report"]}
    for arguments in verbs.values():
        refused(arguments, word)


def test_links_in_what_a_run_goes_on_with(tmp_path, settings, outside, refused):
    from deltaw.runs.fit import fit

    run = fit(settings(tmp_path / "run", train={"max_steps": 1})).output
    victim = tmp_path / "outside" / "victim"
    victim.write_text(CANARY)
    _linked(run / "checkpoints" / ".lock", victim)
    _opened.clear()
    refused(["train", "--resume", run, "--train.max_steps", "2"], "link that leads out")
    assert victim.read_text() == CANARY  # the lock's file would have been emptied


def test_an_endless_expression_of_an_adapter(tmp_path, run, finished_run, model_folder, refused):
    changed(run / "adapter_config.json", target_modules=ENDLESS_EXPRESSION, alpha_pattern={ENDLESS_EXPRESSION: 2})
    verbs = _verbs_with_base(run, tmp_path / "to", "--model", model_folder)
    verbs["eval"] += ["--data", write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])]
    verbs |= _verbs_beside(run, model_folder, finished_run, tmp_path / "to")
    for arguments in verbs.values():
        refused(arguments, "was ended after")


def test_an_endless_template_of_an_adapter(tmp_path, run, model_folder, rows_file, refused):
    changed(run / "run.yaml", data={"chat_template": "somewhere.jinja"})
    (run / "chat_template.jinja").write_text(ENDLESS_TEMPLATE)
    verbs = _verbs_with_base(run, tmp_path / "to", "--model", model_folder)
    verbs["eval"] += ["--data", rows_file]
    for name, verb in _verbs_of_runs(run).items():
        verbs[name] = [*verb, "--model", model_folder, "--data", rows_file]
    writes = ("generate", "chat", "eval", "merge", "serve", "export gguf", "export gguf-adapter")
    for name in (*writes, "data show", "data check"):
        refused(verbs[name], "the chat template was ended")


def test_links_in_a_folder_of_rows(tmp_path, model_folder, outside, refused):
    folder = tmp_path / "rows"
    folder.mkdir()
    _linked(folder / "rows.jsonl", outside / "rows.jsonl")
    verbs = _model_verbs(model_folder, folder, tmp_path / "to")
    for name in ("data show", "data check", "train"):
        refused(verbs[name], "link that leads out")


# What may be done

HOW = ["--precision", "fp32", "--device", "cpu"]
WRITES = ["-p", "hi", "--max-new-tokens", "2", *HOW]


def test_the_caller_allows_what_a_folder_names_and_is_not_asked_again(tmp_path, run, rows_file, outside, refused, call):
    changed(run / "run.yaml", model=str(outside / "model"))
    _watched.clear()
    refused(["generate", run, "-p", "hi", *HOW], f"--model {outside / 'model'}")
    refused(["eval", run, "--model", outside / "model", *HOW], "--data FILE", "data.train")
    call("eval", run, "--data", rows_file, "--no-drift", "--rows", "2", *HOW, status=0)
    assert call("generate", run, *WRITES).status == 0
    assert call("generate", run.rename(tmp_path / "moved"), *WRITES).status == 0


def test_a_run_of_ones_own_needs_no_word(tmp_path, settings, call):
    from deltaw.runs.fit import fit

    run = fit(settings(tmp_path / "run", train={"max_steps": 1})).output
    moved = run.rename(tmp_path / "moved")
    assert call("eval", moved, "--no-drift", *HOW).status == 0
    (moved / "run.yaml").unlink()
    assert call("generate", moved, *WRITES).status == 0


def test_code_is_the_callers_to_allow_each_time(tmp_path, settings, model, call, refused, outside):
    from deltaw.runs.fit import fit

    (model / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    changed(model / "config.json", model_type="own", auto_map=auto, architectures=["OwnModel"])
    own = settings(tmp_path / "run", model=str(model), trust_remote_code=True, train={"max_steps": 1})
    run = fit(own).output
    refused(["generate", run, *WRITES], "--trust-remote-code", str(model))
    assert call("generate", run, "--trust-remote-code", *WRITES).status == 0
    longer = ["train", "--resume", run, "--train.max_steps", "2"]
    refused(longer, "--trust_remote_code true")
    assert call(*longer, "--trust_remote_code", "true").status == 0


def test_a_base_in_the_hubs_cache_needs_no_word(tmp_path, run, model_folder, call, monkeypatch):
    """The links of the cache itself lead out of a folder, and are followed."""
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    cached, commit = tmp_path / "hub" / "models--somebody--base", "0123456789abcdef0123456789abcdef01234567"
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
    changed(run / "adapter_config.json", base_model_name_or_path="somebody/base")
    call("generate", run, *WRITES, status=0)
    (cached / "blobs" / "blob0").unlink()
    (cached / "blobs" / "blob0").symlink_to(model_folder / sorted(model_folder.iterdir())[0].name)
    assert call("generate", run, *WRITES).status == 2
