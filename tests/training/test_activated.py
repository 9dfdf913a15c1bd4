"""Training of activated adapters: prompts run separately and once, with the gradients of masked rows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from deltaw.data.chat_template import with_activation
from deltaw.data.example import Example, RowGroup
from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.machine.choices import Choice
from deltaw.runs.fit import fit
from deltaw.runtime import packing_checks
from deltaw.runtime.packed import backbone_of, packed_rows
from deltaw.tasks.language.task import evaluate_causal
from deltaw.training.batchers import BatcherOptions, choose_causal_batcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.features import prefix_cache, store
from deltaw.training.features.prompt_store import stored_prompts
from deltaw.training.features.prompts import PromptIndex, StoredPrompts
from deltaw.training.features.store import StoreLocation
from deltaw.training.feed import Feed
from deltaw.training.losses import RowLogProbs
from deltaw.training.preparation import checkpoint_blocks
from tests.byte_models import byte_tokenizer
from tests.conftest import COLORS, deep_merge, refusal, write_rows
from tests.tiny_models import causal_model
from tests.training.loops import example, randomize_lora_b
from tests.training.runs import build_session, metrics, open_on_cpu, slow_except
from tests.training.test_losses import log_prob

INVOCATION = [5, 7, 9]
FAMILIES = ("llama", "gpt2", "gemma2", "gemma3", "qwen3", "neox", "phi3", "cohere")
# Families whose transformers implementation computes entirely in float64.
EXACT = ("gpt2 in float64", "neox in float64", "phi in float64")


def rows(count: int = 9) -> list[Example]:
    """Return rows, some with a common prompt prefix and two with the same prompt."""
    generator = np.random.default_rng(0)
    stem = generator.integers(10, 97, 8)
    examples = []
    for n in range(count):
        prefix = stem[: generator.integers(3, 9)] if n % 3 else stem[:0]
        prompt = np.concatenate([prefix, generator.integers(10, 97, generator.integers(2, 9)), INVOCATION])
        if n == 4:
            prompt = examples[3].tokens[: examples[3].prompt_length]
        completion = generator.integers(10, 97, generator.integers(1, 6))
        examples.append(with_activation(example(n + 1, [*prompt, *completion], len(prompt)), INVOCATION))
    return examples


def adapted(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = causal_model(family).to(dtype)
    attach(model, LoRAConfig(rank=4, alpha=8, active="completion", invocation_tokens=INVOCATION), seed=0)
    return randomize_lora_b(model, 0.3, seed=2)


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for _, parameter in adapter_parameters(model)]


@contextlib.contextmanager
def choose_prompts(
    model: nn.Module, examples: list, tokens: int = 40, store_keys: bool = True, **options: object
) -> Iterator[tuple]:
    """Yield the stored prompts, or None, and the choice of how they are stored."""
    batcher, _ = choose_causal_batcher(model, examples, BatcherOptions("cpu", tokens_per_pass=tokens))
    with contextlib.nullcontext() if batcher.padded else packed_rows(model):
        feed = Feed(CausalObjective(model), batcher)
        location = StoreLocation(**options)
        yield stored_prompts(model, feed, examples, location, store_keys=store_keys)


@contextlib.contextmanager
def open_stored_prompts(model: nn.Module, examples: list, folder: Path | None, **options) -> Iterator[StoredPrompts]:
    with choose_prompts(model, examples, folder=folder, **options) as (prompts, choice):
        assert prompts is not None, choice.why
        prompts.choice = choice
        yield prompts
        prompts.close()


def loss_and_gradients(model: nn.Module, objective, batcher, examples) -> tuple[float, Tensor]:
    model.zero_grad()
    loss = torch.stack([objective(batch) for batch in batcher.batches(examples)]).sum()
    loss.backward()
    return loss.item(), gradients_of(model)


def gradients_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in factors(model)])


def reference_gradients(model: nn.Module, examples: list[Example]) -> tuple[float, Tensor]:
    """Return loss and gradients of transformers' own forward, row by row, with the adapter masked by token."""
    model.zero_grad()
    loss = -torch.stack([log_prob(model, row) for row in examples]).sum()
    loss.backward()
    return loss.item(), gradients_of(model)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


class Case:
    """A model and its rows. Checks loss and gradients of a feed against the reference."""

    def __init__(self, kind: str = "llama") -> None:
        family = kind.split()[0]
        exact = kind in EXACT
        self.model = adapted(family, torch.float64 if exact else torch.float32)
        self.examples = rows()
        self.answers = sum(len(row.tokens) - row.active_from for row in self.examples)
        self.loss, self.gradients = reference_gradients(self.model, self.examples)
        self.rounding = (1e-12, 1e-13) if exact else (1e-5, 5e-5)

    def open(self, folder: Path | None, **options: object) -> contextlib.AbstractContextManager[StoredPrompts]:
        return open_stored_prompts(self.model, self.examples, folder, **options)

    def check(self, feed: StoredPrompts) -> int:
        """Return the number of tokens that the backbone processed."""
        token_counts: list[int] = []
        count = lambda module, args, kwargs: token_counts.append(kwargs["input_ids"].numel())  # noqa: E731
        with backbone_of(self.model).register_forward_pre_hook(count, with_kwargs=True):
            loss, gradients = loss_and_gradients(self.model, feed.objective, feed, self.examples)
        assert loss == pytest.approx(self.loss, rel=self.rounding[0])
        assert relative_error(gradients, self.gradients) < self.rounding[1]
        return sum(token_counts)


@pytest.mark.parametrize("kind", slow_except("llama", "gemma3", EXACT[0], names=(*FAMILIES, *EXACT)))
def test_loss_and_gradients_equal_masked_rows(kind, tmp_path):
    case = Case(kind)
    with case.open(tmp_path) as prompts:
        assert prompts.choice.value == "kept"
        for _ in range(2):  # computed, then read
            case.check(prompts)
        reference = loss_and_gradients(case.model, prompts.objective, prompts.batcher, case.examples)
    always_active = [replace(row, active_from=0) for row in case.examples]
    batcher, _ = choose_causal_batcher(case.model, always_active, BatcherOptions("cpu"))
    with packed_rows(case.model):
        active_everywhere = loss_and_gradients(case.model, CausalObjective(case.model), batcher, always_active)
    assert relative_error(reference[1], case.gradients) < 5e-5
    assert relative_error(active_everywhere[1], reference[1]) > 0.1  # otherwise the test is meaningless


def test_later_epochs_and_runs_reuse_stored_prompts(tmp_path):
    case = Case()
    units = PromptIndex(case.examples).units
    assert units < sum(row.active_from for row in case.examples)  # common prefixes are shared
    with case.open(tmp_path) as prompts:
        batches = list(prompts.batches(case.examples))
        # Rows with the same prompt share its entry in the store. A batch may compute it once per row.
        assert case.answers + units <= case.check(prompts) < sum(len(row.tokens) for row in case.examples)
        assert case.check(prompts) == case.answers == sum(b.tokens for b in prompts.batches(case.examples))
        assert sum(b.tokens for b in batches) >= case.answers + units
        assert all(batch.inputs["adapter_active"].any() for batch in batches)
    case.examples = rows()[::-1]  # new objects with the same content
    with case.open(tmp_path) as prompts:
        assert f"{units:,} of {units:,} tokens already stored" in prompts.choice.why
        assert case.check(prompts) == case.answers
    assert len(list(tmp_path.glob("*/values.bin"))) == 1


def test_prompts_store_no_activations(tmp_path):
    model = adapted("llama")
    examples = rows()
    saved_lengths = []

    def record(tensor: Tensor) -> Tensor:
        saved_lengths.append(tensor.shape[:1].numel())
        return tensor

    with open_stored_prompts(model, examples, tmp_path) as prompts:
        batch = next(iter(prompts.batches(examples)))
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            prompts.objective(batch)
        units = prompts.units_of(batch)
    # Only the row's keys and values are as long as the row.
    row_length_count = saved_lengths.count(len(units))
    assert row_length_count == 2 * model.config.num_hidden_layers
    assert saved_lengths.count(int((units < 0).sum())) > row_length_count


def test_store_with_stale_weights_or_corrupt_values_is_ignored(tmp_path):
    case = Case()
    with case.open(tmp_path) as prompts:
        case.check(prompts)
    (values,) = tmp_path.glob("*/values.bin")
    (np.fromfile(values, np.float32) + 0.1).tofile(values)
    with case.open(tmp_path) as prompts:
        assert not prompts.store.done.any() and "already stored" not in prompts.choice.why
        case.check(prompts)
    case.model.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1e-3
    with case.open(tmp_path) as prompts:
        assert not prompts.store.done.any()
    assert len(list(tmp_path.glob("*/values.bin"))) == 2


@pytest.mark.parametrize(("store_keys", "tokens"), [(False, 1), (False, 17), (False, 1000), (True, 40)])
def test_prompts_are_recomputed_if_storage_is_full(store_keys, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_cache, "MEMORY_BYTES", 0)
    case = Case()
    with case.open(tmp_path, store_keys=store_keys, limit=1, tokens=tokens) as prompts:
        assert prompts.choice.value == "recomputed" and prompts.store.shape.bytes == 0
        assert ("take" in prompts.choice.why) == store_keys
        assert all(case.check(prompts) > case.answers for _ in range(2 if store_keys else 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("in_memory", [False, True])
def test_limited_storage_keeps_a_part_of_the_prompts(in_memory, tmp_path, monkeypatch):
    case = Case()
    units = PromptIndex(case.examples).units
    limit = units * 2 * 2 * 2 * 8 * 4 * 3 // 5  # three fifths of layers · (key, value) · heads · d · bytes
    monkeypatch.setattr(prefix_cache, "MEMORY_BYTES", limit if in_memory else 0)
    for run in range(2):
        with case.open(tmp_path, limit=1 if in_memory else limit) as prompts:
            assert "once for 50% of their tokens" in prompts.choice.why
            assert prompts.store.shape.units == units // 2 and "take" in prompts.choice.why
            for epoch in range(2):
                stored = units // 2 if epoch or (run and not in_memory) else 0
                computed = case.check(prompts)
                assert computed >= case.answers + units - stored
            assert computed < case.answers + units


def test_activation_checkpointing_reuses_stored_keys_and_releases_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "RESIDENT_BYTES", 4096)
    case = Case()
    checkpoint_blocks(case.model, True, factors(case.model))
    with case.open(tmp_path) as prompts:
        for _ in range(2):
            case.check(prompts)
        assert prompts.store.resident_bytes == 4096 < prompts.store.shape.bytes


def test_per_row_losses_of_groups_cover_completions(tmp_path):
    model = adapted("llama")
    examples = rows(8)
    groups = [RowGroup((examples[n], examples[n + 1])) for n in range(0, 8, 2)]
    sums = {}
    with open_stored_prompts(model, groups, tmp_path) as prompts:
        for batch in prompts.batches(groups):
            per_row = RowLogProbs.of(batch, prompts.objective.token_log_probs(batch))
            sums.update(zip(map(id, per_row.rows), per_row.sums().tolist(), strict=True))
            assert len(batch.sizes) == batch.rows / 2
    expected = [-reference_gradients(model, [row])[0] for row in examples]
    assert [sums[id(row)] for row in examples] == pytest.approx(expected, rel=1e-5)


def test_unknown_rows_run_without_stored_prompts(tmp_path):
    model = adapted("llama")
    examples = rows(12)
    with open_stored_prompts(model, examples[:9], tmp_path) as prompts:
        actual = loss_and_gradients(model, prompts.objective, prompts, examples[9:])
        evaluated = evaluate_causal(prompts.objective, examples, prompts).metrics["loss"]
    assert relative_error(actual[1], reference_gradients(model, examples[9:])[1]) < 5e-5
    labels = sum(row.label_count for row in examples)
    assert evaluated == pytest.approx(reference_gradients(model, examples)[0] / labels, rel=1e-5)


def test_model_without_packing_uses_masked_padded_rows():
    model = adapted("bloom")
    examples = rows()
    batcher, _ = choose_causal_batcher(model, examples, BatcherOptions("cpu"))
    with choose_prompts(model, examples) as (prompts, choice):
        assert prompts is None and choice.value == "masked" and "padded" in choice.why
    actual = loss_and_gradients(model, CausalObjective(model), batcher, examples)
    assert relative_error(actual[1], reference_gradients(model, examples)[1]) < 5e-5


def test_model_with_different_split_outputs_runs_entire_rows(monkeypatch):
    model = adapted("llama")
    original = packing_checks._run
    assert packing_checks.can_run_separately(model).value
    monkeypatch.setattr(packing_checks, "_DIFFERENCES", {})
    # Simulates an adapter that also acts on the prompt.
    monkeypatch.setattr(packing_checks, "_run", lambda *args, acting: original(*args, acting=True))
    with choose_prompts(model, rows()) as (prompts, choice):
        assert prompts is None and "has different outputs" in choice.why


@pytest.fixture
def make_config(settings, tmp_path):
    def make(**changes: object) -> dict:
        defaults = {"data": {"eval": 3}, "lora": {"active": "completion"}}
        train = {"epochs": 3, "batch_size": 4, "learning_rate": 0.02}
        return deep_merge(settings(tmp_path / "run", **defaults, train=train), changes)

    return make


def test_run_trains_saves_and_evaluates_activated_adapter(make_config, model_folder):
    result = fit(make_config())
    invocation = byte_tokenizer()("<|im_start|>assistant\n")["input_ids"]
    saved = json.loads((result.output / "adapter_config.json").read_text())
    assert saved["alora_invocation_tokens"] == invocation
    config_text = (result.output / "run.yaml").read_text()
    assert "opens the answer in the chat template" in config_text and "keep_features: auto  # kept" in config_text
    steps = metrics(result.output, "computed_tokens")
    assert steps[-1]["loss"] < steps[0]["loss"]
    # The base model's evaluation before the first step has already stored the shared prefix.
    assert steps[-1]["computed_tokens"] < 0.6 * steps[0]["computed_tokens"]

    run = open_on_cpu(result.output)
    examples, _ = run.task.read_file(make_config()["data"]["train"], run.data, None)
    base, other = (AutoModelForCausalLM.from_pretrained(model_folder).eval() for _ in range(2))
    theirs = PeftModel.from_pretrained(other, result.output).eval()
    labels = sum(row.label_count for row in examples)
    with torch.no_grad():
        for row in examples:
            ids = torch.from_numpy(row.tokens).long()[None]
            ours, peft = (m(input_ids=ids).logits for m in (run.model, theirs))
            torch.testing.assert_close(ours, peft, rtol=1e-4, atol=1e-4)
        adapted_loss, bare_loss = (-float(sum(log_prob(m, row) for row in examples)) / labels for m in (theirs, base))
    score = run.score(examples)
    batcher, _ = choose_causal_batcher(run.model, examples, BatcherOptions("cpu"))
    assert not batcher.padded  # rows can be packed although the model has an adapter
    assert score.metrics["loss"] == pytest.approx(adapted_loss, rel=1e-4)
    prompt = examples[0].tokens[: examples[0].prompt_length]
    assert run.invocation_warning([prompt]) is None
    assert "1 of 2 prompts do not have '<|im_start|>assistant" in run.invocation_warning([prompt, prompt[:3]])
    with run.base():
        bare_score = run.score(examples)
    assert bare_score.metrics["loss"] == pytest.approx(bare_loss, rel=1e-4)


def test_single_epoch_writes_no_store_and_equals_masked_training(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    one_epoch = {"train": {"epochs": 1, "batch_size": 7}}
    result = fit(make_config(**one_epoch))
    assert "recomputed: prompts run without the adapter" in (result.output / "run.yaml").read_text()
    assert not (tmp_path / "cache" / "features").exists()
    masked = (None, Choice("masked", "a test"))
    monkeypatch.setattr("deltaw.training.session.stored_prompts", lambda *args, **kwargs: masked)
    masked_run = fit(make_config(output=str(tmp_path / "whole"), **one_epoch))
    assert result.outcome.loss == pytest.approx(masked_run.outcome.loss, rel=1e-3)


def test_invocation_is_read_from_text_ids_or_prompt_ending(make_config, tmp_path):
    file = write_rows(tmp_path / "plain.jsonl", ({"prompt": f"{c}? Answer:", "completion": f" {c[0]}"} for c in COLORS))
    tokenizer = byte_tokenizer()
    data = {"train": str(file), "template": "plain"}
    for invocation, expected in ((None, "? Answer:"), ("Answer:", "Answer:"), (tokenizer(":")["input_ids"], ":")):
        session = build_session(make_config(data=data, lora={"invocation_tokens": invocation}))
        tokens = session.chosen["lora.invocation_tokens"].value
        assert tokenizer.decode(tokens) == expected
        assert all(row.active_from == row.prompt_length - len(tokens) for row in session.data.train)
        session.close()


def test_unsupported_data_and_tasks_are_rejected(make_config, tmp_path):
    def data(name, rows, **options):
        return {"train": str(write_rows(tmp_path / name, rows)), **options}

    plain = data("plain.jsonl", ({"prompt": c, "completion": c[0]} for c in "abcdefgh"), template="plain")
    roles = ("user", "assistant", "user", "assistant")
    rows_of_turns = ({"messages": [{"role": r, "content": f"{c}{n}"} for n, r in enumerate(roles)]} for c in COLORS)
    conversations = data("talk.jsonl", rows_of_turns)
    labels = data("labels.jsonl", ({"text": c, "label": c[0]} for c in COLORS * 2))
    for changes, words, hint in (
        ({"data": plain}, "no invocation sequence can be derived", "Answer:"),
        ({"data": plain, "lora": {"invocation_tokens": "zz"}}, "[58] of [58] rows do not have", ""),
        ({"data": conversations}, "labels before the last", "data.labels: last"),
        ({"data": labels, "task": "sequence-classification"}, "models that generate an answer", ""),
    ):
        error = refusal(fit, make_config(**changes), match=words)
        assert hint in (error.hint or "")
    build_session(make_config(data={**conversations, "labels": "last"})).close()
