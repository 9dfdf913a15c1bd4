"""Memory plans match the peak that the allocator counts in the same run with real weights.

The models are small, but their tensors are larger than the workspaces of kernels.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import string
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import safetensors
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

from deltaw.errors import UserError
from deltaw.kernels import loader
from deltaw.lora.stored import weight_scales
from deltaw.machine.choices import Choice
from deltaw.machine.memory import release_free_memory, resident_bytes
from deltaw.memory.plan import KINDS, PHASES, Plan
from deltaw.progress import use_listener
from deltaw.runs.fit import fit
from deltaw.runs.load_model import load_model
from deltaw.settings.config import RunConfig
from deltaw.tensor_files import read_header
from deltaw.training.approximations import GradientCheck
from deltaw.training.planning import fake_model
from deltaw.training.planning import plan_run as plan_run_module
from deltaw.training.planning.lasting_bytes import LASTING_BYTES
from deltaw.training.planning.plan_cache import CachedPlan
from deltaw.training.planning.plan_run import plan_methods, plan_run
from deltaw.training.session import assemble, read_data
from deltaw.training.state import rows_of_step
from tests.byte_models import byte_tokenizer, save_model, tiny_llama
from tests.conftest import RATES, deep_merge, refusal, write_rows
from tests.peak_memory import peak_tensor_bytes, storage_bytes
from tests.training.runs import METHODS as OF_METHODS
from tests.training.runs import build_session, fit_with_output, outcome, slow_except

SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
TASKS = {"llama": "causal-lm", "bert": "sequence-classification", "vit": "image-classification"}
# Buffers in which oneDNN repacks blocks of half-precision products. They are not planned and do not grow with the
# model.
HALF_PRODUCTS = 128 * 1024
METHODS = ("lora", "head", "input", "prompt", "bias", "random", "last", "full")
# Each method in one precision, alternating over the families. Some cases use activation checkpointing.
CASES = [
    ("llama", "lora", "fp32", True),
    *(("llama", method, ("bf16", "fp32")[n % 2], False) for n, method in enumerate(METHODS)),
    ("bert", "lora", "bf16", True),
    *(("bert", method, ("fp32", "bf16")[n % 2], False) for n, method in enumerate(METHODS)),
    *(("vit", method, ("bf16", "fp32")[n % 2], method == "full") for n, method in enumerate(METHODS) if n != 3),
]
QUICK = (("llama", "lora"), ("llama", "prompt"), ("llama", "full"), ("bert", "head"), ("vit", "lora"))
SLOW_CASES = [c for c in CASES if not c[3] and c[:2] not in QUICK]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder with a model and a file of rows per family. All rows of a family have the same length."""
    root = tmp_path_factory.mktemp("planned")
    torch.manual_seed(0)
    tiny_llama(**SHAPE, initializer_range=0.05).save_pretrained(root / "llama")
    BertModel(BertConfig(vocab_size=259, max_position_embeddings=128, **SHAPE)).save_pretrained(root / "bert")
    ViTModel(ViTConfig(image_size=16, patch_size=4, num_channels=1, **SHAPE)).save_pretrained(root / "vit")
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=128, **sizes)).save_pretrained(root / "gpt2")
    for family in ("llama", "bert", "gpt2"):
        byte_tokenizer().save_pretrained(root / family)
    marks = [letter * 30 for letter in string.ascii_lowercase]
    write_rows(root / "llama.jsonl", ({"prompt": f"say {m}", "completion": m} for m in marks))
    write_rows(root / "bert.jsonl", ({"text": m, "label": "even" if n % 2 else "odd"} for n, m in enumerate(marks)))
    lines = (",".join([*(str((n * column) % 251) for column in range(256)), str(n % 2)]) for n in range(26))
    (root / "vit.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def config_of(folders) -> Callable[..., RunConfig]:
    def make(family: str, method: str, precision: str = "fp32", **changes: object) -> RunConfig:
        rows = folders / f"{family}.{'csv' if family == 'vit' else 'jsonl'}"
        defaults = {"model": str(folders / family), "task": TASKS[family], "data": {"train": str(rows), "eval": 2}}
        defaults |= {"lora": {"rank": 4}, "precision": precision, "device": "cpu", "threads": 1, **OF_METHODS[method]}
        defaults["train"] = {"batch_size": 8, "max_steps": 2, "keep_features": False}
        return RunConfig.read(deep_merge(defaults, changes))

    return make


def make_plan(config: RunConfig) -> Plan:
    task, data = read_data(config)
    return plan_run(config, task, data)


def run_and_check_plan(config: RunConfig, *, check_peak: bool = True) -> Plan:
    """Execute a run, check that it uses the planned memory, and return its plan."""
    task, data = read_data(config)
    plan = plan_run(config, task, data)
    loaded = load_model(config, task, data)
    total = sum(p.numel() for p in loaded.model.parameters())
    trained = []

    def run() -> None:
        options = {"candidates": () if loaded.kernels is None else loaded.kernels.approximations}
        session = assemble(config, task, data, loaded.model, device="cpu", new_modules=loaded.new_modules, **options)
        trained.append(sum(p.numel() for _, p in session.method.parameters(loaded.model)))
        with session.running():
            session.train()
            session.evaluate()
        session.close()

    peak = peak_tensor_bytes(run, alive=[*loaded.model.parameters(), *loaded.model.buffers()])
    assert (plan.total_parameters, plan.trained_parameters) == (total, *trained)
    if check_peak:
        unplanned = HALF_PRODUCTS if config.precision == "bf16" else 0
        assert plan.peak_bytes == pytest.approx(peak, abs=0.03 * peak + unplanned)
    return plan


@pytest.mark.parametrize(
    ("family", "method", "precision", "checkpointing"),
    [pytest.param(*case, marks=pytest.mark.slow if case in SLOW_CASES else []) for case in CASES],
)
def test_plan_matches_peak_of_run(family, method, precision, checkpointing, config_of):
    plan = run_and_check_plan(config_of(family, method, precision, train={"checkpointing": checkpointing}))
    assert (plan.method, plan.precision) == (method, precision)
    assert plan.parts.keys() == set(KINDS) and plan.phase in PHASES and sum(plan.parts.values()) == plan.peak_bytes
    assert sum(plan.resident.values()) == plan.peak_resident_bytes > plan.peak_bytes
    assert all(size >= 0 for size in (*plan.parts.values(), *plan.resident.values()))


@pytest.mark.parametrize("precision", slow_except("bf16", names=("fp32", "bf16")))
def test_plan_includes_memory_of_torch_products(precision, config_of, monkeypatch):
    rates = {stored: {**values, "torch": 1e4} for stored, values in RATES.items()}
    monkeypatch.setenv("DELTAW_MEASURED", json.dumps({"*": rates}))
    with loader.temporary_arithmetic():
        assert run_and_check_plan(config_of("llama", "lora", precision)).arithmetic[precision] == "torch"


OTHER_TASKS = [("llama", "sequence-classification", "prompt"), ("bert", "regression", "lora")]


@pytest.mark.parametrize(("family", "task", "method"), slow_except(OTHER_TASKS[0], names=OTHER_TASKS))
def test_plan_matches_peak_of_other_tasks(family, task, method, config_of, tmp_path):
    rows = ({"text": f"{n:02}" * 15, "label": n % 2} for n in range(26))
    file = write_rows(tmp_path / "rows.jsonl", rows)
    run_and_check_plan(config_of(family, method, task=task, data={"train": str(file)}))


@pytest.mark.parametrize(("family", "layers"), slow_except(("gpt2", 8), names=[("llama", 14), ("gpt2", 8)]))
def test_plan_includes_int8_weights(family, layers, config_of, folders):
    changes = {"model": str(folders / family), "data": {"train": str(folders / "llama.jsonl")}}
    config = config_of("llama", "lora", "int8", **changes)
    plan = make_plan(config)
    session = build_session(config)
    frozen = [p for p in session.model.parameters() if not p.requires_grad]
    session.close()
    assert sum(weight_scales(module) is not None for module in session.model.modules()) == layers
    # A dry run has no calibration inputs and therefore no SmoothQuant scales.
    weight_bytes = storage_bytes([*frozen, *session.model.buffers()])
    assert plan.parts["weights"] == pytest.approx(weight_bytes, rel=0.015)
    assert plan.parts["weights"] < 0.75 * 2 * plan.total_parameters  # in bf16 each takes two bytes


@pytest.mark.parametrize("epochs", slow_except(2, names=(1, 2)))
def test_plan_includes_separate_prompt_pass_of_activated_adapter(epochs, config_of, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    rows = ({"prompt": f"{n:02}" * 25, "completion": f"{n:03}" * 3} for n in range(26))
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    lora = {"active": "completion"}
    train = {"max_steps": 3 * epochs, "keep_features": epochs > 1}
    plan = run_and_check_plan(config_of("llama", "lora", lora=lora, data=data, train=train))
    stored = [file.stat().st_size for file in (tmp_path / "cache").rglob("values.bin")]
    assert stored == ([plan.disk_bytes] if epochs > 1 else []) and (plan.disk_bytes > 0) == (epochs > 1)


def test_plan_with_feature_cache_writes_no_files(config_of, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    config = config_of("vit", "last", train={"keep_features": True, "max_steps": 6})
    plan = make_plan(config)
    assert not (tmp_path / "cache" / "features").exists()
    usual = make_plan(config_of("vit", "last", train={"max_steps": 6}))
    assert plan.operations < usual.operations and plan.trained_parameters == usual.trained_parameters
    run_and_check_plan(config)
    assert any((tmp_path / "cache" / "features").iterdir())


@pytest.mark.parametrize("family", slow_except("llama", names=("llama", "vit")))
def test_plan_includes_evaluation_larger_than_step(family, config_of):
    plan = run_and_check_plan(config_of(family, "head", data={"eval": 18}, train={"batch_size": 1}))
    assert (plan.phase, plan.rows) == ("forward", 1)


def test_lora_parameter_count_is_rank_times_both_dimensions(config_of):
    layers = [m for m in tiny_llama(**SHAPE).model.layers.modules() if isinstance(m, nn.Linear)]
    sides = sum(m.in_features + m.out_features for m in layers)
    plans = {rank: make_plan(config_of("llama", "lora", lora={"rank": rank})) for rank in (4, 16)}
    for rank, plan in plans.items():
        assert plan.trained_parameters == rank * sides
        assert plan.parts["optimizer"] == pytest.approx(2 * 4 * plan.trained_parameters, rel=0.01)
    # With a model this small, the process peaks during loading, which does not depend on the rank.
    small, large = ((p.peak_bytes, p.phases["training"] - p.resident["process"]) for p in plans.values())
    assert large[0] > small[0] and large[1] > small[1]


def test_memory_depends_on_pass_size_and_stored_activations(config_of):
    plain, head = (make_plan(config_of("llama", method)) for method in ("lora", "head"))
    recomputed = make_plan(config_of("llama", "lora", train={"checkpointing": True}))
    assert recomputed.parts["activations"] < 0.6 * plain.parts["activations"]
    assert recomputed.peak_bytes < plain.peak_bytes and recomputed.operations > plain.operations
    shorter = make_plan(config_of("llama", "lora", train={"tokens_per_pass": 128}))
    assert shorter.tokens < plain.tokens and shorter.peak_bytes < plain.peak_bytes
    assert head.rows == 8 and head.parts["activations"] < 0.1 * plain.parts["activations"]
    assert head.parts["weights"] + head.parts["trained"] < plain.parts["weights"] + plain.parts["trained"]


def test_plan_uses_largest_pass_of_all_steps(config_of, tmp_path):
    lengths = [3] * 20 + [100] + [3] * 19
    rows = ({"prompt": f"{n:03}", "completion": "z" * length} for n, length in enumerate(lengths))
    file = write_rows(tmp_path / "rows.jsonl", rows)
    train = {"batch_size": 2, "max_steps": None, "epochs": 1}
    config = config_of("llama", "bias", data={"train": str(file), "eval": None}, train=train)
    plan = make_plan(config)
    session = build_session(config)
    steps = [rows_of_step(session.data.train, n, 2, config.train.seed) for n in range(session.total_steps)]
    assert len(steps) == 20
    passes = [batch.inputs["input_ids"].numel() for step in steps for batch in session.batcher.batches(step)]
    assert plan.tokens == max(passes) > 100


def test_shorter_pass_with_more_labels_sets_peak(config_of, tmp_path):
    model_folder = save_model(tiny_llama(**SHAPE, vocab_size=6000), tmp_path / "wordy")
    long = [{"prompt": "p" * 90 + f"{n:03}", "completion": "z"} for n in range(3)]
    answers = [{"prompt": f"{n:03}", "completion": "z" * 60} for n in range(3)]
    file = write_rows(tmp_path / "rows.jsonl", [*long, *answers])
    train = {"batch_size": 1, "max_steps": None, "epochs": 1, "checkpointing": True}
    data = {"train": str(file), "eval": None}
    run_and_check_plan(config_of("llama", "lora", data=data, train=train, model=str(model_folder)))


def test_planned_head_has_one_output_per_class(config_of, tmp_path):
    rows = ({"text": f"{n:02}" * 15, "label": f"class {n % 7}"} for n in range(26))
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    two_classes, seven_classes = (make_plan(config_of("bert", "head", "bf16", **c)) for c in ({}, {"data": data}))
    assert seven_classes.total_parameters - two_classes.total_parameters == 5 * (SHAPE["hidden_size"] + 1)


@contextlib.contextmanager
def open_header(path: str | Path, **_: object):
    """Replacement for ``safetensors.safe_open`` that provides names but no values."""
    yield SimpleNamespace(keys=lambda: list(read_header(Path(path))))


@pytest.mark.parametrize("case", [("llama", "lora", "fp32"), ("bert", "head", "bf16")])
def test_plan_reads_no_weights(case, config_of, folders, tmp_path, monkeypatch):
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("safe_open") is safetensors.safe_open and module is not safetensors:
            monkeypatch.setattr(module, "safe_open", open_header)
    monkeypatch.setattr(safetensors, "safe_open", open_header)
    shutil.copytree(folders / case[0], tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    without = make_plan(config_of(*case, model=str(tmp_path / "model")))
    full = make_plan(config_of(*case))
    assert (without.peak_bytes, without.trained_parameters) == (full.peak_bytes, full.trained_parameters)


def test_plan_includes_pooler_missing_from_files(config_of, tmp_path):
    save_model(BertModel(BertConfig(vocab_size=259, **SHAPE), add_pooling_layer=False), tmp_path / "bert")
    plan = run_and_check_plan(config_of("bert", "head", model=str(tmp_path / "bert")), check_peak=False)
    width = SHAPE["hidden_size"]
    assert plan.trained_parameters == width * (width + 1) + 2 * (width + 1)


def test_unsupported_method_is_reported_or_raises_for_configured_method(config_of):
    config = config_of("vit", "head")
    task, data = read_data(config)
    errors = {}
    assert list(plan_methods(config, task, data, ["prompt", "head"], on_error=errors.setdefault)) == ["head"]
    assert list(errors) == ["prompt"] and "does not read tokens" in errors["prompt"].message
    with pytest.raises(UserError, match="does not read tokens"):
        plan_methods(config_of("vit", "prompt"), task, data, ["prompt", "head"], on_error=errors.setdefault)


def test_dry_run_does_not_report_evaluation_progress(config_of):
    listener = mock.Mock()
    config = config_of("llama", "lora", train={"drift": True})
    with use_listener(listener):
        make_plan(config)
    descriptions = [call.args[0] for call in listener.started.call_args_list]
    assert descriptions == ["reading the rows", "planning the memory of method lora"]


@pytest.mark.planned
def test_run_reports_plan_and_is_identical_without_plan(settings, tmp_path, monkeypatch):
    result, output = fit_with_output(settings(tmp_path / "with"))
    assert "planned memory: " in output and "mainly: " in output
    summary = json.loads(json.dumps(result.as_dict()))
    assert summary["planned_memory_bytes"] == result.plan.peak_resident_bytes > result.plan.peak_bytes
    assert summary["trained_parameters"] == result.plan.trained_parameters

    monkeypatch.setattr(
        "deltaw.runs.memory_check.plan_run", mock.Mock(side_effect=RuntimeError("a kernel without a shape"))
    )
    result, output = fit_with_output(settings(tmp_path / "without"))
    assert "no memory plan" in output and "a kernel without a shape" in output and "planned memory" not in output
    assert result.plan is None and result.as_dict()["planned_memory_bytes"] is None
    assert outcome(tmp_path / "with") == outcome(tmp_path / "without")


def test_run_exceeding_memory_is_rejected_unless_forced(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("deltaw.runs.memory_check.memory_limit_bytes", lambda: Choice(1000, "a small machine"))
    error = refusal(fit, settings(tmp_path / "run"), match="only 1,000")
    assert "force" in error.hint and "--fit-memory" in error.hint and not list(tmp_path.iterdir())
    result, output = fit_with_output(settings(tmp_path / "run", force=True))
    assert "of 1 kB" in output and outcome(result.output)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_weights_larger_than_memory_are_rejected_without_simulation(family, config_of, monkeypatch):
    config = config_of(family, "lora" if family == "llama" else "head", precision="fp32")
    limit = int(0.7 * make_plan(config).parts["weights"])
    monkeypatch.setattr(fake_model, "memory_limit_bytes", lambda: Choice(limit, "a small machine"))
    other = config.with_train(seed=12345)  # its plan is not cached
    with monkeypatch.context() as patched:
        patched.setattr(plan_run_module, "simulate", None)
        with pytest.raises(UserError, match=r"0.0 billion parameters need 0.0 GB in fp32, and this machine") as caught:
            make_plan(other)
    assert "precision: nf4" in caught.value.hint
    assert make_plan(other.model_copy(update={"force": True})).peak_bytes > limit


@pytest.mark.planned
def test_invalid_settings_are_rejected_by_plan(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("deltaw.runs.load_model.load", mock.Mock(side_effect=AssertionError("the model was loaded")))
    refusal(fit, settings(tmp_path / "run", lora={"target_modules": ["nosuch"]}), match="nosuch")
    assert not list(tmp_path.iterdir())


def test_rare_long_rows_are_reported_with_their_memory(config_of, tmp_path):
    model = str(save_model(tiny_llama(**SHAPE, max_position_embeddings=20_000), tmp_path / "model"))

    def plan_with(words, **limits):
        rows = [{"prompt": f"say {n}", "completion": "word " * 20} for n in range(59)]
        data = write_rows(tmp_path / f"{words}.jsonl", [*rows, {"prompt": "x", "completion": "word " * words}])
        data = {"train": str(data), "eval": None, "max_length": 20_000, **limits}
        train = {"batch_size": 60, "tokens_per_pass": 512}
        config = config_of("llama", "lora", model=model, data=data, train=train)
        task, data = read_data(config)
        return plan_run(config, task, replace(data, read_peak_bytes=0), process_bytes=60 << 20)

    plan = plan_with(800)
    without = plan_with(800, max_length=512, long_rows="drop")
    saves = plan.long_rows["saves"]
    assert plan.long_rows == {"max_length": 512, "rows": 1, "of": 60, "saves": saves}
    assert plan.peak_bytes - without.peak_bytes == pytest.approx(saves, rel=0.25)
    assert without.long_rows == {} and plan_with(150).long_rows == {}  # too small compared with the process


def test_plan_includes_text_generation(config_of):
    """Generation needs keys, values and logits in addition to the training state."""
    without = make_plan(config_of("llama", "lora", train={"samples": 0, "eval_answers": 0, "drift": False}))
    with_eval = make_plan(config_of("llama", "lora", train={"samples": 0, "eval_answers": 2, "drift": False}))
    assert "rollouts" not in without.phases and without.phases["saving"] < with_eval.phases["rollouts"]


def test_plan_includes_gradient_comparison(config_of, monkeypatch):
    """The comparison runs at least 128 tokens in fp32, which exceeds a step with one short row."""
    candidates = SimpleNamespace(approximations=("int8_gradients",))
    monkeypatch.setattr("deltaw.training.planning.fake_model.activate_kernels", lambda *_: candidates)
    one_row = {"batch_size": 1, "keep_features": False}
    without = make_plan(config_of("llama", "lora", "bf16", data={"eval": 0}, train={**one_row, "approximate": "off"}))
    compared = make_plan(config_of("llama", "lora", "bf16", data={"eval": 0}, train={**one_row, "approximate": "auto"}))
    assert compared.peak_bytes > 1.2 * without.peak_bytes


def test_plan_excludes_garbage_of_reading(config_of):
    config = config_of("llama", "lora")
    task, data = read_data(config)
    cycle: list[object] = [bytearray(10_000) for _ in range(10_000)]
    cycle.append(cycle)  # only the garbage collector can free it
    del cycle
    plan = plan_run(config, task, data)
    release_free_memory()
    assert plan.resident["process"] - LASTING_BYTES < resident_bytes() + 30e6


@pytest.mark.parametrize("method", slow_except("lora", "full", names=METHODS))
def test_plan_compares_all_gradients_of_method(method, config_of, monkeypatch):
    """A plan ignores errors of a model's code in fp32, but deltaw's code must not raise any."""
    candidates = SimpleNamespace(approximations=("int8_gradients",))
    choices = []
    monkeypatch.setattr("deltaw.training.planning.fake_model.activate_kernels", lambda *_: candidates)
    choose = GradientCheck.choose
    monkeypatch.setattr(GradientCheck, "choose", lambda *args: choices.append(choose(*args)) or choices[-1])
    monkeypatch.setattr(CachedPlan, "of", lambda *args, **options: None)
    make_plan(config_of("llama", method, "bf16"))
    assert [choice.names for choice in choices] == [("int8_gradients",)]
