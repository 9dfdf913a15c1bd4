"""Random models with the sizes of published ones, written layer by layer in bf16, int8, NF4 or blocks of a GGUF file.

No more than one tensor is in memory, and never in fp32. Values repeat: each tensor is a part of a pool of random
values, starting at a random position. int8 and NF4 are in the format of bitsandbytes, with double quantization of NF4's
scales. The tokenizer has as many entries as the model.

    python benchmarks/models.py llama-3.1-8b FOLDER --format nf4
    python benchmarks/models.py qwen3-4b model.gguf --format q4_k
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from memory_models import full_size_tokenizer
from torch import Tensor, nn

GEMMA3 = {"sliding_window": 1024, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6}
QWEN3 = {"rms_norm_eps": 1e-6}


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model.

    Attributes:
        family: Prefix of the classes in transformers.
        hidden, layers, mlp: Width, number of blocks and width of the MLP.
        heads, key_heads, head_size: Attention heads.
        vocabulary: Number of tokens.
        is_tied: True if the head is the embedding.
        others: Other arguments of the configuration.
    """

    family: str
    hidden: int
    layers: int
    mlp: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    is_tied: bool
    others: tuple[tuple[str, Any], ...] = ()

    def config(self) -> Any:
        """Return the configuration."""
        config_class = getattr(transformers, f"{self.family}TextConfig", None)
        config_class = config_class or getattr(transformers, f"{self.family}Config")
        return config_class(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.mlp,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_size,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.is_tied,
            max_position_embeddings=8192,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            dtype="bfloat16",
            architectures=[f"{self.family}ForCausalLM"],
            **dict(self.others),
        )


SHAPES = {
    "smollm2-135m": Shape("Llama", 576, 30, 1536, 9, 3, 64, 49152, True),
    "smollm2-360m": Shape("Llama", 960, 32, 2560, 15, 5, 64, 49152, True),
    "qwen2.5-0.5b": Shape("Qwen2", 896, 24, 4864, 14, 2, 64, 151936, True),
    "llama-3.2-1b": Shape("Llama", 2048, 16, 8192, 32, 8, 64, 128256, True),
    "qwen2.5-1.5b": Shape("Qwen2", 1536, 28, 8960, 12, 2, 128, 151936, True),
    "smollm2-1.7b": Shape("Llama", 2048, 24, 8192, 32, 32, 64, 49152, True),
    "llama-3.2-3b": Shape("Llama", 3072, 28, 8192, 24, 8, 128, 128256, True),
    "qwen3-4b": Shape("Qwen3", 2560, 36, 9728, 32, 8, 128, 151936, True, tuple(QWEN3.items())),
    "gemma-3-4b": Shape("Gemma3", 2560, 34, 10240, 8, 4, 256, 262144, True, tuple(GEMMA3.items())),
    "llama-3.1-8b": Shape("Llama", 4096, 32, 14336, 32, 8, 128, 128256, False),
    "qwen3-8b": Shape("Qwen3", 4096, 36, 12288, 32, 8, 128, 151936, False, tuple(QWEN3.items())),
}
FOLDER_FORMATS = ("bf16", "int8", "nf4")
FILE_FORMATS = {"q4_0": GGMLQuantizationType.Q4_0, "q4_k": GGMLQuantizationType.Q4_K, "q8_0": GGMLQuantizationType.Q8_0}
STD = 0.02
POOL = 1 << 24  # values in a pool
SHARD_BYTES = 4 << 30
NF4_BLOCK = 64
NF4_GROUP = 256
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def write_model(name: str, path: Path, kind: str, seed: int = 0) -> Path:
    """Write a random model, unless it exists.

    Args:
        name: Key of :data:`SHAPES`.
        path: New folder, or new ``.gguf`` file.
        kind: One of :data:`FOLDER_FORMATS`, or for a file a key of :data:`FILE_FORMATS`.
        seed: Seed of the random values.

    Returns:
        ``path``.
    """
    if path.exists():
        return path
    if kind in FILE_FORMATS:
        write_gguf(name, path, FILE_FORMATS[kind], seed)
    else:
        write_folder(name, path, kind, seed)
    return path


def write_config(name: str, folder: Path) -> None:
    """Write the configuration and the tokenizer of a model to an existing folder."""
    shape = SHAPES[name]
    shape.config().save_pretrained(folder)
    full_size_tokenizer(shape.vocabulary).save_pretrained(folder)


def write_folder(name: str, folder: Path, kind: str, seed: int = 0) -> None:
    """Write a folder with safetensors files of at most 4 GiB, which appears when it is complete."""
    temporary = folder.with_name(f"{folder.name}.partial")
    temporary.mkdir(parents=True)
    write_config(name, temporary)
    config = SHAPES[name].config()
    if kind != "bf16":
        saved = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
        saved["quantization_config"] = quantization_config(kind)
        (temporary / "config.json").write_text(json.dumps(saved, indent=2), encoding="utf-8")
    random = RandomTensors(seed)
    shards: list[dict[str, tuple[str, tuple[int, ...], Callable[[], Tensor]]]] = [{}]
    filled = 0
    for tensor_name, dtype, shape, make in _stored_tensors(config, kind, random):
        size = int(np.prod(shape)) * _BYTES[dtype]
        if filled + size > SHARD_BYTES and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][tensor_name] = (dtype, shape, make)
        filled += size
    weight_map = {}
    for index, tensors in enumerate(shards, start=1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        _write_safetensors(temporary / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        (temporary / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8"
        )
    temporary.rename(folder)


def quantization_config(kind: str) -> dict[str, Any]:
    """Return the entry of ``config.json`` for weights that bitsandbytes quantized."""
    if kind == "int8":
        return {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }


class RandomTensors:
    """Random tensors, which are parts of pools.

    Args:
        seed: Seed of the pools and of the positions.
    """

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._pools: dict[str, np.ndarray] = {}

    def bf16(self, *shape: int) -> Tensor:
        """Return normally distributed values."""
        values = self._part("bf16", int(np.prod(shape)), self._make_bf16)
        return torch.from_numpy(values).view(torch.bfloat16).view(shape)

    def codes(self, *shape: int) -> Tensor:
        """Return uniformly distributed bytes."""
        values = self._part("codes", int(np.prod(shape)), lambda: self._generator.integers(0, 256, POOL, np.uint8))
        return torch.from_numpy(values).view(shape)

    def blocks(self, kind: GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
        """Return normally distributed values in the blocks of a GGUF type, (rows, bytes per row)."""
        block, size = gguf.GGML_QUANT_SIZES[kind]
        pool = self._pools.get(kind.name)
        if pool is None:
            from deltaw.export.gguf_file import pack

            values = self._generator.standard_normal((POOL // 8 // block, block), np.float32) * STD
            pool = self._pools[kind.name] = pack(values, kind).reshape(-1)
        count = rows * (columns // block)
        start = int(self._generator.integers(0, len(pool) // size)) * size
        return np.resize(np.roll(pool, -start), count * size).reshape(rows, -1)

    def _make_bf16(self) -> np.ndarray:
        values = torch.from_numpy(self._generator.standard_normal(POOL, np.float32) * np.float32(STD))
        return values.to(torch.bfloat16).view(torch.int16).numpy()

    def _part(self, name: str, count: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return ``count`` values of a pool, starting at a random position."""
        if name not in self._pools:
            self._pools[name] = make()
        pool = self._pools[name]
        start = int(self._generator.integers(0, len(pool)))
        return np.resize(np.roll(pool, -start), count)


# Bytes per element and the name of the type in a safetensors header.
_BYTES = {"BF16": 2, "U8": 1, "I8": 1, "F32": 4}
Stored = Iterator[tuple[str, str, tuple[int, ...], Callable[[], Tensor]]]


def _stored_tensors(config: Any, kind: str, random: RandomTensors) -> Stored:
    """Yield name, type and shape of each tensor in the files, and a function that creates it."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        shape = tuple(parameter.shape)
        module = modules[name.rpartition(".")[0]]
        is_quantized = kind != "bf16" and isinstance(module, nn.Linear) and not name.startswith("lm_head")
        if is_quantized and name.endswith(".weight"):
            yield from (_int8_tensors if kind == "int8" else _nf4_tensors)(name, shape[0], shape[1], random)
        elif name.endswith(".weight") and len(shape) == 1:
            # Gemma's norms add 1 to their weight.
            one = 0.0 if config.model_type.startswith("gemma") else 1.0
            yield name, "BF16", shape, lambda shape=shape, one=one: torch.full(shape, one, dtype=torch.bfloat16)
        else:
            yield name, "BF16", shape, lambda shape=shape: random.bf16(*shape)


def _int8_tensors(name: str, rows: int, columns: int, random: RandomTensors) -> Stored:
    yield name, "I8", (rows, columns), lambda: random.codes(rows, columns).view(torch.int8)
    prefix = name.removesuffix("weight")
    # Uniform codes have the standard deviation 74.
    yield f"{prefix}SCB", "F32", (rows,), lambda: torch.full((rows,), STD / 74 * 127)
    yield f"{prefix}weight_format", "U8", (), lambda: torch.zeros((), dtype=torch.uint8)


def _nf4_tensors(name: str, rows: int, columns: int, random: RandomTensors) -> Stored:
    from deltaw.kernels.block_linear import dynamic_codes

    blocks = rows * columns // NF4_BLOCK
    groups = -(-blocks // NF4_GROUP)
    state = {
        "quant_type": "nf4",
        "blocksize": NF4_BLOCK,
        "dtype": "bfloat16",
        "shape": [rows, columns],
        "nested_blocksize": NF4_GROUP,
        "nested_dtype": "float32",
        # The levels of uniform codes have the standard deviation 0.55.
        "nested_offset": STD / 0.55,
    }
    stored_state = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    yield name, "U8", (rows * columns // 2, 1), lambda: random.codes(rows * columns // 2, 1)
    yield f"{name}.absmax", "U8", (blocks,), lambda: random.codes(blocks)
    yield f"{name}.nested_absmax", "F32", (groups,), lambda: torch.full((groups,), STD / 5)
    yield f"{name}.nested_quant_map", "F32", (256,), dynamic_codes
    yield f"{name}.quant_map", "F32", (16,), lambda: torch.tensor(NF4_LEVELS)
    yield f"{name}.quant_state.bitsandbytes__nf4", "U8", tuple(stored_state.shape), lambda: stored_state


def _write_safetensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], Callable[[], Tensor]]]) -> None:
    """Write a safetensors file, one tensor at a time. The format: length of the header, header in JSON, values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, _) in tensors.items():
        size = int(np.prod(shape)) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for _, _, make in tensors.values():
            make().reshape(-1).view(torch.uint8).numpy().tofile(file)


def write_gguf(name: str, path: Path, kind: GGMLQuantizationType, seed: int = 0) -> None:
    """Write a GGUF file with matrices of type ``kind``, which appears when it is complete.

    Embeddings and heads are in Q6_K beside Q4_K, and in Q8_0 beside other types, as in llama.cpp's files.
    """
    from deltaw.export.gguf_architectures import find_architecture
    from deltaw.export.gguf_file import packed_shape, storage_type
    from deltaw.export.gguf_hyperparameters import add_hyperparameters
    from deltaw.export.gguf_tokenizer import add_tokenizer

    config = SHAPES[name].config()
    architecture = find_architecture(config)
    forms = architecture.forms(config, tied=config.tie_word_embeddings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {}
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in model.all_tied_weights_keys:
            continue
        (form,) = forms.of_tensor(parameter_name)
        shape = tuple(parameter.shape)
        shapes[form.name] = (shape, storage_type(form.name, shape, kind.name.lower()))
    temporary = path.with_name(f"{path.name}.partial")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    out = GGUFWriter(temporary, architecture.name)
    out.add_name(name)
    add_hyperparameters(out, architecture, config)
    add_tokenizer(out, full_size_tokenizer(config.vocab_size), config.vocab_size, [config.eos_token_id])
    for tensor_name, (shape, stored) in shapes.items():
        size = int(np.prod(packed_shape(shape, stored)))
        out.add_tensor_info(tensor_name, shape, np.dtype(np.float32), size, raw_dtype=stored)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    assert out.fout is not None
    file = out.fout[0]
    random = RandomTensors(seed)
    file.write(b"\0" * (GGUFWriter.ggml_pad(file.tell(), out.data_alignment) - file.tell()))
    for shape, stored in shapes.values():
        if stored == GGMLQuantizationType.F32:
            np.ones(shape, np.float32).tofile(file)
        else:
            random.blocks(stored, shape[0], shape[1]).tofile(file)
        file.write(b"\0" * (GGUFWriter.ggml_pad(file.tell(), out.data_alignment) - file.tell()))
    out.close()
    temporary.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(SHAPES))
    parser.add_argument("path", type=Path, help="new folder, or new .gguf file")
    parser.add_argument("--format", choices=[*FOLDER_FORMATS, *FILE_FORMATS], default="nf4")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.path.exists():
        parser.error(f"{args.path} already exists")
    write_model(args.model, args.path, args.format, args.seed)
    files = [args.path] if args.path.is_file() else list(args.path.iterdir())
    print(f"{args.path}: {sum(file.stat().st_size for file in files) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
