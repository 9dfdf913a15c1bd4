"""`deltaw push`, and what it sent, used again by its hub id: the hub's own client against a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from deltaw.export.hub_card import PublicBase
from deltaw.export.push import contents, push
from deltaw.export.secret_scan import path_in, remove_secrets
from deltaw.runs.fit import fit
from deltaw.runs.folder import read_run
from deltaw.training.origin import read_folder
from tests import hub_server, processes
from tests.byte_models import saved, tiny_llama
from tests.cli.conftest import Ended, assert_refused, changed
from tests.conftest import COLORS
from tests.data.conftest import refusal
from tests.hub_server import TOKEN, Fault, Hub, Repository

Deltaw = Callable[..., Ended]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server.running() as made:
        yield made


@pytest.fixture(autouse=True)
def _faultless(request: pytest.FixtureRequest) -> None:
    made: Hub = request.getfixturevalue("hub")
    made.faults.clear()
    made.requests.clear()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the client keeps what it fetched, and deltaw its cache."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def deltaw(hub: Hub, home: Path) -> Deltaw:
    """``deltaw``, or Python behind ``-c``, in a process whose client knows this hub alone."""
    imported = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    imported |= {"HF_HUB_DISABLE_TELEMETRY": "1", "DELTAW_CACHE": str(home / "deltaw")}

    def call(*arguments: object, token: str = TOKEN, status: int | None = 0, offline: bool = False) -> Ended:
        known = {**imported, "HF_HUB_OFFLINE": str(int(offline))}
        what = arguments if arguments[0] == "-c" else ("-m", "deltaw", *arguments)
        process = processes.start(*what, cwd=home, env={"HF_TOKEN": token}, imported=known)
        out, err = process.communicate(timeout=300)
        ended = Ended(process.wait(60), out, err)
        assert status in (None, ended.status), ended
        assert TOKEN not in out + err
        return ended

    return call


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory) -> Path:
    """A finished run whose rows share a system prompt."""
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


def test_a_push_sends_the_adapter_as_it_is_privately_and_neither_rows_nor_paths_nor_the_token(
    deltaw, hub, home, run, model_folder
):
    ended = deltaw("push", run, "me/painter", "--base", "me/tiny", "--json")
    told, repository = json.loads(ended.out), hub.repositories["models/me/painter"]
    files = repository.files
    assert repository.private and told["private"] and told["commit"] == repository.branches["main"]
    assert sha(files["adapter_model.safetensors"]) == sha((run / "adapter_model.safetensors").read_bytes())
    assert sha(files["tokenizer.json"]) == sha((run / "tokenizer.json").read_bytes())
    assert told["files"] == {name: len(content) for name, content in files.items() if name != ".gitattributes"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/tiny"
    assert json.loads(files["prompts.json"]) == {"system": "You paint.", "joined": False, "examples": []}
    everything = b"\n".join(files.values()).decode("utf-8", "replace")
    for private in ("paint it", "secret-place", str(run.parent), str(model_folder.parent)):
        assert private not in everything, private
    assert TOKEN not in everything and any(TOKEN in h.get("authorization", "") for _, h, _ in hub.requests)
    kept = [file for place in (home, run) for file in place.rglob("*") if file.is_file()]
    assert kept and not any(TOKEN.encode() in file.read_bytes() for file in kept)
    settings = yaml.safe_load(files["run.yaml"])
    assert settings["model"] == "me/tiny" and settings["data"]["train"] == "tickets.jsonl"
    assert settings["output"] == "painter" and settings["track"] is None


def test_the_card_has_both_scores_the_account_of_the_rows_and_how_to_train_again(deltaw, hub, run):
    card = hub.repositories["models/me/painter"].files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "me/tiny" and head["base_model_relation"] == "adapter"
    assert head["library_name"] == "peft" and head["pipeline_tag"] == "text-generation"
    base, trained = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["base"]["loss"], 0.0
    trained = json.loads((run / "run.json").read_text())["result"]["eval"]["loss"]
    assert f"| loss | {base:.4f} | {trained:.4f} |" in card
    rows = json.loads((run / "run.json").read_text())["training"]["rows"]
    assert f"`{rows['train']['digest']}`" in card and "10 read, 8 trained on, 2 held out" in card
    assert "deltaw train run.yaml" in card and "source: `tickets.jsonl`" in card and "were not compared" in card


def test_the_same_push_again_sends_no_large_file_and_makes_no_commit(deltaw, hub, run):
    before = dict(hub.repositories["models/me/painter"].branches)
    deltaw("push", run, "me/painter", "--base", "me/tiny")
    assert not hub.asked("^PUT") and not hub.asked("/commit/")
    assert hub.repositories["models/me/painter"].branches == before


def test_a_branch_and_a_public_repository_are_made_where_they_are_asked_for(deltaw, hub, run):
    deltaw("push", run, "me/open", "--public", "--revision", "v2", "--base", "me/tiny")
    made = hub.repositories["models/me/open"]
    assert not made.private and "adapter_model.safetensors" in made.commits[made.branches["v2"]]
    assert "adapter_model.safetensors" not in made.files
    refused = deltaw("push", run, "me/open", "--base", "me/tiny", status=None)
    assert_refused(refused, "everybody sees the repository", "--public")


def test_an_upload_that_is_cut_goes_on_and_a_failed_push_sends_only_the_rest(deltaw, hub, run):
    hub.large.clear()
    hub.faults.append(Fault("^PUT /lfs/", cut_after=1000))  # the client tries it once more
    oid = sha((run / "adapter_model.safetensors").read_bytes())
    hub.faults.append(Fault(f"^PUT /lfs/{oid}", status=403, times=9))
    assert_refused(deltaw("push", run, "me/cut", "--base", "me/tiny", status=None), "may not write")
    repository = hub.repositories["models/me/cut"]
    assert list(repository.files) == [".gitattributes"]  # nothing is half there
    sent = [line for line, _, size in hub.asked("^PUT") if size > 1000 and oid not in line]
    hub.faults.clear()
    hub.requests.clear()
    deltaw("push", run, "me/cut", "--base", "me/tiny")
    assert sent and [line for line, _, _ in hub.asked("^PUT")] == [f"PUT /lfs/{oid}"]
    assert sha(repository.files["adapter_model.safetensors"]) == oid


@pytest.mark.slow
def test_a_hub_that_cuts_every_connection_is_told_of_and_the_same_command_finishes(deltaw, hub, run):
    hub.large.clear()
    hub.faults.append(Fault("^PUT", cut_after=500, times=100))
    assert_refused(deltaw("push", run, "me/torn", "--base", "me/tiny", status=None), "connection to the hub failed")
    hub.faults.clear()
    deltaw("push", run, "me/torn", "--base", "me/tiny")
    files = hub.repositories["models/me/torn"].files
    assert sha(files["adapter_model.safetensors"]) == sha((run / "adapter_model.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("pattern", "status", "words"),
    [
        ("repos/create", 403, "may not write to 'me/new'"),
        ("/commit/", 409, "changed by somebody else"),
        ("/commit/", 413, "does not take so much"),
        ("repos/create", 429, "too many requests"),
        ("/commit/", 503, "status 503"),
        ("/commit/", 422, "status 422"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words_without_the_token(deltaw, hub, run, pattern, status, words):
    hub.faults.append(Fault(pattern, status=status))  # whose answer repeats the header with the token
    assert_refused(deltaw("--traceback", "push", run, "me/new", "--base", "me/tiny", status=None), words, "hint")


def test_no_token_a_wrong_one_no_hub_and_being_offline_are_refused(deltaw, hub, run):
    assert_refused(deltaw("push", run, "me/x", token="", status=None), "no token for the hub", "HF_TOKEN")
    assert_refused(deltaw("push", run, "me/x", token="wrong", status=None), "does not accept the token")
    assert_refused(deltaw("push", run, "me/x", status=None, offline=True), "HF_HUB_OFFLINE is set")
    hub.faults.append(Fault("", cut_after=0, times=99))
    assert_refused(deltaw("push", run, "me/x", status=None), "connection to the hub failed")
    assert "models/me/x" not in hub.repositories


def test_what_is_no_run_or_no_name_is_refused_before_the_hub_is_asked(run, tmp_path):
    for name in ("painter", "me/", "me/a b", "../x", "me/a/b", "me/-x"):
        assert "is not the name of a repository" in refusal(push, run, name).what
    assert "not the folder of a run" in refusal(push, tmp_path, "me/x").what
    copy = Path(shutil.copytree(run, tmp_path / "stopped"))
    changed(copy / "run.json", state="interrupted")
    refused = refusal(push, copy, "me/x")
    assert "not finished (interrupted)" in refused.what and "--resume" in str(refused.hint)
    assert "is not a hub id" in refusal(push, run, "me/x", base="./here").what
    changed(copy / "run.json", state="finished")
    (copy / "vocab.json").symlink_to("/etc/hostname")
    assert "leads out of the folder" in refusal(push, copy, "me/x").what


def test_a_dry_run_lists_the_files_and_asks_nobody(deltaw, hub, run):
    listed = deltaw("push", run, "me/x", "--dry-run", token="")
    assert "adapter_model.safetensors" in listed.out and "others cannot load this" in listed.err
    assert max(map(len, (listed.out + listed.err).replace("\r", "\n").splitlines())) <= 80 and not hub.requests


def test_a_base_model_that_is_not_on_the_hub_is_named_in_the_card_and_not_in_its_metadata(
    deltaw, hub, run, model_folder
):
    assert "others cannot load this" in deltaw("push", run, "me/local").err
    files = hub.repositories["models/me/local"].files
    card = files["README.md"].decode()
    assert "base_model" not in card.split("---")[1] and f"`{model_folder.name}` is not a hub id" in card
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == model_folder.name


def test_a_repository_of_another_base_or_of_a_model_is_not_pushed_over(deltaw, hub, run):
    other = hub.repositories["models/me/other"] = Repository(private=True)
    other.commit({"adapter_config.json": json.dumps({"base_model_name_or_path": "you/else"}).encode()})
    assert_refused(deltaw("push", run, "me/other", "--base", "me/tiny", status=None), "another base model, 'you/else'")
    model = hub.repositories["models/me/model"] = Repository(private=True)
    model.commit({"config.json": b"{}"})
    assert_refused(deltaw("push", run, "me/model", "--base", "me/tiny", status=None), "holds a model")


def test_secrets_that_somebody_wrote_into_settings_are_removed(deltaw, hub, run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    changed(copy / "run.yaml", data={"system": f"key hf_{'a1' * 12} and https://me:pass@host/x"})
    deltaw("push", copy, "me/keys", "--base", "me/tiny")
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


@pytest.mark.parametrize("kind", KEYS)
def test_each_kind_of_secret_is_removed_from_texts_with_a_note(run, tmp_path, kind):
    copy, notes = Path(shutil.copytree(run, tmp_path / "copy")), []
    changed(copy / "run.yaml", data={"system": f"begin {KEYS[kind]} end"})
    config = read_folder(copy, trust_remote_code=None).run
    files = contents(read_run(copy), config, PublicBase("me/tiny"), "me/x", None, notes.append)
    settings = yaml.safe_load(files["run.yaml"])
    assert settings["data"]["system"].startswith("begin ") and "REMOVED" in settings["data"]["system"]
    assert settings["data"]["system"].endswith(" end") and KEYS[kind][-12:] not in str(settings)
    assert f"warning: removed from run.yaml: {kind}" in notes


def test_secret_in_a_file_that_is_sent_as_it_is_stops_the_push(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_text("{{ messages }} " + KEYS["GitHub token"])
    refused = refusal(push, copy, "me/x", dry_run=True)
    assert "contains a secret: GitHub token" in refused.what and str(refused.where).endswith("chat_template.jinja")


def test_text_that_looks_like_a_path_of_this_machine_is_reported(run, tmp_path):
    assert path_in("as in /srv/models/private/gguf, of 3/4") == "/srv/models/private/gguf"
    assert path_in(r"see C:\Users\me\x.jsonl") and path_in("~/rows.jsonl")
    assert path_in("a/b, https://host/home/x and 1/2") is None


def test_hashes_and_words_are_no_secrets():
    for text in (f"`{'ab12' * 16}`", "0a" * 20, "the AWS documentation", "hf_hub_download", "sk-learn", "a 1.2.3.4 b"):
        assert remove_secrets(text) == (text, [])


@pytest.mark.slow
def test_a_base_model_that_is_here_is_compared_by_its_weights(deltaw, hub, run, model_folder, tmp_path):
    upload(hub, "models/me/same", model_folder)
    upload(hub, "models/me/different", saved(tiny_llama(seed=1, initializer_range=0.3), tmp_path / "other"))
    for name in ("me/same", "me/different"):
        deltaw("generate", name, "--prompt", "x", "--max-new-tokens", 1)
    told = json.loads(deltaw("push", run, "me/compared", "--base", "me/same", "--json").out)
    commit = hub.repositories["models/me/same"].branches["main"]
    assert (told["base_model"], told["base_revision"]) == ("me/same", commit)
    assert "not compared" not in hub.repositories["models/me/compared"].files["README.md"].decode()
    refused = deltaw("push", run, "me/compared", "--base", "me/different", status=None)
    assert_refused(refused, "other weights than the run was trained on")


SERVING = """
import json, sys
from deltaw.serving.http.opening import Opening, open_any
from deltaw.serving.http.settings import Limits, named_folders
base, named, model = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
served = open_any(base, named_folders(named), Opening(model=model), Limits(), say=print)
print(served.name, *served.adapters())
served.close()
"""


def upload(hub: Hub, key: str, folder: Path, *names: str) -> str:
    made = hub.repositories.setdefault(key, Repository())
    files = [file for file in folder.iterdir() if not names or file.name in names]
    return made.commit({file.name: file.read_bytes() for file in files})


def test_model_rows_and_adapter_by_hub_id_with_the_commits_noted_and_answers_as_from_folders(
    deltaw, hub, model_folder, rows_file, tmp_path, home
):
    model = upload(hub, "models/me/base", model_folder)
    rows = upload(hub, "datasets/me/rows", rows_file.parent)
    # The client takes ten megabytes at a time, and goes on behind those that it has.
    hub.repositories["models/me/base"].files["notes.txt"] = notes = bytes(11 << 20)
    hub.faults.append(Fault("^GET .*/notes.txt", cut_after=len(notes) - 1000))
    flags = ["--model", "me/base@main", "--data", f"me/rows@main/{rows_file.name}", "--precision", "fp32"]
    deltaw("train", *flags, "--threads", 1, "--output", tmp_path / "run", "--train.max_steps", 3)
    assert [h.get("range", "") for _, h, _ in hub.asked("^GET .*/notes.txt")] == ["", "bytes=10485760-"]
    (kept,) = home.rglob("notes.txt")
    assert kept.read_bytes() == notes
    noted = json.loads((tmp_path / "run" / "run.json").read_text())["revisions"]
    assert noted == {"me/base@main": model, f"me/rows@main/{rows_file.name}": rows}
    settings = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("me/base", "main")

    deltaw("push", tmp_path / "run", "me/from-hub")
    card = hub.repositories["models/me/from-hub"].files["README.md"].decode()
    assert f"`me/base` at revision `{model}`" in card and f"at commit `{rows}`" in card
    fetched = json.loads(hub.repositories["models/me/from-hub"].files["adapter_config.json"])
    assert (fetched["base_model_name_or_path"], fetched["revision"]) == ("me/base", model)

    ask = ("--prompt", "paint it red", "--max-new-tokens", 8, "--json")
    here = json.loads(deltaw("generate", tmp_path / "run", *ask).out)
    assert json.loads(deltaw("generate", "me/from-hub", *ask).out) == here
    assert json.loads(deltaw("generate", "me/from-hub@main", *ask, offline=True).out) == here


@pytest.mark.slow
def test_an_adapter_is_merged_and_inspected_by_its_hub_id_and_a_merged_model_pushed(
    deltaw, hub, run, model_folder, tmp_path
):
    upload(hub, "models/me/tiny", model_folder)
    deltaw("push", run, "me/adapter", "--base", "me/tiny")
    for base, named, model in (("me/tiny", ["it=me/adapter"], None), ("me/adapter", [], "me/tiny")):
        served = deltaw("-c", SERVING, base, json.dumps(named), json.dumps(model))
        assert served.out.split()[-2:] == ["me/tiny", "it" if named else "adapter"], served
    deltaw("merge", "me/adapter", "--model", "me/tiny", "--output", tmp_path / "merged", "--no-verify")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    deltaw("push", run, "me/whole", "--base", "me/tiny", "--merged", tmp_path / "merged")
    whole = hub.repositories["models/me/whole"].files
    assert sha(whole["model.safetensors"]) == sha((tmp_path / "merged" / "model.safetensors").read_bytes())
    assert b"base_model_relation: finetune" in whole["README.md"] and "adapter_config.json" not in whole
    assert "rank" in deltaw("inspect", "me/adapter").out
    missing = deltaw("merge", "me/nothing", "--output", tmp_path / "no", status=None)
    assert_refused(missing, "no such adapter")
    assert_refused(deltaw("merge", "me/tiny", "--output", tmp_path / "no", status=None), "holds no adapter")


@pytest.mark.slow
def test_a_data_set_is_read_at_one_commit_which_the_run_notes_also_where_the_hub_is_not_asked(
    deltaw, hub, model_folder, tmp_path
):
    hub.repositories["datasets/me/colors"] = colors = Repository()
    lines = [json.dumps({"prompt": f"paint it {c}", "completion": c}).encode() for c in COLORS]
    commit = colors.commit({"train.jsonl": b"\n".join(lines)})
    flags = ["--model", model_folder, "--precision", "fp32", "--threads", 1, "--train.max_steps", 1]
    deltaw("train", *flags, "--data", "me/colors@main", "--output", tmp_path / "a")
    told = json.loads((tmp_path / "a" / "run.json").read_text())
    assert told["revisions"] == {"me/colors@main": commit} and told["data"]["counts"]["rows_read"] == 10
    file = "me/colors@main/train.jsonl"
    deltaw("train", *flags, "--data", file, "--output", tmp_path / "b")
    hub.requests.clear()
    deltaw("train", *flags, "--data", file, "--output", tmp_path / "c", offline=True)
    assert not hub.requests
    for name in ("b", "c"):
        assert json.loads((tmp_path / name / "run.json").read_text())["revisions"] == {file: commit}


def test_rows_of_a_data_set_that_is_not_there_are_refused(deltaw, hub, model_folder, tmp_path):
    hub.repositories["datasets/me/few"] = few = Repository()
    few.commit({"rows.jsonl": b"{}"})
    for reference, words in (
        ("me/none@main/rows.jsonl", "no such data set"),
        ("me/few@v9/rows.jsonl", "no revision 'v9'"),
        ("me/few@main/other.jsonl", "no such file"),
    ):
        ended = deltaw("train", "--model", model_folder, "--data", reference, "--output", tmp_path / "r", status=None)
        assert_refused(ended, words)
