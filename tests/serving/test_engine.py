"""Tests that an engine's greedy completions equal transformers', regardless of concurrent requests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from deltaw.decoding.batch import BatchLimits
from deltaw.decoding.constraints import ConstraintLimits, ProcessLimits
from deltaw.decoding.request import Constraint, Request, Sampling
from deltaw.errors import UserError
from tests.serving.engines import SMALL_STEPS, engine, engine_of, greedy, llama, prompts, tokenizer, truncate_at
from tests.serving.http.concurrency import wait_until
from tests.serving.http.hostile import slow_to_match_grammar
from tests.tiny_models import causal_model

PAIRS = Constraint("regex", "(ab|cd){3}")
FAMILIES = ["gemma2", "gemma3", "gpt2", "neox"]
FAMILIES += [pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen3", "phi3", "mistral")]
SHORT = np.arange(3, 9)


def long_text(count: int, prompt: np.ndarray = SHORT, **fields: object) -> Request:
    """Return a request for exactly ``count`` tokens, without terminators."""
    return Request(prompt, max_new_tokens=count, stop_ids=(), **fields)  # type: ignore[arg-type]


def tokens_of(chunks) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_completions_equal_transformers(family):
    model = causal_model(family).requires_grad_(False)
    input_prompts = prompts(8, vocabulary=97)
    results = engine_of(model).generate_all([Request(p, max_new_tokens=12) for p in input_prompts])
    assert [text.tokens.tolist() for text in results] == [greedy(model, prompt, 12) for prompt in input_prompts]
    assert {text.finish for text in results} == {"length"}


def test_completion_ends_before_terminator():
    input_prompts = [*prompts(8), np.arange(3, 88)]
    completions = [greedy(llama()[0], prompt, 20) for prompt in input_prompts]
    terminators = [
        tokens[2 * n % 20] for n, tokens in enumerate(completions)
    ]  # a terminator that occurs in each completion
    requests = [
        Request(p, stop_ids=(terminator,), max_new_tokens=20)
        for p, terminator in zip(input_prompts, terminators, strict=True)
    ]
    for tokens, terminator, text in zip(completions, terminators, engine().generate_all(requests), strict=True):
        assert text.tokens.tolist() == truncate_at(tokens, (terminator,))
        assert (text.finish, text.terminator) == ("stop", terminator)
    (last,) = engine().generate_all(
        [Request(input_prompts[-1], stop_ids=())]
    )  # without terminators, the text ends at the last position
    assert last.finish == "length" and last.tokens.tolist() == greedy(llama()[0], input_prompts[-1], 128 - 85)


def test_results_do_not_depend_on_batch_or_prompt_chunks():
    sampling = [Sampling(), Sampling(temperature=1.0, seed=5, top_p=0.9)]
    requests = [Request(p, None, sampling[n % 2], max_new_tokens=12) for n, p in enumerate(prompts(10, seed=3))]
    for request, text in zip(requests, engine(limits=SMALL_STEPS).generate_all(requests), strict=True):
        (single,) = engine().generate_all([request])
        assert np.array_equal(single.tokens, text.tokens) and single.text == text.text


def test_requests_complete_with_too_few_pages():
    input_prompts = prompts(6, max_length=30, seed=4)
    small = engine(pages=5)  # each text needs two or three of them
    for prompt, text in zip(input_prompts, small.generate_all([long_text(40, p) for p in input_prompts]), strict=True):
        assert text.tokens.tolist() == greedy(llama()[0], prompt, 40)
    assert small.load.pages_used == 0


def test_shared_prefix_is_computed_once():
    common = np.arange(3, 83)
    first, second = (Request(np.append(common, rest), max_new_tokens=5) for rest in ([90], [91, 92]))
    instance = engine()
    assert next(iter(instance.submit(first))).reused == 0
    instance.generate_all([first])
    tokens_before = instance.load.tokens
    chunks = list(instance.submit(second))
    assert [chunk.reused for chunk in chunks] == [80, *[0] * (len(chunks) - 1)]
    assert instance.load.tokens - tokens_before == 2 + 4, "expected two prompt tokens and four new ones"
    assert tokens_of(chunks) == greedy(llama()[0], second.tokens, 5)


def test_chunks_are_streamed_and_join_to_full_text():
    generation = engine().submit(long_text(20))
    chunks = list(generation)
    result = generation.result()
    assert "".join(chunk.text for chunk in chunks) == result.text and tokens_of(chunks) == result.tokens.tolist()
    assert len(chunks) >= 20 and result.finish == "length"
    assert [chunk.finish for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_cancelled_request_ends_and_frees_pages():
    instance = engine(limits=BatchLimits(running=1))
    running = instance.submit(long_text(110))
    queued = instance.submit(long_text(110))
    next(iter(running))
    queued.cancel()
    running.cancel()
    assert list(running)[-1].finish == "cancelled"
    assert queued.result().finish == "cancelled" and not len(queued.result().tokens)
    (text,) = instance.generate_all([long_text(3)])
    assert len(text.tokens) == 3 and instance.load.pages_used == 0


def test_timeout_ends_running_and_queued_requests():
    late = [long_text(100, seconds=0.0) for _ in range(2)]
    assert [text.finish for text in engine().generate_all(late)] == ["timeout", "timeout"]


def test_failed_step_fails_its_requests_only(monkeypatch):
    instance = engine()
    decoder_type = type(llama()[1].decoder)
    original = decoder_type.step
    failing = iter([False, True])

    def step(*args: object, **kwargs: object) -> object:
        if next(failing, False):
            raise RuntimeError("simulated failure")
        return original(*args, **kwargs)

    monkeypatch.setattr(decoder_type, "step", step)
    generation = instance.submit(long_text(9))
    with pytest.raises(RuntimeError, match="simulated failure"):
        generation.result()
    assert list(generation)[-1].finish == "error"
    assert instance.submit(long_text(9)).result().finish == "length"
    assert wait_until(lambda: instance.load.pages_used == 0)  # the engine thread frees them


def test_logprobs_of_completion_and_prompt_match_model():
    prompt = prompts(1, seed=9)[0]
    request = long_text(4, prompt, sampling=Sampling(logprobs=2), prompt_logprobs=True)
    chunks = list(engine().submit(request))
    tokens = torch.tensor([[*prompt.tolist(), *tokens_of(chunks)]])
    with torch.no_grad():
        expected_logprobs = llama()[0](tokens).logits[0].log_softmax(-1)
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert len(chunks[0].logprobs) - len(chunks[0].tokens) == len(prompt) - 1
    assert [entry.token for entry in entries] == tokens[0, 1:].tolist()
    for row, entry in zip(expected_logprobs, entries, strict=False):
        expected = [float(row[entry.token]), float(row.max())]
        assert [entry.logprob, entry.top[0][1]] == pytest.approx(expected, abs=1e-4)
    (text,) = engine().generate_all([replace(request, max_new_tokens=0)])  # only the prompt
    assert text.finish == "length" and not len(text.tokens)
    assert [entry.token for entry in text.logprobs] == prompt[1:].tolist()


def test_constraint_does_not_affect_other_requests():
    """The end of a text by its grammar is detected only after its last token was chosen."""
    pytest.importorskip("llguidance", reason="constraints require llguidance")
    free = long_text(12, np.arange(3, 30))
    bound = [replace(free, stop_ids=None, max_new_tokens=max_tokens, constraint=PAIRS) for max_tokens in (5, 6, 7, 12)]
    unconstrained, *texts = engine().generate_all([free, *bound])
    assert [(text.finish, len(text.tokens)) for text in texts] == [("length", 5), *[("stop", 6)] * 3]
    assert {texts[-1].text[i : i + 2] for i in (0, 2, 4)} <= {"ab", "cd"}
    assert np.array_equal(unconstrained.tokens, engine().generate_all([free])[0].tokens)


def test_slow_constraint_does_not_block_other_requests():
    pytest.importorskip("llguidance", reason="constraints require llguidance")
    instance = engine(constraints=ConstraintLimits(ProcessLimits(seconds=600, memory=8 << 30)))
    sampling = Sampling(logit_bias={tokenizer()("x")["input_ids"][0]: 100.0})
    constraint = Constraint("grammar", slow_to_match_grammar(0))
    stuck = instance.submit(Request(SHORT, None, sampling, constraint, max_new_tokens=50))
    chunks = iter(stuck)
    assert "".join(next(chunks).text for _ in range(5)) == "xxxxx"  # the next mask takes minutes to compute
    for request in (long_text(12), Request(SHORT, max_new_tokens=12, constraint=PAIRS)):
        assert instance.submit(request).result().finish in ("length", "stop")
    assert not stuck.done
    instance.cancel_slow()
    assert stuck.result().finish == "cancelled"


def test_failed_constraint_raises_with_reason():
    pytest.importorskip("llguidance", reason="constraints require llguidance")
    instance = engine(constraints=ConstraintLimits(ProcessLimits(text_seconds=1e-6)))
    with pytest.raises(UserError, match=r"no longer be enforced: .*more than 1e-06 s"):
        for _ in range(200):  # the resolution of the CPU clock may be coarse
            instance.submit(long_text(100, constraint=Constraint("regex", "(.|\n)*"))).result()


def test_owners_do_not_share_prefix_cache():
    instance = engine()

    def reused(owner: int) -> bool:
        return any(chunk.reused for chunk in instance.submit(long_text(2, np.arange(3, 80), owner=owner)))

    assert [reused(owner) for owner in (1, 2, 1, 2)] == [False, False, True, True]


def test_close_drains_or_cancels_and_rejects_new_requests():
    drained = engine()
    generation = drained.submit(long_text(9))
    drained.close()
    assert generation.result().finish == "length"
    with pytest.raises(UserError, match="shut down"):
        drained.submit(Request(SHORT))
    immediate = engine(limits=BatchLimits(running=1))
    generations = [immediate.submit(long_text(120)) for _ in range(3)]
    immediate.close(drain=False)
    assert generations[2].result().finish == "cancelled"


def test_invalid_requests_are_rejected_on_submit():
    instance = engine()
    for request, message in (
        (Request(np.empty(0, np.int64)), "empty"),
        (Request(np.arange(200) % 90), "128 positions"),
        (Request(np.array([259])), "does not exist"),
        (Request(np.array([-1])), "does not exist"),
        (Request(SHORT, adapter="unknown"), "no adapter 'unknown'"),
        (Request(SHORT, sampling=Sampling(temperature=-1)), "temperature"),
        (Request(SHORT, max_new_tokens=-1), "max_new_tokens"),
        (Request(SHORT, stop=("",)), "stop string"),
    ):
        with pytest.raises(UserError, match=message):
            instance.submit(request)
    assert instance.load.waiting == 0
