"""Tests of the table of model families."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import families_page

QUICK = {"qwen3": "fused", "olmo2": "fused", "qwen3_5_text": "attention", "granitemoehybrid": "attention"}


@pytest.mark.parametrize("family", QUICK)
def test_a_family_keeps_its_features(family):
    before = families_page.listed(families_page.PAGE.read_text(encoding="utf-8"))[family]
    now = families_page.support_of(family)
    assert now.packed == "yes"
    assert now.blocks == QUICK[family]
    assert not families_page.lost(before, now)


@pytest.mark.slow
def test_no_family_lost_a_feature():
    assert families_page.main(["--check"]) == 0


def test_lost_features_are_named():
    before = families_page.Support("a", "yes", "fused", "yes", "")
    now = families_page.Support("a", "", "parts", "yes", "yes")
    assert families_page.lost(before, now) == ["packed", "blocks"]
    assert not families_page.lost(before, before)
