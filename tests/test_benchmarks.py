"""Calculations, generated models and machine descriptions of the benchmarks.

No speed is measured here: the benchmarks are run manually.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from deltaw.hub.loading import load
from deltaw.kernels.processor import processor_name

pytest.importorskip("psutil")
FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the benchmarks importable as scripts of one folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("communication", "figures", "machine", "step", "step_models", "step_sides", "products", "peak"):
        sys.modules.pop(name, None)


def test_machine_lines_contain_flags_threads_and_versions(monkeypatch):
    import machine

    monkeypatch.setattr(machine, "processor_flags", lambda: {"avx2", "amx_int8", "nonsense"})
    monkeypatch.setenv("DELTAW_KERNELS", "avx2")
    text = "\n".join(machine.machine_lines(3))
    assert processor_name() in text and "; avx2 amx_int8; " in text and "nonsense" not in text
    torch_version = torch.__version__.partition("+")[0]
    assert "3 threads" in text and f"torch {torch_version}" in text and "DELTAW_KERNELS=avx2" in text


PUBLISHED = {"qwen2.5-0.5b": 494_032_768, "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824}
PUBLISHED["llama-3.1-8b"] = 8_030_261_248


@pytest.mark.parametrize("name", PUBLISHED)
def test_layer_counts_match_the_model(name):
    import step_models
    from transformers import AutoModelForCausalLM

    config = step_models.config_of(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert step_models.linear_shapes(config) == Counter((m.in_features, m.out_features) for m in blocks)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert step_models.parameter_count(config) == weights
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_random_weights_are_written_once_and_load_equally(tmp_path, monkeypatch):
    import step_models
    from transformers import AutoModelForCausalLM

    sizes = {**step_models.QWEN, "vocab_size": 97, "hidden_size": 28, "num_hidden_layers": 1}
    tiny = step_models.Size(1, 8, "Qwen2", tuple({**sizes, "intermediate_size": 16}.items()))
    monkeypatch.setitem(step_models.MODELS, "tiny", tiny)
    reference, folder = step_models.prepare_model("tiny", tmp_path)
    modified = (Path(folder) / "done").stat().st_mtime_ns
    assert step_models.prepare_model("tiny", tmp_path) == (reference, folder)
    assert (Path(folder) / "done").stat().st_mtime_ns == modified
    ours = load(reference, precision="bf16", device="cpu", log=lambda line: None).model
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    our_parameters = dict(ours.named_parameters())
    their_parameters = dict(theirs.named_parameters())
    assert our_parameters.keys() == their_parameters.keys()
    assert all(torch.equal(our_parameters[n], their_parameters[n]) for n in our_parameters)
    assert all(p.abs().max() > 0 for n, p in our_parameters.items() if n.endswith("bias"))


def test_ratios_use_the_best_peft_rate_per_round():
    import step

    rates = {
        "deltaw-auto": (200.0, 300.0, 90.0),
        "peft-fp32": (100.0, 100.0, 30.0),  # the fastest in two of three rounds
        "peft-bf16": (50.0, 60.0, 90.0),
        "peft-bf16-checkpointing": (400.0, 400.0, 400.0),  # not part of the comparison
        "floor-bf16": (100.0, 100.0, 100.0),
        "floor-fp32": (250.0, 400.0, 100.0),
    }
    results = {name: [{"tokens_per_second": s, "how": "fp32 (measured)"} for s in rates[name]] for name in rates}
    (line,) = step.summary(results)
    assert "3.00 times PEFT's best (peft-fp32; rounds 2.00 to 3.00)" in line
    assert "80% of torch's best exact product rate (floor-fp32)" in line and "fp32 (measured)" in line


def test_default_sides_exist_and_have_avx2_variants():
    import step

    assert set(step.DEFAULT_SIDES) | set(step.DEFAULT_AVX2_SIDES) <= set(step.SIDES)
    assert not [name for name in step.DEFAULT_AVX2_SIDES if "bf16" in name]  # emulated there
    compiled = {name for name, side in step.SIDES.items() if side.get("compiled")}
    assert compiled and compiled <= set(step.DEFAULT_SIDES)


SIDE = """
import json, sys
job = json.loads(sys.argv[1])
assert job["in_turns"]
for turn in range(3):
    print("of no interest")
    print("TURN", job["seconds"] * (turn + 1), flush=True)
    if job.get("fails"):
        sys.exit("it broke")
    assert sys.stdin.readline() == "\\n"
print("RESULT", json.dumps({"how": job["seconds"]}), flush=True)
"""


def test_sides_run_alternately(tmp_path, capsys):
    import step
    import step_sides

    script = tmp_path / "side.py"
    script.write_text(SIDE)
    job = {"model": "qwen2.5-0.5b", "threads": 1, "steps": 3 * step_sides.STEPS_PER_TURN}
    jobs = {"deltaw-auto": {**job, "seconds": 1}, "peft-bf16": {**job, "seconds": 4}}
    results = step_sides.run_in_turns(jobs, {name: {} for name in jobs}, str(script))
    # The first turn does not count: 512 tokens in 2 and in 3 s.
    assert [turn["tokens_per_second"] for turn in results["deltaw-auto"]] == [512 / 2, 512 / 3]
    assert [turn["how"] for turn in results["peft-bf16"]] == [4, 4]
    assert step.ratios(results, "deltaw-auto", "peft-bf16") == [4, 4]
    with pytest.raises(SystemExit, match="it broke"):
        step_sides.run_in_turns({"peft-bf16": {**jobs["peft-bf16"], "fails": True}}, {"peft-bf16": {}}, str(script))


def test_first_step_of_a_turn_is_not_timed(monkeypatch, capsys):
    import io

    import step_sides

    clock = iter([0.0, 9.0, 9.0, 10.0, 10.0, 12.0, 12.0, 15.0, 100.0])
    monkeypatch.setattr(step_sides.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    turns = step_sides.Turns({"in_turns": True})
    for _ in range(step_sides.STEPS_PER_TURN):
        turns.step_done()
    assert capsys.readouterr().out == "TURN 2.0\n"  # of 1, 2 and 3 s; the first took 9
    assert turns.start == 100.0  # waiting time is not part of a step


def test_model_rates_weigh_layers_by_count():
    import products
    from peak import Peak

    rows = [("fp32", [10, 5, 5], 3, 1.0, 2.0), ("fp32", [10, 5, 20], 1, 7.0, 4.0), ("int8", [10, 5, 5], 2, 0.5, 1.0)]
    keys = ("kind", "shape", "count", "deltaw", "torch")
    result = {"products": [dict(zip(keys, row, strict=True)) for row in rows], "notes": []}
    assert products.rate(result, "fp32", "deltaw") == (3 * 1000 + 4000) / (3 + 7)
    assert products.rate(result, "fp32", "torch") == 7000 / (6 + 4)
    peaks = {"fp32": Peak(1400.0, "a loop"), "int8": Peak(0.0, "unknown")}
    assert products.top_rate({"auto": result}, "fp32", peaks) == 1400.0
    assert products.top_rate({"auto": result}, "int8", peaks) == 2000.0  # the best that was measured
    lines = products.table("smollm2", {"auto": result}, peaks, ["fp32", "int8"])
    assert "100% of 0 | 100% of 0 | 50% of 0 |" in lines[2] and "100% of 0 |" in lines[3]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler was found")
def test_peaks_are_measured_for_supported_instructions():
    import peak

    flags = peak.processor_flags()
    for kind, measurement in peak.peaks(1).items():
        is_supported = any(flag in flags for flag, _, _ in peak.LOOPS[kind]) and peak.TILES.get(kind) not in flags
        assert (measurement.rate > 0) == is_supported, measurement.why


SFT = ("rows_per_second", "peak_bytes", "held_out_loss")


def test_stored_figures_are_inserted_as_tables_and_values(monkeypatch, tmp_path):
    import figures

    step = {"deltaw-auto": (80.0, 1.5e9), "peft-fp32": (20.0, 3e9), "peft-bf16": (40.0, 2e9)}
    sft = {"16|deltaw auto": (30.0, 1e9, 0.341), "16|TRL fp32": (3.0, 4e9, 0.342)}
    results = {
        "step": {
            "floor-bf16": [{"tokens_per_second": 90.0}],
            **{name: [{"tokens_per_second": s, "peak_bytes": peak}] for name, (s, peak) in step.items()},
        },
        "sft": {"sarcasm": {n: [dict(zip(SFT, values, strict=True))] for n, values in sft.items()}},
        "decode": {"16": {"deltaw": [800.0, 900.0], "llama.cpp": [200.0, 300.0]}},
    }
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    record = {"command": "benchmarks/a.py", "machine": ["processor: A CPU (x86_64, Linux); avx2", "versions: torch 2"]}
    for name, result in results.items():
        text = json.dumps(record | {"commit": "abc", "date": "2026-11-28", "results": result})
        (tmp_path / f"{name}.json").write_text(text)
    page = "".join(f"<!-- figures: {name} -->\nold\n<!-- /figures -->\n" for name in results)
    filled = figures.with_figures(page)
    assert "| deltaw-auto | 80 | 2.00 | 1.50 GB |" in filled and "old" not in filled
    assert "| sarcasm, deltaw auto | 30.0 | 10.00 | 1.00 GB | 0.3410 |" in filled
    assert "| 16, deltaw | 850 | 3.50 |" in filled and "`benchmarks/a.py`, 2026-11-28, commit abc." in filled
    assert figures.with_figures(filled) == filled
    values = [figures.value("step", key) for key in ("cpu", "date", "deltaw-auto", "deltaw-auto; peak memory")]
    assert values == ["A CPU", "2026-11-28", "2.0×", "1.50 GB"]
    line = "<!-- figure: sft sarcasm, deltaw auto -->1×<!-- /figure -->"
    assert figures.with_figures(line) == line.replace("1×", "10.0×")
    with pytest.raises(ValueError, match="has no side 'nobody'"):
        figures.value("step", "nobody")


def test_pages_show_the_stored_figures():
    import figures

    assert len({name for page in figures.PAGES for name in figures.TABLE.findall(page.read_text("utf-8"))}) > 3
    for page in figures.PAGES:
        text = page.read_text(encoding="utf-8")
        assert figures.with_figures(text) == text, f"{page.name}: run python benchmarks/figures.py --insert"


def test_figures_use_existing_benchmark_flags():
    import figures

    for script, *flags in figures.COMMANDS.values():
        text = (FOLDER / script).read_text(encoding="utf-8")
        assert all(f'"{flag}"' in text for flag in ["--json", *flags] if flag.startswith("--"))
