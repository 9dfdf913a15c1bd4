"""`deltaw serve` as a process: startup, requests and shutdown."""

from __future__ import annotations

import json
import re
import signal
import socket
from pathlib import Path

import pytest

from deltaw.cli.serve import command
from tests import processes
from tests.byte_models import save_model, tiny_llama
from tests.cli.conftest import Call, assert_refused, start

httpx = pytest.importorskip("httpx", reason="requires httpx (extra 'dev')")
pytest.importorskip("fastapi", reason="requires FastAPI (extra 'dev')")

read_keys = pytest.importorskip("deltaw.serving.http.settings").read_keys

KEY = "a-key-of-the-tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}
SECONDS = 120


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_llama(max_position_embeddings=4096), tmp_path_factory.mktemp("serve") / "base")


def start_server(base: Path, *arguments: str) -> processes.Process:
    """Start a server with an API key and the model name ``tiny``."""
    options = (base, "--port", "0", "--name", "tiny", "--precision", "fp32", *arguments)
    return start("serve", *options, env={"DELTAW_API_KEY": KEY, "OMP_NUM_THREADS": "1"})


def url_of(server: processes.Process) -> str:
    """Wait until the server listens and return its URL."""
    pattern = r"serving tiny at (http://127\.0\.0\.1:\d+)\n"
    match = server.wait_for(lambda: re.match(pattern, server.current_output()[0]), SECONDS)
    return str(match[1])


@pytest.mark.parametrize(
    ("sig", "status"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_server_starts_answers_and_stops(base: Path, sig: int, status: int) -> None:
    request = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
    with start_server(base, "--cache-memory", "64MB") as server:
        with httpx.Client(base_url=url_of(server), timeout=SECONDS) as client:
            assert client.get("/ready").status_code == 200
            assert client.get("/v1/models").status_code == 401
            client.headers.update(HEADERS)
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
            stream = request | {"stream": True, "max_tokens": 300}
            with client.stream("POST", "/v1/chat/completions", json=stream) as response:
                parts = response.iter_text()
                next(parts)
                server.send_signal(sig)  # the running request is completed
                rest = "".join(parts)
        assert rest.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in rest
        assert server.wait(SECONDS) == status
        log = server.current_output()[1]
        assert '"status": 401' in log and '"finish": ["length"]' in log and KEY not in log
        assert "Traceback" not in log


INVALID_OPTIONS = {
    "--host 0.0.0.0": "without an API key",
    "--host 0.0.0.0 --api-key short": "8 or more",
    "--host 999.1.1.1 --without-key": "does not exist",
    "--host 192.0.2.1 --without-key": "cannot listen on",
    "--port 70000": "70000",
    "--adapter poet": "name=folder",
    "--adapter a/b=/tmp": "is not a valid adapter name",
    "--adapter a=/nowhere": "no such folder",
    "--adapter a=/tmp --adapter a=/tmp": "two adapters",
    **dict.fromkeys(["--adapters-from /nowhere", "--api-key-file /nowhere"], "/nowhere"),
    **{f"{flag} 0": flag for flag in ("--queue", "--max-adapters", "--request-seconds")},
    "--max-body ten": "--max-body",
    "--cache-memory much": "not a valid size",
    f"--certificate {__file__}": "TLS",
    "--log xml": "--log",
    "--unknown": "--unknown",
}


def test_invalid_options_are_rejected(base: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTAW_API_KEY", raising=False)
    for arguments, message in INVALID_OPTIONS.items():
        assert_refused(call("serve", base, *arguments.split()), message)


def test_used_port_is_reported_before_model_load(call: Call) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert_refused(call("serve", "owner/no-such-model", "--port", taken.getsockname()[1]), "cannot listen on")


def test_api_keys_are_read_from_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAW_API_KEY", "from-the-environment")
    file = tmp_path / "keys"
    file.write_text("# of the team\nfirst-key-1\n\n second-key-2 \n")
    assert read_keys(["given-key-0"], file) == ("given-key-0", "first-key-1", "second-key-2", "from-the-environment")


def test_every_option_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    options = [name for parameter in command.params for name in parameter.opts if name.startswith("--")]
    assert len(options) > 25
    missing = [option for option in options if f"`{option}" not in page]
    assert not missing, missing


def test_dockerfile_runs_serve_as_unprivileged_user() -> None:
    """Files and options that the Dockerfile names exist. Docker is not required."""
    root = Path(__file__).parents[2]
    text = (root / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    steps = re.findall(r"^([A-Z]+) +(.+)$", text, re.MULTILINE)
    last = [name for name, _ in steps].index("FROM", 1)
    copied = [word for name, rest in steps[:last] if name == "COPY" for word in rest.split()[:-1]]
    assert copied and all((root / name).exists() for name in copied)
    allowed = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert all(f"!{name}" in allowed for name in copied)
    final = dict(steps[last:])
    assert final["USER"].isdecimal() and int(final["USER"]) > 0
    assert "/health" in final["HEALTHCHECK"] and final["STOPSIGNAL"] == "SIGTERM"
    verb = json.loads(final["ENTRYPOINT"])
    valid_options = {name for parameter in command.params for name in parameter.opts}
    assert verb[:2] == ["deltaw", "serve"] and set(verb[2::2]) <= valid_options
