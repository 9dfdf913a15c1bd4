"""Conversion of spreadsheets to JSON Lines, in a process of its own with limited memory and time."""

from __future__ import annotations

import collections
import contextlib
import datetime
import filecmp
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaw.data.sources import open_source
from deltaw.errors import UserError
from deltaw.studio.jobs import python_command
from deltaw.studio.workspace import MIN_FREE_BYTES, SPREADSHEETS, Workspace, move_to_unused

MAX_MEMORY_BYTES, MAX_UNZIPPED_BYTES, MAX_SECONDS = 4 * 10**9, 10**9, 120
_CODE = "from deltaw.studio.spreadsheets import main; main(*sys.argv[1:])"


@dataclass(frozen=True)
class ConvertedRows:
    """File with rows, converted if it was a spreadsheet.

    Attributes:
        file: File with the rows.
        note: Description of the conversion, or '' for other files.
        sheet: Name of the converted sheet, or ''.
        sheets: Names of all visible sheets.
    """

    file: Path
    note: str = ""
    sheet: str = ""
    sheets: Sequence[str] = ()


def convert(workspace: Workspace, file: Path, *, sheet: str = "", is_upload: bool = False) -> ConvertedRows:
    """Convert a sheet of a spreadsheet to JSON Lines. Other files are returned unchanged.

    Args:
        workspace: Folder of the studio.
        file: File with rows.
        sheet: Name of the sheet, or '' for the first one that is visible and not empty.
        is_upload: Delete the file if it is rejected.

    Raises:
        UserError: if the sheet is not a table with a title in each column, or the file is damaged or too large. Rows
            of other files are checked later, except for the first one of an upload.
    """
    if file.suffix.lower() not in SPREADSHEETS:
        if is_upload:
            try:
                collections.deque(open_source(str(file)).head(1), maxlen=0)
            except UserError:
                file.unlink(missing_ok=True)
                raise
        return ConvertedRows(file)
    output, target = workspace.partial_file(), file.with_suffix(".jsonl")
    if sheet:  # so that the same sheet becomes the same file again
        name = re.sub(r"[^\w-]+", "-", sheet)
        target = target.with_stem(f"{target.stem}-{name}")
    command, options = python_command(_CODE, workspace, [str(file), str(output), sheet])
    options |= {"capture_output": True, "timeout": MAX_SECONDS, "encoding": "utf-8", "check": False}
    try:
        process = subprocess.run(command, **options)
        message = process.stdout.strip() or "the file is too large, or a sheet has a cell far away from its table"
    except subprocess.TimeoutExpired:
        process, message = None, f"the file was not read within {MAX_SECONDS} seconds"
    try:
        if process is None or process.returncode:
            if is_upload:
                file.unlink(missing_ok=True)
            raise UserError(message, location=file.name, hint="correct it, or save the sheet with the rows as CSV")
        if not (target.is_file() and filecmp.cmp(output, target, shallow=False)):
            target = move_to_unused(output, target)
        return ConvertedRows(target, **json.loads(message))
    finally:
        output.unlink(missing_ok=True)


def main(source: str, output: str, chosen: str = "") -> None:
    """Write the rows of a sheet and print the other values of ConvertedRows, or exit with status 1 and a message."""
    from python_calamine import CalamineError, CalamineWorkbook, SheetTypeEnum, SheetVisibleEnum

    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows, macOS
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > MAX_UNZIPPED_BYTES:
                    raise ValueError("the file is too large when it is unpacked")
        workbook = CalamineWorkbook.from_path(source)
        tables = (SheetTypeEnum.WorkSheet, SheetVisibleEnum.Visible)
        names = [sheet.name for sheet in workbook.sheets_metadata if (sheet.typ, sheet.visible) == tables]
        if chosen and chosen not in names:
            raise ValueError(f"the file has no visible sheet “{chosen[:80]}”")
        sheets = ((name, workbook.get_sheet_by_name(name).to_python()) for name in names if chosen in ("", name))
        name, cells = next((sheet for sheet in sheets if sheet[1]), ("", []))
        lines, num_empty = _lines(cells)
        content = "".join(lines).encode()
        if shutil.disk_usage(Path(output).parent).free - len(content) < MIN_FREE_BYTES:
            raise ValueError(f"the disk is almost full, and the rows need {len(content) / 1e6:,.0f} MB")
    except (CalamineError, MemoryError, ValueError, zipfile.BadZipFile) as error:
        damaged = "the file is damaged, protected with a password, or not a spreadsheet of the type of its name"
        print(error if isinstance(error, ValueError) else damaged)
        sys.exit(1)
    Path(output).write_bytes(content)
    text = f"Rows of the sheet “{name}” in {Path(source).name}. Row 1 is the first row below the titles."
    if others := [other for other in names if other != name]:
        text += f" Other sheets are not used: {', '.join(others[:5])}{', …' * (len(others) > 5)}."
    if num_empty:
        text += f" {num_empty:,} empty row{'s were' if num_empty > 1 else ' was'} skipped, so later row numbers differ."
    print(json.dumps({"note": text, "sheet": name, "sheets": names}))


def _lines(sheet: Sequence[Sequence[object]]) -> tuple[list[str], int]:
    """Return JSON lines with the rows below the titles, and the number of empty rows between them.

    Raises:
        ValueError: if a column has no title, two have the same, or the sheet has no rows.
    """
    numbers = [number for number, row in enumerate(sheet) if any(cell != "" for cell in row)]
    rows = [sheet[number] for number in numbers]
    used = [index for index in range(len(rows[0]) if rows else 0) if any(row[index] != "" for row in rows)]
    titles = [str(_plain(rows[0][index])).strip() for index in used]
    if len(rows) < 2:
        raise ValueError("the file has no sheet with titles in the first row and rows below")
    if missing := [index for index, title in zip(used, titles, strict=True) if not title]:
        raise ValueError(f"column {missing[0] + 1} has no title in the first row, or its title is in a merged cell")
    if repeated := [title for title in titles if titles.count(title) > 1]:
        raise ValueError(f"two columns have the title '{repeated[0][:80]}'")
    records = (dict(zip(titles, (_plain(row[index]) for index in used), strict=True)) for row in rows[1:])
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    return lines, numbers[-1] - numbers[0] + 1 - len(rows)


def _plain(cell: object) -> object:
    """Return a cell as a value of JSON. Dates and times are in ISO format."""
    if isinstance(cell, float) and cell.is_integer():
        return int(cell)
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    return cell if isinstance(cell, str | int | float | bool) else str(cell)
