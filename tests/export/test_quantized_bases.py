"""Runs over a GGUF file's blocks and over NF4, merged and exported on the command line: into what, how far
answers moved, and what PEFT and llama.cpp make of the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaw.cli import main
from deltaw.hub.loading import load
from deltaw.lora.layers_quantized import BlockLinear
from deltaw.runtime.quantized_weights import quantize_nf4, round_to_nf4
from deltaw.serving.opening import open_engine
from deltaw.training.origin import InferenceSession, open_run
from tests.byte_models import saved, tiny_llama
from tests.cli.conftest import call  # noqa: F401
from tests.conftest import write_rows
from tests.export import llama_cpp
from tests.hub.test_gguf import write_gguf

TOKENS = torch.arange(3, 40)[None]
# Logits of bf16 arithmetic, over the layers of a tiny model.
BF16 = 3e-2


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """By precision, what a run trains on: a .gguf file, and a folder whose rows are whole blocks of NF4."""
    root = tmp_path_factory.mktemp("bases")
    write_gguf(root / "tiny.Q8_0.gguf", spread=0.3)
    saved(tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.1), root / "wide")
    return {"gguf": root / "tiny.Q8_0.gguf", "nf4": root / "wide"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    colors, path = ("red", "green", "blue", "yellow", "black"), tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = ({"prompt": f"paint it {c} {n}", "completion": f"{c} {c} it is"} for n in range(4) for c in colors)
    return write_rows(path, made)


@pytest.fixture(scope="module", params=["gguf", "nf4"])
def precision(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(precision, bases, rows, tmp_path_factory) -> Path:
    """A finished run of this precision, trained on the command line."""
    output = tmp_path_factory.mktemp(precision) / "run"
    settings = {
        "model": bases[precision], "data": rows, "output": output, "precision": precision, "threads": 1,
        "train.batch_size": 5, "train.max_steps": 12, "train.learning_rate": 0.02, "train.drift": "false",
        "lora.rank": 4,
    }  # fmt: skip
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    with pytest.raises(SystemExit) as ended:
        main(["train", *flags])
    assert not ended.value.code
    return output


def session_of(run: Path, precision: str = "auto") -> InferenceSession:
    return open_run(str(run), precision=precision, device="cpu", say=lambda line: None)


def logits_of(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def off(ours: torch.Tensor, own: torch.Tensor) -> float:
    return float((ours - own).norm() / own.norm())


def test_a_run_over_blocks_is_used_and_merged_on_the_command_line(run, precision, call, tmp_path):  # noqa: F811
    for command in (
        ("generate", run, "--prompt", "paint it red ", "--max-new-tokens", 6),
        ("eval", run, "--answers", 2, "--no-drift"),
    ):
        used = call(*command, "--json")
        assert used.status == 0 and "transformers decodes" not in used.err, used.err
    done = call("merge", run, "--output", tmp_path / "merged", "--json")
    assert done.status == 0, done.err
    answer = json.loads(done.out)
    said, found = " ".join(answer["notes"]), answer["verification"]
    assert answer["same_base"] is True and found["passed"] and found["adapter"]["mean"] > 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    plain = session_of(run, "fp32")
    # The weights were rounded to bf16 when they were written; of tiny models, 2⁻⁹ of each.
    assert off(logits_of(merged), logits_of(plain.model)) < BF16
    if precision == "gguf":
        assert "into these blocks' values" in said and found["nf4"] is None
        assert "over NF4" not in done.err
    else:
        assert "as they are in the base model's files" in said
        assert "apart from merging, the adapter was trained over NF4" in done.err
        assert round_to_nf4(plain.model.base_model) == 14
        rounded = logits_of(plain.model)
        assert off(rounded, logits_of(session_of(run).model)) < BF16  # what was trained
        assert off(rounded, logits_of(merged)) > 2 * BF16  # is not what it is merged into
        assert found["nf4"]["mean"] > 5 * found["merged"]["mean"]


def test_pefts_adapter_loads_over_the_dequantized_model(run, precision, bases, call, tmp_path):  # noqa: F811
    done = call("export", run, "--format", "peft", "--output", tmp_path / "peft")
    assert done.status == 0, done.err
    base = load(str(bases[precision]), precision="bf16", device="cpu", threads=1).model
    if precision == "nf4":
        quantize_nf4(base.base_model)
        for name, module in list(base.named_modules()):
            if isinstance(module, BlockLinear):
                plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
                plain.weight.data = module.plain_weight()
                base.set_submodule(name, plain)
    base = base.float().eval()
    bare = logits_of(base)
    theirs = logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval())
    ours = session_of(run, "bf16")  # as which blocks' values are trained with
    ours.model.float()
    if precision == "nf4":
        round_to_nf4(ours.model.base_model)
    assert off(logits_of(ours.model), theirs) < 1e-5
    assert off(logits_of(session_of(run).model), theirs) < BF16 < off(bare, theirs)


def test_llama_cpp_reads_the_adapter_beside_the_same_file(run, precision, bases, call, tmp_path):  # noqa: F811
    if precision != "gguf":
        pytest.skip("there is no file of such blocks")
    pytest.importorskip("xllamacpp", reason="llama.cpp, which answers here, is in the package xllamacpp")
    done = call("export", run, "--format", "gguf-adapter", "--output", tmp_path / "adapter.gguf")
    assert done.status == 0, done.err
    session = session_of(run)
    tokenizer = session.tokenizer
    colors = ("red", "blue", "black", "green")
    contexts = [tokenizer(f"paint it {c} {n}")["input_ids"] for c in colors for n in range(4)]
    theirs = llama_cpp.greedy(bases["gguf"], contexts, 1, tmp_path / "adapter.gguf")

    def largest_gap() -> float:
        """By how much the likeliest token is likelier here than theirs, in units of the logits' spread."""
        own = [logits_of(session.model, torch.tensor([c]))[0, -1, llama_cpp.SPECIAL :] for c in contexts]
        chosen = [answer[0] - llama_cpp.SPECIAL for answer in theirs]
        return max(float((o.max() - o[c]) / o.std()) for o, c in zip(own, chosen, strict=True))

    # llama.cpp rounds activations to 8 bits, so it may take another token that is nearly as likely.
    assert largest_gap() < 0.1
    with session.base():
        assert largest_gap() > 0.5


def test_an_engine_over_a_run_keeps_its_blocks(run, precision):
    session, said = session_of(run), []
    engine = open_engine(session, say=said.append)
    try:
        assert not said and engine.own_adapter is not None and engine.has_base
        assert "logits equal the model's own" in engine.why
    finally:
        engine.close()
    formats = {m.block_format for m in session.model.modules() if hasattr(m, "block_format")}
    assert formats == {"Q8_0" if precision == "gguf" else "NF4"}
