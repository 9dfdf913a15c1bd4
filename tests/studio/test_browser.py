"""The studio in a browser, by role and label only, as a user without a terminal.

Requires Playwright and Chromium or Chrome. Tests are skipped if one is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra studio is not installed")
pytest.importorskip("httpx", reason="the extra studio is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
from playwright.sync_api import Browser, Page, expect  # noqa: E402

from tests.byte_models import save_model, tiny_llama  # noqa: E402
from tests.conftest import write_rows  # noqa: E402
from tests.reports.test_page_browser import AXE, BROWSER  # noqa: E402
from tests.serving.encoder_models import write_bert  # noqa: E402
from tests.studio.studio_process import StudioProcess, studio_process  # noqa: E402

pytestmark = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
# Milliseconds for a training or for loading a model.
LONG = 180_000
REVIEWS = [
    (f"{word} {n}", label) for n in range(12) for word, label in (("good fine", "praise"), ("bad awful", "blame"))
]
CHAT = [("Say it", "Ahoy"), ("Greet me", "Ahoy matey"), ("Hello", "Ahoy there"), ("Who are you", "Ahoy, a pirate")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield instance
        instance.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_bert(folder / "encoder", max_position_embeddings=128)
    save_model(tiny_llama(initializer_range=0.3, max_position_embeddings=512), folder / "writer")
    return folder


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[StudioProcess]:
    folder = tmp_path_factory.mktemp("studio") / "folder"
    folder.mkdir()
    (folder / "models").symlink_to(models)
    with studio_process(folder) as process:
        yield process


@pytest.fixture
def page(browser: Browser, studio: StudioProcess) -> Iterator[Page]:
    """Page that is connected to the studio. The test fails if it logs errors or sends requests to other servers."""
    with connected(browser, studio) as new_page:
        yield new_page
