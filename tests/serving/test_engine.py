"""An engine's greedy texts are transformers' own, whatever runs beside them."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from deltaw.errors import UserError
from deltaw.serving.batch import BatchLimits
from deltaw.serving.constraints import ConstraintLimits, ProcessLimits
from deltaw.serving.request import Constraint, Request, Sampling
from tests.serving.engines import SMALL_STEPS, engine, engine_of, greedy, llama, prompts, tokenizer
from tests.serving.http.hostile import explodes_later
from tests.serving.http.waiting import at_once
from tests.tiny_models import causal_model

PAIRS = Constraint("regex", "(ab|cd){3}")
FAMILIES = ["gemma2", "gemma3", "gpt2", "neox"]
FAMILIES += [pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen3", "phi3", "mistral")]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts_of_many_prompts_equal_transformers(family: str) -> None:
    model = causal_model(family).requires_grad_(False)
    asked = prompts(12, vocabulary=97)
    written = engine_of(model).write_all([Request(p, max_new_tokens=14) for p in asked])
    for prompt, text in zip(asked, written, strict=True):
        assert text.tokens.tolist() == greedy(model, prompt, 14)
        assert text.finish == "length"


def test_a_text_ends_at_a_terminator_which_is_not_part_of_it() -> None:
    model, _ = llama()
    asked = [*prompts(12), np.arange(3, 88)]
    ends = [greedy(model, prompt, 20)[n % 20] for n, prompt in enumerate(asked)]  # each ends somewhere
    requests = [Request(p, stop_ids=(end,), max_new_tokens=20) for p, end in zip(asked, ends, strict=True)]
    for request, text in zip(requests, engine().write_all(requests), strict=True):
        assert request.stop_ids is not None
        assert text.tokens.tolist() == greedy(model, request.tokens, 20, request.stop_ids)
        assert (text.finish, text.terminator) == ("stop", request.stop_ids[0])
    (last,) = engine().write_all([Request(asked[-1], stop_ids=())])  # or at the last position
    assert last.finish == "length" and last.tokens.tolist() == greedy(model, asked[-1], 128 - 85)


def test_what_runs_beside_a_text_and_how_prompts_are_cut_changes_nothing() -> None:
    asked = prompts(10, seed=3)
    settings = [Sampling(), Sampling(temperature=1.0, seed=5, top_p=0.9)]
    requests = [Request(p, sampling=settings[n % 2], max_new_tokens=12) for n, p in enumerate(asked)]
    together = engine(limits=SMALL_STEPS).write_all(requests)
    for request, text in zip(requests, together, strict=True):
        (alone,) = engine().write_all([request])
        assert np.array_equal(alone.tokens, text.tokens) and alone.text == text.text


def test_texts_go_on_where_pages_run_out() -> None:
    model, _ = llama()
    asked = prompts(6, longest=30, seed=4)
    small = engine(pages=5)  # each text needs two or three of them
    written = small.write_all([Request(p, max_new_tokens=50, stop_ids=()) for p in asked])
    for prompt, text in zip(asked, written, strict=True):
        assert text.tokens.tolist() == greedy(model, prompt, 50)
    assert small.load.pages_used == 0


def test_prompts_that_begin_alike_are_computed_once() -> None:
    model, _ = llama()
    common = np.arange(3, 83)
    first = Request(np.append(common, 90), max_new_tokens=5)
    second = Request(np.append(common, [91, 92]), max_new_tokens=5)
    ours = engine()
    pieces = list(ours.submit(first))
    assert pieces[0].reused == 0
    before = ours.load.tokens
    reading = ours.submit(second)
    pieces = list(reading)
    assert pieces[0].reused == 80 and all(piece.reused == 0 for piece in pieces[1:])
    assert ours.load.tokens - before == 2 + 4, "two tokens of the prompt, and four of the text"
    assert reading.result().tokens.tolist() == greedy(model, second.tokens, 5)
    ours.close()


def test_pieces_come_while_the_text_is_written_and_make_up_the_whole() -> None:
    ours = engine()
    reading = ours.submit(Request(np.arange(3, 20), max_new_tokens=20, stop_ids=()))
    pieces = list(reading)
    whole = reading.result()
    assert len(pieces) >= 20
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [t for piece in pieces for t in piece.tokens] == whole.tokens.tolist()
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish == whole.finish == "length"
    ours.close()


def test_cancelling_ends_a_text_and_frees_its_pages() -> None:
    ours = engine(limits=BatchLimits(running=1))
    long = ours.submit(Request(np.arange(3, 9), max_new_tokens=110, stop_ids=()))
    waits = ours.submit(Request(np.arange(3, 9), max_new_tokens=110, stop_ids=()))
    next(iter(long))
    waits.cancel()
    long.cancel()
    assert list(long)[-1].finish == "cancelled"
    assert waits.result().finish == "cancelled" and not len(waits.result().tokens)
    (text,) = ours.write_all([Request(np.arange(3, 9), max_new_tokens=3, stop_ids=())])
    assert len(text.tokens) == 3 and ours.load.pages_used == 0
    ours.close()


def test_time_that_is_up_ends_a_text_that_runs_and_one_that_waits() -> None:
    ours = engine()
    late = [Request(np.arange(3, 9), max_new_tokens=100, stop_ids=(), seconds=0.0) for _ in range(2)]
    assert [text.finish for text in ours.write_all(late)] == ["timeout", "timeout"]


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = engine()
    decoder = llama()[1].decoder
    own = type(decoder).step
    failing = iter([False, True])

    def step(*args: object, **kwargs: object) -> object:
        if next(failing, False):
            raise RuntimeError("the machine is on fire")
        return own(*args, **kwargs)

    monkeypatch.setattr(type(decoder), "step", step)
    reading = ours.submit(Request(np.arange(3, 9), max_new_tokens=9, stop_ids=()))
    with pytest.raises(RuntimeError, match="on fire"):
        reading.result()
    assert list(reading)[-1].finish == "error"
    assert ours.submit(Request(np.arange(3, 9), max_new_tokens=9, stop_ids=())).result().finish == "length"
    assert ours.load.pages_used == 0
    ours.close()


def test_log_probabilities_of_text_and_prompt_are_the_models_own() -> None:
    model, _ = llama()
    prompt = prompts(1, seed=9)[0]
    asked = Request(prompt, max_new_tokens=4, stop_ids=(), sampling=Sampling(logprobs=2), prompt_logprobs=True)
    reading = engine().submit(asked)
    pieces = list(reading)
    tokens = [t for piece in pieces for t in piece.tokens]
    whole = torch.tensor([[*prompt.tolist(), *tokens]])
    with torch.no_grad():
        own = model(whole).logits[0].log_softmax(-1)
    told = [entry for piece in pieces for entry in piece.logprobs]
    assert len(told) == len(prompt) - 1 + 4
    assert len(pieces[0].logprobs) - len(pieces[0].tokens) == len(prompt) - 1
    for at, entry in enumerate(told):
        assert entry.token == int(whole[0, at + 1])
        assert entry.logprob == pytest.approx(float(own[at, entry.token]), abs=1e-4)
        assert entry.top[0][1] == pytest.approx(float(own[at].max()), abs=1e-4)
    (text,) = engine().write_all([replace(asked, max_new_tokens=0)])  # the prompt's alone
    assert text.finish == "length" and not len(text.tokens)
    assert [entry.token for entry in text.logprobs] == prompt[1:].tolist()


def test_a_constrained_text_matches_and_its_neighbours_are_free() -> None:
    """Whether the grammar ends a text is known after its last token was chosen."""
    pytest.importorskip("llguidance", reason="constraints are llguidance's")
    free = Request(np.arange(3, 30), max_new_tokens=12, stop_ids=())
    bound = [replace(free, stop_ids=None, max_new_tokens=most, constraint=PAIRS) for most in (5, 6, 7, 12)]
    beside, *texts = engine().write_all([free, *bound])
    assert [(text.finish, len(text.tokens)) for text in texts] == [("length", 5), *[("stop", 6)] * 3]
    assert {texts[-1].text[i : i + 2] for i in (0, 2, 4)} <= {"ab", "cd"}
    assert np.array_equal(beside.tokens, engine().write_all([free])[0].tokens)


def test_a_constraint_that_takes_its_time_holds_up_nobody() -> None:
    pytest.importorskip("llguidance", reason="constraints are llguidance's")
    patient = ConstraintLimits(ProcessLimits(seconds=600, memory=8 << 30))
    ours = engine(constraints=patient)
    (x,) = tokenizer()("x")["input_ids"]
    prompt = np.arange(3, 30)
    steered = Sampling(logit_bias={x: 100.0})
    stuck = ours.submit(Request(prompt, None, steered, Constraint("grammar", explodes_later(0)), max_new_tokens=50))
    pieces = iter(stuck)
    assert "".join(next(pieces).text for _ in range(5)) == "xxxxx"  # what may follow is computed for minutes
    free = Request(prompt, max_new_tokens=12, stop_ids=())
    bound = Request(prompt, max_new_tokens=12, constraint=PAIRS)
    for request in (free, bound):
        assert ours.submit(request).result().finish in ("length", "stop")
    assert not stuck.done
    ours.hurry()
    assert stuck.result().finish == "cancelled"
    ours.close()


def test_a_text_whose_constraint_fails_ends_with_the_reason() -> None:
    pytest.importorskip("llguidance", reason="constraints are llguidance's")
    ours = engine(constraints=ConstraintLimits(ProcessLimits(seconds=0.2)))
    (x,) = tokenizer()("x")["input_ids"]
    slow, steered = Constraint("grammar", explodes_later(0)), Sampling(logit_bias={x: 100.0})
    request = Request(np.arange(3, 30), None, steered, slow, max_new_tokens=50)
    with pytest.raises(UserError, match=r"any longer: it takes more than 0.2 s"):
        ours.submit(request).result()
    ours.close()


def test_owners_do_not_find_what_others_asked() -> None:
    ours = engine()
    prompt = np.arange(3, 80)

    def reused(owner: int) -> int:
        writing = ours.submit(Request(prompt, max_new_tokens=2, stop_ids=(), owner=owner))
        return sum(piece.reused for piece in writing)

    assert reused(1) == 0
    assert reused(2) == 0
    assert reused(1) > 0 and reused(2) > 0
    ours.close()


def test_closing_drains_or_ends_at_once_and_takes_no_more() -> None:
    drained = engine()
    reading = drained.submit(Request(np.arange(3, 9), max_new_tokens=9, stop_ids=()))
    drained.close()
    assert reading.result().finish == "length"
    with pytest.raises(UserError, match="shut down"):
        drained.submit(Request(np.arange(3, 9)))
    at_once = engine(limits=BatchLimits(running=1))
    readings = [at_once.submit(Request(np.arange(3, 9), max_new_tokens=120, stop_ids=())) for _ in range(3)]
    at_once.close(drain=False)
    assert readings[2].result().finish == "cancelled"


def test_many_threads_get_their_own_texts() -> None:
    model, _ = llama()
    ours = engine()
    asked = prompts(12, seed=11)
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        time.sleep(number % 5 / 1000)
        request = Request(asked[number], max_new_tokens=8, stop_ids=())
        found[number] = ours.submit(request).result().tokens.tolist()

    at_once(ask, range(len(asked)))
    ours.close()
    assert found == {n: greedy(model, prompt, 8) for n, prompt in enumerate(asked)}


def test_what_cannot_be_served_is_refused_at_once() -> None:
    ours, prompt = engine(), np.arange(3, 9)
    for asked, says in (
        (Request(np.empty(0, np.int64)), "empty"),
        (Request(np.arange(200) % 90), "128 positions"),
        (Request(np.array([259])), "does not exist"),
        (Request(np.array([-1])), "does not exist"),
        (Request(prompt, adapter="nobody"), "no adapter 'nobody'"),
        (Request(prompt, sampling=Sampling(temperature=-1)), "temperature"),
        (Request(prompt, max_new_tokens=-1), "max_new_tokens"),
        (Request(prompt, stop=("",)), "stop string"),
    ):
        with pytest.raises(UserError, match=says):
            ours.submit(asked)
    assert ours.load.waiting == 0
