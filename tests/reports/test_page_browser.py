"""axe reports no accessibility violations of the pages in a browser, in light and dark mode.

Requires Chromium or Chrome, and axe-core: the file in ``DELTAW_AXE``, or the package axe-playwright-python or
axe-core-python. Skipped if either is missing.
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
from tests.reports.test_predictions import add_line, predictions_record

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(n))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--dump-dom"),
    *("--virtual-time-budget=20000", "--window-size=1280,2000"),
)
SCHEMES = {"dark": 0, "light": 1}  # values of Blink


def find_axe() -> Path | None:
    """Return the path of axe-core, or None if it is not installed."""
    configured = os.environ.get("DELTAW_AXE")
    if configured:
        return Path(configured)
    for package in ("axe_playwright_python", "axe_core_python"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if files := sorted(Path(folder).rglob("axe*.js")):
                return files[0]
    return None


AXE = find_axe()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed"),
    pytest.mark.skipif(AXE is None, reason="axe-core is not installed (pip install axe-playwright-python)"),
]


def violations(page: str, folder: Path, scheme: str) -> list[str]:
    """Return the violations that axe reports, with their elements."""
    assert AXE is not None
    folder.mkdir(exist_ok=True)
    source = AXE.read_text(encoding="utf-8").replace("</script", "<\\/script")
    run = (
        "axe.run(document, {resultTypes: ['violations']}).then(r => { document.documentElement.innerHTML = "
        "'<body><pre id=\"found\"></pre></body>'; document.getElementById('found').textContent = "
        "JSON.stringify({dark: matchMedia('(prefers-color-scheme: dark)').matches, passes: r.passes.length, "
        "found: r.violations.map(v => [v.id, v.nodes.map(n => n.html + ' ' + n.failureSummary)])}); });"
    )
    # The page's policy blocks scripts, so axe is added to a copy without the policy.
    page_text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    page_text = page_text.replace("<details>", "<details open>")
    page_text = page_text.replace("</body>", f"<script>{source}</script><script>{run}</script></body>")
    (folder / "page.html").write_text(page_text, encoding="utf-8")
    flags = [f"--user-data-dir={folder / scheme}", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"]
    command = [str(BROWSER), *FLAGS, *flags, (folder / "page.html").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    match = re.search(r'<pre id="found">(.*?)</pre>', result.stdout, re.DOTALL)
    assert match, result.stderr[-2000:]
    report = json.loads(unescape(match[1]))
    assert report["passes"] > 10 and report["dark"] == (scheme == "dark")
    return [f"{rule}: {node}" for rule, nodes in report["found"] for node in nodes]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("state", ["finished", "running", "failed"])
def test_run_page_has_no_accessibility_violations(tmp_path, scheme, state):
    folder = write_factors(write_run(tmp_path / "one", state=state))
    assert violations(run_page(read_run(folder)), tmp_path / "browser", scheme) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_predictions_and_long_texts_have_no_violations(tmp_path, scheme):
    folder = write_run(tmp_path / "one")
    classes = [f"class {n}" for n in range(8)]
    predicted = predictions_record([n % 8 for n in range(80)], [n % 8 if n % 3 else 0 for n in range(80)], classes)
    add_line(folder, {"step": 60, "predictions": {"": predicted}})
    row = {"row": 3, "prompt": "long " * 200, "expected": '{"a": 1}', "answer": '{"a": 2, "b": 3}'}
    add_line(folder, {"step": 60, "samples": [row]})
    assert violations(run_page(read_run(folder)), tmp_path / "browser", scheme) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_comparison_page_has_no_violations(tmp_path, scheme):
    runs = [read_run(write_run(tmp_path / str(n), seed=n, settings={"model": f"m{n}"})) for n in range(5)]
    assert violations(comparison_page(runs), tmp_path / "browser", scheme) == []


def test_axe_reports_broken_page(tmp_path):
    page = run_page(read_run(write_run(tmp_path / "one")))
    modified = page.replace("--quiet: #5d5850", "--quiet: #d0d0d0").replace('<html lang="en">', "<html>")
    messages = violations(modified, tmp_path / "browser", "light")
    assert any(line.startswith("color-contrast") for line in messages)
    assert any(line.startswith("html-has-lang") for line in messages)
