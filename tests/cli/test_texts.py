"""Text generation on the command line: sampling, stopping, constraints and the decoding engine."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from deltaw.decoding import opening
from deltaw.decoding.probes import NotDecodable
from deltaw.inference.open_run import open_run
from deltaw.inference.scores import ScoreOptions
from deltaw.runs.fit import fit
from tests.byte_models import byte_tokenizer
from tests.cli.conftest import Call, CommandResult, assert_refused
from tests.conftest import write_rows

PROMPTS = ("paint it red", "paint it blue", "x")
GENERATE = ("generate", "--max-new-tokens", 8, "--precision", "fp32")


def prompt_flags(*prompts: str) -> list[str]:
    return [part for prompt in prompts for part in ("-p", prompt)]


@pytest.fixture
def generate(call: Call, finished_run: Path) -> Callable[..., list[dict]]:
    """Return a function that generates completions of a run and returns them from the JSON output."""

    def run(*flags: object, prompts: tuple[str, ...] = PROMPTS, run_folder: Path = finished_run) -> list[dict]:
        result = call(*GENERATE, run_folder, *prompt_flags(*prompts), *flags, "--json", status=0)
        return list(json.loads(result.out)["completions"])

    return run


@pytest.fixture
def transformers_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the decoding engine reject every model."""

    def refuse(*_: object, **__: object) -> None:
        raise NotDecodable("its blocks are made of glass")

    monkeypatch.setattr(opening, "build_decodable", refuse)


def generate_naively(folder: Path, prompts: tuple[str, ...], count: int, *, base: bool = False) -> list[str]:
    """Generate greedily with a full forward pass per token, without a cache."""
    from deltaw.data.prompt_tokens import encode_prompt
    from deltaw.inference.open_run import open_run

    session = open_run(str(folder), precision="fp32", log=lambda line: None)
    texts = []
    for prompt in prompts:
        ids = session.prompt(encode_prompt(prompt, session.data or "auto", session.tokenizer)).tolist()
        start = len(ids)
        while len(ids) - start < count:
            with torch.no_grad(), session.base() if base else contextlib.nullcontext():
                token = int(session.model(torch.tensor([ids])).logits[0, -1].argmax())
            if token in (0, 2):
                break
            ids.append(token)
        texts.append(session.tokenizer.decode(ids[start:], skip_special_tokens=True))
    return texts


def test_completions_equal_naive_generation(generate: Callable[..., list[dict]], finished_run: Path) -> None:
    rows = generate("--with-base")
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    adapted, base = (generate_naively(finished_run, PROMPTS, 8, base=base) for base in (False, True))
    assert [(row["completion"], row["base"]) for row in rows] == list(zip(adapted, base, strict=True))
    assert {row["finish"] for row in rows} <= {"stop", "length"}


def test_engine_and_transformers_generate_equal_text(call, finished_run, request) -> None:
    command = (*GENERATE, finished_run, *prompt_flags(*PROMPTS), "--with-base", "--stop", "q", "--verbose")
    by_engine = call(*command)
    assert "generating with the decoding engine" in by_engine.err
    assert "transformers" not in by_engine.err
    request.getfixturevalue("transformers_decodes")
    by_transformers = call(*command)
    assert "transformers decodes: its blocks are made of glass" in by_transformers.err
    assert "the decoding engine" not in by_transformers.err
    assert by_transformers.out == by_engine.out
    assert by_engine.status == by_transformers.status == 0


@pytest.mark.parametrize("decoder", ["engine", pytest.param("transformers", marks=pytest.mark.slow)])
def test_sampling_flags_are_applied(decoder, generate, request) -> None:
    if decoder == "transformers":
        request.getfixturevalue("transformers_decodes")

    def texts(*flags: object) -> list[str]:
        return [row["completion"] for row in generate(*flags)]

    greedy = texts()
    sampled = texts("--temperature", 5, "--seed", 1)
    assert sampled != greedy
    assert texts("--temperature", 5, "--seed", 1) == sampled
    assert texts("--temperature", 5, "--seed", 2) != sampled
    # Each of these flags leaves only the most likely token.
    for flags in (("--top-k", 1), ("--top-p", 1e-9), ("--min-p", 1)):
        assert texts("--temperature", 5, "--seed", 1, *flags) == greedy
    for flags in (("--repetition-penalty", 50), ("--presence-penalty", 2, "--frequency-penalty", 2)):
        assert texts("--max-new-tokens", 30, *flags) != texts("--max-new-tokens", 30)


def test_equal_prompts_differ_and_stop_string_stops(generate: Callable[..., list[dict]]) -> None:
    first, second = generate("--temperature", 5, prompts=("x", "x"))
    assert first["completion"] != second["completion"]
    (full_row,) = generate("--temperature", 3, prompts=("paint it red",))
    stop = full_row["completion"][2:4]
    assert stop
    (row,) = generate("--temperature", 3, "--stop", stop, "--stop", "never", prompts=("paint it red",))
    assert row["completion"] == full_row["completion"][: full_row["completion"].find(stop)]
    assert row["finish"] == "stop"


@pytest.fixture(scope="module")
def prompted_run(settings: Callable[..., dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run whose rows share a system prompt."""
    folder = tmp_path_factory.mktemp("prompted")
    rows = [{"system": "Be\nbrief.", "prompt": f"say {n}", "completion": f"{n}"} for n in range(8)]
    train = str(write_rows(folder / "rows.jsonl", rows))
    write_rows(folder / "bare.jsonl", [{key: row[key] for key in ("prompt", "completion")} for row in rows])
    return fit(settings(folder / "run", data={"train": train}, train={"drift": False})).output


def test_stored_system_prompt_is_used_unless_disabled(call: Call, prompted_run: Path) -> None:
    def generate_text(verb: str, *flags: object, stdin: str = "") -> tuple[str, bool]:
        command = (verb, prompted_run, "--max-new-tokens", 8, "--precision", "fp32", *flags)
        result = call(*command, stdin=stdin, status=0)
        return result.out, 'system prompt of the rows: "Be brief." (--system "" for none)\n' in result.err

    without_prompt = generate_text("generate", *prompt_flags("say 3"), "--system", "")
    with_prompt = generate_text("generate", *prompt_flags("say 3"), "--system", "Be\nbrief.")
    assert generate_text("generate", *prompt_flags("say 3")) == (with_prompt[0], True)
    assert not with_prompt[1] and not without_prompt[1] and without_prompt[0] != with_prompt[0]
    assert without_prompt[0] == generate_naively(prompted_run, ("say 3",), 8)[0] + "\n"
    assert generate_text("chat", stdin="say 3\n") == (f"adapter: {with_prompt[0]}", True)
    assert generate_text("chat", "--system", "", stdin="say 3\n") == (f"adapter: {without_prompt[0]}", False)
    base = [generate_text("generate", *prompt_flags("say 3"), "--with-base", *e)[0] for e in ((), ("--system", ""))]
    assert base[0].partition("adapter: ")[0] != base[1].partition("adapter: ")[0], "the base model gets the prompt too"


def test_eval_rows_without_system_prompt_get_stored_one(call: Call, prompted_run: Path) -> None:
    def loss(*flags: object) -> tuple[float, bool]:
        result = call("eval", prompted_run, "--no-drift", "--json", "--precision", "fp32", *flags, status=0)
        return json.loads(result.out)["eval"]["loss"], "system prompt of the rows" in result.err

    bare_data, own_data = (("--data", prompted_run.parent / f"{name}.jsonl") for name in ("bare", "rows"))
    assert loss(*bare_data) == (loss(*own_data)[0], True)
    assert loss(*bare_data, "--system", "Be\nbrief.") == loss(*own_data) == (loss(*own_data)[0], False)
    assert loss(*bare_data, "--system", "")[0] != loss(*own_data)[0]
    assert_refused(call("eval", prompted_run, "--system", "x"), "the run's own rows", "--data")


def test_completions_match_schema_and_regex(generate: Callable[..., list[dict]], tmp_path: Path) -> None:
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


def test_logprobs_contain_tokens_and_alternatives(generate: Callable[..., list[dict]]) -> None:
    (row,) = generate("--logprobs", 2, prompts=("paint it red",))
    tokenizer = byte_tokenizer()
    assert tokenizer.decode([token["id"] for token in row["logprobs"]]) == row["completion"]
    for token in row["logprobs"]:
        assert token["logprob"] <= 0
        assert token["top"][0]["id"] == token["id"]  # greedy
        assert token["top"][0]["logprob"] == token["logprob"] >= token["top"][1]["logprob"]
        assert len(token["top"]) == 2
    (chosen_only,) = generate("--logprobs", 0, prompts=("paint it red",))
    assert [token["logprob"] for token in chosen_only["logprobs"]] == [token["logprob"] for token in row["logprobs"]]
    assert "top" not in chosen_only["logprobs"][0]


def test_long_prompt_is_rejected_with_number(call: Call, finished_run: Path) -> None:
    assert_refused(call(*GENERATE, finished_run, *prompt_flags("x", "y" * 500)), "prompt 2")


def test_base_output_of_weight_trained_run_equals_base_model(generate, call, settings, tmp_path) -> None:
    weights_run = fit(settings(tmp_path / "run", method="last", last={"blocks": 1})).output
    rows = generate("--with-base", run_folder=weights_run)
    adapted, base = (generate_naively(weights_run, PROMPTS, 8, base=base) for base in (False, True))
    assert [(row["completion"], row["base"]) for row in rows] == list(zip(adapted, base, strict=True))
    flags = ("--max-new-tokens", 4, "--precision", "fp32")
    result = call("chat", weights_run, "--with-base", *flags, stdin="paint it red\nand blue\n", status=0)
    (_, first), (_, second), *_ = lines = parse_chat(result)
    assert [name for name, _ in lines] == ["base", "adapter"] * 2
    assert [first] == generate_naively(weights_run, PROMPTS[:1], 4, base=True)
    assert [second] == generate_naively(weights_run, PROMPTS[:1], 4)


def parse_chat(result: CommandResult) -> list[tuple[str, str]]:
    """Return speaker and text of each line of a chat."""
    matches = re.findall(r"^(base|adapter|model): (.*)$", result.out, re.MULTILINE)
    return [(str(name), str(text)) for name, text in matches]


def test_chat_answers_match_constraint_over_turns(call: Call, finished_run: Path) -> None:
    pytest.importorskip("llguidance", reason="the extra serve is not installed")
    flags = ("--with-base", "--temperature", 1, "--regex", "[ab]{3}", "--verbose")
    result = call("chat", finished_run, *flags, stdin="hello\nagain\n")
    assert result.status == 0, result.err
    assert result.err.count("generating with the decoding engine") == 1
    lines = parse_chat(result)
    assert [name for name, _ in lines] == ["base", "adapter"] * 2
    assert all(re.fullmatch("[ab]{3}", text) for _, text in lines)
    other = call("chat", finished_run, "--temperature", 1, "--seed", 3, "--stop", "b", stdin="hello\n")
    assert "b" not in parse_chat(other)[0][1]


def test_evaluation_is_equal_with_engine_and_transformers(call, finished_run, rows_file, request) -> None:
    command = ("eval", finished_run, "--data", rows_file, "--with-base", "--no-drift", "--precision", "fp32")
    by_engine = call(*command, "--answers", 10, "--json", status=0)
    assert "transformers" not in by_engine.err
    request.getfixturevalue("transformers_decodes")
    by_transformers = call(*command, "--answers", 10, "--json")
    assert "made of glass" in by_transformers.err
    assert json.loads(by_engine.out) == json.loads(by_transformers.out)

    def table(result: CommandResult) -> Iterator[str]:
        return (line for line in result.err.splitlines() if "paint it" in line)

    assert list(table(by_engine)) == list(table(by_transformers)) != []


def test_evaluation_of_prompt_run_uses_engine_without_virtual_tokens(settings, tmp_path) -> None:
    run = fit(settings(tmp_path / "run", method="prompt", prompt={"length": 3})).output
    # The rows expect the model's own output, so a prompt that is off by one token fails the test.
    prompts = tuple(f"paint it {color}" for color in ("red", "blue", "green", "teal"))
    rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, generate_naively(run, prompts, 5), strict=True)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    session = open_run(str(run), precision="fp32", device="cpu", log=str)
    examples, _ = session.task.read_file(str(data), session.data, None)
    score = session.score(examples, ScoreOptions(num_answers=4, max_new_tokens=5))
    assert len(score.answers) == 4 and all(answer.exact for answer in score.answers)


def test_constraint_without_package_is_rejected_before_model_load(call, tmp_path, monkeypatch):
    monkeypatch.setattr("deltaw.cli.text_options.find_spec", lambda name: None)
    for verb in ("generate", "chat"):
        assert_refused(call(verb, tmp_path, "--regex", "(red|green)"), "llguidance", "deltaw[serve]")
