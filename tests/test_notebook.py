"""The notebook of the first adapter contains the cells of its script, in order, without outputs.

python -m tests.test_notebook    # regenerates the notebook
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "first_adapter.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook_of(script: str) -> dict:
    """Return a notebook with a cell for each ``# %%`` section of a script."""
    cells = []
    for kind, text in re.findall(r"(?ms)^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", script):
        lines = text.strip("\n").splitlines(keepends=True)
        cell = {"cell_type": "markdown" if kind else "code", "id": f"cell-{len(cells)}", "metadata": {}}
        if kind:
            cell["source"] = [re.sub(r"^# ?", "", line) for line in lines]
        else:
            cell |= {"execution_count": None, "outputs": [], "source": lines}
        cells.append(cell)
    return {"cells": cells, "metadata": {"kernelspec": KERNEL}, "nbformat": 4, "nbformat_minor": 5}


def test_notebook_matches_the_script() -> None:
    script = SCRIPT.read_text(encoding="utf-8")
    expected_notebook = notebook_of(script)
    command = "python -m tests.test_notebook"
    assert json.loads(NOTEBOOK.read_text(encoding="utf-8")) == expected_notebook, f"regenerate it: {command}"
    code = ["".join(cell["source"]) for cell in expected_notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) == 6
    for cell in code:
        compile(cell, "cell", "exec")


@pytest.mark.slow
@pytest.mark.network
def test_cells_of_the_notebook_run_in_order(tmp_path: Path) -> None:
    code = ("".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code")
    (tmp_path / "cells.py").write_text("\n".join(code), encoding="utf-8")
    (tmp_path / "capitals.jsonl").write_bytes((ROOT / "examples" / "capitals.jsonl").read_bytes())
    hidden = {"DELTAW_MEASURED", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"DELTAW_CACHE": str(Path.home() / ".cache" / "deltaw"), "PYTHONPATH": str(ROOT / "src")}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, "cells.py"], timeout=1800, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'adapter: {"country": "Canada", "capital": "Ottawa"}' in result.stdout
    assert 'adapter: {"country": "Sweden", "capital": "Stockholm"}' in result.stdout


if __name__ == "__main__":
    expected_notebook = notebook_of(SCRIPT.read_text(encoding="utf-8"))
    NOTEBOOK.write_text(json.dumps(expected_notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
