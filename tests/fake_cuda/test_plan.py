"""Plans of runs on CUDA, compared with the allocator of the fake device."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.errors import UserError
from deltaw.kernels import compiled
from deltaw.kernels import rows as rows_kernels
from deltaw.memory.plan import Plan
from deltaw.training.callbacks import Callback
from tests.byte_models import save_model, tiny_llama
from tests.conftest import COLORS, write_rows
from tests.fake_cuda.device import configured
from tests.serving.encoder_models import write_bert
from tests.tiny_models import CAUSAL

pytestmark = pytest.mark.planned


class Lines(Callback):
    """Collects the messages of a run."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_line(self, line: str) -> None:
        self.lines.append(str(line))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, str]:
    """Rows whose activations are larger than the tiny model."""
    folder = tmp_path_factory.mktemp("rows")
    text = " ".join(COLORS)
    return {
        "causal-lm": str(
            write_rows(folder / "texts.jsonl", [{"prompt": f"{text} {n}", "completion": text} for n in range(10, 50)])
        ),
        "sequence-classification": str(
            write_rows(folder / "labels.jsonl", [{"text": f"{text} {n}", "label": str(n % 2)} for n in range(10, 50)])
        ),
    }


@pytest.fixture
def train_on_card(settings, rows, tmp_path):
    """Train on a card with ``total`` bytes. Returns the result, the peak of the allocated memory, and messages."""

    def train(task: str = "causal-lm", total: int | None = None, **changes):
        train = {"batch_size": 16, "max_steps": 3, "drift": False, **changes.pop("train", {})}
        output = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        config = settings(
            output, task=task, device="cuda", data={"train": rows[task], "eval": 3}, train=train, **changes
        )
        callback = Lines()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with configured(**({} if total is None else {"total_memory": total})):
            result = deltaw.fit(config, callback=callback)
        return result, torch.cuda.max_memory_allocated() - before, callback.lines

    return train


@pytest.mark.parametrize("changes", [{}, {"method": "full"}, {"train": {"checkpointing": True}}], ids=str)
def test_plan_of_language_model_equals_allocated_peak(changes, train_on_card):
    result, peak, _ = train_on_card(**changes)
    assert result.plan.device == "cuda" and result.planned_memory_bytes == pytest.approx(peak, rel=0.05)


def test_plan_of_classifier_equals_allocated_peak(train_on_card, tmp_path):
    result, peak, _ = train_on_card("sequence-classification", model=str(write_bert(tmp_path / "bert")))
    assert result.planned_memory_bytes == pytest.approx(peak, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mixtral", "phi3", "qwen3"])
def test_plan_of_family_equals_allocated_peak(family, train_on_card, tmp_path):
    config = CAUSAL[family]()
    config.vocab_size = 259
    torch.manual_seed(0)
    model = str(save_model(AutoModelForCausalLM.from_config(config), tmp_path / family))
    result, peak, _ = train_on_card(model=model)
    assert result.planned_memory_bytes == pytest.approx(peak, rel=0.05)
    smaller, smaller_peak, _ = train_on_card(model=model, memory=str(int(0.8 * result.plan.required_bytes)))
    assert smaller.planned_memory_bytes == pytest.approx(smaller_peak, rel=0.05)


def test_plan_on_gpu_without_compiled_functions_is_that_of_the_models_code(train_on_card, monkeypatch):
    monkeypatch.setattr(compiled, "DEVICES", ("cuda",))
    monkeypatch.setattr(compiled, "_REASONS", {})
    monkeypatch.setattr(rows_kernels._compiled_norm, "_selected", {})
    monkeypatch.setattr(compiled, "compile_function", lambda function: 1 / 0)
    result, peak, lines = train_on_card()
    assert any("norm_reference is not compiled" in line for line in lines)
    assert result.planned_memory_bytes == pytest.approx(peak, rel=0.1)


def test_plan_of_gpu_without_bf16_equals_allocated_peak(train_on_card):
    with configured(capability=(7, 5)):
        result, peak, _ = train_on_card(precision="auto")
    assert result.plan.precision == "fp16" and result.planned_memory_bytes == pytest.approx(peak, rel=0.05)


def test_settings_are_chosen_so_that_the_run_fits_the_card(train_on_card):
    result, peak, _ = train_on_card()
    limit = int(0.75 * result.plan.required_bytes)
    smaller, smaller_peak, lines = train_on_card(memory=str(limit))
    assert smaller.plan.required_bytes <= limit and smaller_peak < peak
    assert smaller.planned_memory_bytes == pytest.approx(smaller_peak, rel=0.05)
    assert any(line.startswith("to fit the card: microbatches of") for line in lines)
    with pytest.raises(UserError) as raised:
        train_on_card(memory="100KB")
    assert raised.value.location == "memory"


def test_memory_setting_above_the_free_memory_does_not_exceed_the_card(train_on_card):
    required = train_on_card()[0].plan.required_bytes
    result, _, lines = train_on_card(total=int(0.75 * required), memory="80GB")
    assert result.plan.required_bytes <= 0.75 * required
    assert any(line.startswith("to fit the card: microbatches of") for line in lines)


def test_exhausted_memory_is_an_error_and_the_run_resumes(train_on_card, settings, rows, tmp_path):
    result, _, _ = train_on_card()
    with pytest.raises(UserError) as raised:
        train_on_card(total=result.plan.parts["weights"] + (2 << 20), force=True)
    assert "the card is out of memory" in raised.value.message and "set memory" in raised.value.hint
    assert "repeat the command" in raised.value.hint or "start over" in raised.value.hint


@pytest.mark.slow
def test_run_resumes_with_smaller_memory_after_a_long_row_exhausts_it(settings, tmp_path):
    model = str(save_model(tiny_llama(max_position_embeddings=2048, num_hidden_layers=16), tmp_path / "model"))
    texts = [{"prompt": str(n), "completion": "red"} for n in range(27)] + [{"prompt": "blue" * 400, "completion": "x"}]
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", texts)), "eval": 0}
    train = {"batch_size": 4, "epochs": 1, "drift": False, "checkpoint_every": 1, "samples": 0}
    options = {"model": model, "data": data, "train": train, "device": "cuda"}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = deltaw.fit(settings(tmp_path / "whole", **options))
    total = int(0.8 * (torch.cuda.max_memory_allocated() - before))
    torch.cuda.empty_cache()
    config = settings(tmp_path / "run", **options)
    with configured(total_memory=total):
        with pytest.raises(UserError) as raised:
            deltaw.fit({**config, "force": True})
        assert "the card is out of memory" in raised.value.message
        assert "repeat the command to resume from step-" in raised.value.hint
        del raised  # its frames have tensors
        gc.collect()
        torch.cuda.empty_cache()
        result = deltaw.fit({**config, "memory": str(total)})
    assert result.resumed_from_step > 0 and result.outcome.steps == whole.outcome.steps
    assert result.plan.required_bytes <= total


def test_plan_is_recorded(train_on_card):
    result, _, _ = train_on_card()
    plan = json.loads((result.output / "run.json").read_text())["plan"]
    assert plan["device"] == "cuda" and plan["peak_resident_bytes"] == result.planned_memory_bytes
    assert plan["host_bytes"] > 0 and set(plan["overhead"]) == {"allocator", "context"}
    assert isinstance(Plan.from_fields(result.plan.to_fields()), Plan)
