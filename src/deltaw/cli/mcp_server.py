"""Model Context Protocol server on standard input and output: the commands of deltaw as tools for an agent.

Each tool call runs ``deltaw COMMAND --json`` in a separate process, which is killed when its time is up. The agent is
not trusted: :mod:`deltaw.runs.permissions` checks paths and settings, arguments are bounded, and unknown ones are
rejected.

Requires the package ``mcp``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
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

from deltaw.child_process import kill_process_tree, python_command, start_command, start_job
from deltaw.errors import UserError, format_error, redact
from deltaw.runs.folder import RUNNING, Run
from deltaw.runs.permissions import FolderPermissions, require_plain_text
from deltaw.settings.config import SETTINGS
from deltaw.settings.expectations import expectation
from deltaw.version import __version__

# Limits of arguments: characters of a path and of other texts, bytes and nesting depth of settings.
MAX_PATH_LENGTH = 1024
MAX_TEXT_LENGTH = 8192
MAX_SETTINGS_BYTES = 2**16
MAX_SETTINGS_DEPTH = 6
# Maximum characters of a result and of an error.
MAX_RESULT_LENGTH = 2**18
MAX_ERROR_LENGTH = 3000
# Number of steps whose mean duration predicts the remaining time.
RECENT_STEPS = 20
# A child receives SIGINT when the server exits, even if the server is killed. A training run then saves a checkpoint.
_CHILD_CODE = """\
import contextlib, ctypes, signal
with contextlib.suppress(Exception):
    ctypes.CDLL(None).prctl(1, signal.SIGINT)
from deltaw.cli import main
main()
"""
INSTRUCTIONS = (
    "deltaw fine-tunes language models with LoRA on this machine. Order: doctor, data_check, data_show, plan, train. "
    "Call train_status until is_running is false. Then call eval with base: true, and generate. Read the notes of each "
    "result: they contain warnings. Allowed folders: "
)


def _check_size(settings: dict[str, Any]) -> dict[str, Any]:
    """Reject settings that are too large or too deep."""

    def depth(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return 1 + max(map(depth, inner), default=0)

    if len(text := json.dumps(settings)) > MAX_SETTINGS_BYTES or depth(settings) > MAX_SETTINGS_DEPTH:
        raise ValueError(f"is larger than {MAX_SETTINGS_BYTES} bytes, or deeper than {MAX_SETTINGS_DEPTH} levels")
    if "\\u0000" in text:
        raise ValueError("contains a NUL")
    return settings


PathText = Annotated[str, Field(min_length=1, max_length=MAX_PATH_LENGTH), AfterValidator(require_plain_text)]
Text = Annotated[str, Field(max_length=MAX_TEXT_LENGTH), AfterValidator(require_plain_text)]
FILE_DESCRIPTION = "a YAML file with settings"
SETTINGS_DESCRIPTION = "settings, nested as in the YAML file; they override the file's"


class NoArguments(BaseModel):
    """No arguments."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SettingsArguments(NoArguments):
    """Settings of a run."""

    file: PathText | None = Field(None, description=FILE_DESCRIPTION)
    settings: Annotated[dict[str, Any], AfterValidator(_check_size)] = Field({}, description=SETTINGS_DESCRIPTION)


class RowsArguments(SettingsArguments):
    """Rows to show."""

    row: int | None = Field(None, ge=1, description="show only this row, counted from 1; rows is then ignored")
    rows: int = Field(3, ge=1, le=20, description="number of rows to show")


class TrainArguments(SettingsArguments):
    """Training run to start or to resume."""

    resume: PathText | None = Field(None, description="instead of settings: folder of a run to resume")


class EvalArguments(NoArguments):
    """Run to evaluate, and rows."""

    run: PathText = Field(description="the folder of a run or an adapter, or a model")
    data: PathText | None = Field(None, description="rows; by default the run's held-out rows")
    rows: int | None = Field(None, ge=1, le=100_000, description="number of rows to evaluate, from the first on")
    base: bool = Field(False, description="score the base model too")
    drift: bool = Field(True, description="measure how much answers to general prompts changed")


class RunsArguments(NoArguments):
    """Runs to list or to compare."""

    names: list[PathText] = Field([], max_length=20, description="folders; two or more runs are compared")


class PromptsArguments(NoArguments):
    """Prompts to complete."""

    run: PathText = Field(description="the folder of a run or an adapter, or a model")
    prompts: list[Text] = Field(min_length=1, max_length=16, description="questions or texts to complete")
    system: Text | None = Field(None, description="system prompt; by default the run's own, if it has one")
    base: bool = Field(False, description="generate completions of the base model too")
    max_new_tokens: int = Field(256, ge=1, le=2048, description="maximum length of a completion, in tokens")
    temperature: float = Field(0.0, ge=0, le=10, description="0 selects the most likely token")


@dataclass
class BackgroundTraining:
    """Training run in a separate process.

    Attributes:
        process: The process.
        folder: Folder of the run.
        log: Log file.
        started_at: Start time in seconds since the epoch.
    """

    process: subprocess.Popen[bytes]
    folder: Path
    log: Path
    started_at: float

    @property
    def is_running(self) -> bool:
        """True if the process is running."""
        return self.process.poll() is None

    def status(self) -> dict[str, Any]:
        """Return state, step, loss and remaining seconds from the run's folder."""
        run = Run(self.folder)
        is_running = self.is_running
        status: dict[str, Any] = {"folder": str(self.folder), "is_running": is_running, "state": run.state}
        if is_running and run.state != RUNNING:  # the folder may contain an earlier run
            status["state"] = "ending" if (run.values.get("started") or 0) >= self.started_at else "starting"
        if status["state"] != "starting":
            _, seconds = run.metrics.column("seconds")
            steps, losses = run.metrics.column("loss")
            status |= {"step": int(steps[-1]) if len(steps) else 0, "steps": run.total_steps}
            status["loss"] = float(losses[-1]) if len(losses) else None
            if run.total_steps and len(seconds) and is_running:
                remaining_steps = max(0, run.total_steps - status["step"])
                status["seconds_left"] = round(float(seconds[-RECENT_STEPS:].mean()) * remaining_steps, 1)
        if not is_running:
            status |= {"exit_status": self.process.returncode, "reason": run.reason, "result": run.values.get("result")}
        status["notes"] = _notes(self.log.read_text(encoding="utf-8", errors="replace"))
        return status


class AgentServer:
    """Tools of the server, and the training run in the background.

    Args:
        allowed: Permissions of the agent.
        seconds: Time limit of a call.
        work_folder: Empty folder for the server's files.
    """

    def __init__(self, allowed: FolderPermissions, seconds: float, work_folder: Path) -> None:
        self.allowed = allowed
        self.seconds = seconds
        self.work_folder = work_folder
        self.training: BackgroundTraining | None = None
        self._command_lock = asyncio.Lock()
        self._num_settings_files = 0

    @property
    def tools(self) -> dict[str, tuple[type[NoArguments], Callable[[Any], Awaitable[object]], str]]:
        """Tools by name: class of the arguments, implementation and description."""
        return {
            "doctor": (NoArguments, self._doctor, "Describe this machine, and report causes of slow training."),
            "data_check": (
                SettingsArguments,
                partial(self._settings_command, ("data", "check")),
                "Report errors in the rows.",
            ),
            "data_show": (
                RowsArguments,
                partial(self._settings_command, ("data", "show")),
                "Show rows as tokens and labels.",
            ),
            "plan": (
                SettingsArguments,
                partial(self._settings_command, ("plan",)),
                "Predict the memory of a training run.",
            ),
            "train": (TrainArguments, self._train, "Start a training run in the background. Only one runs at a time."),
            "train_status": (NoArguments, self._status, "Return step, loss and remaining time, or the run's result."),
            "train_stop": (NoArguments, self._stop, "Stop the training run. It saves a checkpoint and can be resumed."),
            "eval": (EvalArguments, self._eval, "Evaluate a run or model on held-out or other rows."),
            "runs": (RunsArguments, self._runs, "List runs, or compare two or more: settings, cost and scores."),
            "generate": (PromptsArguments, self._generate, "Complete prompts with a run or a model."),
        }

    async def call(self, name: str, arguments: Mapping[str, Any]) -> object:
        """Run a tool and return its result.

        Raises:
            UserError: if the tool does not exist, an argument is invalid or not allowed, or the command fails.
        """
        if name not in self.tools:
            raise UserError(f"there is no tool '{name[:80]}'", hint=f"available tools: {', '.join(self.tools)}")
        model, tool, _ = self.tools[name]
        try:
            parsed = model.model_validate(arguments)
        except ValidationError as error:
            first_error = error.errors(include_url=False, include_input=False)[0]
            location = ".".join(map(str, first_error["loc"]))[:200] or name
            message = str(first_error["msg"]).removeprefix("Value error, ")
            phrase = expectation(message)
            problem = message if phrase is None else f"the value should {phrase}"
            if first_error["type"] == "extra_forbidden":
                problem = "there is no such argument"
            raise UserError(problem, location=location, hint="see the tool's schema") from error
        except RecursionError as error:
            raise UserError("the arguments are nested too deeply", location=name) from error
        return await tool(parsed)

    async def _doctor(self, args: NoArguments) -> object:
        return await self._run(["doctor", "--json", f"--output={self.allowed.folders[0]}"])

    async def _settings_command(self, command: Sequence[str], args: SettingsArguments) -> object:
        config = await self._config(args)
        extra = [f"--methods={config['method']}"] if command == ("plan",) else []
        if isinstance(args, RowsArguments):
            extra = [f"--limit={args.rows}"] if args.row is None else [f"--row={args.row}"]
        return await self._run([*command, str(self._write_settings(config)), "--json", *extra])

    async def _config(self, args: SettingsArguments) -> dict[str, Any]:
        return await asyncio.to_thread(self.allowed.config, args.file, args.settings)

    def _write_settings(self, config: Mapping[str, Any]) -> Path:
        self._num_settings_files += 1
        file = self.work_folder / f"settings-{self._num_settings_files}.yaml"
        file.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
        return file

    async def _train(self, args: TrainArguments) -> object:
        if args.resume is not None:
            if args.file is not None or args.settings:
                raise UserError("a resumed run uses its stored settings", location="resume", hint="pass resume only")
            folder = self.allowed.path(args.resume, "resume")
            await asyncio.to_thread(self.allowed.config, str(Path(folder) / SETTINGS), {})
            arguments = ["--resume", folder]
        else:
            config = await self._config(args)
            folder = config["output"]
            arguments = [str(self._write_settings(config))]
        if self.training is not None and self.training.is_running:
            raise UserError("a training run is in progress", location=str(self.training.folder), hint="call train_stop")
        log = self.work_folder / "train.log"
        started_at = time.time()
        command, environment = self._command(["train", *arguments])
        with log.open("wb") as file:
            process = start_command(command, environment=environment, folder=self.work_folder, stdout=file, stderr=file)
        self.training = BackgroundTraining(process, Path(folder), log, started_at)
        return {"started": folder}

    async def _status(self, args: NoArguments) -> object:
        if self.training is None:
            raise UserError("no training run was started", hint="call train")
        return await asyncio.to_thread(self.training.status)

    async def _stop(self, args: NoArguments) -> object:
        training = self.training
        if training is None or not training.is_running:
            raise UserError("no training run is in progress", hint="call train")
        # The first signal saves a checkpoint, a second one would exit immediately.
        training.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(training.process.wait, self.seconds)
        return await asyncio.to_thread(training.status)

    async def _eval(self, args: EvalArguments) -> object:
        arguments = await asyncio.to_thread(self.allowed.run_arguments, args.run)
        if args.data is not None:
            arguments.append(f"--data={self.allowed.reference(args.data, 'data')}")
        if args.rows is not None:
            arguments.append(f"--limit={args.rows}")
        flags = ["--with-base"] * args.base + ["--no-drift"] * (not args.drift)
        return await self._run(["eval", *arguments, *flags, "--json"])

    async def _runs(self, args: RunsArguments) -> object:
        names = [self.allowed.path(name, "names") for name in args.names] or [str(f) for f in self.allowed.folders]
        return await self._run(["runs", *names, "--json"])

    async def _generate(self, args: PromptsArguments) -> object:
        arguments = await asyncio.to_thread(self.allowed.run_arguments, args.run)
        arguments += [f"--prompt={prompt}" for prompt in args.prompts] + ["--with-base"] * args.base
        arguments += [] if args.system is None else [f"--system={args.system}"]
        arguments += [f"--max-new-tokens={args.max_new_tokens}", f"--temperature={args.temperature}"]
        return await self._run(["generate", *arguments, "--json"])

    def _command(self, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Return the command line and the environment of a command.

        The process exits with the thread that starts it, so start it on the thread of the server. It never imports
        files of the agent.
        """
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", **self.allowed.environment()}
        if not self.allowed.allow_remote:
            environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        return python_command(_CHILD_CODE, arguments, include_current_folder=False), environment

    async def _run(self, arguments: Sequence[str]) -> object:
        """Run a command and return its JSON output, with its messages under ``notes``.

        Raises:
            UserError: if the command fails, exceeds the time limit, or its output is too long.
        """
        deadline = time.monotonic() + self.seconds
        try:
            await asyncio.wait_for(self._command_lock.acquire(), self.seconds)
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise UserError("another call is still running", hint="call again later") from error
        try:
            command, environment = self._command(arguments)
            with start_job(command, environment=environment, folder=self.work_folder) as job:
                timeout = max(0.0, deadline - time.monotonic())
                finishing = asyncio.ensure_future(asyncio.to_thread(job.finish, timeout=timeout))
                try:
                    finished = await asyncio.shield(finishing)
                finally:
                    # After a cancellation, the thread still reads the job's files.
                    with anyio.CancelScope(shield=True):
                        await asyncio.to_thread(kill_process_tree, job.process)
                        await asyncio.wait([finishing])
        finally:
            self._command_lock.release()
        if finished.status is None:
            hint = "reduce the work, for example the number of rows"
            raise UserError(f"time limit exceeded: {self.seconds:g} s", location=arguments[0], hint=hint)
        notes = _notes(finished.messages)
        if len(finished.output) > MAX_RESULT_LENGTH:
            raise UserError("the result is too long", location=arguments[0], hint="request fewer rows")
        try:
            result = json.loads(finished.output)
        except ValueError:
            message = "\n".join(notes)[-MAX_ERROR_LENGTH:] or f"it exited with status {finished.status}"
            raise UserError(message.removeprefix("error: "), location=arguments[0]) from None
        return {**result, "notes": notes} if isinstance(result, dict) else {"result": result, "notes": notes}


def _notes(text: str) -> list[str]:
    """Return the last messages of a command."""
    lines = [line for line in text[-MAX_RESULT_LENGTH:].splitlines() if line.strip()]
    return [line[:300] for line in lines[-40:]]


async def _serve(agent_server: AgentServer) -> None:
    async def list_tools(context: Any, params: Any) -> ListToolsResult:
        tools = [
            Tool(name=name, description=description, input_schema=model.model_json_schema())
            for name, (model, _, description) in agent_server.tools.items()
        ]
        return ListToolsResult(tools=tools)

    async def call_tool(context: Any, params: Any) -> CallToolResult:
        try:
            result = await agent_server.call(params.name, params.arguments or {})
            text = json.dumps(result, ensure_ascii=False)
            is_error = False
        except UserError as error:
            text = format_error(error)
            is_error = True
        except Exception as error:  # an internal error must not stop the server
            text = f"error: the tool failed: {type(error).__name__}"
            is_error = True
            print(redact(f"{params.name[:80]!r}: {error!r}")[:MAX_ERROR_LENGTH], file=sys.stderr, flush=True)
        return CallToolResult(content=[TextContent(type="text", text=text)], is_error=is_error)

    instructions = INSTRUCTIONS + ", ".join(map(str, agent_server.allowed.folders))
    server: Server[Any] = Server(
        "deltaw", version=__version__, instructions=instructions, on_list_tools=list_tools, on_call_tool=call_tool
    )
    async with stdio_server() as (read_stream, write_stream):
        await server.run(read_stream, write_stream, server.create_initialization_options())


def serve(allowed: FolderPermissions, seconds: float) -> None:
    """Serve on standard input and output until the client disconnects. A running training then saves a checkpoint.

    Args:
        allowed: Permissions of the agent.
        seconds: Time limit of a call.
    """

    async def main() -> None:
        # A temporary folder, so that the agent's files are not in the working directory of its processes.
        with tempfile.TemporaryDirectory(prefix="deltaw-mcp-", ignore_cleanup_errors=True) as work_folder:
            agent_server = AgentServer(allowed, seconds, Path(work_folder))
            try:
                await _serve(agent_server)
            finally:
                training = agent_server.training
                if training is not None and training.is_running and sys.platform != "linux":
                    # On Linux the kernel sends this signal when the server exits.
                    training.process.send_signal(signal.SIGINT)

    anyio.run(main)
