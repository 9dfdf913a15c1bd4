"""Methods compared: what is run, what is kept, what goes on after an interruption, what the table says."""

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
from deltaw.experiments.jobs import Child, WorkerEnded
from deltaw.machine import kernel_choice, product_rates
from deltaw.machine.memory import peak_resident_bytes
from deltaw.reports.comparison import comparison_tables, draw_comparison
from deltaw.settings import RunConfig
from deltaw.training.session import read_data
from tests.conftest import laid_over, write_rows
from tests.experiments.conftest import WorkerHere, use_worker_here

METHODS = ["lora", "head", "last"]


def compared(settings, folder, methods=METHODS, **given):
    out = io.StringIO()
    console = Console(file=out, width=200)
    comparison = compare(RunConfig.read(settings), methods, folder=folder, say=console.print, **given)
    return comparison, out.getvalue()


def really_compared(study_settings, base, methods, changes, **given):
    """A comparison that trains, in this process: its settings, folder, results, lines and requests."""
    settings = study_settings(base / "run", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_CACHE", str(base / "cache"))
        use_worker_here(patch)
        comparison, said = compared(settings, base / "out", methods, **given)
        by_name = {result.method: result for result in comparison.results}
        found = {"settings": settings, "folder": base / "out", "comparison": comparison, "by_name": by_name}
        return SimpleNamespace(**found, said=said, asked=list(WorkerHere.asked))


class TestThreeMethods:
    """One comparison, looked at from several sides; those that change something copy it."""

    @pytest.fixture(scope="class")
    def done(self, study_settings, tmp_path_factory):
        # One block: `last` cannot train two, as its settings ask.
        blocks = {"last": {"blocks": 3}}
        base = tmp_path_factory.mktemp("comparison")
        return really_compared(study_settings, base, METHODS, blocks, draw=draw_comparison)

    @pytest.fixture
    def again(self, done, untrained, tmp_path):
        """The same comparison in a copy of its folder, with what is asked of the worker."""
        shutil.copytree(done.folder, tmp_path / "out")

        def run(methods=METHODS, changes=None, **given):
            untrained.asked = []
            merged = {**done.settings, **(changes or {})}
            return *compared(merged, tmp_path / "out", methods, **given), list(untrained.asked)

        return run

    def test_each_method_is_tuned_and_then_trained(self, done):
        asked = done.asked
        assert next(what for what in asked if not what.startswith("usual")) == "base"
        for method in ("lora", "head"):
            assert asked.count(f"usual {method}") == 1 and asked.count(f"run {method}") == 1
        assert asked.index("run lora") > max(n for n, what in enumerate(asked) if what.startswith("rate"))
        for result in done.comparison.scored:
            losses = dict(result.rates)
            assert 3 <= len(losses) <= 4
            assert losses[result.learning_rate] == min(losses.values())

    def test_all_numbers_of_a_method_are_there(self, done):
        lora, comparison, run = done.by_name["lora"], done.comparison, done.folder / "lora" / "seed-0"
        assert lora.steps == 6 and lora.seconds > 0
        assert lora.trained_parameters == 4 * sum(2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48) for _ in range(2))
        assert json.loads((run / "adapter_config.json").read_text())["r"] == done.settings["lora"]["rank"]
        assert lora.adapter_bytes == sum(p.stat().st_size for p in run.glob("adapter_*"))
        assert 0 < lora.peak_bytes <= peak_resident_bytes()
        assert lora.total_parameters > lora.trained_parameters
        assert comparison.held_out_rows == 8 and comparison.metric == "exact_match"
        assert comparison.base.score is not None and comparison.base.trained_parameters == 0

    def test_the_best_comes_first_and_a_method_that_cannot_run_last_with_the_reason(self, done):
        first, second, last = done.comparison.results
        assert list(done.comparison.scored) == [first, second]
        assert first.score >= second.score and first.difference == 0
        assert second.difference == pytest.approx(second.score - first.score)
        assert second.difference_interval[0] <= second.difference <= second.difference_interval[1]
        assert last.method == "last" and last.score is None and "blocks" in last.error
        assert "last: not possible" in done.said

    def test_table_page_numbers_figure_and_lines_are_written(self, done):
        out = io.StringIO()
        for width in (80, 200):
            for table in comparison_tables(done.comparison, width):
                Console(file=out, width=width).print(table)
        assert "…" not in out.getvalue()
        page = (done.folder / "comparison.md").read_text()
        for result in done.comparison.scored:
            assert f"{result.trained_parameters:,}" in page and f"{result.trained_parameters:,}" in out.getvalue()
        assert "- last: " in page and "| untrained |" in page
        assert json.loads((done.folder / "comparison.json").read_text())["methods"][0]["method"] in METHODS
        assert (done.folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
        assert done.said.count("validation loss") >= 6 and done.said.count(": trained at ") == 2
        assert "not flattened in 6 steps" in done.said and " so far, about " in done.said

    def test_a_second_call_runs_nothing_that_is_done(self, done, again):
        comparison, _, asked = again(["head", "lora"])
        assert asked == []
        assert {r.method: r.score for r in comparison.results} == {m: done.by_name[m].score for m in ("head", "lora")}

    def test_another_method_is_added_to_what_is_there(self, again):
        comparison, _, asked = again(["lora", "bias"], rates={"bias": [1e-2]})
        assert asked == ["run bias"]
        assert {result.method for result in comparison.scored} == {"lora", "bias"}

    def test_rates_that_are_named_are_tried_beside_those_that_are_known(self, again, done):
        known = min(rate for rate, _ in done.by_name["head"].rates)
        comparison, _, asked = again(["head"], rates={"head": [known, 1e-7]})
        assert asked == ["rate head", "run head"]
        assert sorted(r for r, _ in comparison.results[0].rates) == [1e-7, known]

    def test_a_setting_of_one_method_starts_that_one_anew(self, again):
        _, said, asked = again(["lora", "head"], {"head": {"modules": ["lm_head"]}})
        assert "head starts anew: head.modules was None, is ['lm_head']" in said
        assert "lora: done before" in said
        assert set(asked) == {"usual head", "rate head", "run head"} and asked.count("run head") == 1

    def test_changed_rows_start_all_methods_anew(self, again, done, tmp_path):
        text = Path(done.settings["data"]["train"]).read_text()
        file = tmp_path / "rows.jsonl"
        data = {"data": {**done.settings["data"], "train": str(file)}}
        file.write_text(text)
        again(["head"], data, rates={"head": [1e-3]})
        file.write_text(text.replace("paint", "draw"))
        _, said, asked = again(["head"], data, rates={"head": [1e-3]})
        assert "head starts anew: the file data.train has changed" in said
        assert asked == ["base", "run head"]


def test_an_interruption_loses_one_piece_at_most(untrained, meddling, study_settings, tmp_path):
    settings = study_settings(tmp_path / "run")

    def interrupt(do, config):
        if do == "rate" and untrained.asked.count("rate head") == 1:
            raise KeyboardInterrupt

    with meddling(interrupt), pytest.raises(KeyboardInterrupt):
        compared(settings, tmp_path / "out", ["head"])
    comparison, said = compared(settings, tmp_path / "out", ["head"])
    assert "head: 1 learning rates tried before" in said
    tried = len(comparison.results[0].rates) - 1
    assert untrained.asked == ["rate head"] * tried + ["run head"]


def test_a_fixed_rate_is_taken_without_trials_and_a_run_that_did_not_end_leaves_no_trace(
    untrained, meddling, study_settings, tmp_path
):
    settings = study_settings(tmp_path / "run", train={"learning_rate": 2e-3})
    run = tmp_path / "out" / "head" / "seed-0"

    def kill(do, config):
        if do == "run":
            run.mkdir(parents=True)
            (run / "metrics.jsonl").write_text("")
            raise WorkerEnded("its process was ended by SIGKILL")

    with meddling(kill), pytest.raises(UserError, match="SIGKILL"):
        compared(settings, tmp_path / "out", ["head"])
    comparison, _ = compared(settings, tmp_path / "out", ["head"])
    (result,) = comparison.results
    assert result.score is not None and result.learning_rate == 2e-3 and result.rates == ()
    assert untrained.asked == ["base", "run head"]
    assert list(run.parent.iterdir()) == [run] and not list(run.iterdir())


class TestSeeds:
    """Three seeds of two methods at fixed rates."""

    GIVEN = {"methods": ["lora", "head"], "rates": {"lora": [1e-2], "head": [1e-2]}}  # noqa: RUF012 - never changed

    @pytest.fixture(scope="class")
    def done(self, study_settings, tmp_path_factory):
        base = tmp_path_factory.mktemp("seeds")
        given = {**self.GIVEN, "seeds": 3, "reference": "head"}
        return really_compared(study_settings, base, changes={"train": {"seed": 5}}, **given)

    def test_each_seed_is_trained_by_all_methods_before_the_next_on_the_same_rows(self, done):
        assert done.asked == ["base", *["run lora", "run head"] * 3]
        stored = json.loads((done.folder / "pieces" / "lora.json").read_text())["runs"]
        assert list(stored) == ["5", "6", "7"] == [str(seed) for seed in done.comparison.seeds]
        assert len({run["validation_loss"] for run in stored.values()}) == 3
        held_out = set()
        for seed in (5, 6, 7):
            config = RunConfig.read(done.folder / "lora" / f"seed-{seed}" / "run.yaml")
            assert config.train.seed == seed and config.data_seed == 5
            held_out.add(tuple(example.row for example in read_data(config)[1].held_out))
        assert len(held_out) == 1

    def test_the_score_is_the_mean_and_differences_are_to_the_reference(self, done):
        for result in done.by_name.values():
            assert len(result.seeds) == 3
            assert result.score == pytest.approx(sum(seed.score for seed in result.seeds) / 3)
            assert 0 <= result.interval[0] <= result.score <= result.interval[1] <= 1
        lora, head = done.by_name["lora"], done.by_name["head"]
        assert done.comparison.reference == "head" and head.difference == 0
        assert lora.difference == pytest.approx(lora.score - head.score)
        assert lora.difference_interval[0] <= lora.difference <= lora.difference_interval[1]

    def test_page_numbers_and_table_have_the_seeds(self, done):
        page = (done.folder / "comparison.md").read_text()
        assert "## Seed by seed" in page and "to head (95 % interval)" in page and "3 seeds" in page
        numbers = json.loads((done.folder / "comparison.json").read_text())
        assert numbers["seeds"] == [5, 6, 7] and numbers["reference"] == "head"
        assert [len(method["seeds"]) for method in numbers["methods"]] == [3, 3]
        assert numbers["methods"][0]["flattened"] is False
        assert all(seed["validation"] for method in numbers["methods"] for seed in method["seeds"])
        assert any("Not flattened when the budget ended: " in line for line in numbers["findings"])
        assert not any("One seed is weak evidence" in line for line in numbers["findings"])

    def test_more_seeds_and_fewer_reuse_what_is_there(self, done, untrained, tmp_path):
        shutil.copytree(done.folder, tmp_path / "out")
        _, said = compared(done.settings, tmp_path / "out", **self.GIVEN, seeds=4)
        assert untrained.asked == ["run lora", "run head"] and "lora: 3 of 4 seeds trained before" in said
        untrained.asked = []
        one, said = compared(done.settings, tmp_path / "out", **self.GIVEN)
        assert untrained.asked == [] and "lora: done before" in said
        assert {r.method: r.score for r in one.results} == {m: r.seeds[0].score for m, r in done.by_name.items()}

    def test_an_interruption_between_seeds_loses_no_seed(self, done, untrained, meddling, tmp_path):
        whole, _ = compared(done.settings, tmp_path / "whole", **self.GIVEN, seeds=3)
        untrained.asked = []

        def interrupt(do, config):
            if untrained.asked.count("run lora") == 2 and do == "run":
                raise KeyboardInterrupt

        with meddling(interrupt), pytest.raises(KeyboardInterrupt):
            compared(done.settings, tmp_path / "out", **self.GIVEN, seeds=3)
        so_far = json.loads((tmp_path / "out" / "comparison.json").read_text())
        assert so_far["seeds"] == [5] and all(m["score"] is not None for m in so_far["methods"])
        again, _ = compared(done.settings, tmp_path / "out", **self.GIVEN, seeds=3)
        assert untrained.asked == ["run head", "run lora", "run head"]
        assert again.results == whole.results

    def test_a_seed_that_diverges_is_named_and_its_method_not_scored(self, done, meddling, tmp_path):
        def diverge(do, config):
            if do == "run" and config["method"] == "lora" and config["train"]["seed"] == 6:
                raise UserError("training diverged")

        with meddling(diverge):
            comparison, said = compared(done.settings, tmp_path / "out", **self.GIVEN, seeds=2)
        assert "lora: not possible: seed 6: training diverged" in said
        assert comparison.results[-1].method == "lora" and comparison.results[-1].score is None
        assert len(comparison.results[0].seeds) == 2


def test_a_model_that_answers_every_row_alike_is_not_ranked(here, study_settings, tmp_path):
    """Nothing in the rows tells their answers, so that the most frequent one is all there is to learn."""
    rows = [{"prompt": f"row {n}", "completion": "b" if n * 7919 % 101 % 4 == 0 else "a"} for n in range(60)]
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "eval": 20, "seed": 3}
    settings = study_settings(tmp_path / "run", data=data, train={"max_steps": 20})
    rates = {"lora": [0.05], "head": [1e-6]}
    comparison, said = compared(settings, tmp_path / "out", ["head", "lora"], rates=rates)
    lora = next(result for result in comparison.results if result.method == "lora")
    assert [seed.one_answer for seed in lora.seeds] == ["a"]
    assert lora.learned_nothing and not lora.ranked and lora.score == comparison.constant_score > 0.5
    assert comparison.ranked[0].method == "head", "its answers differ, though all of them are wrong"
    assert "lora: trained at 0.05: one answer to every row ('a')" in said
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "lora learned nothing: it gives every row the same answer" in page
    assert "head is not clearly better than the answer 'a' to every row" in page


def test_time_can_be_the_budget(here, study_settings, tmp_path):
    settings = study_settings(tmp_path / "run", train={"time": "1s", "max_steps": 30})
    comparison, _ = compared(settings, tmp_path / "out", ["head"], rates={"head": [1e-3]})
    assert 1 <= comparison.results[0].steps <= 30


def test_a_method_that_diverges_at_all_rates_says_so(meddling, study_settings, tmp_path):
    diverged = meddling(lambda do, config: {"loss": None} if do == "rate" else None)
    with diverged, pytest.raises(UserError, match="diverged at every learning rate tried, down to"):
        compared(study_settings(tmp_path / "run"), tmp_path / "out", ["head"])


@pytest.mark.parametrize(
    ("changes", "given", "said"),
    [
        ({}, {"methods": ["lra"]}, "did you mean 'lora'"),
        ({}, {"methods": []}, "no method is named"),
        ({}, {"methods": ["head"], "reference": "lora"}, "--reference"),
        ({"data": {"eval": None}}, {"methods": ["lora"]}, "no rows are held out"),
        ({"data": {"train": "no.jsonl"}}, {"methods": ["lora", "head"]}, r"no\.jsonl"),
        ({"train": {"time": "soon"}}, {"methods": ["head"]}, r"train\.time"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_leaves_nothing(changes, given, said, here, study_settings, tmp_path):
    with pytest.raises(UserError, match=said):
        compared(laid_over(study_settings(tmp_path / "run"), changes), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_folders_of_something_else_are_refused(here, study_settings, finished_run, tmp_path):
    (tmp_path / "thesis.tex").write_text("kept")
    for folder in (finished_run, tmp_path):
        with pytest.raises(UserError, match="not a comparison's"):
            compared(study_settings(tmp_path / "run"), folder, ["head"])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_worker_of_its_own_trains_as_its_parent_would_answers_refusals_and_tells_how_it_ended(
    study_settings, tmp_path, monkeypatch
):
    monkeypatch.delenv("DELTAW_MEASURED")
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    for known in ("_used", "_learned"):
        monkeypatch.setattr(product_rates, known, {})
    candidates = product_rates.candidates()
    rates = {candidate.stored: {} for candidate in candidates}
    for candidate in candidates:
        rates[candidate.stored][candidate.name] = 123.0
    key = kernel_choice._key(product_rates.GENERIC, 1, candidates)
    product_rates.keep(key, {"rates": rates, "disturbed": True}, lasting=False)
    plain = RunConfig.read(study_settings(tmp_path / "run", method="head")).model_dump(mode="json")
    with Child(tmp_path / "log") as child:
        child.ask("usual", config={**plain, "precision": "auto"})
        assert product_rates._learned == product_rates.used(), "it measured nothing itself"
        assert not (tmp_path / "cache" / "remembered" / product_rates.KIND).exists()
        with pytest.raises(UserError, match=r"no model"):
            child.ask("rate", config={**plain, "model": str(tmp_path / "none")})
        found = child.ask("run", config=plain)
        assert found["steps"] == 6 and len(found["per_row"]) == 8
        assert found["peak_memory_bytes"] > 5e7 and math.isfinite(found["seconds"])
        child._process.kill()
        with pytest.raises(WorkerEnded, match="SIGKILL"):
            child.ask("rate", rate=1e-3, share=0.3)
