"""A plan against the truth: the same run, run with weights, its allocations counted by the allocator.

The models are small, but large enough that tensors outweigh what a kernel takes for itself.
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
from deltaw.memory.measure import peak_tensor_bytes, storage_bytes
from deltaw.memory.plan import KINDS, PHASES, Plan
from deltaw.runs.fit import fit, load_for, read_data
from deltaw.settings import RunConfig
from deltaw.tensor_files import read_header
from deltaw.training.approximations import GradientCheck
from deltaw.training.planning.plan_run import LASTING, plan_each, plan_run
from deltaw.training.planning.remembered import Remembered
from deltaw.training.session import assemble
from deltaw.training.state import rows_of_step
from deltaw.working import listening
from tests.byte_models import byte_tokenizer, saved, tiny_llama
from tests.conftest import RATES, laid_over, write_rows
from tests.training.runs import METHODS as OF_METHODS
from tests.training.runs import fit_aloud, outcome, session_of

SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
TASKS = {"llama": "causal-lm", "bert": "sequence-classification", "vit": "image-classification"}
# Blocks that oneDNN lays out anew for products in half precision: a plan leaves them out, and they do not
# grow with the model.
HALF_PRODUCTS = 128 * 1024
METHODS = ("lora", "head", "input", "prompt", "bias", "random", "last", "full")
# Each method in one precision, which alternates over the families; recomputed blocks for some.
CASES = [
    ("llama", "lora", "fp32", True),
    *(("llama", method, ("bf16", "fp32")[n % 2], False) for n, method in enumerate(METHODS)),
    ("bert", "lora", "bf16", True),
    *(("bert", method, ("fp32", "bf16")[n % 2], False) for n, method in enumerate(METHODS)),
    *(("vit", method, ("bf16", "fp32")[n % 2], method == "full") for n, method in enumerate(METHODS) if n != 3),
]
SELDOM = [
    case for case in CASES if case[0] != "llama" and not case[3] and case[:2] not in (("bert", "head"), ("vit", "lora"))
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each family, and one file of rows for each: all rows of one family are alike in length."""
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
    lines = (",".join([*(str((n * place) % 251) for place in range(256)), str(n % 2)]) for n in range(26))
    (root / "vit.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def config_of(folders) -> Callable[..., RunConfig]:
    def make(family: str, method: str, precision: str = "fp32", **changes: object) -> RunConfig:
        plain = {
            "model": str(folders / family),
            "task": TASKS[family],
            "data": {"train": str(folders / f"{family}.{'csv' if family == 'vit' else 'jsonl'}"), "eval": 2},
            "lora": {"rank": 4},
            **OF_METHODS[method],
            "train": {"batch_size": 8, "max_steps": 2, "keep_features": False},
            "precision": precision,
            "device": "cpu",
            "threads": 1,
        }
        return RunConfig.read(laid_over(plain, changes))

    return make


def planned(config: RunConfig) -> Plan:
    task, data = read_data(config)
    return plan_run(config, task, data)


def as_it_runs(config: RunConfig, *, peak_too: bool = True) -> Plan:
    """The plan of a run that is carried out, and takes what was planned."""
    task, data = read_data(config)
    plan = plan_run(config, task, data)
    loaded = load_for(config, task, data)
    total = sum(p.numel() for p in loaded.model.parameters())
    trained = []

    def run() -> None:
        offered = () if loaded.kernels is None else loaded.kernels.approximations
        session = assemble(
            config, task, data, loaded.model, device="cpu", new_modules=loaded.new_modules, offered=offered
        )
        trained.append(sum(p.numel() for _, p in session.method.parameters(loaded.model)))
        with session.running():
            session.train()
            session.evaluate()
        session.close()

    peak = peak_tensor_bytes(run, alive=[*loaded.model.parameters(), *loaded.model.buffers()])
    assert (plan.total_parameters, plan.trained_parameters) == (total, *trained)
    if peak_too:
        tolerance = HALF_PRODUCTS if config.precision == "bf16" else None
        assert plan.peak_bytes == pytest.approx(peak, rel=0.03, abs=tolerance)
    return plan


@pytest.mark.parametrize(
    ("family", "method", "precision", "checkpointing"),
    [pytest.param(*case, marks=pytest.mark.slow if case in SELDOM else []) for case in CASES],
)
def test_a_plan_is_what_the_run_takes(family, method, precision, checkpointing, config_of):
    plan = as_it_runs(config_of(family, method, precision, train={"checkpointing": checkpointing}))
    assert (plan.method, plan.precision) == (method, precision)
    assert plan.parts.keys() == set(KINDS) and plan.phase in PHASES
    assert sum(plan.parts.values()) == plan.peak_bytes
    assert sum(plan.resident.values()) == plan.peak_resident_bytes > plan.peak_bytes
    assert all(size >= 0 for size in (*plan.parts.values(), *plan.resident.values()))


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_plan_knows_what_products_take_that_torch_computes(precision, config_of, monkeypatch):
    rates = {stored: {**of, "torch": 1e4} for stored, of in RATES.items()}
    monkeypatch.setenv("DELTAW_MEASURED", json.dumps({"*": rates}))
    with loader.computing():
        assert as_it_runs(config_of("llama", "lora", precision)).arithmetic[precision] == "torch"


@pytest.mark.parametrize(
    ("family", "task", "method"),
    [
        ("llama", "sequence-classification", "prompt"),
        pytest.param("bert", "regression", "lora", marks=pytest.mark.slow),
    ],
)
def test_other_tasks_are_planned_alike(family, task, method, config_of, tmp_path):
    rows = ({"text": f"{n:02}" * 15, "label": n % 2} for n in range(26))
    file = write_rows(tmp_path / "rows.jsonl", rows)
    as_it_runs(config_of(family, method, task=task, data={"train": str(file)}))


@pytest.mark.parametrize(("family", "layers"), [("llama", 14), ("gpt2", 8)])
def test_int8_weights_are_planned(family, layers, config_of, folders):
    changes = {"model": str(folders / family), "data": {"train": str(folders / "llama.jsonl")}}
    config = config_of("llama", "lora", "int8", **changes)
    plan, session = planned(config), session_of(config)
    frozen = [p for p in session.model.parameters() if not p.requires_grad]
    session.close()
    assert sum(weight_scales(module) is not None for module in session.model.modules()) == layers
    # A dry run has no inputs to calibrate on, and so no SmoothQuant scales.
    taken = storage_bytes([*frozen, *session.model.buffers()])
    assert plan.parts["weights"] == pytest.approx(taken, rel=0.015)
    assert plan.parts["weights"] < 0.75 * 2 * plan.total_parameters  # in bf16 each takes two bytes


@pytest.mark.parametrize("epochs", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_activated_adapter_is_planned_with_prompts_run_apart(epochs, config_of, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    rows = ({"prompt": f"{n:02}" * 25, "completion": f"{n:03}" * 3} for n in range(26))
    data, lora = {"train": str(write_rows(tmp_path / "rows.jsonl", rows))}, {"activation": "completion"}
    train = {"max_steps": 3 * epochs, "keep_features": epochs > 1}
    plan = as_it_runs(config_of("llama", "lora", lora=lora, data=data, train=train))
    stored = [file.stat().st_size for file in (tmp_path / "cache").rglob("values.bin")]
    assert stored == ([plan.disk_bytes] if epochs > 1 else []) and (plan.disk_bytes > 0) == (epochs > 1)


def test_kept_features_are_planned_and_leave_nothing_on_the_disk(config_of, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    config = config_of("vit", "last", train={"keep_features": True, "max_steps": 6})
    plan = planned(config)
    assert not (tmp_path / "cache" / "features").exists()
    usual = planned(config_of("vit", "last", train={"max_steps": 6}))
    assert plan.operations < usual.operations and plan.trained_parameters == usual.trained_parameters
    as_it_runs(config)
    assert any((tmp_path / "cache" / "features").iterdir())


@pytest.mark.parametrize("family", ["llama", pytest.param("vit", marks=pytest.mark.slow)])
def test_an_evaluation_whose_passes_are_larger_than_a_steps_is_planned(family, config_of):
    plan = as_it_runs(config_of(family, "head", data={"eval": 18}, train={"batch_size": 1}))
    assert (plan.phase, plan.rows) == ("forward", 1)


def test_lora_trains_the_ranks_times_both_sides_of_every_target(config_of):
    layers = [m for m in tiny_llama(**SHAPE).model.layers.modules() if isinstance(m, nn.Linear)]
    sides = sum(m.in_features + m.out_features for m in layers)
    plans = {rank: planned(config_of("llama", "lora", lora={"rank": rank})) for rank in (4, 16)}
    for rank, plan in plans.items():
        assert plan.trained_parameters == rank * sides
        assert plan.parts["optimizer"] == pytest.approx(2 * 4 * plan.trained_parameters, rel=0.01)
    # Loading is the peak of the process with a model this small, and does not depend on the rank.
    small, large = ((p.peak_bytes, p.phases["training"] - p.resident["process"]) for p in plans.values())
    assert large[0] > small[0] and large[1] > small[1]


def test_memory_follows_passes_and_what_is_kept_of_them(config_of):
    plain, head = (planned(config_of("llama", method)) for method in ("lora", "head"))
    recomputed = planned(config_of("llama", "lora", train={"checkpointing": True}))
    assert recomputed.parts["activations"] < 0.6 * plain.parts["activations"]
    assert recomputed.peak_bytes < plain.peak_bytes and recomputed.operations > plain.operations
    shorter = planned(config_of("llama", "lora", train={"tokens_per_pass": 128}))
    assert shorter.tokens < plain.tokens and shorter.peak_bytes < plain.peak_bytes
    assert head.rows == 8 and head.parts["activations"] < 0.1 * plain.parts["activations"]
    assert head.parts["weights"] + head.parts["trained"] < plain.parts["weights"] + plain.parts["trained"]


def test_the_largest_pass_of_all_steps_is_planned(config_of, tmp_path):
    lengths = [3] * 20 + [100] + [3] * 19
    rows = ({"prompt": f"{n:03}", "completion": "z" * length} for n, length in enumerate(lengths))
    file = write_rows(tmp_path / "rows.jsonl", rows)
    train = {"batch_size": 2, "max_steps": None, "epochs": 1}
    config = config_of("llama", "bias", data={"train": str(file), "eval": None}, train=train)
    plan, session = planned(config), session_of(config)
    steps = [rows_of_step(session.data.train, n, 2, config.train.seed) for n in range(session.total_steps)]
    assert len(steps) == 20
    passes = [batch.inputs["input_ids"].numel() for step in steps for batch in session.batcher.batches(step)]
    assert plan.tokens == max(passes) > 100


def test_a_shorter_pass_with_many_labels_may_be_the_peak(config_of, tmp_path):
    wordy = saved(tiny_llama(**SHAPE, vocab_size=6000), tmp_path / "wordy")
    long = [{"prompt": "p" * 90 + f"{n:03}", "completion": "z"} for n in range(3)]
    answers = [{"prompt": f"{n:03}", "completion": "z" * 60} for n in range(3)]
    file = write_rows(tmp_path / "rows.jsonl", [*long, *answers])
    train = {"batch_size": 1, "max_steps": None, "epochs": 1, "checkpointing": True}
    data = {"train": str(file), "eval": None}
    as_it_runs(config_of("llama", "lora", data=data, train=train, model=str(wordy)))


def test_the_classes_of_the_data_are_outputs_of_the_planned_head(config_of, tmp_path):
    rows = ({"text": f"{n:02}" * 15, "label": f"class {n % 7}"} for n in range(26))
    seven = {"train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    two, more = (planned(config_of("bert", "head", "bf16", **changes)) for changes in ({}, {"data": seven}))
    assert more.total_parameters - two.total_parameters == 5 * (SHAPE["hidden_size"] + 1)


@contextlib.contextmanager
def header_alone(path: str | Path, **_: object):
    """Stands for ``safetensors.safe_open``; it knows names, and no values."""
    yield SimpleNamespace(keys=lambda: list(read_header(Path(path))))


@pytest.mark.parametrize("how", [("llama", "lora", "fp32"), ("bert", "head", "bf16")])
def test_no_weight_is_read(how, config_of, folders, tmp_path, monkeypatch):
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("safe_open") is safetensors.safe_open and module is not safetensors:
            monkeypatch.setattr(module, "safe_open", header_alone)
    monkeypatch.setattr(safetensors, "safe_open", header_alone)
    shutil.copytree(folders / how[0], tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    without, whole = planned(config_of(*how, model=str(tmp_path / "model"))), planned(config_of(*how))
    assert (without.peak_bytes, without.trained_parameters) == (whole.peak_bytes, whole.trained_parameters)


def test_a_pooler_that_the_files_do_not_hold_is_trained_and_planned(config_of, tmp_path):
    saved(BertModel(BertConfig(vocab_size=259, **SHAPE), add_pooling_layer=False), tmp_path / "bert")
    plan = as_it_runs(config_of("bert", "head", model=str(tmp_path / "bert")), peak_too=False)
    width = SHAPE["hidden_size"]
    assert plan.trained_parameters == width * (width + 1) + 2 * (width + 1)


def test_methods_that_do_not_fit_are_told_of_unless_it_is_the_runs_own(config_of):
    config = config_of("vit", "head")
    task, data = read_data(config)
    refused = {}
    assert list(plan_each(config, task, data, ["prompt", "head"], refused=refused.setdefault)) == ["head"]
    assert list(refused) == ["prompt"] and "does not read tokens" in refused["prompt"].what
    with pytest.raises(UserError, match="does not read tokens"):
        plan_each(config_of("vit", "prompt"), task, data, ["prompt", "head"], refused=refused.setdefault)


def test_the_dry_run_does_not_tell_of_evaluations_and_drift(config_of):
    told = mock.Mock()
    config = config_of("llama", "lora", train={"drift": True})
    with listening(told):
        planned(config)
    works = [call.args[0] for call in told.began.call_args_list]
    assert works == ["reading the rows", "planning the memory of method lora"]


@pytest.mark.planned
def test_a_run_says_its_plan_and_is_the_same_without_one(settings, tmp_path, monkeypatch):
    result, said = fit_aloud(settings(tmp_path / "with"))
    assert "planned memory: " in said and "most of it: " in said
    told = json.loads(json.dumps(result.as_dict()))
    assert told["planned_memory_bytes"] == result.plan.peak_resident_bytes > result.plan.peak_bytes
    assert told["trained_parameters"] == result.plan.trained_parameters

    monkeypatch.setattr("deltaw.runs.fit.plan_run", mock.Mock(side_effect=RuntimeError("a kernel without a shape")))
    result, said = fit_aloud(settings(tmp_path / "without"))
    assert "no memory plan" in said and "a kernel without a shape" in said and "planned memory" not in said
    assert result.plan is None and result.as_dict()["planned_memory_bytes"] is None
    assert outcome(tmp_path / "with") == outcome(tmp_path / "without")


def test_a_run_that_the_memory_does_not_suffice_for_is_refused_unless_forced(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("deltaw.runs.fit.memory_limit_bytes", lambda: Choice(1000, "a small machine"))
    with pytest.raises(UserError, match="the machine gives 1,000") as refused:
        fit(settings(tmp_path / "run"))
    assert "force" in refused.value.hint and "--budget" in refused.value.hint
    assert not list(tmp_path.iterdir())
    result, said = fit_aloud(settings(tmp_path / "run", force=True))
    assert "of 1 kB" in said and outcome(result.output)


@pytest.mark.planned
def test_what_the_user_got_wrong_is_refused_by_the_plan_already(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("deltaw.runs.fit.load", mock.Mock(side_effect=AssertionError("the model was loaded")))
    with pytest.raises(UserError, match="nosuch"):
        fit(settings(tmp_path / "run", lora={"target_modules": ["nosuch"]}))
    assert not list(tmp_path.iterdir())


def test_few_long_rows_that_set_the_peak_are_told_of_with_what_they_cost(config_of, tmp_path):
    model = str(saved(tiny_llama(**SHAPE, max_position_embeddings=20_000), tmp_path / "model"))

    def plan_with(words, **limits):
        rows = [{"prompt": f"say {n}", "completion": "word " * 20} for n in range(59)]
        data = write_rows(tmp_path / f"{words}.jsonl", [*rows, {"prompt": "x", "completion": "word " * words}])
        data = {"train": str(data), "eval": None, "max_length": 20_000, **limits}
        train = {"batch_size": 60, "tokens_per_pass": 512}
        config = config_of("llama", "lora", model=model, data=data, train=train)
        task, data = read_data(config)
        return plan_run(config, task, replace(data, read_peak_bytes=0), process_bytes=450 << 20)  # as a new process

    plan, without = plan_with(3200), plan_with(3200, max_length=512, long_rows="drop")
    saves = plan.long_rows["saves"]
    assert plan.long_rows == {"max_length": 512, "rows": 1, "of": 60, "saves": saves}
    assert plan.peak_bytes - without.peak_bytes == pytest.approx(saves, rel=0.25)
    assert without.long_rows == {} and plan_with(150).long_rows == {}  # worth nothing beside the libraries


def test_texts_that_a_language_run_generates_are_planned(config_of):
    """Sample answers, scored answers and general answers need keys, values and logits beside the trained state."""
    none = planned(config_of("llama", "lora", train={"samples": 0, "eval_answers": 0, "drift": False}))
    few = planned(config_of("llama", "lora", train={"samples": 0, "eval_answers": 2, "drift": False}))
    general = planned(config_of("llama", "lora", train={"samples": 0, "eval_answers": 2, "drift": True}))
    assert "rollouts" not in none.phases
    assert none.phases["saving"] < few.phases["rollouts"] < general.phases["rollouts"]


def test_a_task_without_text_plans_no_generation(config_of):
    assert "rollouts" not in planned(config_of("bert", "lora")).phases


def test_the_comparison_of_gradients_is_planned(config_of, monkeypatch):
    """It runs 128 tokens or more in fp32, which is above a step with one short row."""
    offered = SimpleNamespace(approximations=("int8_gradients",))
    monkeypatch.setattr("deltaw.training.planning.plan_run.settle_kernels", lambda *_: offered)
    one_row = {"batch_size": 1, "keep_features": False}
    without = planned(config_of("llama", "lora", "bf16", data={"eval": 0}, train={**one_row, "approximate": "off"}))
    compared = planned(config_of("llama", "lora", "bf16", data={"eval": 0}, train={**one_row, "approximate": "auto"}))
    assert compared.peak_bytes > 1.2 * without.peak_bytes


def test_garbage_of_reading_is_not_part_of_the_planned_process(config_of):
    config = config_of("llama", "lora")
    task, data = read_data(config)
    cycle: list[object] = [bytearray(10_000) for _ in range(10_000)]
    cycle.append(cycle)  # freed by the garbage collector alone
    del cycle
    plan = plan_run(config, task, data)
    release_free_memory()
    assert plan.resident["process"] - LASTING < resident_bytes() + 30e6


@pytest.mark.parametrize("method", ["lora", "full", "input", "last", "bias", "prompt", "head"])
def test_the_plan_compares_all_gradients_of_a_method(method, config_of, monkeypatch):
    """A plan ignores an error of a model's own code in fp32, but there is none in deltaw's code."""
    offered, chosen = SimpleNamespace(approximations=("int8_gradients",)), []
    monkeypatch.setattr("deltaw.training.planning.plan_run.settle_kernels", lambda *_: offered)
    choose = GradientCheck.choose
    monkeypatch.setattr(GradientCheck, "choose", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    monkeypatch.setattr(Remembered, "of", lambda *args, **options: None)
    planned(config_of("llama", method, "bf16"))
    assert [one.names for one in chosen] == [("int8_gradients",)]
