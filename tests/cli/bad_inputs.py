"""Generated bad inputs: each family makes as many different ones as there are seeds.

A case is the arguments of a verb that cannot work, and words that its message must hold: the file, the row or
the key that it concerns.
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
from tests.cli.conftest import changed

ROWS = [{"prompt": f"paint it {color}", "completion": color[0]} for color in ("red", "blue", "gray")]
VERBS = ("eval", "generate", "chat", "inspect")


@dataclass
class Bench:
    """Where cases are made: a folder of their own, a sound model, sound rows and a finished run to copy."""

    folder: Path
    model: Path
    rows: Path
    run: Path

    def settings(self, **instead: object) -> Path:
        """A settings file of a short run, with other values for some dotted keys."""
        data = {"train": str(self.rows), "eval": 2}
        values: dict = {"model": str(self.model), "data": data, "train": {"batch_size": 5, "drift": False}}
        values |= {"precision": "fp32", "threads": 1}
        for key, value in instead.items():
            at = values
            *sections, leaf = key.split(".")
            for section in sections:
                at = at.setdefault(section, {})
            at[leaf] = value
        file = self.folder / "settings.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        return file

    def trains_on(self, data: object, **instead: object) -> list[str]:
        return ["train", str(self.settings(**{"data.train": str(data), **instead}))]

    def copied_model(self) -> Path:
        return Path(shutil.copytree(self.model, self.folder / "model"))

    def copied_run(self) -> Path:
        return Path(shutil.copytree(self.run, self.folder / "adapter"))


@dataclass(frozen=True)
class Bad:
    """One bad input. ``words``: of each tuple, one must be in the message."""

    arguments: Sequence[object]
    words: Sequence[str | tuple[str, ...]]
    stdin: str = ""


Family = Callable[[random.Random, Bench, int], Bad]
FAMILIES: dict[str, tuple[Family, int]] = {}


def family(count: int) -> Callable[[Family], Family]:
    """Register a family, of which so many cases are made."""

    def register(made: Family) -> Family:
        FAMILIES[made.__name__] = (made, count)
        return made

    return register


def every_case() -> list[tuple[str, int]]:
    """Family and seed of each case."""
    return [(name, seed) for name, (_, count) in FAMILIES.items() for seed in range(count)]


def make(name: str, seed: int, bench: Bench) -> Bad:
    return FAMILIES[name][0](random.Random(f"{name} {seed}"), bench, seed)


# Files of rows


def lines(rows: Sequence[object]) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


def _bad_line(draw: random.Random, good: bytes) -> bytes:
    """A line that is no row: not JSON, not UTF-8, not an object, or with a value that is no text."""
    at = draw.randrange(1, len(good))
    key, other = draw.sample([b"prompt", b"completion"], 2)
    values = [b"NaN", b"-Infinity", b"1e999", b"7" * 5000, b"true", b"[]", b"{}", b"[[1]]", b"0.5", b'"\\ud800"']
    depth = draw.choice([3, 200_000])
    byte = bytes([draw.choice([0x80, 0xC0, 0xFF, 0xE9])])
    others = [good[:at], good[:at] + b"\x00" + good[at:], good[:at] + byte + good[at:], good + b"}", b"[" * depth]
    others += [b'{"a":' * depth, json.dumps(draw.choice([[], ["a"], 5, "text", True, None])).encode()]
    others += [b'{"%s": %s, "%s": "x"}' % (key, draw.choice(values), other), b'{"%s": "x"}' % key]
    others += [b'{"%s": null, "%s": "x"}' % (key, other), b"prompt: red", b"{'prompt': 'a', 'completion': 'b'}"]
    return draw.choice([*others, b'{"prompt": "a", "completion": "b",}'])


def _trained(bench: Bench, name: str, content: bytes, *words: str | tuple[str, ...], **instead: object) -> Bad:
    """Training on a file of this name and content."""
    file = bench.folder / name
    file.write_bytes(content)
    return Bad(bench.trains_on(file, **instead), words or [name])


@family(70)
def a_line_that_is_no_row(draw: random.Random, bench: Bench, number: int) -> Bad:
    rows = lines(ROWS * draw.randint(1, 3))
    at = draw.randrange(len(rows))
    rows[at] = _bad_line(draw, rows[at])
    content = b"\n".join(rows) + draw.choice([b"", b"\n"])
    return _trained(bench, "rows.jsonl", content, "rows.jsonl", (f"line {at + 1}", f"row {at + 1}"))


@family(12)
def a_json_file_that_is_no_list_of_rows(draw: random.Random, bench: Bench, number: int) -> Bad:
    good = json.dumps(ROWS).encode()
    others = [good[: draw.randrange(1, len(good))], json.dumps({"data": ROWS}).encode(), good[:-1] + b', "text"]']
    others += [b"[" * 200_000, b"\n".join(lines(ROWS)), b"5", b'"xxxxx', good.decode().encode("utf-16"), b"null"]
    return _trained(bench, "rows.json", draw.choice(others))


@family(14)
def a_table_that_is_damaged(draw: random.Random, bench: Bench, number: int) -> Bad:
    rows = [f'"paint, it {n}",{n}' for n in range(5)]
    at = draw.randrange(5)
    slips = [rows[at] + more for more in (",more", ",", ",a,b")]
    kind = draw.randrange(4)
    if kind == 0:
        rows[at] = draw.choice([*slips, "one cell", f'"paint, it {at},{at}', f'"paint" it,{at}'])
    header = draw.choice(["prompt,prompt", "a,b", "question,answer", ","]) if kind == 1 else "prompt,completion"
    content = "\n".join([header, *rows]).encode("utf-16" if kind == 2 else "utf-8")
    packed = gzip.compress(content)
    if kind == 3:
        return _trained(bench, "rows.csv.gz", packed[: draw.randrange(1, len(packed) - 1)])
    return _trained(bench, *draw.choice([("rows.csv", content), ("rows.csv.gz", packed)]))


@family(16)
def a_file_of_columns_that_is_damaged(draw: random.Random, bench: Bench, number: int) -> Bad:
    prompts = [row["prompt"] for row in ROWS]
    odd = draw.choice([[1, 2, 3], [0.5, float("nan"), 1], [[1], [], [2]], [None] * 3])
    none = pyarrow.array([], "string")
    kind = draw.randrange(5)
    columns: list[dict] = [{"prompt": prompts, "completion": odd}, {"left": [1, 2]}]
    columns.append({"prompt": none, "completion": none})
    table = pyarrow.table({"prompt": prompts, "completion": ["a", "b", "c"]} if kind > 2 else columns[kind])
    name, sink = draw.choice(["rows.parquet", "rows.arrow"]), pyarrow.BufferOutputStream()
    if name == "rows.parquet":
        pyarrow.parquet.write_table(table, sink)
    else:
        with pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    whole = sink.getvalue().to_pybytes()
    others = {3: whole[: draw.randrange(1, len(whole) - 8)], 4: draw.randbytes(draw.randint(1, 3000))}
    return _trained(bench, name, others.get(kind, whole))


@family(16)
def a_compressed_file_that_is_damaged(draw: random.Random, bench: Bench, number: int) -> Bad:
    pack, ending = draw.choice([(gzip.compress, "gz"), (bz2.compress, "bz2"), (lzma.compress, "xz")])
    whole, plain = pack(b"\n".join(lines(ROWS * 50))), b"\n".join(lines(ROWS))
    cut = whole[: draw.randrange(1, len(whole) - 1)]
    return _trained(bench, f"rows.jsonl.{ending}", draw.choice([cut, plain, draw.randbytes(200), pack(plain + b"\n{")]))


EMPTY: list[tuple[str, bytes]] = [
    *(("rows.jsonl", b""), ("rows.jsonl", b"\n \n\t\n"), ("rows.json", b"[]"), ("rows.json", b"  "), ("rows.csv", b"")),
    *(("rows.csv", b"prompt,completion\n"), ("rows.jsonl.gz", gzip.compress(b"")), ("rows.jsonl.gz", b"")),
    *(("rows.parquet", b""), ("rows.tsv.xz", lzma.compress(b"prompt\tcompletion\n\n")), ("rows.txt", b"a text")),
    ("rows", b'{"text": "a"}'),
]


@family(len(EMPTY))
def a_file_without_rows(draw: random.Random, bench: Bench, number: int) -> Bad:
    return _trained(bench, *EMPTY[number])


TURNS = [
    *({"role": "oracle", "content": "x"}, {"role": "user"}, {"content": "x"}, {"role": "user", "content": 5}),
    *({"role": "assistant", "content": [["x"]]}, {"role": None, "content": "x"}, {"role": ["user"], "content": "x"}),
    *({"role": "user", "content": {"a": 1}}, {"role": "assistant", "content": float("nan")}, "hello", 5, None, []),
]


@family(20)
def a_conversation_that_is_none(draw: random.Random, bench: Bench, number: int) -> Bad:
    sound = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    at, kind = draw.randrange(3), draw.randrange(4)
    rows: list[dict] = [{"messages": list(sound)} for _ in range(3)]
    if kind == 0:
        rows[at]["messages"][draw.randrange(2)] = draw.choice(TURNS)
    elif kind == 1:
        rows[at]["messages"] = draw.choice([[], {}, "text", 5, sound[:1], sound[::-1], [sound]])
    elif kind == 2:
        rows[at] = {"conversations": "x"}
    else:
        rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]} for _ in range(3)]
        rows[at]["conversations"][1] = draw.choice([{"from": "oracle", "value": "x"}, {"from": "gpt"}, 5, None])
    return _trained(bench, "talks.jsonl", b"\n".join(lines(rows)), "talks.jsonl", f"row {at + 1}")


@family(16)
def labels_that_are_none(draw: random.Random, bench: Bench, number: int) -> Bad:
    odd = {
        "sequence-classification": [0.5, [1], {}, None, "", float("nan"), float("inf")],
        "regression": ["many", float("nan"), float("inf"), "", None, [1], {}, True, "1e999"],
    }
    task = draw.choice(list(odd))
    rows: list[dict] = [{"text": f"row {n}", "label": n % 2} for n in range(8)]
    at = draw.randrange(8)
    rows[at]["label"] = draw.choice(odd[task])
    if draw.random() < 0.2:
        rows[at] = {"text": draw.choice([5, None, ["a"], {}]), "label": 1}
    return _trained(bench, "labels.jsonl", b"\n".join(lines(rows)), "labels.jsonl", f"row {at + 1}", task=task)


# Settings

KEYS = [setting.key for setting in settings()]
# Values that hardly any setting takes; those that the schema of the settings refuses are given.
ODD = [
    *({"a": {"b": []}}, [[{}]], -1, -0.5, float("nan"), float("inf"), 1e300, 2**70, "no such value"),
    *("", "\x00", [1, "a"], True, 0, 2.5, [], "[unclosed", "-5GB"),
]


@family(max(2 * len(KEYS), 150))
def a_setting_with_a_value_that_it_cannot_have(draw: random.Random, bench: Bench, number: int) -> Bad:
    validator = jsonschema.Draft202012Validator(run_schema())
    while True:
        key = draw.choice([key for key in KEYS if key != "output"])  # a flag gives that one
        value = draw.choice(ODD)
        file = bench.settings(**{key: value})
        if not validator.is_valid(yaml.safe_load(file.read_text(encoding="utf-8"))) and not _coerced(key, value):
            return Bad(["train", file], [key.rpartition(".")[2], "settings.yaml"])


def _coerced(key: str, value: object) -> bool:
    """Whether a reader may take a value of a near type for the one that it wants, as 1 for true."""
    if isinstance(value, str):
        return False
    near_text = key.startswith("data.") and isinstance(value, int | float)
    return near_text or isinstance(value, bool) or value in (0, 1, [])


@family(20)
def a_key_that_is_misspelt(draw: random.Random, bench: Bench, number: int) -> Bad:
    key = draw.choice([key for key in KEYS if len(key.rpartition(".")[2]) > 3])
    section, dot, leaf = key.rpartition(".")
    at = draw.randrange(len(leaf) - 1)
    before, one, two, after = leaf[:at], leaf[at], leaf[at + 1], leaf[at + 2 :]
    slips = [before + two + after, before + two + one + after, before + one * 2 + two + after + "x", leaf.upper()]
    known = {*KEYS, *(key.partition(".")[0] for key in KEYS)}
    slip = next(s for s in draw.sample(slips, 4) if f"{section}{dot}{s}" not in known)
    return Bad(["train", bench.settings(**{f"{section}{dot}{slip}": 1})], ["settings.yaml", slip])


NAN = float("nan")
# Of these alone, the last part of the key must be in the message.
NAMED: list[tuple[str, object]] = [
    *(("data.date", "yesterday"), ("data.max_length", 2), ("lora.invocation_tokens", [1]), ("device", "cuda:99")),
    *(("lora.target_modules", []), ("lora.layers", "7-"), ("lora.layers", "5-2"), ("model", ""), ("memory", "1KB")),
    *(("lora.trainable_token_indices", [10**6]), ("memory", "much"), ("train.time", "soon")),
]
# By the word that the message must have.
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
    "dora": [{"lora.activation": "completion", "lora.dora": True}],
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
EACH_CONFLICT = [(changes, word) for word, given in CONFLICTS.items() for changes in given]
EACH_CONFLICT += [({key: value}, key.rpartition(".")[2]) for key, value in NAMED]


@family(len(EACH_CONFLICT))
def settings_that_do_not_go_together(draw: random.Random, bench: Bench, number: int) -> Bad:
    changes, word = EACH_CONFLICT[number]
    return Bad(["train", bench.settings(**changes)], [word])


@family(16)
def a_settings_file_that_is_none(draw: random.Random, bench: Bench, number: int) -> Bad:
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
    file.write_bytes(draw.choice(contents))
    return Bad(["train", file], ["odd.yaml"])


# By how the command begins: how it ends, and after => the word of the message, if it is not the first of the end.
FLAGS = {
    "": "trian; train --train.learning_rat 1 => --train.learning_rat; train a b => b; eval => RUN; chat => RUN; "
    "inspect => ADAPTER; completion tcsh => tcsh; schema more => more; doctor --model no/such/model => no/such/model; "
    "init new.yaml --data no.docx --task no_such => no_such; train --resume no_such_run => no_such_run; "
    "train SETTINGS --resume RUN => --resume; runs no_such_run => no_such_run; runs RUN --output page.html => --output",
    "plan SETTINGS": "--methods lora,no_such => no_such; --budget much => much; --budget -3GB => -3GB; "
    "--methods head --budget 1B => 1; --picture plan.docx => .docx",
    "compare SETTINGS": "--methods no_such => no_such; --rates lora => lora; --rates lora=fast => fast; "
    "--rates lora=-1 => -1; --share 2",
    "tune SETTINGS": "--search lora.rank => lora.rank; --search 'lora.rnk=[1, 2]' => lora.rnk; "
    "--search lora.rank=[] => lora.rank; --search lora.rank=8..4 => lora.rank; --trials 0",
    "eval RUN": "--rows 0; --rows many; --data no.jsonl => no.jsonl; --precision fp12 => fp12; --device tpu => tpu; "
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
EACH_FLAG = [
    f"{begin} {end}" if "=>" in end else f"{begin} {end} => {end.split()[0]}"
    for begin, ends in FLAGS.items()
    for end in ends.split("; ")
]


@family(len(EACH_FLAG))
def flags_that_cannot_be_used(draw: random.Random, bench: Bench, number: int) -> Bad:
    command, _, word = EACH_FLAG[number].partition("=>")
    places: dict = {"SETTINGS": bench.settings(), "RUN": bench.run, "MODEL": bench.model, "ROWS": bench.rows}
    places["LONG"] = "x" * 2000
    return Bad([str(places.get(argument, argument)) for argument in shlex.split(command)], [word.strip()])


# Paths

NAMES = ["[x].jsonl", "a\nb.jsonl", "x" * 300 + ".jsonl", "%s{0}.jsonl", " ", "*.jsonl", "\\", "a\x1b[31m.jsonl"]


@family(24)
def data_that_is_not_there(draw: random.Random, bench: Bench, number: int) -> Bad:
    place = bench.folder / "data"
    (place / "folder.jsonl").mkdir(parents=True)
    (place / "empty").mkdir()
    (place / "notes.txt").write_text("x")
    (place / "rows.jsonl").write_text('{"text": "a"}')
    (place / "loop.jsonl").symlink_to(place / "loop.jsonl")
    odd = ["pypi:", "pypi:x", "pypi:x==", "pypi:x==1/../../y", "no such thing", "a/b/c/d", "http://x/y.jsonl"]
    known = ["loop.jsonl", "empty", "folder.jsonl"]
    pairs = [(str(place / draw.choice(NAMES)), "data"), (str(place / "rows.jsonl" / "inner.jsonl"), "data")]
    name, word = draw.choice([*pairs, (str(place / draw.choice(known)),) * 2, (draw.choice(odd),) * 2])
    which = "data.train" if word in odd else draw.choice(["data.train", "data.eval"])
    return Bad(["train", bench.settings(**{which: name})], [word])


@family(8)
def a_name_that_is_no_text(draw: random.Random, bench: Bench, number: int) -> Bad:
    """Arguments of a command may hold any bytes; Python shows those that are not UTF-8 as surrogates."""
    name = os.fsdecode(b"caf\xe9" + draw.choice([*(b".jsonl", b"", b".yaml")]))
    place = str(bench.folder / name)
    given = [["train"], ["train", str(bench.settings()), "--data"], ["train", str(bench.settings()), "--model"]]
    given += [["eval"], ["inspect"], ["generate", "--prompt", "x"]]
    return Bad([*draw.choice(given), place], ["caf"])


@family(12)
def an_output_that_cannot_be_written(draw: random.Random, bench: Bench, number: int) -> Bad:
    place = bench.folder / "place"
    (place / "folder").mkdir(parents=True)
    (place / "file").write_text("kept")
    (place / "loop").symlink_to(place / "loop")
    (place / "folder" / draw.choice(["thesis.tex", "[a].txt", "run.txt"])).write_text("kept")
    names = ["file", "file/run", "file/a/b", "loop", "loop/run", "x" * 300, "folder"]
    output, word = draw.choice([(place / draw.choice(names), "place"), (Path("/proc/deltaw-run"), "/proc")])
    return Bad(["train", bench.settings(output=str(output))], [word])


# Models and adapters


def _damaged(draw: random.Random, file: Path) -> None:
    """A file cut short, emptied, or with a garbled beginning."""
    whole = file.read_bytes()
    cut = whole[: draw.randrange(1, max(2, len(whole) // 2))]
    garbled = draw.randbytes(32) + whole[32:]
    file.write_bytes(draw.choice([cut, b"", garbled, b"\x00" * 64]))


BAD_JSON = ["", "{", "[]", "5", "null", '"text"', "{]", '{"a": }', "\x00"]


@family(36)
def a_model_that_is_damaged(draw: random.Random, bench: Bench, number: int) -> Bad:
    model = bench.copied_model()
    kind = draw.randrange(10)
    weights, config, tokens = (model / name for name in ("model.safetensors", "config.json", "tokenizer.json"))
    if kind == 0:
        _damaged(draw, weights)
    elif kind == 1:
        weights.unlink()
        for name in draw.choice([[], ["pytorch_model.bin"], ["model.pt"], ["weights.ckpt"]]):
            (model / name).write_bytes(b"\x80\x04K\x01.")
    elif kind in (2, 6):
        (config if kind == 2 else tokens).write_text(draw.choice([*BAD_JSON, *(["{}"] if kind == 6 else [])]))
    elif kind in (3, 7):
        (config if kind == 3 else tokens).unlink()
    elif kind == 4:
        key = draw.choice(["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
        changed(config, **{key: draw.choice([-1, 0, "x", None, [1], 0.5, {}, 77])})
    elif kind == 5:
        changed(config, model_type=draw.choice(["no-such-type", "", 5, None, "bert"]))
    elif kind == 8:
        index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
        (model / "model.safetensors.index.json").write_text(draw.choice([json.dumps(index), *BAD_JSON]))
    else:
        template = draw.choice(["{% for %}", "{{ 1 / 0 }}", "{{ messages[9].content }}", "", "{{ no.such }}"])
        (model / "chat_template.jinja").write_text(template)
        training = bench.trains_on(bench.rows, **{"data.template": "chat"})
        return Bad([*training, "--model", str(model)], [("template", "model")])
    verb = draw.choice(["train", "eval", "generate", *(["plan"] if kind in (2, 3, 6, 7) else [])])
    if verb in ("train", "plan"):
        return Bad([verb, bench.settings(model=str(model))], ["model"])
    more = ["--data", bench.rows] if verb == "eval" else ["--prompt", "x"]
    return Bad([verb, model, *more], ["model"])


@family(6)
def a_model_that_is_none(draw: random.Random, bench: Bench, number: int) -> Bad:
    made = {"noise.gguf": b"GGUF\x03\x00\x00\x00" + draw.randbytes(100), "other.gguf": draw.randbytes(100)}
    made |= {"empty.gguf": b"", "pytorch_model.bin": b"\x80\x04K\x01.", "model.safetensors": b"x", "model.onnx": b"x"}
    name, content = list(made.items())[number]
    (bench.folder / name).write_bytes(content)
    return Bad(["train", bench.settings(model=str(bench.folder / name))], [name])


def _opens(draw: random.Random, run: Path) -> tuple[list[object], str]:
    verb = draw.choice(VERBS)
    return [verb, run, *(["--prompt", "x"] if verb == "generate" else [])], "x\n" if verb == "chat" else ""


@family(40)
def an_adapter_that_is_damaged(draw: random.Random, bench: Bench, number: int) -> Bad:
    run = bench.copied_run()
    weights, config = run / "adapter_model.safetensors", run / "adapter_config.json"
    arguments, stdin = _opens(draw, run)
    kind = draw.randrange(5)
    word: str | tuple[str, ...] = weights.name
    if kind == 0:
        _damaged(draw, weights)
    elif kind == 1:
        weights.unlink()
        if draw.random() < 0.5:
            (run / "adapter_model.bin").write_bytes(b"\x80\x04K\x01.")
    elif kind == 2:
        config.write_text(draw.choice(BAD_JSON))
        word = config.name
    elif kind == 3:
        key = draw.choice(["r", "lora_alpha", "peft_type", "target_modules"])
        changed(config, **{key: draw.choice([-1, "x", [[1]], {"a": 1}, 0, *([0.5] if key != "lora_alpha" else [])])})
        word = (config.name, weights.name)
    else:
        (run / "run.yaml").write_text(draw.choice(["{", "- a", "model: 5", "modl: m", "data: {form: novel}"]))
        if arguments[0] == "inspect":  # which reads no settings
            arguments, stdin = ["eval", run], ""
        word = "run.yaml"
    return Bad(arguments, [word], stdin)


OTHER_SETTINGS = [
    *("lora.rank 2", "lora.target_modules attention", "method head", "train.seed 5", "train.batch_size 2"),
    *("train.schedule constant", "data.eval 1", "data.max_length 64"),
]


@family(40)
def a_run_that_cannot_go_on(draw: random.Random, bench: Bench, number: int) -> Bad:
    run = bench.copied_run()
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    more: list[object] = ["--train.epochs", "6"]
    word = "adapter"
    kind = draw.randrange(7)
    file = checkpoint / draw.choice(["manifest.json", "state.json", "state.safetensors"])
    if kind == 0:
        _damaged(draw, file)
    elif kind == 1:
        file.unlink()
    elif kind == 2:
        (checkpoint / "manifest.json").write_text(draw.choice(BAD_JSON))
    elif kind == 3:  # whole, with checksums that fit, and not a run's
        found = checkpoints.read(checkpoint)
        key = draw.choice(["training", "settings", "choices", "rows", "metrics_lines", "extras"])
        values = {**found.values, key: draw.choice([None, "x", [], ["a"]])}
        if draw.random() < 0.3:
            del values[key]
        tensors = {name: found.tensors[name].clone() for name in found.tensors}
        checkpoints.write(checkpoint.parent, found.step, values, tensors).publish()
    elif kind == 4:
        (run / "run.yaml").write_text(draw.choice(["{", "- a", "model: 5", "modl: m", "data: {form: novel}"]))
        word = "run.yaml"
    elif kind == 5:
        word, value = draw.choice(OTHER_SETTINGS).split()
        more += [f"--{word}", value]
    else:
        more = draw.choice([[], ["--train.epochs", "1"], ["--train.max_steps", "2"]])
    return Bad(["train", "--resume", run, *more], [word])


@family(14)
def a_folder_that_is_no_run(draw: random.Random, bench: Bench, number: int) -> Bad:
    run = bench.folder / "adapter"
    kind = draw.randrange(4)
    if kind == 0:
        run.mkdir()
    elif kind == 1:
        run.write_text("a file")
    elif kind == 2:
        (bench.copied_run() / "adapter_config.json").unlink()
    arguments, stdin = _opens(draw, run)
    return Bad(arguments, ["adapter"], stdin)
