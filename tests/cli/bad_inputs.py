"""Generated invalid inputs. Each family produces one case per seed.

A case consists of the arguments of a command that must fail and of words that its error message must contain: the file,
row or key at fault.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import yaml

from deltaw.runs import checkpoints
from deltaw.schema import run_schema
from deltaw.settings import settings
from tests.cli.conftest import update_file

ROWS = [{"prompt": f"paint it {color}", "completion": color[0]} for color in ("red", "blue", "gray")]
VERBS = ("eval", "generate", "chat", "inspect")


@dataclass
class Bench:
    """Working folder for a case, with a valid model, valid rows and a finished run to copy."""

    folder: Path
    model: Path
    rows: Path
    run: Path

    def settings(self, **overrides: object) -> Path:
        """Write the settings file of a short run. ``overrides`` maps dotted keys to values."""
        data = {"train": str(self.rows), "eval": 2}
        values: dict = {"model": str(self.model), "data": data, "train": {"batch_size": 5, "drift": False}}
        values |= {"precision": "fp32", "threads": 1}
        for key, value in overrides.items():
            section_values = values
            *sections, leaf = key.split(".")
            for section in sections:
                section_values = section_values.setdefault(section, {})
            section_values[leaf] = value
        file = self.folder / "settings.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        return file

    def train_command(self, data: object, **overrides: object) -> list[str]:
        return ["train", str(self.settings(**{"data.train": str(data), **overrides}))]

    def copy_model(self) -> Path:
        return Path(shutil.copytree(self.model, self.folder / "model"))

    def copy_run(self) -> Path:
        return Path(shutil.copytree(self.run, self.folder / "adapter"))


@dataclass(frozen=True)
class BadInput:
    """Arguments of a command that must fail.

    Attributes:
        arguments: Command-line arguments.
        words: Words of the message. Of a tuple, at least one must occur.
        stdin: Standard input.
    """

    arguments: Sequence[object]
    words: Sequence[str | tuple[str, ...]]
    stdin: str = ""


Family = Callable[[random.Random, Bench, int], BadInput]
FAMILIES: dict[str, tuple[Family, int]] = {}


def family(count: int) -> Callable[[Family], Family]:
    """Register a family of ``count`` cases."""

    def register(function: Family) -> Family:
        FAMILIES[function.__name__] = (function, count)
        return function

    return register


def every_case() -> list[tuple[str, int]]:
    """Return family and seed of each case."""
    return [(name, seed) for name, (_, count) in FAMILIES.items() for seed in range(count)]


def make(name: str, seed: int, bench: Bench) -> BadInput:
    return FAMILIES[name][0](random.Random(f"{name} {seed}"), bench, seed)


# Files of rows


def lines(rows: Sequence[object]) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


def _bad_line(rng: random.Random, good: bytes) -> bytes:
    """Return a line that is not a valid row: invalid JSON or UTF-8, not an object, or a value that is not text."""
    index = rng.randrange(1, len(good))
    key, other = rng.sample([b"prompt", b"completion"], 2)
    values = [b"NaN", b"-Infinity", b"1e999", b"7" * 5000, b"true", b"[]", b"{}", b"[[1]]", b"0.5", b'"\\ud800"']
    depth = rng.choice([3, 200_000])
    byte = bytes([rng.choice([0x80, 0xC0, 0xFF, 0xE9])])
    candidates = [
        good[:index],
        good[:index] + b"\x00" + good[index:],
        good[:index] + byte + good[index:],
        good + b"}",
        b"[" * depth,
    ]
    candidates += [b'{"a":' * depth, json.dumps(rng.choice([[], ["a"], 5, "text", True, None])).encode()]
    candidates += [b'{"%s": %s, "%s": "x"}' % (key, rng.choice(values), other), b'{"%s": "x"}' % key]
    candidates += [b'{"%s": null, "%s": "x"}' % (key, other), b"prompt: red", b"{'prompt': 'a', 'completion': 'b'}"]
    return rng.choice([*candidates, b'{"prompt": "a", "completion": "b",}'])


def _train_on(bench: Bench, name: str, content: bytes, *words: str | tuple[str, ...], **overrides: object) -> BadInput:
    """Return a training command on a file with this name and content."""
    file = bench.folder / name
    file.write_bytes(content)
    return BadInput(bench.train_command(file, **overrides), words or [name])


@family(70)
def a_line_that_is_no_row(rng: random.Random, bench: Bench, number: int) -> BadInput:
    rows = lines(ROWS * rng.randint(1, 3))
    index = rng.randrange(len(rows))
    rows[index] = _bad_line(rng, rows[index])
    content = b"\n".join(rows) + rng.choice([b"", b"\n"])
    return _train_on(bench, "rows.jsonl", content, "rows.jsonl", (f"line {index + 1}", f"row {index + 1}"))


@family(12)
def a_json_file_that_is_no_list_of_rows(rng: random.Random, bench: Bench, number: int) -> BadInput:
    good = json.dumps(ROWS).encode()
    candidates = [good[: rng.randrange(1, len(good))], json.dumps({"data": ROWS}).encode(), good[:-1] + b', "text"]']
    candidates += [b"[" * 200_000, b"\n".join(lines(ROWS)), b"5", b'"xxxxx', good.decode().encode("utf-16"), b"null"]
    return _train_on(bench, "rows.json", rng.choice(candidates))


@family(14)
def a_table_that_is_damaged(rng: random.Random, bench: Bench, number: int) -> BadInput:
    rows = [f'"paint, it {n}",{n}' for n in range(5)]
    index = rng.randrange(5)
    damaged_rows = [rows[index] + suffix for suffix in (",more", ",", ",a,b")]
    kind = rng.randrange(4)
    if kind == 0:
        rows[index] = rng.choice([*damaged_rows, "one cell", f'"paint, it {index},{index}', f'"paint" it,{index}'])
    header = rng.choice(["prompt,prompt", "a,b", "question,answer", ","]) if kind == 1 else "prompt,completion"
    content = "\n".join([header, *rows]).encode("utf-16" if kind == 2 else "utf-8")
    compressed = gzip.compress(content)
    if kind == 3:
        return _train_on(bench, "rows.csv.gz", compressed[: rng.randrange(1, len(compressed) - 1)])
    return _train_on(bench, *rng.choice([("rows.csv", content), ("rows.csv.gz", compressed)]))


@family(16)
def a_file_of_columns_that_is_damaged(rng: random.Random, bench: Bench, number: int) -> BadInput:
    prompts = [row["prompt"] for row in ROWS]
    bad_values = rng.choice([[1, 2, 3], [0.5, float("nan"), 1], [[1], [], [2]], [None] * 3])
    empty_column = pyarrow.array([], "string")
    kind = rng.randrange(5)
    columns: list[dict] = [{"prompt": prompts, "completion": bad_values}, {"left": [1, 2]}]
    columns.append({"prompt": empty_column, "completion": empty_column})
    table = pyarrow.table({"prompt": prompts, "completion": ["a", "b", "c"]} if kind > 2 else columns[kind])
    name, sink = rng.choice(["rows.parquet", "rows.arrow"]), pyarrow.BufferOutputStream()
    if name == "rows.parquet":
        pyarrow.parquet.write_table(table, sink)
    else:
        with pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    damaged_contents = {3: content[: rng.randrange(1, len(content) - 8)], 4: rng.randbytes(rng.randint(1, 3000))}
    return _train_on(bench, name, damaged_contents.get(kind, content))


@family(16)
def a_compressed_file_that_is_damaged(rng: random.Random, bench: Bench, number: int) -> BadInput:
    compress, ending = rng.choice([(gzip.compress, "gz"), (bz2.compress, "bz2"), (lzma.compress, "xz")])
    content, plain = compress(b"\n".join(lines(ROWS * 50))), b"\n".join(lines(ROWS))
    truncated = content[: rng.randrange(1, len(content) - 1)]
    return _train_on(
        bench, f"rows.jsonl.{ending}", rng.choice([truncated, plain, rng.randbytes(200), compress(plain + b"\n{")])
    )


EMPTY: list[tuple[str, bytes]] = [
    *(("rows.jsonl", b""), ("rows.jsonl", b"\n \n\t\n"), ("rows.json", b"[]"), ("rows.json", b"  "), ("rows.csv", b"")),
    *(("rows.csv", b"prompt,completion\n"), ("rows.jsonl.gz", gzip.compress(b"")), ("rows.jsonl.gz", b"")),
    *(("rows.parquet", b""), ("rows.tsv.xz", lzma.compress(b"prompt\tcompletion\n\n")), ("rows.txt", b"a text")),
    ("rows", b'{"text": "a"}'),
]


@family(len(EMPTY))
def a_file_without_rows(rng: random.Random, bench: Bench, number: int) -> BadInput:
    return _train_on(bench, *EMPTY[number])


TURNS = [
    *({"role": "oracle", "content": "x"}, {"role": "user"}, {"content": "x"}, {"role": "user", "content": 5}),
    *({"role": "assistant", "content": [["x"]]}, {"role": None, "content": "x"}, {"role": ["user"], "content": "x"}),
    *({"role": "user", "content": {"a": 1}}, {"role": "assistant", "content": float("nan")}, "hello", 5, None, []),
]


@family(20)
def a_conversation_that_is_none(rng: random.Random, bench: Bench, number: int) -> BadInput:
    valid_turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    index, kind = rng.randrange(3), rng.randrange(4)
    rows: list[dict] = [{"messages": list(valid_turns)} for _ in range(3)]
    if kind == 0:
        rows[index]["messages"][rng.randrange(2)] = rng.choice(TURNS)
    elif kind == 1:
        rows[index]["messages"] = rng.choice([[], {}, "text", 5, valid_turns[:1], valid_turns[::-1], [valid_turns]])
    elif kind == 2:
        rows[index] = {"conversations": "x"}
    else:
        rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]} for _ in range(3)]
        rows[index]["conversations"][1] = rng.choice([{"from": "oracle", "value": "x"}, {"from": "gpt"}, 5, None])
    return _train_on(bench, "talks.jsonl", b"\n".join(lines(rows)), "talks.jsonl", f"row {index + 1}")


@family(16)
def labels_that_are_none(rng: random.Random, bench: Bench, number: int) -> BadInput:
    bad_labels = {
        "sequence-classification": [0.5, [1], {}, None, "", float("nan"), float("inf")],
        "regression": ["many", float("nan"), float("inf"), "", None, [1], {}, True, "1e999"],
    }
    task = rng.choice(list(bad_labels))
    rows: list[dict] = [{"text": f"row {n}", "label": n % 2} for n in range(8)]
    index = rng.randrange(8)
    rows[index]["label"] = rng.choice(bad_labels[task])
    if rng.random() < 0.2:
        rows[index] = {"text": rng.choice([5, None, ["a"], {}]), "label": 1}
    return _train_on(bench, "labels.jsonl", b"\n".join(lines(rows)), "labels.jsonl", f"row {index + 1}", task=task)


# Settings

KEYS = [setting.key for setting in settings()]
# Unlikely values of settings. A case uses one that the settings schema rejects.
ODD_VALUES = [
    *({"a": {"b": []}}, [[{}]], -1, -0.5, float("nan"), float("inf"), 1e300, 2**70, "no such value"),
    *("", "\x00", [1, "a"], True, 0, 2.5, [], "[unclosed", "-5GB"),
]


@family(max(2 * len(KEYS), 150))
def a_setting_with_a_value_that_it_cannot_have(rng: random.Random, bench: Bench, number: int) -> BadInput:
    validator = jsonschema.Draft202012Validator(run_schema())
    while True:
        key = rng.choice([key for key in KEYS if key != "output"])  # set by a flag
        value = rng.choice(ODD_VALUES)
        file = bench.settings(**{key: value})
        if not validator.is_valid(yaml.safe_load(file.read_text(encoding="utf-8"))) and not _coerced(key, value):
            return BadInput(["train", file], [key.rpartition(".")[2], "settings.yaml"])


def _coerced(key: str, value: object) -> bool:
    """Return True if a reader may convert the value to the expected type, for example 1 to true."""
    if isinstance(value, str):
        return False
    near_text = key.startswith("data.") and isinstance(value, int | float)
    return near_text or isinstance(value, bool) or value in (0, 1, [])


@family(20)
def a_key_that_is_misspelt(rng: random.Random, bench: Bench, number: int) -> BadInput:
    key = rng.choice([key for key in KEYS if len(key.rpartition(".")[2]) > 3])
    section, dot, leaf = key.rpartition(".")
    index = rng.randrange(len(leaf) - 1)
    prefix, first, second, suffix = leaf[:index], leaf[index], leaf[index + 1], leaf[index + 2 :]
    misspellings = [
        prefix + second + suffix,
        prefix + second + first + suffix,
        prefix + first * 2 + second + suffix + "x",
        leaf.upper(),
    ]
    valid_keys = {*KEYS, *(key.partition(".")[0] for key in KEYS)}
    misspelling = next(s for s in rng.sample(misspellings, 4) if f"{section}{dot}{s}" not in valid_keys)
    return BadInput(["train", bench.settings(**{f"{section}{dot}{misspelling}": 1})], ["settings.yaml", misspelling])


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
    "no_such_module": [
        {"lora.target_modules": ["no_such_module"]},
        {"method": "head", "head.modules": ["no_such_module"]},
    ],
    "no_such": [{"lora.rank_pattern": {"no_such": 4}}, {"lora.train_modules": ["no_such"]}],
    "no.such.parameter": [{"lora.target_parameters": ["no.such.parameter"]}],
    "image": [{"task": "image-classification"}],
    "int8": [{"precision": "int8", "lora.dora": True}],
    "blocks": [{"method": "last", "last.blocks": 99}],
    "tpu": [{"device": "tpu"}],
}
CONFLICT_CASES = [(changes, word) for word, options in CONFLICTS.items() for changes in options]
CONFLICT_CASES += [({key: value}, key.rpartition(".")[2]) for key, value in LEAF_KEY_CASES]


@family(len(CONFLICT_CASES))
def settings_that_do_not_go_together(rng: random.Random, bench: Bench, number: int) -> BadInput:
    changes, word = CONFLICT_CASES[number]
    return BadInput(["train", bench.settings(**changes)], [word])


@family(16)
def a_settings_file_that_is_none(rng: random.Random, bench: Bench, number: int) -> BadInput:
    bomb = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    contents = [
        *(b"\xff\xfe\x00", b"model: m\n  data: [\n", b"- model: m\n", b"just a text", b"5"),
        *(b"model: !!python/object/apply:os.system ['true']\n", b"model: m\nmodel: n\ndata: d\n"),
        *(b"model: m\ndata: d\ntrain: {epochs: 1, epochs: 2}\n", b"[" * 5000, b"{a: " * 3000),
        *(b"\t\tmodel: m", b"model: @m", b"model: m\ndata: d\n? [a, b]\n: c\n"),
        *(b"model: m\ndata: d\n<<: 5\n", b"output: 2024-13-45", "\n".join([*bomb, "model: *i"]).encode()),
        *(b"model: *nothing", b"model: m\n---\nmodel: n\n", b"\x00", b"model: \x07"),
    ]
    file = bench.folder / "odd.yaml"
    file.write_bytes(rng.choice(contents))
    return BadInput(["train", file], ["odd.yaml"])


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
    "check ROWS --model no/such/model => no/such/model; check ROWS => model; frobnicate",
}
FLAG_CASES = [
    f"{prefix} {case}" if "=>" in case else f"{prefix} {case} => {case.split()[0]}"
    for prefix, cases in FLAGS.items()
    for case in cases.split("; ")
]


@family(len(FLAG_CASES))
def flags_that_cannot_be_used(rng: random.Random, bench: Bench, number: int) -> BadInput:
    command, _, word = FLAG_CASES[number].partition("=>")
    substitutions: dict = {"SETTINGS": bench.settings(), "RUN": bench.run, "MODEL": bench.model, "ROWS": bench.rows}
    substitutions["LONG"] = "x" * 2000
    return BadInput([str(substitutions.get(argument, argument)) for argument in shlex.split(command)], [word.strip()])


# Paths

FILE_NAMES = ["[x].jsonl", "a\nb.jsonl", "x" * 300 + ".jsonl", "%s{0}.jsonl", " ", "*.jsonl", "\\", "a\x1b[31m.jsonl"]


@family(24)
def data_that_is_not_there(rng: random.Random, bench: Bench, number: int) -> BadInput:
    folder = bench.folder / "data"
    (folder / "folder.jsonl").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("x")
    (folder / "rows.jsonl").write_text('{"text": "a"}')
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    references = ["pypi:", "pypi:x", "pypi:x==", "pypi:x==1/../../y", "no such thing", "a/b/c/d", "http://x/y.jsonl"]
    existing = ["loop.jsonl", "empty", "folder.jsonl"]
    pairs = [(str(folder / rng.choice(FILE_NAMES)), "data"), (str(folder / "rows.jsonl" / "inner.jsonl"), "data")]
    name, word = rng.choice([*pairs, (str(folder / rng.choice(existing)),) * 2, (rng.choice(references),) * 2])
    key = "data.train" if word in references else rng.choice(["data.train", "data.eval"])
    return BadInput(["train", bench.settings(**{key: name})], [word])


@family(8)
def a_name_that_is_no_text(rng: random.Random, bench: Bench, number: int) -> BadInput:
    """Use an argument that is not UTF-8. Python represents such bytes as surrogates."""
    name = os.fsdecode(b"caf\xe9" + rng.choice([*(b".jsonl", b"", b".yaml")]))
    path = str(bench.folder / name)
    options = [["train"], ["train", str(bench.settings()), "--data"], ["train", str(bench.settings()), "--model"]]
    options += [["eval"], ["inspect"], ["generate", "--prompt", "x"]]
    return BadInput([*rng.choice(options), path], ["caf"])


@family(12)
def an_output_that_cannot_be_written(rng: random.Random, bench: Bench, number: int) -> BadInput:
    folder = bench.folder / "place"
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_text("kept")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "folder" / rng.choice(["thesis.tex", "[a].txt", "run.txt"])).write_text("kept")
    names = ["file", "file/run", "file/a/b", "loop", "loop/run", "x" * 300, "folder"]
    output, word = rng.choice([(folder / rng.choice(names), "place"), (Path("/proc/deltaw-run"), "/proc")])
    return BadInput(["train", bench.settings(output=str(output))], [word])


# Models and adapters


def _damage(rng: random.Random, file: Path) -> None:
    """Truncate or empty a file, or overwrite its first bytes."""
    content = file.read_bytes()
    truncated = content[: rng.randrange(1, max(2, len(content) // 2))]
    garbled = rng.randbytes(32) + content[32:]
    file.write_bytes(rng.choice([truncated, b"", garbled, b"\x00" * 64]))


BAD_JSON = ["", "{", "[]", "5", "null", '"text"', "{]", '{"a": }', "\x00"]


@family(36)
def a_model_that_is_damaged(rng: random.Random, bench: Bench, number: int) -> BadInput:
    model = bench.copy_model()
    kind = rng.randrange(10)
    weights, config, tokens = (model / name for name in ("model.safetensors", "config.json", "tokenizer.json"))
    if kind == 0:
        _damage(rng, weights)
    elif kind == 1:
        weights.unlink()
        for name in rng.choice([[], ["pytorch_model.bin"], ["model.pt"], ["weights.ckpt"]]):
            (model / name).write_bytes(b"\x80\x04K\x01.")
    elif kind in (2, 6):
        (config if kind == 2 else tokens).write_text(rng.choice([*BAD_JSON, *(["{}"] if kind == 6 else [])]))
    elif kind in (3, 7):
        (config if kind == 3 else tokens).unlink()
    elif kind == 4:
        key = rng.choice(["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
        update_file(config, **{key: rng.choice([-1, 0, "x", None, [1], 0.5, {}, 77])})
    elif kind == 5:
        update_file(config, model_type=rng.choice(["no-such-type", "", 5, None, "bert"]))
    elif kind == 8:
        index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
        (model / "model.safetensors.index.json").write_text(rng.choice([json.dumps(index), *BAD_JSON]))
    else:
        template = rng.choice(["{% for %}", "{{ 1 / 0 }}", "{{ messages[9].content }}", "", "{{ no.such }}"])
        (model / "chat_template.jinja").write_text(template)
        training = bench.train_command(bench.rows, **{"data.template": "chat"})
        return BadInput([*training, "--model", str(model)], [("template", "model")])
    verb = rng.choice(["train", "eval", "generate", *(["plan"] if kind in (2, 3, 6, 7) else [])])
    if verb in ("train", "plan"):
        return BadInput([verb, bench.settings(model=str(model))], ["model"])
    extra_arguments = ["--data", bench.rows] if verb == "eval" else ["--prompt", "x"]
    return BadInput([verb, model, *extra_arguments], ["model"])


@family(6)
def a_model_that_is_none(rng: random.Random, bench: Bench, number: int) -> BadInput:
    contents = {"noise.gguf": b"GGUF\x03\x00\x00\x00" + rng.randbytes(100), "other.gguf": rng.randbytes(100)}
    contents |= {
        "empty.gguf": b"",
        "pytorch_model.bin": b"\x80\x04K\x01.",
        "model.safetensors": b"x",
        "model.onnx": b"x",
    }
    name, content = list(contents.items())[number]
    (bench.folder / name).write_bytes(content)
    return BadInput(["train", bench.settings(model=str(bench.folder / name))], [name])


def _open_command(rng: random.Random, run: Path) -> tuple[list[object], str]:
    verb = rng.choice(VERBS)
    return [verb, run, *(["--prompt", "x"] if verb == "generate" else [])], "x\n" if verb == "chat" else ""


@family(40)
def an_adapter_that_is_damaged(rng: random.Random, bench: Bench, number: int) -> BadInput:
    run = bench.copy_run()
    weights, config = run / "adapter_model.safetensors", run / "adapter_config.json"
    arguments, stdin = _open_command(rng, run)
    kind = rng.randrange(5)
    word: str | tuple[str, ...] = weights.name
    if kind == 0:
        _damage(rng, weights)
    elif kind == 1:
        weights.unlink()
        if rng.random() < 0.5:
            (run / "adapter_model.bin").write_bytes(b"\x80\x04K\x01.")
    elif kind == 2:
        config.write_text(rng.choice(BAD_JSON))
        word = config.name
    elif kind == 3:
        key = rng.choice(["r", "lora_alpha", "peft_type", "target_modules"])
        update_file(config, **{key: rng.choice([-1, "x", [[1]], {"a": 1}, 0, *([0.5] if key != "lora_alpha" else [])])})
        word = (config.name, weights.name)
    else:
        (run / "run.yaml").write_text(rng.choice(["{", "- a", "model: 5", "modl: m", "data: {form: novel}"]))
        if arguments[0] == "inspect":  # reads no settings
            arguments, stdin = ["eval", run], ""
        word = "run.yaml"
    return BadInput(arguments, [word], stdin)


OTHER_SETTINGS = [
    *("lora.rank 2", "lora.target_modules attention", "method head", "train.seed 5", "train.batch_size 2"),
    *("train.schedule constant", "data.eval 1", "data.max_length 64"),
]


@family(40)
def a_run_that_cannot_go_on(rng: random.Random, bench: Bench, number: int) -> BadInput:
    run = bench.copy_run()
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    extra_arguments: list[object] = ["--train.epochs", "6"]
    word = "adapter"
    kind = rng.randrange(7)
    file = checkpoint / rng.choice(["manifest.json", "state.json", "state.safetensors"])
    if kind == 0:
        _damage(rng, file)
    elif kind == 1:
        file.unlink()
    elif kind == 2:
        (checkpoint / "manifest.json").write_text(rng.choice(BAD_JSON))
    elif kind == 3:  # valid checksums, but invalid content
        state = checkpoints.read_checkpoint(checkpoint)
        key = rng.choice(["training", "settings", "choices", "rows", "metrics_lines", "extras"])
        values = {**state.values, key: rng.choice([None, "x", [], ["a"]])}
        if rng.random() < 0.3:
            del values[key]
        tensors = {name: state.tensors[name].clone() for name in state.tensors}
        checkpoints.write_checkpoint(checkpoint.parent, state.step, values, tensors).publish()
    elif kind == 4:
        (run / "run.yaml").write_text(rng.choice(["{", "- a", "model: 5", "modl: m", "data: {form: novel}"]))
        word = "run.yaml"
    elif kind == 5:
        word, value = rng.choice(OTHER_SETTINGS).split()
        extra_arguments += [f"--{word}", value]
    else:
        extra_arguments = rng.choice([[], ["--train.epochs", "1"], ["--train.max_steps", "2"]])
    return BadInput(["train", "--resume", run, *extra_arguments], [word])


@family(14)
def a_folder_that_is_no_run(rng: random.Random, bench: Bench, number: int) -> BadInput:
    run = bench.folder / "adapter"
    kind = rng.randrange(4)
    if kind == 0:
        run.mkdir()
    elif kind == 1:
        run.write_text("a file")
    elif kind == 2:
        (bench.copy_run() / "adapter_config.json").unlink()
    arguments, stdin = _open_command(rng, run)
    return BadInput(arguments, ["adapter"], stdin)
