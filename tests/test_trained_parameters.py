"""All parameters that a run reports as trained are trained, and match PEFT after a few AdamW steps on the same rows.

The tests cover every recognized family, with entire modules trained in addition to the factors: norms, the MLP, the
head, embeddings and biases. deltaw trains in fp32 on packed rows with shared prefixes, or on padded rows if the family
does not support packing. PEFT trains each row separately in fp64, so the reference is exact.

AdamW divides a gradient by its magnitude. An element whose exact gradient is zero therefore moves by rounding errors in
fp32, and not at all in fp64. An example is the bias of unrotated keys, which softmax cancels. These elements are
identified in fp64 and excluded. Some other elements have a gradient near zero in one step by chance, and differ by a
fraction of that step. The worst 0.2 % of each parameter may exceed the tolerance, but by at most one step.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from deltaw.data.example import Example
from deltaw.kernels import loader
from deltaw.lora import LoRAConfig
from deltaw.methods.lora import LoRA
from deltaw.runtime.fused import FusedBlock
from deltaw.runtime.halves import _MLP
from deltaw.runtime.packed import fused_blocks, packed_rows
from deltaw.runtime.padded import padded_rows
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.loop import train
from deltaw.training.state import rows_of_step
from deltaw.training.trained_check import UntrainedParameterError
from tests.runtime.families import FALCON, PACKED, VOCABULARY, model_of
from tests.runtime.test_fused import count_runs

STEPS = 5
BATCH = 3
RATE = 1e-3
SEED = 0
# Biases are enabled if they are optional. Families without biases are excluded.
BIASED = {"Llama": {"attention_bias": True, "mlp_bias": True}, "Gemma": {"attention_bias": True}}
BIASED |= {"Qwen3": {"attention_bias": True}, "Falcon": {"bias": True}, "Falcon, grouped": {"bias": True}}
NO_BIAS = {"Mistral", "Gemma2", "Gemma3", "SmolLM3", "Phi3"}
NORMS = {"GPT2": "ln_1", "Falcon": "input_layernorm", "Falcon, grouped": "ln_mlp"}
NORMS |= {"Falcon, halves in turn": "post_attention_layernorm"}
EMBEDDINGS = {"GPTNeoX": "embed_in", "GPT2": "wte", "Falcon": "word_embeddings"}
TARGETS = {"GPT2": ["c_attn"], "GPTNeoX": ["query_key_value", "dense"], "Falcon": ["query_key_value", "dense"]}
TARGETS |= {"Phi": ["q_proj", "v_proj", "dense"], "Phi3": ["qkv_proj", "o_proj"]}
Settings = tuple[list[str], list[str], str]
KINDS = ("factors", "norms", "mlp", "head", "embeddings", "biases")
# The quick set trains one kind of parameters per family, and each kind in several families.
CASES = [
    pytest.param(family, kind, marks=[] if (row + column) % 6 == 0 else pytest.mark.slow)
    for row, family in enumerate((*PACKED, *FALCON))
    for column, kind in enumerate(KINDS)
    if not (kind == "biases" and family in NO_BIAS)
]


def rows() -> list[Example]:
    """Return rows with a shared prefix and different completions, whose tokens are all labels."""
    random = np.random.default_rng(0)
    stem = random.integers(3, VOCABULARY, 6)
    completions = [random.integers(3, VOCABULARY, 5 + number % 3) for number in range(7)]
    sequences = [np.concatenate([stem, end]).astype(np.int32) for end in completions]
    return [Example(n, tokens, np.arange(len(tokens)) >= 6, 6, None) for n, tokens in enumerate(sequences, 1)]


def settings_of(family: str, kind: str) -> Settings:
    """Return the targets of the factors, the modules to train entirely, and the bias setting."""
    name = family.partition(",")[0]
    modules = {
        "norms": [NORMS.get(family, "input_layernorm")],
        "mlp": ["mlp"] if family != "Falcon, grouped" else ["0.mlp", "1.mlp", "2.mlp"],  # not its norm, ln_mlp
        "head": ["lm_head"],
        "embeddings": [EMBEDDINGS.get(name, "embed_tokens")],
    }.get(kind, [])
    return TARGETS.get(name, ["q_proj", "v_proj", "o_proj"]), modules, "all" if kind == "biases" else "none"


def by_deltaw(model: nn.Module, family: str, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the trained parameters of a causal model by name, before and after the steps."""
    padded = family in FALCON
    batcher = CausalMicroBatcher(25, share=not padded, padded=padded, device="cpu")
    targets, modules, bias = settings_of(family, kind)
    method = LoRA(LoRAConfig(rank=4, alpha=8, target_modules=targets, train_modules=modules, bias=bias))  # type: ignore[arg-type]
    method.prepare(model, seed=SEED)
    named = dict(method.parameters(model))
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in named.items():
        if name.endswith("lora_B"):  # with a zero B, A would have no gradient
            parameter.data.normal_(0, 0.1, generator=generator)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    options = {"learning_rate": RATE, "total_steps": STEPS, "batch_size": BATCH, "seed": SEED, "schedule": "constant"}
    with padded_rows(model) if padded else packed_rows(model):
        objective = CausalObjective(model)
        trained = list(named.values())
        train(objective, trained, rows(), batcher, names=list(named), max_grad_norm=None, **options)
    return before, {name: parameter.detach() for name, parameter in named.items()}


def by_peft(model, settings, before) -> dict[str, Tensor]:
    """Train with PEFT in fp64 from the same factors, one row at a time."""
    targets, modules, bias = settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=modules or None, bias=bias)  # type: ignore[arg-type]
        adapted = peft.get_peft_model(model, config).double()
    trained = {deltaw_name(name): p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained.keys() == before.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(before[name].t() if ".lora_" in name else before[name])
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        batch = rows_of_step(rows(), step, BATCH, SEED)
        labels = sum(example.label_count for example in batch)
        for example in batch:
            (causal_loss(adapted, example) / labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: (p.t() if ".lora_" in name else p).detach() for name, p in trained.items()}


def causal_loss(model: nn.Module, example: Example) -> Tensor:
    """Return the summed cross-entropy of a row's labels, computed from all logits."""
    tokens = torch.from_numpy(example.tokens.astype(np.int64))
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    at = torch.from_numpy(np.flatnonzero(example.is_label))
    return nn.functional.cross_entropy(logits[at - 1], tokens[at], reduction="sum")


def deltaw_name(name: str) -> str:
    """Convert PEFT's name of a parameter to deltaw's."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    name = name.replace(".modules_to_save.default.", ".").replace(".lora_A.default.weight", ".lora_A")
    return name.replace(".lora_B.default.weight", ".lora_B")


def make_model(family: str, kind: str) -> nn.Module:
    model = model_of(family, **(BIASED.get(family, {}) if kind == "biases" else {}))
    if "head" in kind or "embeddings" in kind:
        untie(model)
    return model


def untie(model: nn.Module) -> None:
    """Give head and embeddings separate weights, so that they can be trained independently."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_trained_parameters_match_peft(family, kind, monkeypatch):
    if family in FALCON and loader.library() is None:
        pytest.skip(loader.unavailable_reason() or "")
    model = make_model(family, kind)
    reference = copy.deepcopy(model)
    fused_runs = count_runs(monkeypatch)
    before, trained = by_deltaw(model, family, kind)
    assert bool(fused_runs) == (kind in ("factors", "head", "embeddings"))
    expected = by_peft(reference, settings_of(family, kind), before)
    assert_parameters_match(trained, expected, before)


def assert_parameters_match(trained: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    for name, theirs in expected.items():
        moved = (theirs - before[name]).abs() > 1e-2 * RATE
        assert moved.any(), name
        differences = ((trained[name] - theirs).abs() * moved).flatten().sort().values
        assert differences[-1] <= RATE, name
        error = differences[: -max(2, len(differences) // 500)].norm()
        assert error <= 1e-5 * theirs.norm(), f"{name}: {error / theirs.norm():.1e}"


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX"])
def test_missing_block_gradient_raises(family, monkeypatch):
    model = make_model(family, "factors")
    backward = _MLP.backward

    def cut(ctx, *grads):
        grads_in = backward(ctx, *grads)
        return *grads_in[:3], *(None for _ in grads_in[3:])

    monkeypatch.setattr("deltaw.runtime.fused.serves_block", lambda *args: False)
    monkeypatch.setattr(_MLP, "backward", staticmethod(cut))
    monkeypatch.setitem(TARGETS, family, ["up_proj"] if family == "Llama" else ["dense_h_to_4h"])
    with pytest.raises(UntrainedParameterError, match="received no gradient"):
        by_deltaw(model, family, "factors")


def test_copied_attention_module_uses_the_packed_layout():
    """The copy has a separate configuration, which must follow the selected attention."""
    model = make_model("Llama", "factors")
    method = LoRA(LoRAConfig(rank=4, target_modules=["up_proj"], train_modules=["self_attn"]))
    method.prepare(model, seed=SEED)
    attention = model.base_model.layers[1].self_attn
    assert attention.config is not model.config
    with packed_rows(model):
        assert attention.config._attn_implementation == model.config._attn_implementation
    assert attention.config._attn_implementation == "sdpa"


def test_module_replaced_after_recognition_is_used(monkeypatch):
    model = make_model("Phi3", "factors")
    with packed_rows(model):
        assert fused_blocks(model).choice.value
    other = copy.deepcopy(model.base_model.layers[0].mlp.down_proj)
    with torch.no_grad():
        other.weight.mul_(2)
    tokens = torch.arange(3, 20)
    example = Example(1, tokens.numpy().astype(np.int32), np.arange(17) >= 6, 0, None)
    (batch,) = CausalMicroBatcher(25, True, False, "cpu").batches([example])
    objective = CausalObjective(model)
    fused_runs = count_runs(monkeypatch)
    with packed_rows(model), torch.no_grad():
        before = objective(batch).item()
        model.base_model.layers[0].mlp.down_proj = other
        after = objective(batch).item()
    assert len(fused_runs) == 6 and isinstance(fused_blocks(model).last, FusedBlock)
    logits = model(input_ids=tokens[None]).logits[0, 5:-1]
    expected = nn.functional.cross_entropy(logits, tokens[6:], reduction="sum").item()
    assert abs(after - expected) < 1e-4 * abs(expected) and abs(before - expected) > 1e-3
