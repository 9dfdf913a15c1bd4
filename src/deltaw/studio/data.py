"""Page of the rows: task, columns, findings, plots and tokens."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from deltaw.data.class_names import count_classes, merged_classes, similar_names
from deltaw.data.row_stream import UnreadableRow
from deltaw.data.sources import open_source
from deltaw.errors import UserError
from deltaw.reports.svg import Bar, Figure, FigureTable, bars, histogram
from deltaw.runs.folder import mapping
from deltaw.settings import task_registry
from deltaw.settings.columns import mapped_columns
from deltaw.settings.config import merge_settings
from deltaw.studio.rendering import error_part, form, page, part, wants_json
from deltaw.studio.spreadsheets import convert
from deltaw.studio.state import Studio
from deltaw.studio.worker import Pending
from deltaw.studio.workspace import Draft

# Rows of a page of the table, rows that can be shown, and characters of a cell.
PAGE_ROWS = 25
MAX_ROWS = 1000
MAX_CELL = 300
# Bars of a chart.
MAX_BARS = 20
# Location of a row in a file and a remark.
_ROW = re.compile(r"(?:row|line) (\d+)(?: \(line \d+\))?(?:: (.*))?")
# Content of standard columns, for sentences.
CONTENTS = {"text": "texts", "label": "classes", "prompt": "prompts", "completion": "answers", "ideal": "answers"}
CONTENTS |= {"messages": "conversations", "conversations": "conversations", "instruction": "instructions"}
CONTENTS |= {"output": "answers", "input": "inputs", "chosen": "better answers", "rejected": "worse answers"}
CONTENTS |= {"anchor": "queries", "positive": "matching passages", "score": "scores", "image": "images"}


def router(studio: Studio) -> APIRouter:
    """Return the routes of the page of the rows."""
    routes = APIRouter(prefix="/drafts/{identity}")
    workspace = studio.workspace
    worker = studio.worker

    @routes.get("/data")
    def show(request: Request, identity: str) -> Response:
        first = _number(request, "from", 1)
        row = _number(request, "row", 0)
        draft = workspace.draft(identity)
        sheets = [(name, name) for name in draft.sheets]
        return page(request, "data.html", draft=draft, sheets=sheets, first=first, row=row)

    @routes.post("/data")
    async def choose(request: Request, identity: str) -> Response:
        draft = workspace.draft(identity)
        fields = await form(request)
        task = fields.get("task", [""])[0]
        if task not in task_registry.names():
            raise UserError("there is no such task", location="task", hint="choose one of the list")
        settings: dict[str, Any] = {"task": task, "data": {"train": draft.rows}}
        names = {name.removeprefix("columns."): values[0] for name, values in fields.items()}
        groups = [group[0] for kind in task_registry.entry_of(task).row_kinds for group in kind.required]
        chosen = {standard: names[standard] for standard in groups if names.get(standard)}
        if chosen and task == draft.settings.get(
            "task", task_registry.default_task()
        ):  # columns of another task are inferred
            settings["data"]["columns"] = {name: column for name, column in chosen.items() if name != column}
        draft.settings = settings
        draft.preview = None
        draft.save()
        return JSONResponse({}) if wants_json(request) else RedirectResponse(f"/drafts/{identity}/data", 303)

    @routes.post("/sheet")
    async def choose_sheet(request: Request, identity: str) -> Response:
        draft = workspace.draft(identity)
        sheet = (await form(request)).get("sheet", [""])[0]
        file = workspace.path(draft.name, location="file")
        rows = await asyncio.to_thread(convert, workspace, file, sheet=sheet)
        draft.settings = {"data": {"train": workspace.relative(rows.file)}}
        draft.preview = None
        draft.note = rows.note
        draft.sheet = rows.sheet
        draft.sheets = rows.sheets
        draft.save()
        return RedirectResponse(f"/drafts/{identity}/data", 303)

    @routes.post("/classes")
    async def merge_classes(request: Request, identity: str) -> Response:
        draft = workspace.draft(identity)
        labels = (await form(request)).get("label", [])
        chosen = {label: name for label, name, _, _ in _merges(draft) if label in labels}
        merged = {label: chosen.get(name, name) for label, name in _merged(draft).items()}
        draft.set("data.classes", {**merged, **chosen} if chosen else None)
        draft.save()
        return RedirectResponse(f"/drafts/{identity}/data", 303)

    @routes.get("/part/check")
    def check(identity: str) -> Response:
        draft = workspace.draft(identity)
        return _check(studio, draft, str(workspace.path(draft.rows, location="file")))

    @routes.get("/part/rows")
    def rows(request: Request, identity: str) -> Response:
        draft = workspace.draft(identity)
        first = _number(request, "from", 1)
        try:
            columns, shown, total = _read(str(workspace.path(draft.rows, location="file")), first)
        except UserError:
            return HTMLResponse("")  # the check shows the error
        pages = {"first": first, "total": total, "step": PAGE_ROWS, "max_rows": MAX_ROWS}
        return part("data_rows.html", draft=draft, columns=columns, rows=shown, **pages)

    @routes.get("/part/tokens")
    def tokens(request: Request, identity: str) -> Response:
        draft = workspace.draft(identity)
        row = _number(request, "row", 1)
        try:
            result = worker.result(
                "rows", {"config": workspace.config(draft), "first": row, "count": 1}, draft=identity
            )
        except UserError as error:
            return error_part(workspace.shorten(error))
        if isinstance(result, Pending):
            return part("data_tokens.html", status=202, row=row, pending=result)
        return part("data_tokens.html", row=row, pending=None, result=next(iter(result.get("rows", [])), None))

    return routes


def _check(studio: Studio, draft: Draft, file: str) -> Response:
    """Return the summary and the findings of a file, as far as they are known."""
    checked = None
    error = None
    pending = None
    try:
        if draft.preview is None:
            columns = draft.settings["data"].get("columns")
            given = {"model": draft.settings.get("model"), "task": draft.settings.get("task"), "columns": columns}
            result = studio.worker.result("preview", {"file": file, **given}, draft=draft.identity)
            if isinstance(result, Pending):
                return part("data_check.html", status=202, draft=None, pending=result)
            found = result["settings"]
            lengths = {key: found["data"][key] for key in ("max_length", "long_rows") if key in found["data"]}
            draft.settings = merge_settings(merge_settings(found, draft.settings), {"data": lengths})
            draft.preview = result["preview"]
            draft.save()
        if draft.settings.get("model"):
            checked = studio.worker.result("check", {"config": studio.workspace.config(draft)}, draft=draft.identity)
    except UserError as raised:
        error = studio.workspace.shorten(raised)
    if isinstance(checked, Pending):
        pending = checked
        checked = None
    preview = draft.preview or {}
    columns = preview.get("columns", [])
    with contextlib.suppress(UserError):
        columns = columns or _read(file, 1)[0]
    if error and not columns:
        return part("error_part.html", error=error, is_file=True)
    if error and not preview:
        error = UserError(error.message, hint="choose the goal and its columns below, or another file")
    task = draft.settings.get("task") or task_registry.default_task()
    entries = [task_registry.entry_of(name) for name in task_registry.names()]
    values: dict[str, object] = {"draft": draft, "pending": pending, "error": error, "checked": checked, "task": task}
    values |= {"goals": {entry.name: entry.goal or entry.capability for entry in entries}, "contents": CONTENTS}
    dropped = _num_dropped(draft, checked or {})
    values |= {"usable": preview.get("rows", 0) - dropped, "dropped": dropped}
    values |= {"preview": preview, "columns": [(column, column) for column in columns]}
    values |= {"classes": sorted(_class_counts(draft)), "merges": _merges(draft), "merged": _merged(draft)}
    values |= {"roles": _roles(task, columns, draft.settings["data"].get("columns") or {})}
    values |= {"figures": _figures(checked or preview), "numbers": functools.partial(_numbers, file)}
    return part("data_check.html", status=202 if pending else 200, **values)


def _merged(draft: Draft) -> dict[str, str]:
    """Return the classes of labels that the draft merges."""
    return dict(mapping(draft.settings["data"].get("classes")))


def _class_counts(draft: Draft) -> dict[str, int]:
    """Return the number of rows of each class after merging."""
    return count_classes((draft.preview or {}).get("class_counts", {}), _merged(draft))


def _merges(draft: Draft) -> list[tuple[str, str, int, bool]]:
    """Return label, proposed class, number of rows, and True if the names are almost equal, of labels to merge."""
    counts = _class_counts(draft)
    equal = merged_classes(counts)
    proposed = {**equal, **similar_names(counts)}
    return [(label, name, counts[label], label in equal) for label, name in proposed.items()]


def _number(request: Request, name: str, default: int) -> int:
    """Return a positive number of the address, or the default if it is missing or malformed."""
    text = request.query_params.get(name, "")
    return max(1, int(text)) if text.isascii() and text.isdigit() and len(text) < 10 else default


def _num_dropped(draft: Draft, checked: Mapping[str, Any]) -> int:
    """Return the number of rows that training drops as duplicates, or 0 if a row may give several examples."""
    if draft.settings["data"].get("duplicates", "drop") != "drop" or checked.get("examples", 1) > checked.get(
        "rows", 0
    ):
        return 0
    return sum(finding["count"] for finding in checked["findings"] if finding["name"] == "duplicates")


def _roles(task: str, columns: Sequence[str], mapped: Mapping[str, str]) -> dict[str, str]:
    """Return the column of the file for each column that the task requires, or '' if it is unknown."""
    kinds = task_registry.entry_of(task).row_kinds
    names = mapped_columns(columns, mapped)
    usual = [kind for kind in kinds if len(kind.required) == min(2, len(columns))]
    kind = next((kind for kind in kinds if kind.fits(names)), [*usual, *kinds][0])
    used = {group[0]: next((name for name in group if name in names), "") for group in kind.required}
    return {standard: mapped.get(name, name) for standard, name in used.items()}


def _numbers(file: str, locations: Sequence[str]) -> str:
    """Return the locations of rows of a file, shortened to their numbers if they have the same remark."""
    texts = [location.removeprefix(f"{file}, ").replace(file, "the file") for location in locations]
    matches = [match for text in texts if (match := _ROW.fullmatch(text))]
    if len(matches) < len(texts) or len({match[2] for match in matches}) != 1:
        return "; ".join(texts)
    return f"row{'s' * (len(matches) > 1)} {', '.join(match[1] for match in matches)}"


def _figures(result: Mapping[str, Any]) -> list[Figure]:
    """Return the plots of a check, or of a preview if the rows are not checked."""
    figures = []
    lengths = result.get("lengths")
    counts = result.get("class_counts")
    if lengths:
        bins = [(item["from"], item["to"], item["examples"]) for item in lengths["bins"]]
        title = "Length of the rows"
        text = f"Half of the rows have at most {lengths['median']:,} tokens, the longest has {lengths['longest']:,}."
        edges = [*(low for low, _, _ in bins), bins[-1][1] + 1]
        drawing = histogram("lengths", title, text, edges, [number for _, _, number in bins])
        cells = [(f"{low:,} – {high:,}", f"{number:,}") for low, high, number in bins]
        figures.append(Figure("lengths", title, text, drawing, FigureTable(title, ("tokens", "rows"), cells)))
    if counts:
        title = "Rows of each class"
        text = "Classes with few rows are learned less well."
        cells = [(name, f"{number:,}") for name, number in sorted(counts.items(), key=lambda item: -item[1])]
        items = [Bar(name, number, [("p1", name, 0, counts[name])]) for name, number in cells[:MAX_BARS]]
        table = FigureTable(title, ("class", "rows"), cells)
        figures.append(Figure("classes", title, text, bars("classes", title, text, items), table))
    return figures


def _read(file: str, first: int) -> tuple[list[str], list[tuple[int, list[str], str]], int]:
    """Return the columns of a file, a page of its rows, and the number of rows that can be shown.

    Args:
        first: Position of the first row of the page, from 1.

    Returns:
        Columns; number, cells and error of each row; number of rows, at most ``MAX_ROWS``.
    """
    columns: dict[str, None] = {}
    rows: list[tuple[int, Mapping[str, object]]] = []
    total = 0
    for total, (number, row, _) in enumerate(open_source(file).head(MAX_ROWS), start=1):
        columns |= dict.fromkeys(row)
        if first <= total < first + PAGE_ROWS:
            rows.append((number, row))
    errors = [row.error.message if isinstance(row, UnreadableRow) else "" for _, row in rows]
    cells = [(number, [short_cell(row.get(name)) for name in columns]) for number, row in rows]
    return list(columns), [(*row, error) for row, error in zip(cells, errors, strict=True)], total


def short_cell(value: object) -> str:
    """Return a value of a row as a text that fits into a table."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "content" in item for item in value):
        value = "\n".join(f"{item.get('role', '')}: {item['content']}" for item in value)  # a conversation
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]}…"
