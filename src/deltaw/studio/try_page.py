"""Page on which a run is tried: a proxy of the process that serves it, and scores and predictions of a file."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from deltaw.data.compressed_files import COMPRESSED
from deltaw.data.file_signatures import check_content
from deltaw.data.row_files import TYPED, kind_of
from deltaw.errors import UserError
from deltaw.runs.folder import Run
from deltaw.serving.http.settings import NAME
from deltaw.studio.rendering import form, page, part
from deltaw.studio.runs import all_runs, can_serve, export_path, has_adapter, run_of
from deltaw.studio.spreadsheets import convert
from deltaw.studio.state import Studio
from deltaw.studio.trial import FAILED, STARTING, STOPPED, TrialServer
from deltaw.studio.workspace import SPREADSHEETS, Workspace

PAGE = "/trial/page/"
CONNECT_SECONDS = 5.0
# Maximum number of runs that are offered for a comparison, and bytes of a file that show its type.
MAX_OTHERS = 5
PEEK_BYTES = 4096
# Headers that pass the proxy.
_REQUEST_HEADERS = ("accept", "content-type", "content-length", "if-none-match")
_RESPONSE_HEADERS = ("content-type", "content-length", "etag", "cache-control", "retry-after")


def router(studio: Studio) -> APIRouter:
    """Return the routes of the page of trials, of the proxy, and of scores."""
    routes = APIRouter()
    workspace = studio.workspace
    trial = studio.trial
    studio.queue.on_start.append(lambda job: trial.stop_if_idle())

    def view(run: Run) -> dict[str, object]:
        """Return the variables of the part with the model."""
        state = trial.state if trial.run == run.path else STOPPED
        values = {"run": run, "path": workspace.relative(run.path), "state": state, "busy": studio.queue.busy()}
        others = [(workspace.relative(other.path), other.name) for other in _others(workspace, run)]
        return values | {"error": workspace.shorten(trial.error) if state == FAILED else None, "others": others}

    @routes.get("/runs/try/{path:path}")
    def show(request: Request, path: str) -> Response:
        run = run_of(workspace, path)
        files = [("", "choose a file")]
        trained = run.setting("data.train")
        for file in filter(_may_contain_rows, workspace.data_files()):
            name = workspace.relative(file)
            files.append((name, f"{name} (used for training)" if str(file) == trained else name))
        values: dict[str, Any] = {"path": workspace.relative(run.path), "can_serve": can_serve(run)}
        return page(request, "trial.html", files=files, run=run, workspace=workspace, **values)

    @routes.put("/trial/files/{name}")
    async def upload(request: Request, name: str) -> Response:
        size = request.headers.get("content-length")
        file = await workspace.save_upload(name, request.stream(), None if size is None else int(size))
        rows = await asyncio.to_thread(convert, workspace, file, is_upload=True)
        return JSONResponse({"file": workspace.relative(file), "note": rows.note})

    @routes.get("/trial/part")
    def show_part(run: str) -> Response:
        values = view(run_of(workspace, run))
        return part("trial_part.html", status=202 if values["state"] == STARTING else 200, **values)

    @routes.post("/trial/start")
    async def start(request: Request) -> Response:
        fields = await form(request)
        run = run_of(workspace, fields.get("run", [""])[0])
        if not has_adapter(run.path):
            raise UserError("this run has no result yet", hint="continue its training first")
        others = [run_of(workspace, text).path for text in fields.get("other", [])[:MAX_OTHERS]]
        await asyncio.to_thread(trial.start, run.path, others)
        return RedirectResponse(f"/runs/try/{quote(workspace.relative(run.path))}", 303)

    @routes.post("/trial/stop")
    async def stop(request: Request) -> Response:
        run = (await form(request)).get("run", [""])[0]
        await asyncio.to_thread(trial.stop)
        return RedirectResponse(f"/runs/of/{quote(run)}", 303)

    @routes.api_route(PAGE + "{rest:path}", methods=["GET", "POST"])
    async def forward(request: Request) -> Response:
        return await _forward(request, trial)

    @routes.post("/runs/score")
    async def score(request: Request) -> Response:
        fields = {name: values[0] for name, values in (await form(request)).items()}
        run = run_of(workspace, fields.get("run", "")).path
        chosen = workspace.path(fields.get("file", ""), location="file")
        file = (await asyncio.to_thread(convert, workspace, chosen)).file
        verb = fields.get("verb", "")
        output = None
        if verb == "eval":
            title = f"Score {run.name} on {chosen.name}"
            arguments = [verb, str(run), f"--data={file}", "--with-base", "--no-drift"]
        elif verb == "predict":
            output = export_path(studio, f"{run.name}-predictions.csv")
            title = f"Predict {chosen.name} with {run.name}"
            arguments = [verb, str(run), str(file), f"--output={output}"]
        else:
            raise UserError(f"'{verb[:200]}' is not possible", location="verb", hint="choose eval or predict")
        job = studio.queue.add(verb, [*arguments, "--json"], title=title, run=run, output=output)
        return RedirectResponse(f"/jobs/{job.identity}", 303)

    return routes


def _may_contain_rows(file: Path) -> bool:
    """Return False if a file is empty, or if its first bytes are those of another type than its name."""
    try:
        with file.open("rb") as opened:
            beginning = opened.read(PEEK_BYTES)
        if file.suffix.lower() not in (*COMPRESSED, *SPREADSHEETS) and kind_of(file) not in TYPED:
            check_content(beginning, file)
    except (OSError, UserError):
        return False
    return bool(beginning.strip())


def _others(workspace: Workspace, run: Run) -> list[Run]:
    """Return runs of the same model, which can be compared with a run that generates text. The last ones are first."""
    runs = [other for other in all_runs(workspace) if other.path != run.path and NAME.fullmatch(other.path.name)]
    runs = [other for other in runs if other.model == run.model and other.generates_text and has_adapter(other.path)]
    return sorted(runs, key=lambda other: other.started, reverse=True)[:MAX_OTHERS] if run.generates_text else []


async def _forward(request: Request, trial: TrialServer) -> Response:
    """Send a request to the process of a trial, with its key, and stream the response."""
    base = trial.url
    if not base:
        return JSONResponse({"error": {"message": "The model is not loaded. Load it again."}}, 503)
    path = request.scope["raw_path"].removeprefix(PAGE[:-1].encode())
    url = httpx.URL(base).copy_with(raw_path=path)
    headers = {name: request.headers[name] for name in _REQUEST_HEADERS if name in request.headers}
    headers |= {"Authorization": f"Bearer {trial.key}", "Accept-Encoding": "identity"}
    body = request.stream() if request.method == "POST" else None
    # Without the environment, because a proxy must not receive the key.
    client = httpx.AsyncClient(trust_env=False, verify=False, timeout=httpx.Timeout(None, connect=CONNECT_SECONDS))
    try:
        sent = client.build_request(request.method, url, headers=headers, content=body)
        response = await client.send(sent, stream=True)
    except httpx.HTTPError:
        await client.aclose()
        return JSONResponse({"error": {"message": "The model stopped. Load it again."}}, 502)
    except BaseException:
        await client.aclose()
        raise

    async def chunks() -> AsyncIterator[bytes]:
        try:
            async for chunk in response.aiter_raw():
                trial.last_used = time.monotonic()
                yield chunk
        except httpx.HTTPError:
            pass  # the page notices that the answer is not complete
        finally:
            await response.aclose()
            await client.aclose()

    kept = {name: response.headers[name] for name in _RESPONSE_HEADERS if name in response.headers}
    policy = response.headers.get("content-security-policy", "default-src 'none'")
    kept |= {"Content-Security-Policy": policy.replace("frame-ancestors 'none'", "frame-ancestors 'self'")}
    return StreamingResponse(chunks(), response.status_code, {**kept, "X-Frame-Options": "SAMEORIGIN"})
