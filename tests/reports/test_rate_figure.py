"""The learning-rate figure is well-formed SVG with a description."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from deltaw.reports.page.write import write_rate_figure
from deltaw.training.monitoring.rates import read_curve

SVG = "{http://www.w3.org/2000/svg}"


def make_curve(count=40, diverges=True):
    rates = np.geomspace(1e-5, 1e-2, count)
    losses = 3 - np.exp(-((np.log10(rates) + 3.5) ** 2))
    if diverges and count > 5:
        losses[-3:] = [5, 40, 4000]
    return read_curve(rates.tolist(), losses.tolist(), usual=2e-4, diverged=diverges)


@pytest.mark.parametrize("search", [make_curve(), make_curve(diverges=False), make_curve(count=3)])
def test_figure_has_title_description_and_all_points(search, tmp_path):
    root = ElementTree.fromstring(write_rate_figure(search, tmp_path).read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["learning_rate.svg"]
    assert root.find(f".//{SVG}title").text and search.why in root.find(f".//{SVG}desc").text
    steps = next(p.get("d") for p in root.iter(f"{SVG}path") if p.get("class") == "c1 raw" and "L" in p.get("d"))
    points = [tuple(map(float, point.split())) for point in steps[1:].split("L")]
    assert [x for x, _ in points] == sorted(x for x, _ in points) and len(points) == len(search.rates)
    assert all(0 <= x <= 1000 and 0 <= y <= 210 for x, y in points)
    assert search.diverged or int(np.argmax([y for _, y in points])) == int(np.argmin(search.losses)), "low is down"
    texts = "".join(root.itertext())
    assert f"chosen {search.chosen:.2g}" in texts and f"usual {search.usual:.2g}" in texts
