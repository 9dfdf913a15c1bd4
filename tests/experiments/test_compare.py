"""Comparisons of methods: requests, stored results, resuming after interruption, and tables."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from deltaw.errors import UserError
from deltaw.experiments.compare import compare
from deltaw.experiments.jobs import WorkerExited, WorkerProcess
from deltaw.machine import kernel_choice, product_rates
from deltaw.machine.memory import peak_resident_bytes
from deltaw.reports.comparison import comparison_tables, draw_comparison
from deltaw.settings.config import RunConfig
from deltaw.training.session import read_data
from tests.conftest import deep_merge, write_rows
from tests.experiments.conftest import LocalWorker, use_local_worker

METHODS = ["lora", "head", "last"]


def run_compare(settings, folder, methods=METHODS, **options):
    out = io.StringIO()
    console = Console(file=out, width=200)
    comparison = compare(RunConfig.read(settings), methods, folder=folder, log=console.print, **options)
    return comparison, out.getvalue()


def run_full_compare(study_settings, base, methods, changes, **options):
    """Run a comparison with real training in this process. Returns settings, folder, results, log and requests."""
    settings = study_settings(base / "run", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_CACHE", str(base / "cache"))
        use_local_worker(patch)
        comparison, output = run_compare(settings, base / "out", methods, **options)
        by_name = {result.method: result for result in comparison.results}
        values = {"settings": settings, "folder": base / "out", "comparison": comparison, "by_name": by_name}
        return SimpleNamespace(**values, output=output, requests=list(LocalWorker.requests))


class TestThreeMethods:
    """Several checks of one comparison. Tests that modify it use a copy."""

    @pytest.fixture(scope="class")
    def study(self, study_settings, tmp_path_factory):
        # `last` fails because its settings ask for more blocks than the model has.
        blocks = {"last": {"blocks": 3}}
        base = tmp_path_factory.mktemp("comparison")
        return run_full_compare(study_settings, base, METHODS, blocks, draw=draw_comparison)

    @pytest.fixture
    def repeat(self, study, synthetic_worker, tmp_path):
        """Return a function that repeats the comparison in a copy of its folder and returns its requests."""
        shutil.copytree(study.folder, tmp_path / "out")

        def run(methods=METHODS, changes=None, **options):
            synthetic_worker.requests = []
            merged = {**study.settings, **(changes or {})}
            return *run_compare(merged, tmp_path / "out", methods, **options), list(synthetic_worker.requests)

        return run

    def test_each_method_is_tuned_before_training(self, study):
        requests = study.requests
        assert next(request for request in requests if not request.startswith("usual")) == "base"
        for method in ("lora", "head"):
            assert requests.count(f"usual {method}") == 1 and requests.count(f"run {method}") == 1
        assert requests.index("run lora") > max(n for n, request in enumerate(requests) if request.startswith("rate"))
        for result in study.comparison.scored:
            losses = dict(result.rates)
            assert 3 <= len(losses) <= 4
            assert losses[result.learning_rate] == min(losses.values())

    def test_result_of_method_is_complete(self, study):
        lora = study.by_name["lora"]
        comparison = study.comparison
        run = study.folder / "lora" / "seed-0"
        assert lora.steps == 6 and lora.seconds > 0
        assert lora.trained_parameters == 4 * sum(2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48) for _ in range(2))
        assert json.loads((run / "adapter_config.json").read_text())["r"] == study.settings["lora"]["rank"]
        assert lora.adapter_bytes == sum(p.stat().st_size for p in run.glob("adapter_*"))
        assert 0 < lora.peak_bytes <= peak_resident_bytes()
        assert lora.total_parameters > lora.trained_parameters
        assert comparison.held_out_rows == 8 and comparison.metric == "exact_match"
        assert comparison.base.score is not None and comparison.base.trained_parameters == 0

    def test_results_are_sorted_and_failed_method_has_reason(self, study):
        first, second, last = study.comparison.results
        assert list(study.comparison.scored) == [first, second]
        assert first.score >= second.score and first.difference == 0
        assert second.difference == pytest.approx(second.score - first.score)
        assert second.difference_interval[0] <= second.difference <= second.difference_interval[1]
        assert last.method == "last" and last.score is None and "blocks" in last.error
        assert "last: not possible" in study.output

    def test_tables_page_json_figure_and_log_are_written(self, study):
        out = io.StringIO()
        for width in (80, 200):
            for table in comparison_tables(study.comparison, width):
                Console(file=out, width=width).print(table)
        assert "…" not in out.getvalue()
        page = (study.folder / "comparison.md").read_text()
        for result in study.comparison.scored:
            assert f"{result.trained_parameters:,}" in page and f"{result.trained_parameters:,}" in out.getvalue()
        assert "- last: " in page and "| untrained |" in page
        assert json.loads((study.folder / "comparison.json").read_text())["methods"][0]["method"] in METHODS
        assert (study.folder / "comparison.svg").read_text().startswith("<svg ")
        assert study.output.count("validation loss") >= 6 and study.output.count(": trained at ") == 2
        assert "not flattened in 6 steps" in study.output and " so far, about " in study.output

    def test_repeated_call_reuses_results(self, study, repeat):
        comparison, _, requests = repeat(["head", "lora"])
        assert requests == []
        assert {r.method: r.score for r in comparison.results} == {m: study.by_name[m].score for m in ("head", "lora")}

    def test_additional_method_is_added_to_study(self, repeat):
        comparison, _, requests = repeat(["lora", "bias"], rates={"bias": [1e-2]})
        assert requests == ["run bias"]
        assert {result.method for result in comparison.scored} == {"lora", "bias"}

    def test_explicit_rates_extend_stored_rates(self, repeat, study):
        stored_rate = min(rate for rate, _ in study.by_name["head"].rates)
        comparison, _, requests = repeat(["head"], rates={"head": [stored_rate, 1e-7]})
        assert requests == ["rate head", "run head"]
        assert sorted(r for r, _ in comparison.results[0].rates) == [1e-7, stored_rate]

    def test_changed_method_setting_restarts_only_that_method(self, repeat):
        _, output, requests = repeat(["lora", "head"], {"head": {"modules": ["lm_head"]}})
        assert "head starts over: head.modules was None, is ['lm_head']" in output
        assert "lora: done before" in output
        assert set(requests) == {"usual head", "rate head", "run head"} and requests.count("run head") == 1

    def test_changed_rows_restart_all_methods(self, repeat, study, tmp_path):
        text = Path(study.settings["data"]["train"]).read_text()
        file = tmp_path / "rows.jsonl"
        data = {"data": {**study.settings["data"], "train": str(file)}}
        file.write_text(text)
        repeat(["head"], data, rates={"head": [1e-3]})
        file.write_text(text.replace("paint", "draw"))
        _, output, requests = repeat(["head"], data, rates={"head": [1e-3]})
        assert "head starts over: the file data.train has changed" in output
        assert requests == ["base", "run head"]


def test_interruption_loses_at_most_one_request(synthetic_worker, intercept_requests, study_settings, tmp_path):
    settings = study_settings(tmp_path / "run")

    def interrupt(kind, config):
        if kind == "rate" and synthetic_worker.requests.count("rate head") == 1:
            raise KeyboardInterrupt

    with intercept_requests(interrupt), pytest.raises(KeyboardInterrupt):
        run_compare(settings, tmp_path / "out", ["head"])
    comparison, output = run_compare(settings, tmp_path / "out", ["head"])
    assert "head: 1 learning rates tried before" in output
    num_tried = len(comparison.results[0].rates) - 1
    assert synthetic_worker.requests == ["rate head"] * num_tried + ["run head"]


def test_fixed_rate_skips_search_and_failed_run_is_replaced(
    synthetic_worker, intercept_requests, study_settings, tmp_path
):
    settings = study_settings(tmp_path / "run", train={"learning_rate": 2e-3})
    run = tmp_path / "out" / "head" / "seed-0"

    def kill(kind, config):
        if kind == "run":
            run.mkdir(parents=True)
            (run / "metrics.jsonl").write_text("")
            raise WorkerExited("its process was ended by SIGKILL")

    with intercept_requests(kill), pytest.raises(UserError, match="SIGKILL"):
        run_compare(settings, tmp_path / "out", ["head"])
    comparison, _ = run_compare(settings, tmp_path / "out", ["head"])
    (result,) = comparison.results
    assert result.score is not None and result.learning_rate == 2e-3 and result.rates == ()
    assert synthetic_worker.requests == ["base", "run head"]
    assert list(run.parent.iterdir()) == [run] and not list(run.iterdir())


class TestSeeds:
    """Three seeds of two methods at fixed learning rates."""

    OPTIONS = {"methods": ["lora", "head"], "rates": {"lora": [1e-2], "head": [1e-2]}}  # noqa: RUF012 - never changed

    @pytest.fixture(scope="class")
    def study(self, study_settings, tmp_path_factory):
        base = tmp_path_factory.mktemp("seeds")
        options = {**self.OPTIONS, "seeds": 3, "reference": "head"}
        return run_full_compare(study_settings, base, changes={"train": {"seed": 5}}, **options)

    def test_seeds_run_in_turn_on_equal_rows(self, study):
        assert study.requests == ["base", *["run lora", "run head"] * 3]
        stored = json.loads((study.folder / "pieces" / "lora.json").read_text())["runs"]
        assert list(stored) == ["5", "6", "7"] == [str(seed) for seed in study.comparison.seeds]
        assert len({run["validation_loss"] for run in stored.values()}) == 3
        held_out = set()
        for seed in (5, 6, 7):
            config = RunConfig.read(study.folder / "lora" / f"seed-{seed}" / "run.yaml")
            assert config.train.seed == seed and config.data_seed == 5
            held_out.add(tuple(example.row for example in read_data(config)[1].held_out))
        assert len(held_out) == 1

    def test_score_is_mean_and_difference_is_to_reference(self, study):
        for result in study.by_name.values():
            assert len(result.seeds) == 3
            assert result.score == pytest.approx(sum(seed.score for seed in result.seeds) / 3)
            assert 0 <= result.interval[0] <= result.score <= result.interval[1] <= 1
        lora = study.by_name["lora"]
        head = study.by_name["head"]
        assert study.comparison.reference == "head" and head.difference == 0
        assert lora.difference == pytest.approx(lora.score - head.score)
        assert lora.difference_interval[0] <= lora.difference <= lora.difference_interval[1]

    def test_page_and_json_contain_seeds(self, study):
        page = (study.folder / "comparison.md").read_text()
        assert "## Seed by seed" in page and "to head (95 % interval)" in page and "3 seeds" in page
        numbers = json.loads((study.folder / "comparison.json").read_text())
        assert numbers["seeds"] == [5, 6, 7] and numbers["reference"] == "head"
        assert [len(method["seeds"]) for method in numbers["methods"]] == [3, 3]
        assert numbers["methods"][0]["flattened"] is False
        assert all(seed["validation"] for method in numbers["methods"] for seed in method["seeds"])
        assert any("Not flattened when the budget ended: " in line for line in numbers["findings"])
        assert not any("One seed is weak evidence" in line for line in numbers["findings"])

    def test_changed_number_of_seeds_reuses_results(self, study, synthetic_worker, tmp_path):
        shutil.copytree(study.folder, tmp_path / "out")
        _, output = run_compare(study.settings, tmp_path / "out", **self.OPTIONS, seeds=4)
        assert synthetic_worker.requests == ["run lora", "run head"] and "lora: 3 of 4 seeds trained before" in output
        synthetic_worker.requests = []
        single, output = run_compare(study.settings, tmp_path / "out", **self.OPTIONS)
        assert synthetic_worker.requests == [] and "lora: done before" in output
        assert {r.method: r.score for r in single.results} == {m: r.seeds[0].score for m, r in study.by_name.items()}

    def test_interruption_between_seeds_loses_no_seed(self, study, synthetic_worker, intercept_requests, tmp_path):
        reference, _ = run_compare(study.settings, tmp_path / "whole", **self.OPTIONS, seeds=3)
        synthetic_worker.requests = []

        def interrupt(kind, config):
            if synthetic_worker.requests.count("run lora") == 2 and kind == "run":
                raise KeyboardInterrupt

        with intercept_requests(interrupt), pytest.raises(KeyboardInterrupt):
            run_compare(study.settings, tmp_path / "out", **self.OPTIONS, seeds=3)
        partial = json.loads((tmp_path / "out" / "comparison.json").read_text())
        assert partial["seeds"] == [5] and all(m["score"] is not None for m in partial["methods"])
        resumed, _ = run_compare(study.settings, tmp_path / "out", **self.OPTIONS, seeds=3)
        assert synthetic_worker.requests == ["run head", "run lora", "run head"]
        assert resumed.results == reference.results

    def test_diverging_seed_is_reported_and_method_not_scored(self, study, intercept_requests, tmp_path):
        def diverge(kind, config):
            if kind == "run" and config["method"] == "lora" and config["train"]["seed"] == 6:
                raise UserError("training diverged")

        with intercept_requests(diverge):
            comparison, output = run_compare(study.settings, tmp_path / "out", **self.OPTIONS, seeds=2)
        assert "lora: not possible: seed 6: training diverged" in output
        assert comparison.results[-1].method == "lora" and comparison.results[-1].score is None
        assert len(comparison.results[0].seeds) == 2


def test_constant_answers_are_not_ranked(local_worker, study_settings, tmp_path):
    """The answers cannot be predicted from the rows, so the model learns the most frequent answer."""
    rows = [{"prompt": f"row {n}", "completion": "b" if n * 7919 % 101 % 4 == 0 else "a"} for n in range(60)]
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "eval": 20, "seed": 3}
    settings = study_settings(tmp_path / "run", data=data, train={"max_steps": 20})
    rates = {"lora": [0.05], "head": [1e-6]}
    comparison, output = run_compare(settings, tmp_path / "out", ["head", "lora"], rates=rates)
    lora = next(result for result in comparison.results if result.method == "lora")
    assert [seed.single_answer for seed in lora.seeds] == ["a"]
    assert lora.gives_constant_answer and not lora.ranked and lora.score == comparison.constant_score > 0.5
    assert comparison.ranked[0].method == "head", "its answers differ, though all of them are wrong"
    assert "lora: trained at 0.05: one answer to every row ('a')" in output
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "lora learned nothing: it gives every row the same answer" in page
    assert "head is not clearly better than the answer 'a' to every row" in page


def test_time_limit_is_used_as_budget(local_worker, study_settings, tmp_path):
    settings = study_settings(tmp_path / "run", train={"time": "1s", "max_steps": 30})
    comparison, _ = run_compare(settings, tmp_path / "out", ["head"], rates={"head": [1e-3]})
    assert 1 <= comparison.results[0].steps <= 30


def test_divergence_at_all_rates_is_reported(intercept_requests, study_settings, tmp_path):
    diverged = intercept_requests(lambda kind, config: {"loss": None} if kind == "rate" else None)
    with diverged, pytest.raises(UserError, match="diverged at every learning rate tried, down to"):
        run_compare(study_settings(tmp_path / "run"), tmp_path / "out", ["head"])


INVALID_COMPARISONS = [({}, {"methods": ["lra"]}, "did you mean 'lora'"), ({}, {"methods": []}, "no method is given")]
INVALID_COMPARISONS += [({}, {"methods": ["head"], "reference": "lora"}, "--reference")]
INVALID_COMPARISONS += [({"data": {"eval": None}}, {"methods": ["lora"]}, "no rows are held out")]
INVALID_COMPARISONS += [({"data": {"train": "no.jsonl"}}, {"methods": ["lora", "head"]}, r"no\.jsonl")]
INVALID_COMPARISONS += [({"train": {"time": "soon"}}, {"methods": ["head"]}, r"train\.time")]


@pytest.mark.parametrize(("changes", "options", "message"), INVALID_COMPARISONS)
def test_invalid_comparison_is_rejected_without_files(
    changes, options, message, local_worker, study_settings, tmp_path
):
    with pytest.raises(UserError, match=message):
        run_compare(deep_merge(study_settings(tmp_path / "run"), changes), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_unrelated_folder_is_rejected(local_worker, study_settings, finished_run, tmp_path):
    (tmp_path / "thesis.tex").write_text("kept")
    for folder in (finished_run, tmp_path):
        with pytest.raises(UserError, match="not a comparison's"):
            run_compare(study_settings(tmp_path / "run"), folder, ["head"])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_worker_process_inherits_rates_and_reports_errors(study_settings, tmp_path, monkeypatch):
    monkeypatch.delenv("DELTAW_MEASURED")
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    for name in ("_used", "_imported_rates"):
        monkeypatch.setattr(product_rates, name, {})
    candidates = product_rates.candidates()
    rates = {candidate.weight_type: {} for candidate in candidates}
    for candidate in candidates:
        rates[candidate.weight_type][candidate.name] = 123.0
    key = kernel_choice._key(product_rates.GENERIC, 1, candidates)
    product_rates.store(key, {"rates": rates, "disturbed": True}, persistent=False)
    plain = RunConfig.read(study_settings(tmp_path / "run", method="head")).model_dump(mode="json")
    with WorkerProcess(tmp_path / "log") as child:
        child.ask("usual", config={**plain, "precision": "auto"})
        assert product_rates.used_rates().items() <= product_rates._imported_rates.items(), "it measured them again"
        with pytest.raises(UserError, match=r"no model"):
            child.ask("rate", config={**plain, "model": str(tmp_path / "none")})
        answer = child.ask("run", config=plain)
        assert answer["steps"] == 6 and len(answer["per_row"]) == 8
        assert answer["peak_memory_bytes"] > 5e7 and math.isfinite(answer["seconds"])
        child._process.kill()
        with pytest.raises(WorkerExited, match="SIGKILL"):
            child.ask("rate", rate=1e-3, share=0.3)
