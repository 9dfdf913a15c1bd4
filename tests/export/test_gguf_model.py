"""Tests of merged models as GGUF files: tensor types, metadata, the tokenizer, and a GGUF file as the base."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deltaw.errors import UserError
from deltaw.export import gguf_file
from deltaw.export.gguf_file import KINDS, pack, packed_shape, require_kind
from deltaw.export.gguf_model import export_gguf
from deltaw.export.gguf_tensors import GGUFTensor, TensorRule, exchange_groups
from deltaw.export.gguf_tokenizer import extract_vocabulary, pre_tokenizer_name
from deltaw.export.merged import MergedTensor
from deltaw.hub.gguf_settings import llama3_divisors
from deltaw.hub.loading import load
from deltaw.lora import LoRAConfig, attach, save_adapter
from tests.export import models
from tests.export.test_gguf_adapter import read_gguf
from tests.hub.test_gguf import write_gguf

Q = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    return models.saved_run(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_merged_tensors_have_requested_type(llama: tuple[PreTrainedModel, Path], tmp_path: Path, kind: str) -> None:
    model, run = llama
    result = export_gguf(run, tmp_path / "m.gguf", kind=kind)
    reader = GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert result.details["tensors"] == len(tensors) == 21
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    merged = layer.weight + models.delta_weight(layer)
    stored = tensors["blk.0.ffn_down.weight"]
    assert stored.tensor_type == KINDS[kind][0]
    expected = pack(merged.detach().numpy(), KINDS[kind][0])
    assert np.array_equal(np.array(stored.data).view(np.uint8), expected.view(np.uint8))
    assert tensors["blk.0.attn_norm.weight"].tensor_type == Q.F32
    outer = Q.Q8_0 if kind in ("q4_0", "q4_1") else KINDS[kind][0]
    assert tensors["output.weight"].tensor_type == outer
    assert reader.get_field("general.file_type").contents() == int(KINDS[kind][2])


def test_metadata_matches_model_and_tokenizer(tmp_path: Path) -> None:
    _, run = models.saved_run(tmp_path, "qwen3")
    export_gguf(run, tmp_path / "m.gguf")
    fields, _ = read_gguf(tmp_path / "m.gguf")
    of_model = {"block_count": 2, "attention.key_length": 32, "attention.head_count_kv": 2, "rope.freq_base": 10000.0}
    of_tokens = {"model": "gpt2", "pre": "qwen2", "eos_token_id": 0, "eot_token_id": 2, "add_bos_token": False}
    for prefix, expected in (("qwen3", of_model), ("tokenizer.ggml", of_tokens)):
        assert {name: fields[f"{prefix}.{name}"] for name in expected} == expected
    assert len(fields["tokenizer.ggml.tokens"]) == models.VOCABULARY
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 3]
    assert fields["tokenizer.chat_template"] == models.CHAT_ML


def test_pre_tokenizer_is_recognized_by_behavior() -> None:
    for name in models.SPLITTINGS:
        assert pre_tokenizer_name(models.byte_bpe(name).backend_tokenizer) == name


def test_unknown_pre_tokenizer_and_oversized_vocabulary_are_rejected() -> None:
    tokenizer = models.byte_bpe("gpt-2")
    with pytest.raises(UserError, match="more tokens"):
        extract_vocabulary(tokenizer, 100)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="no name for"):
        extract_vocabulary(tokenizer, models.VOCABULARY)


def test_sentencepiece_scores_follow_merge_order() -> None:
    tokenizer = models.sentence_bpe(prefix=True)
    vocabulary = extract_vocabulary(tokenizer, len(tokenizer) + 2)
    assert vocabulary.model == "llama" and vocabulary.space_prefix and vocabulary.scores is not None
    assert vocabulary.tokens[-1] == f"[PAD{len(tokenizer) + 1}]" and vocabulary.types[-1] == 5
    assert vocabulary.types[4:260] == [6] * 256  # bytes
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    merged = [vocabulary.scores[ids[token]] for token in ("▁t", "▁th", "▁the") if token in ids]
    assert len(merged) >= 2 and merged == sorted(merged, reverse=True)


def test_llama3_divisors_match_transformers() -> None:
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 1024}
    config = LlamaConfig(**sizes, rope_parameters=models.LLAMA3_ROPE)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / llama3_divisors(models.LLAMA3_ROPE, 32), scaled.numpy(), rtol=1e-5)


def test_gguf_base_metadata_is_preserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pre-tokenizer name is copied from the base. Tensors are dequantized, merged and packed again."""
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "tiny.gguf"
    values = write_gguf(base)
    loaded = load(str(base), precision="fp32", log=lambda line: None)
    attach(loaded.model, LoRAConfig(rank=2, alpha=4), seed=0)
    models.randomize_adapter(loaded.model)
    save_adapter(loaded.model, tmp_path / "run", base_model=str(base))
    export_gguf(tmp_path / "run", tmp_path / "m.gguf", kind="f32")
    fields, tensors = read_gguf(tmp_path / "m.gguf")
    expected = {"tokenizer.ggml.pre": "smollm", "llama.context_length": 64, "general.file_type": 0}
    assert {name: fields[name] for name in expected} == expected
    assert set(tensors) == {f"{name}.weight" for name in values}
    delta = models.delta_weight(loaded.model.get_submodule("model.layers.0.mlp.up_proj")).numpy()
    np.testing.assert_allclose(tensors["blk.0.ffn_up.weight"], values["blk.0.ffn_up"] + delta, rtol=1e-5, atol=1e-6)


def test_changed_head_is_untied_or_rejected_if_unsupported(tmp_path: Path) -> None:
    model, run = models.saved_run(tmp_path / "q", "qwen2", target_modules=["lm_head"])
    export_gguf(run, tmp_path / "m.gguf", kind="f32")
    tensors = read_gguf(tmp_path / "m.gguf")[1]
    head = model.get_output_embeddings()
    merged = (head.weight + models.delta_weight(head)).detach().numpy()
    np.testing.assert_allclose(tensors["output.weight"], merged, rtol=1e-5, atol=1e-6)
    assert not np.allclose(tensors["token_embd.weight"], merged)
    _, run = models.saved_run(tmp_path / "g", "gemma", target_modules=["lm_head"])
    with pytest.raises(UserError, match="no tensor"):
        export_gguf(run, tmp_path / "g.gguf", kind="f32")
    assert not (tmp_path / "g.gguf").exists()


def test_untied_head_and_biases_that_llama_cpp_lacks_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for family, change, tensor in (
        ("gemma", {"tie_word_embeddings": False}, "lm_head"),
        ("qwen3", {"attention_bias": True}, "k_proj.bias"),
    ):
        name, settings = models.FAMILIES[family]
        monkeypatch.setitem(models.FAMILIES, family, (name, {**settings, **change}))
        _, run = models.saved_run(tmp_path / family, family)
        with pytest.raises(UserError, match=f"no tensor for .*{tensor}"):
            export_gguf(run, tmp_path / "m.gguf", kind="f32")


def test_experts_are_stacked_and_split(tmp_path: Path) -> None:
    for family, layer in (("qwen3-moe", 1), ("granite-moe", 1), ("lfm2-moe", 1)):
        model, run = models.saved_run(tmp_path / family, family, target_modules=["q_proj"])
        export_gguf(run, tmp_path / f"{family}.gguf", kind="f16")
        reader = GGUFReader(tmp_path / f"{family}.gguf")
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        name = {"qwen3-moe": "mlp", "granite-moe": "block_sparse_moe", "lfm2-moe": "feed_forward"}[family]
        experts = model.get_submodule(f"model.layers.{layer}.{name}.experts")
        gate, up = experts.gate_up_proj.detach().half().chunk(2, 1)
        expected = {"gate": gate, "up": up, "down": experts.down_proj.detach().half()}
        for part, values in expected.items():
            assert np.array_equal(tensors[f"blk.{layer}.ffn_{part}_exps.weight"].data, values.numpy())
        assert tensors[f"blk.{layer}.ffn_gate_inp.weight"].tensor_type == Q.F32


def test_stacked_tensors_are_loaded_one_by_one() -> None:
    loaded = []

    def source(index: int) -> MergedTensor:
        tensor = MergedTensor(f"experts.{index}", torch.float32, (2, 3), None, (), "")
        values = torch.full((2, 3), float(index))
        vars(tensor)["load"] = lambda: loaded.append(index) or values
        return tensor

    stack = GGUFTensor(TensorRule(""), {index: source(index) for index in (1, 0, 2)})
    assert stack.shape == (3, 2, 3)
    assert stack.load()[:, 0, 0].tolist() == [0, 1, 2] and loaded == [0, 1, 2]


def test_groups_are_exchanged_with_members() -> None:
    rows = torch.arange(12)
    expected = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert exchange_groups(rows, 2, 3).tolist() == expected
    assert exchange_groups(rows[None], 2, 3, dim=-1)[0].tolist() == expected


def test_interrupted_export_leaves_no_file(llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []

    def pack_then_interrupt(numbers: np.ndarray, kind: Q) -> np.ndarray:
        packed.append(kind)
        if len(packed) == 5:
            raise KeyboardInterrupt
        return pack(numbers, kind)

    monkeypatch.setattr(gguf_file, "pack", pack_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(llama[1], tmp_path / "out" / "m.gguf")
    assert len(packed) == 5 and list((tmp_path / "out").iterdir()) == []


def test_k_quants_are_packed_by_ggml() -> None:
    pytest.importorskip("xllamacpp", reason="requires ggml from the package xllamacpp")
    numbers = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    for name, error in (("q4_k", 0.25), ("q5_k", 0.12), ("q6_k", 0.08)):
        require_kind(name)
        kind = KINDS[name][0]
        packed = pack(numbers, kind)
        assert packed.shape == packed_shape(numbers.shape, kind)
        assert np.abs(gguf.quants.dequantize(packed, kind) - numbers).max() < error


def test_unknown_type_is_rejected_by_name() -> None:
    with pytest.raises(UserError, match="q4_2"):
        require_kind("q4_2")
