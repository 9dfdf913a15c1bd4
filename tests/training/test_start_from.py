"""Runs that start from an adapter: continued, padded, stacked and combined ones, compared with PEFT."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.experiments.search_space import default_space
from deltaw.lora import load_adapter
from deltaw.methods.start import lineage_lines, open_start, resolve_start
from deltaw.reports.inspect import inspect_adapter
from deltaw.runs.folder import Run
from deltaw.settings.config import RunConfig
from deltaw.settings.start import StartSource, start_sources
from deltaw.training.state import rows_of_step
from tests.conftest import COLORS, deep_merge, refusal, write_rows
from tests.training.parallel_runs import assert_same_as_one_process, needs_gloo
from tests.training.runs import (
    ADAPTER,
    METHODS,
    RecordingCallback,
    adapter,
    assert_same_run,
    build_session,
    losses,
    metrics,
    open_on_cpu,
    stopped_run,
)

TRAIN = {"max_steps": 4, "batch_size": 3, "schedule": "constant", "warmup": 0, "checkpoint_every": 1, "drift": False}
IDS = torch.arange(40)[None] % 250 + 3


@pytest.fixture(scope="module")
def make(settings):
    """Return a factory of settings of a short run."""

    def make_settings(output: Path, **changes: object) -> dict:
        return settings(output, **deep_merge({"train": TRAIN, "data": {"eval": 2}}, changes))

    return make_settings


@pytest.fixture(scope="module")
def sft(make, tmp_path_factory) -> Path:
    """Return a run of rank 4 that others start from."""
    return deltaw.fit(make(tmp_path_factory.mktemp("start") / "sft", train={"max_steps": 8})).output


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory) -> Path:
    rows = ({"prompt": f"paint it {c}", "chosen": c, "rejected": c[::-1] + "x"} for c in COLORS)
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def edited(folder: Path, into: Path, **changes: object) -> Path:
    """Return a copy of an adapter's two files with changed settings, which looks like an adapter of PEFT."""
    into.mkdir(parents=True)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (into / "adapter_config.json").write_text(json.dumps(config))
    shutil.copyfile(folder / ADAPTER, into / ADAPTER)
    return into


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def start_logits(settings: dict) -> torch.Tensor:
    """Return the outputs of a run's model before its first step."""
    session = build_session(resolve_start(RunConfig.read(settings)))
    with session.method.evaluating(session.model):
        return logits(session.model)


def peft_model(model_folder: Path, folder: Path, **options: object) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(base, str(folder), **options).eval()


# Continuing an adapter.

VARIANTS = {
    "lora": {},
    "rslora": {"lora": {"rslora": True}},
    "dora": {"lora": {"dora": True}},
    "trained modules": {"lora": {"train_modules": ["lm_head", "post_attention_layernorm"]}},
    "tokens": {"lora": {"trainable_token_indices": [5, 9, 100]}},
    "biases": {"lora": {"bias": "all"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_continued_training_matches_peft(make, model_folder, gpt2_folder, tmp_path, variant):
    model = gpt2_folder if variant == "biases" else model_folder
    options = deep_merge(VARIANTS[variant], {"model": str(model), "data": {"eval": None}})
    options = deep_merge(options, {"train": {"learning_rate": 2e-3, "max_grad_norm": None}})
    first = deltaw.fit(make(tmp_path / "first", **options)).output
    settings = deep_merge(options, {"train": {"max_steps": 20}, "start_from": str(first)})
    second = deltaw.fit(make(tmp_path / "second", **settings)).output
    rows = build_session(make(tmp_path / "rows", **options)).data.train
    reference = peft_model(model, first, is_trainable=True)
    trained = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
    expected = []
    for step in range(20):
        batch = rows_of_step(rows, step, 3, 0)
        total = torch.zeros(())
        for row in batch:
            ids = torch.from_numpy(row.tokens).long()[None]
            labels = torch.from_numpy(np.where(row.is_label, row.tokens, -100)).long()
            outputs = reference(input_ids=ids).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(outputs, labels[1:], reduction="sum")
        loss = total / sum(row.label_count for row in batch)
        expected.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    np.testing.assert_allclose(losses(second), expected, atol=1e-5, rtol=1e-5)
    assert expected[0] < losses(first)[0]  # it did not start from the base model
    torch.testing.assert_close(logits(open_on_cpu(second).model), logits(reference), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lora"])
@pytest.mark.slow
def test_other_methods_continue(make, tmp_path, method):
    first = deltaw.fit(make(tmp_path / "first", **METHODS[method])).output
    continued = make(tmp_path / "second", **METHODS[method], start_from=str(first), train={"max_steps": 1})
    session = build_session(resolve_start(RunConfig.read(continued)))
    opened = open_on_cpu(first)
    (row, *_) = session.data.train
    ids = torch.from_numpy(np.asarray(row.tokens)).long()[None]
    with torch.no_grad():
        expected = opened.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(session.model.eval()(input_ids=ids).logits, expected, atol=1e-6, rtol=1e-6)
        base = AutoModelForCausalLM.from_pretrained(session.config.model, dtype=torch.float32).eval()
        if method != "prompt":
            assert not torch.allclose(base(input_ids=ids).logits, expected, atol=1e-4)
    result = deltaw.fit(continued)
    assert result.outcome.steps == 1 and (result.output / ADAPTER).read_bytes() != (first / ADAPTER).read_bytes()


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("rank", [5, 8, 16])
def test_padded_rank_gives_equal_outputs_before_first_step(make, tmp_path, variant, rank):
    first = deltaw.fit(make(tmp_path / "first", **VARIANTS[variant])).output
    same = start_logits(make(tmp_path / "a", lora={"alpha": 8}, start_from=str(first)))
    config = make(tmp_path / "b", start_from=str(first))
    config["lora"] = {"r": rank}
    padded = start_logits(config)
    if variant == "dora":  # the norms of W + ΔW are rounded differently
        torch.testing.assert_close(padded, same, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(padded, same)
    torch.testing.assert_close(same, logits(peft_model(Path(config["model"]), first)), atol=1e-4, rtol=1e-4)


def test_padded_directions_are_trained_and_saved(make, sft, tmp_path):
    config = make(tmp_path / "run", start_from=str(sft))
    config["lora"] = {"rank": 8}
    run = deltaw.fit(config).output
    saved = adapter(run)
    name = next(name for name in saved if name.endswith("q_proj.lora_B.weight"))
    assert saved[name].shape[1] == 8 and saved[name][:, 4:].abs().max() > 0
    assert json.loads((run / "adapter_config.json").read_text())["lora_alpha"] == 16
    torch.testing.assert_close(logits(open_on_cpu(run).model), logits(peft_model(Path(config["model"]), run)))


def test_settings_come_from_adapter_unless_set(make, sft, tmp_path):
    recorder = RecordingCallback()
    config = make(tmp_path / "run", start_from=str(sft))
    del config["lora"]
    result = deltaw.fit(config, callback=recorder)
    assert "continue from sft (causal-lm" in recorder and "optimizer state and the learning-rate schedule" in recorder
    assert "from the adapter: rank 4, alpha 8" in recorder
    assert RunConfig.read(result.output / "run.yaml").lora.rank == 4
    resolved = resolve_start(RunConfig.read(config))
    assert resolve_start(resolved).lora == resolved.lora
    assert resolve_start(RunConfig.read(resolved.model_dump(mode="json"))).lora == resolved.lora
    assert (result.output / ADAPTER).read_bytes() != (sft / ADAPTER).read_bytes()


@pytest.mark.parametrize("mode", ["continue", "stack"])
def test_initialization_without_effect_is_reported(make, sft, tmp_path, mode):
    for init, is_reported in (("gaussian", True), ("uniform", False)):
        lines: list[str] = []
        values = make(tmp_path / "run", start_from=str(sft), start_mode=mode, lora={"init": init})
        resolve_start(RunConfig.read(values), lines.append)
        assert ("lora.init: gaussian has no effect with start_from" in lines) == is_reported


# Stacking and combining.


@pytest.mark.parametrize("kind", ["merge", "keep"])
def test_stacked_adapter_is_sum_and_loads_in_peft(make, sft, model_folder, tmp_path, kind):
    settings = {"start_from": str(sft), "start_mode": "stack", "stack": kind, "train": {"weight_decay": 0.1}}
    config = make(tmp_path / "run", **settings, lora={"rank": 2, "alpha": 6})
    before = start_logits(config)
    torch.testing.assert_close(before, logits(open_on_cpu(sft).model), atol=1e-5, rtol=1e-5)
    run = deltaw.fit(config).output
    saved = adapter(run)
    old = adapter(sft)
    for name, tensor in old.items():
        if "lora_A" in name:
            assert saved[name].shape[0] == 6 and torch.equal(saved[name][:4], tensor)
            updated = saved[name.replace("lora_A", "lora_B")]
            frozen = old[name.replace("lora_A", "lora_B")] * (2 / 3)
            torch.testing.assert_close(updated[:, :4], frozen)
            assert updated[:, 4:].abs().max() > 0
    outputs = logits(open_on_cpu(run).model)
    torch.testing.assert_close(logits(peft_model(model_folder, run)), outputs, atol=1e-5, rtol=1e-5)
    assert (run / "new_adapter").is_dir() == (kind == "keep")
    if kind == "keep":
        both = peft_model(model_folder, sft, adapter_name="old")
        both.load_adapter(str(run / "new_adapter"), "new")
        both.base_model.set_adapter(["old", "new"])
        torch.testing.assert_close(logits(both), outputs, atol=1e-5, rtol=1e-5)


def test_several_adapters_start_as_weighted_sum(make, sft, model_folder, tmp_path):
    other = deltaw.fit(make(tmp_path / "other", train={"seed": 3}, lora={"rank": 2, "alpha": 2})).output
    config = make(tmp_path / "run", start_from=[str(sft), {"from": str(other), "weight": -0.5}])
    del config["lora"]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    expected = model.state_dict()
    for folder, weight in ((sft, 1.0), (other, -0.5)):
        single = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        load_adapter(single, folder)
        deltaw.merge(single)
        merged = dict(single.named_parameters())
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        for name, parameter in base.named_parameters():
            expected[name] += weight * (merged[name] - parameter).detach()
    torch.testing.assert_close(start_logits(config), logits(model), atol=1e-4, rtol=1e-4)
    run = deltaw.fit(config).output
    assert json.loads((run / "adapter_config.json").read_text())["r"] == 6
    assert "sft (causal-lm" in (line := lineage_lines(Run(run).values["start"])[0]) and "other × -0.5" in line


# Reference models.


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_reference_log_probs_are_those_of_start(make, sft, pairs_file, tmp_path, loss):
    rows = pairs_file
    if loss == "kto":
        items = [{"prompt": f"paint it {c}", "completion": c, "label": n % 2 == 0} for n, c in enumerate(COLORS)]
        rows = write_rows(tmp_path / "kto.jsonl", items)
    task = {"task": "preference", "preference": {"loss": loss}, "data": {"train": str(rows), "eval": None}}
    settings = make(tmp_path / "run", **task, start_from=str(sft))
    opened = open_on_cpu(sft).model.eval()
    base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval()
    for reference, model in (("start", opened), ("base", base)):
        session = build_session(resolve_start(RunConfig.read(settings | {"reference_model": reference})))
        for group in session.data.train[:4]:
            for row in group.rows:
                with torch.no_grad():
                    ids = torch.from_numpy(row.tokens).long()
                    log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
                expected = sum(log_probs[i - 1, ids[i]].item() for i in np.flatnonzero(row.is_label))
                assert row.reference == pytest.approx(expected, abs=1e-4, rel=1e-5)


def test_first_dpo_loss_is_ln_2(make, sft, pairs_file, tmp_path):
    task = {"task": "preference", "data": {"train": str(pairs_file)}, "start_from": str(sft)}
    for mode in ("continue", "stack"):
        run = deltaw.fit(make(tmp_path / mode, **task, start_mode=mode)).output
        assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    run = deltaw.fit(make(tmp_path / "base", **task, reference_model="base")).output
    assert abs(losses(run)[0] - math.log(2)) > 1e-3


@pytest.fixture
def reward(make, tmp_path):
    """Return a factory of settings of a run on rewards with a divergence penalty."""
    (tmp_path / "own.py").write_text(
        "def early(completions, **columns):\n    return [len(t) % 3 for t in completions]\n"
    )
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"paint it {c}"} for c in COLORS[:6]])
    functions = {"functions": [f"{tmp_path / 'own.py'}:early"], "group": 3, "max_new_tokens": 6, "beta": 0.1}

    def make_settings(output: str, **changes: object) -> dict:
        data = {"train": str(rows), "eval": None}
        return make(tmp_path / output, **deep_merge({"task": "rl", "reward": functions, "data": data}, changes))

    return make_settings


def test_divergence_of_rewards_starts_at_zero(reward, sft):
    run = deltaw.fit(reward("run", start_from=str(sft))).output
    divergences = [step["kl"] for step in metrics(run, "loss")]
    assert divergences[0] == pytest.approx(0, abs=1e-6) and divergences[-1] > 1e-6
    run = deltaw.fit(reward("base", start_from=str(sft), reference_model="base")).output
    assert metrics(run, "loss")[0]["kl"] > 1e-3


def test_default_teacher_is_start(make, sft, tmp_path):
    distill = {"task": "distill", "distill": {"prompt": "be brief", "max_new_tokens": 4}, "start_from": str(sft)}
    first = {}
    for reference in ("start", "base"):
        changes = {"reference_model": reference, "train": {"max_steps": 1}}
        first[reference] = losses(deltaw.fit(make(tmp_path / reference, **deep_merge(distill, changes))).output)[0]
    assert abs(first["start"] - first["base"]) > 1e-3


# Scores, resuming and other paths.


def test_scores_before_training_are_those_of_start_and_base(make, sft, model_folder, tmp_path):
    options = {"train": {"epochs": 2, "max_steps": 12}, "data": {"eval": 2}}
    run = deltaw.fit(make(tmp_path / "run", **options, start_from=str(sft))).output
    (of_start,) = metrics(run, "base")
    (of_base,) = metrics(run, "base_model")
    plain = deltaw.fit(make(tmp_path / "plain", **options)).output
    assert of_base["base_model"]["loss"] == pytest.approx(metrics(plain, "base")[0]["base"]["loss"], rel=1e-6)
    assert of_start["base"]["loss"] < of_base["base_model"]["loss"] - 0.1


@pytest.mark.parametrize("mode", ["continue", "stack"])
def test_resumed_run_is_bit_identical(make, sft, tmp_path, mode):
    options = {"start_from": str(sft), "start_mode": mode, "lora": {"dropout": 0.1 if mode == "continue" else 0.0}}
    whole = deltaw.fit(make(tmp_path / "whole", **options)).output
    assert_same_run(deltaw.fit(resume=stopped_run(make(tmp_path / "part", **options), 2)).output, whole)


def test_resume_rejects_changed_or_missing_start(make, sft, tmp_path):
    start = Path(shutil.copytree(sft, tmp_path / "start"))
    run = stopped_run(make(tmp_path / "run", start_from=str(start)), 2)
    tensors = load_file(start / ADAPTER)
    name = next(iter(tensors))
    with_metadata = {"format": "pt"}
    save_file(tensors | {name: tensors[name] + 1}, start / ADAPTER, with_metadata)
    refusal(deltaw.fit, resume=run, match="start_from has changed since the run started")
    shutil.rmtree(start)
    refusal(deltaw.fit, resume=run, match="no folder .* to start from")


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_start_works_on_other_precisions(make, sft, tmp_path, precision):
    run = deltaw.fit(make(tmp_path / "run", start_from=str(sft), precision=precision)).output
    plain = deltaw.fit(make(tmp_path / "plain", precision=precision)).output
    assert losses(run)[0] < losses(plain)[0] - 0.1


def test_start_works_with_stored_features(make, tmp_path):
    options = {"lora": {"layers": "1-"}, "train": {"max_steps": 9}}
    first = deltaw.fit(make(tmp_path / "first", **options)).output
    outcomes = []
    for keep in (True, False):
        changes = deep_merge(options, {"start_from": str(first), "train": {"keep_features": keep}})
        recorder = RecordingCallback()
        outcomes.append(losses(deltaw.fit(make(tmp_path / f"{keep}", **changes), callback=recorder).output))
        assert ("features computed once" in recorder) == keep
    np.testing.assert_allclose(*outcomes, rtol=1e-5)


@needs_gloo
@pytest.mark.parametrize("mode", ["continue", "stack"])
@pytest.mark.slow
def test_two_processes_match_one(make, sft, pairs_file, tmp_path, mode):
    options = {"task": "preference", "data": {"train": str(pairs_file)}, "start_from": str(sft), "start_mode": mode}
    single, several = (make(tmp_path / name, **options) for name in ("single", "several"))
    assert_same_as_one_process(single, several)
    assert losses(tmp_path / "several")[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.planned
def test_plan_covers_start_and_its_errors(make, sft, gpt2_folder, tmp_path):
    plans = [deltaw.plan(make(tmp_path / "run", **changes)) for changes in ({}, {"start_from": str(sft)})]
    assert plans[1].trained_parameters == plans[0].trained_parameters
    stacked = deltaw.plan(make(tmp_path / "run", start_from=str(sft), start_mode="stack"))
    assert stacked.trained_parameters == 2 * plans[0].trained_parameters


def test_search_omits_settings_of_the_adapter(make, sft, tmp_path):
    config = RunConfig.read(make(tmp_path / "run"))
    assert "lora.rank" in default_space(config, 1e-3)
    assert [*default_space(config.model_copy(update={"start_from": str(sft)}), 1e-3)] == ["train.learning_rate"]


def test_lineage_is_recorded(make, sft, tmp_path):
    second = deltaw.fit(make(tmp_path / "second", start_from=str(sft))).output
    third = deltaw.fit(make(tmp_path / "third", start_from=str(second), start_mode="stack")).output
    lines = lineage_lines(Run(third).values["start"])
    assert lines[0].startswith("stack from second (causal-lm, ") and lines[1].startswith(
        "before that, continue from sft ("
    )
    start = open_start(RunConfig.read(third / "run.yaml"))
    assert start is not None and start.fingerprint == Run(third).values["start"]["fingerprint"]
    assert lines[0] in (third / "README.md").read_text()
    assert inspect_adapter(third).trained_from == lines and inspect_adapter(sft).trained_from == []


# Bad input.


def refuse_without_loading(monkeypatch, config, match):
    with monkeypatch.context() as patched:
        patched.setattr("deltaw.runs.load_model.load_model", lambda *args, **kwargs: pytest.fail("a model is loaded"))
        return refusal(deltaw.fit, config, match=match)


def test_unsuitable_adapters_are_rejected_before_loading(make, sft, model_folder, gpt2_folder, tmp_path, monkeypatch):
    from tests.byte_models import save_model, tiny_llama

    other = save_model(tiny_llama(seed=5), tmp_path / "other")
    anonymous = edited(sft, tmp_path / "anonymous")
    save_file(load_file(sft / ADAPTER), anonymous / ADAPTER, {"format": "pt"})
    head = deltaw.fit(make(tmp_path / "head", method="head")).output
    missing = Path(shutil.copytree(sft, tmp_path / "missing"))
    (missing / ADAPTER).unlink()
    cases = {
        "no folder .* to start from": {"start_from": str(tmp_path / "nowhere")},
        "no adapter in": {"start_from": str(model_folder)},
        "no adapter_model.safetensors": {"start_from": str(missing)},
        "another base model": {"start_from": str(sft), "model": str(other)},
        r"another base model \(.*not on .*gpt2": {"start_from": str(anonymous), "model": str(gpt2_folder)},
        "is of method 'head', and the run is of method 'lora'": {"start_from": str(head)},
        "can only continue a single adapter": {"start_from": str(head), "method": "head", "start_mode": "stack"},
        "lower than the adapter's rank 4": {"start_from": str(sft), "lora": {"rank": 2}},
        "changes the scaling": {"start_from": str(sft), "lora": {"alpha": 9}},
        "lora.dora is True": {"start_from": str(sft), "lora": {"dora": True}},
        "cannot be stacked: it is a DoRA": {"start_from": str(sft), "start_mode": "stack", "lora": {"dora": True}},
        "also apply to the frozen": {"start_from": str(sft), "start_mode": "stack", "lora": {"dropout": 0.1}},
        "the settings select .*modules differ": {"start_from": str(sft), "lora": {"target_modules": "attention"}},
        "the task 'embedding' cannot start": {"start_from": str(sft), "task": "embedding"},
    }
    for match, changes in cases.items():
        if "modules differ" not in match:
            refuse_without_loading(monkeypatch, make(tmp_path / "run", **changes), match)
            assert not (tmp_path / "run").exists()
    modules = make(tmp_path / "run", start_from=str(sft), lora={"target_modules": "attention"})
    refusal(deltaw.plan, modules, match="has .*modules differ")


def test_other_chat_template_is_rejected_unless_set(make, sft, tmp_path, monkeypatch):
    start = Path(shutil.copytree(sft, tmp_path / "start"))
    template = start / "chat_template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    config = make(tmp_path / "run", start_from=str(start))
    error = refuse_without_loading(monkeypatch, config, "another chat template")
    assert f"--data.chat_template {template}" in str(error.hint)
    config["data"]["chat_template"] = str(template)
    assert deltaw.fit(config).outcome.steps == 4


def test_other_tokenizer_is_rejected(make, sft, tmp_path, monkeypatch):
    start = Path(shutil.copytree(sft, tmp_path / "start"))
    file = start / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["added_tokens"].append({**stored["added_tokens"][0], "id": 300, "content": "<extra>"})
    file.write_text(json.dumps(stored))
    refuse_without_loading(monkeypatch, make(tmp_path / "run", start_from=str(start)), "another tokenizer")


def damaged(folder: Path, into: Path, change) -> Path:
    """Return a copy of an adapter with changed tensors, which look like those of PEFT."""
    edited(folder, into)
    tensors = load_file(into / ADAPTER)
    change(tensors)
    save_file(tensors, into / ADAPTER)
    return into


def first(tensors: dict, ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


def resize(tensors: dict, rank_A: int, rank_B: int) -> None:
    name_A = first(tensors, "lora_A.weight")
    name_B = first(tensors, "lora_B.weight")
    tensors[name_A] = torch.randn(rank_A, tensors[name_A].shape[1])
    tensors[name_B] = torch.randn(tensors[name_B].shape[0], rank_B)


def clear(tensors: dict) -> None:
    tensors.clear()
    tensors["x"] = torch.ones(1)


def to_integers(tensors: dict) -> None:
    name = first(tensors, "lora_A.weight")
    tensors[name] = tensors[name].to(torch.int64)


DAMAGE = {
    "have the shapes": lambda tensors: resize(tensors, 2, 4),
    "have rank 2": lambda tensors: resize(tensors, 2, 2),
    "is missing": lambda tensors: tensors.pop(first(tensors, "lora_B.weight")),
    "has no factor A": lambda tensors: tensors.pop(first(tensors, "lora_A.weight")),
    "no low-rank factors": lambda tensors: (
        [tensors.pop(name) for name in list(tensors)] and tensors.update(x=torch.ones(1))
    ),
    "are of type": lambda tensors: tensors.update(
        {first(tensors, "lora_A.weight"): torch.ones(4, 32, dtype=torch.int64)}
    ),
}


@pytest.mark.parametrize("match", DAMAGE)
@pytest.mark.parametrize("mode", ["continue", "stack", "sum"])
def test_damaged_factors_are_rejected(make, sft, tmp_path, monkeypatch, match, mode):
    folder = damaged(sft, tmp_path / "damaged", DAMAGE[match])
    start = [str(folder), str(sft)] if mode == "sum" else str(folder)
    options = {"start_mode": "stack"} if mode == "stack" else {}
    refuse_without_loading(monkeypatch, make(tmp_path / "run", start_from=start, **options), match)


@pytest.mark.parametrize("mode", ["stack", "sum"])
def test_other_tensors_cannot_be_combined(make, sft, tmp_path, monkeypatch, mode):
    folder = damaged(sft, tmp_path / "damaged", lambda tensors: tensors.update(foo=torch.ones(3)))
    start = [str(folder), str(sft)] if mode == "sum" else str(folder)
    options = {"start_mode": "stack"} if mode == "stack" else {}
    refuse_without_loading(monkeypatch, make(tmp_path / "run", start_from=start, **options), "contains 'foo'")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_rejected(make, sft, tmp_path, value):
    folder = damaged(sft, tmp_path / "damaged", lambda t: t[first(t, "lora_B.weight")].view(-1)[:1].fill_(value))
    refusal(deltaw.fit, make(tmp_path / "run", start_from=str(folder)), match="values that are not finite")
    assert not (tmp_path / "run").exists()


def test_output_may_not_contain_start(make, sft, tmp_path):
    start = Path(shutil.copytree(sft, tmp_path / "start"))
    for output in (start, tmp_path):
        refusal(deltaw.fit, make(output, start_from=str(start)), fresh=True, match="contains the adapter of start_from")
    assert (start / ADAPTER).is_file()


def test_lineage_of_untrusted_folder_is_one_line_and_bounded(make, sft, tmp_path):
    folder = edited(sft, tmp_path / "hostile")
    adapter_entry = {"name": "a\nforged: line\x1b[31m", "weight": 1, "fingerprint": "f" * 32, "task": "t"}
    start = None
    for _ in range(4):
        start = {"mode": "continue", "adapters": [{**adapter_entry, "start": start}] * 20}
    (folder / "run.json").write_text(json.dumps({"start": start}))
    config = RunConfig.read(make(tmp_path / "run", start_from=str(folder)))
    lineage = open_start(config).lineage(config)
    assert not any("\n" in line or "\x1b" in line for line in lineage_lines(lineage))
    assert len(lineage_lines(lineage)) == 5 and len(json.dumps(lineage)) < 50_000


def test_other_classes_are_rejected(make, tmp_path):
    labeled = ({"text": color, "label": "xy"[n % 2]} for n, color in enumerate(COLORS))
    rows = write_rows(tmp_path / "rows.jsonl", labeled)
    task = {"task": "sequence-classification", "data": {"train": str(rows), "eval": None}}
    first = deltaw.fit(make(tmp_path / "first", **task)).output
    same = deltaw.fit(make(tmp_path / "second", **task, start_from=str(first)))
    assert losses(same.output)[0] < losses(first)[0]
    swapped = deep_merge(task, {"data": {"classes": ["y", "x"]}})
    refusal(deltaw.fit, make(tmp_path / "third", **swapped, start_from=str(first)), match="the adapter has the classes")


def test_untrusted_folder_does_not_name_a_start(make, sft, tmp_path, monkeypatch):
    run = stopped_run(make(tmp_path / "run", start_from=str(sft)), 2)
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))  # the user named nothing on this machine
    error = refusal(deltaw.fit, resume=run, match="refers to .*start_from")
    assert "--start_from" in str(error.hint)


def test_sources_are_validated():
    assert start_sources(["a", {"from": "b", "weight": 2}]) == [StartSource("a"), StartSource("b", 2)]
    base = {"model": "m", "data": "d.jsonl"}
    for value in ([], "", [{"weight": 1}], [{"from": "a", "weights": 1}], [{"from": "a", "weight": "x"}], 3):
        error = refusal(RunConfig.read, base | {"start_from": value})
        assert "start_from" in error.message
