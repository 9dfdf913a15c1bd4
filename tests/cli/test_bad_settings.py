"""Contradictory settings and invalid flags of every command exit with one message that names the fault.

Files and finished runs are unchanged.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Call, assert_refused, tree
from tests.conftest import Settings, deep_merge

NAN = float("nan")
# The message must contain the last part of the key.
LEAF_KEY_CASES: list[tuple[str, object]] = [
    *(("data.date", "yesterday"), ("data.max_length", 2), ("lora.invocation_tokens", [1]), ("device", "cuda:99")),
    *(("lora.target_modules", []), ("lora.layers", "7-"), ("lora.layers", "5-2"), ("model", ""), ("memory", "1KB")),
    *(("lora.trainable_token_indices", [10**6]), ("memory", "much"), ("train.time", "soon")),
]
# Settings by the word that the message must contain.
CONFLICTS: dict[str, list[dict[str, object]]] = {
    "data.train": [{"data.train": []}],
    "no-such.jsonl": [{"data.train": ["no-such.jsonl", "nor-this.jsonl"]}],
    "entry 1": [{"data.train": [{"from": "x", "weight": w}]} for w in (-1, NAN)] + [{"data.train": [{"weight": 2}]}],
    "wieght": [{"data.train": [{"from": "x.jsonl", "wieght": 2}]}],
    "promt": [{"data.train": [{"from": "x.jsonl", "columns": {"promt": "a"}}]}],
    "data.classes": [{"data.classes": ["a", "a"]}],
    "no_such_column": [{"data.group": "no_such_column"}, {"data.columns": {"prompt": "no_such_column"}}],
    "alpaca": [{"data.form": "alpaca"}],
    "data.eval": [{"data.eval": 10**9}],
    "data": [{"data.train": ""}, {"data.eval": ""}],
    "no-such-file.jinja": [{"data.chat_template": "no-such-file.jinja"}],
    "input": [{"input.modules": ["a"], "input.tokens": ["b"], "method": "input"}],
    "prompt.text": [{"prompt.init": "text", "method": "prompt"}],
    "prompt": [{"prompt.text": "x", "method": "prompt"}],
    "lora_bias": [{"lora.dora": True, "lora.lora_bias": True}],
    "dora": [{"lora.active": "completion", "lora.dora": True}],
    "rank": [{"lora.r": 4, "lora.rank": 4}, {"lora.init": "orthogonal", "lora.rank": 3}],
    "no_such_module": [{"lora.target_modules": ["no_such_module"]}],
    "no_such_head": [{"method": "head", "head.modules": ["no_such_head"]}],
    "no_such": [{"lora.rank_pattern": {"no_such": 4}}, {"lora.train_modules": ["no_such"]}],
    "no.such.parameter": [{"lora.target_parameters": ["no.such.parameter"]}],
    "image": [{"task": "image-classification"}],
    "int8": [{"precision": "int8", "lora.dora": True}],
    "blocks": [{"method": "last", "last.blocks": 99}],
    "tpu": [{"device": "tpu"}],
}
CONFLICTS |= {key.rpartition(".")[2]: [{key: value}] for key, value in LEAF_KEY_CASES}
SETTINGS_FILES = [
    *(b"- model: m\n", b"just a text", b"5", b"model: !!python/object/apply:os.system ['true']\n", b"[" * 5000),
    *(b"model: m\nmodel: n\ndata: d\n", b"model: m\ndata: d\ntrain: {epochs: 1, epochs: 2}\n", b"\t\tmodel: m"),
    *(b"model: m\ndata: d\n? [a, b]\n: c\n", b"model: m\ndata: d\n<<: 5\n", b"output: 2024-13-45", b"model: \x07"),
    *(b"model: *nothing", b"model: m\n---\nmodel: n\n", b"\x00"),
]


@pytest.fixture
def settings_file(settings: Settings, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the settings of a short run. ``changes`` maps dotted keys to values."""

    def write(changes: dict[str, object]) -> Path:
        values = settings(tmp_path / "new" / "run")
        for key, value in changes.items():
            for part in reversed(key.split(".")):
                value = {part: value}
            values = deep_merge(values, value)  # type: ignore[arg-type]
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "run.yaml"

    return write


@pytest.fixture
def reject(call: Call, tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Assert that a command is rejected with a short message, and that it changes no file."""
    monkeypatch.chdir(tmp_path)

    def check(arguments: list[object], word: str) -> None:
        before = tree(tmp_path)
        run = tree(finished_run)
        result = call(*arguments)
        assert_refused(result, word)
        assert len(result.err) < 4000 and tree(tmp_path) == before and tree(finished_run) == run

    return check


def test_contradictory_settings_are_rejected(settings_file, reject):
    for word, alternatives in CONFLICTS.items():
        for changes in alternatives:
            reject(["train", settings_file(changes)], word)


def test_unreadable_settings_files_are_rejected(reject, tmp_path):
    bomb = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    for content in (*SETTINGS_FILES, "\n".join([*bomb, "model: *i"]).encode()):
        (tmp_path / "odd.yaml").write_bytes(content)
        reject(["train", "odd.yaml"], "odd.yaml")


# Command prefix: remaining arguments and, after =>, the word of the message. It defaults to the first argument.
FLAGS = {
    "": "trian; train --train.learning_rat 1 => --train.learning_rat; train a b => b; eval => RUN; chat => RUN; "
    "inspect => ADAPTER; completion tcsh => tcsh; schema more => more; doctor --model no/such/model => no/such/model; "
    "init new.yaml --data no.docx --task no_such => no_such; train --resume no_such_run => no_such_run; "
    "train SETTINGS --resume RUN => --resume; runs no_such_run => no_such_run; runs RUN --output page.html => --output",
    "plan SETTINGS": "--methods lora,no_such => no_such; --fit-memory much => much; --fit-memory -3GB => -3GB; "
    "--methods head --fit-memory 1B => 1; --picture plan.docx => .docx",
    "compare SETTINGS": "--methods no_such => no_such; --rates lora => lora; --rates lora=fast => fast; "
    "--rates lora=-1 => -1; --share 2",
    "tune SETTINGS": "--search lora.rank => lora.rank; --search 'lora.rnk=[1, 2]' => lora.rnk; "
    "--search lora.rank=[] => lora.rank; --search lora.rank=8..4 => lora.rank; --trials 0",
    "eval RUN": "--limit 0; --limit many; --data no.jsonl => no.jsonl; --precision fp12 => fp12; --device tpu => tpu; "
    "--task no_such => no_such",
    "generate RUN": "=> prompt; --prompt LONG => 128; --prompt \ud800 => prompt",
    "generate RUN --prompt x": "--temperature -1; --temperature nan => temperature; --top-p 0; --max-new-tokens 0; "
    "--top-k -1; --min-p 1.5; --repetition-penalty 0; --presence-penalty 3; --frequency-penalty -3; --seed 1e30; "
    "--stop ''; --stop LONG => stop; --regex (a => (a; --regex a --json-schema a.json; --logprobs 3 => --json; "
    "--json-schema no.json => no.json; --json-schema SETTINGS => JSON; --json --logprobs 101 => --logprobs",
    "chat RUN": "--regex (a => (a; --max-new-tokens x",
    "data": "show no.jsonl --model MODEL => no.jsonl; check no.jsonl --model MODEL => no.jsonl; "
    "show ROWS --model MODEL --row 999 => 999; show ROWS --model MODEL --data.form novel => novel; "
    "check ROWS --model no/such/model => no/such/model; frobnicate",
}


@pytest.mark.parametrize("prefix", [p if p in ("", "data") else pytest.param(p, marks=pytest.mark.slow) for p in FLAGS])
def test_invalid_flags_are_rejected(prefix, settings_file, reject, finished_run, model_folder, rows_file):
    values = {"SETTINGS": settings_file({}), "RUN": finished_run, "MODEL": model_folder, "ROWS": rows_file}
    values["LONG"] = "x" * 2000
    for case in FLAGS[prefix].split("; "):
        flags, _, word = case.partition("=>")
        arguments = [values.get(argument, argument) for argument in shlex.split(f"{prefix} {flags}")]
        reject(arguments, word.strip() or case.split()[0])
