"""Texts on the command line: how they are chosen, ended and constrained, and by what they are written."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from deltaw.runs.fit import fit
from deltaw.serving import opening
from deltaw.serving.probes import NotDecodable
from deltaw.training.origin import open_run, score_run
from tests.byte_models import byte_tokenizer
from tests.cli.conftest import Call, Ended, assert_refused
from tests.conftest import write_rows

PROMPTS = ("paint it red", "paint it blue", "x")
GENERATE = ("generate", "--max-new-tokens", 8, "--precision", "fp32")


def asked(*prompts: str) -> list[str]:
    return [part for prompt in prompts for part in ("-p", prompt)]


@pytest.fixture
def generate(call: Call, finished_run: Path) -> Callable[..., list[dict]]:
    """Texts of a run for flags, as JSON."""

    def run(*flags: object, prompts: tuple[str, ...] = PROMPTS, of: Path = finished_run) -> list[dict]:
        ended = call(*GENERATE, of, *asked(*prompts), *flags, "--json", status=0)
        return list(json.loads(ended.out)["completions"])

    return run


@pytest.fixture
def transformers_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is one that the decoder knows."""

    def refuse(*_: object, **__: object) -> None:
        raise NotDecodable("its blocks are made of glass")

    monkeypatch.setattr(opening, "decodable", refuse)


def by_hand(folder: Path, prompts: tuple[str, ...], count: int, *, base: bool = False) -> list[str]:
    """Greedy texts the slow, obvious way: the whole sequence through the model for each token."""
    from deltaw.data import encode_prompt
    from deltaw.training.origin import open_run

    opened = open_run(str(folder), precision="fp32", say=lambda line: None)
    texts = []
    for prompt in prompts:
        ids = opened.prompt(encode_prompt(prompt, opened.data or "auto", opened.tokenizer)).tolist()
        start = len(ids)
        while len(ids) - start < count:
            with torch.no_grad(), opened.base() if base else contextlib.nullcontext():
                token = int(opened.model(torch.tensor([ids])).logits[0, -1].argmax())
            if token in (0, 2):
                break
            ids.append(token)
        texts.append(opened.tokenizer.decode(ids[start:], skip_special_tokens=True))
    return texts


def test_texts_of_adapter_and_base_are_the_models_own(generate: Callable[..., list[dict]], finished_run: Path) -> None:
    rows = generate("--base")
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    adapted, base = (by_hand(finished_run, PROMPTS, 8, base=base) for base in (False, True))
    assert [(row["completion"], row["base"]) for row in rows] == list(zip(adapted, base, strict=True))
    assert {row["finish"] for row in rows} <= {"stop", "length"}


def test_what_decodes_is_said_and_both_say_the_same(call, finished_run, request) -> None:
    command = (*GENERATE, finished_run, *asked(*PROMPTS), "--base", "--stop", "q")
    by_engine = call(*command)
    assert "the decoding engine writes" in by_engine.err
    assert "transformers" not in by_engine.err
    request.getfixturevalue("transformers_decodes")
    by_transformers = call(*command)
    assert "transformers decodes: its blocks are made of glass" in by_transformers.err
    assert "the decoding engine" not in by_transformers.err
    assert by_transformers.out == by_engine.out
    assert by_engine.status == by_transformers.status == 0


@pytest.mark.parametrize("decoder", ["engine", pytest.param("transformers", marks=pytest.mark.slow)])
def test_flags_reach_the_sampler(decoder, generate, request) -> None:
    if decoder == "transformers":
        request.getfixturevalue("transformers_decodes")

    def texts(*flags: object) -> list[str]:
        return [row["completion"] for row in generate(*flags)]

    greedy = texts()
    drawn = texts("--temperature", 5, "--seed", 1)
    assert drawn != greedy
    assert texts("--temperature", 5, "--seed", 1) == drawn
    assert texts("--temperature", 5, "--seed", 2) != drawn
    # Each of these leaves the likeliest token alone.
    for flags in (("--top-k", 1), ("--top-p", 1e-9), ("--min-p", 1)):
        assert texts("--temperature", 5, "--seed", 1, *flags) == greedy
    for flags in (("--repetition-penalty", 50), ("--presence-penalty", 2, "--frequency-penalty", 2)):
        assert texts("--max-new-tokens", 30, *flags) != texts("--max-new-tokens", 30)


def test_equal_prompts_are_drawn_apart_and_a_stop_string_ends_a_text(generate: Callable[..., list[dict]]) -> None:
    first, second = generate("--temperature", 5, prompts=("x", "x"))
    assert first["completion"] != second["completion"]
    (whole,) = generate("--temperature", 3, prompts=("paint it red",))
    stop = whole["completion"][2:4]
    assert stop
    (row,) = generate("--temperature", 3, "--stop", stop, "--stop", "never", prompts=("paint it red",))
    assert row["completion"] == whole["completion"][: whole["completion"].find(stop)]
    assert row["finish"] == "stop"


@pytest.fixture(scope="module")
def prompted(settings: Callable[..., dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose rows share a system prompt."""
    folder = tmp_path_factory.mktemp("prompted")
    rows = [{"system": "Be\nbrief.", "prompt": f"say {n}", "completion": f"{n}"} for n in range(8)]
    train = str(write_rows(folder / "rows.jsonl", rows))
    write_rows(folder / "bare.jsonl", [{key: row[key] for key in ("prompt", "completion")} for row in rows])
    return fit(settings(folder / "run", data={"train": train}, train={"drift": False})).output


def test_the_system_prompt_of_the_rows_is_used_and_can_be_left_out(call: Call, prompted: Path) -> None:
    def written(verb: str, *flags: object, stdin: str = "") -> tuple[str, bool]:
        command = (verb, prompted, "--max-new-tokens", 8, "--precision", "fp32", *flags)
        ended = call(*command, stdin=stdin, status=0)
        return ended.out, 'system prompt of the rows: "Be brief." (--system "" for none)\n' in ended.err

    bare = written("generate", *asked("say 3"), "--system", "")
    given = written("generate", *asked("say 3"), "--system", "Be\nbrief.")
    assert written("generate", *asked("say 3")) == (given[0], True)
    assert not given[1] and not bare[1] and bare[0] != given[0]
    assert bare[0] == by_hand(prompted, ("say 3",), 8)[0] + "\n"
    assert written("chat", stdin="say 3\n") == (f"adapter: {given[0]}", True)
    assert written("chat", "--system", "", stdin="say 3\n") == (f"adapter: {bare[0]}", False)
    base = [written("generate", *asked("say 3"), "--base", *more)[0] for more in ((), ("--system", ""))]
    assert base[0].partition("adapter: ")[0] != base[1].partition("adapter: ")[0], "the base is asked with it too"


def test_rows_to_evaluate_on_without_a_system_prompt_get_that_of_the_rows(call: Call, prompted: Path) -> None:
    def loss(*flags: object) -> tuple[float, bool]:
        ended = call("eval", prompted, "--no-drift", "--json", "--precision", "fp32", *flags, status=0)
        return json.loads(ended.out)["eval"]["loss"], "system prompt of the rows" in ended.err

    bare, own = ("--data", prompted.parent / "bare.jsonl"), ("--data", prompted.parent / "rows.jsonl")
    assert loss(*bare) == (loss(*own)[0], True)
    assert loss(*bare, "--system", "Be\nbrief.") == loss(*own) == (loss(*own)[0], False)
    assert loss(*bare, "--system", "")[0] != loss(*own)[0]
    assert_refused(call("eval", prompted, "--system", "x"), "the run's own rows", "--data")


def test_texts_match_schema_and_expression(generate: Callable[..., list[dict]], tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="the extra serve is not installed")
    file = tmp_path / "schema.json"
    shape = {"properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}}, "required": ["n"]}
    file.write_text(json.dumps({"type": "object", "additionalProperties": False} | shape))
    long = ("--max-new-tokens", 90, "--temperature", 1)
    for row in generate(*long, "--json-schema", file):
        assert 0 <= json.loads(row["completion"])["n"] <= 99
        assert row["finish"] == "stop"
    for row in generate(*long, "--regex", "(red|blue) [0-9]{3}"):
        assert re.fullmatch("(red|blue) [0-9]{3}", row["completion"])


def test_log_probabilities_come_with_their_tokens(generate: Callable[..., list[dict]]) -> None:
    (row,) = generate("--logprobs", 2, prompts=("paint it red",))
    tokenizer = byte_tokenizer()
    assert tokenizer.decode([one["id"] for one in row["logprobs"]]) == row["completion"]
    for one in row["logprobs"]:
        assert one["logprob"] <= 0
        assert one["top"][0]["id"] == one["id"]  # the likeliest token was taken
        assert one["top"][0]["logprob"] == one["logprob"] >= one["top"][1]["logprob"]
        assert len(one["top"]) == 2
    (alone,) = generate("--logprobs", 0, prompts=("paint it red",))
    assert [one["logprob"] for one in alone["logprobs"]] == [one["logprob"] for one in row["logprobs"]]
    assert "top" not in alone["logprobs"][0]


def test_prompt_that_leaves_no_room_is_named(call: Call, finished_run: Path) -> None:
    assert_refused(call(*GENERATE, finished_run, *asked("x", "y" * 500)), "prompt 2")


def test_base_of_a_run_that_trained_the_weights_is_the_base(generate, call, settings, tmp_path) -> None:
    weights_run = fit(settings(tmp_path / "run", method="last", last={"blocks": 1})).output
    rows = generate("--base", of=weights_run)
    adapted, base = (by_hand(weights_run, PROMPTS, 8, base=base) for base in (False, True))
    assert [(row["completion"], row["base"]) for row in rows] == list(zip(adapted, base, strict=True))
    talk = ("--max-new-tokens", 4, "--precision", "fp32")
    ended = call("chat", weights_run, "--base", *talk, stdin="paint it red\nand blue\n", status=0)
    (_, first), (_, second), *_ = lines = spoken(ended)
    assert [name for name, _ in lines] == ["base", "adapter"] * 2
    assert [first] == by_hand(weights_run, PROMPTS[:1], 4, base=True)
    assert [second] == by_hand(weights_run, PROMPTS[:1], 4)


def spoken(ended: Ended) -> list[tuple[str, str]]:
    """What each said in a talk; texts of one line."""
    found = re.findall(r"^(base|adapter|model): (.*)$", ended.out, re.MULTILINE)
    return [(str(name), str(text)) for name, text in found]


def test_answers_of_a_talk_are_constrained_and_go_on(call: Call, finished_run: Path) -> None:
    pytest.importorskip("llguidance", reason="the extra serve is not installed")
    ended = call("chat", finished_run, "--base", "--temperature", 1, "--regex", "[ab]{3}", stdin="hello\nagain\n")
    assert ended.status == 0, ended.err
    assert ended.err.count("the decoding engine writes") == 1
    lines = spoken(ended)
    assert [name for name, _ in lines] == ["base", "adapter"] * 2
    assert all(re.fullmatch("[ab]{3}", text) for _, text in lines)
    other = call("chat", finished_run, "--temperature", 1, "--seed", 3, "--stop", "b", stdin="hello\n")
    assert "b" not in spoken(other)[0][1]


def test_evaluation_shows_what_the_engine_writes(call, finished_run, rows_file, request) -> None:
    command = ("eval", finished_run, "--data", rows_file, "--base", "--no-drift", "--precision", "fp32")
    by_engine = call(*command, "--answers", 10, "--json", status=0)
    assert "transformers" not in by_engine.err
    request.getfixturevalue("transformers_decodes")
    by_transformers = call(*command, "--answers", 10, "--json")
    assert "made of glass" in by_transformers.err
    assert json.loads(by_engine.out) == json.loads(by_transformers.out)

    def table(ended: Ended) -> Iterator[str]:
        return (line for line in ended.err.splitlines() if "paint it" in line)

    assert list(table(by_engine)) == list(table(by_transformers)) != []


def test_evaluation_with_virtual_tokens_asks_the_engine_without_them(settings, tmp_path) -> None:
    run = fit(settings(tmp_path / "run", method="prompt", prompt={"length": 3})).output
    # The rows ask for what the model writes, so that a prompt off by a token would be seen.
    asked_for = tuple(f"paint it {color}" for color in ("red", "blue", "green", "teal"))
    rows = [{"prompt": p, "completion": c} for p, c in zip(asked_for, by_hand(run, asked_for, 5), strict=True)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    opened = open_run(str(run), precision="fp32", device="cpu", say=str)
    examples, _ = opened.task.read_file(str(data), opened.data, None)
    score = score_run(opened, examples, shown=4, max_new_tokens=5, writer=opening.SessionWriter(opened, str))
    assert len(score.answers) == 4 and all(answer.exact for answer in score.answers)


def test_a_constraint_without_its_package_is_refused_before_a_model_is_read(call, tmp_path, monkeypatch):
    monkeypatch.setattr("deltaw.cli.text_options.find_spec", lambda name: None)
    for verb in ("generate", "chat"):
        assert_refused(call(verb, tmp_path, "--regex", "(red|green)"), "llguidance", "deltaw[serve]")
