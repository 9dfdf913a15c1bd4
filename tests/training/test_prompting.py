"""The prompt format of a run is derived from its tokens, saved with the adapter, and validated when read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltaw.data.report import MAX_SYSTEM_CHARS
from deltaw.data.stored_rows import TextReader
from deltaw.inference.open_run import open_run
from deltaw.inference.prompting import (
    FILE,
    MAX_EXAMPLES,
    MAX_PROMPT_LENGTH,
    Prompting,
    prompting_of,
    read_prompting,
    with_system,
    write_prompting,
)
from deltaw.runs.fit import fit
from deltaw.runs.folder import METRICS
from deltaw.settings.data import DataSettings
from tests.conftest import refusal, write_rows
from tests.data.chat_templates import tokenizer_of

SYSTEM = "You are the bot.\nAnswer in one word."
COLORS = ("red", "blue", "green", "grey")


def turns(system: str | None, *texts: str) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def rows_of_form(form: str, system: str | None = SYSTEM) -> list[dict[str, Any]]:
    """Return rows with one question and answer each in one of the formats."""
    pairs = [(f"paint it {c}", c) for c in COLORS]
    column = {"system": system} if system else {}
    rows = {"messages": [{"messages": turns(system, *pair)} for pair in pairs]}
    rows["evals"] = [{"input": turns(system, question), "ideal": answer} for question, answer in pairs]
    rows["pairs"] = [{"prompt": question, "completion": answer, **column} for question, answer in pairs]
    rows["alpaca"] = [{"instruction": question, "output": answer, **column} for question, answer in pairs]
    return rows[form]


def prompting_of_rows(tmp_path: Path, rows: list[dict[str, Any]], family: str = "chatml", **values) -> Prompting:
    """Return the prompting derived from rows with a family's tokenizer."""
    settings = DataSettings(str(write_rows(tmp_path / "rows.jsonl", rows)), eval=1, **values)  # type: ignore[arg-type]
    tokenizer = tokenizer_of(family)
    data = TextReader(settings, tokenizer).prepare()
    prompting = prompting_of(tokenizer, data, settings)
    # Encoding the prompts again reproduces tokens of the rows.
    prompts = [row.tokens[: row.prompt_length].tolist() for row in (*data.train, *data.held_out)]
    for text in prompting.examples:
        assert prompting.prompt(with_system(prompting.system, text), settings, tokenizer).tolist() in prompts
    return prompting


@pytest.mark.parametrize("form", ["messages", "evals", "pairs", "alpaca"])
@pytest.mark.parametrize("family", ["chatml", "llama3", "qwen2.5", "phi3", "base", "base-bos"])
def test_system_prompt_and_prompts_are_detected(tmp_path: Path, form: str, family: str) -> None:
    prompting = prompting_of_rows(tmp_path, rows_of_form(form), family)
    assert prompting.system == SYSTEM and sorted(prompting.examples) == sorted(f"paint it {c}" for c in COLORS)
    # Without a chat template, a pair's system prompt and prompt are one text.
    assert prompting.joined == (form == "pairs" and family.startswith("base"))


def test_rows_without_shared_system_prompt_have_empty_one(tmp_path: Path) -> None:
    assert prompting_of_rows(tmp_path, rows_of_form("messages", None)).system == ""
    assert len(prompting_of_rows(tmp_path, rows_of_form("messages", None), "qwen2.5").examples) == MAX_EXAMPLES
    assert prompting_of_rows(tmp_path, rows_of_form("messages", None), system="Be brief.").system == "Be brief."
    rows = [{"messages": turns(SYSTEM if n % 10 else None, f"say {n}", str(n))} for n in range(20)]
    assert prompting_of_rows(tmp_path, rows).system == SYSTEM, "nine of ten"
    assert prompting_of_rows(tmp_path, [{"messages": turns(None, "one more", "1")}, *rows]).system == ""
    distinct = [{"messages": turns(f"You are {n}.", f"say {n}", str(n))} for n in range(40)]
    assert prompting_of_rows(tmp_path, distinct).system == ""
    assert prompting_of_rows(tmp_path, [{"text": f"text {n}"} for n in range(4)]) == Prompting()


def test_long_prompts_and_multi_turn_rows_are_not_examples(tmp_path: Path) -> None:
    rows = [{"messages": turns(None, f"{'x' * MAX_PROMPT_LENGTH}{n}", str(n))} for n in range(3)]
    rows.append({"messages": turns(None, "one", "1", "two", "2")})
    assert prompting_of_rows(tmp_path, rows).examples == ()
    long = [{"messages": turns("y" * (MAX_SYSTEM_CHARS + 1), "one", str(n))} for n in range(3)]
    assert prompting_of_rows(tmp_path, long, max_length=2 * MAX_SYSTEM_CHARS) == Prompting()


def test_prompting_survives_write_and_read(tmp_path: Path) -> None:
    longest = Prompting("S" * MAX_SYSTEM_CHARS, True, ("“é”\n\t‌",) * 4)
    for prompting in (longest, Prompting("", False, ("a",)), Prompting()):
        write_prompting(tmp_path, prompting)
        assert read_prompting(tmp_path) == prompting
    assert not (tmp_path / FILE).exists() and read_prompting(tmp_path / "none") == Prompting()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"system": ["a"], "examples": {"a": 1}, "joined": 1}',
        b"[" * 100_000, b'{"system": "' + b"x" * 300_000 + b'"}',
        json.dumps(
            {"system": "x" * (MAX_SYSTEM_CHARS + 1), "examples": ["x" * (MAX_PROMPT_LENGTH + 1), 3, ""]}
        ).encode(),
        json.dumps({"system": "\x1b[2Jgone", "examples": ["\x00", "\ud800"]}).encode(),
    ],
    ids=lambda content: repr(content[:20]),
)  # fmt: skip
def test_malicious_file_yields_empty_prompting(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert read_prompting(tmp_path) == Prompting()


def test_symlink_out_of_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"system": "secret"}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).symlink_to(tmp_path / "secret")
    refusal(read_prompting, tmp_path / "run", match="leads out of the folder")


def test_run_saves_prompting_also_when_resumed(settings: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", rows_of_form("messages"))
    data = {"train": str(rows), "eval": 1}
    config = settings(tmp_path / "run", data=data, train={"checkpoint_every": 1, "drift": False})
    run = fit(config).output
    saved = read_prompting(run)
    assert saved.system == SYSTEM and len(saved.examples) == 4
    (run / FILE).unlink()
    fit({"train": {"epochs": 2}}, resume=run)
    assert read_prompting(run) == saved and (run / METRICS).is_file()
    opened = open_run(str(run), log=lambda line: None)
    assert opened.prompting == saved
    row = opened.encode(with_system(SYSTEM, "paint it red"))
    assert np.array_equal(row, opened.encode(turns(SYSTEM, "paint it red")))
