"""An opened run writes what transformers writes with it, by the decoder where it can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from deltaw.data import encode_prompt
from deltaw.errors import UserError
from deltaw.lora import LoRAConfig
from deltaw.methods.files import choose_method
from deltaw.methods.lora import LoRA
from deltaw.runtime.generation import generate
from deltaw.serving.opening import OWN, SessionWriter, open_engine
from deltaw.serving.request import Constraint, Request, Sampling
from deltaw.settings import RunConfig
from deltaw.training.origin import InferenceSession, open_run
from tests.byte_models import byte_tokenizer
from tests.conftest import laid_over
from tests.tiny_models import causal_model

# Methods whose parameters are the model's own are decoded in one way; biases are more than its own code has.
METHODS = ["lora", "prompt", "bias", "full"]
METHODS += [pytest.param(name, marks=pytest.mark.slow) for name in ("head", "input", "random", "last")]
CHANGES = {"last": {"last": {"blocks": 1}}, "prompt": {"prompt": {"length": 4}}, "random": {"random": {"weights": 0.2}}}
OPENING = [13, 14, 15]


def quiet(line: str) -> None:
    """Nobody reads along."""


def trained(model_folder: Path, folder: Path, method: LoRA | str, **changes: object) -> Path:
    """A run's folder whose parameters are far from where they began."""
    session = open_run(str(model_folder), precision="fp32", device="cpu", say=quiet)
    if isinstance(method, str):
        raw = {"model": str(model_folder), "data": {"train": "none.jsonl"}, "method": method, "output": "x"}
        config = RunConfig.model_validate(laid_over(raw, changes))
        made = choose_method(config, session.tokenizer)
    else:
        made = method
    made.prepare(session.model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in made.parameters(session.model):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    made.after_step(session.model)
    folder.mkdir(parents=True)
    made.save(session.model, folder, base_model=str(model_folder))
    return folder


def prompts() -> list[np.ndarray]:
    random = np.random.default_rng(5)
    return [random.integers(40, 99, int(n)) for n in random.integers(2, 30, 7)]


def own_texts(session: InferenceSession, asked: list[np.ndarray], count: int = 16) -> list[list[int]]:
    written = generate(session.model, session.tokenizer, [session.prompt(p) for p in asked], max_new_tokens=count)
    return [completion.tokens.tolist() for completion in written]


def assert_writes_what_transformers_writes(session: InferenceSession, says: str | None = None) -> None:
    told: list[str] = []
    asked = prompts()
    expected = own_texts(session, asked)
    engine = open_engine(session, cache_bytes=1 << 22, say=told.append)
    assert engine.own_adapter == (OWN if session.adapter and engine.has_base else None)
    requests = [Request(p, adapter=engine.own_adapter, max_new_tokens=16) for p in asked]
    base = [Request(p, max_new_tokens=16) for p in asked]
    mixed = engine.write_all([*requests, *base])
    assert [text.tokens.tolist() for text in mixed[: len(asked)]] == expected
    if engine.has_base:
        with session.base():
            of_base = own_texts(session, asked)
        assert [text.tokens.tolist() for text in mixed[len(asked) :]] == of_base
        assert (of_base != expected) == session.adapter
    assert bool(told) == (says is not None)
    assert says is None or says in told[0]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_decoded(method: str, model_folder: Path, tmp_path: Path) -> None:
    folder = trained(model_folder, tmp_path / "run", method, **CHANGES.get(method, {}))
    session = open_run(str(folder), precision="fp32", device="cpu", say=quiet)
    assert_writes_what_transformers_writes(session)


def test_an_activated_adapter_acts_from_its_invocation_on(model_folder: Path, tmp_path: Path) -> None:
    config = LoRAConfig(rank=4, alpha=16, activation="completion", invocation_tokens=OPENING)
    folder = trained(model_folder, tmp_path / "run", LoRA(config))
    session = open_run(str(folder), precision="fp32", device="cpu", say=quiet)
    asked = [np.concatenate([p, OPENING, p[:2]]) for p in prompts()] + prompts()
    expected = own_texts(session, asked)
    engine = open_engine(session, cache_bytes=1 << 22, say=quiet)
    written = engine.write_all([Request(p, adapter=OWN, max_new_tokens=16) for p in asked])
    assert [text.tokens.tolist() for text in written] == expected
    base = engine.write_all([Request(p, max_new_tokens=16) for p in asked])
    assert [b.text for b in base[7:]] == [w.text for w in written[7:]], "without it, the base answers"
    assert [b.text for b in base[:7]] != [w.text for w in written[:7]]

    prompt = np.concatenate([np.arange(40, 100), OPENING, [50]])
    engine.write_all([Request(prompt, max_new_tokens=2)])
    first = next(iter(engine.submit(Request(prompt, adapter=OWN, max_new_tokens=2))))
    assert first.reused == 60, "up to the invocation"
    again = next(iter(engine.submit(Request(prompt, adapter=OWN, max_new_tokens=2))))
    assert again.reused == 63
    engine.close()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LoRAConfig(rank=4, alpha=16, dora=True), "DoRA"),
        pytest.param(LoRAConfig(rank=4, alpha=16, train_modules=["lm_head"]), "lm_head", marks=pytest.mark.slow),
    ],
)
def test_what_factors_do_not_say_is_decoded_by_transformers(
    config: LoRAConfig, says: str, model_folder: Path, tmp_path: Path
) -> None:
    folder = trained(model_folder, tmp_path / "run", LoRA(config))
    session = open_run(str(folder), precision="fp32", device="cpu", say=quiet)
    assert_writes_what_transformers_writes(session, says)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceSession]:
    folder = tmp_path_factory.mktemp("base") / "bloom"
    model = causal_model("bloom")
    model.resize_token_embeddings(259)
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    yield open_run(str(folder), precision="fp32", device="cpu", say=quiet)


def test_a_model_without_decoder_is_decoded_by_transformers(bloom: InferenceSession) -> None:
    assert_writes_what_transformers_writes(bloom, "its blocks are not known")


def test_texts_by_transformers_stream_stop_and_match_as_others_do(bloom: InferenceSession) -> None:
    engine = open_engine(bloom, say=quiet)
    prompt = encode_prompt("paint it", "auto", bloom.tokenizer)
    free = engine.submit(Request(prompt, max_new_tokens=12, stop_ids=(), sampling=Sampling(logprobs=1)))
    pieces = list(free)
    assert len(pieces) >= 12 and "".join(p.text for p in pieces) == free.result().text
    whole = free.result()
    assert [entry.token for entry in whole.logprobs] == whole.tokens.tolist()
    stop = whole.text[3:5]
    asked = [
        Request(prompt, max_new_tokens=12, stop_ids=(), stop=(stop,)),
        Request(prompt, max_new_tokens=5, stop_ids=()),
        Request(prompt, max_new_tokens=40, stop_ids=(), seconds=0.0),
        Request(prompt, max_new_tokens=0),
    ]
    stopped, short, late, none = engine.write_all(asked)
    assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.finish == "stop"
    assert short.tokens.tolist() == whole.tokens[:5].tolist() and short.finish == "length"
    assert late.finish == "timeout" and none.finish == "length"
    with pytest.raises(UserError, match="prompt"):
        engine.submit(Request(prompt, prompt_logprobs=True))
    pytest.importorskip("llguidance", reason="constraints are llguidance's")
    (bound,) = engine.write_all([Request(prompt, constraint=Constraint("regex", "(yes|no)"))])
    assert bound.text in ("yes", "no")
    long = engine.submit(Request(prompt, max_new_tokens=200, stop_ids=()))
    next(iter(long))
    long.cancel()
    assert long.result().finish == "cancelled"
    engine.close()


@pytest.mark.parametrize("method", ["lora", "full", pytest.param("prompt", marks=pytest.mark.slow)])
def test_a_writer_answers_as_the_session_is_at_the_moment(method: str, model_folder: Path, tmp_path: Path) -> None:
    folder = trained(model_folder, tmp_path / "run", method, **CHANGES.get(method, {}))
    session = open_run(str(folder), precision="fp32", device="cpu", say=quiet)
    writer = SessionWriter(session, quiet)
    asked, bare = prompts(), []
    for turn in range(2):
        with session.base():
            bare.append(writer(asked, 8, None))
            expected = [text.text for text in generate(session.model, session.tokenizer, asked, max_new_tokens=8)]
        assert bare[turn] == expected
        seen = [session.prompt(p) for p in asked]
        own = [text.text for text in generate(session.model, session.tokenizer, seen, max_new_tokens=8)]
        assert writer(seen, 8, None) == own != expected
