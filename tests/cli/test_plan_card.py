"""Plans for a card that is not on this machine."""

from __future__ import annotations

import json
import shutil

import pytest

from deltaw.errors import UserError
from deltaw.machine.choices import assumed_cards, choose_device
from tests.conftest import write_rows

pytestmark = pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="plans for a card that is absent")

LLAMA_8B = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "vocab_size": 128256}
LLAMA_8B |= {"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_8B |= {"max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}


@pytest.fixture
def plan_of(call, settings, tmp_path):
    """Return the plan that ``deltaw plan`` prints for a run on ``cuda``."""

    def plan(*flags: str, **changes) -> dict:
        (tmp_path / "run.json").write_text(json.dumps(settings(tmp_path / "run", device="cuda", **changes)))
        result = call("plan", str(tmp_path / "run.json"), "--methods", "lora", "--json", *flags)
        return {**json.loads(result.out)["lora"], "messages": result.err}

    return plan


def test_card_is_only_assumed_for_plans():
    with pytest.raises(UserError):
        choose_device("cuda")
    with assumed_cards():
        assert choose_device("cuda").value == "cuda"
    with pytest.raises(UserError):
        choose_device("cuda")


def test_plan_contains_context_and_main_memory(plan_of):
    plan = plan_of()
    assert plan["device"] == "cuda" and plan["overhead"]["context"] > 400 << 20
    assert plan["resident"]["process"] == 0 and plan["resident"]["kernels"] > 0
    assert plan["host_bytes"] > plan["parts"]["weights"]
    assert plan["seconds"] is None and "not predicted" in plan["time_uncertain"]


def test_report_names_the_missing_card(call, settings, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(settings(tmp_path / "run", device="cuda")))
    report = call("plan", str(tmp_path / "run.json")).out
    assert "this machine has no such card" in report and "main memory while the weights are loaded" in report
    report = call("plan", str(tmp_path / "run.json"), "--memory", "24GB").out
    assert "of the 24.00 GB that are available: fits" in report


@pytest.mark.slow
@pytest.mark.parametrize("precision, minimum, maximum", [("nf4", 5.5e9, 6e9), ("int8", 9e9, 9.2e9)])
def test_quantized_llama_8b_fits_card_without_bitsandbytes(precision, minimum, maximum, llama_8b, plan_of):
    plan = plan_of("--memory", "16GB", precision=precision, **llama_8b)
    assert minimum < plan["parts"]["weights"] < maximum and plan["precision"] == precision
    assert plan["peak_resident_bytes"] + sum(plan["overhead"].values()) < 16e9


@pytest.fixture
def llama_8b(model_folder, tmp_path) -> dict:
    """Settings of a run of Llama 3.1 8B, of which only the configuration exists."""
    folder = tmp_path / "llama-8b"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    rows = [{"prompt": "a" * (500 + 10 * n), "completion": "b" * 300} for n in range(64)]
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "eval": 4}
    return {"model": str(folder), "data": data, "train": {"batch_size": 16}}


@pytest.mark.slow
def test_llama_8b_fits_24_gb_by_default(llama_8b, plan_of):
    plan = plan_of("--memory", "24GB", precision="bf16", **llama_8b)
    required = plan["peak_resident_bytes"] + sum(plan["overhead"].values())
    assert 16e9 < plan["parts"]["weights"] < 16.2e9 and required < 24e9
    assert "to fit the card: microbatches of 2048 tokens" in plan["messages"]
