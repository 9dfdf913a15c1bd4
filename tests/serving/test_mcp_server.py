"""Tests of the MCP server: training and evaluating an adapter with the protocol's client, and hostile clients."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("mcp", reason="mcp is not installed: pip install 'deltaw[mcp]'")

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

from deltaw.cli.mcp_server import AgentServer
from deltaw.errors import UserError
from deltaw.runs.permissions import FolderPermissions
from deltaw.settings.config import RunConfig, settings
from tests.byte_models import save_model, tiny_llama
from tests.conftest import COLORS, write_rows
from tests.vision_models import png, save_vision_model

# Settings whose values name files, models or rows.
PATH_SETTINGS = {"model", "data.train", "data.eval", "data.chat_template", "output"}
PATH_SETTINGS |= {"reward.functions", "reward.environment", "distill.prompt", "start_from"}


@pytest.fixture
def agent_folder(tmp_path: Path) -> Path:
    """Folder for an agent with a model and rows, next to an inaccessible file and links that leave the folder."""
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    folder = tmp_path / "agent"
    folder.mkdir()
    save_model(tiny_llama(initializer_range=0.3), folder / "tiny")
    write_rows(folder / "rows.jsonl", ({"prompt": f"paint it {c}", "completion": c[0]} for c in COLORS))
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (folder / "away").symlink_to(tmp_path)
    return folder


def run_settings(**changes: Any) -> dict[str, Any]:
    """Return the settings of a short run."""
    short = {"model": "tiny", "data": {"train": "rows.jsonl", "eval": 2}, "precision": "fp32", "threads": 1}
    short |= {"train": {"batch_size": 3, "learning_rate": 0.01, "epochs": 4}, "lora": {"rank": 4}}
    return {**short, "output": "runs/one", **changes}


@asynccontextmanager
async def client(folder: Path, *flags: str) -> AsyncIterator[Callable[..., Any]]:
    """Start a server for a folder and yield a function that calls a tool and returns its result or its error text."""
    arguments = ["-m", "deltaw", "mcp", "--allow", str(folder), *flags]
    parameters = StdioServerParameters(command=sys.executable, args=arguments, env=dict(os.environ))
    async with stdio_client(parameters) as (reading, writing), ClientSession(reading, writing) as session:
        await session.initialize()

        async def call(name: str, **arguments: Any) -> Any:
            answer = await session.call_tool(name, arguments)
            text = answer.content[0].text
            return text if answer.is_error else json.loads(text)

        call.session = session  # type: ignore[attr-defined]
        yield call


async def wait_for_training(call: Callable[..., Any]) -> dict[str, Any]:
    """Wait for the training to finish and return its status."""
    while (status := await call("train_status"))["is_running"]:
        await asyncio.sleep(0.1)
    return status


async def from_file_to_adapter(call: Callable[..., Any], config: dict[str, Any]) -> Mapping[str, Any]:
    tools = {tool.name: tool for tool in (await call.session.list_tools()).tools}
    assert all(tool.input_schema["additionalProperties"] is False for tool in tools.values())
    assert (await call("data_check", settings=config))["verdict"] == "fine"
    assert (await call("plan", settings=config))["lora"]["trained_parameters"] > 0
    assert (await call("train", settings=config))["started"].endswith(config["output"])
    status = await wait_for_training(call)
    assert (status["state"], status["exit_status"]) == ("finished", 0), status
    assert status["step"] == status["steps"] and status["loss"] > 0 and status["notes"]
    return await call("eval", run=config["output"], base=True, drift=False)


@pytest.mark.slow  # six processes that import torch
def test_agent_trains_and_evaluates_adapter_from_file(agent_folder: Path) -> None:
    async def walk() -> None:
        async with client(agent_folder) as call:
            scores = await from_file_to_adapter(call, run_settings())
            assert scores["eval"]["loss"] < scores["base"]["loss"] - 1
            stored = json.loads((agent_folder / "runs" / "one" / "run.json").read_text())["result"]["eval"]
            assert scores["eval"]["loss"] == pytest.approx(stored["loss"], rel=1e-6)  # same precision as the run
            output = await call("generate", run="runs/one", prompts=["paint it red"], max_new_tokens=3)
            assert len(output["completions"]) == 1
            assert [run["name"] for run in (await call("runs"))["runs"]] == ["one"]

    asyncio.run(walk())


def schema_reward(schema: object) -> dict[str, Any]:
    return run_settings(task="rl", reward={"functions": [{"name": "json-schema", "schema": schema}]})


HOSTILE = [
    ("eval", {"run": "/etc/passwd"}, "outside of the folders"),
    ("eval", {"run": "tiny", "data": "../secret.jsonl"}, "outside of the folders"),
    ("eval", {"run": "away/agent/../secret.jsonl"}, "outside of the folders"),
    ("eval", {"run": "some/model"}, "not a local path"),
    ("eval", {"run": "pypi:anything==1.0"}, "not a local path"),
    ("eval", {"run": "https://example.org/model"}, "such"),
    ("eval", {"run": "a\0b"}, "NUL"),
    ("eval", {"run": "x" * 100_000}, "at most 1024"),
    ("eval", {"run": 5}, "should be a text"),
    ("eval", {"run": "tiny", "rows": "5"}, "should be an integer"),
    ("eval", {"run": "tiny", "rows": 10**9}, "at most"),
    ("eval", {"run": "tiny", "trust_remote_code": True}, "no such argument"),
    ("generate", {"run": "tiny", "prompts": ["x"] * 17}, "at most 16"),
    ("generate", {"run": "tiny", "prompts": ["x" * 9000]}, "at most 8192"),
    ("generate", {"run": "tiny", "prompts": ["x"], "temperature": float("1e9")}, "at most"),
    ("data_show", {"settings": run_settings(), "rows": 1000}, "at most"),
    ("data_check", {"file": "link.jsonl"}, "outside of the folders"),
    ("data_check", {"file": "tiny"}, "no such file"),
    ("train", {"settings": run_settings(output="../out")}, "outside of the folders"),
    ("train", {"settings": run_settings(data={"train": ["rows.jsonl", {"from": "/etc/passwd"}]})}, "outside of"),
    ("train", {"settings": run_settings(data={"train": "rows.jsonl", "eval": {"a": "link.jsonl"}})}, "outside of"),
    ("train", {"settings": run_settings(data={"train": "rows.jsonl", "chat_template": "/etc/passwd"})}, "outside of"),
    ("train", {"settings": run_settings(task="distill", distill={"prompt": "/etc/passwd"})}, "outside of"),
    ("train", {"settings": run_settings(task="distill", distill={"teachers": [{"adapter": "away"}]})}, "outside of"),
    ("train", {"settings": run_settings(task="distill", distill={"teachers": [{"model": "/etc"}]})}, "outside of"),
    ("train", {"settings": run_settings(trust_remote_code=True)}, "this is not allowed here"),
    ("train", {"settings": run_settings(track="wandb")}, "this is not allowed here"),
    ("train", {"settings": run_settings(task="rl", reward={"functions": ["own.py:f"]})}, "read files or run code"),
    ("train", {"settings": run_settings(task="rl", reward={"environment": "own.py:E"})}, "read files or run code"),
    ("train", {"settings": schema_reward({"$ref": "http://a/b"})}, "not fetched"),
    ("train", {"settings": schema_reward("s.json")}, "read files or run code"),
    ("train", {"settings": run_settings(nonsense=1)}, "nonsense"),
    ("train", {"settings": {"a": {"b": {"c": {"d": {"e": {"f": {"g": 1}}}}}}}}, "deeper"),
    ("train", {"settings": {"model": "x" * 70_000}}, "larger"),
    ("train", {"settings": run_settings(), "resume": "runs/one"}, "pass resume only"),
    ("train", {"resume": "../other"}, "outside of the folders"),
    ("train_stop", {}, "no training"),
    ("shell", {"command": "id"}, "no tool"),
]


@pytest.mark.parametrize(("tool", "arguments", "words"), HOSTILE)
def test_forbidden_calls_are_rejected_before_starting_a_process(
    agent_folder, tmp_path, monkeypatch, tool, arguments, words
) -> None:
    monkeypatch.setattr(AgentServer, "_command", lambda self, words: pytest.fail(f"a process is started: {words}"))

    async def check() -> None:
        server = AgentServer(FolderPermissions([agent_folder], allow_remote=False), 60.0, tmp_path)
        with pytest.raises(UserError) as error:
            await server.call(tool, arguments)
        assert words in str(error.value)

    asyncio.run(check())


SECRET = "what the teacher must not read"


@pytest.mark.parametrize("name", ["secret.txt", "../secret.txt", "{tmp}/secret", "link.txt", "away/secret", "~/secret"])
@pytest.mark.parametrize("as_file", [False, True])
def test_teacher_prompt_is_read_only_from_allowed_folders(
    agent_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, as_file: bool
) -> None:
    for folder in (tmp_path, work := tmp_path / "work"):
        folder.mkdir(exist_ok=True)
        (folder / "secret.txt").write_text(SECRET)
        (folder / "secret").write_text(SECRET)
    (agent_folder / "link.txt").symlink_to(tmp_path / "secret")
    (agent_folder / "away-too").symlink_to(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(agent_folder.parent / "agent")  # the working folder of the server
    name = name.format(tmp=tmp_path)
    config = run_settings(task="distill", distill={"prompt": {"file": name} if as_file else name})
    try:
        resolved = FolderPermissions([agent_folder], allow_remote=False).config(None, config)
    except UserError:
        return
    monkeypatch.chdir(work)  # the working folder of its child processes
    assert SECRET not in RunConfig.read(resolved).distill.prompt_text


def test_prompt_text_is_not_interpreted_as_a_file(
    agent_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distilled = run_settings(task="distill", distill={"prompt": "brief"})
    config = FolderPermissions([agent_folder], allow_remote=False).config(None, distilled)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "brief").write_text(SECRET)
    assert config["distill"]["prompt"] == {"text": "brief"}
    assert RunConfig.read(config).distill.prompt_text == "brief"


@pytest.mark.slow  # processes that import torch
def test_rows_of_agent_cannot_refer_to_images_outside(agent_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png((220, 10, 10)))
    (agent_folder / "own.png").write_bytes(png((10, 10, 220)))
    (agent_folder / "link.png").symlink_to(tmp_path / "secret.png")
    save_vision_model("llava", agent_folder / "vision")
    server = AgentServer(FolderPermissions([agent_folder], allow_remote=False), 120, tmp_path)
    texts = set()
    for image in ("own.png", str(tmp_path / "secret.png"), str(tmp_path / "absent.png"), "link.png"):
        write_rows(agent_folder / "rows.jsonl", [{"image": image, "prompt": "color?", "completion": "red"}] * 3)
        check = asyncio.run(server.call("data_check", {"settings": run_settings(model="vision")}))
        if image == "own.png":
            assert check["examples"] == 3
        else:
            assert check["examples"] == 0
            texts.add(json.dumps(check["findings"]))
    assert len(texts) == 1 and "outside of the folders" in texts.pop()
    with pytest.raises(UserError, match="outside of the folders"):
        asyncio.run(server.call("eval", {"run": "vision", "data": "rows.jsonl"}))


def test_processes_of_agent_are_restricted_to_its_folders(agent_folder: Path, tmp_path: Path) -> None:
    server = AgentServer(FolderPermissions([agent_folder], allow_remote=False), 60, tmp_path)
    _, environment = server._command(["eval"])
    code = "from deltaw.untrusted_paths import AllowedFolders; print(*AllowedFolders.of_process().folders)"
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == str(agent_folder.resolve())


def test_allowed_prompt_file_is_read_once(agent_folder: Path, tmp_path: Path) -> None:
    (agent_folder / "brief.txt").write_text("Be brief.")
    distilled = run_settings(task="distill", distill={"prompt": "brief.txt"})
    config = FolderPermissions([agent_folder], allow_remote=False).config(None, distilled)
    (agent_folder / "brief.txt").unlink()
    (agent_folder / "brief.txt").symlink_to(tmp_path / "secret.jsonl")
    assert RunConfig.read(config).distill.prompt_text == "Be brief."


@pytest.mark.parametrize(
    "path", ["../agent/rows.jsonl", "~/rows.jsonl", "runs/../rows.jsonl", "a/b/../../../rows.jsonl"]
)
def test_paths_leaving_the_folder_are_rejected(agent_folder: Path, path: str) -> None:
    for allow_remote in (False, True):
        with pytest.raises(UserError, match="outside of the folders"):
            FolderPermissions([agent_folder], allow_remote).config(None, run_settings(data={"train": path}))


def test_rejection_does_not_tell_whether_a_file_outside_exists(agent_folder: Path) -> None:
    for allow_remote in (False, True):
        permissions = FolderPermissions([agent_folder], allow_remote)
        for path in ("away/secret.jsonl", "away/absent.jsonl"):
            with pytest.raises(UserError, match="outside of the folders"):
                permissions.config(None, run_settings(data={"train": path}))


def test_text_setting_does_not_tell_whether_a_file_outside_exists(agent_folder: Path, tmp_path: Path) -> None:
    permissions = FolderPermissions([agent_folder], allow_remote=False)
    existing = tmp_path / "a secret"
    existing.write_text("secret")
    for path in (existing, tmp_path / "an absent secret"):
        values = permissions.config(None, run_settings(task="distill", distill={"prompt": str(path)}))
        assert values["distill"]["prompt"] == {"text": str(path)}


def test_parts_of_a_model_are_checked(agent_folder: Path) -> None:
    permissions = FolderPermissions([agent_folder], allow_remote=True)
    model = permissions.config(None, run_settings(model={"language": "owner/name", "vision": "encoder"}))["model"]
    assert model == f"parts:owner/name + {agent_folder.resolve() / 'encoder'}"
    for parts in ("parts:owner/name + /etc", "parts:../x + encoder"):
        with pytest.raises(UserError, match="outside of the folders"):
            permissions.config(None, run_settings(model=parts))
        with pytest.raises(UserError, match="outside of the folders"):
            permissions.run_arguments(parts)


def test_every_path_setting_is_checked() -> None:
    words = ("file", "folder", "reference")
    mentioned = {
        setting.key for setting in settings() if any(f" {word}" in f" {setting.description}" for word in words)
    }
    mentioned -= {key for key in mentioned if key in NOT_PATH_SETTINGS}
    assert mentioned <= PATH_SETTINGS, "check them in FolderPermissions.config, or add them to NOT_PATH_SETTINGS"


# Settings whose descriptions mention files, but whose values do not name any.
NOT_PATH_SETTINGS = {"data.columns", "data.max_row_bytes", "data.bad_rows", "precision", "train.saved_adapter"}
NOT_PATH_SETTINGS |= {"preference.loss", "reference_model"}
NOT_PATH_SETTINGS |= {"train.eval_answers"}
NOT_PATH_SETTINGS |= {f"embedding.{name}" for name in ("pooling", "normalize", "query_prompt", "passage_prompt")}


@pytest.mark.parametrize("as_list", [False, True])
def test_run_cannot_start_from_an_adapter_outside(agent_folder: Path, finished_run: Path, as_list: bool) -> None:
    start = [{"from": str(finished_run), "weight": 0.5}] if as_list else str(finished_run)
    allowed = FolderPermissions([agent_folder], allow_remote=False)
    with pytest.raises(UserError, match="outside of the folders"):
        allowed.config(None, run_settings(start_from=start))


def test_run_referring_to_outside_files_is_rejected(agent_folder: Path, finished_run: Path) -> None:
    allowed = FolderPermissions([agent_folder, finished_run.parent], allow_remote=False)
    with pytest.raises(UserError, match="outside of the folders"):  # its model and its rows are in other folders
        allowed.run_arguments(str(finished_run))


def test_server_survives_hostile_client(agent_folder: Path) -> None:
    async def walk() -> None:
        async with client(agent_folder) as call:
            errors = await asyncio.gather(*(call(tool, **arguments) for tool, arguments, _ in HOSTILE[:12]))
            assert all(isinstance(text, str) and text.startswith("error:") for text in errors)
            assert not any("Traceback" in text for text in errors)
            assert len((await call.session.list_tools()).tools) == 10

    asyncio.run(walk())


@pytest.mark.slow
def test_time_limit_and_single_training_are_enforced(agent_folder: Path) -> None:
    async def walk() -> None:
        async with client(agent_folder, "--seconds", "1") as call:  # importing torch takes longer
            assert "time limit exceeded: 1 s" in await call("data_check", settings=run_settings())
        long = run_settings(train={"batch_size": 1, "max_steps": 100_000, "checkpoint_every": 1000})
        async with client(agent_folder) as call:
            first, second = await asyncio.gather(call("train", settings=long), call("train", settings=long))
            texts = [reply for reply in (first, second) if isinstance(reply, str)]
            assert len(texts) == 1 and "a training run is in progress" in texts[0]
            while (await call("train_status"))["state"] != "running" or not (await call("train_status"))["step"]:
                await asyncio.sleep(0.2)
            assert (await call("train_status"))["seconds_left"] > 0
            stopped = await call("train_stop")
            assert (stopped["state"], stopped["exit_status"]) == ("interrupted", 130)
            assert "started" in await call("train", resume="runs/one")
            while (await call("train_status")).get("step", 0) <= stopped["step"]:
                await asyncio.sleep(0.2)
        record = agent_folder / "runs" / "one" / "run.json"  # the disconnect stops the server and its training
        deadline = time.monotonic() + 120
        while json.loads(record.read_text())["state"] == "running" and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        assert json.loads(record.read_text())["state"] == "interrupted"
        server_processes = [p for p in psutil.process_iter() if str(agent_folder) in " ".join(_words(p))]
        assert not psutil.wait_procs(server_processes, timeout=120)[1]

    asyncio.run(walk())


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_cancelled_call_kills_its_command_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = AgentServer(FolderPermissions([tmp_path], allow_remote=False), 60, tmp_path)
    code = "import pathlib, time; pathlib.Path('started').touch(); time.sleep(300)"
    monkeypatch.setattr(server, "_command", lambda arguments: ([sys.executable, "-c", code], dict(os.environ)))

    before = set(psutil.Process().children())  # of other tests

    async def cancel() -> None:
        call = asyncio.create_task(server.call("doctor", {}))
        while not (tmp_path / "started").exists():
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert not set(psutil.Process().children()) - before

    asyncio.run(cancel())
