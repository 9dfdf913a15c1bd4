"""Conversion of a tiny generated .gguf file, with a small vocabulary."""

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
from tests.caches import invalidate
from tests.data.conftest import refusal

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HIDDEN = 32
KEYS = 16
INNER = 64


def write_gguf(path: Path, architecture: str = "llama", spread: float = 1.0) -> dict[str, np.ndarray]:
    """Write a one-layer Llama with Q8_0 weights of the given standard deviation, and return the dequantized values."""
    random = np.random.default_rng(0)
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "ĊĊ"]
    out = gguf_format.GGUFWriter(path, architecture)
    sizes = {"context_length": 64, "embedding_length": HIDDEN, "block_count": 1, "feed_forward_length": INNER}
    heads = {"head_count": 2, "head_count_kv": 1, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": KEYS}
    names = {"tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "token_list": tokens, "vocab_size": len(tokens)}
    kinds = {"token_types": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)), "token_merges": ["Ġ Ġ", "Ċ Ċ"]}
    end_tokens = {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": False}
    template = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    for name, value in {**sizes, **heads, **names, **kinds, **end_tokens, **template}.items():
        getattr(out, f"add_{name}")(value)
    block = gguf_format.GGMLQuantizationType.Q8_0
    values = {}
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.0.{name}_norm": (HIDDEN,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "output")}
    shapes |= {f"blk.0.attn_{name}": (KEYS, HIDDEN) for name in ("k", "v")}
    shapes |= {"blk.0.ffn_gate": (INNER, HIDDEN), "blk.0.ffn_up": (INNER, HIDDEN), "blk.0.ffn_down": (HIDDEN, INNER)}
    for name, shape in shapes.items():
        values[name] = data = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            data = gguf_format.quants.quantize(data * np.float32(spread), block)
            values[name] = gguf_format.quants.dequantize(data, block)
        out.add_tensor(f"{name}.weight", data, raw_dtype=block if len(shape) == 2 else None)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return values


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    return path, write_gguf(path)


@pytest.fixture(scope="module")
def folder(gguf_file: tuple[Path, dict[str, np.ndarray]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file converted once, in the cache shared by the tests of this module."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_CACHE", str(cache))
        log_lines: list[str] = []
        converted = gguf.converted_folder(gguf_file[0], "bf16", log_lines.append)
    assert len(log_lines) == 1 and "tiny.Q8_0.gguf" in log_lines[0]
    return converted


def test_converted_folder_is_the_dequantized_model(folder: Path, gguf_file: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, values = gguf_file
    assert gguf.converted_folder(path, "bf16", lambda line: pytest.fail(line)) == folder
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["architectures"], config["rms_norm_eps"]) == (["LlamaForCausalLM"], 1e-5)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for name, gguf_name in (("layers.0.mlp.down_proj", "blk.0.ffn_down"), ("embed_tokens", "token_embd")):
        assert torch.equal(tensors[f"model.{name}.weight"], torch.from_numpy(values[gguf_name]).bfloat16())
    assert "lm_head.weight" not in tensors  # tied, since the file has no output.weight


def test_converted_model_and_tokenizer_can_be_loaded(
    folder: Path, gguf_file: tuple[Path, dict[str, np.ndarray]]
) -> None:
    loaded = load(str(gguf_file[0]), precision="bf16", threads=str(torch.get_num_threads()))
    assert loaded.folder == folder
    tokenizer = loaded.tokenizer
    assert tokenizer is not None and tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2]
    assert tokenizer("<|im_start|>")["input_ids"] == [1]
    for text in ("  indented = 12\n\n3", "naïve 日本 🙂", "a  b"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # The fallback, GPT-2's splitting, would attach the space to the digit: Ġ Ġ 1.
    assert tokenizer.tokenize("a  12\n\n3") == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]


def test_unknown_pre_tokenizer_is_reported(tokenizer: object) -> None:
    assert gguf.restore_digit_splitting(tokenizer, "gpt-2")  # type: ignore[arg-type]
    assert not gguf.restore_digit_splitting(tokenizer, "never-heard-of")  # type: ignore[arg-type]


def test_damaged_files_leave_no_partial_folders(tmp_path: Path, gguf_file: tuple[Path, object]) -> None:
    for name, content, message in (
        ("cut.gguf", gguf_file[0].read_bytes()[:9000], "cannot be"),
        ("other.gguf", b"not a gguf file", "is not a .gguf"),
    ):
        (tmp_path / name).write_bytes(content)
        assert message in refusal(gguf.converted_folder, tmp_path / name, "bf16", lambda line: None).message
    assert not list((packages.cache_folder() / "gguf").glob("*.part"))


Conversions = tuple[Callable[..., Path], list[Path]]


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Conversions:
    """Conversion function with an empty cache that only writes a config file, and the list of its folders."""
    folders: list[Path] = []

    def convert(path: Path, dtype: str, into: Path, log: object) -> None:
        (into / "config.json").write_text("{}")
        folders.append(into)

    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_convert_in_child", convert)
    return lambda file: gguf.converted_folder(file, "fp32", lambda line: None), folders


def test_concurrent_requests_convert_once(
    conversions: Conversions, gguf_file: tuple[Path, object], monkeypatch
) -> None:
    """The lock is on an open file, so two threads behave like two processes."""
    convert, folders = conversions
    write = gguf._convert_in_child
    monkeypatch.setattr(gguf, "_convert_in_child", lambda *args: time.sleep(0.1) or write(*args))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(convert, [gguf_file[0]] * 2)
    assert first == second and (first / "config.json").is_file() and len(folders) == 1


@pytest.mark.parametrize(
    "change", ["transformers", "gguf", "hub/gguf.py", "hub/terminators.py", "tensor_files.py", "file"]
)
def test_changed_version_or_code_causes_reconversion(change, tmp_path, conversions, gguf_file, monkeypatch):
    convert, folders = conversions
    file = Path(shutil.copy(gguf_file[0], tmp_path / "tiny.gguf"))
    first = convert(file)
    assert convert(file) == first and len(folders) == 1
    if change == "file":
        file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    else:
        invalidate(monkeypatch, tmp_path / "source", change)
    assert convert(file) != first and len(folders) == 2


def test_interrupted_conversion_is_removed_and_repeated(conversions, gguf_file, monkeypatch):
    convert, folders = conversions
    write = gguf._convert_in_child

    def interrupted(*args: object) -> None:
        write(*args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf, "_convert_in_child", interrupted)
        convert(gguf_file[0])
    assert not [path for path in (packages.cache_folder() / "gguf").iterdir() if path.is_dir()]
    assert (convert(gguf_file[0]) / "config.json").read_text() == "{}" and len(folders) == 2
