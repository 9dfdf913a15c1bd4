"""Local models, the page of the model with its plan, the start of a training, and job pages."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra studio is not installed")
import httpx
from fastapi.testclient import TestClient

from deltaw.errors import UserError
from deltaw.hub import packages
from deltaw.hub.local_models import describe_model, list_local_models
from deltaw.machine.choices import Choice
from deltaw.serving.http.settings import ServerSettings
from deltaw.studio import models, worker
from deltaw.studio.app import create_app
from deltaw.studio.guard import Token
from deltaw.studio.jobs import JobQueue
from deltaw.studio.state import Studio
from deltaw.studio.trial import TrialServer
from deltaw.studio.worker import Pending, Worker
from deltaw.studio.workspace import Draft, Workspace
from deltaw.worker_process import WorkerError
from tests.byte_models import save_model, tiny_llama
from tests.serving.encoder_models import write_bert

ORIGIN = {"origin": "http://127.0.0.1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tiny_llama(), tmp_path_factory.mktemp("models") / "tiny")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


@pytest.fixture
def studio(tmp_path: Path, model: Path) -> Iterator[Studio]:
    workspace = Workspace(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").mkdir()
    for file in model.iterdir():
        (tmp_path / "models" / "tiny" / file.name).hardlink_to(file)
    rows = [{"prompt": f"{n} + 1", "completion": f"{n + 1}"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    studio = Studio(workspace, Worker(workspace), JobQueue(workspace), TrialServer(workspace))
    yield studio
    studio.close()


@pytest.fixture
def client(studio: Studio) -> TestClient:
    token = Token(lambda _: None)
    app = create_app(studio, ServerSettings(port=80), token)
    client = TestClient(app, base_url="http://127.0.0.1", headers=ORIGIN)
    client.get(f"/?token={token.value}")
    return client


@pytest.fixture
def draft(studio: Studio) -> Draft:
    draft = studio.workspace.create_draft(studio.workspace.folder / "rows.jsonl")
    draft.settings |= {"task": "causal-lm", "model": "models/tiny", "device": "cpu"}
    draft.settings["data"] |= {"max_length": 64, "eval": 4}
    draft.save()
    return draft


def test_models_of_folder_hub_cache_and_packages_with_license(
    studio: Studio, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    folder = studio.workspace.folder
    (folder / "small.gguf").write_bytes(b"GGUF" + b"general.license\x08\0\0\0" + (3).to_bytes(8, "little") + b"mit123")
    (folder / "runs" / "one").mkdir(parents=True)
    (folder / "runs" / "one" / "adapter_config.json").touch()
    monkeypatch.setattr(packages, "cache_folder", lambda: cache)
    (cache / "some-model-1.0").mkdir()
    (cache / "some-model-1.0" / "weights").symlink_to(model)
    packages_mark = cache / "some-model-1.0" / ".complete" / "weights"
    packages_mark.parent.mkdir()
    packages_mark.write_text("weights")
    found = {entry.reference: entry for entry in list_local_models(folder)}
    assert {"models/tiny", "small.gguf", "pypi:some-model==1.0/weights"} == {*found}
    assert found["models/tiny"].bytes == (model / "model.safetensors").stat().st_size
    assert [entry.license for entry in found.values()] == ["apache-2.0", "mit", "apache-2.0"]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_models_are_described_by_their_files(studio: Studio, model: Path) -> None:
    folder = studio.workspace.folder
    fields = {b"architecture": b"llama", b"size_label": b"2B"}
    content = b"".join(b"general." + k + b"\x08\0\0\0" + len(v).to_bytes(8, "little") + v for k, v in fields.items())
    (folder / "small.gguf").write_bytes(b"GGUF" + content + bytes(10**6) + b"tokenizer.chat_template")
    write_bert(folder / "models" / "encoder")
    os.mkfifo(folder / "models" / "encoder" / "README.md")
    (folder / "models" / "tiny" / "README.md").unlink()
    (folder / "models" / "tiny" / "README.md").write_text("---\nlanguage:\n- en\n- 'de'\nlicense: mit\n---\n")
    found = {entry.name: entry for entry in list_local_models(folder)}
    assert found["small.gguf"].about == "2B parameters, writes text, instruct: tuned to answer"
    assert found["encoder"].about == "about 1 million parameters, reads text"
    assert found["tiny"].about.startswith("about 1 million parameters, writes text, ")
    assert found["tiny"].about.endswith(", language: en, de") and found["tiny"].license == "mit"


def test_model_that_does_not_suit_the_goal_is_not_offered(client: TestClient, studio: Studio, draft: Draft) -> None:
    write_bert(studio.workspace.folder / "models" / "encoder")
    address = f"/drafts/{draft.identity}"
    page = client.get(f"{address}/model").text
    assert 'value="models/tiny"' in page and 'value="models/encoder"' not in page
    assert "encoder</strong>: this model reads text, and the goal needs one that writes text." in page
    draft.set("model", "models/encoder")
    draft.save()
    assert "and the goal needs one that writes text" in client.get(f"{address}/part/plan").text
    for reference in ("encoder", "missing"):
        client.post(f"{address}/model", data={"model": reference})
        response = client.post(f"{address}/start", data={"name": "first"})
        assert response.url.path == f"{address}/model" and studio.queue.jobs() == []
    client.post(f"{address}/model", data={"model": "encoder"})
    assert studio.workspace.draft(draft.identity).settings["model"] == "models/encoder"
    draft.set("task", "sequence-classification")
    draft.save()
    page = client.get(f"{address}/model").text
    assert 'value="models/tiny"' in page and 'value="models/encoder"' in page


def test_model_in_the_cache_of_the_hub(
    model: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, studio: Studio
) -> None:
    cache = tmp_path_factory.mktemp("hub")
    commit = "a" * 40
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(model, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    found = {entry.reference: entry for entry in list_local_models(studio.workspace.folder)}
    assert found["owner/name"].license == "apache-2.0"
    described = describe_model("owner/name")
    assert described.is_local
    assert described.bytes == found["owner/name"].bytes == (model / "model.safetensors").stat().st_size


def test_model_on_the_hub_is_not_cached_and_offline_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    with pytest.raises(UserError, match="hub cannot be reached"):
        describe_model("someone/some-model-that-is-not-cached")


def test_model_page_lists_and_selects(client: TestClient, studio: Studio, draft: Draft) -> None:
    page = client.get(f"/drafts/{draft.identity}/model").text
    assert 'value="models/tiny" checked' in page
    assert "license: apache-2.0" in page
    answer = client.post(f"/drafts/{draft.identity}/model", data={"model": "../secret"})
    assert answer.status_code == 400
    assert "outside of the folders" in answer.text
    assert studio.workspace.draft(draft.identity).settings["model"] == "models/tiny"
    client.post(f"/drafts/{draft.identity}/model", data={"model": "owner/name"})
    assert studio.workspace.draft(draft.identity).settings["model"] == "owner/name"


def test_remote_model_is_downloaded_only_after_a_click(
    client: TestClient, studio: Studio, draft: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft.set("model", "owner/name")
    draft.save()
    remote = models.ModelInfo("owner/name", "name", "hub", 10**9, "mit", is_local=False)
    monkeypatch.setattr(models, "describe_model", lambda _: remote)
    part = client.get(f"/drafts/{draft.identity}/part/plan")
    assert "Download 1.00 GB" in part.text
    assert studio.queue.jobs() == []
    for _ in range(2):
        client.post(f"/drafts/{draft.identity}/download")
    (job,) = studio.queue.jobs()
    assert job.verb == "plan"
    assert client.get(f"/drafts/{draft.identity}/part/plan").status_code == 202


def plan(client: TestClient, draft: Draft) -> str:
    deadline = time.monotonic() + 300
    while (part := client.get(f"/drafts/{draft.identity}/part/plan")).status_code == 202:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return part.text


def test_plan_that_does_not_fit_offers_settings(
    client: TestClient, draft: Draft, monkeypatch: pytest.MonkeyPatch, studio: Studio
) -> None:
    values: dict[str, Any] = {"method": "lora", "rank": 4, "tokens_per_pass": 128, "checkpointing": True}
    fields: dict[str, Any] = {}

    def result(call: str, arguments: Any, draft: str) -> Any:
        assert call == "plan"
        assert Path(arguments["config"]["model"]).is_absolute()
        return fields or Pending(5.0)

    monkeypatch.setattr(studio.worker, "result", result)
    waiting = client.get(f"/drafts/{draft.identity}/part/plan")
    assert waiting.status_code == 202
    assert "5 s" in waiting.text
    parts = dict.fromkeys(("weights", "trained", "gradients", "optimizer", "activations", "logits", "batch"), 10**9)
    parts["workspace"] = 0
    sizes = {"method": "lora", "total_parameters": 1, "trained_parameters": 1, "peak_bytes": 7 * 10**9}
    sizes |= {"peak_resident_bytes": 8 * 10**9, "parts": parts, "resident": {}, "phase": "forward", "module": ""}
    option = {**values, "precision": "fp32", "peak_resident_bytes": 10**9}
    fields |= {"plan": sizes, "fitting": [option], "free": 2 * 10**9}
    text = plan(client, draft)
    assert "Does not fit." in text
    assert '<input type="hidden" name="lora.rank" value="4">' in text


def test_model_larger_than_the_memory_is_not_planned(
    client: TestClient, draft: Draft, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltaw.training.planning import fake_model, plan_run

    monkeypatch.setattr(fake_model, "memory_limit_bytes", lambda: Choice(10**4, "a small machine"))
    monkeypatch.setattr(plan_run, "simulate", None)
    monkeypatch.setattr(studio.worker, "result", lambda call, arguments, draft: worker.CALLS[call](**arguments))
    text = client.get(f"/drafts/{draft.identity}/part/plan").text
    assert "The model does not fit" in text
    assert "0.0 GB of memory" in text
    assert "Choose a smaller model" in text


class BlockingProcess:
    """Process that answers no request until it is killed."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self.requests = list[str]()

    def request(self, request: bytes, seconds: float, *, max_bytes: int) -> list[bytes]:
        self.requests.append(json.loads(request)["arguments"]["name"])
        self.closed.wait(seconds)
        self.closed.clear()
        raise WorkerError("gave no answer")

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def blocked(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> BlockingProcess:
    process = BlockingProcess()
    monkeypatch.setattr(studio.worker, "_process", process)
    monkeypatch.setattr(worker, "WATCH_SECONDS", 0.02)
    return process


def test_call_that_no_page_asks_for_is_given_up_for_another_draft(
    studio: Studio, blocked: BlockingProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "RESTART_SECONDS", 0.0)
    monkeypatch.setattr(worker, "WAITING_SECONDS", 0.3)
    studio.worker.result("plan", {"name": "left"}, draft="a")
    deadline = time.monotonic() + 60
    while "second" not in blocked.requests:
        assert time.monotonic() < deadline
        assert isinstance(studio.worker.result("check", {"name": "second"}, draft="b"), Pending)
        time.sleep(0.02)
    monkeypatch.setattr(worker, "ABANDONED_SECONDS", 0.3)
    deadline = time.monotonic() + 60
    while studio.worker._running is not None:  # it is given up without a request, too
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert blocked.requests == ["left", "second"]


def test_plan_that_takes_too_long_ends_with_advice(
    studio: Studio, blocked: BlockingProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PLAN_SECONDS", 0.2)
    deadline = time.monotonic() + 60
    with pytest.raises(UserError, match="not estimated within") as caught:
        while isinstance(studio.worker.result("plan", {"name": "slow"}), Pending):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert "replace train by plan" in str(caught.value.hint)


@pytest.mark.slow
def test_plan_of_the_worker(client: TestClient, draft: Draft) -> None:
    text = plan(client, draft)
    assert "Fits." in text
    assert "on rows" not in text


@pytest.mark.slow
def test_worker_reports_errors_and_newer_call_replaces_a_waiting_one(studio: Studio, draft: Draft) -> None:
    config = studio.workspace.config(draft)
    first = studio.worker.result("run_page", {"folder": "/missing"}, draft="a")
    assert isinstance(first, Pending)
    studio.worker.result("plan", {"config": config}, draft="a")
    missing = {**config, "data": {**config["data"], "train": str(studio.workspace.folder / "gone.jsonl")}}
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        while isinstance(studio.worker.result("plan", {"config": missing}, draft="a"), Pending):
            time.sleep(0.1)
    assert isinstance(studio.worker.result("plan", {"config": config}, draft="a"), Pending)  # it was dropped
    with pytest.raises(UserError, match="not the folder of a run"):
        while isinstance(studio.worker.result("run_page", {"folder": "/missing"}), Pending):
            time.sleep(0.1)


def test_start_queues_one_job_with_a_free_name(client: TestClient, studio: Studio, draft: Draft) -> None:
    (studio.workspace.folder / "runs" / "first").mkdir(parents=True)
    for _ in range(2):  # the second time is a second click
        assert client.post(f"/drafts/{draft.identity}/start", data={"name": "first"}).status_code == 200
    assert [job.run for job in studio.queue.jobs()] == ["runs/first-2"]
    draft.set("lora.rank", 3)
    draft.save()
    client.post(f"/drafts/{draft.identity}/start", data={"name": "first"})
    assert [job.run for job in studio.queue.jobs()] == ["runs/first-2", "runs/first-3"]
    draft.set("lora.rank", 4)
    draft.save()
    client.post(f"/drafts/{draft.identity}/start", data={"name": " ../Für (Öl) "})
    assert studio.queue.jobs()[-1].run == "runs/Fur-Ol"


def test_simultaneous_starts_create_one_job_per_draft_in_distinct_folders(client, studio: Studio, draft: Draft) -> None:
    other = studio.workspace.create_draft(studio.workspace.folder / "rows.jsonl")
    other.settings |= draft.settings
    other.save()
    transport = httpx.ASGITransport(app=client.app)

    async def press() -> None:
        options = {"base_url": "http://127.0.0.1", "headers": ORIGIN, "cookies": dict(client.cookies)}
        async with httpx.AsyncClient(transport=transport, **options) as browser:
            addresses = [f"/drafts/{identity}/start" for identity in [draft.identity] * 12 + [other.identity] * 3]
            await asyncio.gather(*(browser.post(address, data={"name": "first"}) for address in addresses))

    asyncio.run(press())
    jobs = studio.queue.jobs()
    assert {job.draft for job in jobs} == {draft.identity, other.identity}
    assert sorted(str(job.run) for job in jobs) == ["runs/first", "runs/first-2"]


def test_job_does_not_resume_into_the_folder_of_another_training(client, studio: Studio, draft: Draft) -> None:
    client.post(f"/drafts/{draft.identity}/start", data={"name": "first"})
    (removed,) = studio.queue.jobs()
    studio.queue.stop(removed.identity)
    client.post(f"/drafts/{draft.identity}/start", data={"name": "first"})
    assert [job.run for job in studio.queue.jobs()] == ["runs/first"] * 2
    assert "another training uses the folder" in client.post(f"/jobs/{removed.identity}/resume").text.lower()
    assert [job.state for job in studio.queue.jobs()] == ["queued", "stopped"]


def test_start_page_lists_drafts_without_a_training(client: TestClient, studio: Studio, draft: Draft) -> None:
    address = f"/drafts/{draft.identity}"
    studio.queue.add("plan", ["plan"], title="Download", draft=draft.identity)
    assert f'href="{address}/data"' in client.get("/").text
    client.post(f"{address}/start", data={"name": "first"})
    assert address not in client.get("/").text
    (job,) = [job for job in studio.queue.jobs() if job.verb == "train"]
    job.state = "done"
    (studio.workspace.folder / "runs" / "first").mkdir(parents=True)
    client.post(f"/jobs/{job.identity}/remove")
    assert address not in client.get("/").text


def test_job_page_shows_progress_of_the_run_and_escapes_texts(client: TestClient, studio: Studio, draft: Draft) -> None:
    client.post(f"/drafts/{draft.identity}/start", data={"name": "first"})
    (job,) = studio.queue.jobs()
    run = studio.workspace.folder / "runs" / "first"
    run.mkdir(parents=True)
    error = "error: the disk is full\n  where: runs\n  hint:  delete files\n"
    (run / "run.json").write_text(json.dumps({"version": 1, "state": "interrupted", "total_steps": 40}))
    lines: list[dict[str, Any]] = [{"step": n, "loss": 4.0 / n, "seconds": 1.0, "tokens": 9} for n in range(1, 21)]
    sample = {"row": 1, "prompt": "<b>one</b>", "expected": "two"}
    lines[0]["samples"] = [{**sample, "answer": "before it"}]
    lines[0]["samples"][0]["step"] = 0
    lines.insert(0, {"step": 0, "samples": [{**sample, "answer": "first answer"}]})
    lines.append({"step": 20, "samples": [{**sample, "answer": "last answer"}]})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job.state = "stopped"
    job.stops = 1
    page = client.get(f"/jobs/{job.identity}").text
    assert "20 of 40 steps" in page
    assert all(
        text in page for text in ("first answer", "last answer", "&lt;b&gt;one", 'id="loss-figure"', "Start again")
    )
    assert "<b>one" not in page
    (loss,) = re.findall(r"Training loss: lower is better</dt><dd>(.*?)</dd>", page)
    assert f"changed from 4.000 to {loss} over 20 steps" in page
    assert "<dt>Loss:</dt> <dd>how far the model is from the expected answers" in page
    assert client.get(f"/jobs/{job.identity}/part/live").headers["X-Done"] == "1"
    job.state = "done"
    assert 'href="/runs/try/runs/first"' in client.get(f"/jobs/{job.identity}").text
    shutil.rmtree(run)
    page = client.get(f"/jobs/{job.identity}").text
    assert "The result was deleted." in page and "/runs/try/" not in page
    (job.folder / "stderr").write_text(f"some line\n{error}")
    job.state = "failed"
    page = client.get(f"/jobs/{job.identity}").text
    assert "The disk is full." in page
    assert "Delete files." in page
    assert "some line" in page


def test_page_of_a_job_offers_its_file_or_names_its_folder(client: TestClient, studio: Studio) -> None:
    exports = studio.workspace.folder / "exports"
    (exports / "first-merged").mkdir(parents=True)
    (exports / "first.gguf").write_bytes(b"GGUF")
    for verb, name in (("merge", "first-merged"), ("export", "first.gguf")):
        job = studio.queue.add(verb, [verb], title=name, output=exports / name)
        job.state = "done"
        page = client.get(f"/jobs/{job.identity}").text
        assert (f'href="/exports/{name}"' in page) == (verb == "export")
        assert (f"<code>exports/{name}</code>" in page) == (verb == "merge")


def test_failed_score_of_a_run_with_checkpoints_is_not_continued(client: TestClient, studio: Studio) -> None:
    run = studio.workspace.folder / "runs" / "first"
    (run / "checkpoints" / "step-1").mkdir(parents=True)
    for verb in ("train", "eval"):
        job = studio.queue.add(verb, [verb, "--json"], title="Job", run=run)
        job.state = "failed"
        button = re.search(r'<button id="resume">(.*?)<', client.get(f"/jobs/{job.identity}").text)
        assert button and button[1] == {"train": "Continue", "eval": "Start again"}[verb]


def test_failed_score_offers_to_predict_the_file(client: TestClient, studio: Studio) -> None:
    run = studio.workspace.folder / "runs" / "first"
    file = studio.workspace.folder / "rows.jsonl"
    run.mkdir(parents=True)
    job = studio.queue.add("eval", ["eval", str(run), f"--data={file}", "--json"], title="Score", run=run)
    job.state = "failed"
    text = client.get(f"/jobs/{job.identity}").text
    assert 'name="file" value="rows.jsonl"' in text and 'value="predict">Predict this file instead' in text


def test_predictions_are_shown_in_words_with_their_first_rows(client: TestClient, studio: Studio) -> None:
    output = studio.workspace.folder / "exports" / "predictions.csv"
    output.parent.mkdir()
    output.write_text("row,text,prediction\n" + "".join(f"{n},text {n} <b>,good\n" for n in range(1, 30)))
    job = studio.queue.add("predict", ["predict"], title="Predict", output=output)
    job.state = "done"
    errors = {"an empty text": 2}
    result = {"output": str(output), "task": "x", "rows": 2900, "predicted": 29, "errors": errors, "seconds": 3.25}
    (job.folder / "stdout").write_text(json.dumps(result))
    text = client.get(f"/jobs/{job.identity}").text
    values = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert values["rows in the file"] == "2,900" and values["rows with a prediction"] == "29"
    assert values["rows without a prediction: an empty text"] == "2" and set(values) <= {*values, "time"}
    assert "output" not in values and "seconds" not in values
    assert "text 10 &lt;b&gt;" in text and "text 11" not in text and "The file has more rows" in text


def test_wrong_predictions_are_marked_and_predict_is_the_first_action(client: TestClient, studio: Studio) -> None:
    run = studio.workspace.folder / "runs" / "first"
    run.mkdir(parents=True)
    job = studio.queue.add("train", ["train"], title="first", run=run)
    job.state = "done"
    (run / "run.json").write_text(json.dumps({"version": 1, "state": "finished", "total_steps": 1}))
    wrong = {"row": 3, "text": "late", "expected": "good", "predicted": "bad", "score": 0.9}
    right = wrong | {"row": 4, "predicted": "good"}
    table = {"score_name": "confidence", "mistakes": [wrong], "examples": [right]}
    lines = [{"step": 1, "loss": 1.0}, {"step": 1, "predictions": {"": table}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = client.get(f"/jobs/{job.identity}").text
    cells = re.findall(r'<td data-name="predicted">(.*?)</td>', text, re.DOTALL)
    assert [("bad" in cell, 'class="wrong">wrong' in cell) for cell in cells] == [(True, True), (False, False)]
    assert re.findall(r'class="button[^"]*" href="[^"]*">(.*?)<', text)[0] == "Predict"


def test_table_of_scores_has_a_column_of_ranges_if_any_is_known(client: TestClient, studio: Studio) -> None:
    score = {"metric": "accuracy", "value": 0.8}
    result = {"eval": {"loss": 0.5, "accuracy": 0.8}, "score": score, "rows": 10}
    for interval, cells in ([0.7, 0.9], ["–", "70.0% – 90.0%"]), (None, []):
        result["score"] = score | {"interval": interval}
        job = studio.queue.add("eval", ["eval", "--json"], title="Score")
        job.state = "done"
        (job.folder / "stdout").write_text(json.dumps(result))
        text = client.get(f"/jobs/{job.identity}").text
        assert re.findall(r"<td data-name=\"95% confidence interval\">(.*?)</td></tr>", text) == cells
        assert ("confidence interval</th>" in text) == bool(cells)
        assert 'accuracy<small class="term">share of rows with the right class</small>' in text


def test_pages_need_no_torch() -> None:
    code = "import sys, deltaw.studio.live, deltaw.studio.models; print({'torch', 'datasets'} & {*sys.modules})"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "set()"
