"""An opened run writes what transformers writes with it, by the decoder where it can."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deltaw.data import encode_prompt
from deltaw.errors import UserError
from deltaw.lora import LoRAConfig
from deltaw.methods.files import choose_method
from deltaw.methods.lora import LoRA
from deltaw.runtime.generation import Completion, generate
from deltaw.serving.opening import OWN, SessionWriter, open_engine, verified_writer
from deltaw.serving.request import Constraint, Request, Sampling
from deltaw.settings import RunConfig
from deltaw.training.origin import InferenceSession, open_run
from tests.byte_models import saved
from tests.tiny_models import causal_model

# Methods whose parameters are the model's own are decoded in one way; biases are more than its own code has.
METHODS = ["lora", "prompt", "bias", "full"]
METHODS += [pytest.param(name, marks=pytest.mark.slow) for name in ("head", "input", "random", "last")]
CHANGES = {"last": {"last": {"blocks": 1}}, "prompt": {"prompt": {"length": 4}}, "random": {"random": {"weights": 0.2}}}
OPENING = [13, 14, 15]
PROMPTS = [np.random.default_rng(5).integers(40, 99, count) for count in (2, 9, 16, 22, 29)]


def quiet(line: str) -> None:
    """Nobody reads along."""


def opened(folder: Path) -> InferenceSession:
    return open_run(str(folder), precision="fp32", device="cpu", say=quiet)


def trained(model_folder: Path, folder: Path, method: LoRA | str) -> InferenceSession:
    """A run whose parameters are far from where they began."""
    session = opened(model_folder)
    if isinstance(method, str):
        raw = {"model": str(model_folder), "data": {"train": "none.jsonl"}, "method": method, "output": "x"}
        method = choose_method(RunConfig.model_validate(raw | CHANGES.get(method, {})), session.tokenizer)
    method.prepare(session.model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in method.parameters(session.model):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    method.after_step(session.model)
    folder.mkdir(parents=True)
    method.save(session.model, folder, base_model=str(model_folder))
    return opened(folder)


def own_texts(session: InferenceSession, asked: list[np.ndarray]) -> list[list[int]]:
    written = generate(session.model, session.tokenizer, [session.prompt(p) for p in asked], max_new_tokens=16)
    return [completion.tokens.tolist() for completion in written]


def texts(engine, asked: list[np.ndarray], adapter: str | None = None) -> list[list[int]]:
    written = engine.write_all([Request(p, adapter=adapter, max_new_tokens=16) for p in asked])
    return [text.tokens.tolist() for text in written]


def assert_writes_what_transformers_writes(session: InferenceSession, says: str | None = None) -> None:
    told: list[str] = []
    expected = own_texts(session, PROMPTS)
    engine = open_engine(session, cache_bytes=1 << 22, say=told.append)
    assert engine.own_adapter == (OWN if session.adapter and engine.has_base else None)
    asked = [(engine.own_adapter, p) for p in PROMPTS] + [(None, p) for p in PROMPTS]
    mixed = engine.write_all([Request(p, adapter=name, max_new_tokens=16) for name, p in asked])
    written = [text.tokens.tolist() for text in mixed]
    assert written[: len(PROMPTS)] == expected
    if engine.has_base:
        with session.base():
            of_base = own_texts(session, PROMPTS)
        assert written[len(PROMPTS) :] == of_base and (of_base != expected) == session.adapter
    assert bool(told) == (says is not None) and (says is None or says in told[0])
    engine.close()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_decoded(method, model_folder, tmp_path):
    assert_writes_what_transformers_writes(trained(model_folder, tmp_path / "run", method))


def test_an_activated_adapter_acts_from_its_invocation_on(model_folder, tmp_path):
    config = LoRAConfig(rank=4, alpha=16, activation="completion", invocation_tokens=OPENING)
    session = trained(model_folder, tmp_path / "run", LoRA(config))
    invoked = [np.concatenate([p, OPENING, p[:2]]) for p in PROMPTS]
    engine = open_engine(session, cache_bytes=1 << 22, say=quiet)
    written = texts(engine, invoked, OWN)
    assert written == own_texts(session, invoked) and texts(engine, invoked) != written
    assert texts(engine, PROMPTS, OWN) == texts(engine, PROMPTS), "without it, the base answers"

    prompt = np.concatenate([np.arange(40, 100), OPENING, [50]])
    engine.write_all([Request(prompt, max_new_tokens=2)])
    for reused in (60, 63):  # up to the invocation, and then all but the last token
        assert next(iter(engine.submit(Request(prompt, adapter=OWN, max_new_tokens=2)))).reused == reused
    engine.close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"dora": True}, "DoRA"), pytest.param({"train_modules": ["lm_head"]}, "lm_head", marks=pytest.mark.slow)],
)
def test_what_factors_do_not_say_is_decoded_by_transformers(changes, says, model_folder, tmp_path):
    session = trained(model_folder, tmp_path / "run", LoRA(LoRAConfig(rank=4, alpha=16, **changes)))
    assert_writes_what_transformers_writes(session, says)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory) -> InferenceSession:
    model = causal_model("bloom")
    model.resize_token_embeddings(259)
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    return opened(saved(model, tmp_path_factory.mktemp("base") / "bloom"))


def test_a_model_without_decoder_is_decoded_by_transformers(bloom):
    assert_writes_what_transformers_writes(bloom, "its blocks are not known")


def test_texts_by_transformers_stream_stop_and_match_as_others_do(bloom):
    engine = open_engine(bloom, say=quiet)
    prompt = encode_prompt("paint it", "auto", bloom.tokenizer)

    def asked(count: int, **more: object) -> Request:
        return Request(prompt, max_new_tokens=count, stop_ids=(), **more)

    free = engine.submit(asked(12, sampling=Sampling(logprobs=1)))
    pieces, whole = list(free), free.result()
    assert len(pieces) >= 12 and "".join(p.text for p in pieces) == whole.text
    assert [entry.token for entry in whole.logprobs] == whole.tokens.tolist()
    stop = whole.text[3:5]
    stopped, short, late, none = engine.write_all([asked(12, stop=(stop,)), asked(5), asked(40, seconds=0.0), asked(0)])
    assert [text.finish for text in (stopped, short, late, none)] == ["stop", "length", "timeout", "length"]
    assert stopped.text == whole.text[: whole.text.index(stop)] and short.tokens.tolist() == whole.tokens[:5].tolist()
    with pytest.raises(UserError, match="prompt"):
        engine.submit(Request(prompt, prompt_logprobs=True))
    pytest.importorskip("llguidance", reason="constraints are llguidance's")
    (bound,) = engine.write_all([Request(prompt, constraint=Constraint("regex", "(yes|no)"))])
    assert bound.text in ("yes", "no")
    long = engine.submit(asked(200))
    next(iter(long))
    long.cancel()
    assert long.result().finish == "cancelled"
    engine.close()


@pytest.mark.parametrize("method", ["lora", "full", pytest.param("prompt", marks=pytest.mark.slow)])
def test_a_writer_answers_as_the_session_is_at_the_moment(method, model_folder, tmp_path):
    session = trained(model_folder, tmp_path / "run", method)
    writer = SessionWriter(session, quiet)

    def own(asked: list[np.ndarray]) -> list[tuple[object, ...]]:
        return told(generate(session.model, session.tokenizer, asked, max_new_tokens=8))

    def told(written: list[Completion]) -> list[tuple[object, ...]]:
        return [(one.text, one.tokens.tolist(), one.stopped, one.terminator) for one in written]

    for _ in range(2):
        with session.base():
            bare = own(PROMPTS)
            assert told(writer(PROMPTS, 8, 4096, None)) == bare
            assert told(verified_writer(session)(PROMPTS, 8, 64, None)) == bare
        seen = [session.prompt(p) for p in PROMPTS]
        assert told(writer(seen, 8, 4096, None)) == own(seen) != bare
        of_training = verified_writer(session)(seen, 8, 64, None)
        assert (of_training is None) if method == "full" else told(of_training) == own(seen)
