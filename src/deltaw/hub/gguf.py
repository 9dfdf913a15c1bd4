"""Conversion of ``.gguf`` files to folders of safetensors, with a cache.

Dequantizing takes much longer than loading, so the result is cached by the digest of the file. Tensors, configuration
and tokenizer are read by transformers. This module restores information that transformers ignores: the splitting of
digits, the terminators in the generation configuration, and the removal of quantization settings. See
:mod:`deltaw.hub.gguf_settings` for settings of the model.

With precision ``gguf``, matrices remain in the file. The folder contains an index of their blocks and the few other
tensors.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from tokenizers import decoders, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from deltaw.cache.entries import Cache
from deltaw.cache.keys import key
from deltaw.cache.results import file_digest
from deltaw.child_process import python_command, run_command
from deltaw.errors import UserError, first_line
from deltaw.hub import packages
from deltaw.hub.gguf_blocks import INDEX, ORDERS, index_parameters, string_field
from deltaw.hub.gguf_settings import restore_settings
from deltaw.hub.terminators import terminators
from deltaw.hub.transformers_private import WITHOUT_HUB_KERNELS, detach_from_model_config, quiet, remove_source_path
from deltaw.machine.choices import dtype_of
from deltaw.progress import track_progress
from deltaw.tensor_files import save_tensors

if not hasattr(gguf, "__version__"):
    # The metadata of gguf's wheel lacks its modules, so transformers reads this attribute in Python 3.10.
    vars(gguf)["__version__"] = metadata.version("gguf")


# Maximum size of all converted models. A larger model remains until the next conversion.
LIMIT_BYTES = 256 * 2**30
CONVERSION_DEPENDENCIES = (
    *("transformers", "gguf", "tokenizers", "torch", "safetensors", "numpy"),
    *("deltaw.hub.gguf", "deltaw.hub.gguf_blocks", "deltaw.hub.gguf_settings", "deltaw.hub.terminators"),
    *("deltaw.tensor_files", "deltaw.kernels.block_linear"),
)

# llama.cpp's names of pre-tokenizers that split every digit.
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
# llama.cpp's names of pre-tokenizers equivalent to GPT-2's, the fallback of transformers.
_GPT2_SPLITTING = frozenset({"gpt-2", "phi-2", "olmo", "mpt", "default", "jina-es", "jina-de", "roberta-bpe"})

_CHILD = (
    "from deltaw.worker_process import read_input; read_input(); "
    "from deltaw.hub.gguf import convert_in_process; sys.exit(convert_in_process(*sys.argv[1:]))"
)


def converted_folder(gguf_path: Path, dtype: str, log: Callable[[str], None] = print, title: str | None = None) -> Path:
    """Return the folder of a converted ``.gguf`` file, converting it if it is not cached.

    The folder contains safetensors in ``dtype``, the tokenizer with its chat template, and a generation configuration
    with all terminators. It is created atomically. Concurrent processes wait for the first one.

    Args:
        gguf_path: Path of the file.
        dtype: Key of :data:`deltaw.machine.choices.PRECISIONS`.
        log: Receives a message if the file is converted.
        title: Name in messages, or None for the name of the file.

    Raises:
        UserError: if the file is damaged, or transformers does not support its architecture.
    """
    cache, name, dtype = _cache_entry(gguf_path, dtype)
    title = title or gguf_path.name

    def convert(folder: Path) -> None:
        action, suffix = ("reading the index of", "") if dtype == "gguf" else ("converting", f" to {dtype}")
        size = gguf_path.stat().st_size / 1e6
        log(f"{action} {title} ({size:.0f} MB){suffix}, once, into {cache.folder / name}")
        with track_progress(f"converting {title}"):
            _convert_in_child(gguf_path, dtype, folder, log)

    return cache.create_folder(name, convert)


def _cache_entry(path: Path, dtype: str) -> tuple[Cache, str, str]:
    """Return the cache, the key of a converted file, and the type of its tensors."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        message = f"the file cannot be read: {error.strerror or error}"
        hint = "check its path and permissions"
        raise UserError(message, location=str(path), hint=hint) from error
    if magic != b"GGUF":
        raise UserError("the file is not a .gguf file", location=str(path), hint="download the file again")
    cache = Cache("gguf", LIMIT_BYTES, mark="{}", folder=packages.cache_folder() / "gguf")
    if dtype in ("int8", "nf4"):
        dtype = "bf16"  # quantized after loading
    with track_progress(f"checking {path.name}"):
        digest = file_digest(path)
    return cache, f"{digest[:16]}-{dtype}-{key('gguf', [digest, dtype], CONVERSION_DEPENDENCIES)[:16]}", dtype


def tokenizer_of(path: Path, dtype: str) -> Path | PreTrainedTokenizerFast:
    """Return the tokenizer of a .gguf file without converting weights, or the folder of an earlier conversion.

    Raises:
        UserError: if it cannot be read.
    """
    cache, name, _ = _cache_entry(path, dtype)
    if (cache.folder / name).is_dir():
        return cache.folder / name
    with _cached_parsing():
        return _tokenizer(path)[0]


def restore_digit_splitting(tokenizer: PreTrainedTokenizerFast, pre: str | None) -> bool:
    """Set the pre-tokenizer that the vocabulary was trained with. Return False if it is unknown.

    A GGUF file contains only its name (``tokenizer.ggml.pre``). transformers uses GPT-2's pre-tokenizer for unknown
    names, which joins spaces and line breaks with a following digit. Texts would then have other tokens than in
    training.
    """
    backend = tokenizer.backend_tokenizer
    if pre in _SINGLE_DIGITS:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        return True
    # transformers uses a Sequence for known names, and a plain ByteLevel as its fallback.
    is_fallback = isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)
    return not is_fallback or pre is None or pre in _GPT2_SPLITTING


def _convert_in_child(path: Path, dtype: str, target: Path, log: Callable[[str], None]) -> None:
    """Convert in a child process, so that its memory is released completely.

    A conversion needs several times the memory of the model and would otherwise determine the peak memory of a run.
    """
    command = python_command(_CHILD, [str(path.resolve()), dtype, str(target)])
    completed = run_command(command, stdin_bytes=None)
    for entry in (json.loads(line) for line in completed.output.splitlines() if line.startswith('{"')):
        if "note" in entry:
            log(entry["note"])
        if "what" in entry:
            raise UserError(entry["what"], location=entry["where"], hint=entry["hint"])
    status = completed.status
    if status is not None and status < 0:
        hint = "the conversion needs more memory than the model: free some, or convert on a larger machine"
        raise UserError(f"conversion was stopped by signal {-status}", location=str(path), hint=hint)
    if status != 0:
        raise RuntimeError(f"converting '{path}' failed:\n{completed.messages[-2000:]}")


def convert_in_process(path: str, dtype: str, target: str) -> int:
    """Convert a file in the child process and report to standard output, with one JSON object per line.

    Returns:
        Exit status: 0 on success, 2 for a UserError, which is the last object in the output.
    """
    output = sys.stdout
    try:
        # Libraries may print to standard output, which is reserved for the JSON objects.
        sink = io.StringIO()
        with quiet(), _cached_parsing(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            config = _config(Path(path))
            model = _meta_model(config) if dtype == "gguf" else _model(Path(path), config, dtype_of(dtype))
            _clean_config(model)
            tokenizer, note = _tokenizer(Path(path))
            terminator_ids = terminators(model, tokenizer)
            if model.generation_config is not None and terminator_ids:
                model.generation_config.eos_token_id = terminator_ids if len(terminator_ids) > 1 else terminator_ids[0]
                # Otherwise transformers regenerates it from the model's configuration, which has only one terminator.
                detach_from_model_config(model.generation_config)
            if dtype == "gguf":
                _save_index(Path(path), model, Path(target))
            else:
                model.save_pretrained(target)
            tokenizer.save_pretrained(target)
    except UserError as error:
        print(json.dumps({"what": error.message, "where": error.location, "hint": error.hint}), file=output)
        return 2
    if note:
        print(json.dumps({"note": note}), file=output)
    return 0


@contextlib.contextmanager
def _cached_parsing() -> Iterator[None]:
    """Cache the parsed header and the tensor names of a file within the block.

    transformers parses the header for the configuration, the weights and the tokenizer, and maps names for each module,
    which takes half of the conversion time of a small model.
    """
    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    vars(gguf).update({name: functools.cache(function) for name, function in originals.items()})
    try:
        yield
    finally:
        vars(gguf).update(originals)


def _config(path: Path) -> PretrainedConfig:
    """Return the configuration of the file, with the settings that transformers ignores."""
    with _report_damage(path, "read"):
        config: PretrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        restore_settings(gguf.GGUFReader(str(path)), config)
        return config


def _model(path: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    # Newer versions of transformers do not dequantize blocks by default.
    packed = getattr(transformers, "GgufConfig", None)
    options = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    options |= {"gguf_file": path.name, "dtype": dtype, "local_files_only": True, "config": config}
    options |= WITHOUT_HUB_KERNELS
    with _report_damage(path, "converted"):
        return AutoModelForCausalLM.from_pretrained(path.parent, **options)


def _meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model of a configuration on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@contextlib.contextmanager
def _report_damage(path: Path, operation: str, part: str = "the .gguf file") -> Iterator[None]:
    """Convert any exception in the block to a UserError about a damaged file.

    Args:
        path: Path of the file.
        operation: Participle of the failed operation, for example "read".
        part: Name of the part that is read.
    """
    try:
        yield
    except MemoryError:
        raise
    except UserError as error:
        raise UserError(error.message, location=str(path), hint=error.hint) from error
    except Exception as error:
        hint = "download the file again, or use the model's safetensors folder"
        reason = first_line(error)
        if "ignore_mismatched_sizes" in reason:
            reason = "transformers assumes other sizes of its tensors"
        raise UserError(f"{part} cannot be {operation}: {reason}", location=str(path), hint=hint) from error


def _save_index(path: Path, model: PreTrainedModel, target: Path) -> None:
    """Write the configurations, the block index, and the plain tensors."""
    index = index_parameters(path, model, torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(target)
    save_tensors(target / "model.safetensors", index.plain, {"format": "pt"})
    save_tensors(target / ORDERS, index.orders, {})
    lines = {"parameters": [asdict(entry) for entry in index.entries]}
    (target / INDEX).write_text(json.dumps(lines), encoding="utf-8")


def _clean_config(model: PreTrainedModel) -> None:
    """Remove settings that only apply to reading the GGUF file from a model's configuration."""
    # With this setting, loaders would expect quantized blocks.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.__dict__.pop("is_quantized", None)
    remove_source_path(model.config)
    # GGUF stores fp32 values: 1e-05 is read as 9.999999747378752e-06.
    for name, value in vars(model.config).items():
        if isinstance(value, float):
            setattr(model.config, name, float(str(np.float32(value))))


def _tokenizer(path: Path) -> tuple[PreTrainedTokenizerFast, str | None]:
    """Return the tokenizer, and a note for the user if its splitting is unknown."""
    with _report_damage(path, "read", "the tokenizer inside the .gguf file"):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        hint = "use the model's safetensors folder"
        raise UserError("the type of the .gguf file's tokenizer is not supported", location=str(path), hint=hint)
    # Do not save settings of this call.
    for name in ("local_files_only", "is_local"):
        tokenizer.init_kwargs.pop(name, None)
    header = gguf.GGUFReader(str(path))
    end = string_field(header, "tokenizer.ggml.eos_token_id")
    if end is not None and end.isdecimal() and int(end) < len(tokenizer):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(end))  # transformers 5.11 sets another token
    kind = string_field(header, "tokenizer.ggml.model")
    pre = string_field(header, "tokenizer.ggml.pre")
    if kind == "gpt2":
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()  # transformers 5.11 drops a leading space
    if kind == "gpt2" and not restore_digit_splitting(tokenizer, pre):
        effect = "so some texts have other tokens than in training. The safetensors folder has the exact tokenizer."
        return tokenizer, f"note: the file's pre-tokenizer '{pre}' is not supported and replaced by GPT-2's, {effect}"
    return tokenizer, None
