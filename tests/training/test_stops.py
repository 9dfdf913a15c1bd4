"""A model trained on answers and their end of turn stops, and a run's folder renders as the run did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw.data import encode_prompt
from deltaw.data.report import SKIPPED_ROWS
from deltaw.errors import UserError
from deltaw.runs.fit import fit
from deltaw.runtime.generation import generate
from deltaw.training.data_view import shown_rows
from deltaw.training.origin import open_run, settings_in
from tests.byte_models import tiny_llama
from tests.conftest import COLORS, write_rows
from tests.data.chat_templates import tokenizer_of
from tests.training.runs import held_out_rows


def model_in(folder: Path, family: str) -> str:
    """An untrained model with the tokens and the template of a family."""
    tokenizer = tokenizer_of(family)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_llama(vocab_size=len(tokenizer), initializer_range=0.1, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


ENDS = {"chatml": "<|im_end|>", "gemma3": "<end_of_turn>", "mistral1": "</s>"}
ENDS |= {"phi3": "<|end|>", "qwen3": "<|im_end|>", "base": "<|endoftext|>"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ENDS)
def test_a_trained_model_ends_its_turn_by_itself(tmp_path: Path, settings, family: str) -> None:
    rows = write_rows(tmp_path / "d.jsonl", ({"prompt": f"paint it {c}: ", "completion": f"{c[0]}!"} for c in COLORS))
    train = {"learning_rate": 1e-2, "batch_size": 10, "max_steps": 150, "epochs": 1000, "schedule": "cosine"}
    changes = {"model": model_in(tmp_path / "model", family), "data": {"train": str(rows), "eval": None}}
    trained = fit(settings(tmp_path / "run", method="full", train=train, **changes)).output
    opened = open_run(str(trained), say=lambda line: None)
    prompts = [encode_prompt(f"paint it {c}: ", opened.data or "auto", opened.tokenizer) for c in COLORS]
    answers = generate(opened.model, opened.tokenizer, prompts, max_new_tokens=40)
    assert all(answer.stopped for answer in answers)
    assert {opened.tokenizer.convert_ids_to_tokens(answer.terminator) for answer in answers} == {ENDS[family]}
    right = sum(answer.text.strip().endswith(f"{c[0]}!") for answer, c in zip(answers, COLORS, strict=True))
    assert right >= 8


def test_a_run_saves_its_own_template_and_is_asked_with_it(tmp_path: Path, settings, model_folder) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% for m in messages %}{{ m.role }} says {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant says {% endif %}"
    )
    output = fit(settings(tmp_path / "run", data={"chat_template": str(own)}, train={"max_steps": 1})).output
    assert (output / "chat_template.jinja").read_text() == own.read_text()
    assert fit({"train": {"max_steps": 2}}, resume=output).outcome.steps == 2
    own.unlink()  # the run's folder is enough
    (shown,) = shown_rows(settings_in(output, {}), None, 1)
    assert "says" in "".join(piece.text for example in shown.examples for piece in example.pieces)
    opened = open_run(str(output), say=lambda line: None)
    asked = encode_prompt("hi", opened.data or "auto", opened.tokenizer)
    assert opened.tokenizer.decode(asked) == "user says hi<|im_end|>assistant says "
    bare = open_run(str(model_folder), say=lambda line: None)
    assert "says" not in bare.tokenizer.decode(encode_prompt("hi", "auto", bare.tokenizer))
    assert "says" in opened.tokenizer.decode(held_out_rows(opened)[0].tokens)


def test_a_template_with_a_fault_is_refused_before_anything_else(tmp_path: Path, settings) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("fine\n{% for m in messages %}")
    with pytest.raises(UserError, match="is not Jinja") as refused:
        fit(settings(tmp_path / "run", model=str(tmp_path / "no model"), data={"chat_template": str(own)}))
    assert refused.value.where == f"{own}, line 2"
    assert not (tmp_path / "run").exists()


def test_a_runs_folder_lists_the_rows_that_were_skipped(tmp_path: Path, settings) -> None:
    rows = write_rows(tmp_path / "d.jsonl", ({"prompt": f"paint it {c}", "completion": c[0]} for c in COLORS))
    rows.write_text(rows.read_text() + '{"prompt": 3, "completion": "x"}\n{broken\n')
    data = {"train": str(rows), "bad_rows": "skip"}
    output = fit(settings(tmp_path / "run", data=data, train={"max_steps": 1})).output
    lines = [json.loads(line) for line in (output / SKIPPED_ROWS).read_text().splitlines()]
    assert {(line["where"], line["reason"]) for line in lines} == {
        (f"{rows}, row 11", "a value of the wrong type"),
        (f"{rows}, line 12", "not JSON"),
    }


def test_the_date_that_a_template_writes_is_told_with_the_settings(tmp_path: Path, settings, model_folder) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{{ strftime_now('%d %b %Y') }}\n" + tokenizer_of("chatml").chat_template)
    data = {"chat_template": str(own)}
    output = fit(settings(tmp_path / "run", data=data, train={"max_steps": 1})).output
    (line,) = [line for line in (output / "run.yaml").read_text().splitlines() if "date:" in line]
    assert line.startswith("  date: null  # 20") and "the chat template writes the date" in line
    pinned = fit(settings(tmp_path / "pinned", data={**data, "date": "2026-01-31"}, train={"max_steps": 1}))
    assert "date: '2026-01-31'\n" in (pinned.output / "run.yaml").read_text()
