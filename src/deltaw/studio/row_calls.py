"""Calls of the worker that read rows: preview, check and tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def preview(
    file: str, model: str | None = None, task: str | None = None, columns: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return a summary of the rows, and the settings that follow from it.

    Args:
        file: File with the rows.
        model: Model that counts the tokens, or None for the default of the task.
        task: Task, or None to infer it.
        columns: ``data.columns``, or None to infer it.
    """
    from deltaw.data.check import summarize_lengths
    from deltaw.data.starter import default_model
    from deltaw.reports.starter import preview_data, settings_text
    from deltaw.settings.config import parse_yaml

    summary = preview_data(file, model, task, columns)
    settings: Any = {"task": summary.task, "data": {"columns": dict(summary.mapped)}}
    if (model := model or default_model(summary.task)) is not None:
        settings = parse_yaml(settings_text(model, file, summary.task, summary, "train.yaml", skip=True))
        del settings["output"], settings["data"]["train"]
    lengths = summarize_lengths(summary.lengths)
    values = vars(summary) | {"mapped": dict(summary.mapped), "lengths": lengths and lengths.as_dict()}
    return {"preview": values, "settings": settings}


def check(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the check of all rows, or the name of the model if it has to be downloaded first.

    The plan of the run is a call of its own, with a shorter time limit.
    """
    from deltaw.runs.checks import check_data_and_run
    from deltaw.settings.config import RunConfig

    run_config = RunConfig.read(config)
    if not _is_available(run_config.model):
        return {"unavailable": run_config.model}
    return check_data_and_run(run_config, folder=False, dry_run=False).as_dict()


def rows(config: Mapping[str, Any], first: int, count: int) -> dict[str, Any]:
    """Return rows with the tokens of their examples, or the name of the model if it has to be downloaded first."""
    from deltaw.reports.rendered_rows import row_as_dict
    from deltaw.runs.data_checks import preview_rows
    from deltaw.settings.config import RunConfig

    run_config = RunConfig.read(config)
    if not _is_available(run_config.model):
        return {"unavailable": run_config.model}
    return {"rows": [row_as_dict(row) for row in preview_rows(run_config, first, count)]}


def _is_available(model: str) -> bool:
    """Return True if a model is on this machine."""
    from deltaw.hub.folders import find_cached

    return Path(model).exists() or model.startswith("parts:") or find_cached(model) is not None


CALLS: dict[str, Callable[..., dict[str, Any]]] = {"preview": preview, "check": check, "rows": rows}
