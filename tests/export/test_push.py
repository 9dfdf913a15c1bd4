"""Tests of ``deltaw push`` with the hub's client and a local hub server, and of loading pushed adapters by hub id."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from deltaw.export.hub_card import PublicBase, public_name
from deltaw.export.push import collect_files, push
from deltaw.export.secrets import path_in, remove_secrets
from deltaw.methods.trust import read_folder
from deltaw.runs.fit import fit
from deltaw.runs.folder import read_run
from deltaw.serving.http.opening import OpenOptions, open_any
from deltaw.serving.http.settings import Limits, read_adapter_folders
from tests import hub_server
from tests.byte_models import save_model, tiny_llama
from tests.cli.conftest import Call, CommandResult, assert_refused, update_file
from tests.conftest import COLORS
from tests.data.conftest import refusal
from tests.hub_server import TOKEN, Fault, Hub, Repository


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server.running_hub() as server:
        yield server


@pytest.fixture(autouse=True)
def _reset_hub(request: pytest.FixtureRequest) -> None:
    server: Hub = request.getfixturevalue("hub")
    server.faults.clear()
    server.requests.clear()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for the caches of the hub client and of deltaw."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def deltaw(hub: Hub, home: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call ``deltaw`` with a hub client that connects only to the test hub."""
    monkeypatch.setenv("DELTAW_CACHE", str(home / "deltaw"))
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)

    def run(*arguments: object, token: str = TOKEN, status: int | None = 0, offline: bool = False) -> CommandResult:
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        result = call(*arguments, status=status)
        assert TOKEN not in result.out + result.err
        return result

    return run


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory) -> Path:
    """Finished run whose rows share a system prompt."""
    rows = tmp_path_factory.mktemp("secret-place") / "tickets.jsonl"
    turns = [
        [{"role": r, "content": t} for r, t in (("system", "You paint."), ("user", f"paint it {c}"), ("assistant", c))]
        for c in COLORS
    ]
    rows.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    output = tmp_path_factory.mktemp("runs") / "painter"
    return fit(settings(output, data={"train": str(rows)}, train={"epochs": 2})).output


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_push_uploads_adapter_without_rows_paths_or_token(deltaw, hub, home, run, model_folder):
    result = deltaw("push", run, "me/painter", "--base-model", "me/tiny", "--json")
    output = json.loads(result.out)
    repository = hub.repositories["models/me/painter"]
    files = repository.files
    assert repository.private and output["private"] and output["commit"] == repository.branches["main"]
    assert sha(files["adapter_model.safetensors"]) == sha((run / "adapter_model.safetensors").read_bytes())
    assert sha(files["tokenizer.json"]) == sha((run / "tokenizer.json").read_bytes())
    assert output["files"] == {name: len(content) for name, content in files.items() if name != ".gitattributes"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/tiny"
    assert json.loads(files["prompts.json"]) == {"system": "You paint.", "joined": False, "examples": []}
    content_text = b"\n".join(files.values()).decode("utf-8", "replace")
    for private in ("paint it", "secret-place", str(run.parent), str(model_folder.parent)):
        assert private not in content_text, private
    assert TOKEN not in content_text and any(TOKEN in h.get("authorization", "") for _, h, _ in hub.requests)
    stored_files = [file for folder in (home, run) for file in folder.rglob("*") if file.is_file()]
    assert stored_files and not any(TOKEN.encode() in file.read_bytes() for file in stored_files)
    settings = yaml.safe_load(files["run.yaml"])
    assert settings["model"] == "me/tiny" and settings["data"]["train"] == "tickets.jsonl"
    assert settings["output"] == "painter" and settings["track"] is None


def test_card_contains_scores_row_counts_and_training_command(deltaw, hub, run):
    card = hub.repositories["models/me/painter"].files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "me/tiny" and head["base_model_relation"] == "adapter"
    assert head["library_name"] == "peft" and head["pipeline_tag"] == "text-generation"
    base = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["base"]["loss"]
    trained = 0.0
    trained = json.loads((run / "run.json").read_text())["result"]["eval"]["loss"]
    assert f"| loss | {base:.4f} | {trained:.4f} |" in card
    rows = json.loads((run / "run.json").read_text())["training"]["rows"]
    assert f"`{rows['train']['digest']}`" in card and "10 read, 8 trained on, 2 held out" in card
    assert "deltaw train run.yaml" in card and "source: `tickets.jsonl`" in card and "were not compared" in card


def test_repeated_push_uploads_and_commits_nothing(deltaw, hub, run):
    before = dict(hub.repositories["models/me/painter"].branches)
    deltaw("push", run, "me/painter", "--base-model", "me/tiny")
    assert not hub.matching_requests("^PUT") and not hub.matching_requests("/commit/")
    assert hub.repositories["models/me/painter"].branches == before


def test_push_creates_branch_and_public_repository_if_requested(deltaw, hub, run):
    deltaw("push", run, "me/open", "--public", "--revision", "v2", "--base-model", "me/tiny")
    repository = hub.repositories["models/me/open"]
    assert not repository.private and "adapter_model.safetensors" in repository.commits[repository.branches["v2"]]
    assert "adapter_model.safetensors" not in repository.files
    result = deltaw("push", run, "me/open", "--base-model", "me/tiny", status=None)
    assert_refused(result, "the repository is public", "--public")


def test_interrupted_upload_is_retried_and_failed_push_resumes(deltaw, hub, run):
    hub.large.clear()
    hub.faults.append(Fault("^PUT /lfs/", cut_after=1000))  # the client retries once
    oid = sha((run / "adapter_model.safetensors").read_bytes())
    hub.faults.append(Fault(f"^PUT /lfs/{oid}", status=403, times=9))
    assert_refused(deltaw("push", run, "me/cut", "--base-model", "me/tiny", status=None), "may not write")
    repository = hub.repositories["models/me/cut"]
    assert list(repository.files) == [".gitattributes"]  # no commit was created
    sent = [line for line, _, size in hub.matching_requests("^PUT") if size > 1000 and oid not in line]
    hub.faults.clear()
    hub.requests.clear()
    deltaw("push", run, "me/cut", "--base-model", "me/tiny")
    assert sent and [line for line, _, _ in hub.matching_requests("^PUT")] == [f"PUT /lfs/{oid}"]
    assert sha(repository.files["adapter_model.safetensors"]) == oid


@pytest.mark.parametrize(
    ("status", "words"), {409: "another client is changing", 413: "size limit", 503: "status 503", 422: "422"}.items()
)
def test_hub_errors_are_explained_without_the_token(deltaw, hub, run, status, words):
    hub.faults.append(Fault("/commit/", status=status))  # the response echoes the token header
    assert_refused(deltaw("--traceback", "push", run, "me/new", "--base-model", "me/tiny", status=None), words, "hint")


def test_rejected_repository_creation_is_explained(deltaw, hub, run):
    for status, words in ((403, "may not write to 'me/denied'"), (429, "too many requests")):
        hub.faults.append(Fault("repos/create", status=status))
        assert_refused(deltaw("push", run, "me/denied", "--base-model", "me/tiny", status=None), words, "hint")


def test_missing_token_wrong_token_and_no_connection_are_rejected(deltaw, hub, run):
    assert_refused(deltaw("push", run, "me/x", token="", status=None), "no token for the hub", "HF_TOKEN")
    assert_refused(deltaw("push", run, "me/x", token="wrong", status=None), "does not accept the token")
    assert_refused(deltaw("push", run, "me/x", status=None, offline=True), "HF_HUB_OFFLINE is set")
    hub.faults.append(Fault("", cut_after=0, times=99))
    assert_refused(deltaw("push", run, "me/x", status=None), "connection to the hub failed")
    assert "models/me/x" not in hub.repositories


def test_invalid_runs_and_names_are_rejected_before_hub_requests(run, tmp_path):
    for name in ("painter", "me/", "me/a b", "../x", "me/a/b", "me/-x"):
        assert "is not a valid repository name" in refusal(push, run, name).message
    assert "not the folder of a run" in refusal(push, tmp_path, "me/x").message
    copy = Path(shutil.copytree(run, tmp_path / "stopped"))
    update_file(copy / "run.json", state="interrupted")
    error = refusal(push, copy, "me/x")
    assert "not finished (interrupted)" in error.message and "--resume" in str(error.hint)
    assert "is not a hub id" in refusal(push, run, "me/x", base="./here").message
    update_file(copy / "run.json", state="finished")
    (copy / "vocab.json").symlink_to("/etc/hostname")
    assert "leads out of the folder" in refusal(push, copy, "me/x").message


def test_dry_run_lists_files_without_hub_requests(deltaw, hub, run):
    listed = deltaw("push", run, "me/x", "--dry-run", token="")
    assert "adapter_model.safetensors" in listed.out and "other users cannot load this" in listed.err
    assert max(map(len, (listed.out + listed.err).replace("\r", "\n").splitlines())) <= 80 and not hub.requests


def test_local_base_model_is_named_only_in_card_text(deltaw, hub, run, model_folder):
    assert "other users cannot load this" in deltaw("push", run, "me/local").err
    files = hub.repositories["models/me/local"].files
    card = files["README.md"].decode()
    assert "base_model" not in card.split("---")[1] and f"`{model_folder.name}` is not on the hub" in card
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == model_folder.name


def test_repository_of_other_base_or_model_is_not_overwritten(deltaw, hub, run):
    other = hub.repositories["models/me/other"] = Repository(private=True)
    other.commit({"adapter_config.json": json.dumps({"base_model_name_or_path": "you/else"}).encode()})
    result = deltaw("push", run, "me/other", "--base-model", "me/tiny", status=None)
    assert_refused(result, "another base model, 'you/else'")
    model = hub.repositories["models/me/model"] = Repository(private=True)
    model.commit({"config.json": b"{}"})
    assert_refused(deltaw("push", run, "me/model", "--base-model", "me/tiny", status=None), "already contains a model")


def test_secrets_in_settings_are_removed(deltaw, hub, run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    update_file(copy / "run.yaml", data={"system": f"key hf_{'a1' * 12} and https://me:pass@host/x"})
    deltaw("push", copy, "me/keys", "--base-model", "me/tiny")
    text = hub.repositories["models/me/keys"].files["run.yaml"].decode()
    assert "REMOVED" in text and "a1a1" not in text and "me:pass" not in text


KEYS = {
    "GitHub token": "github_pat_11ABCDEFG0" + "aB3_" * 15,
    "AWS Access Key": "AKIAIOSFODNN7EXAMPLE",
    "AWS secret key": "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "API key": "sk-proj-" + "aB1-" * 10,
    "Stripe key": "sk_live_" + "4eC3" * 6,
    "SendGrid API Key": f"SG.{'a' * 22}.{'b' * 43}",
    "JSON web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    "private key": f"-----BEGIN RSA PRIVATE KEY-----\n{'MIIEpAIBAAKCAQEA7bqv' * 3}\n-----END RSA PRIVATE KEY-----",
}


def test_each_kind_of_secret_is_removed_with_note(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    notes = []
    for kind, key in KEYS.items():
        update_file(copy / "run.yaml", data={"system": f"begin {key} end"})
        config = read_folder(copy, trust_remote_code=None).run
        files = collect_files(read_run(copy), config, PublicBase("me/tiny"), "me/x", None, notes.append)
        system = yaml.safe_load(files["run.yaml"])["data"]["system"]
        assert system.startswith("begin ") and "REMOVED" in system and system.endswith(" end"), kind
        assert key[-12:] not in files["run.yaml"].decode(), kind
        assert f"warning: removed from run.yaml: {kind}" in notes


def test_secret_in_unmodified_file_stops_push(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_text("{{ messages }} " + KEYS["GitHub token"])
    error = refusal(push, copy, "me/x", dry_run=True)
    assert "contains a secret: GitHub token" in error.message and str(error.location).endswith("chat_template.jinja")


def test_local_paths_in_text_are_detected(run, tmp_path):
    assert path_in("as in /srv/models/private/gguf, of 3/4") == "/srv/models/private/gguf"
    assert path_in(r"see C:\Users\me\x.jsonl") and path_in("~/rows.jsonl")
    assert path_in("a/b, https://host/home/x and 1/2") is None


def test_local_paths_of_parts_are_not_public():
    assert public_name("parts:pypi:a==1 + /home/me/tower + mlp") == "parts:pypi:a==1 + tower + mlp"


def test_hashes_and_words_are_not_secrets():
    for text in (f"`{'ab12' * 16}`", "0a" * 20, "the AWS documentation", "hf_hub_download", "sk-learn", "a 1.2.3.4 b"):
        assert remove_secrets(text) == (text, [])


@pytest.mark.slow
def test_cached_base_model_is_compared_by_weights(deltaw, hub, run, model_folder, tmp_path):
    upload(hub, "models/me/same", model_folder)
    upload(hub, "models/me/different", save_model(tiny_llama(seed=1, initializer_range=0.3), tmp_path / "other"))
    for name in ("me/same", "me/different"):
        deltaw("generate", name, "--prompt", "x", "--max-new-tokens", 1)
    output = json.loads(deltaw("push", run, "me/compared", "--base-model", "me/same", "--json").out)
    commit = hub.repositories["models/me/same"].branches["main"]
    assert (output["base_model"], output["base_revision"]) == ("me/same", commit)
    assert "not compared" not in hub.repositories["models/me/compared"].files["README.md"].decode()
    result = deltaw("push", run, "me/compared", "--base-model", "me/different", status=None)
    assert_refused(result, "other weights than the run was trained on")


def upload(hub: Hub, key: str, folder: Path, *names: str) -> str:
    repository = hub.repositories.setdefault(key, Repository())
    files = [file for file in folder.iterdir() if not names or file.name in names]
    return repository.commit({file.name: file.read_bytes() for file in files})


def test_run_from_hub_ids_records_commits_and_matches_local_answers(
    deltaw, hub, model_folder, rows_file, tmp_path, home
):
    model = upload(hub, "models/me/base", model_folder)
    rows = upload(hub, "datasets/me/rows", rows_file.parent)
    # The client downloads in chunks of ten megabytes and resumes after the last complete one.
    hub.repositories["models/me/base"].files["notes.txt"] = notes = bytes(11 << 20)
    hub.faults.append(Fault("^GET .*/notes.txt", cut_after=len(notes) - 1000))
    flags = ["--model", "me/base@main", "--data", f"me/rows@main/{rows_file.name}", "--precision", "fp32"]
    deltaw("train", *flags, "--threads", 1, "--output", tmp_path / "run", "--train.max_steps", 3)
    assert [h.get("range", "") for _, h, _ in hub.matching_requests("^GET .*/notes.txt")] == ["", "bytes=10485760-"]
    (cached,) = home.rglob("notes.txt")
    assert cached.read_bytes() == notes
    revisions = json.loads((tmp_path / "run" / "run.json").read_text())["revisions"]
    assert revisions == {"me/base@main": model, f"me/rows@main/{rows_file.name}": rows}
    settings = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("me/base", "main")

    deltaw("push", tmp_path / "run", "me/from-hub")
    card = hub.repositories["models/me/from-hub"].files["README.md"].decode()
    assert f"`me/base` at revision `{model}`" in card and f"at commit `{rows}`" in card
    pushed = json.loads(hub.repositories["models/me/from-hub"].files["adapter_config.json"])
    assert (pushed["base_model_name_or_path"], pushed["revision"]) == ("me/base", model)

    arguments = ("--prompt", "paint it red", "--max-new-tokens", 8, "--json")
    expected = json.loads(deltaw("generate", tmp_path / "run", *arguments).out)
    assert json.loads(deltaw("generate", "me/from-hub", *arguments).out) == expected
    assert json.loads(deltaw("generate", "me/from-hub@main", *arguments, offline=True).out) == expected


@pytest.mark.slow
def test_pushed_adapter_is_served_merged_and_inspected_by_id(deltaw, hub, run, model_folder, tmp_path):
    upload(hub, "models/me/tiny", model_folder)
    deltaw("push", run, "me/adapter", "--base-model", "me/tiny")
    for base, named, model in (("me/tiny", ["it=me/adapter"], None), ("me/adapter", [], "me/tiny")):
        served = open_any(base, read_adapter_folders(named), OpenOptions(model=model), Limits(), log=print)
        assert [served.name, *served.adapters()] == ["me/tiny", "it" if named else "adapter"]
        served.close()
    deltaw("merge", "me/adapter", "--model", "me/tiny", "--output", tmp_path / "merged", "--no-verify")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    deltaw("push", run, "me/whole", "--base-model", "me/tiny", "--merged", tmp_path / "merged")
    files = hub.repositories["models/me/whole"].files
    assert sha(files["model.safetensors"]) == sha((tmp_path / "merged" / "model.safetensors").read_bytes())
    assert b"base_model_relation: finetune" in files["README.md"] and "adapter_config.json" not in files
    assert "rank" in deltaw("inspect", "me/adapter").out
    missing = deltaw("merge", "me/nothing", "--output", tmp_path / "no", status=None)
    assert_refused(missing, "no such adapter")
    assert_refused(deltaw("merge", "me/tiny", "--output", tmp_path / "no", status=None), "contains no adapter")


@pytest.mark.slow
def test_dataset_commit_is_recorded_in_run_also_offline(deltaw, hub, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    hub.repositories["datasets/me/colors"] = colors = Repository()
    lines = [json.dumps({"prompt": f"paint it {c}", "completion": c}).encode() for c in COLORS]
    commit = colors.commit({"train.jsonl": b"\n".join(lines)})
    flags = ["--model", model_folder, "--precision", "fp32", "--threads", 1, "--train.max_steps", 1]
    deltaw("train", *flags, "--data", "me/colors@main", "--output", tmp_path / "a")
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["revisions"] == {"me/colors@main": commit} and record["data"]["counts"]["rows_read"] == 10
    file = "me/colors@main/train.jsonl"
    deltaw("train", *flags, "--data", file, "--output", tmp_path / "b")
    hub.requests.clear()
    deltaw("train", *flags, "--data", file, "--output", tmp_path / "c", offline=True)
    assert not hub.requests
    for name in ("b", "c"):
        assert json.loads((tmp_path / name / "run.json").read_text())["revisions"] == {file: commit}


def test_missing_dataset_revision_or_file_is_rejected(deltaw, hub, model_folder, tmp_path):
    hub.repositories["datasets/me/few"] = repository = Repository()
    repository.commit({"rows.jsonl": b"{}"})
    for reference, words in (
        ("me/none@main/rows.jsonl", "no such data set"),
        ("me/few@v9/rows.jsonl", "no revision 'v9'"),
        ("me/few@main/other.jsonl", "no such file"),
    ):
        result = deltaw("train", "--model", model_folder, "--data", reference, "--output", tmp_path / "r", status=None)
        assert_refused(result, words)
