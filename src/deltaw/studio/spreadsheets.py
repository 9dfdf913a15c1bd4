"""Conversion of spreadsheets to JSON Lines, in a process of its own with limited memory and time."""

from __future__ import annotations

import collections
import contextlib
import datetime
import filecmp
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from deltaw.child_process import minimal_environment, run_command
from deltaw.data.sources import open_source
from deltaw.errors import UserError
from deltaw.studio.jobs import workspace_command
from deltaw.studio.workspace import MIN_FREE_BYTES, SPREADSHEETS, Workspace, move_to_unused

MAX_MEMORY_BYTES, MAX_UNZIPPED_BYTES, MAX_SECONDS = 4 * 10**9, 10**9, 120
_CODE = (
    "from deltaw.worker_process import read_input; read_input(); "
    "from deltaw.studio.spreadsheets import main; main(*sys.argv[1:])"
)


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
    command, _ = workspace_command(_CODE, workspace, [str(file), str(output), sheet])
    result = run_command(command, stdin_bytes=None, environment=minimal_environment(), timeout=MAX_SECONDS)
    message = result.output.strip() or "the file is too large, or a sheet has a cell far away from its table"
    if result.status is None:
        message = f"the file was not read within {MAX_SECONDS} seconds"
    try:
        if result.status != 0:
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
    unreadable = (CalamineError, zipfile.BadZipFile, expat.ExpatError, KeyError, StopIteration)
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > MAX_UNZIPPED_BYTES:
                    raise ValueError("the file is too large when it is unpacked")
        workbook = CalamineWorkbook.from_path(source)
        visible = (SheetTypeEnum.WorkSheet, SheetVisibleEnum.Visible)
        names = [sheet.name for sheet in workbook.sheets_metadata if (sheet.typ, sheet.visible) == visible]
        if chosen and chosen not in names:
            problem = "is hidden" if chosen in workbook.sheet_names else "does not exist"
            raise ValueError(f"the sheet “{chosen[:80]}” {problem}")
        sheets = (workbook.get_sheet_by_name(name) for name in names if chosen in ("", name))
        tables = ((sheet.name, sheet.start, sheet.to_python()) for sheet in sheets)
        name, start, cells = next((table for table in tables if table[2]), ("", None, []))
        lines, numbers, used = _lines(cells)
        num_empty = numbers[-1] - numbers[0] + 1 - len(numbers)
        hidden_rows = 0
        hidden_columns = 0
        if start and Path(source).suffix.lower() == ".xlsx":
            rows = {start[0] + number + 1 for number in numbers[1:]}
            columns = {start[1] + index + 1 for index in used}
            hidden_rows, hidden_columns = _count_hidden(source, name, rows, columns)
        content = "".join(lines).encode()
        if shutil.disk_usage(Path(output).parent).free - len(content) < MIN_FREE_BYTES:
            raise ValueError(f"the disk is almost full, and the rows need {len(content) / 1e6:,.0f} MB")
    except (*unreadable, MemoryError, ValueError) as error:
        damaged = "the file is damaged, protected with a password, or not a spreadsheet of the type of its name"
        print(error if isinstance(error, ValueError) else damaged)
        sys.exit(1)
    Path(output).write_bytes(content)
    text = f"Rows of the sheet “{name}” in {Path(source).name}. Row 1 is the first row below the titles."
    if others := [other for other in names if other != name]:
        text += f" Other sheets are not used: {', '.join(others[:5])}{', …' * (len(others) > 5)}."
    if num_empty:
        text += f" {num_empty:,} empty row{'s were' if num_empty > 1 else ' was'} skipped, so later row numbers differ."
    if hidden_rows or hidden_columns:
        text += f" Hidden rows: {hidden_rows:,}, hidden columns: {hidden_columns:,}. They are used like the others."
    print(json.dumps({"note": text, "sheet": name, "sheets": names}))


def _lines(sheet: Sequence[Sequence[object]]) -> tuple[list[str], list[int], list[int]]:
    """Return JSON lines with the rows below the titles, and the indices of rows and of columns that are not empty.

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
    return lines, numbers, used


def _count_hidden(source: str, sheet: str, rows: Collection[int], columns: Collection[int]) -> tuple[int, int]:
    """Return how many of these rows and columns of a sheet of an .xlsx file are hidden. Numbers start at 1."""
    hidden_rows = 0
    hidden_columns = 0
    row = 0
    with zipfile.ZipFile(source) as archive:
        sheets = (attributes for tag, attributes in _elements(archive, "xl/workbook.xml") if tag == "sheet")
        entry = next(attributes for attributes in sheets if attributes["name"] == sheet)
        relation = next(value for key, value in entry.items() if key.endswith(" id"))
        links = _elements(archive, "xl/_rels/workbook.xml.rels")
        target = next(attributes["Target"] for _, attributes in links if attributes.get("Id") == relation)
        path = "xl/" + target.removeprefix("/").removeprefix("xl/")
        for tag, attributes in _elements(archive, path):
            is_hidden = attributes.get("hidden") in ("1", "true")
            if tag == "row":
                row = int(attributes.get("r", row + 1))
                hidden_rows += is_hidden and row in rows
            elif tag == "col" and is_hidden:
                hidden = range(int(attributes["min"]), int(attributes["max"]) + 1)
                hidden_columns += sum(column in hidden for column in columns)
    return hidden_rows, hidden_columns


def _elements(archive: zipfile.ZipFile, path: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield tag and attributes of each element of an XML file, which is read in pieces."""
    entries = {entry.filename.replace("\\", "/").lower(): entry for entry in archive.infolist()}
    elements: list[tuple[str, dict[str, str]]] = []
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = lambda name, attributes: elements.append((name.split(" ")[-1], attributes))
    parser.StartDoctypeDeclHandler = _reject_doctype
    with archive.open(entries[path.lower()]) as stream:
        while piece := stream.read(2**16):
            parser.Parse(piece)
            yield from elements
            elements.clear()


def _reject_doctype(*declaration: object) -> None:
    """Reject declarations of entities, which can expand to any size. Spreadsheets do not have them."""
    raise ValueError("the file has a document type declaration, which spreadsheets do not have")


def _plain(cell: object) -> object:
    """Return a cell as a value of JSON. Dates and times are in ISO format."""
    if isinstance(cell, float) and cell.is_integer():
        return int(cell)
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    return cell if isinstance(cell, str | int | float | bool) else str(cell)
