"""The table of tested versions in docs/development.md, read from the environments that ran the tests.

Usage: python benchmarks/versions.py OLDEST NEWEST, each the folder of a virtual environment. It installs nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "development.md"
BEGIN, END = "<!-- versions -->", "<!-- /versions -->"
# Run by an environment's own Python: names and versions of what is installed there.
ASK = """
import json, platform
from importlib.metadata import distributions
found = {d.metadata["Name"].lower().replace("_", "-"): d.version.partition("+")[0] for d in distributions()}
print(json.dumps({**found, "python": platform.python_version()}))
"""


def declared() -> list[str]:
    """The names of the packages that deltaw needs, in the order of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    extras = text.partition("\ndev = [")[2].partition("\n]")[0]
    names = re.findall(r'"([A-Za-z0-9-]+)', listed) + [n for n in re.findall(r'"([a-z0-9-]+)>', extras) if n in SHOWN]
    return list(dict.fromkeys(names))


# Of the extras, the packages that deltaw itself imports.
SHOWN = ("peft", "fastapi", "uvicorn", "llguidance", "prometheus-client", "optuna", "sqlalchemy")


def installed(environment: Path) -> dict[str, str]:
    python = next(path for path in (environment / "bin/python", environment / "Scripts/python.exe") if path.exists())
    return json.loads(subprocess.run([python, "-c", ASK], capture_output=True, text=True, check=True).stdout)


def table(oldest: dict[str, str], newest: dict[str, str]) -> str:
    rows = [f"| {name} | {oldest.get(name, '')} | {newest.get(name, '')} |" for name in ("python", *declared())]
    return "\n".join(["| | `make test-oldest` | `make test-newest` |", "| --- | --- | --- |", *rows])


def main(oldest: str, newest: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    made = table(installed(Path(oldest)), installed(Path(newest)))
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
