"""The server of the studio imports no torch, so that it starts fast and leaves the memory to trainings."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("fastapi", reason="the extra studio is not installed")
_PROGRAM = """\
import sys
from pathlib import Path
from tests.studio.client import connect
client = connect(Path(sys.argv[1]))
url = client.put("/files/rows.csv", content=b"text,label\\na,b\\n").json()["url"]
assert {client.get(p).status_code for p in ("/", "/runs", "/jobs", url)} == {200}
print([name for name in ("torch", "transformers", "datasets") if name in sys.modules])
"""


def test_server_imports_no_torch(tmp_path) -> None:
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.strip() == "[]", result.stderr
