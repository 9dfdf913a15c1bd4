"""Pages of the jobs: the queue, and the progress of one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from deltaw.data.sources import open_source
from deltaw.errors import UserError
from deltaw.reports.live_line import LiveLine
from deltaw.reports.live_table import live_line
from deltaw.reports.page.run_figures import loss_figure, memory_figure, metric_figures, reward_figure
from deltaw.reports.svg import running_mean
from deltaw.reports.tables import duration, format_interval, gigabytes, metric_name, metric_value, short
from deltaw.runs.folder import CHECKPOINT_FOLDER, KILLED, RUNNING, Run, mapping, number, numbers, sequence
from deltaw.studio.data import short_cell
from deltaw.studio.jobs import DONE, QUEUED, StudioJob, read_error
from deltaw.studio.rendering import form, page, part
from deltaw.studio.runs import score_range_text, score_rows
from deltaw.studio.state import Studio

# Limits of a page: sample answers, predicted rows, values of a result, characters of a text, and classes.
MAX_SAMPLES = 6
MAX_PREDICTIONS = 10
MAX_VALUES = 40
MAX_CHARACTERS = 2000
MAX_CLASSES = 12
# Values of the results of commands, in words.
RESULTS = {"rows": "rows in the file", "predicted": "rows with a prediction", "seconds": "time", "size": "size"}
RESULTS |= {"program": "program", "name": "name in the program", "place": "location", "kind": "storage type"}
# Progress is cached for this multiple of the CPU time that was needed to read it.
IDLE_FACTOR = 20


def router(studio: Studio) -> APIRouter:
    """Return the routes of the pages of the jobs."""
    routes = APIRouter(prefix="/jobs")
    queue = studio.queue
    workspace = studio.workspace
    views: dict[str, tuple[float, float, object, dict[str, Any]]] = {}
    queue.on_start.append(lambda job: studio.worker.release())

    def view(job: StudioJob) -> dict[str, Any]:
        """Return the variables of the progress, which are computed more rarely if the run is long."""
        started = time.monotonic()
        cpu = time.thread_time()
        state = (job.state, job.stops)
        updated, seconds, last_state, values = views.get(job.identity, (0.0, 0.0, None, {}))
        if last_state != state or started - updated > IDLE_FACTOR * seconds:
            run = None if job.run is None else Run(workspace.folder / job.run)
            values = {**job_view(job, run), "has_checkpoint": run is not None and has_checkpoint(run)}
            values["error"] = values["error"] and workspace.shorten(values["error"])
            if job.is_active and values["percent"] is not None:
                values["announcement"] = f"{values['title']}: {values['percent'] // 10 * 10}%"
            views[job.identity] = time.monotonic(), time.thread_time() - cpu, state, values
        if job.verb == "predict" and job.state == DONE and job.output is not None and values["preview"] is None:
            values["preview"] = output_preview(workspace.folder / job.output)
        files = [argument.removeprefix("--data=") for argument in job.arguments if argument.startswith("--data=")]
        values["scored_file"] = workspace.relative(files[0]) if files else None
        others = [other for other in queue.active() if other is not job]
        values |= {"job": job, "others": others, "note": job_note(job, values["line"], others)}
        is_file = job.output is not None and (workspace.folder / job.output).is_file()
        has_run = job.run is not None and (workspace.folder / job.run).is_dir()
        return {**values, "problem": queue.problem, "is_file": is_file, "has_run": has_run}

    def with_count(response: Response) -> Response:
        """Add the number of jobs in the navigation to a part."""
        response.headers["X-Jobs"] = str(len(queue.active()))
        return response

    @routes.get("")
    def show_all(request: Request) -> Response:
        return page(request, "jobs.html", jobs=queue.jobs(), problem=queue.problem)

    @routes.get("/part/queue")
    def show_queue() -> Response:
        return with_count(part("jobs_queue.html", jobs=queue.jobs(), problem=queue.problem))

    @routes.get("/{identity}")
    def show(request: Request, identity: str) -> Response:
        job = queue.job(identity)
        drafts = [draft for draft in workspace.drafts() if draft.identity == job.draft]
        return page(request, "job.html", draft=next(iter(drafts), None), **view(job))

    @routes.get("/{identity}/part/live")
    def show_live(identity: str) -> Response:
        job = queue.job(identity)
        response = with_count(part("job_live.html", **view(job)))
        if not job.is_active:
            response.headers["X-Done"] = "1"
        return response

    @routes.post("/{identity}/{action}")
    async def act(request: Request, identity: str, action: str) -> Response:
        fields = await form(request)
        actions = {"resume": queue.resume, "remove": queue.remove, "first": queue.first}
        if action == "stop":
            queue.stop(identity, at_once="at_once" in fields)
        elif action in actions:
            job = queue.job(identity)
            actions[action](identity)
            drafts = {other.draft for other in queue.jobs() if other.verb == "train"}
            if action == "remove" and job.run and job.draft not in drafts and (workspace.folder / job.run).exists():
                with contextlib.suppress(UserError):  # deleted by the user
                    workspace.draft(str(job.draft)).path.unlink()
        else:
            raise UserError("this page does not exist", hint="go to the list of jobs")
        is_listed = action == "remove" or "list" in fields
        return RedirectResponse("/jobs" if is_listed else f"/jobs/{identity}", 303)

    return routes


def has_checkpoint(run: Run) -> bool:
    """Return True if a run can be continued from a later step than the first."""
    folder = run.path / CHECKPOINT_FOLDER
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def job_note(job: StudioJob, line: LiveLine | None, others: Sequence[StudioJob]) -> str:
    """Return the start time or the number of steps of a job in words."""
    if job.state == QUEUED:
        return f"Starts when {others[0].title} is finished" if others and others[0].state == RUNNING else "Starts soon"
    if line is None:
        texts = ("This takes a moment.", "The state is saved first.")
        return texts[bool(job.stops)] if job.state == RUNNING else ""
    if job.state != RUNNING:
        return f"{line.step:,} steps" if line.step == line.total else f"{line.step:,} of {line.total:,} steps"
    text = f"Step {line.step:,} of {line.total:,}"
    has_time = line.remaining_seconds is not None and not job.stops
    return f"{text}, about {duration(line.remaining_seconds)} left" if has_time else text


def job_view(job: StudioJob, run: Run | None) -> dict[str, Any]:
    """Return the variables of the progress of a job."""
    values: dict[str, Any] = {"title": job.state_text, "percent": None, "line": None, "error": None, "figures": []}
    values |= {"samples": [], "predictions": None, "values": [], "log": job.log, "announcement": job.state_text}
    values |= {"state": job.state, "can_resume": not job.is_active and job.state != "done"}
    values["scored_run"] = values["preview"] = None
    values["scores"] = scores(job.result) if job.verb == "eval" and job.result else None
    if values["scores"]:
        values["values"] = []
    elif job.verb != "train" or run is None:
        values["values"] = result_values(job.result or {})
    elif run.values and (job.state != RUNNING or run.state == RUNNING):
        line = live_line(run)
        progress = run.metrics.column(run.progress)[1]
        line.mean = float(running_mean(progress)[-1]) if len(progress) else None  # as in the text of the figure
        values |= {"line": line, "percent": int(100 * line.step / line.total) if line.total else 0}
        figures = [loss_figure(run), reward_figure(run), *metric_figures(run), memory_figure(run)]
        values["figures"] = [figure for figure in figures if figure is not None]
        values |= {"samples": samples(run), "predictions": predictions(run), "interval": score_range_text(run)}
        values["correct"] = score_rows(run)
        values["answers_every"] = run.setting("train.eval_every")
        values["scored_run"] = run if job.state == "done" and run.score else None
    elif job.state == RUNNING:
        values["title"] = "Stopping" if job.stops else "Preparing"
    if job.state == "failed":
        values["error"] = job_error(job, run)
        if run is not None and run.state == KILLED:
            values |= {"state": KILLED, "title": "Killed", "announcement": "Killed"}
    return values


def result_values(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the values that a command printed, in words. Values without a description are left out."""
    values = [(RESULTS[key], value) for key, value in result.items() if key in RESULTS]
    values += [(f"rows without a prediction: {reason}", n) for reason, n in mapping(result.get("errors")).items()]
    texts = {"time": lambda value: duration(number(value)), "size": lambda value: gigabytes(int(number(value) or 0))}
    default = lambda value: f"{value:,}" if isinstance(value, int) else str(value)  # noqa: E731
    visible = [(name, value) for name, value in values if isinstance(value, str | int | float)]
    return [(name, texts.get(name, default)(value)) for name, value in visible[:MAX_VALUES]]


def output_preview(file: Path) -> dict[str, Any] | None:
    """Return the first rows of a table of predictions, or None if it cannot be read."""
    try:
        rows = [row for _, row, _ in open_source(str(file)).head(MAX_PREDICTIONS + 1)]
    except (UserError, OSError):
        return None
    if not rows:
        return None
    columns = list(rows[0])
    cells = [[short_cell(row.get(column)) for column in columns] for row in rows[:MAX_PREDICTIONS]]
    return {"columns": columns, "rows": cells, "is_complete": len(rows) <= MAX_PREDICTIONS}


def job_error(job: StudioJob, run: Run | None) -> UserError:
    """Return the error of a job that failed."""
    if (error := read_error(job.log)) is not None:
        return error
    if job.verb == "train" and run is not None and has_checkpoint(run):
        hint = "close other programs if the memory was full, then continue from the last saved step"
    else:
        hint = "close other programs if the memory was full, then start it again"
    return UserError("the process ended without a message: it was killed, or the computer was switched off", hint=hint)


def scores(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of the metrics that an evaluation printed."""
    metrics, base, intervals = (mapping(result.get(key)) for key in ("eval", "base", "intervals"))
    main, before, difference = (mapping(result.get(key)) for key in ("score", "base_score", "difference"))
    intervals = {str(main.get("metric")): main.get("interval"), **intervals}

    def interval(name: str, values: object) -> str:
        return format_interval(name, numbers(sequence(values)))

    rows = [
        (metric_name(name), metric_value(name, number(base.get(name))), metric_value(name, number(value)), text)
        for name, value in metrics.items()
        for text in [interval(name, intervals.get(name))]
    ]
    name = str(main.get("metric", ""))
    classes = [str(label) for label in sequence(result.get("classes"))]
    counts = {
        (classes[i], classes[j]): (int(count), int(sum(row)))
        for i, row in enumerate(map(numbers, sequence(result.get("confusion")))) if i < len(classes)
        for j, count in enumerate(row) if count and j < len(classes)
    }  # fmt: skip
    return {
        "name": metric_name(name), "value": metric_value(name, number(main.get("value"))),
        "before": metric_value(name, number(before.get("value"))) if before else "",
        "interval": interval(name, intervals.get(name)), "difference": interval(name, difference.get("interval")),
        "num_rows": result.get("rows"), "has_base": bool(base), "rows": rows,
        "trained_rows": result.get("trained_rows") or 0,
        "confusion": {"classes": classes[:MAX_CLASSES], "counts": counts} if counts else None,
    }  # fmt: skip


def samples(run: Run) -> list[dict[str, Any]]:
    """Return prompts with the answers before training and now."""
    grouped: dict[tuple[int | None, str], dict[str, Any]] = {}
    for sample in sorted(run.metrics.samples, key=lambda sample: sample.step):
        entry = grouped.setdefault((sample.row, sample.prompt), {"before": None, "now": None})
        entry |= {
            "prompt": sample.prompt,
            "expected": sample.expected,
            "now" if sample.step else "before": sample.answer,
        }
    return [
        {name: None if text is None else text[:MAX_CHARACTERS] for name, text in entry.items()}
        for entry in list(grouped.values())[:MAX_SAMPLES]
    ]


def predictions(run: Run) -> dict[str, Any] | None:
    """Return predictions of held-out rows, wrong ones first, or None."""
    recorded: Mapping[str, Any] = mapping(next(iter(run.metrics.predictions.values()), None))
    rows = [mapping(row) for kind in ("mistakes", "examples") for row in sequence(recorded.get(kind))]
    visible = [
        {name: str(row.get(name, ""))[:MAX_CHARACTERS] for name in ("row", "text", "expected", "predicted")}
        | {"score": short(number(row.get("score")))}
        for row in rows[:MAX_PREDICTIONS]
    ]
    return {"rows": visible, "score": metric_name(str(recorded.get("score_name", "")))} if visible else None
