"""Data loading: sources, row formats, chat templates, loss masks and reports of preparation."""

from deltaw.data.example import Example
from deltaw.data.prepare import DataSettings, encode_prompt, prepare, prepare_file
from deltaw.data.report import BadRowError, PreparationReport
from deltaw.data.row_reader import RowReader, RunData
from deltaw.data.sources import NumberedRows, read_rows

__all__ = [
    "BadRowError",
    "DataSettings",
    "Example",
    "NumberedRows",
    "PreparationReport",
    "RowReader",
    "RunData",
    "encode_prompt",
    "prepare",
    "prepare_file",
    "read_rows",
]
