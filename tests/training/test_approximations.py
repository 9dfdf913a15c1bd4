"""Approximations are used only where the model at hand bears them, and left out as soon as it does not."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import BertConfig, BertModel

from deltaw.kernels import loader
from deltaw.kernels.arithmetic import APPROXIMATIONS
from deltaw.kernels.layout import Layout
from deltaw.kernels.variants import LEFT_OUT_BY
from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.machine.kernel_choice import KernelChoice
from deltaw.methods.base import ADAPTER_WEIGHTS
from deltaw.runs.fit import fit, load_for
from deltaw.runtime.packed import packed_rows
from deltaw.runtime.widened import widened
from deltaw.settings import RunConfig
from deltaw.training import approximations
from deltaw.training import session as sessions
from deltaw.training.approximations import Errors, GradientCheck, Measured, block_of, rows_to_look_at, steps_between
from deltaw.training.process import guest
from deltaw.training.session import Session
from deltaw.training.state import ArithmeticChangedWarning
from tests.byte_models import saved, tiny_llama
from tests.conftest import laid_over, write_rows
from tests.kernels.conftest import compiled_only
from tests.tiny_models import CAUSAL, causal_model
from tests.training.loops import moved
from tests.training.runs import Told, metrics, often, session_of, stopped_run

GRADIENTS = "int8_gradients"
COLUMNS = 8  # of 256 that are rescaled


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    """Each training compares gradients itself."""
    monkeypatch.setattr(sessions, "recall", lambda *of: None)


@torch.no_grad()
def rescale(model, factor: float) -> None:
    """The same function to the bit: some columns of each norm times a power of two, and the weights that read
    them divided by it."""
    for block in model.model.layers:
        for norm, module, readers in (
            (block.input_layernorm, block.self_attn, ("q_proj", "k_proj", "v_proj")),
            (block.post_attention_layernorm, block.mlp, ("gate_proj", "up_proj")),
        ):
            norm.weight[:COLUMNS] *= factor
            for reader in readers:
                getattr(module, reader).weight[:, :COLUMNS] /= factor


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A Llama in bf16, by the factor of its rescaled columns."""

    shape = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512}

    @functools.cache
    def folder(factor: float) -> Path:
        model = tiny_llama(**shape, initializer_range=0.05).bfloat16()
        rescale(model, factor)
        return saved(model, tmp_path_factory.mktemp("rescaled"))

    return folder


@pytest.fixture(scope="module")
def bf16_run(settings, bases, tmp_path_factory):
    """Settings of a run in bf16."""
    folder = tmp_path_factory.mktemp("bf16")
    told = ((f"{n} times {n % 7}", n * (n % 7)) for n in range(40))
    rows = [{"prompt": f"say {what}", "completion": f"{what} is {product}"} for what, product in told]
    plain = {
        "data": {"train": str(write_rows(folder / "long.jsonl", rows)), "eval": 4},
        "lora": {"rank": 8, "alpha": 16},
        "train": {"batch_size": 8, "max_steps": 2, "drift": False, "samples": 0},
        "precision": "bf16",
    }

    def make(name: str, *, factor: float = 1, **changes: object) -> dict:
        return settings(folder / name, **laid_over({"model": str(bases(factor)), **plain}, changes))

    return make


@pytest.fixture(scope="module")
def approximate(bf16_run):
    """A run of two steps that approximates."""
    return fit(bf16_run("on"))


def weights(done) -> bytes:
    return (done.output / ADAPTER_WEIGHTS).read_bytes()


def gradient(session: Session, rows) -> torch.Tensor:
    """The gradient of all that is trained, as one vector."""
    with session.running():
        for batch in session.batcher.batches(rows):
            session.objective(batch).backward()
    found = torch.cat([p.grad.flatten().double() for _, p in session.trained if p.grad is not None])
    session.model.zero_grad()
    return found


@compiled_only
@pytest.mark.parametrize(
    ("factor", "taken"), [(1, True), *(pytest.param(n, False, marks=pytest.mark.slow) for n in (8, 32)), (128, False)]
)
def test_gradients_in_int8_are_used_where_they_add_little(factor, taken, bf16_run):
    """Errors are measured against the model in fp32, which the run does not have."""
    with guest():
        exact = session_of(bf16_run("exact", factor=factor, precision="fp32"), offered=APPROXIMATIONS)
        rows = exact.data.train[:16]
        wanted = gradient(exact, rows)
        session = session_of(bf16_run("bf16", factor=factor), offered=[GRADIENTS])
        found = {}
        for names in ((), (GRADIENTS,), session.approximations.names):
            session.approximations.names, chosen = names, session.approximations.names
            found[names] = float((gradient(session, rows) - wanted).norm() / wanted.norm())
            session.approximations.names = chosen
    assert (GRADIENTS in session.approximations.names) == taken
    own, used = found[()], found[session.approximations.names]
    assert used <= 1.5 * own + 0.01
    if factor == 128:
        assert found[GRADIENTS,] > 10 * own  # or there would be nothing to find
    said = "\n".join(session.said)
    assert ("not approximate: gradients of frozen layers in int8" in said) == (not taken)
    if taken:
        # What the run says it measured is what it is.
        assert session.approximations.measured.whole.own == pytest.approx(own, rel=0.3)
        assert session.approximations.measured.whole.error == pytest.approx(used, rel=0.3)


# Gemma's embeddings round their product with a scale themselves.
ROUNDED_EMBEDDINGS = ("gemma2", "gemma3")


@pytest.mark.parametrize("family", [*CAUSAL, "bloom"])
def test_a_model_in_bf16_can_be_computed_in_fp32(family):
    """Each family's own code block by block, against the same model with all weights in fp32."""
    found = []
    for wide in (True, False):
        model = causal_model(family).bfloat16()
        model = (model if wide else model.float()).requires_grad_(False)
        attach(model, LoRAConfig(rank=4, alpha=8, target_modules="all-linear"))
        trained = [p for _, p in adapter_parameters(moved(model, 0.1))]
        before = {name: (id(p), p.dtype) for name, p in model.named_parameters()}
        tokens = torch.arange(60).view(3, 20) * 7 % 90 + 3
        with widened(model) if wide else contextlib.nullcontext():
            logits = model(input_ids=tokens, use_cache=False).logits
            assert logits.dtype == torch.float32
            logits.log_softmax(-1)[..., 5].sum().backward()
        assert {name: (id(p), p.dtype) for name, p in model.named_parameters()} == before
        assert not any("forward" in vars(module) for module in model.modules())
        found.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    tolerance = 1e-2 if family in ROUNDED_EMBEDDINGS else 1e-4
    assert (found[0] - found[1]).norm() < tolerance * found[1].norm()


def test_fused_blocks_in_fp32_let_go_of_their_weights():
    """What a whole model in fp32 would take is never there, though blocks remember what they ran with."""
    model = tiny_llama(num_hidden_layers=3).bfloat16().requires_grad_(False)
    attach(model, LoRAConfig(rank=4, alpha=8, target_modules="all-linear"))
    tokens = torch.arange(20)[None] + 3
    inputs = {"input_ids": tokens, "position_ids": tokens - 3, "packed_layout": Layout.of_lengths([20])}
    shapes = {p.shape for p in model.model.layers[0].parameters() if p.dim() == 2 and p.dtype == torch.bfloat16}

    def wide() -> dict[int, torch.nn.Parameter]:
        found = (t for t in gc.get_objects() if type(t) is torch.nn.Parameter and t.dtype == torch.float32)
        return {id(t): t for t in found if t.shape in shapes and not t.requires_grad}

    before = wide()
    with packed_rows(model), widened(model):
        model(**inputs, use_cache=False).logits.sum().backward()
        assert not wide().keys() - before.keys()


def test_trained_weights_of_fused_blocks_are_compared_in_fp32():
    """Full fine-tuning trains the blocks' weights, so that they are fp32 copies of parameters while a block runs."""
    tokens = torch.arange(20)[None] + 3
    inputs = {"input_ids": tokens, "position_ids": tokens - 3, "packed_layout": Layout.of_lengths([20])}
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny_llama(num_hidden_layers=2).bfloat16().to(dtype)
        with packed_rows(model), widened(model):
            model(**inputs, use_cache=False).logits.log_softmax(-1)[..., 5].sum().backward()
        gradients.append(model.model.layers[0].self_attn.o_proj.weight.grad.float())
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


@pytest.mark.slow
@compiled_only
def test_what_is_off_computes_with_products_in_bf16(approximate, bf16_run, monkeypatch):
    assert GRADIENTS in approximate.approximations["used"]
    exact = fit(bf16_run("off", train={"approximate": "off"}))
    assert exact.approximations["used"] == [] and exact.arithmetic[GRADIENTS] == "no"
    assert weights(exact) != weights(approximate)
    with monkeypatch.context() as environment:
        for variable in LEFT_OUT_BY.values():
            environment.setenv(variable, "0")
        assert weights(fit(bf16_run("off by the environment"))) == weights(exact)
    monkeypatch.setattr(KernelChoice, "approximations", ())  # kernels know nothing of them
    assert weights(fit(bf16_run("never"))) == weights(exact)


@compiled_only
def test_a_run_that_begins_to_fail_goes_on_without(bf16_run, monkeypatch):
    monkeypatch.setattr(approximations, "SHARE", 1e9)  # looked at before each step
    models = []

    def loading(*args, **named):
        loaded = load_for(*args, **named)
        models.append(loaded.model)
        return loaded

    class Changing(Told):
        def on_step(self, step):
            if step.step == 1:
                rescale(models[-1], 64)

    monkeypatch.setattr("deltaw.runs.fit.load_for", loading)
    told, again = Changing(), Told()
    done = fit(bf16_run("failing"), callback=told)
    assert [line for line in told.lines if line.startswith("not approximate from step 2 on: gradients")]
    assert done.approximations["off_since_step"] == 2 and GRADIENTS not in done.approximations["used"]
    assert done.arithmetic[GRADIENTS] == "no"
    (noted,) = metrics(done.output, "approximations")
    assert noted["step"] == 2 and GRADIENTS not in noted["approximations"]["used"]
    said = "approximate: auto  # off: gradients of frozen layers in int8: the gradient"
    assert said in (done.output / "run.yaml").read_text()
    # What no longer is approximate stays so when the run goes on.
    longer = fit({"train": {"max_steps": 3}}, resume=done.output, callback=again)
    assert longer.approximations["used"] == [] and longer.approximations["off_since_step"] == 2
    assert "approximate" not in again


@compiled_only
def test_looking_again_changes_no_bit(approximate, bf16_run, monkeypatch):
    monkeypatch.setattr(approximations, "SHARE", 1e9)
    moved = mock.Mock(wraps=GradientCheck.moved)
    monkeypatch.setattr(GradientCheck, "moved", lambda *a: moved(*a))
    looking = fit(bf16_run("often"))
    assert moved.call_count == 1  # before the second step
    assert looking.approximations["used"] == approximate.approximations["used"] != []
    assert weights(looking) == weights(approximate)


@pytest.mark.slow
@compiled_only
def test_a_run_goes_on_as_it_computed_unless_a_setting_or_the_environment_turns_it_off(
    approximate, bf16_run, tmp_path, monkeypatch
):
    stopped, folders = stopped_run(bf16_run("stopped"), 1), map(str, itertools.count())

    def resumed(told=None, **changes):
        """In another folder each time."""
        folder = shutil.copytree(stopped, tmp_path / next(folders))
        return fit(bf16_run("stopped", **changes) | {"output": str(folder)}, callback=told)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(GradientCheck, "choose", None)  # it looks no further
        warnings.simplefilter("error", ArithmeticChangedWarning)
        done = resumed()
        assert done.resumed_from_step == 1
        assert {**done.approximations, "seconds": 0} == {**approximate.approximations, "seconds": 0}
        assert weights(done) == weights(approximate)
        patch.setenv("DELTAW_KERNELS", loader.variant())  # forced kernels leave approximations as the run began
        assert GRADIENTS in resumed().approximations["used"]
    told = Told()
    with pytest.warns(ArithmeticChangedWarning, match=GRADIENTS):
        assert resumed(told, train={"approximate": "off"}).approximations["used"] == []
    assert "'train.approximate' is off" in told
    monkeypatch.setenv(LEFT_OUT_BY[GRADIENTS], "0")
    with pytest.warns(ArithmeticChangedWarning, match=GRADIENTS):
        assert GRADIENTS not in resumed().approximations["used"]


def test_memory_is_released_before_gradients_are_compared(bf16_run, monkeypatch):
    """Loading and the base model's log-probabilities leave holes that the fp32 copies do not fit."""
    calls: list[str] = []

    def recorded(name: str, run):
        return lambda *of: calls.append(name) or run(*of)

    monkeypatch.setattr(sessions, "gradient_check", recorded("rows", sessions.gradient_check))
    monkeypatch.setattr(sessions, "release_free_memory", recorded("release", sessions.release_free_memory))
    monkeypatch.setattr(GradientCheck, "choose", recorded("compare", GradientCheck.choose))
    with guest():
        session_of(bf16_run("released"), offered=APPROXIMATIONS)
    assert calls[-3:] == ["rows", "release", "compare"]


def test_a_model_that_cannot_be_compared_trains_exactly(bf16_run, monkeypatch):
    monkeypatch.setattr(approximations, "widened", mock.Mock(side_effect=RuntimeError("no such thing")))
    with guest():
        session = session_of(bf16_run("foreign"), offered=APPROXIMATIONS)
    assert session.approximations.names == () and session.chosen["train.approximate"].value == "off"
    assert [line for line in session.said if "compared with fp32 (RuntimeError: no such thing)" in line]


@compiled_only
@pytest.mark.parametrize("loss", often("dpo", of=("dpo", "kto", "simpo")))
def test_pairs_are_looked_at_with_their_own_loss(loss, bf16_run, tmp_path):
    rows = [{"prompt": f"say {n}", "chosen": f"{n} it is", "rejected": f"no {n * 7}, never"} for n in range(20)]
    if loss == "kto":
        asked = ((row["prompt"], row["chosen" if n % 2 else "rejected"], n) for n, row in enumerate(rows * 2))
        rows = [{"prompt": prompt, "completion": answer, "label": bool(n % 2)} for prompt, answer, n in asked]
    data = {"train": str(write_rows(tmp_path / "pairs.jsonl", rows))}
    done = fit(bf16_run(f"pairs {loss}", task="preference", preference={"loss": loss}, data=data))
    assert 0 < done.approximations["own"] < done.approximations["error"] < 0.3
    assert done.approximations["tokens"] >= approximations.TOKENS


@compiled_only
def test_labels_are_looked_at_too(bf16_run, tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = BertConfig(vocab_size=259, max_position_embeddings=64, initializer_range=0.05, **shape)
    bert = saved(BertModel(config).bfloat16(), tmp_path / "bert")
    rows = ({"text": f"{n} is {'odd' if n % 2 else 'even'}", "label": n % 2} for n in range(60))
    data, lora = {"train": str(write_rows(tmp_path / "labels.jsonl", rows))}, {"target_modules": "all-linear"}
    done = fit(bf16_run("labels", model=str(bert), task="sequence-classification", data=data, lora=lora))
    assert 0 < done.approximations["own"] <= done.approximations["error"] < 0.1


def test_what_is_allowed():
    for own, error, cosine, of_block, within in [
        (0.010, 0.019, 0.9999, False, True),
        (0.010, 0.026, 0.9999, False, False),  # more than half of it and a hundredth
        (0.010, 0.026, 0.9999, True, True),
        (0.010, 0.019, 0.9980, False, False),  # another direction
        (0.060, 0.089, 0.9970, False, True),  # less than half of what bf16 rounds
        (0.010, math.nan, 0.9999, False, False),
        (0.010, 0.010, math.nan, False, True),  # adds nothing
    ]:
        assert Errors(own, error, cosine).within(1.0, of_block=of_block) == within


def test_off_is_a_word_in_yaml_too(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: {train: d}\noutput: o\ntrain: {approximate: off}\n")
    assert RunConfig.read(path).train.approximate == "off"
    assert RunConfig.read(path, {"train": {"approximate": "auto"}}).train.approximate == "auto"


def test_noise_does_not_decide_and_one_block_that_is_off_suffices():
    # What is within the margin of what is allowed is neither taken nor, once taken, left out.
    near = Measured((), Errors(0.01, 0.0245, 1.0))
    assert near.failing(approximations.MARGIN) is not None and near.failing() is None
    good, bad = Errors(0.01, 0.011, 1.0), Errors(0.01, 0.05, 1.0)
    assert "model.layers.1" in Measured((), good, {"model.layers.0": good, "model.layers.1": bad}).failing()
    assert block_of("model.layers.10.mlp.up_proj.lora_A") == "model.layers.10"
    assert block_of("score.weight") == "score.weight"


def test_long_rows_are_left_out_and_few_suffice():
    # Rows are their numbers of tokens; two labels each.
    batcher = mock.Mock(batches=lambda rows: [mock.Mock(tokens=tokens) for tokens in rows])
    units = mock.Mock(units=lambda rows: 2 * len(rows))
    for rows, expected in (
        ([50, 3000, 60, *[40] * 50], [50, 60, *[40] * 6]),
        ([400, 400, 400], [400, 400]),
        ([5000, 3000, 4000], [3000]),
    ):
        assert rows_to_look_at(rows, batcher, units) == expected
    assert steps_between(128, 1024) == 100 and steps_between(10, 10**6) == 1


@compiled_only
@pytest.mark.parametrize(("spread", "taken"), [(0.05, False), (6.0, True)])
def test_a_head_whose_classes_are_alike_counts_each(spread, taken, bf16_run, tmp_path):
    """Where all classes are about as likely, sums over rows are most of a row's gradient."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    model = tiny_llama(vocab_size=8400, initializer_range=0.1, **shape)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=spread / 8)
    saved(model.bfloat16(), tmp_path / "alike")
    with guest():
        session = session_of(bf16_run("alike", model=str(tmp_path / "alike")), offered=["summed_classes"])
    assert (session.approximations.names == ("summed_classes",)) == taken, session.said


def test_each_pass_of_a_comparison_starts_without_freed_memory(bf16_run, monkeypatch):
    """Holes that fp32 blocks leave would otherwise remain while bf16 gradients are computed."""
    trims = []
    monkeypatch.setattr(approximations, "trim_memory", lambda: trims.append(1))
    with guest():
        session_of(bf16_run("trimmed"), offered=APPROXIMATIONS)
    assert len(trims) >= 3


def test_a_comparison_of_gradients_reports_the_share_that_is_done():
    model, seen = torch.nn.Linear(2, 1), []
    batches = [SimpleNamespace(tokens=3, inputs=torch.ones(3, 2)) for _ in range(2)]
    batcher = SimpleNamespace(batches=lambda rows: iter(batches))
    named = dict(model.named_parameters())
    check = GradientCheck(model, lambda batch: model(batch.inputs).sum(), batcher, named, [1, 2], seen.append)
    for _ in range(3):
        assert dict(check.gradients(())).keys() == named.keys()
    assert seen == pytest.approx([1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 0.99])
