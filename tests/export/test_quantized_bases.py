"""Command-line tests of runs over GGUF blocks and NF4: merging, exporting, and reading the adapter in PEFT and
llama.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaw.cli import main
from deltaw.decoding.opening import open_engine
from deltaw.hub.loading import load
from deltaw.inference.open_run import open_run
from deltaw.inference.opened_run import OpenedRun
from deltaw.lora.layers_quantized import BlockLinear
from deltaw.runtime.nf4 import quantize_nf4, round_to_nf4
from tests.byte_models import save_model, tiny_llama
from tests.conftest import write_rows
from tests.export import llama_cpp
from tests.hub.test_gguf import write_gguf

TOKENS = torch.arange(3, 40)[None]
# Relative error of the logits of a tiny model in bf16 arithmetic.
BF16 = 3e-2


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Base models by precision: a .gguf file, and a folder whose row lengths are multiples of NF4's block size."""
    root = tmp_path_factory.mktemp("bases")
    write_gguf(root / "tiny.Q8_0.gguf", spread=0.3)
    save_model(tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.1), root / "wide")
    return {"gguf": root / "tiny.Q8_0.gguf", "nf4": root / "wide"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    colors = ("red", "green", "blue", "yellow", "black")
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    examples = ({"prompt": f"paint it {c} {n}", "completion": f"{c} {c} it is"} for n in range(4) for c in colors)
    return write_rows(path, examples)


@pytest.fixture(scope="module", params=["gguf", "nf4"])
def precision(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(precision, bases, rows, tmp_path_factory) -> Path:
    """Finished run of this precision, trained on the command line."""
    output = tmp_path_factory.mktemp(precision) / "run"
    settings = {
        "model": bases[precision], "data": rows, "output": output, "precision": precision, "threads": 1,
        "train.batch_size": 5, "train.max_steps": 12, "train.learning_rate": 0.02, "train.drift": "false",
        "lora.rank": 4,
    }  # fmt: skip
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    with pytest.raises(SystemExit) as exit_info:
        main(["train", *flags])
    assert not exit_info.value.code
    return output


def open_session(run: Path, precision: str = "auto") -> OpenedRun:
    return open_run(str(run), precision=precision, device="cpu", log=lambda line: None)


def compute_logits(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def relative_difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def test_quantized_run_generates_evaluates_and_merges(run, precision, call, tmp_path):
    for command in (
        ("generate", run, "--prompt", "paint it red ", "--max-new-tokens", 6),
        ("eval", run, "--answers", 2, "--no-drift"),
    ):
        result = call(*command, "--json")
        assert result.status == 0 and "transformers decodes" not in result.err, result.err
    merge_result = call("merge", run, "--output", tmp_path / "merged", "--json")
    assert merge_result.status == 0, merge_result.err
    answer = json.loads(merge_result.out)
    notes = " ".join(answer["notes"])
    verification = answer["verification"]
    assert answer["same_base"] is True and verification["passed"] and verification["adapter"]["mean"] > 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    plain = open_session(run, "fp32")
    # The merged weights are rounded to bf16, a relative error of 2⁻⁹.
    assert relative_difference(compute_logits(merged), compute_logits(plain.model)) < BF16
    if precision == "gguf":
        assert "into the dequantized values" in notes and verification["nf4"] is None
        assert "NF4 weights" not in merge_result.err
    else:
        assert "unquantized weights of the base model's files" in notes
        assert "independent of the merge, the adapter was trained on NF4" in merge_result.err
        assert round_to_nf4(plain.model.base_model) == 14
        rounded = compute_logits(plain.model)
        trained = compute_logits(open_session(run).model)
        assert relative_difference(rounded, trained) < BF16
        assert relative_difference(rounded, compute_logits(merged)) > 2 * BF16  # but different from the merged model
        assert verification["nf4"]["mean"] > 5 * verification["merged"]["mean"]


def test_peft_loads_adapter_over_dequantized_model(run, precision, bases, call, tmp_path):
    result = call("export", run, "--format", "peft", "--output", tmp_path / "peft")
    assert result.status == 0, result.err
    base = load(str(bases[precision]), precision="bf16", device="cpu", threads=1).model
    if precision == "nf4":
        quantize_nf4(base.base_model)
        for name, module in list(base.named_modules()):
            if isinstance(module, BlockLinear):
                plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
                plain.weight.data = module.plain_weight()
                base.set_submodule(name, plain)
    base = base.float().eval()
    bare = compute_logits(base)
    theirs = compute_logits(peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval())
    ours = open_session(run, "bf16")  # the precision in which dequantized blocks are trained
    ours.model.float()
    if precision == "nf4":
        round_to_nf4(ours.model.base_model)
    assert relative_difference(compute_logits(ours.model), theirs) < 1e-5
    quantized = compute_logits(open_session(run).model)
    assert relative_difference(quantized, theirs) < BF16 < relative_difference(bare, theirs)


def test_llama_cpp_applies_adapter_to_the_same_file(run, precision, bases, call, tmp_path):
    if precision != "gguf":
        pytest.skip("applies only to GGUF files")
    pytest.importorskip("xllamacpp", reason="requires llama.cpp from the package xllamacpp")
    result = call("export", run, "--format", "gguf-adapter", "--output", tmp_path / "adapter.gguf")
    assert result.status == 0, result.err
    session = open_session(run)
    tokenizer = session.tokenizer
    colors = ("red", "blue", "black", "green")
    contexts = [tokenizer(f"paint it {c} {n}")["input_ids"] for c in colors for n in range(4)]
    theirs = llama_cpp.greedy(bases["gguf"], contexts, 1, tmp_path / "adapter.gguf")

    def largest_gap() -> float:
        """Return the largest logit difference between our token and theirs, in standard deviations of the logits."""
        ours = [compute_logits(session.model, torch.tensor([c]))[0, -1, llama_cpp.SPECIAL :] for c in contexts]
        chosen = [answer[0] - llama_cpp.SPECIAL for answer in theirs]
        return max(float((o.max() - o[c]) / o.std()) for o, c in zip(ours, chosen, strict=True))

    # llama.cpp rounds activations to 8 bits, so it may choose another token of nearly equal probability.
    assert largest_gap() < 0.1
    with session.base():
        assert largest_gap() > 0.5


def test_engine_over_quantized_run_preserves_blocks(run, precision):
    session = open_session(run)
    lines = []
    engine = open_engine(session, log=lines.append)
    try:
        assert not lines and engine.session_adapter is not None and engine.has_base
        assert "logits equal the model's own" in engine.why
    finally:
        engine.close()
    formats = {m.block_format for m in session.model.modules() if hasattr(m, "block_format")}
    assert formats == {"Q8_0" if precision == "gguf" else "NF4"}
