"""The pages in a browser: axe finds nothing to object to, in light and dark.

Needs a Chromium or Chrome, and axe-core: the file that ``DELTAW_AXE`` names, or the one in the package
axe-playwright-python or axe-core-python. Skipped where either is missing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from deltaw.reports.page.write import comparison_page, run_page
from deltaw.runs.folder import read_run
from tests.reports.run_folders import write_factors, write_run
from tests.reports.test_predictions import add_line, recorded

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(n))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--dump-dom"),
    *("--virtual-time-budget=20000", "--window-size=1280,2000"),
)
SCHEMES = {"dark": 0, "light": 1}  # Blink's numbers


def axe() -> Path | None:
    """The file of axe-core."""
    named = os.environ.get("DELTAW_AXE")
    if named:
        return Path(named)
    for package in ("axe_playwright_python", "axe_core_python"):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if found := sorted(Path(place).rglob("axe*.js")):
                return found[0]
    return None


AXE = axe()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium"),
    pytest.mark.skipif(AXE is None, reason="axe-core is not installed (pip install axe-playwright-python)"),
]


def violations(page: str, folder: Path, scheme: str) -> list[str]:
    """What axe objects to, each with the element."""
    assert AXE is not None
    folder.mkdir(exist_ok=True)
    source = AXE.read_text(encoding="utf-8").replace("</script", "<\\/script")
    run = (
        "axe.run(document, {resultTypes: ['violations']}).then(r => { document.documentElement.innerHTML = "
        "'<body><pre id=\"found\"></pre></body>'; document.getElementById('found').textContent = "
        "JSON.stringify({dark: matchMedia('(prefers-color-scheme: dark)').matches, passes: r.passes.length, "
        "found: r.violations.map(v => [v.id, v.nodes.map(n => n.html + ' ' + n.failureSummary)])}); });"
    )
    # The page itself allows no script, so the tester's goes into a copy without that rule.
    tested = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    tested = tested.replace("<details>", "<details open>")
    tested = tested.replace("</body>", f"<script>{source}</script><script>{run}</script></body>")
    (folder / "page.html").write_text(tested, encoding="utf-8")
    flags = [f"--user-data-dir={folder / scheme}", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"]
    command = [str(BROWSER), *FLAGS, *flags, (folder / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    told = json.loads(unescape(found[1]))
    assert told["passes"] > 10 and told["dark"] == (scheme == "dark")
    return [f"{rule}: {node}" for rule, nodes in told["found"] for node in nodes]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("state", ["finished", "running", "failed"])
def test_axe_finds_nothing_on_the_page_of_a_run(tmp_path, scheme, state):
    folder = write_factors(write_run(tmp_path / "one", state=state))
    assert violations(run_page(read_run(folder)), tmp_path / "browser", scheme) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing_on_predictions_json_and_long_texts(tmp_path, scheme):
    folder = write_run(tmp_path / "one")
    classes = [f"class {n}" for n in range(8)]
    predicted = recorded([n % 8 for n in range(80)], [n % 8 if n % 3 else 0 for n in range(80)], classes)
    add_line(folder, {"step": 60, "predictions": {"": predicted}})
    row = {"row": 3, "prompt": "long " * 200, "expected": '{"a": 1}', "answer": '{"a": 2, "b": 3}'}
    add_line(folder, {"step": 60, "samples": [row]})
    assert violations(run_page(read_run(folder)), tmp_path / "browser", scheme) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing_on_a_comparison(tmp_path, scheme):
    runs = [read_run(write_run(tmp_path / str(n), seed=n, settings={"model": f"m{n}"})) for n in range(5)]
    assert violations(comparison_page(runs), tmp_path / "browser", scheme) == []


def test_axe_finds_what_is_wrong(tmp_path):
    page = run_page(read_run(write_run(tmp_path / "one")))
    broken = page.replace("--quiet: #5d5850", "--quiet: #d0d0d0").replace('<html lang="en">', "<html>")
    found = violations(broken, tmp_path / "browser", "light")
    assert any(line.startswith("color-contrast") for line in found)
    assert any(line.startswith("html-has-lang") for line in found)
