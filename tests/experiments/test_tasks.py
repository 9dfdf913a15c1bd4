"""Comparisons and searches of every task: also of those that write, are taught, embed or rank."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from transformers import BertConfig, BertModel

from deltaw.experiments.compare import compare
from deltaw.experiments.tune import tune
from deltaw.settings import RunConfig
from tests.conftest import COLORS, write_rows
from tests.data.label_models import WORDS, word_tokenizer

TASKS = {
    "reward": {"reward": {"functions": ["lower-case"], "group": 2, "max_new_tokens": 4}},
    "distill": {"distill": {"prompt": "Answer in rhymes", "max_new_tokens": 4}},
    "embedding": {},
    "reranking": {},
}
MAIN = {"reward": "reward", "distill": "exact_match", "embedding": "ndcg@10", "reranking": "ndcg@10"}


@pytest.fixture
def run_of(settings, roomy_folder, tmp_path):
    """Settings of a short run of a task."""

    def make(task: str) -> RunConfig:
        if task in ("reward", "distill"):
            model, rows = roomy_folder, [{"prompt": f"say {c}", "completion": c} for c in COLORS]
        else:
            torch.manual_seed(0)
            shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
            model = tmp_path / "encoder"
            BertModel(BertConfig(vocab_size=20, max_position_embeddings=64, **shape)).save_pretrained(model)
            word_tokenizer().save_pretrained(model)
            rows = [
                {"anchor": f"{one} {other}", "positive": f"so {one}", "negative": f"{other} {other} {one}"}
                for one in WORDS
                for other in WORDS[:3]
                if one != other
            ]
        file = write_rows(tmp_path / "rows.jsonl", rows)
        changes = {"model": str(model), "task": task, "data": {"train": str(file), "eval": 4}, **TASKS[task]}
        train = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3}
        return RunConfig.read(settings(tmp_path / "run", **changes, train=train))

    return make


@pytest.mark.parametrize("task", list(TASKS))
def test_methods_are_compared_with_the_untrained_model(task, run_of, here, tmp_path):
    out = io.StringIO()
    how = {"folder": tmp_path / "out", "say": Console(file=out, width=200).print}
    # A model that changes is not its own teacher.
    methods = ["lora"] if task == "distill" else ["lora", "last"]
    found = compare(run_of(task), methods, rates={name: [1e-3] for name in methods}, **how)
    assert {result.method for result in found.results} == set(methods)
    assert found.metric == MAIN[task] and all(result.error is None for result in found.results), out.getvalue()
    # A head that is new has no score before it is trained.
    assert (found.base is None) == (task == "reranking") and "its process ended" not in out.getvalue()


@pytest.mark.parametrize("task", [pytest.param("reward", marks=pytest.mark.slow), *list(TASKS)[1:]])
def test_settings_are_searched(task, run_of, here, tmp_path):
    pytest.importorskip("optuna", reason="optuna is not installed")
    how = {"folder": tmp_path / "out", "search": ["train.learning_rate=1e-4..1e-2:log"], "say": lambda line: None}
    found = tune(run_of(task), trials=2, **how)
    assert [trial.end for trial in found.trials] == ["done", "done"]
