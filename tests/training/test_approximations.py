"""Approximations are used only if the model tolerates them, and are disabled as soon as it does not."""

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

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from deltaw.data.example import Example
from deltaw.kernels import loader
from deltaw.kernels.arithmetic import APPROXIMATIONS
from deltaw.kernels.layout import Layout
from deltaw.kernels.variants import APPROXIMATION_SWITCHES
from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.machine.kernel_choice import KernelChoice
from deltaw.methods.base import ADAPTER_WEIGHTS
from deltaw.runs.fit import fit
from deltaw.runs.load_model import load_model
from deltaw.runtime.packed import packed_rows
from deltaw.runtime.widened import widened
from deltaw.settings.config import RunConfig
from deltaw.training import approximations
from deltaw.training import session as sessions
from deltaw.training.approximations import (
    ApproximationErrors,
    Errors,
    GradientCheck,
    block_of,
    check_interval,
    select_check_rows,
)
from deltaw.training.preparation import checkpoint_blocks
from deltaw.training.process import preserved_process_state
from deltaw.training.session import Session
from deltaw.training.state import ArithmeticChangedWarning
from tests.byte_models import save_model, tiny_llama
from tests.conftest import deep_merge, write_rows
from tests.kernels.conftest import compiled_only
from tests.runtime.recurrent_families import recurrent_model
from tests.tiny_models import CAUSAL, causal_model
from tests.training.loops import randomize_lora_b
from tests.training.runs import RecordingCallback, build_session, metrics, slow_except, stopped_run

GRADIENTS = "int8_gradients"
FACTORS = [(1, True), (8, False), (32, False), (128, False)]
COLUMNS = 8  # number of rescaled columns, of 256


@pytest.fixture(autouse=True)
def no_cached_comparison(monkeypatch):
    """Disable the cache of comparison results, so that each run compares gradients itself."""
    monkeypatch.setattr(sessions, "load_result", lambda *args: None)


@torch.no_grad()
def rescale(model, factor: float) -> None:
    """Rescale the model without changing its function.

    Some columns of each norm are multiplied by a power of two, and the weights that read them are divided by it.
    """
    for block in model.model.layers:
        for norm, module, readers in (
            (block.input_layernorm, block.self_attn, ("q_proj", "k_proj", "v_proj")),
            (block.post_attention_layernorm, block.mlp, ("gate_proj", "up_proj")),
        ):
            norm.weight[:COLUMNS] *= factor
            for reader in readers:
                getattr(module, reader).weight[:, :COLUMNS] /= factor


@pytest.fixture(scope="module")
def make_base_folder(tmp_path_factory):
    """Return a function that builds a bf16 Llama for a factor of its rescaled columns."""

    shape = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512}

    @functools.cache
    def folder(factor: float) -> Path:
        model = tiny_llama(**shape, initializer_range=0.05).bfloat16()
        rescale(model, factor)
        return save_model(model, tmp_path_factory.mktemp("rescaled"))

    return folder


@pytest.fixture(scope="module")
def bf16_run(settings, make_base_folder, tmp_path_factory):
    """Return a factory of settings of a run in bf16."""
    folder = tmp_path_factory.mktemp("bf16")
    products = ((f"{n} times {n % 7}", n * (n % 7)) for n in range(40))
    rows = [{"prompt": f"say {question}", "completion": f"{question} is {product}"} for question, product in products]
    defaults = {"data": {"train": str(write_rows(folder / "long.jsonl", rows)), "eval": 4}, "precision": "bf16"}
    defaults |= {"lora": {"rank": 8, "alpha": 16}}
    defaults["train"] = {"batch_size": 8, "max_steps": 2, "drift": False, "samples": 0}

    def make(name: str, *, factor: float = 1, **changes: object) -> dict:
        return settings(folder / name, **deep_merge({"model": str(make_base_folder(factor)), **defaults}, changes))

    return make


@pytest.fixture(scope="module")
def approximate_run(bf16_run):
    """Return the result of a run of two steps with approximations."""
    return fit(bf16_run("on"))


def weights(result) -> bytes:
    return (result.output / ADAPTER_WEIGHTS).read_bytes()


def gradient(session: Session, rows) -> torch.Tensor:
    """Return the gradient of all trainable parameters as one vector."""
    with session.running():
        for batch in session.batcher.batches(rows):
            session.objective(batch).backward()
    vector = torch.cat([p.grad.flatten().double() for _, p in session.trainable_parameters if p.grad is not None])
    session.model.zero_grad()
    return vector


@compiled_only
@pytest.mark.parametrize(("factor", "used"), slow_except((1, True), (128, False), names=FACTORS))
def test_int8_gradients_are_used_if_they_add_little_error(factor, used, bf16_run):
    """Errors are measured against the fp32 model, which the run itself does not have."""
    with preserved_process_state():
        exact = build_session(bf16_run("exact", factor=factor, precision="fp32"), candidates=APPROXIMATIONS)
        rows = exact.data.train[:16]
        expected = gradient(exact, rows)
        session = build_session(bf16_run("bf16", factor=factor), candidates=[GRADIENTS])
        chosen = session.approximations.names
        errors = {}
        for names in ((), (GRADIENTS,), chosen):
            session.approximations.names = names
            errors[names] = float((gradient(session, rows) - expected).norm() / expected.norm())
        session.approximations.names = chosen
    assert (GRADIENTS in chosen) == used
    bf16_error = errors[()]
    used_error = errors[chosen]
    assert used_error <= 1.5 * bf16_error + 0.01
    if factor == 128:
        assert errors[GRADIENTS,] > 10 * bf16_error  # otherwise the test is meaningless
    notes = "\n".join(session.notes)
    assert ("not approximate: gradients of frozen layers in int8" in notes) == (not used)
    if used:
        # The run's own measurement agrees.
        assert session.approximations.measured.whole.own == pytest.approx(bf16_error, rel=0.3)
        assert session.approximations.measured.whole.error == pytest.approx(used_error, rel=0.3)


# Gemma rounds the product of embeddings and their scale.
ROUNDED_EMBEDDINGS = ("gemma2", "gemma3")


@pytest.mark.parametrize("family", slow_except("llama", "gemma2", "mixtral", "gpt2", "bloom", names=[*CAUSAL, "bloom"]))
def test_bf16_model_can_be_computed_in_fp32(family):
    """Compares each family's own code, block by block, with the same model with all weights in fp32."""
    gradients = []
    for wide in (True, False):
        model = causal_model(family).bfloat16()
        model = (model if wide else model.float()).requires_grad_(False)
        attach(model, LoRAConfig(rank=4, alpha=8, target_modules="all-linear"))
        trained = [p for _, p in adapter_parameters(randomize_lora_b(model, 0.1))]
        before = {name: (id(p), p.dtype) for name, p in model.named_parameters()}
        tokens = torch.arange(60).view(3, 20) * 7 % 90 + 3
        with widened(model) if wide else contextlib.nullcontext():
            logits = model(input_ids=tokens, use_cache=False).logits
            assert logits.dtype == torch.float32
            logits.log_softmax(-1)[..., 5].sum().backward()
        assert {name: (id(p), p.dtype) for name, p in model.named_parameters()} == before
        assert not any("forward" in vars(module) for module in model.modules())
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    tolerance = 1e-2 if family in ROUNDED_EMBEDDINGS else 1e-4
    assert (gradients[0] - gradients[1]).norm() < tolerance * gradients[1].norm()


def test_fused_blocks_in_fp32_release_their_weights():
    """The memory of an fp32 copy of the model is never needed, although blocks cache their weights."""
    model = tiny_llama(num_hidden_layers=3).bfloat16().requires_grad_(False)
    attach(model, LoRAConfig(rank=4, alpha=8, target_modules="all-linear"))
    tokens = torch.arange(20)[None] + 3
    inputs = {"input_ids": tokens, "position_ids": tokens - 3, "packed_layout": Layout.of_lengths([20])}
    shapes = {p.shape for p in model.model.layers[0].parameters() if p.dim() == 2 and p.dtype == torch.bfloat16}

    def find_fp32_weights() -> dict[int, torch.nn.Parameter]:
        tensors = (t for t in gc.get_objects() if type(t) is torch.nn.Parameter and t.dtype == torch.float32)
        return {id(t): t for t in tensors if t.shape in shapes and not t.requires_grad}

    before = find_fp32_weights()
    with packed_rows(model), widened(model):
        model(**inputs, use_cache=False).logits.sum().backward()
        assert not find_fp32_weights().keys() - before.keys()


def test_trained_weights_of_fused_blocks_are_compared_in_fp32():
    """Full fine-tuning trains the blocks' weights, which are fp32 copies of parameters while a block runs."""
    tokens = torch.arange(20)[None] + 3
    inputs = {"input_ids": tokens, "position_ids": tokens - 3, "packed_layout": Layout.of_lengths([20])}
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny_llama(num_hidden_layers=2).bfloat16().to(dtype)
        with packed_rows(model), widened(model):
            model(**inputs, use_cache=False).logits.log_softmax(-1)[..., 5].sum().backward()
        gradients.append(model.model.layers[0].self_attn.o_proj.weight.grad.float())
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text"])
def test_checkpointed_blocks_of_the_model_code_are_compared_in_fp32(family):
    """The recomputation of a block needs its fp32 weights."""
    gradients = []
    for checkpointing in (False, True):
        model = recurrent_model(family).bfloat16().requires_grad_(False)
        attach(model, LoRAConfig(rank=4, alpha=8, target_modules="all-linear"))
        trained = [p for _, p in adapter_parameters(randomize_lora_b(model, 0.1))]
        if checkpointing:
            checkpoint_blocks(model)
        layout = Layout.of_lengths([20, 9])
        tokens = torch.arange(29)[None] + 3
        inputs = {"position_ids": torch.from_numpy(layout.positions())[None], "packed_layout": layout}
        with packed_rows(model), widened(model):
            logits = model(input_ids=tokens, use_cache=False, **inputs).logits
            logits.log_softmax(-1)[..., 5].sum().backward()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == checkpointing
        gradients.append([p.grad for p in trained])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.slow
@compiled_only
def test_disabled_approximations_use_bf16_products(approximate_run, bf16_run, monkeypatch):
    assert GRADIENTS in approximate_run.approximations["used"]
    exact = fit(bf16_run("off", train={"approximate": "off"}))
    assert exact.approximations["used"] == [] and exact.arithmetic[GRADIENTS] == "no"
    assert weights(exact) != weights(approximate_run)
    with monkeypatch.context() as environment:
        for variable in APPROXIMATION_SWITCHES.values():
            environment.setenv(variable, "0")
        assert weights(fit(bf16_run("off by the environment"))) == weights(exact)
    monkeypatch.setattr(KernelChoice, "approximations", ())  # kernels without approximations
    assert weights(fit(bf16_run("never"))) == weights(exact)


@compiled_only
def test_failing_approximation_is_disabled_during_the_run(bf16_run, monkeypatch):
    monkeypatch.setattr(approximations, "MAX_TIME_SHARE", 1e9)  # compare before each step
    models = []

    def loading(*args, **named):
        loaded = load_model(*args, **named)
        models.append(loaded.model)
        return loaded

    class Changing(RecordingCallback):
        def on_step(self, step):
            if step.step == 1:
                rescale(models[-1], 64)

    monkeypatch.setattr("deltaw.runs.training_run.load_model", loading)
    output = Changing()
    resumed_output = RecordingCallback()
    result = fit(bf16_run("failing"), callback=output)
    assert [line for line in output.lines if line.startswith("approximation disabled from step 2: gradients")]
    assert result.approximations["off_since_step"] == 2 and GRADIENTS not in result.approximations["used"]
    assert result.arithmetic[GRADIENTS] == "no"
    (line_with_change,) = metrics(result.output, "approximations")
    assert line_with_change["step"] == 2 and GRADIENTS not in line_with_change["approximations"]["used"]
    config_line = "approximate: auto  # off: gradients of frozen layers in int8: the gradient"
    assert config_line in (result.output / "run.yaml").read_text()
    # An approximation that was disabled remains disabled after resume.
    resumed = fit({"train": {"max_steps": 3}}, resume=result.output, callback=resumed_output)
    assert resumed.approximations["used"] == [] and resumed.approximations["off_since_step"] == 2
    assert "approximate" not in resumed_output


@compiled_only
def test_repeated_comparison_changes_no_bit(approximate_run, bf16_run, monkeypatch):
    monkeypatch.setattr(approximations, "MAX_TIME_SHARE", 1e9)
    relative_errors = mock.Mock(wraps=GradientCheck.relative_errors)
    monkeypatch.setattr(GradientCheck, "relative_errors", lambda *a: relative_errors(*a))
    result = fit(bf16_run("often"))
    assert relative_errors.call_count == 1  # before the second step
    assert result.approximations["used"] == approximate_run.approximations["used"] != []
    assert weights(result) == weights(approximate_run)


@pytest.mark.slow
@compiled_only
def test_resumed_run_uses_the_same_approximations_unless_disabled(approximate_run, bf16_run, tmp_path, monkeypatch):
    stopped = stopped_run(bf16_run("stopped"), 1)
    folders = map(str, itertools.count())

    def resumed(output=None, **changes):
        """Resume a fresh copy of the stopped run."""
        folder = shutil.copytree(stopped, tmp_path / next(folders))
        return fit(bf16_run("stopped", **changes) | {"output": str(folder)}, callback=output)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(GradientCheck, "choose", None)  # no new comparison
        warnings.simplefilter("error", ArithmeticChangedWarning)
        result = resumed()
        assert result.resumed_from_step == 1
        assert {**result.approximations, "seconds": 0} == {**approximate_run.approximations, "seconds": 0}
        assert weights(result) == weights(approximate_run)
        patch.setenv("DELTAW_KERNELS", loader.variant())  # forced kernels do not change the run's approximations
        assert GRADIENTS in resumed().approximations["used"]
    output = RecordingCallback()
    with pytest.warns(ArithmeticChangedWarning, match=GRADIENTS):
        assert resumed(output, train={"approximate": "off"}).approximations["used"] == []
    assert "'train.approximate' is off" in output
    monkeypatch.setenv(APPROXIMATION_SWITCHES[GRADIENTS], "0")
    with pytest.warns(ArithmeticChangedWarning, match=GRADIENTS):
        assert GRADIENTS not in resumed().approximations["used"]


def test_memory_is_released_before_gradients_and_each_pass_are_compared(bf16_run, monkeypatch):
    """Loading, log-probabilities and fp32 blocks fragment memory, and later tensors do not fit into the holes."""
    calls = []
    trims = []
    monkeypatch.setattr(approximations, "trim_memory", lambda: trims.append(1))

    def recorded(name: str, run):
        return lambda *args: calls.append(name) or run(*args)

    monkeypatch.setattr(sessions, "gradient_check", recorded("rows", sessions.gradient_check))
    monkeypatch.setattr(sessions, "release_free_memory", recorded("release", sessions.release_free_memory))
    monkeypatch.setattr(GradientCheck, "choose", recorded("compare", GradientCheck.choose))
    with preserved_process_state():
        build_session(bf16_run("released"), candidates=APPROXIMATIONS)
    assert calls[-3:] == ["rows", "release", "compare"] and len(trims) >= 3


def test_model_that_cannot_be_compared_trains_exactly(bf16_run, monkeypatch):
    monkeypatch.setattr(approximations, "widened", mock.Mock(side_effect=RuntimeError("no such thing")))
    with preserved_process_state():
        session = build_session(bf16_run("foreign"), candidates=APPROXIMATIONS)
    assert session.approximations.names == () and session.chosen["train.approximate"].value == "off"
    assert [line for line in session.notes if "compared with fp32 (RuntimeError: no such thing)" in line]


@compiled_only
@pytest.mark.parametrize("loss", slow_except("dpo", names=("dpo", "kto", "simpo")))
def test_comparison_of_pairs_uses_their_loss(loss, bf16_run, tmp_path):
    rows = [{"prompt": f"say {n}", "chosen": f"{n} it is", "rejected": f"no {n * 7}, never"} for n in range(20)]
    if loss == "kto":
        labeled = ((row["prompt"], row["chosen" if n % 2 else "rejected"], n) for n, row in enumerate(rows * 2))
        rows = [{"prompt": prompt, "completion": answer, "label": bool(n % 2)} for prompt, answer, n in labeled]
    data = {"train": str(write_rows(tmp_path / "pairs.jsonl", rows))}
    result = fit(bf16_run(f"pairs {loss}", task="preference", preference={"loss": loss}, data=data))
    assert 0 < result.approximations["own"] < result.approximations["error"] < 0.3
    assert result.approximations["tokens"] >= approximations.MIN_TOKENS


@compiled_only
def test_comparison_supports_classification(bf16_run, tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = BertConfig(vocab_size=259, max_position_embeddings=64, initializer_range=0.05, **shape)
    bert = save_model(BertModel(config).bfloat16(), tmp_path / "bert")
    rows = ({"text": f"{n} is {'odd' if n % 2 else 'even'}", "label": n % 2} for n in range(60))
    data = {"train": str(write_rows(tmp_path / "labels.jsonl", rows))}
    lora = {"target_modules": "all-linear"}
    result = fit(bf16_run("labels", model=str(bert), task="sequence-classification", data=data, lora=lora))
    assert 0 < result.approximations["own"] <= result.approximations["error"] < 0.1


def test_error_limits():
    for bf16_error, error, cosine, is_block, within in [
        (0.010, 0.019, 0.9999, False, True),
        (0.010, 0.026, 0.9999, False, False),  # adds more than half of the bf16 error plus 0.01
        (0.010, 0.026, 0.9999, True, True),
        (0.010, 0.019, 0.9980, False, False),  # different direction
        (0.060, 0.089, 0.9970, False, True),  # adds less than half of the bf16 error
        (0.010, math.nan, 0.9999, False, False),
        (0.010, 0.010, math.nan, False, True),  # adds no error
    ]:
        assert Errors(bf16_error, error, cosine).within(1.0, of_block=is_block) == within


def test_off_is_read_as_text_from_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: {train: d}\noutput: o\ntrain: {approximate: off}\n")
    assert RunConfig.read(path).train.approximate == "off"
    assert RunConfig.read(path, {"train": {"approximate": "auto"}}).train.approximate == "auto"


def test_margin_absorbs_noise_and_one_failing_block_suffices():
    # An error within the margin around the limit neither enables an approximation nor disables it.
    near = ApproximationErrors((), Errors(0.01, 0.0245, 1.0))
    assert near.failing(approximations.MARGIN) is not None and near.failing() is None
    good = Errors(0.01, 0.011, 1.0)
    bad = Errors(0.01, 0.05, 1.0)
    assert "model.layers.1" in ApproximationErrors((), good, {"model.layers.0": good, "model.layers.1": bad}).failing()
    assert block_of("model.layers.10.mlp.up_proj.lora_A") == "model.layers.10"
    assert block_of("score.weight") == "score.weight"


@pytest.mark.parametrize(("first_label", "expected"), [(1, 512), (600, 616), (3000, 512)])
def test_check_of_long_rows_truncates_one_after_enough_labels(first_label, expected):
    is_label = np.arange(3000) >= first_label
    row = Example(1, np.zeros(3000, np.int32), is_label, 0, None)
    batcher = mock.Mock(batches=lambda rows: [mock.Mock(tokens=len(r)) for r in rows])
    units = mock.Mock(units=lambda rows: sum(r.label_count for r in rows))
    (truncated,) = select_check_rows([row], batcher, units)
    assert len(truncated) == expected


def test_check_skips_long_rows_and_stops_at_enough_tokens():
    # Each row is represented by its number of tokens and has two labels.
    batcher = mock.Mock(batches=lambda rows: [mock.Mock(tokens=tokens) for tokens in rows])
    units = mock.Mock(units=lambda rows: 2 * len(rows))
    for rows, expected in (
        ([50, 3000, 60, *[40] * 50], [50, 60, *[40] * 6]),
        ([400, 400, 400], [400, 400]),
        ([5000, 3000, 4000], [3000]),
    ):
        assert select_check_rows(rows, batcher, units) == expected
    assert check_interval(128, 1024) == 100 and check_interval(10, 10**6) == 1


@compiled_only
@pytest.mark.parametrize(("spread", "used"), [(0.05, False), (6.0, True)])
def test_summed_classes_need_a_peaked_head(spread, used, bf16_run, tmp_path):
    """With nearly uniform class probabilities, sums over rows dominate a row's gradient."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    model = tiny_llama(vocab_size=8400, initializer_range=0.1, **shape)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=spread / 8)
    save_model(model.bfloat16(), tmp_path / "alike")
    with preserved_process_state():
        session = build_session(bf16_run("alike", model=str(tmp_path / "alike")), candidates=["summed_classes"])
    assert (session.approximations.names == ("summed_classes",)) == used, session.notes


def test_gradient_comparison_reports_progress():
    model = torch.nn.Linear(2, 1)
    progress = []
    batches = [SimpleNamespace(tokens=3, inputs=torch.ones(3, 2)) for _ in range(2)]
    batcher = SimpleNamespace(batches=lambda rows: iter(batches))
    named = dict(model.named_parameters())
    objective = mock.Mock(side_effect=lambda batch: model(batch.inputs).sum())
    check = GradientCheck(model, objective, batcher, named, [1, 2], progress.append)
    for _ in range(3):
        assert dict(check.gradients(())).keys() == named.keys()
    assert progress == pytest.approx([1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 0.99])
