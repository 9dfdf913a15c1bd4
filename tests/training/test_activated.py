"""Training an activated adapter: prompts run apart, once, and the gradients are those of masked rows."""

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

from deltaw.data.example import Example, RowGroup
from deltaw.data.invocation import activated
from deltaw.errors import UserError
from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.machine.choices import Choice
from deltaw.runs.fit import fit
from deltaw.runtime import partial_check
from deltaw.runtime.packed import backbone_of, packed_rows
from deltaw.training.features import prefix_cache, store
from deltaw.training.features.prompts import PromptIndex, StoredPrompts, stored_prompts
from deltaw.training.losses import RowLogProbs
from deltaw.training.origin import score_run
from deltaw.training.preparation import checkpoint_blocks
from deltaw.training.tasks.causal import evaluate_causal
from deltaw.training.tasks.causal_batcher import choose_causal_batcher
from deltaw.training.tasks.causal_objective import CausalObjective
from tests.byte_models import byte_tokenizer
from tests.conftest import COLORS, laid_over, write_rows
from tests.tiny_models import causal_model
from tests.training.loops import example
from tests.training.runs import metrics, often, opened, session_of
from tests.training.test_losses import log_prob

INVOCATION = [5, 7, 9]
FAMILIES = ("llama", "gpt2", "gemma2", "gemma3", "qwen3", "neox", "phi3", "cohere")


def rows(count: int = 9) -> list[Example]:
    """Rows some of whose prompts begin alike, and two of whose prompts are the same."""
    chance = np.random.default_rng(0)
    stem, made = chance.integers(10, 97, 8), []
    for n in range(count):
        begin = stem[: chance.integers(3, 9)] if n % 3 else stem[:0]
        prompt = np.concatenate([begin, chance.integers(10, 97, chance.integers(2, 9)), INVOCATION])
        if n == 4:
            prompt = made[3].tokens[: made[3].prompt_length]
        answer = chance.integers(10, 97, chance.integers(1, 6))
        made.append(activated(example(n + 1, [*prompt, *answer], len(prompt)), INVOCATION))
    return made


def adapted(family: str, dtype: torch.dtype = torch.float32, **changes: object) -> nn.Module:
    model = causal_model(family).to(dtype)
    settings = {"rank": 4, "alpha": 8, "activation": "completion", "invocation_tokens": INVOCATION}
    attach(model, LoRAConfig(**{**settings, **changes}), seed=0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return model


@contextlib.contextmanager
def prompts_of(model: nn.Module, examples: list, folder: Path, **how: object) -> Iterator[StoredPrompts]:
    batcher, _ = choose_causal_batcher(model, examples, device="cpu", tokens_per_pass=40)
    with packed_rows(model):
        prompts, choice = stored_prompts(model, CausalObjective(model), batcher, examples, folder=folder, **how)
        assert prompts is not None, choice.why
        prompts.choice = choice
        yield prompts
        prompts.close()


def loss_and_gradients(model: nn.Module, objective, batcher, examples) -> tuple[Tensor, list[Tensor]]:
    factors = [p for _, p in adapter_parameters(model)]
    loss, grads = torch.zeros(()), [torch.zeros_like(p) for p in factors]
    for batch in batcher.batches(examples):
        part = objective(batch)
        loss = loss + part.detach()
        for total, grad in zip(grads, torch.autograd.grad(part, factors), strict=True):
            total += grad
    return loss, grads


def masked(model: nn.Module, examples: list[Example]) -> tuple[Tensor, list[Tensor]]:
    """The definition: rows one by one through the model's own code, whose adapter looks at the tokens."""
    loss = -torch.stack([log_prob(model, row) for row in examples]).sum()
    return loss.detach(), list(torch.autograd.grad(loss, [p for _, p in adapter_parameters(model)]))


@contextlib.contextmanager
def tokens_run(model: nn.Module) -> Iterator[list[int]]:
    """How many tokens each call of the backbone sees."""
    seen: list[int] = []
    with backbone_of(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    ):
        yield seen


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    difference = sum((a - b).double().square().sum() for a, b in zip(found, expected, strict=True))
    return float((difference / sum(b.double().square().sum() for b in expected)).sqrt())


def case(family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple:
    """A model, its rows, their answers' tokens, and a check of a feed's loss and gradients against the definition."""
    model, examples = adapted(family, dtype), rows()
    loss, grads = masked(model, examples)
    exact = dtype == torch.float64

    def check(feed: StoredPrompts) -> None:
        ours = loss_and_gradients(model, feed.objective, feed, examples)
        assert float(ours[0]) == pytest.approx(float(loss), rel=1e-12 if exact else 1e-5)
        assert relative(ours[1], grads) < (1e-13 if exact else 5e-5)

    return model, examples, sum(len(row.tokens) - row.active_from for row in examples), check


@pytest.mark.parametrize("family", often("llama", "gpt2", "gemma3", "neox", of=FAMILIES))
def test_loss_and_gradients_are_those_of_masked_rows(family, tmp_path):
    model, examples, _, check = case(family)
    with prompts_of(model, examples, tmp_path) as prompts:
        assert prompts.choice.value == "kept"
        for _ in range(2):  # computed, then read
            check(prompts)
        whole = loss_and_gradients(model, prompts.objective, prompts.batcher, examples)
    everywhere = [replace(row, active_from=0) for row in examples]
    batcher, _ = choose_causal_batcher(model, everywhere, device="cpu")
    with packed_rows(model):
        other = loss_and_gradients(model, CausalObjective(model), batcher, everywhere)
    assert relative(whole[1], masked(model, examples)[1]) < 5e-5
    assert relative(other[1], whole[1]) > 0.1  # or else this test shows nothing


@pytest.mark.parametrize("family", often("gpt2", of=("gpt2", "neox", "phi")))
def test_gradients_are_those_of_masked_rows_in_float64(family, tmp_path):
    # Of these families transformers' own code computes in float64 throughout.
    model, examples, _, check = case(family, torch.float64)
    with prompts_of(model, examples, tmp_path) as prompts:
        for _ in range(2):
            check(prompts)


def test_a_later_epoch_runs_no_token_of_a_prompt_and_the_next_run_finds_the_store(tmp_path):
    model, examples, answers, check = case()
    index = PromptIndex(examples)
    assert index.units < sum(row.active_from for row in examples)  # beginnings are shared
    with prompts_of(model, examples, tmp_path) as prompts, tokens_run(model) as seen:
        batches = list(prompts.batches(examples))
        check(prompts)
        # Rows of one prompt share its place in the store; a batch may compute it for each of them.
        assert answers + index.units <= sum(seen) < sum(len(row.tokens) for row in examples)
        seen.clear()
        check(prompts)
        assert sum(seen) == answers
        assert sum(b.tokens for b in prompts.batches(examples)) == answers
        assert sum(b.tokens for b in batches) >= answers + index.units
        assert all(batch.inputs["adapter_active"].any() for batch in batches)
    examples.reverse()
    with prompts_of(model, rows()[::-1], tmp_path) as prompts, tokens_run(model) as seen:
        # The rows' identity is another; what they hold is the same.
        assert f"{index.units:,} of {index.units:,} tokens there already" in prompts.choice.why
        check(prompts)
        assert sum(seen) == answers
    assert len(list(tmp_path.glob("*/values.bin"))) == 1


def test_prompts_keep_no_activations(tmp_path):
    model, examples = adapted("llama"), rows()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape[0] if tensor.dim() else 0)
        return tensor

    with prompts_of(model, examples, tmp_path) as prompts:
        batch = next(iter(prompts.batches(examples)))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            prompts.objective(batch)
        units = prompts.units_of(batch)
    # The row's keys and values alone are as long as the row.
    long = kept.count(len(units))
    assert long == 2 * model.config.num_hidden_layers and kept.count(int((units < 0).sum())) > long


def test_a_store_of_other_weights_or_wrong_values_is_not_believed(tmp_path):
    model, examples, _, check = case()
    with prompts_of(model, examples, tmp_path) as prompts:
        check(prompts)
    (values,) = tmp_path.glob("*/values.bin")
    (np.fromfile(values, np.float32) + 0.1).tofile(values)
    with prompts_of(model, examples, tmp_path) as prompts:
        assert not prompts.store.done.any() and "there already" not in prompts.choice.why
        check(prompts)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-3
    with prompts_of(model, examples, tmp_path) as prompts:
        assert not prompts.store.done.any()
    assert len(list(tmp_path.glob("*/values.bin"))) == 2


@pytest.mark.parametrize("keep", [False, True])
def test_without_room_prompts_are_recomputed_in_each_step(keep, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_cache, "MEMORY_BYTES", 0)
    model, examples, answers, check = case()
    with prompts_of(model, examples, tmp_path, keep=keep, limit=1) as prompts, tokens_run(model) as seen:
        assert prompts.choice.value == "recomputed" and prompts.store.shape.bytes == 0
        assert ("take" in prompts.choice.why) == keep
        for _ in range(2):
            seen.clear()
            check(prompts)
            assert sum(seen) > answers
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("in_memory", [False, True])
def test_where_room_is_short_a_part_of_the_prompts_is_kept(in_memory, tmp_path, monkeypatch):
    model, examples, answers, check = case()
    units = PromptIndex(examples).units
    room = units * 2 * 2 * 2 * 8 * 4 * 3 // 5  # three fifths of layers · (key, value) · heads · d · bytes
    monkeypatch.setattr(prefix_cache, "MEMORY_BYTES", room if in_memory else 0)
    for run in range(2):
        how = {"limit": 1 if in_memory else room}
        with prompts_of(model, examples, tmp_path, **how) as prompts, tokens_run(model) as seen:
            assert "once for 50% of their tokens" in prompts.choice.why
            assert prompts.store.shape.units == units // 2 and "take" in prompts.choice.why
            for epoch in range(2):
                seen.clear()
                check(prompts)
                known = units // 2 if epoch or (run and not in_memory) else 0
                assert sum(seen) >= answers + units - known
            assert sum(seen) < answers + units


def test_pages_of_a_large_store_are_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "RESIDENT_BYTES", 4096)
    model, examples, _, check = case()
    with prompts_of(model, examples, tmp_path) as prompts:
        for _ in range(2):
            check(prompts)
        assert prompts.store.resident_bytes == 4096 < prompts.store.shape.bytes


def test_how_rows_are_cut_changes_nothing():
    model, examples, _, check = case()
    for tokens in (1, 17, 1000):
        batcher, _ = choose_causal_batcher(model, examples, device="cpu", tokens_per_pass=tokens)
        with packed_rows(model):
            check(stored_prompts(model, CausalObjective(model), batcher, examples, keep=False)[0])


def test_checkpointing_recomputes_answers_over_the_same_keys(tmp_path):
    model, examples, _, check = case()
    checkpoint_blocks(model, True, [p for _, p in adapter_parameters(model)])
    with prompts_of(model, examples, tmp_path) as prompts:
        for _ in range(2):
            check(prompts)


def test_rows_in_groups_and_losses_of_rows_see_the_answers(tmp_path):
    model, examples = adapted("llama"), rows(8)
    groups = [RowGroup((examples[n], examples[n + 1])) for n in range(0, 8, 2)]
    with prompts_of(model, groups, tmp_path) as prompts:
        sums = {}
        for batch in prompts.batches(groups):
            per_row = RowLogProbs.of(batch, prompts.objective.token_log_probs(batch))
            sums.update(zip(map(id, per_row.rows), per_row.sums().tolist(), strict=True))
            assert len(batch.groups) == batch.rows / 2
    for row in examples:
        assert sums[id(row)] == pytest.approx(-float(masked(model, [row])[0]), rel=1e-5)


def test_rows_that_are_not_known_run_as_a_whole(tmp_path):
    model, examples = adapted("llama"), rows(12)
    expected = masked(model, examples[9:])
    with prompts_of(model, examples[:9], tmp_path) as prompts:
        ours = loss_and_gradients(model, prompts.objective, prompts, examples[9:])
        evaluated = evaluate_causal(prompts.objective, examples, prompts).metrics["loss"]
    assert relative(ours[1], expected[1]) < 5e-5
    labels = sum(row.label_count for row in examples)
    assert evaluated == pytest.approx(float(masked(model, examples)[0]) / labels, rel=1e-5)


def test_a_model_that_cannot_pack_runs_padded_rows_with_the_adapter_masked():
    model, examples = adapted("bloom"), rows()
    expected = masked(model, examples)
    batcher, _ = choose_causal_batcher(model, examples, device="cpu")
    objective = CausalObjective(model)
    prompts, choice = stored_prompts(model, objective, batcher, examples)
    assert prompts is None and choice.value == "masked" and "padded" in choice.why
    ours = loss_and_gradients(model, objective, batcher, examples)
    assert relative(ours[1], expected[1]) < 5e-5


def test_a_model_that_gives_something_else_apart_runs_whole_rows(monkeypatch):
    model, examples = adapted("llama"), rows()
    right = partial_check.can_run_apart(model)
    assert right.value
    own = partial_check._run
    monkeypatch.setattr(partial_check, "_DIFFERENCES", {})
    # As if the adapter acted on the prompt as well.
    monkeypatch.setattr(partial_check, "_run", lambda *of, acting: own(*of, acting=True))
    batcher, _ = choose_causal_batcher(model, examples, device="cpu")
    with packed_rows(model):
        prompts, choice = stored_prompts(model, CausalObjective(model), batcher, examples)
    assert prompts is None and "gives something else" in choice.why


@pytest.fixture
def activating(settings, tmp_path):
    def made(**changes: object) -> dict:
        plain = {"data": {"eval": 3}, "lora": {"activation": "completion"}}
        train = {"epochs": 4, "batch_size": 4, "learning_rate": 0.02}
        return laid_over(settings(tmp_path / "run", **plain, train=train), changes)

    return made


def test_a_run_trains_saves_and_evaluates_an_activated_adapter(activating, model_folder):
    result = fit(activating())
    invocation = byte_tokenizer()("<|im_start|>assistant\n")["input_ids"]
    saved = json.loads((result.output / "adapter_config.json").read_text())
    assert saved["alora_invocation_tokens"] == invocation
    told = (result.output / "run.yaml").read_text()
    assert "opens the answer in the chat template" in told and "keep_features: auto  # kept" in told
    steps = metrics(result.output, "computed_tokens")
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["computed_tokens"] < 0.5 * steps[0]["computed_tokens"]

    run = opened(result.output)
    examples, _ = run.task.read_file(activating()["data"]["train"], run.data, None)
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), result.output).eval()
    labels = sum(row.label_count for row in examples)
    with torch.no_grad():
        for row in examples:
            ids = torch.from_numpy(row.tokens).long()[None]
            ours, peft = (m(input_ids=ids).logits for m in (run.model, theirs))
            torch.testing.assert_close(ours, peft, rtol=1e-4, atol=1e-4)
        adapted_loss, bare_loss = (-float(sum(log_prob(m, row) for row in examples)) / labels for m in (theirs, base))
    score = score_run(run, examples, max_new_tokens=4)
    batcher, _ = choose_causal_batcher(run.model, examples, device="cpu")
    assert not batcher.padded  # that the adapter is on the model does not keep its rows from being packed
    assert score.metrics["loss"] == pytest.approx(adapted_loss, rel=1e-4)
    prompt = examples[0].tokens[: examples[0].prompt_length]
    assert run.not_invoked([prompt]) is None
    assert "1 of 2 prompts do not have '<|im_start|>assistant" in run.not_invoked([prompt, prompt[:3]])
    with run.base():
        bare_score = score_run(run, examples, max_new_tokens=4)
    assert bare_score.metrics["loss"] == pytest.approx(bare_loss, rel=1e-4)


def test_one_epoch_keeps_nothing_on_the_disk_and_trains_as_masked_rows_do(activating, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    result = fit(activating(train={"epochs": 1, "batch_size": 7}))
    assert "recomputed: prompts run without the adapter" in (result.output / "run.yaml").read_text()
    assert not (tmp_path / "cache" / "features").exists()
    monkeypatch.setattr("deltaw.training.session.stored_prompts", lambda *of, **how: (None, Choice("masked", "a test")))
    whole = fit(activating(output=str(tmp_path / "whole"), train={"epochs": 1, "batch_size": 7}))
    assert result.outcome.loss == pytest.approx(whole.outcome.loss, rel=1e-3)


def test_text_and_ids_and_endings_of_plain_prompts_invoke(activating, tmp_path):
    file = write_rows(tmp_path / "plain.jsonl", ({"prompt": f"{c}? Answer:", "completion": f" {c[0]}"} for c in COLORS))
    tokenizer = byte_tokenizer()
    data = {"train": str(file), "template": "plain"}
    for given, expected in ((None, "? Answer:"), ("Answer:", "Answer:"), (tokenizer(":")["input_ids"], ":")):
        session = session_of(activating(data=data, lora={"invocation_tokens": given}))
        found = session.chosen["lora.invocation_tokens"]
        assert tokenizer.decode(found.value) == expected
        assert all(row.active_from == row.prompt_length - len(found.value) for row in session.data.train)
        session.close()


def test_what_cannot_be_trained_so_is_refused(activating, tmp_path):
    plain = write_rows(tmp_path / "plain.jsonl", ({"prompt": c, "completion": c[0]} for c in "abcdefgh"))
    asked = {"data": {"train": str(plain), "template": "plain"}}
    with pytest.raises(UserError, match="no invocation sequence can be derived") as error:
        fit(activating(**asked))
    assert "Answer:" in error.value.hint
    with pytest.raises(UserError, match=r"8 of 8 rows do not have|5 of 5 rows do not have"):
        fit(activating(**asked, lora={"invocation_tokens": "zz"}))
    roles = ("user", "assistant", "user", "assistant")
    talk = ({"messages": [{"role": r, "content": f"{c}{n}"} for n, r in enumerate(roles)]} for c in COLORS)
    several = write_rows(tmp_path / "talk.jsonl", talk)
    with pytest.raises(UserError, match="labels before the last") as error:
        fit(activating(data={"train": str(several)}))
    assert "data.labels: last" in error.value.hint
    fit(activating(data={"train": str(several), "labels": "last"}, train={"max_steps": 1}))
    labels = write_rows(tmp_path / "labels.jsonl", ({"text": c, "label": c[0]} for c in COLORS * 2))
    with pytest.raises(UserError, match="models that write an answer"):
        fit(activating(task="sequence-classification", data={"train": str(labels)}))
