"""Conversion of a tiny .gguf file that is written here, with the tokenizer of a small vocabulary."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf as gguf_format
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from deltaw.hub import gguf, packages
from deltaw.hub.loading import load
from tests.caches import other
from tests.data.conftest import refusal

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HIDDEN, KEYS, INNER = 32, 16, 64


def write_gguf(path: Path, architecture: str = "llama", spread: float = 1.0) -> dict[str, np.ndarray]:
    """A Llama of one layer with Q8_0 weights of a standard deviation; returns what they de-quantize to."""
    random = np.random.default_rng(0)
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "ĊĊ"]
    out = gguf_format.GGUFWriter(path, architecture)
    sizes = {"context_length": 64, "embedding_length": HIDDEN, "block_count": 1, "feed_forward_length": INNER}
    heads = {"head_count": 2, "head_count_kv": 1, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": KEYS}
    names = {"tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "token_list": tokens, "vocab_size": len(tokens)}
    kinds = {"token_types": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)), "token_merges": ["Ġ Ġ", "Ċ Ċ"]}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": False}
    template = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    for name, value in {**sizes, **heads, **names, **kinds, **ends, **template}.items():
        getattr(out, f"add_{name}")(value)
    block = gguf_format.GGMLQuantizationType.Q8_0
    values = {}
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.0.{name}_norm": (HIDDEN,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "output")}
    shapes |= {f"blk.0.attn_{name}": (KEYS, HIDDEN) for name in ("k", "v")}
    shapes |= {"blk.0.ffn_gate": (INNER, HIDDEN), "blk.0.ffn_up": (INNER, HIDDEN), "blk.0.ffn_down": (HIDDEN, INNER)}
    for name, shape in shapes.items():
        values[name] = stored = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            stored = gguf_format.quants.quantize(stored * np.float32(spread), block)
            values[name] = gguf_format.quants.dequantize(stored, block)
        out.add_tensor(f"{name}.weight", stored, raw_dtype=block if len(shape) == 2 else None)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return values


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    return path, write_gguf(path)


@pytest.fixture(scope="module")
def folder(written: tuple[Path, dict[str, np.ndarray]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file converted once, in the cache that every test here uses."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_CACHE", str(cache))
        said: list[str] = []
        made = gguf.converted(written[0], "bf16", said.append)
    assert len(said) == 1 and "tiny.Q8_0.gguf" in said[0]
    return made


def test_the_folder_is_the_dequantized_model(folder: Path, written: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, values = written
    assert gguf.converted(path, "bf16", lambda line: pytest.fail(line)) == folder
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["architectures"], config["rms_norm_eps"]) == (["LlamaForCausalLM"], 1e-5)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for name, own in (("layers.0.mlp.down_proj", "blk.0.ffn_down"), ("embed_tokens", "token_embd")):
        assert torch.equal(tensors[f"model.{name}.weight"], torch.from_numpy(values[own]).bfloat16())
    assert "lm_head.weight" not in tensors  # tied, since the file has no output.weight


def test_loaded_model_and_tokenizer(folder: Path, written: tuple[Path, dict[str, np.ndarray]]) -> None:
    loaded = load(str(written[0]), precision="bf16", threads=str(torch.get_num_threads()))
    assert loaded.folder == folder
    tokenizer = loaded.tokenizer
    assert tokenizer is not None and tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2]
    assert tokenizer("<|im_start|>")["input_ids"] == [1]
    for text in ("  indented = 12\n\n3", "naïve 日本 🙂", "a  b"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # GPT-2's splitting, the fallback, would give the space before a digit to the digit: Ġ Ġ 1.
    assert tokenizer.tokenize("a  12\n\n3") == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]


def test_unknown_splitting_is_reported_not_passed_over(tokenizer: object) -> None:
    assert gguf.split_of_digits_restored(tokenizer, "gpt-2")  # type: ignore[arg-type]
    assert not gguf.split_of_digits_restored(tokenizer, "never-heard-of")  # type: ignore[arg-type]


def test_damaged_files_leave_nothing_behind(tmp_path: Path, written: tuple[Path, object]) -> None:
    for name, content, said in (
        ("cut.gguf", written[0].read_bytes()[:9000], "cannot be"),
        ("other.gguf", b"not a gguf file", "does not begin"),
    ):
        (tmp_path / name).write_bytes(content)
        assert said in refusal(gguf.converted, tmp_path / name, "bf16", lambda line: None).what
    assert not list((packages.cache_folder() / "gguf").glob("*.part"))


Conversions = tuple[Callable[..., Path], list[Path]]


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Conversions:
    """Converts to an empty cache, with a file written in the place of a conversion; and the folders written to."""
    made: list[Path] = []

    def convert(path: Path, dtype: str, into: Path, say: object) -> None:
        (into / "config.json").write_text("{}")
        made.append(into)

    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_convert_in_child", convert)
    return lambda file: gguf.converted(file, "fp32", lambda line: None), made


def test_two_at_once_convert_once(conversions: Conversions, written: tuple[Path, object], monkeypatch) -> None:
    """The lock is on an open file, so that two threads stand for two processes."""
    (converted, made), write = conversions, gguf._convert_in_child
    monkeypatch.setattr(gguf, "_convert_in_child", lambda *of: time.sleep(0.1) or write(*of))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(converted, [written[0]] * 2)
    assert first == second and (first / "config.json").is_file() and len(made) == 1


@pytest.mark.parametrize(
    "change", ["transformers", "gguf", "hub/gguf.py", "hub/terminators.py", "tensor_files.py", "file"]
)
def test_a_file_is_converted_anew_by_another_version_or_code(change, tmp_path, conversions, written, monkeypatch):
    converted, made = conversions
    file = Path(shutil.copy(written[0], tmp_path / "tiny.gguf"))
    first = converted(file)
    assert converted(file) == first and len(made) == 1
    if change == "file":
        file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    else:
        other(monkeypatch, tmp_path / "source", change)
    assert converted(file) != first and len(made) == 2


def test_interrupted_conversion_leaves_nothing_and_is_made_anew(conversions, written, monkeypatch):
    converted, made = conversions
    write = gguf._convert_in_child

    def interrupted(*of: object) -> None:
        write(*of)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf, "_convert_in_child", interrupted)
        converted(written[0])
    assert not [path for path in (packages.cache_folder() / "gguf").iterdir() if path.is_dir()]
    assert (converted(written[0]) / "config.json").read_text() == "{}" and len(made) == 2
