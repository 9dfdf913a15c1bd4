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
from tests.training.loops import example, moved
from tests.training.runs import metrics, often, opened, session_of
from tests.training.test_losses import log_prob

INVOCATION = [5, 7, 9]
FAMILIES = ("llama", "gpt2", "gemma2", "gemma3", "qwen3", "neox", "phi3", "cohere")
# Of these families transformers' own code computes in float64 throughout.
EXACT = ("gpt2 in float64", "neox in float64", "phi in float64")


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


def adapted(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = causal_model(family).to(dtype)
    attach(model, LoRAConfig(rank=4, alpha=8, activation="completion", invocation_tokens=INVOCATION), seed=0)
    return moved(model, 0.3, seed=2)


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for _, parameter in adapter_parameters(model)]


@contextlib.contextmanager
def offered(model: nn.Module, examples: list, tokens: int = 40, **how: object) -> Iterator[tuple]:
    """Prompts that run apart, and how they are kept."""
    batcher, _ = choose_causal_batcher(model, examples, device="cpu", tokens_per_pass=tokens)
    with contextlib.nullcontext() if batcher.padded else packed_rows(model):
        yield stored_prompts(model, CausalObjective(model), batcher, examples, **how)


@contextlib.contextmanager
def prompts_of(model: nn.Module, examples: list, folder: Path | None, **how: object) -> Iterator[StoredPrompts]:
    with offered(model, examples, folder=folder, **how) as (prompts, choice):
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


def masked(model: nn.Module, examples: list[Example]) -> tuple[float, Tensor]:
    """The definition: rows one by one through the model's own code, whose adapter looks at the tokens."""
    model.zero_grad()
    loss = -torch.stack([log_prob(model, row) for row in examples]).sum()
    loss.backward()
    return loss.item(), gradients_of(model)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Case:
    """A model, its rows, and a check of a feed's loss and gradients against the definition."""

    def __init__(self, kind: str = "llama") -> None:
        family, exact = kind.split()[0], kind in EXACT
        self.model, self.examples = adapted(family, torch.float64 if exact else torch.float32), rows()
        self.answers = sum(len(row.tokens) - row.active_from for row in self.examples)
        self.loss, self.gradients = masked(self.model, self.examples)
        self.rounding = (1e-12, 1e-13) if exact else (1e-5, 5e-5)

    def open(self, folder: Path | None, **how: object) -> contextlib.AbstractContextManager[StoredPrompts]:
        return prompts_of(self.model, self.examples, folder, **how)

    def check(self, feed: StoredPrompts) -> int:
        """How many tokens the backbone was given meanwhile."""
        seen: list[int] = []
        with backbone_of(self.model).register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        ):
            loss, gradients = loss_and_gradients(self.model, feed.objective, feed, self.examples)
        assert loss == pytest.approx(self.loss, rel=self.rounding[0])
        assert relative(gradients, self.gradients) < self.rounding[1]
        return sum(seen)


@pytest.mark.parametrize("kind", often("llama", "gpt2", "gemma3", "neox", EXACT[0], of=(*FAMILIES, *EXACT)))
def test_loss_and_gradients_are_those_of_masked_rows(kind, tmp_path):
    case = Case(kind)
    with case.open(tmp_path) as prompts:
        assert prompts.choice.value == "kept"
        for _ in range(2):  # computed, then read
            case.check(prompts)
        whole = loss_and_gradients(case.model, prompts.objective, prompts.batcher, case.examples)
    everywhere = [replace(row, active_from=0) for row in case.examples]
    batcher, _ = choose_causal_batcher(case.model, everywhere, device="cpu")
    with packed_rows(case.model):
        other = loss_and_gradients(case.model, CausalObjective(case.model), batcher, everywhere)
    assert relative(whole[1], case.gradients) < 5e-5
    assert relative(other[1], whole[1]) > 0.1  # or else this test shows nothing


def test_a_later_epoch_runs_no_token_of_a_prompt_and_the_next_run_finds_the_store(tmp_path):
    case = Case()
    units = PromptIndex(case.examples).units
    assert units < sum(row.active_from for row in case.examples)  # beginnings are shared
    with case.open(tmp_path) as prompts:
        batches = list(prompts.batches(case.examples))
        # Rows of one prompt share its place in the store; a batch may compute it for each of them.
        assert case.answers + units <= case.check(prompts) < sum(len(row.tokens) for row in case.examples)
        assert case.check(prompts) == case.answers == sum(b.tokens for b in prompts.batches(case.examples))
        assert sum(b.tokens for b in batches) >= case.answers + units
        assert all(batch.inputs["adapter_active"].any() for batch in batches)
    case.examples = rows()[::-1]  # their identity is another; what they hold is the same
    with case.open(tmp_path) as prompts:
        assert f"{units:,} of {units:,} tokens there already" in prompts.choice.why
        assert case.check(prompts) == case.answers
    assert len(list(tmp_path.glob("*/values.bin"))) == 1


def test_prompts_keep_no_activations(tmp_path):
    model, examples, kept = adapted("llama"), rows(), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape[:1].numel())
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
    case = Case()
    with case.open(tmp_path) as prompts:
        case.check(prompts)
    (values,) = tmp_path.glob("*/values.bin")
    (np.fromfile(values, np.float32) + 0.1).tofile(values)
    with case.open(tmp_path) as prompts:
        assert not prompts.store.done.any() and "there already" not in prompts.choice.why
        case.check(prompts)
    case.model.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1e-3
    with case.open(tmp_path) as prompts:
        assert not prompts.store.done.any()
    assert len(list(tmp_path.glob("*/values.bin"))) == 2


@pytest.mark.parametrize(("keep", "tokens"), [(False, 1), (False, 17), (False, 1000), (True, 40)])
def test_without_room_prompts_are_recomputed_in_each_step_however_rows_are_cut(keep, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_cache, "MEMORY_BYTES", 0)
    case = Case()
    with case.open(tmp_path, keep=keep, limit=1, tokens=tokens) as prompts:
        assert prompts.choice.value == "recomputed" and prompts.store.shape.bytes == 0
        assert ("take" in prompts.choice.why) == keep
        assert all(case.check(prompts) > case.answers for _ in range(2 if keep else 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("in_memory", [False, True])
def test_where_room_is_short_a_part_of_the_prompts_is_kept(in_memory, tmp_path, monkeypatch):
    case = Case()
    units = PromptIndex(case.examples).units
    room = units * 2 * 2 * 2 * 8 * 4 * 3 // 5  # three fifths of layers · (key, value) · heads · d · bytes
    monkeypatch.setattr(prefix_cache, "MEMORY_BYTES", room if in_memory else 0)
    for run in range(2):
        with case.open(tmp_path, limit=1 if in_memory else room) as prompts:
            assert "once for 50% of their tokens" in prompts.choice.why
            assert prompts.store.shape.units == units // 2 and "take" in prompts.choice.why
            for epoch in range(2):
                known = units // 2 if epoch or (run and not in_memory) else 0
                ran = case.check(prompts)
                assert ran >= case.answers + units - known
            assert ran < case.answers + units


def test_checkpointing_recomputes_answers_over_the_same_keys_whose_pages_are_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "RESIDENT_BYTES", 4096)
    case = Case()
    checkpoint_blocks(case.model, True, factors(case.model))
    with case.open(tmp_path) as prompts:
        for _ in range(2):
            case.check(prompts)
        assert prompts.store.resident_bytes == 4096 < prompts.store.shape.bytes


def test_rows_in_groups_and_losses_of_rows_see_the_answers(tmp_path):
    model, examples = adapted("llama"), rows(8)
    groups = [RowGroup((examples[n], examples[n + 1])) for n in range(0, 8, 2)]
    sums = {}
    with prompts_of(model, groups, tmp_path) as prompts:
        for batch in prompts.batches(groups):
            per_row = RowLogProbs.of(batch, prompts.objective.token_log_probs(batch))
            sums.update(zip(map(id, per_row.rows), per_row.sums().tolist(), strict=True))
            assert len(batch.groups) == batch.rows / 2
    expected = [-masked(model, [row])[0] for row in examples]
    assert [sums[id(row)] for row in examples] == pytest.approx(expected, rel=1e-5)


def test_rows_that_are_not_known_run_as_a_whole(tmp_path):
    model, examples = adapted("llama"), rows(12)
    with prompts_of(model, examples[:9], tmp_path) as prompts:
        ours = loss_and_gradients(model, prompts.objective, prompts, examples[9:])
        evaluated = evaluate_causal(prompts.objective, examples, prompts).metrics["loss"]
    assert relative(ours[1], masked(model, examples[9:])[1]) < 5e-5
    labels = sum(row.label_count for row in examples)
    assert evaluated == pytest.approx(masked(model, examples)[0] / labels, rel=1e-5)


def test_a_model_that_cannot_pack_runs_padded_rows_with_the_adapter_masked():
    model, examples = adapted("bloom"), rows()
    batcher, _ = choose_causal_batcher(model, examples, device="cpu")
    with offered(model, examples) as (prompts, choice):
        assert prompts is None and choice.value == "masked" and "padded" in choice.why
    ours = loss_and_gradients(model, CausalObjective(model), batcher, examples)
    assert relative(ours[1], masked(model, examples)[1]) < 5e-5


def test_a_model_that_gives_something_else_apart_runs_whole_rows(monkeypatch):
    model, own = adapted("llama"), partial_check._run
    assert partial_check.can_run_apart(model).value
    monkeypatch.setattr(partial_check, "_DIFFERENCES", {})
    # As if the adapter acted on the prompt as well.
    monkeypatch.setattr(partial_check, "_run", lambda *of, acting: own(*of, acting=True))
    with offered(model, rows()) as (prompts, choice):
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
    # Before the first step, the evaluation of the base model has kept what all rows share.
    assert steps[-1]["computed_tokens"] < 0.6 * steps[0]["computed_tokens"]

    run = opened(result.output)
    examples, _ = run.task.read_file(activating()["data"]["train"], run.data, None)
    base, other = (AutoModelForCausalLM.from_pretrained(model_folder).eval() for _ in range(2))
    theirs = PeftModel.from_pretrained(other, result.output).eval()
    labels = sum(row.label_count for row in examples)
    with torch.no_grad():
        for row in examples:
            ids = torch.from_numpy(row.tokens).long()[None]
            ours, peft = (m(input_ids=ids).logits for m in (run.model, theirs))
            torch.testing.assert_close(ours, peft, rtol=1e-4, atol=1e-4)
        adapted_loss, bare_loss = (-float(sum(log_prob(m, row) for row in examples)) / labels for m in (theirs, base))
    score = score_run(run, examples)
    batcher, _ = choose_causal_batcher(run.model, examples, device="cpu")
    assert not batcher.padded  # that the adapter is on the model does not keep its rows from being packed
    assert score.metrics["loss"] == pytest.approx(adapted_loss, rel=1e-4)
    prompt = examples[0].tokens[: examples[0].prompt_length]
    assert run.not_invoked([prompt]) is None
    assert "1 of 2 prompts do not have '<|im_start|>assistant" in run.not_invoked([prompt, prompt[:3]])
    with run.base():
        bare_score = score_run(run, examples)
    assert bare_score.metrics["loss"] == pytest.approx(bare_loss, rel=1e-4)


def test_one_epoch_keeps_nothing_on_the_disk_and_trains_as_masked_rows_do(activating, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    one_epoch = {"train": {"epochs": 1, "batch_size": 7}}
    result = fit(activating(**one_epoch))
    assert "recomputed: prompts run without the adapter" in (result.output / "run.yaml").read_text()
    assert not (tmp_path / "cache" / "features").exists()
    monkeypatch.setattr("deltaw.training.session.stored_prompts", lambda *of, **how: (None, Choice("masked", "a test")))
    whole = fit(activating(output=str(tmp_path / "whole"), **one_epoch))
    assert result.outcome.loss == pytest.approx(whole.outcome.loss, rel=1e-3)


def test_text_and_ids_and_endings_of_plain_prompts_invoke(activating, tmp_path):
    file = write_rows(tmp_path / "plain.jsonl", ({"prompt": f"{c}? Answer:", "completion": f" {c[0]}"} for c in COLORS))
    tokenizer, data = byte_tokenizer(), {"train": str(file), "template": "plain"}
    for given, expected in ((None, "? Answer:"), ("Answer:", "Answer:"), (tokenizer(":")["input_ids"], ":")):
        session = session_of(activating(data=data, lora={"invocation_tokens": given}))
        found = session.chosen["lora.invocation_tokens"].value
        assert tokenizer.decode(found) == expected
        assert all(row.active_from == row.prompt_length - len(found) for row in session.data.train)
        session.close()


def test_what_cannot_be_trained_so_is_refused(activating, tmp_path):
    def data(name, rows, **more):
        return {"train": str(write_rows(tmp_path / name, rows)), **more}

    plain = data("plain.jsonl", ({"prompt": c, "completion": c[0]} for c in "abcdefgh"), template="plain")
    roles = ("user", "assistant", "user", "assistant")
    talk = ({"messages": [{"role": r, "content": f"{c}{n}"} for n, r in enumerate(roles)]} for c in COLORS)
    talks = data("talk.jsonl", talk)
    labels = data("labels.jsonl", ({"text": c, "label": c[0]} for c in COLORS * 2))
    for changes, words, hint in (
        ({"data": plain}, "no invocation sequence can be derived", "Answer:"),
        ({"data": plain, "lora": {"invocation_tokens": "zz"}}, "[58] of [58] rows do not have", ""),
        ({"data": talks}, "labels before the last", "data.labels: last"),
        ({"data": labels, "task": "sequence-classification"}, "models that write an answer", ""),
    ):
        with pytest.raises(UserError, match=words) as refused:
            fit(activating(**changes))
        assert hint in (refused.value.hint or "")
    fit(activating(data={**talks, "labels": "last"}, train={"max_steps": 1}))
