"""Write the table of tested versions into docs/development.md, using the environments that ran the tests.

Usage: python benchmarks/versions.py OLDEST NEWEST, the folders of two virtual environments. Nothing is installed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "development.md"
BEGIN = "<!-- versions -->"
END = "<!-- /versions -->"
# Script that prints the packages and versions installed in an environment.
VERSION_SCRIPT = """
import json, platform
from importlib.metadata import distributions
found = {d.metadata["Name"].lower().replace("_", "-"): d.version.partition("+")[0] for d in distributions()}
print(json.dumps({**found, "python": platform.python_version()}))
"""


def declared() -> list[str]:
    """Return the packages that deltaw depends on, in the order of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    extras = text.partition("\ndev = [")[2].partition("\n]")[0]
    names = re.findall(r'"([A-Za-z0-9-]+)', dependencies) + [
        n for n in re.findall(r'"([a-z0-9-]+)>', extras) if n in EXTRA_PACKAGES
    ]
    return list(dict.fromkeys(names))


# Optional packages that deltaw imports.
EXTRA_PACKAGES = ("peft", "fastapi", "uvicorn", "llguidance", "prometheus-client", "optuna", "sqlalchemy")


def installed(environment: Path) -> dict[str, str]:
    python = next(path for path in (environment / "bin/python", environment / "Scripts/python.exe") if path.exists())
    return json.loads(subprocess.run([python, "-c", VERSION_SCRIPT], capture_output=True, text=True, check=True).stdout)


def table(oldest: dict[str, str], newest: dict[str, str]) -> str:
    rows = [f"| {name} | {oldest.get(name, '')} | {newest.get(name, '')} |" for name in ("python", *declared())]
    return "\n".join(["| | `make test-oldest` | `make test-newest` |", "| --- | --- | --- |", *rows])


def main(oldest: str, newest: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, remainder = page.partition(BEGIN)
    after = remainder.partition(END)[2]
    new_table = table(installed(Path(oldest)), installed(Path(newest)))
    PAGE.write_text(f"{before}{BEGIN}\n{new_table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
