"""Checks of all stages before the first one is trained.

Each invalid chain is rejected by ``train`` and ``plan`` before a step, with the message that its stages have as
separate runs. Each valid chain is accepted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import deltaw
from deltaw.errors import UserError
from deltaw.experiments import chain as chain_module
from deltaw.experiments import chain_checks
from deltaw.experiments.chain import planned_stages, train_stages
from deltaw.methods.start import StartAdapter
from deltaw.settings.stages import Chain, read_chain
from deltaw.training.planning.fake_model import FakeModel
from tests.byte_models import save_model, tiny_gpt2, tiny_llama
from tests.conftest import COLORS, deep_merge, refusal, write_rows
from tests.training.runs import ADAPTER, slow_except

TRAIN = {"max_steps": 1, "epochs": 1, "batch_size": 3, "drift": False, "samples": 0, "learning_rate": 1e-2}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory, model_folder) -> dict[str, str]:
    """Files by the placeholders of the stages below."""
    folder = tmp_path_factory.mktemp("files")
    rows = {
        "ROWS": [{"prompt": f"paint it {c}", "completion": c[0]} for c in COLORS],
        "PAIRS": [{"prompt": f"paint it {c}", "chosen": c, "rejected": f"{c[::-1]}x"} for c in COLORS],
        "CLASSES": [{"text": f"paint it {c}", "label": "long" if len(c) > 4 else "short"} for c in COLORS],
        "LETTERS": [{"text": f"paint it {c}", "label": c[0]} for c in COLORS[:4] * 2],
        "NUMBERS": [{"text": f"paint it {c}", "label": len(c)} for c in COLORS],
        "QUERIES": [{"query": f"paint it {c}", "positive": f"the color {c}"} for c in COLORS],
    }
    paths = {name: str(write_rows(folder / f"{name}.jsonl", content)) for name, content in rows.items()}
    (folder / "template.jinja").write_text(TEMPLATE)
    other = save_model(tiny_llama(initializer_range=0.1), folder / "other" / Path(model_folder).name)
    gpt2 = save_model(tiny_gpt2(), folder / "gpt2")
    return {**paths, "TEMPLATE": str(folder / "template.jinja"), "OTHER": str(other), "GPT2": str(gpt2)}


def filled(value: object, files: dict[str, str]) -> object:
    """Return settings with placeholders replaced by paths."""
    if isinstance(value, dict):
        return {key: filled(entry, files) for key, entry in value.items()}
    if isinstance(value, list):
        return [filled(entry, files) for entry in value]
    return files.get(value, value) if isinstance(value, str) else value


@pytest.fixture
def make_chain(files, model_folder, tmp_path) -> Callable[..., Chain]:
    """Return a factory of chains from the settings of each stage."""

    def make(*stages: dict) -> Chain:
        shared = {"model": str(model_folder), "precision": "fp32", "device": "cpu", "threads": 1, "train": TRAIN}
        defaults = {"data": {"train": "ROWS", "eval": 2}, "lora": {"rank": 4}}
        entries = []
        for number, stage in enumerate(stages, 1):
            without = stage.get("lora", {}) is None or number > 1
            entry = deep_merge({k: v for k, v in defaults.items() if k != "lora" or not without}, stage)
            entries.append({"name": f"stage{number}", **entry})
        chain = read_chain({**shared, "output": str(tmp_path / "chain"), "stages": filled(entries, files)})
        assert chain is not None
        return chain

    return make


def lora(**settings: object) -> dict:
    return {"lora": settings}


DORA = lora(rank=4, dora=True)
ACTIVE = lora(rank=4, active="completion")
BIAS = {**lora(rank=4, bias="all"), "model": "GPT2"}
MODULES = lora(rank=4, train_modules=["lm_head"])
PISSA = lora(rank=4, init="pissa")
NEW = {"start_from": None, "lora": {"rank": 4}}
SUM = {"start_from": ["stage1", "stage2"]}
STACK = {"start_mode": "stack"}
DPO = {"task": "dpo", "data": {"train": "PAIRS"}}
CLASSIFY = {"task": "classification", "data": {"train": "CLASSES"}}
REGRESS = {"task": "regression", "data": {"train": "NUMBERS"}}
EMBED = {"task": "embedding", "data": {"train": "QUERIES"}}
PROMPT = {"method": "prompt", "prompt": {"length": 3}}
RANDOM = {"method": "random", "random": {"weights": 0.05}}
REWARD = {"task": "reward", "reward": {"functions": ["exact"], "group": 2, "max_new_tokens": 4}}

INVALID: dict[str, tuple[list[dict], str]] = {
    "other targets": ([lora(rank=4, target_modules=["q_proj"]), lora(target_modules=["q_proj", "v_proj"])], "v_proj"),
    "fewer targets": ([{}, lora(target_modules="attention")], "modules differ"),
    "other layers": ([lora(rank=4, layers="0"), lora(layers="1")], "layers"),
    "excluded targets": ([{}, lora(exclude_modules=["q_proj"])], "modules differ"),
    "other trained modules": ([{}, lora(train_modules=["lm_head"])], "lm_head"),
    "sum of DoRA": ([DORA, {**NEW, **DORA}, SUM], "DoRA"),
    "stack on DoRA": ([DORA, STACK], "DoRA"),
    "stack of DoRA": ([{}, {**STACK, **DORA}], "DoRA"),
    "sum of activated": ([ACTIVE, {**NEW, **ACTIVE}, SUM], "activated"),
    "stack on activated": ([ACTIVE, STACK], "activated"),
    "sum of trained modules": ([MODULES, NEW, SUM], "modules_to_save"),
    "stack on trained modules": ([MODULES, STACK], "modules_to_save"),
    "stack on biases": ([BIAS, {**STACK, "model": "GPT2"}], "biases"),
    "stack with biases": ([{}, {**STACK, **BIAS}], "biases"),
    "stack with dropout": ([{}, {**STACK, **lora(dropout=0.1)}], "dropout"),
    "stack with patterns": ([{}, {**STACK, **lora(rank_pattern={"q_proj": 2})}], "rank_pattern"),
    "sum of tokens": ([lora(rank=4, trainable_token_indices=[5]), NEW, SUM], "trainable_token_indices"),
    "other tokens": ([lora(rank=4, trainable_token_indices=[5]), lora(trainable_token_indices=[6])], "[6]"),
    "missing tokens": ([{}, lora(trainable_token_indices=[6])], "trainable_token_indices"),
    "lower rank": ([{}, lora(rank=2)], "lower than"),
    "raised rank with patterns": ([lora(rank=4, rank_pattern={"q_proj": 2}), lora(rank=8)], "rank_pattern"),
    "other rank pattern": ([{}, lora(rank_pattern={"q_proj": 2})], "rank_pattern"),
    "rank below a sum": ([{}, NEW, {**SUM, **lora(rank=6)}], "lower than"),
    "other alpha": ([{}, lora(alpha=3)], "scaling"),
    "other scaling": ([{}, lora(rslora=True)], "rslora"),
    "DoRA later": ([{}, lora(dora=True)], "dora"),
    "biases later": ([{}, lora(bias="all")], "bias"),
    "activated later": ([{}, lora(active="completion")], "active"),
    "DPO of an activated adapter": ([ACTIVE, DPO], "cannot be trained on pairs"),
    "keep a stack of two ranks": ([lora(rank=4, rank_pattern={"q_proj": 2}), {**STACK, "stack": "keep"}], "same rank"),
    "head with a weight": (
        [{"method": "head"}, {"method": "head", "start_from": [{"from": "stage1", "weight": 0.5}]}],
        "single adapter",
    ),
    "sum of heads": ([{"method": "head"}, {"method": "head", "start_from": ["stage1", "stage1"]}], "single adapter"),
    "stack on a head": ([{"method": "head"}, {"method": "head", **STACK}], "single adapter"),
    "other method": ([{}, {"method": "head"}], "of method 'lora'"),
    "method of a third stage": ([{}, {}, {"method": "bias"}], "of method 'lora'"),
    "more blocks": (
        [{"method": "last", "last": {"blocks": 1}}, {"method": "last", "last": {"blocks": 2}}],
        "in the adapter",
    ),
    "other random weights": ([RANDOM, {**RANDOM, "train": {"seed": 5}}], "other weights"),
    "more random weights": ([RANDOM, {"method": "random", "random": {"weights": 0.1}}], "weights"),
    "other input tokens": (
        [{"method": "input", "input": {"tokens": ["a"]}}, {"method": "input", "input": {"tokens": ["b"]}}],
        "other weights",
    ),
    "other head modules": (
        [{"method": "head"}, {"method": "head", "head": {"modules": ["lm_head", "model.norm"]}}],
        "in the adapter",
    ),
    "longer prompt": ([PROMPT, {"method": "prompt", "prompt": {"length": 5}}], "prompt.length is 5"),
    "DPO of a prompt": ([PROMPT, {**DPO, **PROMPT, "prompt": {"length": 4}}], "prompt.length is 4"),
    "other classes": ([CLASSIFY, {**CLASSIFY, "data": {"train": "LETTERS"}}], "classes"),
    "order of classes": ([CLASSIFY, deep_merge(CLASSIFY, {"data": {"classes": ["short", "long"]}})], "classes"),
    "regression after classes": ([CLASSIFY, REGRESS], "does not fit"),
    "language after embedding": ([EMBED, {}], "cannot start from"),
    "embedding after language": ([{}, EMBED], "cannot start from"),
    "language after classes": ([CLASSIFY, {}], "outside of the language model|matches no|classifier|score"),
    "other model": ([{}, {"model": "OTHER"}], "another base model"),
    "other architecture": ([{}, {"model": "GPT2"}], "another base model"),
    "missing template": ([{"data": {"chat_template": "TEMPLATE"}}, {}], "chat template"),
    "reward of a missing function": ([{}, {**REWARD, "reward": {"functions": ["missing.py:f"]}}], "missing.py"),
    "missing rows": ([{}, {"data": {"train": "missing.jsonl"}}], "missing.jsonl"),
    "rows of another task": ([{}, {**DPO, "data": {"train": "CLASSES"}}], "rejected|chosen|prompt"),
}

VALID: dict[str, list[dict]] = {
    "same targets": [lora(rank=4, target_modules=["q_proj"]), lora(target_modules=r".*q_proj")],
    "higher rank": [{}, lora(rank=8), DPO],
    "sum": [{}, NEW, SUM, DPO],
    "weighted sum": [{}, NEW, {"start_from": [{"from": "stage1", "weight": 0.5}, "stage2"]}],
    "stack": [{}, {**STACK, **lora(rank=2)}, DPO],
    "kept stack": [{}, {**STACK, "stack": "keep"}],
    "DoRA": [DORA, DPO],
    "activated": [ACTIVE, {}],
    "trained modules": [MODULES, {}, DPO],
    "PiSSA": [PISSA, {}, STACK],
    "biases": [BIAS, {"model": "GPT2"}],
    "tokens": [lora(rank=4, trainable_token_indices=[5]), {}],
    "rank pattern": [lora(rank=4, rank_pattern={"q_proj": 2}), {}],
    "dropout later": [{}, lora(dropout=0.1)],
    "head": [{"method": "head"}, {"method": "head"}],
    "last": [{"method": "last", "last": {"blocks": 1}}, {"method": "last", "last": {"blocks": 1}}],
    "random": [RANDOM, RANDOM],
    "input": [{"method": "input"}, {"method": "input"}],
    "bias": [{"method": "bias"}, {"method": "bias"}],
    "full": [{"method": "full"}, {"method": "full"}],
    "prompt": [PROMPT, {"method": "prompt"}],
    "classes": [CLASSIFY, CLASSIFY],
    "regression": [REGRESS, REGRESS],
    "embedding": [EMBED, EMBED],
    "template": [{"data": {"chat_template": "TEMPLATE"}}, {"data": {"chat_template": "TEMPLATE"}}],
    "classes after language": [{}, CLASSIFY],
    "reward": [{}, REWARD],
    "quantized": [{"precision": "int8"}, {"precision": "int8"}],
    "quantized later": [{}, {"precision": "nf4"}],
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_chain_is_rejected_before_first_step(make_chain, monkeypatch, name):
    stages, match = INVALID[name]
    chain = make_chain(*stages)
    monkeypatch.setattr(chain_module, "fit", lambda *_, **__: pytest.fail("a stage was trained"))
    error = refusal(list, train_stages(chain))
    assert f"stage 'stage{len(stages)}'" in error.location
    texts = f"{error.message} {error.location} {error.hint}"
    assert any(part in texts for part in match.split("|"))
    assert "deltaw-chain-" not in texts
    assert not chain.folder.exists()


def test_invalid_chain_is_rejected_before_first_plan(make_chain, monkeypatch):
    chain = make_chain(*INVALID["lower rank"][0])
    monkeypatch.setattr(chain_module, "plan_run", lambda *_, **__: pytest.fail("a stage was planned"))
    assert "lower than" in refusal(planned_stages, chain).message


def train_separately(chain: Chain) -> UserError | None:
    """Train the stages as separate runs, and return the error of the last one."""
    for stage in chain.stages[:-1]:
        deltaw.fit(stage.config)
    try:
        deltaw.fit(chain.stages[-1].config)
    except UserError as error:
        return error
    return None


@pytest.mark.parametrize("name", slow_except("other targets", "other classes", names=INVALID))
def test_separate_runs_are_rejected_with_same_message(make_chain, name):
    chain = make_chain(*INVALID[name][0])
    checked = refusal(list, train_stages(chain))
    error = train_separately(chain)
    assert error is not None
    assert error.message == checked.message


@pytest.mark.parametrize("name", slow_except("stack", "classes after language", names=VALID))
def test_valid_chain_is_trained_and_planned(make_chain, name):
    chain = make_chain(*VALID[name])
    plans = planned_stages(chain)
    assert list(plans) == [stage.name for stage in chain.stages]
    assert all(plan.peak_resident_bytes > 0 for plan in plans.values())
    assert [result.outcome.steps for _, result in train_stages(chain)] == [1] * len(chain.stages)


def test_changed_finished_stage_is_rejected_before_earlier_ones_are_trained(make_chain, monkeypatch):
    list(train_stages(make_chain({}, {})))
    chain = make_chain({}, {"train": {"max_steps": 2}})
    shutil.rmtree(chain.folder / "stage1")
    monkeypatch.setattr(chain_module, "fit", lambda *_, **__: pytest.fail("a stage was trained"))
    error = refusal(list, train_stages(chain))
    assert "max_steps" in str(error) and "stage 'stage2'" in error.location


def test_memory_limit_of_later_stage_is_checked_before_first_step(make_chain, monkeypatch):
    chain = make_chain({}, {"memory": "1MB"})
    monkeypatch.setattr(chain_module, "fit", lambda *_, **__: pytest.fail("a stage was trained"))
    for command in (lambda: list(train_stages(chain)), lambda: planned_stages(chain)):
        error = refusal(command)
        assert "memory allows 1,000,000" in error.message and "stage 'stage2'" in error.location


def test_failing_reward_of_later_stage_is_called_before_first_step(make_chain, tmp_path, monkeypatch):
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def broken(completion, prompt):\n    raise ValueError('no reward')\n")
    chain = make_chain({}, {**REWARD, "reward": {**REWARD["reward"], "functions": [f"{rewards}:broken"]}})
    monkeypatch.setattr(chain_module, "fit", lambda *_, **__: pytest.fail("a stage was trained"))
    error = refusal(list, train_stages(chain))
    assert "no reward" in str(error) and "stage 'stage2'" in error.location


def test_model_that_cannot_be_simulated_is_checked_in_part(make_chain, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(FakeModel, "assemble", lambda *_: 1 / 0)
    results = list(train_stages(make_chain({}, DPO), log=lines.append))
    assert [result.outcome.steps for _, result in results] == [1, 1]
    assert "stage 'stage1' was checked only in part" in lines[0]


def test_check_of_full_fine_tuning_needs_little_space(make_chain, tmp_path, monkeypatch):
    """The tensors of placeholders are holes in their files."""
    sizes: list[int] = []

    def record(folder: Path, *arguments: object) -> bool:
        if "deltaw-chain-" in str(folder):
            file = folder / ADAPTER
            sizes.append(file.stat().st_size - 512 * file.stat().st_blocks)
        return True

    chain = make_chain({"method": "full"}, {"method": "full"})
    monkeypatch.setattr(StartAdapter, "require_classes", lambda self, _: record(self.folder))
    chain_checks.check_stages(chain)
    assert sizes and min(sizes) > 0
