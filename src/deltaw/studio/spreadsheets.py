"""Conversion of spreadsheets to JSON Lines, in a process of its own with limited memory and time."""

from __future__ import annotations

import contextlib
import datetime
import filecmp
import json
import secrets
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaw.errors import UserError
from deltaw.platforms import rename_path
from deltaw.studio.jobs import python_command
from deltaw.studio.workspace import SPREADSHEETS, Workspace, unused_path

MAX_MEMORY_BYTES, MAX_UNZIPPED_BYTES, MAX_SECONDS = 4 * 10**9, 10**9, 120
_CODE = "from deltaw.studio.spreadsheets import main; main(*sys.argv[1:])"


def convert(workspace: Workspace, file: Path) -> Path:
    """Return a file unchanged, or a JSON Lines file with the rows of a spreadsheet's first sheet that is not empty.

    Raises:
        UserError: if the sheet is not a table with a title in each column, or the file is damaged or too large.
    """
    if file.suffix.lower() not in SPREADSHEETS:
        return file
    output, target = workspace.state / f"{secrets.token_hex(8)}.part", file.with_suffix(".jsonl")
    command, options = python_command(_CODE, [str(file), str(output)])
    options |= {"capture_output": True, "timeout": MAX_SECONDS, "encoding": "utf-8", "check": False}
    try:
        process = subprocess.run(command, **options)
        message = process.stdout.strip() or "the file is damaged, or is not a spreadsheet"
    except subprocess.TimeoutExpired:
        process, message = None, f"the file was not read within {MAX_SECONDS} seconds"
    try:
        if process is None or process.returncode:
            raise UserError(message, location=file.name, hint="correct it, or save the sheet with the rows as CSV")
        if not (target.is_file() and filecmp.cmp(output, target, shallow=False)):
            target = unused_path(target)
            rename_path(output, target)
        return target
    finally:
        output.unlink(missing_ok=True)


def main(source: str, output: str) -> None:
    """Write the rows of a spreadsheet. Print a message and exit with status 1 if it has no table."""
    from python_calamine import CalamineError, CalamineWorkbook

    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows, macOS
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > MAX_UNZIPPED_BYTES:
                    raise ValueError("the file is too large when it is unpacked")
        workbook = CalamineWorkbook.from_path(source)
        sheets: Iterator[Any] = (workbook.get_sheet_by_name(name).to_python() for name in workbook.sheet_names)
        lines = _lines(next((sheet for sheet in sheets if sheet), []))
    except (CalamineError, MemoryError, ValueError, zipfile.BadZipFile) as error:
        print(error if isinstance(error, ValueError) else f"the file cannot be read: {str(error)[:200]}")
        sys.exit(1)
    Path(output).write_text("".join(lines), encoding="utf-8")


def _lines(sheet: list[list[object]]) -> list[str]:
    """Return JSON lines with the rows below the titles.

    Raises:
        ValueError: if a column has no title, two have the same, or the sheet has no rows.
    """
    rows = [row for row in sheet if any(cell != "" for cell in row)]
    used = [index for index in range(len(rows[0]) if rows else 0) if any(row[index] != "" for row in rows)]
    titles = [str(_plain(rows[0][index])).strip() for index in used]
    if len(rows) < 2:
        raise ValueError("the file has no sheet with titles in the first row and rows below")
    if missing := [index for index, title in zip(used, titles, strict=True) if not title]:
        raise ValueError(f"column {missing[0] + 1} has no title in the first row, or its title is in a merged cell")
    if repeated := [title for title in titles if titles.count(title) > 1]:
        raise ValueError(f"two columns have the title '{repeated[0][:80]}'")
    records = (dict(zip(titles, (_plain(row[index]) for index in used), strict=True)) for row in rows[1:])
    return [json.dumps(record, ensure_ascii=False) + "\n" for record in records]


def _plain(cell: object) -> object:
    """Return a cell as a value of JSON. Dates and times are in ISO format."""
    if isinstance(cell, float) and cell.is_integer():
        return int(cell)
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    return cell if isinstance(cell, str | int | float | bool) else str(cell)
