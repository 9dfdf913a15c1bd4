"""Page of the rows: task, columns, findings, plots and tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from deltaw.data.report import count_of
from deltaw.data.row_stream import UnreadableRow
from deltaw.data.sources import open_source
from deltaw.errors import UserError
from deltaw.reports.svg import Bar, Figure, FigureTable, bars, histogram
from deltaw.settings import task_registry
from deltaw.settings.columns import mapped_columns
from deltaw.settings.config import merge_settings
from deltaw.settings.row_kinds import RowKind
from deltaw.studio.rendering import error_part, form, page, part
from deltaw.studio.state import Studio
from deltaw.studio.worker import Pending

# Rows of a page of the table, rows that can be shown, and characters of a cell.
PAGE_ROWS, MAX_ROWS, MAX_CELL = 25, 1000, 300
# Bars of a chart, and findings that are shown as bars.
MAX_BARS = 20
COUNTED = ("bad_rows", "duplicates", "near_duplicates", "contradictions", "overlap", "prompt_overlap")
# Location of a row in a file and a remark.
_ROW = re.compile(r"(?:row|line) (\d+)(?: \(line \d+\))?(?:: (.*))?")
LEVELS = {"error": "Problem", "warning": "Warning", "note": "Note"}
# Content of standard columns, for sentences.
CONTENTS = {"text": "texts", "label": "classes", "prompt": "prompts", "completion": "answers", "ideal": "answers"}
CONTENTS |= {"messages": "conversations", "conversations": "conversations", "instruction": "instructions"}
CONTENTS |= {"output": "answers", "input": "inputs", "chosen": "better answers", "rejected": "worse answers"}
CONTENTS |= {"anchor": "queries", "positive": "matching passages", "score": "scores", "image": "images"}


def router(studio: Studio) -> APIRouter:
    """Return the routes of the page of the rows."""
    routes, workspace, worker = APIRouter(prefix="/drafts/{identity}"), studio.workspace, studio.worker

    @routes.get("/data")
    def show(request: Request, identity: str) -> Response:
        first, row = _number(request, "from", 1), _number(request, "row", 0)
        return page(request, "data.html", draft=workspace.draft(identity), first=first, row=row)

    @routes.post("/data")
    async def choose(request: Request, identity: str) -> Response:
        draft, fields = workspace.draft(identity), await form(request)
        task = fields.get("task", [""])[0]
        if task not in task_registry.names():
            raise UserError("there is no such task", location="task", hint="choose one of the list")
        settings: dict[str, Any] = {"task": task, "data": {"train": draft.rows}}
        names = {name.removeprefix("columns."): values[0] for name, values in fields.items()}
        chosen = {group[0]: names[group[0]] for kind in _kinds(task) for group in kind.required if names.get(group[0])}
        if task == draft.settings.get("task") and chosen:  # columns of another task are inferred
            settings["data"]["columns"] = {name: column for name, column in chosen.items() if name != column}
        draft.settings, draft.preview = settings, None
        draft.save()
        return RedirectResponse(f"/drafts/{identity}/data", 303)

    @routes.get("/part/check")
    def check(identity: str) -> Response:
        draft, checked, error, pending = workspace.draft(identity), None, None, None
        file = str(workspace.path(draft.rows, location="file"))
        task, mapped = draft.settings.get("task"), draft.settings["data"].get("columns")
        try:
            if draft.preview is None:
                given = {"model": draft.settings.get("model"), "task": task, "columns": mapped}
                result = worker.result("preview", {"file": file, **given})
                if isinstance(result, Pending):
                    return part("data_check.html", status=202, draft=None, pending=result)
                draft.preview, draft.settings = result["preview"], merge_settings(result["settings"], draft.settings)
                draft.save()
            if draft.settings.get("model"):
                checked = worker.result("check", {"config": workspace.config(draft)})
        except UserError as raised:
            error = raised
        if isinstance(checked, Pending):
            pending, checked = checked, None
        preview = draft.preview or {}
        try:
            columns = preview.get("columns") or _read(file, 1)[0]
        except UserError as raised:
            return error_part(raised)
        if error and not preview:
            error = UserError(error.message, hint="choose the goal and its columns below, or another file")
        task = draft.settings.get("task") or task_registry.default_task()
        roles = _roles(task, columns, draft.settings["data"].get("columns") or {})
        values = {"draft": draft, "pending": pending, "error": error, "checked": checked, "task": task}
        values |= {"goals": [(name, _goal(name)) for name in task_registry.names()], "roles": roles}
        values |= {"columns": [(column, column) for column in columns], "contents": CONTENTS, "levels": LEVELS}
        values |= {"sentences": _sentences(preview, roles), "findings": _findings(checked or {}, file)}
        return part("data_check.html", status=202 if pending else 200, figures=_figures(checked or preview), **values)

    @routes.get("/part/rows")
    def rows(request: Request, identity: str) -> Response:
        draft, first = workspace.draft(identity), _number(request, "from", 1)
        try:
            columns, shown, total = _read(str(workspace.path(draft.rows, location="file")), first)
        except UserError as error:
            return error_part(error)
        pages = {"first": first, "total": total, "step": PAGE_ROWS, "max_rows": MAX_ROWS}
        return part("data_rows.html", draft=draft, columns=columns, rows=shown, **pages)

    @routes.get("/part/tokens")
    def tokens(request: Request, identity: str) -> Response:
        draft, row = workspace.draft(identity), _number(request, "row", 1)
        try:
            result = worker.result("rows", {"config": workspace.config(draft), "first": row, "count": 1})
        except UserError as error:
            return error_part(error)
        if isinstance(result, Pending):
            return part("data_tokens.html", status=202, row=row, pending=result)
        return part("data_tokens.html", row=row, pending=None, result=result["rows"][0])

    return routes


def _number(request: Request, name: str, default: int) -> int:
    """Return a positive number of the address, or the default if it is missing or malformed."""
    text = request.query_params.get(name, "")
    return max(1, int(text)) if text.isascii() and text.isdigit() and len(text) < 10 else default


def _goal(task: str) -> str:
    entry = task_registry.entry_of(task)
    return entry.goal or entry.capability


def _kinds(task: str) -> Sequence[RowKind]:
    return task_registry.entry_of(task).row_kinds


def _roles(task: str, columns: Sequence[str], mapped: Mapping[str, str]) -> dict[str, str]:
    """Return the column of the file for each column that the task requires, or '' if it is unknown."""
    kinds, names = _kinds(task), mapped_columns(columns, mapped)
    usual = [kind for kind in kinds if len(kind.required) == min(2, len(columns))]
    kind = next((kind for kind in kinds if kind.fits(names)), [*usual, *kinds][0])
    used = {group[0]: next((name for name in group if name in names), "") for group in kind.required}
    return {standard: mapped.get(name, name) for standard, name in used.items()}


def _sentences(preview: Mapping[str, Any], roles: Mapping[str, str]) -> list[str]:
    """Return the summary of the rows."""
    if not preview:
        return []
    classes, rows = preview["classes"], count_of(preview["rows"])
    held = [f"'{column}' the {CONTENTS.get(name, name)}" for name, column in roles.items() if column]
    sentences = [f"{rows} can be used."]
    if held:
        sentences.append(f"The column {' and '.join(held).replace(' the', ' holds the', 1)}.")
    if classes:
        names = ", ".join(map(str, classes[:10])) + (", …" if len(classes) > 10 else "")
        sentences.append(f"There are {len(classes):,} classes: {names}.")
    if number := preview["bad_rows"]:
        listed = [match[1] for location, _ in preview["bad"] if (match := _ROW.match(location))]
        more = ", …" if len(listed) < number else ""
        sentences.append(f"{count_of(number)} cannot be used and will be left out: {', '.join(listed)}{more}.")
    if number := preview["unlabeled"]:
        sentences.append(f"{count_of(number)} without an answer or a class will be left out.")
    return sentences


def _findings(checked: Mapping[str, Any], file: str) -> list[dict[str, Any]]:
    """Return the findings of a check, with rows as named in the file."""
    findings = []
    for finding in checked.get("findings", ()):
        rows = [row.removeprefix(f"{file}, ").replace(file, "the file") for row in finding["rows"]]
        parts = [_ROW.fullmatch(row) for row in rows]
        if len({match and match[2] for match in parts}) == 1 and parts[0]:  # rows with the same remark
            rows = [f"Rows {', '.join(match[1] for match in parts if match)}"]
        text = finding["text"].replace("that cannot be used", "left out")
        text = text.replace("deltaw train refuses", "the training would not start")
        hint = "" if finding["hint"] == "they are skipped" else finding["hint"]
        more = finding["count"] - len(parts) if parts else 0
        findings.append({**finding, "text": text, "hint": hint, "rows": rows, "more": more})
    return findings


def _figures(result: Mapping[str, Any]) -> list[Figure]:
    """Return the plots of a check, or of a preview if the rows are not checked."""
    figures, lengths = [], result.get("lengths")
    if lengths:
        bins = [(int(item["from"]), int(item["to"]), int(item["examples"])) for item in lengths["bins"]]
        text = f"Half of the rows have at most {lengths['median']:,} tokens, the longest has {lengths['longest']:,}."
        edges = [*(low for low, _, _ in bins), bins[-1][1] + 1]
        drawing = histogram("lengths", "Length of the rows", text, edges, [number for _, _, number in bins])
        cells = [(f"{low:,} – {high:,}", f"{number:,}") for low, high, number in bins]
        table = FigureTable("Rows by length", ("tokens", "rows"), cells)
        figures.append(Figure("lengths", "Length of the rows", text, drawing, table))
    findings = result.get("findings", ())
    found = {item["name"].replace("_", " "): item["count"] for item in findings if item["name"] in COUNTED}
    charts = (
        ("classes", "Rows of each class", "Classes with few rows are learned less well.", result.get("class_counts")),
        ("attention", "Rows that need attention", "Number of rows of the findings above.", found),
    )
    for identity, title, text, counts in charts:
        if counts:
            shown = sorted(counts.items(), key=lambda item: -item[1])
            items = [Bar(name, f"{number:,}", [("p1", name, 0, number)]) for name, number in shown[:MAX_BARS]]
            table = FigureTable(title, ("", "rows"), [(name, f"{number:,}") for name, number in shown])
            figures.append(Figure(identity, title, text, bars(identity, title, text, items), table))
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
    cells = [(n, [_cell(row.get(name)) for name in columns], _error(row)) for n, row in rows]
    return list(columns), cells, total


def _error(row: Mapping[str, object]) -> str:
    return row.error.message if isinstance(row, UnreadableRow) else ""


def _cell(value: object) -> str:
    text = (
        "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    )
    return text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]}…"
