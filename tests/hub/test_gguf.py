"""Conversion of a tiny .gguf file that is written here, with the tokenizer of a small vocabulary."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf as gguf_format
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from deltaw.errors import UserError
from deltaw.hub import gguf, packages
from deltaw.hub.loading import load
from tests.caches import other_text, other_version

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HIDDEN, KEYS, INNER = 32, 16, 64


def write_gguf(path: Path, architecture: str = "llama", spread: float = 1.0) -> dict[str, np.ndarray]:
    """A Llama of one layer with Q8_0 weights of a standard deviation; returns what they de-quantize to."""
    random = np.random.default_rng(0)
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "ĊĊ"]
    out = gguf_format.GGUFWriter(path, architecture)
    facts: dict[str, object] = {
        "context_length": 64,
        "embedding_length": HIDDEN,
        "block_count": 1,
        "feed_forward_length": INNER,
        "head_count": 2,
        "head_count_kv": 1,
        "layer_norm_rms_eps": 1e-5,
        "rope_dimension_count": KEYS,
        "vocab_size": len(tokens),
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": tokens,
        "token_types": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "token_merges": ["Ġ Ġ", "Ċ Ċ"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    for name, value in facts.items():
        getattr(out, f"add_{name}")(value)
    block = gguf_format.GGMLQuantizationType.Q8_0
    values = {}
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.0.{name}_norm": (HIDDEN,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "output")}
    shapes |= {f"blk.0.attn_{name}": (KEYS, HIDDEN) for name in ("k", "v")}
    shapes |= {"blk.0.ffn_gate": (INNER, HIDDEN), "blk.0.ffn_up": (INNER, HIDDEN), "blk.0.ffn_down": (HIDDEN, INNER)}
    for name, shape in shapes.items():
        tensor = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            packed = gguf_format.quants.quantize(tensor * np.float32(spread), block)
            out.add_tensor(f"{name}.weight", packed, raw_dtype=block)
            tensor = gguf_format.quants.dequantize(packed, block)
        else:
            out.add_tensor(f"{name}.weight", tensor)
        values[name] = tensor
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
    values = written[1]
    assert gguf.converted(written[0], "bf16", lambda line: pytest.fail(line)) == folder
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["architectures"], config["rms_norm_eps"]) == (["LlamaForCausalLM"], 1e-5)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    expected = torch.from_numpy(values["blk.0.ffn_down"]).bfloat16()
    assert torch.equal(tensors["model.layers.0.mlp.down_proj.weight"], expected)
    embedding = torch.from_numpy(values["token_embd"]).bfloat16()
    assert torch.equal(tensors["model.embed_tokens.weight"], embedding)
    assert "lm_head.weight" not in tensors  # tied, since the file has no output.weight


def test_loaded_model_and_tokenizer(folder: Path, written: tuple[Path, dict[str, np.ndarray]]) -> None:
    loaded = load(str(written[0]), precision="bf16", threads=str(torch.get_num_threads()))
    assert loaded.folder == folder
    tokenizer = loaded.tokenizer
    assert tokenizer is not None and tokenizer.chat_template
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2]
    assert tokenizer("<|im_start|>")["input_ids"] == [1]
    assert tokenizer.eos_token == "<|im_end|>"
    for text in ("  indented = 12\n\n3", "naïve 日本 🙂", "a  b"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # GPT-2's splitting, the fallback, would give the space before a digit to the digit: Ġ Ġ 1.
    assert tokenizer.tokenize("a  12\n\n3") == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]


def test_unknown_splitting_is_reported_not_passed_over(tokenizer: object) -> None:
    assert gguf.split_of_digits_restored(tokenizer, "gpt-2")  # type: ignore[arg-type]
    assert not gguf.split_of_digits_restored(tokenizer, "never-heard-of")  # type: ignore[arg-type]


def test_damaged_files_leave_nothing_behind(tmp_path, written, monkeypatch):
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        with contextlib.redirect_stdout(io.StringIO()) as told:
            status = gguf.convert_here(*command[3:6])
        return subprocess.CompletedProcess(command, status, told.getvalue(), "")

    monkeypatch.setattr(gguf.subprocess, "run", run)  # in this process
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(written[0].read_bytes()[:9000])
    with pytest.raises(UserError, match="cannot be"):
        gguf.converted(cut, "bf16", lambda line: None)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"not a gguf file")
    with pytest.raises(UserError, match="does not begin"):
        gguf.converted(other, "bf16", lambda line: None)
    left = [path.name for path in (packages.cache_folder() / "gguf").iterdir() if path.suffix == ".part"]
    assert left == []


def converts(conversions: list[Path], content: str = "{}"):
    """In the place of a conversion: writes a file."""

    def convert(path: Path, dtype: str, into: Path, say: object) -> None:
        conversions.append(into)
        (into / "config.json").write_text(content)

    return convert


def test_two_at_once_convert_once(tmp_path, written, monkeypatch):
    """The lock is on an open file, so that two threads stand for two processes."""
    conversions: list[Path] = []
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path))
    write = converts(conversions)
    monkeypatch.setattr(gguf, "_convert_in_child", lambda *of: time.sleep(0.2) or write(*of))
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: gguf.converted(written[0], "fp32", lambda line: None), range(2)))
    assert made[0] == made[1] and (made[0] / "config.json").is_file()
    assert len(conversions) == 1


@pytest.mark.parametrize(
    "change", ["transformers", "gguf", "hub/gguf.py", "hub/terminators.py", "tensor_files.py", "file"]
)
def test_a_file_is_converted_anew_by_another_version_or_code(change, tmp_path, written, monkeypatch):
    conversions: list[Path] = []
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path))
    monkeypatch.setattr(gguf, "_convert_in_child", converts(conversions))
    file = Path(shutil.copy(written[0], tmp_path / "tiny.gguf"))
    first = gguf.converted(file, "fp32", lambda line: None)
    assert gguf.converted(file, "fp32", lambda line: None) == first and len(conversions) == 1
    if change == "file":
        with file.open("r+b") as out:
            out.seek(-1, 2)
            out.write(b"\x55")
    elif change.endswith(".py"):
        other_text(monkeypatch, tmp_path / "source", change)
    else:
        other_version(monkeypatch, change)
    assert gguf.converted(file, "fp32", lambda line: None) != first and len(conversions) == 2


def test_interrupted_conversion_leaves_nothing_and_is_made_anew(tmp_path, written, monkeypatch):
    def interrupted(*of: object) -> None:
        converts([], "half of i")(*of)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path))
    monkeypatch.setattr(gguf, "_convert_in_child", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gguf.converted(written[0], "fp32", lambda line: None)
    assert [path for path in (packages.cache_folder() / "gguf").iterdir() if path.is_dir()] == []
    monkeypatch.setattr(gguf, "_convert_in_child", converts([], "whole"))
    made = gguf.converted(written[0], "fp32", lambda line: None)
    assert (made / "config.json").read_text() == "whole"
