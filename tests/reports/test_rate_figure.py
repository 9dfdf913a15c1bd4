"""The drawn range test: well-formed SVG that says in words what it shows, whatever the curve."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from deltaw.reports.comparison import FIGURE, HEIGHT, WIDTH, rate_figure, write_rate_figure
from deltaw.training.monitoring.rates import read_curve

SVG = "{http://www.w3.org/2000/svg}"


def curve(count=40, runs_away=True):
    rates = np.geomspace(1e-5, 1e-2, count)
    losses = 3 - np.exp(-((np.log10(rates) + 3.5) ** 2))
    if runs_away and count > 5:
        losses[-3:] = [5, 40, 4000]
    return read_curve(rates.tolist(), losses.tolist(), usual=2e-4, diverged=runs_away)


@pytest.mark.parametrize("search", [curve(), curve(runs_away=False), curve(count=3)])
def test_the_figure_has_title_description_and_every_point_inside(search):
    root = ElementTree.fromstring(rate_figure(search))
    assert root.find(f"{SVG}title").text and search.why in root.find(f"{SVG}desc").text
    circles = root.findall(f".//{SVG}circle")
    assert len(circles) == len(search.rates)
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in circles]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    texts = "".join(root.itertext())
    assert f"chosen {search.chosen:.2g}" in texts and f"usual {search.usual:.2g}" in texts


def test_lower_losses_are_drawn_lower(tmp_path):
    search = curve(runs_away=False)
    root = ElementTree.fromstring(write_rate_figure(search, tmp_path).read_text())
    heights = [float(c.get("cy")) for c in root.findall(f".//{SVG}circle")]
    assert int(np.argmax(heights)) == int(np.argmin(search.losses))
    assert [path.name for path in tmp_path.iterdir()] == [FIGURE]
