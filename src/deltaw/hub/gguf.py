"""A ``.gguf`` file becomes a folder of safetensors, once.

De-quantizing takes far longer than loading, so its result is kept in the cache under the file's own
digest, and every later run loads the folder. The tensors, the configuration and the tokenizer come from
transformers' reader; what it leaves out is restored here: the tokenizer's splitting of digits, the
terminators in the generation configuration, and the mark of a quantization that is no longer there.

With precision ``gguf`` the folder holds no matrices: an index says where their blocks lie in the file
(``gguf_index``), and the few plain tensors stand beside it.

It does not know what a model is used for, nor how one is loaded from a folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from deltaw.cache import Cache, file_digest, key
from deltaw.errors import UserError
from deltaw.host.choices import dtype_of
from deltaw.hub import packages
from deltaw.hub.gguf_index import INDEX, ORDERS, indexed
from deltaw.hub.quiet import quiet
from deltaw.hub.terminators import terminators
from deltaw.hub.transformers_private import forget_origin, settle
from deltaw.tensor_files import save_tensors
from deltaw.working import working

# All converted models together; a larger one is kept until the next is converted.
LIMIT_BYTES = 256 * 2**30
MADE_BY = (
    *("transformers", "gguf", "tokenizers", "torch", "safetensors", "numpy"),
    *("deltaw.hub.gguf", "deltaw.hub.gguf_index", "deltaw.hub.terminators", "deltaw.tensor_files"),
    "deltaw.kernels.block_formats",
)

# Vocabularies learned with every digit on its own, under the names that llama.cpp gives them.
_SINGLE_DIGITS = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)
# Vocabularies split the way GPT-2's is, which is what transformers falls back to.
_LIKE_GPT2 = frozenset({"gpt-2", "phi-2", "olmo", "mpt", "default", "jina-es", "jina-de", "roberta-bpe"})

# The child takes this process's search path whole: its working folder must not come before the packages.
_CHILD = (
    "import sys; sys.path[:] = sys.argv[4:]; "
    "from deltaw.hub.gguf import convert_here; sys.exit(convert_here(*sys.argv[1:4]))"
)


def converted(gguf_path: Path, dtype: str, say: Callable[[str], None] = print) -> Path:
    """The folder that ``gguf_path`` de-quantizes to, made now if it is not in the cache.

    The folder holds safetensors in ``dtype``, the tokenizer with its chat template, and a generation
    configuration with all terminators. It appears whole or not at all; a second process that wants the
    same one waits for the first.

    Args:
        gguf_path: the file.
        dtype: a key of :data:`deltaw.host.choices.PRECISIONS`.
        say: told in one line what is being done, when it is done.

    Raises:
        UserError: the file is damaged, or of an architecture that transformers does not read.
    """
    _require_gguf(gguf_path)
    cache = Cache("gguf", LIMIT_BYTES, mark="{}", folder=packages.cache_folder() / "gguf")
    if dtype in ("int8", "nf4"):
        dtype = "bf16"  # they are made from bf16 once it is loaded
    with working(f"checking {gguf_path.name}"):
        digest = file_digest(gguf_path)
    name = f"{digest[:16]}-{dtype}-{key('gguf', [digest, dtype], MADE_BY)[:16]}"
    target = cache.folder / name
    if not target.is_dir():
        try:
            _convert(gguf_path, dtype, cache, name, say)
        except OSError as error:
            raise UserError(
                f"cannot keep the converted model: {error.strerror or error}",
                where=str(cache.folder),
                hint="free space there, or choose another cache folder",
            ) from error
    cache.used(name)
    return target


def _convert(path: Path, dtype: str, cache: Cache, name: str, say: Callable[[str], None]) -> None:
    """Make the entry ``name``, unless another process makes it meanwhile."""
    lock = cache.lock(name)
    try:
        if (cache.folder / name).is_dir():
            return
        size = path.stat().st_size
        way = "reading the index of" if dtype == "gguf" else "converting"
        to = "" if dtype == "gguf" else f" to {dtype}"
        say(f"{way} {path.name} ({size / 1e6:.0f} MB){to}, once, into {cache.folder / name}")
        cache.make_room(but=name)
        _build(path, dtype, cache.folder / name, say)
    finally:
        lock.release()


def split_of_digits_restored(tokenizer: PreTrainedTokenizerFast, pre: str | None) -> bool:
    """Give the tokenizer the splitting that its vocabulary was learned with; False if it is not known.

    A GGUF names the splitting (``tokenizer.ggml.pre``) instead of holding it. transformers knows some of
    the names and takes GPT-2's for the rest, which joins a run of spaces or line breaks to the digit behind
    it: the same text then becomes other tokens than those the model was trained on.
    """
    backend = tokenizer.backend_tokenizer
    if pre in _SINGLE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        return True
    # transformers sets a sequence where it knows the name; the bare byte level is its fallback.
    fell_back = isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)
    return not fell_back or pre is None or pre in _LIKE_GPT2


def _build(path: Path, dtype: str, target: Path, say: Callable[[str], None]) -> None:
    """Convert into a folder beside ``target`` and rename it into place."""
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        with working(f"converting {path.name}"):
            _convert_in_child(path, dtype, partial, say)
        for file in partial.iterdir():
            file.chmod(0o644)
            with file.open("rb") as written:
                os.fsync(written.fileno())
        partial.chmod(0o755)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert_in_child(path: Path, dtype: str, into: Path, say: Callable[[str], None]) -> None:
    """Convert in a process of its own, which gives all of its memory back.

    Converting holds the model several times over. Done here, it would stay the peak of a run that itself
    needs far less, and a run could not be kept within what was planned for it.
    """
    command = [sys.executable, "-c", _CHILD, str(path.resolve()), dtype, str(into), *filter(None, sys.path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    report = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    for entry in report:
        if "note" in entry:
            say(entry["note"])
        if "what" in entry:
            raise UserError(entry["what"], where=entry["where"], hint=entry["hint"])
    if done.returncode < 0:
        raise UserError(
            f"converting the file was stopped by signal {-done.returncode}",
            where=str(path),
            hint="it needs more memory than the model itself: free some, or convert where there is more",
        )
    if done.returncode:
        raise RuntimeError(f"converting '{path}' failed:\n{done.stderr[-2000:]}")


def convert_here(path: str, dtype: str, into: str) -> int:
    """What the child process does: convert, and report on standard output, a JSON object a line.

    Returns:
        The exit status: 0 done, 2 a user's error, which is the last object printed.
    """
    answers = sys.stdout
    try:
        # The model library prints where it likes; only this function's own lines are an answer.
        with quiet(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            model = _without_values(Path(path)) if dtype == "gguf" else _model(Path(path), dtype_of(dtype))
            tokenizer, note = _tokenizer(Path(path))
            _set_terminators(model, tokenizer)
            if dtype == "gguf":
                _save_index(Path(path), model, Path(into))
            else:
                model.save_pretrained(into)
            tokenizer.save_pretrained(into)
    except UserError as error:
        entry = {"what": error.what, "where": error.where, "hint": error.hint}
        print(json.dumps(entry), file=answers)
        return 2
    if note:
        print(json.dumps({"note": note}), file=answers)
    return 0


def _model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    if importlib.util.find_spec("accelerate") is None:
        raise UserError(
            "reading a .gguf file needs the package 'accelerate'",
            where=str(path),
            hint="pip install accelerate",
        )
    # Newer versions of transformers can keep the blocks packed; a trained model needs them unpacked.
    packed = getattr(transformers, "GgufConfig", None)
    extra = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    with _damage_named(path, "converted"):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, local_files_only=True, **extra
        )
    _clean(model)
    return model


def _without_values(path: Path) -> PreTrainedModel:
    """The model of the file's configuration on the meta device."""
    with _damage_named(path, "read"):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    _clean(model)
    return model


@contextlib.contextmanager
def _damage_named(path: Path, done: str) -> Iterator[None]:
    """Make a UserError of what a damaged file lets its readers raise, whatever they stumble over.

    Args:
        done: what is done to the file meanwhile, as "read".
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"the .gguf file cannot be {done}: {_first_line(error)}",
            where=str(path),
            hint="fetch the file again, or give the model's safetensors folder instead",
        ) from error


def _save_index(path: Path, model: PreTrainedModel, into: Path) -> None:
    """Write the configurations, the index, and the tensors that do not stay in blocks."""
    found = indexed(path, model, torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(into)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(into)
    save_tensors(into / "model.safetensors", found.plain, {"format": "pt"})
    save_tensors(into / ORDERS, found.orders, {})
    lines = {"parameters": [entry.as_dict() for entry in found.entries]}
    (into / INDEX).write_text(json.dumps(lines), encoding="utf-8")


def _clean(model: PreTrainedModel) -> None:
    """Take out of a model's configuration what is of its reading alone."""
    # The mark of the quantization makes every later loader look for packed blocks.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.__dict__.pop("is_quantized", None)
    forget_origin(model.config)
    # A GGUF keeps its numbers in 32 bits: 1e-05 comes back as 9.999999747378752e-06.
    for name, value in vars(model.config).items():
        if isinstance(value, float):
            setattr(model.config, name, float(str(np.float32(value))))


def _tokenizer(path: Path) -> tuple[PreTrainedTokenizerFast, str | None]:
    """The tokenizer, and what to say about it."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes its readers raise whatever they stumble over
        raise UserError(
            f"the tokenizer inside the .gguf file cannot be read: {_first_line(error)}",
            where=str(path),
            hint="give the model's safetensors folder instead",
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            "the .gguf file's tokenizer is of a kind that cannot be saved",
            where=str(path),
            hint="give the model's safetensors folder instead",
        )
    # How it was read just now is nobody's business later.
    for name in ("local_files_only", "is_local"):
        tokenizer.init_kwargs.pop(name, None)
    header = GGUFReader(path)
    model_field, pre_field = header.get_field("tokenizer.ggml.model"), header.get_field("tokenizer.ggml.pre")
    byte_level = model_field is not None and model_field.contents() == "gpt2"
    pre = None if pre_field is None else str(pre_field.contents())
    if byte_level and not split_of_digits_restored(tokenizer, pre):
        return tokenizer, (
            f"note: the file splits text as '{pre}', which is not known here; it is split as GPT-2 does, so "
            "some texts become other tokens than in training. The model's own folder has the exact tokenizer."
        )
    return tokenizer, None


def _set_terminators(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write every terminator where every program looks for them."""
    ends = terminators(model, tokenizer)
    if model.generation_config is not None and ends:
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        # Else it would be made anew from the model's configuration, which names one terminator.
        settle(model.generation_config)


def _require_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(
            f"the file cannot be read: {error.strerror or error}",
            where=str(path),
            hint="check its path and that you may read it",
        ) from error
    if magic != b"GGUF":
        raise UserError(
            "the file does not begin as a .gguf file does", where=str(path), hint="fetch the file again"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
