"""Pages of the runs: list, comparison, report, download, deletion and export."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.background import BackgroundTask

from deltaw.errors import UserError
from deltaw.hub.outside_references import ADAPTER_CONFIG
from deltaw.platforms import shell_word
from deltaw.reports.runs import comparison_notes, differing_settings, result_rows, same_prompts, unique_names
from deltaw.reports.tables import duration, format_interval, format_time, metric_name, metric_value
from deltaw.runs.folder import (
    LEARNING_RATES,
    METRICS,
    RUN,
    RUNNING,
    Run,
    find_runs,
    is_locked,
    is_run,
    mapping,
    number,
    sequence,
)
from deltaw.settings import task_registry
from deltaw.settings.config import SETTINGS
from deltaw.studio.rendering import form, model_name, page
from deltaw.studio.state import Studio
from deltaw.studio.worker import Pending
from deltaw.studio.workspace import EXPORTS, Workspace, unused_path
from deltaw.untrusted_paths import require_contained

# Files of an adapter. Rows, answers, checkpoints and logs are not downloaded.
ADAPTER_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".md")
# Storage types of a GGUF file, with descriptions.
GGUF_TYPES = {"q8_0": "small, nearly exact", "q4_0": "smallest, less exact", "f16": "large, exact"}
PROGRAMS = {"ollama": "Ollama", "lmstudio": "LM Studio"}
# A rendered report contains its own policy for styles and its script.
_REPORT_HEADERS = {"Content-Security-Policy": "sandbox allow-scripts; frame-ancestors 'self'"}
# Maximum depth, and maximum number of adapters per level.
_MAX_ORIGINS = 8

# Text of an adapter that a run started from, and the adapters that this one started from.
Origin: TypeAlias = tuple[str, list["Origin"]]


def router(studio: Studio) -> APIRouter:
    """Return the routes of the pages of the runs."""
    routes = APIRouter()
    _add_pages(routes, studio)
    _add_actions(routes, studio)
    return routes


def _add_pages(routes: APIRouter, studio: Studio) -> None:
    workspace = studio.workspace

    @routes.get("/runs")
    def show_all(request: Request) -> Response:
        runs = sorted(all_runs(workspace), key=lambda run: run.started, reverse=True)
        rows = [
            (workspace.relative(run.path), name, _listed(run))
            for run, name in zip(runs, unique_names(runs), strict=True)
        ]
        return page(request, "runs.html", rows=rows, few="few" in request.query_params)

    @routes.get("/runs/compare")
    def compare(request: Request) -> Response:
        runs = [run_of(workspace, text) for text in dict.fromkeys(request.query_params.getlist("run"))]
        if len(runs) < 2:
            return RedirectResponse("/runs?few=1", 303)
        if "curves" in request.query_params:
            return _report(studio, request, "comparison_page", {"folders": [str(run.path) for run in runs]})
        values = {"names": unique_names(runs), "query": request.url.query, "answers": same_prompts(runs)}
        values["notes"] = comparison_notes(runs)
        tables = {"results": result_rows(runs), "differences": differing_settings(runs)}
        return page(request, "compare.html", values=values, tables=tables)

    @routes.get("/runs/of/{path:path}")
    def show(request: Request, path: str) -> Response:
        run = run_of(workspace, path)
        relative = workspace.relative(run.path)
        commands = {"Upload to the Hugging Face Hub": f"deltaw push {shell_word(run.path)} USER/NAME"}
        entry = task_registry.find(run.task)
        if can_serve(run):
            commands["Serve with the OpenAI API"] = f"deltaw serve {shell_word(run.path)}"
        results = replace(result_rows([run]), caption="Values of this run", head=("name", "value"))
        jobs = [job for job in studio.queue.jobs() if job.run == relative]
        return page(
            request, "run.html", run=run, path=relative, interval=score_range_text(run), correct=score_rows(run),
            results=results, goal=(entry.goal or entry.capability) if entry else run.task,
            origins=_origins(run.part("start"), _MAX_ORIGINS), jobs=jobs, gguf_types=GGUF_TYPES, programs=PROGRAMS,
            commands=commands, has_adapter=has_adapter(run.path),
        )  # fmt: skip

    @routes.get("/runs/report/{path:path}")
    def show_report(request: Request, path: str) -> Response:
        return _report(studio, request, "run_page", {"folder": str(run_of(workspace, path).path)})


def _add_actions(routes: APIRouter, studio: Studio) -> None:
    workspace = studio.workspace

    @routes.get("/runs/adapter/{path:path}")
    def download(path: str) -> Response:
        folder = run_of(workspace, path).path
        file = workspace.partial_file()
        with zipfile.ZipFile(file, "w") as archive:
            for source in _adapter_files(folder):
                archive.write(source, Path(folder.name) / source.relative_to(folder))
        task = BackgroundTask(file.unlink, missing_ok=True)
        return FileResponse(file, filename=f"{folder.name}.zip", media_type="application/zip", background=task)

    @routes.get("/exports/{path:path}")
    def download_export(path: str) -> Response:
        file = workspace.path(f"{EXPORTS}/{path}")
        if not file.is_file():
            raise UserError("this is a folder", location=str(file), hint="open it in your file manager")
        return FileResponse(file, filename=file.name, media_type="application/octet-stream")

    @routes.post("/runs/delete")
    async def delete(request: Request) -> Response:
        text = (await form(request)).get("run", [""])[0]
        run = run_of(workspace, text)
        if run.path != workspace.folder / text:
            raise UserError(f"'{text[:200]}' is a link", hint="delete it in your file manager")
        has_job = any(job.run == workspace.relative(run.path) for job in studio.queue.active())
        if has_job or run.state == RUNNING or is_locked(run.path):
            raise UserError("this run is not finished or a job uses it", hint="stop it before you delete it")
        if studio.trial.run == run.path:
            await asyncio.to_thread(studio.trial.stop)
        shutil.rmtree(run.path)
        return RedirectResponse("/runs", 303)

    @routes.post("/runs/ship")
    async def ship(request: Request) -> Response:
        fields = await form(request)
        run = run_of(workspace, fields.get("run", [""])[0]).path
        verb = fields.get("verb", [""])[0]
        if verb == "deploy":
            program = _choice(fields, "program", PROGRAMS)
            title = f"{run.name} to {PROGRAMS[program]}"
            arguments = [verb, program, str(run)]
            output = None
        elif verb == "export":
            kind = _choice(fields, "type", GGUF_TYPES)
            output = export_path(studio, f"{run.name}-{kind}.gguf")
            title = f"{run.name} as GGUF file"
            arguments = [verb, str(run), "--format=gguf", f"--type={kind}"]
        elif verb == "merge":
            output = export_path(studio, f"{run.name}-merged")
            title = f"{run.name} as complete model"
            arguments = [verb, str(run)]
        else:
            raise UserError(f"'{verb[:200]}' is not a way to export a run")
        arguments += ["--json"] if output is None else [f"--output={output}", "--json"]
        job = studio.queue.add(verb, arguments, title=title, run=run, output=output)
        return RedirectResponse(f"/jobs/{job.identity}", 303)


def run_of(workspace: Workspace, text: str) -> Run:
    """Return the run with this relative path.

    Raises:
        UserError: if it is not a run, or its values are links to files outside of it.
    """
    path = workspace.path(text, location="run")
    if not is_run(path):
        raise UserError(f"'{text[:200]}' is not a run", hint="choose one in the list of results")
    require_contained(path, only=[path / name for name in (SETTINGS, RUN, METRICS, LEARNING_RATES)])
    return Run(path)


def all_runs(workspace: Workspace) -> list[Run]:
    """Return the runs of a studio, without those that are links, or whose files are links, to paths outside."""
    runs = []
    for path in find_runs(workspace.folder):
        with contextlib.suppress(UserError):
            runs.append(run_of(workspace, workspace.relative(path)))
    return runs


def _report(studio: Studio, request: Request, call: str, arguments: Mapping[str, Any]) -> Response:
    """Return a page that the worker renders, or a page that waits for it."""
    result = studio.worker.result(call, arguments)
    if not isinstance(result, Pending):
        return HTMLResponse(result["html"], headers=_REPORT_HEADERS)
    response = page(request, "waiting.html", status=202, seconds=result.seconds)
    response.headers["Refresh"] = "1"
    return response


def _choice(fields: Mapping[str, list[str]], name: str, choices: Mapping[str, str]) -> str:
    value = fields.get(name, [""])[0]
    if value not in choices:
        raise UserError(f"'{value[:200]}' is not possible", location=name, hint=f"choose {' or '.join(choices)}")
    return value


def export_path(studio: Studio, name: str) -> Path:
    """Return a path in the folder of exports that neither exists nor is the output of an active job."""
    folder = studio.workspace.folder / EXPORTS
    folder.mkdir(exist_ok=True)
    return unused_path(folder / name, {studio.workspace.folder / str(job.output) for job in studio.queue.active()})


def can_serve(run: Run) -> bool:
    """Return True if ``deltaw serve`` supports the task of a run."""
    entry = task_registry.find(run.task)
    return entry is not None and entry.output_kind is not None


def has_adapter(folder: Path) -> bool:
    """Return True if the folder contains an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def _adapter_files(folder: Path) -> list[Path]:
    """Return the files of an adapter, without links to other folders."""
    files = [file for pattern in ("*", "*/config.json") for file in sorted(folder.glob(pattern))]
    return [
        file
        for file in files
        if file.suffix in ADAPTER_SUFFIXES and file.name not in (RUN, LEARNING_RATES)
        if file.is_file() and file.resolve() == file
    ]


def score_range_text(run: Run) -> str:
    """Return the 95% confidence interval of the score, or ''."""
    return format_interval(str(mapping(run.result.get("score")).get("metric")), run.score_interval)


def score_rows(run: Run) -> str:
    """Return the numbers of correct and of held-out rows, or '' if they are unknown."""
    total = number(mapping(run.part("data").get("counts")).get("held_out"))
    if not total or run.score is None or run.score[0] not in ("accuracy", "exact_match"):
        return ""
    correct = run.score[1] * total
    return f"{correct:,.0f} of {total:,.0f} rows" if abs(correct - round(correct)) < 0.01 else ""


def _listed(run: Run) -> dict[str, str]:
    """Return the values of a run in the list by their titles."""
    count = number(mapping(run.part("data").get("counts")).get("rows_kept"))
    total = run.metrics.total("rows")
    rows = f"{count:,.0f} rows × {round(total / count, 2):g}" if count else f"{total:,.0f}"
    values = {"model": model_name(run.model), "training rows × passes": rows, "state": run.state}
    times = {"time": duration(run.seconds or None), "when": format_time(run.started, short=True)}
    return {**values, **times, "score": _score(run)}


def _score(run: Run) -> str:
    """Return the main metric with its value and interval, or ''."""
    if run.score is None:
        return ""
    text = f"{metric_name(run.score[0])} {metric_value(*run.score)}"
    interval = score_range_text(run)
    return f"{text} ({interval})" if interval else text


def _origins(start: Mapping[str, Any], depth: int) -> list[Origin]:
    """Return the adapters that a run started from."""
    adapters = [mapping(adapter) for adapter in sequence(start.get("adapters"))[:_MAX_ORIGINS] if depth]
    return [
        (f"{str(a.get('name'))[:200]} ({str(a.get('task'))[:200]})", _origins(mapping(a.get("start")), depth - 1))
        for a in adapters
    ]
