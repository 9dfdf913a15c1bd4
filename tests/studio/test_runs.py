"""List, comparison, report, download, deletion and export of runs in the studio."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="the extra studio is not installed")
from filelock import FileLock

from deltaw.runs.folder import CHECKPOINT_FOLDER, LOCK
from deltaw.studio.worker import Pending
from tests.studio.client import StudioClient

SCORE = {"metric": "accuracy", "value": 0.821, "interval": [0.78, 0.856]}


@pytest.fixture
def run(client) -> Path:
    return write_run(client, "first")


def write_run(client: StudioClient, name: str, **values: object) -> Path:
    """Write the folder of a finished run."""
    folder = client.studio.workspace.folder / "runs" / name
    (folder / CHECKPOINT_FOLDER).mkdir(parents=True)
    (folder / "run.yaml").write_text("model: some/model\ntask: causal-lm\nmethod: lora\n")
    start = {"adapters": [{"name": "<b>origin", "task": "t", "start": {"adapters": [{"name": "older", "task": "t"}]}}]}
    run = {"version": 1, "state": "finished", "started": 1e9, "result": {"score": SCORE}, "start": start, **values}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "rows": 20}\n')
    for file in ("adapter_config.json", "adapter_model.safetensors", "skipped.jsonl", "report.html"):
        (folder / file).write_text("<script>")
    return folder


def test_serve_is_offered_only_for_tasks_that_it_accepts(client) -> None:
    for task, is_served in (("causal-lm", True), ("embedding", True), ("image-classification", False), ("x", False)):
        write_run(client, task)
        settings = client.studio.workspace.folder / "runs" / task / "run.yaml"
        settings.write_text(f"model: some/model\ntask: {task}\nmethod: lora\n")
        text = client.get(f"/runs/of/runs/{task}").text
        assert ("deltaw serve" in text, "deltaw push" in text) == (is_served, True), task


def test_list_shows_score_with_interval(client, run) -> None:
    text = client.get("/runs").text
    assert '<a href="/runs/of/runs/first">first</a>' in text and "accuracy 82.1% (78.0% – 85.6%)" in text


def test_list_shows_training_rows_and_passes(client) -> None:
    write_run(client, "first", data={"counts": {"rows_kept": 8, "held_out": 2}})
    assert '<td data-name="training rows × passes">8 rows × 2.5</td>' in client.get("/runs").text


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_runs_with_links_out_of_the_folder_are_not_listed_and_pipes_are_not_read(client, run, tmp_path) -> None:
    pipes = write_run(client, "pipes")
    outside = tmp_path / "outside"
    shutil.copytree(run, outside)
    for name in ("run.json", "metrics.jsonl"):
        (pipes / name).unlink()
        os.mkfifo(pipes / name)
    (run.parent / "linked").symlink_to(outside)
    (write_run(client, "link-inside") / "run.json").unlink()
    (run.parent / "link-inside" / "run.json").symlink_to(outside / "run.json")
    os.mkfifo(client.studio.workspace.folder / "rows.csv")
    for address in ("/", "/runs"):
        text = client.get(address).text
        assert "runs/pipes" in text and "linked" not in text and "link-inside" not in text
    assert client.get("/runs/of/runs/link-inside").status_code == 400
    assert client.post("/drafts", data={"file": "rows.csv"}).status_code == 400


def test_page_of_a_run_escapes_its_origins(client, run) -> None:
    text = client.get("/runs/of/runs/first").text
    assert "82.1%" in text and "&lt;b&gt;origin" in text and "older" in text


def test_page_of_a_run_shows_the_number_of_correct_rows(client) -> None:
    data = {"counts": {"held_out": 8}}
    for name, value in {"exact": 0.375, "other": 0.4}.items():  # 0.4 of 8 rows is not a number of rows
        write_run(client, name, data=data, result={"score": {"metric": "exact_match", "value": value}})
    assert "3 of 8 rows" in client.get("/runs/of/runs/exact").text
    assert "of 8 rows" not in client.get("/runs/of/runs/other").text


DAMAGED = (
    *("", "[]", '{"version": 1, "state": 3, "start": 5, "data": {"counts": [3]}, "result": {"score": 1}}'),
    '{"version": 1, "result": {"score": {"metric": "a", "value": 1, "interval": "x"}}}',
    '{"version": 1, "start": {"adapters": [{"start": {"adapters": [[]]}}, 3]}}',
)


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_run_is_shown(client, run, content) -> None:
    (run / "run.json").write_text(content)
    (run / "metrics.jsonl").write_text("{")
    for path in ("/", "/runs", "/runs/of/runs/first"):
        assert client.get(path).status_code == 200


def test_comparison(client, run) -> None:
    write_run(client, "second", result={"score": SCORE | {"value": 0.5}})
    (run.parent / "second" / "run.yaml").write_text("model: other/model\ntask: causal-lm\nmethod: lora\n")
    text = client.get("/runs/compare?run=runs/first&run=runs/second").text
    assert "some/model" in text and "other/model" in text
    for few in ("", "?run=runs/first&run=runs/first"):
        location = client.get(f"/runs/compare{few}").headers["location"]
        assert "Select two or more runs" in client.get(location).text
    assert "Select two or more" not in client.get("/runs").text


def test_comparison_names_different_rows_and_classes_and_shows_intervals(client, run) -> None:
    counts = {"rows_read": 90, "rows_kept": 72, "held_out": 18}
    for name, classes in (("first", ("a", "b")), ("second", ("a", "b", "c")), ("third", ("a", "b"))):
        folder = run if name == "first" else write_run(client, name)
        values = json.loads((folder / "run.json").read_text())
        values["data"] = {"counts": counts | {"class_counts": dict.fromkeys(classes, 9)}}
        (folder / "run.json").write_text(json.dumps(values))
        (folder / "metrics.jsonl").write_text('{"step": 1, "eval": {"accuracy": 0.821}}\n')
        label = "topic" if name == "second" else "team"
        with (folder / "run.yaml").open("a") as file:
            file.write(f"data:\n  train: a.csv\n  columns: {{label: {label}}}\n")
    text = client.get("/runs/compare?run=runs/first&run=runs/second").text
    assert "the rows differ: columns." in text
    assert "the classes differ. first: a, b; second: a, b, c." in text
    assert "held-out accuracy, 95% interval" in text and "78.0% – 85.6%" in text
    assert "cannot be compared" not in client.get("/runs/compare?run=runs/first&run=runs/third").text


def test_report_is_rendered_by_the_worker_and_sandboxed(client, run) -> None:
    answers = iter([Pending(2.0), {"html": "<p>report</p>"}])
    client.studio.worker.result = lambda call, arguments: (calls.append((call, arguments)), next(answers))[1]
    calls: list[object] = []
    waiting = client.get("/runs/report/runs/first")
    assert waiting.status_code == 202 and waiting.headers["refresh"] == "1"
    done = client.get("/runs/report/runs/first")
    assert done.text == "<p>report</p>" and done.headers["content-security-policy"].startswith("sandbox allow-scripts")
    assert calls == [("run_page", {"folder": str(run)})] * 2


def test_download_contains_the_adapter_and_no_rows_or_links(client, run, tmp_path) -> None:
    (tmp_path / "secret.json").write_text("secret")
    (run / "link.json").symlink_to(tmp_path / "secret.json")
    (run / "1_Pooling").mkdir()
    (run / "1_Pooling" / "config.json").write_text("{}")
    response = client.get("/runs/adapter/runs/first")
    names = zipfile.ZipFile(io.BytesIO(response.content)).namelist()
    expected = {"adapter_config.json", "adapter_model.safetensors", "1_Pooling/config.json"}
    assert {*names} == {f"first/{name}" for name in expected}
    assert "first.zip" in response.headers["content-disposition"]
    assert not list(client.studio.workspace.folder.glob(".*.part"))


def test_delete(client, run) -> None:
    with FileLock(run / CHECKPOINT_FOLDER / LOCK):
        assert client.post("/runs/delete", data={"run": "runs/first"}).status_code == 400
    (run.parent / "link").symlink_to(run)
    assert client.post("/runs/delete", data={"run": "runs/link"}).status_code == 400
    (run.parent / "rows").mkdir()
    for other in ("runs/rows", "runs", "", "..", "missing"):
        assert client.post("/runs/delete", data={"run": other}).status_code == 400
    assert run.is_dir()
    assert client.post("/runs/delete", data={"run": "runs/first"}).status_code == 303
    assert not run.exists() and (run.parent / "rows").is_dir()


def test_run_with_an_active_job_is_not_deleted_and_its_trial_is_stopped(client, run) -> None:
    client.queue.active = lambda: [SimpleNamespace(run="runs/first")]
    assert client.post("/runs/delete", data={"run": "runs/first"}).status_code == 400 and run.is_dir()
    client.queue.active = list
    stopped: list[Path] = []
    vars(client.studio.trial).update(run=run, stop=lambda: stopped.append(run))
    assert client.post("/runs/delete", data={"run": "runs/first"}).status_code == 303 and not run.exists()
    assert client.post("/trial/stop", data={"run": "runs/first"}).headers["location"] == "/runs/of/runs/first"
    assert stopped == [run, run]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"verb": "merge"}, ["merge", "RUN", "--output=EXPORTS/first-merged", "--json"]),
        ({"verb": "export", "type": "q8_0"},
         ["export", "RUN", "--format=gguf", "--type=q8_0", "--output=EXPORTS/first-q8_0.gguf", "--json"]),
        ({"verb": "deploy", "program": "ollama"}, ["deploy", "ollama", "RUN", "--json"]),
    ],
)  # fmt: skip
def test_export_adds_a_job(client, run, fields, expected) -> None:
    response = client.post("/runs/ship", data={"run": "runs/first", **fields})
    assert response.headers["location"] == "/jobs/0123456789ab"
    exports = run.parent.parent / "exports"
    names = {"RUN": str(run), "EXPORTS": str(exports)}
    assert client.queue.added[0]["arguments"] == [
        names.get(text, text.replace("EXPORTS", names["EXPORTS"])) for text in expected
    ]


def test_output_of_an_active_job_is_not_used_again(client, run) -> None:
    client.queue.active = lambda: [SimpleNamespace(run=None, output="exports/first-merged")]
    client.post("/runs/ship", data={"run": "runs/first", "verb": "merge"})
    assert client.queue.added[0]["output"].name == "first-merged-2"


@pytest.mark.parametrize("fields", [{"verb": "push"}, {"verb": "export", "type": "--x"}, {"verb": "deploy"}, {}])
def test_unknown_exports_are_rejected(client, run, fields) -> None:
    assert client.post("/runs/ship", data={"run": "runs/first", **fields}).status_code == 400
    assert client.queue.added == []


def test_exported_file_is_downloaded_and_other_files_are_not(client, run) -> None:
    exports = client.studio.workspace.folder / "exports"
    exports.mkdir()
    (exports / "page.html").write_text("<script>")
    shutil.copytree(run, exports / "merged")
    response = client.get("/exports/page.html")
    assert response.headers["content-type"] == "application/octet-stream"
    assert "attachment" in response.headers["content-disposition"]
    for path in ("/exports/merged", "/exports/%2E%2E/runs/first/run.yaml", "/exports/missing"):
        assert client.get(path).status_code in (400, 404)
