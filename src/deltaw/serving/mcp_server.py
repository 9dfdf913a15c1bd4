"""A Model Context Protocol server on standard input and output: what the command line does, as tools for an agent.

A tool runs ``deltaw VERB --json`` in a process of its own, so that it does what the verb does, can be ended when its
time is up, and takes nothing down with it. Here is decided what may be asked: paths lie in the folders that the user
allows, after links; models and rows come from elsewhere only if the user allows that; nothing runs a model's own code.
The agent is not trusted: arguments are bounded, and unknown ones refused.

Needs the package ``mcp``. Knows settings and the folders of runs, not models.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio
import yaml
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp_types import CallToolResult, ListToolsResult, TextContent, Tool
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from deltaw.errors import UserError, as_message, redact
from deltaw.local_names import replace_names
from deltaw.runs.folder import RUNNING, Run
from deltaw.settings import SETTINGS, RunConfig
from deltaw.task_settings import TextSource
from deltaw.version import __version__

# Bounds of what an agent may send: characters of a path and of other texts, bytes and depth of settings.
LONGEST_PATH, LONGEST_TEXT, LARGEST_SETTINGS, DEEPEST = 1024, 8192, 2**16, 6
# Bytes of a settings file; characters of a tool's result, and of an error.
LARGEST_FILE, LONGEST_RESULT, LONGEST_ERROR = 2**20, 2**18, 3000
# Steps whose mean time tells the time that is left.
RECENT = 20
# Where a model or rows come from, if not from a path: a package, or a hub id.
_ELSEWHERE = re.compile(r"pypi:\S+|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:[/@:][\w.@:/-]+)?")
# A process ends with the server, even if that is killed: SIGINT, upon which a training saves itself.
_CHILD = """\
import contextlib, ctypes, signal, sys
with contextlib.suppress(Exception):
    ctypes.CDLL(None).prctl(1, signal.SIGINT)
from deltaw.cli import main
main()
"""
INSTRUCTIONS = (
    "deltaw fine-tunes language models with LoRA on this machine. Order: doctor, data_check, data_show, plan, train, "
    "train_status until it is finished, eval with base: true, generate. Read the notes of each result: they hold "
    "warnings. Paths lie in: "
)


def _plain(text: str) -> str:
    """A text without NUL and without halves of characters."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("has a NUL or half a character")
    return text


def _bounded(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that are neither large nor deep."""

    def depth(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return 1 + max(map(depth, inner), default=0)

    if len(text := json.dumps(settings)) > LARGEST_SETTINGS or depth(settings) > DEEPEST:
        raise ValueError(f"is larger than {LARGEST_SETTINGS} bytes, or deeper than {DEEPEST} levels")
    if "\\u0000" in text:
        raise ValueError("has a NUL")
    return settings


PathText = Annotated[str, Field(min_length=1, max_length=LONGEST_PATH), AfterValidator(_plain)]
Text = Annotated[str, Field(max_length=LONGEST_TEXT), AfterValidator(_plain)]
FILE_SAID = "a YAML file with settings"
SETTINGS_SAID = "settings, nested as in the YAML file; they stand above the file's"


class Nothing(BaseModel):
    """No arguments."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Settings(Nothing):
    """Settings of a run."""

    file: PathText | None = Field(None, description=FILE_SAID)
    settings: Annotated[dict[str, Any], AfterValidator(_bounded)] = Field({}, description=SETTINGS_SAID)


class Rows(Settings):
    """Rows to be shown."""

    row: int | None = Field(None, ge=1, description="the row of this number alone")
    rows: int = Field(3, ge=1, le=20)


class Training(Settings):
    """A training."""

    resume: PathText | None = Field(None, description="instead of settings: the folder of a run that goes on")


class Evaluated(Nothing):
    """A run and rows to evaluate it on."""

    run: PathText = Field(description="the folder of a run or an adapter, or a model")
    data: PathText | None = Field(None, description="rows; by default the run's held-out rows")
    rows: int | None = Field(None, ge=1, le=100_000, description="only the first so many")
    base: bool = Field(False, description="score the base model too")
    drift: bool = Field(True, description="measure how far general answers have moved")


class Runs(Nothing):
    """Runs to be listed, or compared."""

    names: list[PathText] = Field([], max_length=20, description="folders; two or more runs are compared")


class Prompts(Nothing):
    """Prompts to be completed."""

    run: PathText = Field(description="the folder of a run or an adapter, or a model")
    prompts: list[Text] = Field(min_length=1, max_length=16)
    system: Text | None = None
    base: bool = Field(False, description="the base model's completions too")
    max_new_tokens: int = Field(256, ge=1, le=2048)
    temperature: float = Field(0.0, ge=0, le=10)


class Allowed:
    """What an agent may name.

    Args:
        folders: paths must lie in one of them; relative ones are below the first.
        elsewhere: whether models and rows may come from packages and from a hub.

    Raises:
        UserError: a folder does not exist.
    """

    def __init__(self, folders: Sequence[Path], elsewhere: bool) -> None:
        if missing := [folder for folder in folders if not folder.is_dir()]:
            raise UserError("there is no such folder", where=f"--allow {missing[0]}", hint="make it first")
        self.folders, self.elsewhere = [folder.resolve() for folder in folders], elsewhere

    def path(self, text: str, where: str) -> str:
        """Return the real path that a text names, which need not exist.

        A path with ".." is refused: in the settings of a run that is opened, it would lead elsewhere from the folder
        of another process.

        Raises:
            UserError: if it is outside of the folders when links are resolved.
        """
        try:
            _plain(text)
            given = Path(os.path.expanduser(text))
            found = (self.folders[0] / given).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a link to itself, say
            raise UserError("this is not a path", where=where, hint="name a file or a folder") from error
        if ".." in given.parts or not any(found.is_relative_to(folder) for folder in self.folders):
            hint = f"allowed: {', '.join(map(str, self.folders))}"
            raise UserError(f"'{text[:200]}' lies outside of the folders that are allowed", where=where, hint=hint)
        return str(found)

    def reference(self, text: object, where: str) -> str:
        """A model or rows: the real path, or what names them elsewhere.

        Raises:
            UserError: it may not be named.
        """
        if not isinstance(text, str):
            raise UserError("this is not a text", where=where)
        is_here = not text.startswith("pypi:") and os.path.lexists(self.folders[0] / text.replace("\0", ""))
        if is_here or ".." in re.split("[/:@]", text) or not _ELSEWHERE.fullmatch(text):
            return self.path(text, where)
        if not self.elsewhere:
            hint = "name a path, or start the server with --allow-models"
            raise UserError(f"'{text[:200]}' is not in a folder, and nothing is fetched", where=where, hint=hint)
        return text

    def config(self, file: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings with real paths, ready to be written to a file.

        Raises:
            UserError: they are wrong, or name or ask for what is not allowed.
        """
        path = None if file is None else Path(self.path(file, "file"))
        if path is not None:
            require_small_file(path, "file")
        settings = RunConfig.read(path, given)
        found = settings.model_dump(mode="json")
        for key in ("trust_remote_code", "track", "force"):
            if found[key]:
                raise UserError("an agent cannot ask for it", where=key, hint=f"leave {key} out")
        for key, value in RunConfig.read(found).named().items():
            if key.startswith("reward."):
                what = f"an agent cannot name what reads files or runs code: {str(value)[:200]}"
                raise UserError(what, where=key, hint="name rewards that compare texts, such as exact")
        allow = {"path": self.path, "reference": self.reference}  # rewards with code or an address are refused above
        found = replace_names(
            found, RunConfig, lambda text, kind, key: allow[kind](text, key) if kind in allow else text
        )
        if (prompt := found["distill"]["prompt"]) and "file" in prompt:  # read now: the agent may replace the file
            require_small_file(Path(prompt["file"]), "distill.prompt")
            found["distill"]["prompt"] = {"text": TextSource(**prompt).read("distill.prompt")}
        return found

    def run(self, text: str) -> list[str]:
        """Arguments that open a run's or an adapter's folder with the base model that it names, or a model.

        Raises:
            UserError: it names what is not allowed.
        """
        from deltaw.training.origin import is_adapter, read_folder

        reference = self.reference(text, "run")
        folder = Path(reference)
        if folder.is_absolute() and not folder.exists():
            raise UserError(f"there is no such run or model: '{text[:200]}'", where="run", hint="call runs")
        if not (folder.is_absolute() and is_adapter(folder)):
            return [reference]
        found = read_folder(folder, trust_remote_code=False)
        if found.run is not None:
            self.config(None, found.run.model_dump(mode="json"))
        base = self.reference(found.base_name(None), "the base model of the run")
        precision = (
            "auto" if found.run is None else found.run.precision
        )  # which eval takes with the run's own name only
        return [reference, f"--model={base}", f"--precision={precision}"]


def require_small_file(path: Path, where: str) -> None:
    """Raise a UserError if a path is not a file, or if the file is too large to be read into memory."""
    if not (path.is_file() and path.stat().st_size <= LARGEST_FILE):
        raise UserError("there is no such file, or it is too large", where=where, hint="name another file")


@dataclass
class BackgroundTraining:
    """A training that was started, in a process of its own."""

    process: subprocess.Popen[bytes]
    folder: Path
    log: Path
    began: float

    @property
    def goes_on(self) -> bool:
        return self.process.poll() is None

    def status(self) -> dict[str, Any]:
        """Its state, step, loss and the seconds that are left, as its folder has them."""
        run, goes_on = Run(self.folder), self.goes_on
        told: dict[str, Any] = {"folder": str(self.folder), "goes_on": goes_on, "state": run.state}
        if goes_on and run.state != RUNNING:  # what is in the folder may be an earlier run
            told["state"] = "ending" if (run.values.get("started") or 0) >= self.began else "starting"
        if told["state"] != "starting":
            _, seconds = run.metrics.column("seconds")
            steps, losses = run.metrics.column("loss")
            told |= {"step": int(steps[-1]) if len(steps) else 0, "steps": run.total_steps}
            told["loss"] = float(losses[-1]) if len(losses) else None
            if run.total_steps and len(seconds) and goes_on:
                left = max(0, run.total_steps - told["step"])
                told["seconds_left"] = round(float(seconds[-RECENT:].mean()) * left, 1)
        if not goes_on:
            told |= {"exit_status": self.process.returncode, "reason": run.reason, "result": run.values.get("result")}
        told["notes"] = _notes(self.log.read_text(encoding="utf-8", errors="replace"))
        return told


class AgentServer:
    """The tools, and the one training that may go on.

    Args:
        allowed: what may be named. seconds: that a call may take. work: an empty folder of the server's own.
    """

    def __init__(self, allowed: Allowed, seconds: float, work: Path) -> None:
        self.allowed, self.seconds, self.work = allowed, seconds, work
        self.training: BackgroundTraining | None = None
        self._one_at_a_time = asyncio.Lock()
        self._files = 0

    @property
    def tools(self) -> dict[str, tuple[type[Nothing], Callable[[Any], Awaitable[object]], str]]:
        """By name: the arguments, what computes the result, and what is said of it."""
        return {
            "doctor": (Nothing, self._doctor, "What this machine is, and what makes training slow on it."),
            "data_check": (Settings, partial(self._verb, ("data", "check")), "What is wrong with the rows."),
            "data_show": (Rows, partial(self._verb, ("data", "show")), "Rows as tokens, and which are trained on."),
            "plan": (Settings, partial(self._verb, ("plan",)), "The memory that a training needs, before it starts."),
            "train": (Training, self._train, "Start a training in the background; one at a time."),
            "train_status": (Nothing, self._status, "Step, loss and time left of the training, or its result."),
            "train_stop": (Nothing, self._stop, "Stop the training; it saves itself, and can be resumed."),
            "eval": (Evaluated, self._eval, "Score a run on rows it was not trained on."),
            "runs": (Runs, self._runs, "List runs, or compare two or more: settings, cost and scores."),
            "generate": (Prompts, self._generate, "Complete prompts with a run or a model."),
        }

    async def call(self, name: str, arguments: Mapping[str, Any]) -> object:
        """The result of a tool.

        Raises:
            UserError: there is no such tool, arguments are wrong, something is not allowed, or the verb fails.
        """
        if name not in self.tools:
            raise UserError(f"there is no tool '{name[:80]}'", hint=f"there are {', '.join(self.tools)}")
        model, tool, _ = self.tools[name]
        try:
            given = model.model_validate(arguments)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))[:200]
            raise UserError(str(first["msg"]), where=where or name, hint="see the tool's schema") from error
        except RecursionError as error:
            raise UserError("the arguments are too deep", where=name) from error
        return await tool(given)

    async def _doctor(self, given: Nothing) -> object:
        return await self._run(["doctor", "--json", f"--output={self.allowed.folders[0]}"])

    async def _verb(self, verb: Sequence[str], given: Settings) -> object:
        config = await self._config(given)
        more = [f"--methods={config['method']}"] if verb == ("plan",) else []
        if isinstance(given, Rows):
            more = [f"--rows={given.rows}"] if given.row is None else [f"--row={given.row}"]
        return await self._run([*verb, str(self._write(config)), "--json", *more])

    async def _config(self, given: Settings) -> dict[str, Any]:
        return await asyncio.to_thread(self.allowed.config, given.file, given.settings)

    def _write(self, config: Mapping[str, Any]) -> Path:
        self._files += 1
        file = self.work / f"settings-{self._files}.yaml"
        file.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
        return file

    async def _train(self, given: Training) -> object:
        if given.resume is not None:
            if given.file is not None or given.settings:
                raise UserError("a run that goes on has its own settings", where="resume", hint="leave out the others")
            folder = self.allowed.path(given.resume, "resume")
            await asyncio.to_thread(self.allowed.config, str(Path(folder) / SETTINGS), {})
            arguments = ["--resume", folder]
        else:
            config = await self._config(given)
            folder, arguments = config["output"], [str(self._write(config))]
        if self.training is not None and self.training.goes_on:
            hint = "wait for it, or call train_stop"
            raise UserError("a training goes on already", where=str(self.training.folder), hint=hint)
        log, began = self.work / "train.log", time.time()
        command, how = self._command(["train", *arguments])
        with log.open("w", encoding="utf-8") as file:  # asyncio would kill its processes as it ends
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, **how)
        self.training = BackgroundTraining(process, Path(folder), log, began)
        return {"started": folder}

    async def _status(self, given: Nothing) -> object:
        if self.training is None:
            raise UserError("no training was started", hint="call train")
        return await asyncio.to_thread(self.training.status)

    async def _stop(self, given: Nothing) -> object:
        training = self.training
        if training is None or not training.goes_on:
            raise UserError("no training goes on", hint="call train")
        training.process.send_signal(
            signal.SIGINT
        )  # it saves itself upon the first signal, and ends at once upon the second
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(training.process.wait, self.seconds)
        return await asyncio.to_thread(training.status)

    async def _eval(self, given: Evaluated) -> object:
        arguments = await asyncio.to_thread(self.allowed.run, given.run)
        if given.data is not None:
            arguments.append(f"--data={self.allowed.reference(given.data, 'data')}")
        if given.rows is not None:
            arguments.append(f"--rows={given.rows}")
        flags = ["--base"] * given.base + ["--no-drift"] * (not given.drift)
        return await self._run(["eval", *arguments, *flags, "--json"])

    async def _runs(self, given: Runs) -> object:
        names = [self.allowed.path(name, "names") for name in given.names] or [str(f) for f in self.allowed.folders]
        return await self._run(["runs", *names, "--json"])

    async def _generate(self, given: Prompts) -> object:
        arguments = await asyncio.to_thread(self.allowed.run, given.run)
        arguments += [f"--prompt={prompt}" for prompt in given.prompts] + ["--base"] * given.base
        arguments += [] if given.system is None else [f"--system={given.system}"]
        arguments += [f"--max-new-tokens={given.max_new_tokens}", f"--temperature={given.temperature}"]
        return await self._run(["generate", *arguments, "--json"])

    def _command(self, arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """A verb as a process of its own, which ends with this one; in the server's own folder, so that no file of
        the agent's is imported."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
        if not self.allowed.elsewhere:
            environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        how = {"cwd": self.work, "env": environment, "start_new_session": True}
        return [sys.executable, "-c", _CHILD, *arguments], how

    async def _run(self, arguments: Sequence[str]) -> object:
        """What a verb prints as JSON, with what it says beside it, under ``notes``.

        Raises:
            UserError: it fails, says too much, or its time is up.
        """
        ends = time.monotonic() + self.seconds
        try:
            await asyncio.wait_for(self._one_at_a_time.acquire(), self.seconds)
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise UserError("another call takes all the time", hint="call again later") from error
        process: asyncio.subprocess.Process | None = None
        try:
            (program, *words), how = self._command(arguments)
            streams: dict[str, Any] = {
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
            }
            process = await asyncio.create_subprocess_exec(program, *words, **streams, **how)
            out, err = await asyncio.wait_for(process.communicate(), max(0.0, ends - time.monotonic()))
        except (TimeoutError, asyncio.TimeoutError) as error:
            hint = "ask for less, such as fewer rows"
            raise UserError(f"the time is up: {self.seconds:g} s", where=arguments[0], hint=hint) from error
        finally:
            if process is not None and process.returncode is None:
                process.kill()
                with anyio.CancelScope(shield=True):
                    await process.wait()
            self._one_at_a_time.release()
        text, notes = out.decode("utf-8", "replace"), _notes(err.decode("utf-8", "replace"))
        if len(text) > LONGEST_RESULT:
            raise UserError("the result is too long", where=arguments[0], hint="ask for less, such as fewer rows")
        try:
            found = json.loads(text)
        except ValueError:
            told = "\n".join(notes)[-LONGEST_ERROR:] or f"it ended with status {process.returncode}"
            raise UserError(told.removeprefix("error: "), where=arguments[0]) from None
        return {**found, "notes": notes} if isinstance(found, dict) else {"result": found, "notes": notes}


def _notes(text: str) -> list[str]:
    """The last lines that a verb says, without those on its progress."""
    lines = [line for line in text[-LONGEST_RESULT:].splitlines() if line.strip() and not line.startswith("still ")]
    return [line[:300] for line in lines[-40:]]


async def _serve(served: AgentServer) -> None:
    async def listed(context: Any, params: Any) -> ListToolsResult:
        return ListToolsResult(
            tools=[
                Tool(name=name, description=said, input_schema=model.model_json_schema())
                for name, (model, _, said) in served.tools.items()
            ]
        )

    async def called(context: Any, params: Any) -> CallToolResult:
        try:
            text, wrong = json.dumps(await served.call(params.name, params.arguments or {}), ensure_ascii=False), False
        except UserError as error:
            text, wrong = as_message(error), True
        except Exception as error:  # of ours; the server lives on
            text, wrong = f"error: the tool failed: {type(error).__name__}", True
            print(redact(f"{params.name[:80]!r}: {error!r}")[:LONGEST_ERROR], file=sys.stderr, flush=True)
        return CallToolResult(content=[TextContent(type="text", text=text)], is_error=wrong)

    instructions = INSTRUCTIONS + ", ".join(map(str, served.allowed.folders))
    server: Server[Any] = Server(
        "deltaw", version=__version__, instructions=instructions, on_list_tools=listed, on_call_tool=called
    )
    async with stdio_server() as (reading, writing):
        await server.run(reading, writing, server.create_initialization_options())


def serve(allowed: Allowed, seconds: float) -> None:
    """Serve on standard input and output until the client leaves; then a training that goes on saves itself."""

    async def main() -> None:
        # In a folder of its own: what an agent can write is neither here nor where its processes run.
        with tempfile.TemporaryDirectory(prefix="deltaw-mcp-", ignore_cleanup_errors=True) as work:
            served = AgentServer(allowed, seconds, Path(work))
            try:
                await _serve(served)
            finally:
                training = served.training
                if training is not None and training.goes_on and sys.platform != "linux":
                    training.process.send_signal(signal.SIGINT)  # on Linux it gets this signal as the server ends

    anyio.run(main)
