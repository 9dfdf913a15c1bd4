"""An engine's greedy texts are transformers' own, whatever runs beside them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from deltaw.errors import UserError
from deltaw.serving.batch import BatchLimits
from deltaw.serving.constraints import ConstraintLimits, ProcessLimits
from deltaw.serving.request import Constraint, Request, Sampling
from tests.serving.engines import SMALL_STEPS, before, engine, engine_of, greedy, llama, prompts, tokenizer
from tests.serving.http.hostile import explodes_later
from tests.serving.http.waiting import until
from tests.tiny_models import causal_model

PAIRS = Constraint("regex", "(ab|cd){3}")
FAMILIES = ["gemma2", "gemma3", "gpt2", "neox"]
FAMILIES += [pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen3", "phi3", "mistral")]
SHORT = np.arange(3, 9)


def long_text(count: int, prompt: np.ndarray = SHORT, **more: object) -> Request:
    """A request for exactly so many tokens, as nothing ends the text before."""
    return Request(prompt, max_new_tokens=count, stop_ids=(), **more)  # type: ignore[arg-type]


def tokens_of(pieces) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts_of_many_prompts_equal_transformers(family):
    model = causal_model(family).requires_grad_(False)
    asked = prompts(8, vocabulary=97)
    written = engine_of(model).write_all([Request(p, max_new_tokens=12) for p in asked])
    assert [text.tokens.tolist() for text in written] == [greedy(model, prompt, 12) for prompt in asked]
    assert {text.finish for text in written} == {"length"}


def test_a_text_ends_at_a_terminator_which_is_not_part_of_it():
    asked = [*prompts(8), np.arange(3, 88)]
    whole = [greedy(llama()[0], prompt, 20) for prompt in asked]
    ends = [tokens[2 * n % 20] for n, tokens in enumerate(whole)]  # each ends somewhere
    requests = [Request(p, stop_ids=(end,), max_new_tokens=20) for p, end in zip(asked, ends, strict=True)]
    for tokens, end, text in zip(whole, ends, engine().write_all(requests), strict=True):
        assert text.tokens.tolist() == before(tokens, (end,))
        assert (text.finish, text.terminator) == ("stop", end)
    (last,) = engine().write_all([Request(asked[-1], stop_ids=())])  # or at the last position
    assert last.finish == "length" and last.tokens.tolist() == greedy(llama()[0], asked[-1], 128 - 85)


def test_what_runs_beside_a_text_and_how_prompts_are_cut_changes_nothing():
    settings = [Sampling(), Sampling(temperature=1.0, seed=5, top_p=0.9)]
    requests = [Request(p, None, settings[n % 2], max_new_tokens=12) for n, p in enumerate(prompts(10, seed=3))]
    for request, text in zip(requests, engine(limits=SMALL_STEPS).write_all(requests), strict=True):
        (alone,) = engine().write_all([request])
        assert np.array_equal(alone.tokens, text.tokens) and alone.text == text.text


def test_texts_go_on_where_pages_run_out():
    asked = prompts(6, longest=30, seed=4)
    small = engine(pages=5)  # each text needs two or three of them
    for prompt, text in zip(asked, small.write_all([long_text(40, p) for p in asked]), strict=True):
        assert text.tokens.tolist() == greedy(llama()[0], prompt, 40)
    assert small.load.pages_used == 0


def test_prompts_that_begin_alike_are_computed_once():
    common = np.arange(3, 83)
    first, second = (Request(np.append(common, rest), max_new_tokens=5) for rest in ([90], [91, 92]))
    ours = engine()
    assert next(iter(ours.submit(first))).reused == 0
    ours.write_all([first])
    before = ours.load.tokens
    pieces = list(ours.submit(second))
    assert [piece.reused for piece in pieces] == [80, *[0] * (len(pieces) - 1)]
    assert ours.load.tokens - before == 2 + 4, "two tokens of the prompt, and four of the text"
    assert tokens_of(pieces) == greedy(llama()[0], second.tokens, 5)


def test_pieces_come_while_the_text_is_written_and_make_up_the_whole():
    reading = engine().submit(long_text(20))
    pieces = list(reading)
    whole = reading.result()
    assert "".join(piece.text for piece in pieces) == whole.text and tokens_of(pieces) == whole.tokens.tolist()
    assert len(pieces) >= 20 and whole.finish == "length"
    assert [piece.finish for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_cancelling_ends_a_text_and_frees_its_pages():
    ours = engine(limits=BatchLimits(running=1))
    long, waits = ours.submit(long_text(110)), ours.submit(long_text(110))
    next(iter(long))
    waits.cancel()
    long.cancel()
    assert list(long)[-1].finish == "cancelled"
    assert waits.result().finish == "cancelled" and not len(waits.result().tokens)
    (text,) = ours.write_all([long_text(3)])
    assert len(text.tokens) == 3 and ours.load.pages_used == 0


def test_time_that_is_up_ends_a_text_that_runs_and_one_that_waits():
    late = [long_text(100, seconds=0.0) for _ in range(2)]
    assert [text.finish for text in engine().write_all(late)] == ["timeout", "timeout"]


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(monkeypatch):
    ours, kind = engine(), type(llama()[1].decoder)
    own, failing = kind.step, iter([False, True])

    def step(*args: object, **kwargs: object) -> object:
        if next(failing, False):
            raise RuntimeError("the machine is on fire")
        return own(*args, **kwargs)

    monkeypatch.setattr(kind, "step", step)
    reading = ours.submit(long_text(9))
    with pytest.raises(RuntimeError, match="on fire"):
        reading.result()
    assert list(reading)[-1].finish == "error"
    assert ours.submit(long_text(9)).result().finish == "length"
    assert until(lambda: ours.load.pages_used == 0)  # the engine's thread takes them back


def test_log_probabilities_of_text_and_prompt_are_the_models_own():
    prompt = prompts(1, seed=9)[0]
    asked = long_text(4, prompt, sampling=Sampling(logprobs=2), prompt_logprobs=True)
    pieces = list(engine().submit(asked))
    whole = torch.tensor([[*prompt.tolist(), *tokens_of(pieces)]])
    with torch.no_grad():
        own = llama()[0](whole).logits[0].log_softmax(-1)
    told = [entry for piece in pieces for entry in piece.logprobs]
    assert len(pieces[0].logprobs) - len(pieces[0].tokens) == len(prompt) - 1
    assert [entry.token for entry in told] == whole[0, 1:].tolist()
    for row, entry in zip(own, told, strict=False):
        expected = [float(row[entry.token]), float(row.max())]
        assert [entry.logprob, entry.top[0][1]] == pytest.approx(expected, abs=1e-4)
    (text,) = engine().write_all([replace(asked, max_new_tokens=0)])  # the prompt's alone
    assert text.finish == "length" and not len(text.tokens)
    assert [entry.token for entry in text.logprobs] == prompt[1:].tolist()


def test_a_constrained_text_matches_and_its_neighbours_are_free():
    """Whether the grammar ends a text is known after its last token was chosen."""
    pytest.importorskip("llguidance", reason="constraints are llguidance's")
    free = long_text(12, np.arange(3, 30))
    bound = [replace(free, stop_ids=None, max_new_tokens=most, constraint=PAIRS) for most in (5, 6, 7, 12)]
    beside, *texts = engine().write_all([free, *bound])
    assert [(text.finish, len(text.tokens)) for text in texts] == [("length", 5), *[("stop", 6)] * 3]
    assert {texts[-1].text[i : i + 2] for i in (0, 2, 4)} <= {"ab", "cd"}
    assert np.array_equal(beside.tokens, engine().write_all([free])[0].tokens)


def test_a_constraint_that_takes_its_time_holds_up_nobody():
    pytest.importorskip("llguidance", reason="constraints are llguidance's")
    ours = engine(constraints=ConstraintLimits(ProcessLimits(seconds=600, memory=8 << 30)))
    steered = Sampling(logit_bias={tokenizer()("x")["input_ids"][0]: 100.0})
    stuck = ours.submit(Request(SHORT, None, steered, Constraint("grammar", explodes_later(0)), max_new_tokens=50))
    pieces = iter(stuck)
    assert "".join(next(pieces).text for _ in range(5)) == "xxxxx"  # what may follow is computed for minutes
    for request in (long_text(12), Request(SHORT, max_new_tokens=12, constraint=PAIRS)):
        assert ours.submit(request).result().finish in ("length", "stop")
    assert not stuck.done
    ours.hurry()
    assert stuck.result().finish == "cancelled"


def test_a_text_whose_constraint_fails_ends_with_the_reason():
    pytest.importorskip("llguidance", reason="constraints are llguidance's")
    ours = engine(constraints=ConstraintLimits(ProcessLimits(text_seconds=1e-6)))
    with pytest.raises(UserError, match=r"any longer: .*more than 1e-06 s"):
        for _ in range(200):  # the clock of a processor may tick seldom
            ours.submit(long_text(100, constraint=Constraint("regex", "(.|\n)*"))).result()


def test_owners_do_not_find_what_others_asked():
    ours = engine()

    def reused(owner: int) -> bool:
        return any(piece.reused for piece in ours.submit(long_text(2, np.arange(3, 80), owner=owner)))

    assert [reused(owner) for owner in (1, 2, 1, 2)] == [False, False, True, True]


def test_closing_drains_or_ends_at_once_and_takes_no_more():
    drained = engine()
    reading = drained.submit(long_text(9))
    drained.close()
    assert reading.result().finish == "length"
    with pytest.raises(UserError, match="shut down"):
        drained.submit(Request(SHORT))
    at_once = engine(limits=BatchLimits(running=1))
    readings = [at_once.submit(long_text(120)) for _ in range(3)]
    at_once.close(drain=False)
    assert readings[2].result().finish == "cancelled"


def test_what_cannot_be_served_is_refused_at_once():
    ours = engine()
    for asked, says in (
        (Request(np.empty(0, np.int64)), "empty"),
        (Request(np.arange(200) % 90), "128 positions"),
        (Request(np.array([259])), "does not exist"),
        (Request(np.array([-1])), "does not exist"),
        (Request(SHORT, adapter="nobody"), "no adapter 'nobody'"),
        (Request(SHORT, sampling=Sampling(temperature=-1)), "temperature"),
        (Request(SHORT, max_new_tokens=-1), "max_new_tokens"),
        (Request(SHORT, stop=("",)), "stop string"),
    ):
        with pytest.raises(UserError, match=says):
            ours.submit(asked)
    assert ours.load.waiting == 0
