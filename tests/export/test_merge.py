"""Tests that a merged model computes the same as base model and adapter."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from deltaw.errors import UserError
from deltaw.export.merge import merge_run
from deltaw.export.merge_plan import MergeOptions
from deltaw.lora import LoRAConfig, attach, save_adapter
from deltaw.methods.files import method_from_folder
from deltaw.runtime.quantized_weights import quantize_int8
from deltaw.settings.method_registry import entry_of
from tests.export.merge_cases import (
    TOKENS,
    adapter_folder,
    assert_merged,
    base_folder,
    load_adapted,
    load_model,
    logits,
    perturb_adapter,
    read_config,
    read_tensors,
    relative_difference,
    text_base,
)
from tests.tiny_models import CAUSAL

LORA_VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "dora on Conv1D": ("gpt2", {"dora": True}),
    "patterns, rslora": ("llama", {"rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}),
    "embedding, tied": ("gpt2", {"target_modules": ["wte"]}),
    "dora on a tied embedding": ("gpt2", {"target_modules": ["wte"], "dora": True}),
    "scaled embedding": ("gemma3", {"target_modules": ["embed_tokens"]}),
    "tied head": ("gpt2", {"target_modules": ["c_attn", "lm_head"]}),
    "token rows": ("gemma3", {"trainable_token_indices": [3, 4]}),
    "extra module, tied": ("gemma3", {"train_modules": ["lm_head"]}),
    "biases": ("gpt2", {"bias": "all"}),
    "bias on B, base without bias": ("llama", {"lora_bias": True}),
    "fused experts": ("mixtral", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "pissa": ("llama", {"init": "pissa"}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes a family's base model once."""
    root = tmp_path_factory.mktemp("bases")
    return functools.cache(lambda family: base_folder(root / family, family))


@pytest.mark.parametrize("form", [*CAUSAL, *LORA_VARIANTS])
def test_merged_logits_equal_unmerged_logits(form: str, bases, tmp_path: Path) -> None:
    family, settings = LORA_VARIANTS.get(form, (form, {}))
    adapter = adapter_folder(bases(family), tmp_path / "adapter", **settings)
    merge_run(adapter, tmp_path / "out")
    assert_merged(bases(family), adapter, tmp_path / "out")


@pytest.mark.parametrize("name", ["head", "bias", "random", "last", "full", "input"])
def test_methods_that_train_base_parameters_can_be_merged(name: str, tmp_path: Path) -> None:
    base = text_base(tmp_path / "base", tie_word_embeddings=name in ("head", "input"))
    model = load_model(base)
    method = entry_of(name).load().from_run(None, train=None, tokenizer=None)
    if name == "last":
        method.blocks = 1  # type: ignore[attr-defined]
    method.prepare(model, seed=0)
    with torch.no_grad():
        for _, parameter in method.parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    method.after_step(model)
    method.save(model, tmp_path / "adapter", base_model=str(base))
    assert merge_run(tmp_path / "adapter", tmp_path / "out").same_base is True
    expected = logits(model)
    reloaded = load_model(base)
    assert relative_difference(logits(reloaded), expected) > 1e-3
    method_from_folder(tmp_path / "adapter", None).load(reloaded, tmp_path / "adapter")
    for equivalent in (load_model(tmp_path / "out"), reloaded):
        assert relative_difference(logits(equivalent), expected) < 1e-5


def test_merge_equals_peft_merge(bases, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="compares with PEFT")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    theirs = peft.get_peft_model(load_model(bases("gpt2")), settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    result = merge_run(tmp_path / "adapter", tmp_path / "out", MergeOptions(model=str(bases("gpt2"))))
    assert result.same_base is None  # PEFT's files contain no fingerprint of the base
    expected = theirs.merge_and_unload(safe_merge=True).state_dict()
    for name, weight in load_model(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def llama(bases) -> tuple[Path, Path]:
    """Return the folders of a base model and an adapter."""
    return bases("llama"), adapter_folder(bases("llama"), bases("llama").parent / "adapter")


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_rounded_once(precision: str, dtype: torch.dtype, llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama
    merge_run(adapter, tmp_path / "out", MergeOptions(precision=precision))
    stored = read_tensors(tmp_path / "out")
    assert read_config(tmp_path / "out")["dtype"] == str(dtype)[6:]
    record = load_adapted(base, adapter)
    for name, layer in record.named_modules():
        if hasattr(layer, "delta_weight"):
            exact = layer.weight.double() + layer.scaling * (layer.lora_A.double() @ layer.lora_B.double()).T
            assert stored[f"{name}.weight"].dtype == dtype
            error = (stored[f"{name}.weight"].double() - exact).abs()
            half_step = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-7
            assert bool((error <= half_step).all()), name


def test_keep_preserves_dtypes_and_untouched_tensors(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", dtype=torch.bfloat16)
    adapter = adapter_folder(base, tmp_path / "adapter", target_modules=["q_proj"])
    merge_run(adapter, tmp_path / "out")
    before, after = (read_tensors(tmp_path / name) for name in ("base", "out"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name]) == ("q_proj" not in name), name


@pytest.mark.parametrize(("target", "untied"), [("c_attn", []), ("wte", ["lm_head.weight"])])
def test_only_weights_that_differ_are_untied(target: str, untied: list[str], bases, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = merge_run(adapter_folder(bases("gpt2"), tmp_path / "adapter", target_modules=[target]), out)
    assert result.untied == untied and ("no longer tied" in " ".join(result.notes)) == bool(untied)
    assert read_config(out)["tie_word_embeddings"] is (not untied)
    assert [name for name in read_tensors(out) if name == "lm_head.weight"] == untied
    for name in untied:
        assert torch.equal(read_tensors(out)[name], read_tensors(bases("gpt2"))["transformer.wte.weight"])


def test_tensor_names_without_prefix_are_preserved(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "gpt2")
    bare = {name.removeprefix("transformer."): tensor.clone() for name, tensor in read_tensors(base).items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_folder(base, tmp_path / "adapter", target_modules=["c_attn", "wte"])
    assert merge_run(adapter, tmp_path / "out").same_base is True
    assert {"wte.weight", "lm_head.weight"} <= read_tensors(tmp_path / "out").keys()
    assert_merged(base, adapter, tmp_path / "out")


def test_shard_size_determines_files_and_index(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", max_shard_size="20KB")
    count = len(list(base.glob("*.safetensors")))
    assert count > 2
    adapter = adapter_folder(base, tmp_path / "adapter")
    assert len(merge_run(adapter, tmp_path / "same").files) == count
    assert merge_run(adapter, tmp_path / "one", MergeOptions(shard_size=10**9)).files == ["model.safetensors"]
    small_shards = merge_run(adapter, tmp_path / "many", MergeOptions(shard_size=9_000))
    assert len(small_shards.files) > count
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(small_shards.files)
    for name in ("same", "one", "many"):
        assert_merged(base, adapter, tmp_path / name)


def test_tokenizer_template_and_terminators_are_copied(tmp_path: Path) -> None:
    base = text_base(tmp_path / "base")
    out = tmp_path / "out"
    adapter = adapter_folder(base, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("adapter template")
    merge_run(adapter, out)
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (out / "chat_template.jinja").read_text() == "adapter template"
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [0, 2]  # end of text and end of turn
    assert not list(out.glob("adapter*"))


def assert_merge_rejected(adapter: Path, message: str, **options: object) -> None:
    """Check that merging raises UserError with this message and leaves no files."""
    with pytest.raises(UserError, match=message):
        merge_run(adapter, adapter.parent / "merged", MergeOptions(**options))
    assert not (adapter.parent / "merged").exists() and not list(adapter.parent.glob(".merged*"))


def test_other_base_model_with_experts_in_separate_tensors_is_rejected(bases, tmp_path: Path) -> None:
    base = bases("mixtral")
    assert any(".experts.0." in name for name in read_tensors(base))  # one parameter of the model has several tensors
    adapter = adapter_folder(base, tmp_path / "adapter", target_modules=["q_proj"])
    other = load_model(base)
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    assert_merge_rejected(adapter, "trained on other weights", model=str(tmp_path / "other"))
    assert merge_run(adapter, tmp_path / "out").same_base is True


def test_other_base_model_is_rejected(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama
    other = tmp_path / "other"
    moved_base = load_model(base)
    with torch.no_grad():
        for parameter in moved_base.parameters():
            parameter.mul_(1.5)
    moved_base.save_pretrained(other)
    assert_merge_rejected(adapter, "trained on other weights", model=str(other))
    result = merge_run(adapter, tmp_path / "out", MergeOptions(model=str(other), other_base=True))
    assert result.same_base is False and any("(--other-base)" in note for note in result.notes)


def test_adapter_of_int8_base_recognizes_its_base(tmp_path: Path) -> None:
    base = text_base(tmp_path / "base", torch.bfloat16)
    model = load_model(base, torch.bfloat16)
    quantize_int8(model.base_model)
    attach(model, LoRAConfig(rank=4), seed=0)
    save_adapter(perturb_adapter(model), tmp_path / "adapter", base_model=str(base))
    assert merge_run(tmp_path / "adapter", tmp_path / "out").same_base is True


def test_adapters_without_weight_updates_are_rejected(tmp_path: Path) -> None:
    base = text_base(tmp_path / "base")
    model = load_model(base)
    method = entry_of("prompt").load().from_run(None, train=None, tokenizer=None)
    method.prepare(model, seed=0)
    method.save(model, tmp_path / "prompt", base_model=str(base))
    invoked = {"active": "completion", "invocation_tokens": [5, 6], "target_modules": ["q_proj"]}
    activated = adapter_folder(base, tmp_path / "activated", **invoked)
    assert_merge_rejected(tmp_path / "prompt", "a soft prompt cannot be merged")
    assert_merge_rejected(activated, "only from its invocation sequence on")
    assert_merge_rejected(tmp_path, "no adapter in")


def test_quantized_bases_and_unsupported_biases_are_rejected(bases, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    adapter = adapter_folder(base, tmp_path / "adapter")
    quantized = {**read_config(base), "quantization_config": {"quant_method": "gptq"}}
    (base / "config.json").write_text(json.dumps(quantized))
    assert_merge_rejected(adapter, "quantized weights \\(gptq\\)")
    biased = adapter_folder(bases("qwen3"), tmp_path / "bias", lora_bias=True, target_modules=["up_proj"])
    assert_merge_rejected(biased, r"up_proj.bias', which Qwen3ForCausalLM does not support")


def test_fp16_overflow_is_rejected(bases, tmp_path: Path) -> None:
    adapter = adapter_folder(bases("llama"), tmp_path / "adapter", size=500.0, target_modules=["q_proj"])
    assert_merge_rejected(adapter, r"q_proj.weight' contains values that are not finite", precision="fp16")


def test_merged_classifier_matches_adapted_classifier(tmp_path: Path) -> None:
    base = text_base(tmp_path / "base")
    classifier = AutoModelForSequenceClassification
    model = classifier.from_pretrained(base, num_labels=3, dtype=torch.float32).eval()
    attach(model, LoRAConfig(rank=4, train_modules=["score"]), seed=0)
    metadata = {"deltaw.classes": '["a", "b", "c"]'}
    save_adapter(perturb_adapter(model), tmp_path / "adapter", base_model=str(base), metadata=metadata)
    result = merge_run(tmp_path / "adapter", tmp_path / "out")
    assert result.same_base is True and result.dropped == ["lm_head.weight"]
    merged = classifier.from_pretrained(tmp_path / "out").eval()
    assert merged.config.id2label == {0: "a", 1: "b", 2: "c"}
    with torch.no_grad():
        ours, theirs = (m(input_ids=TOKENS[:1]).logits for m in (merged, model))
    assert relative_difference(ours, theirs) < 1e-5
