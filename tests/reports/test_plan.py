"""Plans are readable in 80 columns, with proportional bars in the terminal and in the figure."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from rich.console import RenderableType

from deltaw.memory.plan import KINDS, FittingPlan, Plan
from deltaw.reports.comparison import draw_plans
from deltaw.reports.plan import (
    BAR,
    MIN_SHARE,
    PARTS,
    budget_table,
    long_rows_lines,
    plan_bars,
    plan_lines,
    plan_report,
    process_parts,
)
from deltaw.reports.tables import gigabytes
from tests.reports.consoles import render_text

MB = 10**6
SVG = "{http://www.w3.org/2000/svg}"
SIZES = dict(zip(KINDS, (2698, 1234, 2345, 4680, 1912, 49, 1, 312), strict=True))


def make_plan(method: str, trained: int, scale: float = 1.0) -> Plan:
    parts = {kind: int(size * MB * scale) for kind, size in SIZES.items()}
    peak = sum(parts.values())
    resident = {"process": 420 * MB, "tensors": peak, "kernels": 200 * MB, "allocator": 90 * MB, "saving": 41 * MB}
    metadata = {"method": method, "total_parameters": 1_235_814_400, "trained_parameters": trained, "precision": "bf16"}
    peak_position = {"phase": "backward", "module": "model.layers.12.mlp", "tokens": 1024, "rows": 16}
    return Plan(
        **metadata,
        **peak_position,
        peak_bytes=peak,
        peak_resident_bytes=sum(resident.values()),
        parts=parts,
        resident=resident,
    )


PLANS = {"lora": make_plan("lora", 11_272_192), "prompt": make_plan("prompt", 40_960, 0.5)}
PLANS |= {"random": make_plan("random", 12_358_144, 1.1), "full": make_plan("full", 1_235_814_400, 6.3)}


def render_lines(renderable: RenderableType, *, soft_wrap: bool = True) -> list[str]:
    """Return the lines on a terminal with 80 columns."""
    return render_text(renderable, soft_wrap=soft_wrap, markup=False, highlight=False).splitlines()


@pytest.mark.parametrize("soft_wrap", [True, False])
def test_report_fits_80_columns_without_truncation(soft_wrap):
    lines = render_lines(plan_report(PLANS, "lora", 16 * 10**9), soft_wrap=soft_wrap)
    assert max(len(line.rstrip()) for line in lines) <= 80
    text = " ".join(" ".join(lines).split())
    assert "…" not in text
    for name, plan in PLANS.items():
        (line,) = (line for line in lines if re.match(rf"{name} +[\d,]+ ", line))
        assert f"{plan.trained_parameters:,}" in line
        assert gigabytes(plan.peak_bytes) in line and gigabytes(plan.peak_resident_bytes) in line
    assert "100.00%" in text and "11,272,192 of 1,235,814,400 parameters trained (0.91%)" in text
    assert "backward, at model.layers.12.mlp" in text


def test_parts_of_own_method_sum_to_process_memory():
    plan = PLANS["lora"]
    assert sum(process_parts(plan).values()) == plan.peak_resident_bytes
    assert process_parts(plan).keys() == {part for part, *_ in PARTS}
    lines = render_lines(plan_report({"lora": plan}, "lora", 16 * 10**9))
    text = "\n".join(lines)
    others = [size for name, size in plan.resident.items() if name != "tensors"]
    small = [size for size in (*plan.parts.values(), *others) if size < MIN_SHARE * plan.peak_resident_bytes]
    for size in (*plan.parts.values(), *others, plan.peak_resident_bytes):
        assert (gigabytes(size) in text) is (size not in small)
    assert any(line.split() == ["other", *gigabytes(sum(small)).split()] for line in lines)
    assert "method  " not in text and "█" not in text  # no comparison for a single method


REPORT_CASES = [(16, 1, "needs 13.98 GB of the 16.00 GB that are free: fits")]
REPORT_CASES += [(13, 1, "needs 13.98 GB of the 13.00 GB that are free: does not fit")]
REPORT_CASES += [(30, 2, "2 processes need 13.98 GB each, 27.96 GB of the 30.00 GB that are free: fits")]


@pytest.mark.parametrize(("free", "processes", "first"), REPORT_CASES)
def test_report_starts_with_total_and_fit(free, processes, first):
    lines = render_lines(plan_report({"lora": PLANS["lora"]}, "lora", free * 10**9, processes))
    assert lines[0].rstrip() == first
    assert ("--fit-memory 13GB" in lines[1]) is (free == 13)


def test_costly_long_rows_are_reported():
    plan = replace(PLANS["lora"], tokens=8192, phases={"training": PLANS["lora"].peak_resident_bytes, "reading": 0})
    plan = replace(plan, phases={**plan.phases, "loading": 0, "saving": 0})
    lines = long_rows_lines(plan.without_long_rows(1024, 3, 60, 1024))
    assert lines[0] == "3 of 60 rows are longer than 1,024 tokens and set the peak:"
    assert "about 11.87 GB" in lines[1] and "data.max_length: 1024, data.long_rows: drop" in lines[1]
    assert max(map(len, lines)) <= 80
    assert long_rows_lines(plan.without_long_rows(1024, 3, 60, 8000)) == []


def test_bars_are_proportional_with_legend():
    lines = render_lines(plan_bars(PLANS))
    assert max(len(line.rstrip()) for line in lines) <= 80
    largest = max(plan.peak_resident_bytes for plan in PLANS.values())
    for (name, plan), line in zip(PLANS.items(), lines, strict=False):
        assert line.split()[0] == name and line.rstrip().endswith(gigabytes(plan.peak_resident_bytes))
        assert line.count("█") == round(BAR * plan.peak_resident_bytes / largest)
    legend = " ".join(lines[len(PLANS) :])
    labels = {part: label for part, label, *_ in PARTS}
    assert all(labels[part] in legend for part in ("weights", "optimizer", "activations", "process"))
    assert labels["batch"] not in legend  # too small for the legend


def test_budget_table_fits_80_columns_with_relative_times():
    fitting = [FittingPlan("lora", 16, 1024, False, "bf16", PLANS["lora"], 0.5)]
    fitting += [FittingPlan("random", None, 128, True, "bf16", PLANS["full"], 1.25)]
    for soft_wrap in (True, False):
        lines = render_lines(budget_table(fitting), soft_wrap=soft_wrap)
        text = "\n".join(lines)
        assert "…" not in text and "tokens per pass" in text and max(len(line.rstrip()) for line in lines) <= 80
        first, second = (next(line for line in lines if line.startswith(n)) for n in ("lora", "random"))
        assert first.split()[1:5] == ["16", "1,024", "off", "bf16"] and first.rstrip().endswith("1.00 x")
        assert second.split()[1:4] == ["128", "on", "bf16"] and second.rstrip().endswith("2.50 x")


def test_plan_of_run_takes_two_lines():
    plan = PLANS["lora"]
    first, second = plan_lines(plan, 16 * 10**9)
    assert gigabytes(plan.peak_resident_bytes) + " of 16.00 GB" in first and "backward" in first
    sizes = re.findall(r"[\d.]+ [GMk]B", second)
    assert sizes[0] == gigabytes(max(process_parts(plan).values())) and len(sizes) == 4
    assert " of " not in plan_lines(plan, None)[0].partition(",")[0]


def test_sizes_have_three_digits_and_unit():
    sizes = {0: "0 kB", 49_600: "50 kB", 1_200_000: "1.2 MB", 45_000_000: "45.0 MB", 257_000_000: "257 MB"}
    sizes |= {1_234_000_000: "1.23 GB", 123_400_000_000: "123.40 GB"}
    assert [gigabytes(size) for size in sizes] == list(sizes.values())


def test_figure_shows_bar_and_total_of_each_method():
    name = "<b>&\"'\x00\ud800" + 40 * "W"
    root = ElementTree.fromstring(draw_plans({**PLANS, name: PLANS["lora"]}))
    texts = [text.text for text in root.iter(SVG + "text")]
    assert {*PLANS, "<b>&\"'\ufffd\ufffd" + 17 * "W" + "…"} <= set(texts)
    assert {gigabytes(plan.peak_resident_bytes) for plan in PLANS.values()} <= set(texts)
    widths: dict[str, list[float]] = {}
    for rect in root.iter(SVG + "rect"):
        if rect.get("width").endswith("%") and rect.get("y"):
            widths.setdefault(rect.get("y"), []).append(float(rect.get("width").rstrip("%")))
    largest = max(plan.peak_resident_bytes for plan in PLANS.values())
    shares = [100 * plan.peak_resident_bytes / largest for plan in [*PLANS.values(), PLANS["lora"]]]
    assert [sum(parts) for parts in widths.values()] == pytest.approx(shares, abs=0.02)
    labels = {label for part, label, _ in PARTS if part not in ("logits", "batch")}
    assert labels < set(texts) and not {"logits", "batch"} & set(texts)  # too small for the legend


@pytest.mark.parametrize("count", [1, 40])
def test_figure_grows_with_number_of_methods(count):
    root = ElementTree.fromstring(draw_plans({f"method-{n}": PLANS["lora"] for n in range(count)}))
    heights = {float(text.get("y")) for text in root.iter(SVG + "text") if text.get("class") == "name"}
    assert len(heights) == count and max(heights) < int(root.get("height"))
