"""A file becomes examples: sources, formats, templates with their loss masks, and the account of all rows."""

from deltaw.data.example import Example
from deltaw.data.prepare import DataSettings, encode_prompt, prepare, prepare_file
from deltaw.data.report import BadRowError, Report
from deltaw.data.row_reader import RowReader, RunData
from deltaw.data.sources import Rows, read_rows

__all__ = [
    "BadRowError",
    "DataSettings",
    "Example",
    "Report",
    "RowReader",
    "Rows",
    "RunData",
    "encode_prompt",
    "prepare",
    "prepare_file",
    "read_rows",
]
