"""The pages as HTML, written into a run's folder or to a file: complete, or not at all.

Templates are files of this package; every text that comes from a run is escaped by them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from deltaw.durable import write_text
from deltaw.reports.page.compare_view import compare_view
from deltaw.reports.page.run_view import run_view
from deltaw.reports.recorded import RecordedRun, find_runs, read_run

NAME = "report.html"
# Of several runs, in the folder that holds them.
COMPARISON = "comparison.html"


@lru_cache(maxsize=1)
def _templates() -> tuple[Environment, Markup]:
    """The templates, and the style sheet that goes into each page."""
    folder = resources.files("deltaw.reports.page") / "templates"
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.is_file()}
    style = Markup(texts.pop("style.css"))
    environment = Environment(
        loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment, style


def run_page(record: RecordedRun) -> str:
    """One run as a page."""
    environment, style = _templates()
    return environment.get_template("run.html").render(style=style, **run_view(record)).strip() + "\n"


def comparison_page(records: Sequence[RecordedRun]) -> str:
    """Several runs side by side."""
    environment, style = _templates()
    return (
        environment.get_template("compare.html").render(style=style, **compare_view(records)).strip() + "\n"
    )


def write_page(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run's folder, from what lies there.

    Raises:
        UserError: the folder is not a run's, or cannot be written.
    """
    path = Path(folder) / NAME
    write_text(path, run_page(read_run(folder)))
    return path


def write_pages(folder: str | os.PathLike[str]) -> list[Path]:
    """Write the page of each run below a folder, and where there are several, one that compares them."""
    runs = find_runs(Path(folder))
    written = [write_page(run) for run in runs]
    if len(runs) > 1:
        written.append(Path(folder) / COMPARISON)
        write_text(written[-1], comparison_page([read_run(run) for run in runs]))
    return written
