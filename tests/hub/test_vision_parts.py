"""Vision-language models that are assembled from a language model and a vision encoder."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from deltaw.hub import vision_parts
from deltaw.hub.folders import config_folder, resolve
from deltaw.hub.tokenizers import find_tokenizer
from deltaw.hub.vision import text_view
from deltaw.hub.vision_parts import assembled_folder, fold_statistics, is_new_connector
from deltaw.lora.fingerprint import base_fingerprint, same_base
from deltaw.runtime.image_tokens import verify_view
from tests.byte_models import TEMPLATE, save_model, tiny_gpt2, tiny_llama
from tests.conftest import refusal
from tests.tiny_models import CAUSAL

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
ENCODERS = {
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE)),
    "registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=3)
    ),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SHAPE, intermediate_size=32)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SHAPE, intermediate_size=32)),
    "complete clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config={**SHAPE, "intermediate_size": 32},
            text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20},
        )
    ),
}
NUM_FEATURES = {"registers": 7}


def save_encoder(kind: str, folder: Path) -> Path:
    torch.manual_seed(1)
    ENCODERS[kind]().save_pretrained(folder)
    size = {"height": 28, "width": 28}
    transformers.BitImageProcessor(size=size, do_center_crop=False).save_pretrained(folder)
    return folder


@pytest.fixture
def language(tmp_path: Path) -> Path:
    return save_model(tiny_llama(tie_word_embeddings=True), tmp_path / "language")


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    return save_encoder("dinov2", tmp_path / "vision")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))


def load(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()


def inputs_of(folder: Path, text: str = "See <image>: red?"):
    image = Image.effect_mandelbrot((40, 30), (-3, -2.5, 2, 2.5), 50).convert("RGB")
    return AutoProcessor.from_pretrained(folder)(images=image, text=text, return_tensors="pt")


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("connector", ["linear", "mlp"])
def test_features_are_those_of_encoder_and_connector(language, tmp_path, kind, connector):
    vision = save_encoder(kind, tmp_path / "vision")
    folder = assembled_folder(language, vision, connector=connector)
    model = load(folder)
    inputs = inputs_of(folder)
    encoder = transformers.AutoModel.from_pretrained(vision, attn_implementation="eager")
    encoder = getattr(encoder, "vision_model", encoder).eval()
    projector = model.model.multi_modal_projector
    num_features = NUM_FEATURES.get(kind, 4)
    with torch.no_grad():
        states = encoder(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1]
        states = states if kind == "siglip" else states[:, 1:]
        expected = projector.linear_1(states)
        if connector == "mlp":
            expected = projector.linear_2(torch.nn.functional.gelu(expected))
        actual = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
    assert torch.equal(actual, expected[0]) and actual.shape == (num_features, 32)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == num_features
    verify_view(text_view(model), inputs["input_ids"][0], {"pixel_values": inputs["pixel_values"]}, 259)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [259, 272])
def test_text_logits_are_those_of_the_language_model(vision, tmp_path, tied, vocab_size):
    language = save_model(tiny_llama(tie_word_embeddings=tied, vocab_size=vocab_size), tmp_path / "language")
    original = transformers.AutoModelForCausalLM.from_pretrained(language, attn_implementation="eager").eval()
    model = load(assembled_folder(language, vision))
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    assert (head is embedding) == tied
    ids = torch.randint(0, 259, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        expected = original(input_ids=ids).logits
    torch.testing.assert_close(logits[..., :vocab_size], expected, rtol=1e-6, atol=1e-6)
    # Unused rows of the vocabulary are used before a row is added. An added token is never the most likely one.
    assert logits.shape[-1] == max(vocab_size, 260)
    assert (logits.argmax(-1) == expected.argmax(-1)).all()
    assert model.generation_config.eos_token_id == original.generation_config.eos_token_id


@pytest.mark.parametrize("family", ["qwen3", "mistral", "mixtral", "phi3"])
def test_families_of_language_models_keep_their_outputs(vision, tmp_path, family):
    config = CAUSAL[family]()
    config.vocab_size = 272
    language = save_model(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "language")
    original = transformers.AutoModelForCausalLM.from_pretrained(language, attn_implementation="eager").eval()
    model = load(assembled_folder(language, vision))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, original(input_ids=ids).logits)


def test_tokenizer_with_more_tokens_than_the_model_is_rejected(vision, tmp_path):
    language = save_model(tiny_llama(vocab_size=200), tmp_path / "language")
    assert "the tokenizer has 259 tokens, and the model 200" in refusal(assembled_folder, language, vision).message


def test_weights_keep_their_dtype(vision, tmp_path):
    language = save_model(tiny_llama().bfloat16(), tmp_path / "language")
    folder = assembled_folder(language, vision)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    tensors = vision_parts.read_checkpoint(folder).tensors
    assert {t.code for n, t in tensors.items() if "language_model" in n or n.startswith("lm_head")} == {"BF16"}
    assert {t.code for n, t in tensors.items() if "vision" in n or "projector" in n} == {"F32"}


def test_model_in_bf16_has_the_fingerprint_of_the_fp32_model(vision, tmp_path):
    fingerprints = []
    for dtype in (torch.float32, torch.bfloat16):
        language = save_model(tiny_llama().to(dtype), tmp_path / str(dtype))
        model = AutoModelForImageTextToText.from_pretrained(assembled_folder(language, vision), dtype=dtype)
        fingerprints.append(base_fingerprint(text_view(model).view))
    assert same_base(*fingerprints) is True


def test_image_token_is_one_token_and_rendered_by_the_template(language, vision):
    folder = assembled_folder(language, vision)
    assert "local" not in (folder / "tokenizer_config.json").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a<image>b"}], tokenize=False)
    assert "a<image>b" in text
    assert tokenizer.encode("a<image>b", add_special_tokens=False)[1] == 259
    original = transformers.AutoTokenizer.from_pretrained(language)
    assert tokenizer.encode("blue circle?\n") == original.encode("blue circle?\n")


def test_connector_is_new_and_depends_on_the_seed(language, vision):
    folder = assembled_folder(language, vision)
    assert is_new_connector(folder) and not is_new_connector(language)
    other = assembled_folder(language, vision, seed=1)
    again = load(folder)
    projector = again.model.multi_modal_projector
    other_projector = load(other).model.multi_modal_projector
    assert not torch.equal(projector.linear_1.weight, other_projector.linear_1.weight)
    assert torch.equal(projector.linear_2.weight, torch.eye(32))
    shutil.rmtree(folder)
    assert assembled_folder(language, vision) == folder
    assert torch.equal(load(folder).model.multi_modal_projector.linear_1.weight, projector.linear_1.weight)


def test_initial_image_features_are_as_large_as_embeddings(language, vision):
    for connector in ("linear", "mlp"):
        model = load(assembled_folder(language, vision, connector=connector))
        standardized = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            features = model.model.multi_modal_projector(standardized)
        ratio = float(features.square().mean() / model.get_input_embeddings().weight.detach().square().mean())
        assert 0.2 < ratio < 2


def test_second_call_uses_the_cache(language, vision, tmp_path, monkeypatch):
    lines: list[str] = []
    reference = f"parts:{language} + {vision}"
    folder = config_folder(reference, "fp32", False, log=lines.append)
    monkeypatch.setattr(vision_parts, "_save", None)
    assert config_folder(reference, "bf16", False, log=lines.append) == folder and len(lines) == 1
    # The content depends on the files, not on their location.
    assert not [file for file in folder.glob("*.json") if str(tmp_path) in file.read_text()]
    copies = [shutil.copytree(part, tmp_path / f"copy-{part.name}") for part in (language, vision)]
    assert assembled_folder(*copies) == folder
    assert find_tokenizer(reference) is not None
    assert (resolve(reference).kind, resolve(reference).name) == ("parts", "language-vision")
    (copies[1] / "config.json").write_text((vision / "config.json").read_text() + "\n")
    with pytest.raises(TypeError):  # another key
        assembled_folder(*copies)


def test_damaged_entry_is_assembled_again(language, vision):
    folder = assembled_folder(language, vision)
    weights = (folder / "model.safetensors").read_bytes()

    def truncate() -> None:
        (folder / "model.safetensors").write_bytes(weights[:-1])

    for damage in (truncate, (folder / "model.safetensors").unlink, (folder / "new-connector").unlink):
        damage()
        assert assembled_folder(language, vision) == folder and is_new_connector(folder)
        assert (folder / "model.safetensors").read_bytes() == weights


def test_weights_that_are_not_finite_are_rejected(vision, tmp_path):
    model = tiny_llama()
    model.get_input_embeddings().weight.data[3, 2] = float("nan")
    error = refusal(assembled_folder, save_model(model, tmp_path / "language"), vision)
    assert "'model.embed_tokens.weight' is not finite" in error.message


def _assemble_until_killed(language: Path, vision: Path) -> None:
    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    vision_parts.LlavaConfig.save_pretrained = kill  # after the weights
    assembled_folder(language, vision)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_assembly_leaves_no_entry(language, vision, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_assemble_until_killed, args=(language, vision))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    cache = tmp_path / "cache" / "parts"
    assert len(list(cache.glob(".*.part/model.safetensors"))) == 1
    assert not [path for path in cache.iterdir() if path.is_dir() and path.suffix != ".part"]
    folder = assembled_folder(language, vision)
    load(folder)
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_parts_of_other_kinds_are_rejected(language, vision, tmp_path):
    cases = (
        ((vision, vision), "(Dinov2Model) is not a language model"),
        ((language, language), "(LlamaForCausalLM) is not a vision encoder"),
        ((assembled_folder(language, vision), vision), "is not a language model"),
    )
    for folders, message in cases:
        assert message in refusal(assembled_folder, *folders).message
    for name, value, message in (
        ("architectures", ["LlamaForSequenceClassification"], "is not a language model"),
        ("quantization_config", {"quant_method": "fp8"}, "quantized"),
        ("hidden_size", "x", "config.json cannot be used"),
        ("intermediate_size", 47, "missing or have another shape"),
        ("num_hidden_layers", 3, "missing or have another shape"),
    ):
        changed = shutil.copytree(language, tmp_path / "changed", dirs_exist_ok=True)
        values = json.loads((language / "config.json").read_text())
        (changed / "config.json").write_text(json.dumps({**values, name: value}))
        assert message in refusal(assembled_folder, changed, vision).message
    (vision / "preprocessor_config.json").unlink()
    assert "the image processor cannot be used" in refusal(assembled_folder, language, vision).message
    (language / "tokenizer.json").unlink()
    assert not list((tmp_path / "cache" / "parts").glob(".*.part"))


def test_output_layers_that_llava_does_not_have_are_rejected(vision, tmp_path):
    shape = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.Gemma2Config(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    for model in (transformers.Gemma2ForCausalLM(config), tiny_gpt2()):
        kind = model.config.model_type
        language = save_model(model, tmp_path / kind)
        assert f"output layer of {kind}" in refusal(assembled_folder, language, vision).message


def test_model_without_tokenizer_is_rejected(vision, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "language")
    assert "tokenizer" in refusal(assembled_folder, tmp_path / "language", vision).message


def test_folded_statistics_standardize_inputs():
    generator = torch.Generator().manual_seed(0)
    weight, bias, mean, inputs = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 7), (5,), (7,), (11, 7))
    )
    std = torch.rand(7, generator=generator, dtype=torch.float64) + 0.1
    expected = torch.nn.functional.linear((inputs - mean) / std, weight, bias)
    actual = torch.nn.functional.linear(inputs, *fold_statistics(weight, bias, mean, std))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
