"""TrialServer of a run: process, proxy, and scores of a file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest

pytest.importorskip("fastapi", reason="the extra studio is not installed")

from deltaw.child_process import start_command
from deltaw.errors import UserError
from deltaw.studio import trial as trial_module
from deltaw.studio.jobs import workspace_command
from deltaw.studio.trial import TrialServer
from deltaw.studio.workspace import Workspace
from tests.serving.http.page_server import BASE, PageServer, serve_app
from tests.studio.client import connect
from tests.studio.test_runs import write_run

SECONDS = 60.0
# Server that answers with its command line and key, in place of `deltaw serve`.
CODE = """
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps([sys.argv[1:], os.environ["DELTAW_API_KEY"], self.path]).encode())
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print("a line\\nserving a, b at http://127.0.0.1:%d" % server.server_port)
server.serve_forever()
"""


def wait_for(trial: TrialServer, state: str) -> None:
    deadline = time.monotonic() + SECONDS
    while trial.state != state:
        assert time.monotonic() < deadline and trial.state == "starting", trial.error.message
        time.sleep(0.02)


@pytest.fixture
def fake_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = trial_module._CODE.partition("from deltaw.cli")[0]
    monkeypatch.setattr(trial_module, "_CODE", watch + f"exec({CODE!r})")


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[TrialServer]:
    result = TrialServer(Workspace(tmp_path))
    yield result
    result.stop()


@pytest.mark.usefixtures("fake_serve")
def test_trial_serves_a_run_with_a_new_key_until_it_is_stopped(trial: TrialServer, tmp_path: Path) -> None:
    keys = []
    for name in ("one", "two"):
        trial.start(tmp_path / name, [tmp_path / "other"])
        assert trial.state == "starting" and trial.url == ""
        wait_for(trial, "ready")
        arguments, key, _ = httpx.get(trial.url, trust_env=False).json()
        assert arguments[:2] == ["serve", str(tmp_path / name)] and f"--adapter=other={tmp_path / 'other'}" in arguments
        assert key == trial.key and len(key) > 30 and key not in str(arguments)
        keys.append(key)
        process = psutil.Process(trial._process.pid)
    assert len({*keys}) == 2
    trial.stop()
    assert trial.state == "stopped" and trial.run is None and not process.is_running()


@pytest.mark.parametrize("code", ["sys.exit('error: too large\\n  where: here\\n  hint:  smaller')", "sys.exit(3)"])
def test_failed_trial_shows_the_error_of_the_command(
    trial: TrialServer, tmp_path: Path, monkeypatch, code: str
) -> None:
    monkeypatch.setattr(trial_module, "_CODE", f"import sys; {code}")
    trial.start(tmp_path / "run")
    wait_for(trial, "failed")
    deadline = time.monotonic() + SECONDS
    while "'error:" in code and trial.error.message != "too large" and time.monotonic() < deadline:
        time.sleep(0.02)
    expected = ("too large", "here", "smaller") if "error:" in code else ("the model could not be loaded", None)
    assert (trial.error.message, trial.error.location, trial.error.hint)[: len(expected)] == expected
    assert trial.error.hint


@pytest.mark.usefixtures("fake_serve")
def test_job_stops_an_idle_trial_only(trial: TrialServer, tmp_path: Path) -> None:
    trial.start(tmp_path / "run")
    trial.stop_if_idle()
    assert trial.state != "stopped"
    trial.last_used -= 2 * trial_module.IDLE_SECONDS
    trial.stop_if_idle()
    assert trial.state == "stopped"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_process_ends_if_the_studio_is_killed(tmp_path: Path) -> None:
    watch = trial_module._CODE.partition("from deltaw.cli")[0]
    code = (
        "import sys, time; from pathlib import Path; from deltaw.studio import trial; "
        "from deltaw.studio.workspace import Workspace; "
        f"trial._CODE = {watch + 'import time; time.sleep(300)'!r}; "
        "it = trial.TrialServer(Workspace(Path(sys.argv[1]))); it.start(Path('run')); "
        "print(it._process.pid, flush=True); time.sleep(300)"
    )
    command, environment = workspace_command(code, Workspace(tmp_path), [str(tmp_path)])
    studio = start_command(command, environment=environment, stdout=subprocess.PIPE)
    assert studio.stdout is not None
    process = psutil.Process(int(studio.stdout.readline()))
    assert process.is_running()
    os.kill(studio.pid, signal.SIGKILL)
    studio.wait()
    studio.stdout.close()
    process.wait(SECONDS)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, PageServer]]:
    """Address of a studio whose trial is a server with fixed answers that requires a key."""
    server = PageServer(key="k" * 32)
    client = connect(tmp_path / "studio")
    with serve_app(server.app()) as url:
        server.url = url
        vars(client.studio.trial).update(url=url.rstrip("/"), key=server.key, used=0.0, state="ready", run=None)
        with serve_app(client.app) as studio:
            cookies = {"deltaw-studio-7860": client.cookies["deltaw-studio-7860"]}
            with httpx.Client(base_url=studio, cookies=cookies, trust_env=False) as http:
                http.headers["Origin"] = studio.rstrip("/")
                http.trial = client.studio.trial  # type: ignore[attr-defined]
                yield http, server
        server.gate.set()


STREAMED = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "stream": True}


def test_proxy_streams_chunks_as_they_come_and_adds_the_key(served) -> None:
    http, server = served
    server.hold_after = 3
    with http.stream("POST", "trial/page/v1/chat/completions", json=STREAMED) as response:
        lines = response.iter_lines()
        first = [next(lines) for _ in range(5)]
        assert "low" in "".join(first) and not server.gate.is_set()
        server.gate.set()
        assert "[DONE]" in "".join(lines)
    assert server.chat_requests == [STREAMED] and http.trial.last_used > 0
    assert server.key not in str(response.headers) and "".join(first).count(server.key) == 0


@pytest.mark.parametrize("token_seconds", [0.0, 0.2])
def test_disconnected_browser_cancels_the_answer(served, token_seconds) -> None:
    http, server = served
    # The client disconnects while the server waits or sleeps.
    server.hold_after = 3
    server.token_seconds = token_seconds
    with http.stream("POST", "trial/page/v1/chat/completions", json=STREAMED) as response:
        lines = response.iter_lines()
        assert "low" in "".join(next(lines) for _ in range(5))  # the third token: the server waits
    deadline = time.monotonic() + SECONDS
    while server.disconnected != [BASE]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_page_may_be_framed_by_the_studio_only_and_keeps_its_policy(served) -> None:
    http, server = served
    response = http.get("trial/page/")
    assert response.status_code == 200 and server.key not in response.text
    policy = response.headers["content-security-policy"]
    assert "script-src 'sha256-" in policy and "frame-ancestors 'self'" in policy
    assert response.headers["x-frame-options"] == "SAMEORIGIN"
    tag = {"If-None-Match": response.headers["etag"]}
    assert http.get("trial/page/", headers=tag).status_code == 304
    assert http.get("trial/page/prompting/some%2Fmodel").json()["examples"] == []
    assert http.get("trial/page/other").status_code == 404


def test_proxy_needs_the_cookie_and_explains_that_the_model_is_not_loaded(served) -> None:
    http, _ = served
    assert httpx.get(f"{http.base_url}trial/page/v1/models", trust_env=False).status_code == 401
    http.trial.url = "http://127.0.0.1:9"
    response = http.get("trial/page/v1/models")
    assert response.status_code == 502 and "Load it again" in response.json()["error"]["message"]
    http.trial.url = ""
    assert http.get("trial/page/v1/models").status_code == 503


def test_page_starts_a_trial_and_offers_runs_of_the_same_model(client) -> None:
    for name in ("first", "second", "unusable name"):
        write_run(client, name)
    other = write_run(client, "third")
    (other / "run.yaml").write_text("model: another\ntask: causal-lm\nmethod: lora\n")
    started: list[tuple[Path, list[Path]]] = []
    trial = client.studio.trial
    vars(trial).update(start=lambda run, others: started.append((run, others)), run=None, state="stopped")
    text = client.get("/trial/part", params={"run": "runs/first"}).text
    assert 'value="runs/second"' in text and "third" not in text and "unusable" not in text
    data = {"run": "runs/first", "other": "runs/second"}
    response = client.post("/trial/start", data=data)
    assert response.headers["location"] == "/runs/try/runs/first"
    runs = client.studio.workspace.folder / "runs"
    assert started == [(runs / "first", [runs / "second"])]
    trial.run = runs / "first"
    trial.state = "starting"
    assert client.get("/trial/part", params={"run": "runs/first"}).status_code == 202
    trial.state = "failed"
    trial.error = UserError("too large", hint="smaller")
    assert "Too large." in client.get("/trial/part", params={"run": "runs/first"}).text
    trial.state = "ready"
    text = client.get("/trial/part", params={"run": "runs/first"}).text
    client.queue.busy = lambda: SimpleNamespace(identity="0" * 12)
    assert "<iframe" in text and text == client.get("/trial/part", params={"run": "runs/first"}).text
    assert "<iframe" not in client.get("/trial/part", params={"run": "runs/second"}).text


def test_scores_and_predictions_are_jobs(client) -> None:
    write_run(client, "first")
    folder = client.studio.workspace.folder
    (folder / "--rows.csv").write_text("a,b\n")
    assert "--rows.csv" in client.get("/runs/try/runs/first").text
    for verb in ("eval", "predict"):
        data = {"run": "runs/first", "file": "--rows.csv", "verb": verb}
        assert client.post("/runs/score", data=data).headers["location"].startswith("/jobs/")
    score, predict = client.queue.added
    run = str(folder / "runs" / "first")
    rows = folder / "--rows.csv"
    assert score["arguments"] == ["eval", run, f"--data={rows}", "--with-base", "--no-drift", "--json"]
    output = folder / "exports" / "first-predictions.csv"
    assert predict["arguments"] == ["predict", run, str(rows), f"--output={output}", "--json"]
    assert predict["output"] == output
    for change in ({"verb": "train"}, {"file": "../rows.csv"}, {"run": "."}):
        assert client.post("/runs/score", data=data | change).status_code == 400


def test_files_to_score_can_hold_rows_and_none_is_selected_first(client) -> None:
    folder = client.studio.workspace.folder
    for name, content in {
        "new.csv": b"a,b\n",
        "empty.csv": b"",
        "photo.csv": b"\x89PNG\r\n\0" + bytes(range(256)),
    }.items():
        (folder / name).write_bytes(content)
    (folder / "rows.csv").write_text("a,b\n")
    run = write_run(client, "first")
    (run / "run.yaml").write_text(f"model: some/model\ntask: causal-lm\ndata: {{train: {folder / 'rows.csv'}}}\n")
    text = client.get("/runs/try/runs/first").text
    assert set(re.findall(r'<option value="(.*?)"( selected)?>(.*?)</option>', text)) == {
        ("", " selected", "choose a file"), ("new.csv", "", "new.csv"),
        ("rows.csv", "", "rows.csv (used for training)"),
    }  # fmt: skip


def test_models_that_are_not_served_are_tried_on_a_file(client) -> None:
    for task, is_served in (("sequence-classification", True), ("regression", True), ("image-classification", False)):
        (write_run(client, task) / "run.yaml").write_text(f"model: some/model\ntask: {task}\n")
        text = client.get(f"/runs/try/runs/{task}").text
        assert ("/trial/part" in text) is is_served and ("are tried on a file" in text) is not is_served
        assert "Score" in text


def test_uploaded_file_to_score_is_no_draft(client) -> None:
    response = client.put("/trial/files/more.csv", content=b"a,b\n1,2\n")
    assert response.json() == {"file": "more.csv", "note": ""}
    workspace = client.studio.workspace
    assert (workspace.folder / "more.csv").read_bytes() == b"a,b\n1,2\n" and workspace.drafts() == []
    write_run(client, "first")
    assert 'value="more.csv"' in client.get("/runs/try/runs/first").text
    assert client.put("/trial/files/page.html", content=b"<p>").status_code == 400
