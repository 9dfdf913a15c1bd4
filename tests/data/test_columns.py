"""The description of the columns used by tasks, and its table in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaw.errors import UserError
from deltaw.settings import task_registry
from deltaw.settings.columns import kinds_of, require_columns, row_kinds, tasks_of

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def table() -> str:
    lines = ["| rows | tasks | required columns | also used |", "| --- | --- | --- | --- |"]
    for kind in row_kinds():
        needs = ", ".join(" or ".join(f"`{name}`" for name in names) for names in kind.required)
        used = ", ".join(f"`{name}`" for name in kind.optional)
        lines.append(f"| {kind.name} | {', '.join(tasks_of(kind))} | {needs} | {used} |")
    return "\n".join(lines)


def test_documented_table_matches_the_description():
    assert table() in PAGE.read_text(encoding="utf-8"), table()


def test_every_task_is_described():
    assert all(kinds_of(task) for task in task_registry.names() if "toy" not in task)


INFERRED = {"query, passage": ("embedding", {})}
INFERRED |= {"Query, Passage": ("embedding", {"anchor": "Query", "positive": "Passage"})}
INFERRED |= {"query, passage, label": ("reranking", {}), "anchor, positive, negative": ("embedding", {})}
INFERRED |= {"question, passage, answer": (None, {}), "Prompt, completion": ("causal-lm", {"prompt": "Prompt"})}
INFERRED |= {"prompt, chosen, rejected": ("preference", {}), "text, label": (None, {})}


@pytest.mark.parametrize("columns", INFERRED)
def test_task_is_inferred_from_unambiguous_columns(columns):
    names = columns.split(", ")
    inferred = [(tasks_of(kind)[0], mapped) for kind in row_kinds() if (mapped := kind.infer(names)) is not None]
    assert (inferred or [(None, {})])[0] == INFERRED[columns]


def test_columns_of_another_task_are_rejected_with_a_hint():
    with pytest.raises(UserError, match="do not fit the task causal-lm") as error:
        require_columns("causal-lm", ["query", "passage"], "d.jsonl", {})
    assert "set task: embedding" in error.value.hint and "'query', 'passage'" in error.value.location
    require_columns("causal-lm", ["query", "passage"], "d.jsonl", {"prompt": "query", "completion": "passage"})
