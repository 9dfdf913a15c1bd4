"""A trained model generates the end token of its chat template, and the run's folder stores the template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw.data.bad_rows import SKIPPED_ROWS
from deltaw.data.prompt_tokens import encode_prompt
from deltaw.decoding.generation import generate
from deltaw.errors import UserError
from deltaw.inference.open_run import open_run
from deltaw.methods.trust import read_run_settings
from deltaw.runs.data_checks import preview_rows
from deltaw.runs.fit import fit
from tests.byte_models import tiny_llama
from tests.conftest import COLORS, write_rows
from tests.data.chat_templates import tokenizer_of
from tests.training.runs import load_eval_rows


def model_in(folder: Path, family: str) -> str:
    """Save an untrained model with the tokenizer and chat template of a family."""
    tokenizer = tokenizer_of(family)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_llama(vocab_size=len(tokenizer), initializer_range=0.1, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


END_TOKENS = {"chatml": "<|im_end|>", "gemma3": "<end_of_turn>", "mistral1": "</s>"}
END_TOKENS |= {"phi3": "<|end|>", "qwen3": "<|im_end|>", "base": "<|endoftext|>"}


@pytest.mark.slow
@pytest.mark.parametrize("family", END_TOKENS)
def test_trained_model_generates_end_token(tmp_path: Path, settings, family: str) -> None:
    rows = write_rows(tmp_path / "d.jsonl", ({"prompt": f"paint it {c}: ", "completion": f"{c[0]}!"} for c in COLORS))
    train = {"learning_rate": 1e-2, "batch_size": 10, "max_steps": 150, "epochs": 1000, "schedule": "cosine"}
    changes = {"model": model_in(tmp_path / "model", family), "data": {"train": str(rows), "eval": None}}
    trained = fit(settings(tmp_path / "run", method="full", train=train, **changes)).output
    opened = open_run(str(trained), log=lambda line: None)
    prompts = [encode_prompt(f"paint it {c}: ", opened.data or "auto", opened.tokenizer) for c in COLORS]
    answers = generate(opened.model, opened.tokenizer, prompts, max_new_tokens=40)
    assert all(answer.stopped for answer in answers)
    assert {opened.tokenizer.convert_ids_to_tokens(answer.terminator) for answer in answers} == {END_TOKENS[family]}
    num_correct = sum(answer.text.strip().endswith(f"{c[0]}!") for answer, c in zip(answers, COLORS, strict=True))
    assert num_correct >= 8


def test_run_saves_its_template_and_prompts_use_it(tmp_path: Path, settings, model_folder) -> None:
    template = tmp_path / "own.jinja"
    text = "{% for m in messages %}{{ m.role }} says {{ m.content }}<|im_end|>{% endfor %}"
    template.write_text(text + "{% if add_generation_prompt %}assistant says {% endif %}")
    output = fit(settings(tmp_path / "run", data={"chat_template": str(template)}, train={"max_steps": 1})).output
    assert (output / "chat_template.jinja").read_text() == template.read_text()
    assert fit({"train": {"max_steps": 2}}, resume=output).outcome.steps == 2
    template.unlink()  # the run's folder contains a copy
    (preview,) = preview_rows(read_run_settings(output, {}), None, 1)
    assert "says" in "".join(piece.text for example in preview.examples for piece in example.spans)
    opened = open_run(str(output), log=lambda line: None)
    prompt_tokens = encode_prompt("hi", opened.data or "auto", opened.tokenizer)
    assert opened.tokenizer.decode(prompt_tokens) == "user says hi<|im_end|>assistant says "
    base_model = open_run(str(model_folder), log=lambda line: None)
    assert "says" not in base_model.tokenizer.decode(encode_prompt("hi", "auto", base_model.tokenizer))
    assert "says" in opened.tokenizer.decode(load_eval_rows(opened)[0].tokens)


def test_invalid_template_is_rejected_first(tmp_path: Path, settings) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("fine\n{% for m in messages %}")
    with pytest.raises(UserError, match="is not Jinja") as error:
        fit(settings(tmp_path / "run", model=str(tmp_path / "no model"), data={"chat_template": str(template)}))
    assert error.value.location == f"{template}, line 2" and not (tmp_path / "run").exists()


def test_run_folder_lists_skipped_rows(tmp_path: Path, settings) -> None:
    rows = write_rows(tmp_path / "d.jsonl", ({"prompt": f"paint it {c}", "completion": c[0]} for c in COLORS))
    rows.write_text(rows.read_text() + '{"prompt": 3, "completion": "x"}\n{broken\n')
    data = {"train": str(rows), "bad_rows": "skip"}
    output = fit(settings(tmp_path / "run", data=data, train={"max_steps": 1})).output
    lines = [json.loads(line) for line in (output / SKIPPED_ROWS).read_text().splitlines()]
    reasons = {line["where"]: line["reason"] for line in lines}
    assert reasons == {f"{rows}, row 11": "a value of the wrong type", f"{rows}, line 12": "not JSON"}


def test_date_used_by_template_is_recorded_in_settings(tmp_path: Path, settings, model_folder) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}\n" + tokenizer_of("chatml").chat_template)
    data = {"chat_template": str(template)}
    output = fit(settings(tmp_path / "run", data=data, train={"max_steps": 1})).output
    (line,) = [line for line in (output / "run.yaml").read_text().splitlines() if "date:" in line]
    assert line.startswith("  date: null  # 20") and "the chat template writes the date" in line
    fixed_date = fit(settings(tmp_path / "pinned", data={**data, "date": "2026-01-31"}, train={"max_steps": 1}))
    assert "date: '2026-01-31'\n" in (fixed_date.output / "run.yaml").read_text()
