"""A file becomes examples: sources, formats, templates with their loss masks, and the account of all rows."""

from deltaw.data.example import Example
from deltaw.data.prepare import DataSettings, Prepared, encode_prompt, prepare, prepare_file
from deltaw.data.report import Report
from deltaw.data.sources import Rows, read_rows

__all__ = [
    "DataSettings",
    "Example",
    "Prepared",
    "Report",
    "Rows",
    "encode_prompt",
    "prepare",
    "prepare_file",
    "read_rows",
]
