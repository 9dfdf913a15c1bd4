"""The notebook of the first adapter contains the cells of its script, in order, with the output of a run.

python -m tests.test_notebook    # run the cells and regenerate the notebook
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "first_adapter.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


SEPARATOR = "@@ end of cell"


def notebook_of(script: str, outputs: list[str]) -> dict:
    """Return a notebook with a cell for each ``# %%`` section of a script, and the outputs of its code cells."""
    cells = []
    remaining = iter(outputs)
    for kind, text in re.findall(r"(?ms)^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", script):
        lines = text.strip("\n").splitlines(keepends=True)
        cell = {"cell_type": "markdown" if kind else "code", "id": f"cell-{len(cells)}", "metadata": {}}
        if kind:
            cell["source"] = [re.sub(r"^# ?", "", line) for line in lines]
        else:
            printed = next(remaining).splitlines(keepends=True)
            stream = [{"name": "stdout", "output_type": "stream", "text": printed}] if printed else []
            cell |= {"execution_count": None, "outputs": stream, "source": lines}
        cells.append(cell)
    return {"cells": cells, "metadata": {"kernelspec": KERNEL}, "nbformat": 4, "nbformat_minor": 5}


def code_of(script: str) -> list[str]:
    cells = notebook_of(script, [""] * script.count("# %%"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_cells(folder: Path) -> list[str]:
    """Run the cells of the script in a folder and return the output of each."""
    code = (f"{cell}\nprint({SEPARATOR!r}, flush=True)" for cell in code_of(SCRIPT.read_text(encoding="utf-8")))
    (folder / "cells.py").write_text("\n".join(code), encoding="utf-8")
    (folder / "capitals.jsonl").write_bytes((ROOT / "examples" / "capitals.jsonl").read_bytes())
    hidden = {"DELTAW_MEASURED", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"DELTAW_CACHE": str(Path.home() / ".cache" / "deltaw"), "PYTHONPATH": str(ROOT / "src")}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, "cells.py"], timeout=1800, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split(f"{SEPARATOR}\n")[:-1]


def test_notebook_matches_the_script() -> None:
    script = SCRIPT.read_text(encoding="utf-8")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = ["".join(line for stream in cell["outputs"] for line in stream["text"]) for cell in cells]
    assert notebook == notebook_of(script, outputs), "regenerate it: python -m tests.test_notebook"
    assert len(cells) == 7
    for cell, output in zip(cells, outputs, strict=True):
        compile("".join(cell["source"]), "cell", "exec")
        assert bool(output) == bool(re.search(r"(?m)^(print|result|run)\b", "".join(cell["source"])))
    assert "held-out" in outputs[3] and "adapter:" in outputs[4] and "accelerated: loss" in outputs[6]


@pytest.mark.slow
@pytest.mark.network
def test_cells_of_the_notebook_run_in_order(tmp_path: Path) -> None:
    output = "".join(run_cells(tmp_path))
    assert 'adapter: {"country": "Canada", "capital": "Ottawa"}' in output
    assert 'adapter: {"country": "Sweden", "capital": "Stockholm"}' in output


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        recorded = notebook_of(SCRIPT.read_text(encoding="utf-8"), run_cells(Path(scratch)))
    NOTEBOOK.write_text(json.dumps(recorded, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
