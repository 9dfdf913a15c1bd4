"""Page of the model: local models, license, memory and time. Start of a training run."""

from __future__ import annotations

import asyncio
import itertools
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

from deltaw import platforms
from deltaw.data.starter import default_model
from deltaw.errors import UserError
from deltaw.hub.local_models import IMAGES, READS, WRITES, ModelInfo, describe_model, list_local_models
from deltaw.machine.memory import free_memory_bytes
from deltaw.memory.plan import Plan
from deltaw.reports.memory_parts import memory_legend, memory_parts
from deltaw.reports.plan import process_parts
from deltaw.reports.svg import Bar, Figure, FigureTable, bars, stack
from deltaw.reports.tables import gigabytes
from deltaw.settings import task_registry
from deltaw.settings.config import RunConfig
from deltaw.studio.rendering import error_part, form, model_name, page, part, wants_json
from deltaw.studio.state import Studio
from deltaw.studio.worker import Pending
from deltaw.studio.workspace import RUNS, Draft
from deltaw.training.planning.plan_cache import load_cached_plans

# Uses of the models that a task can train, by auto class. Other tasks need a model that reads text.
_USES = {"AutoModelForCausalLM": (WRITES,), "AutoModelForImageClassification": (IMAGES,)}


def router(studio: Studio) -> APIRouter:
    """Return the routes of the page of the model, of the plan, and of the start of a training run."""
    routes = APIRouter(prefix="/drafts/{identity}")
    workspace = studio.workspace
    routes.include_router(_plan_router(studio))
    routes.include_router(_start_router(studio))

    def show_models(request: Request, draft: Draft, error: UserError | None, text: str) -> Response:
        models = list_local_models(workspace.folder)
        default = default_model(draft.settings.get("task"))
        selected = draft.settings.get("model") or default
        for reference in (selected, default):
            if reference and reference not in {model.reference for model in models}:
                models.insert(0, ModelInfo(reference, model_name(reference), "hub", None, "unknown", is_local=False))
        models.sort(key=lambda model: (model.reference != default, not model.is_local))
        task = draft.settings.get("task") or task_registry.default_task()
        values = {"models": models, "default": default, "selected": selected, "error": error, "text": text}
        values["mismatches"] = {model.reference: mismatch(model, task) for model in models}
        return page(request, "model.html", status=400 if error else 200, draft=draft, **values)

    @routes.get("/model")
    def show(request: Request, identity: str) -> Response:
        draft = workspace.draft(identity)
        is_read = draft.preview is not None or draft.settings.get("model")
        if not draft.settings.get("task") or not is_read:  # the page of the rows reads them after a change
            return RedirectResponse(f"/drafts/{identity}/data", 303)
        return show_models(request, draft, None, "")

    @routes.post("/model")
    async def choose(request: Request, identity: str) -> Response:
        draft = workspace.draft(identity)
        text = (await form(request)).get("model", [""])[0].strip()
        settings = draft.settings
        try:
            if not text:
                raise UserError("the model is missing", location="model")
            references = {model.name: model.reference for model in list_local_models(workspace.folder)}
            draft.set("model", references.get(text, text))
            workspace.config(draft)
        except UserError as error:
            if wants_json(request):
                raise
            return show_models(request, Draft(draft.path, settings, draft.preview), error, text)
        draft.preview = None  # lengths depend on the model
        draft.save()
        return JSONResponse({}) if wants_json(request) else RedirectResponse(f"/drafts/{identity}/model", 303)

    return routes


def _plan_router(studio: Studio) -> APIRouter:
    routes = APIRouter()
    workspace = studio.workspace
    queue = studio.queue

    @routes.get("/part/plan")
    def show_plan(identity: str) -> Response:
        draft = workspace.draft(identity)
        values: dict[str, Any] = {"draft": draft, "busy": queue.busy(), "model": None, "seconds": None, "plan": None}
        values["download"] = download(identity)
        try:
            config = workspace.config(draft) | {"output": str(workspace.folder / RUNS / "new")}
            if not values["download"]:
                values["model"] = require_suitable(config)
            if values["download"] or not values["model"].is_local:
                return part("model_plan.html", status=202 if values["download"] else 200, **values)
            free = free_memory_bytes()
            cached = load_cached_plans(RunConfig.read(config), [config["method"]])
            plan = None if cached is None else cached.plans[config["method"]]
            result: Pending | Mapping[str, Any] = {"plan": {}, "fitting": []}
            if plan is None or plan.peak_resident_bytes > free:
                result = studio.worker.result("plan", {"config": config}, draft=identity)
                if isinstance(result, Pending):
                    return part("model_plan.html", status=202, **values | {"seconds": result.seconds})
                plan = Plan.from_fields(result["plan"])
        except UserError as error:
            return error_part(workspace.shorten(error))
        assert not isinstance(result, Pending)
        free = result.get("free", free)
        values |= {"plan": plan, "free": free, "figure": plan_figure(plan, free), "fitting": result["fitting"][:3]}
        return part("model_plan.html", **values)

    def download(identity: str) -> object:
        """Return the job that downloads the model of a draft, or None."""
        return next((job for job in queue.active() if (job.verb, job.draft) == ("plan", identity)), None)

    @routes.post("/download")
    def start_download(identity: str) -> Response:
        draft = workspace.draft(identity)
        config = workspace.config(draft)
        title = f"Download {draft.settings.get('model')}"
        if not download(identity):
            queue.add(
                "plan", ["plan", "--methods", config["method"], "--json"], title=title, settings=config, draft=identity
            )
        return RedirectResponse(f"/drafts/{identity}/model", 303)

    return routes


def _start_router(studio: Studio) -> APIRouter:
    routes = APIRouter()
    workspace = studio.workspace
    queue = studio.queue

    @routes.post("/start")
    async def start(request: Request, identity: str) -> Response:
        draft = workspace.draft(identity)
        name = (await form(request)).get("name", [""])[0].strip()
        name = run_name(name)
        platforms.reject_reserved_names(name)
        config = workspace.config(draft)
        try:
            await asyncio.to_thread(require_suitable, config)
        except UserError:  # the page of the model shows the error
            return RedirectResponse(f"/drafts/{identity}/model", 303)
        # Without an await from here on, so that simultaneous requests see each other's jobs.
        active = queue.active()
        for job in active:
            if (job.verb, job.draft) == ("train", identity) and job.created > draft.changed:  # pressed twice
                return RedirectResponse(f"/jobs/{job.identity}", 303)
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        paths = (workspace.folder / RUNS / name for name in names)
        taken = {job.run for job in active}
        path = next(path for path in paths if not path.exists() and workspace.relative(path) not in taken)
        settings = config | {"output": str(path)}
        job = queue.add("train", ["train", "--json"], title=path.name, run=path, settings=settings, draft=identity)
        return RedirectResponse(f"/jobs/{job.identity}", 303)

    return routes


def require_suitable(config: Mapping[str, Any]) -> ModelInfo:
    """Return the model of complete settings.

    Raises:
        UserError: if it does not exist, or cannot be trained for the task.
    """
    model = describe_model(config["model"])
    if reason := mismatch(model, config["task"]):
        raise UserError(reason, location=model.name, hint="choose another model")
    return model


def mismatch(model: ModelInfo, task: str) -> str:
    """Return the reason why a model cannot be trained for a task, or ''."""
    uses = _USES.get(task_registry.entry_of(task).auto_model, (READS, WRITES))
    return "" if model.use in ("", *uses) else f"this model {model.use}, and the goal needs one that {uses[0]}"


def run_name(text: str) -> str:
    """Return the name of a run, which is also valid as the name of a model in requests to a server."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._]+", "-", ascii_text).strip("-._")[:80] or "run"


def plan_figure(plan: Plan, free: int) -> Figure:
    """Return a bar of the memory by part, and a bar of the free memory."""
    parts = memory_parts(process_parts(plan))
    title = "Memory that the training needs, and memory that is free"
    items = [
        Bar("needed at the peak", gigabytes(plan.peak_resident_bytes), stack(parts)),
        Bar("free now", gigabytes(free), [("ink", "free now", 0.0, float(free))]),
    ]
    text = f"{gigabytes(plan.peak_resident_bytes)} needed at the peak, {gigabytes(free)} free on this computer now"
    rows = [(label, gigabytes(int(size))) for _, label, size in parts]
    table = FigureTable("Memory by part", ("part", "size"), rows)
    return Figure(
        "plan-memory", title, text + ".", bars("plan-memory", title, text, items), table, memory_legend(items)
    )
