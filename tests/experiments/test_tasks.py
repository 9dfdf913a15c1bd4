"""Comparisons and searches of tasks that generate text, use a teacher, embed or rank."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from transformers import BertConfig, BertModel

from deltaw.experiments.compare import compare
from deltaw.experiments.tune import tune
from deltaw.settings.config import RunConfig
from tests.conftest import COLORS, write_rows
from tests.data.label_models import WORDS, word_tokenizer

TASKS = {"rl": {"reward": {"functions": ["lower-case"], "group": 2, "max_new_tokens": 4}}}
TASKS |= {"distill": {"distill": {"prompt": "Answer in rhymes", "max_new_tokens": 4}}, "embedding": {}, "reranking": {}}
MAIN = {"rl": "reward", "distill": "exact_match", "embedding": "ndcg@10", "reranking": "ndcg@10"}


@pytest.fixture
def make_config(settings, long_context_folder, tmp_path):
    """Return a factory of settings for a short run of a task."""

    def make(task: str) -> RunConfig:
        if task in ("rl", "distill"):
            model = long_context_folder
            rows = [{"prompt": f"say {c}", "completion": c} for c in COLORS]
        else:
            torch.manual_seed(0)
            shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
            model = tmp_path / "encoder"
            BertModel(BertConfig(vocab_size=20, max_position_embeddings=64, **shape)).save_pretrained(model)
            word_tokenizer().save_pretrained(model)
            pairs = [(word, other) for word in WORDS for other in WORDS[:3] if word != other]
            rows = [{"anchor": f"{a} {b}", "positive": f"so {a}", "negative": f"{b} {b} {a}"} for a, b in pairs]
        file = write_rows(tmp_path / "rows.jsonl", rows)
        changes = {"model": str(model), "task": task, "data": {"train": str(file), "eval": 4}, **TASKS[task]}
        train = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3}
        return RunConfig.read(settings(tmp_path / "run", **changes, train=train))

    return make


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=[] if task in ("rl", "embedding") else pytest.mark.slow) for task in TASKS]
)
def test_compare_supports_task(task, make_config, local_worker, tmp_path):
    out = io.StringIO()
    options = {"folder": tmp_path / "out", "log": Console(file=out, width=200).print}
    methods = ["lora", "last"] if task == "reranking" else ["lora"]
    comparison = compare(make_config(task), methods, rates={name: [1e-3] for name in methods}, **options)
    assert {result.method for result in comparison.results} == set(methods)
    assert comparison.metric == MAIN[task] and not any(r.error for r in comparison.results), out.getvalue()
    # A new head has no score before training.
    assert (comparison.base is None) == (task == "reranking") and "its process ended" not in out.getvalue()


@pytest.mark.parametrize(
    "task", ["embedding", *(pytest.param(task, marks=pytest.mark.slow) for task in MAIN if task != "embedding")]
)
def test_tune_supports_task(task, make_config, local_worker, tmp_path):
    pytest.importorskip("optuna", reason="optuna is not installed")
    options = {"folder": tmp_path / "out", "search": ["train.learning_rate=1e-4..1e-2:log"], "log": lambda line: None}
    result = tune(make_config(task), trials=2, **options)
    assert [trial.end for trial in result.trials] == ["done", "done"]
