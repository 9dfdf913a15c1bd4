"""Loading of tokenizers, with a cache per process.

Reading a vocabulary of 262,144 entries takes one second and temporarily 300 MB. A tokenizer that is in use is therefore
shared while its files are unchanged, and unused memory is returned to the system. Vocabularies are never extended.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deltaw.errors import UserError, first_line
from deltaw.hub import packages
from deltaw.hub.folders import local_folder, log_to_stderr, remote_code_error, resolve, tokenizer_files
from deltaw.hub.outside_references import read_json_object, require_own_files
from deltaw.hub.transformers_private import quiet
from deltaw.machine.choices import choose_precision
from deltaw.machine.memory import trim_memory
from deltaw.settings.model_parts import parse_parts

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
# Other files that affect a tokenizer.
CONFIG_FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_CACHE: weakref.WeakValueDictionary[tuple[object, ...], PreTrainedTokenizerBase] = weakref.WeakValueDictionary()


def load_tokenizer(
    reference: str, *, log: Callable[[str], None] = log_to_stderr, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        UserError: if the model is not found or has no tokenizer.
    """
    path = Path(os.path.expanduser(reference))
    if path.is_dir() and any((path / name).is_file() for name in TOKENIZER_FILES):
        folder = path  # a run's folder contains a tokenizer but no model
    else:
        folder = local_folder(resolve(reference), choose_precision("cpu").value, log, trust_remote_code)
    tokenizer = tokenizer_in(folder, trust_remote_code)
    if tokenizer is None:
        raise UserError("the model has no tokenizer", location=reference, hint="copy its tokenizer.json there")
    return tokenizer


def find_tokenizer(reference: str) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model without its weights, or return None if that is not possible.

    Supports local folders and .gguf files, available packages, and hub ids.

    Raises:
        UserError: if files of a local folder refer to files outside of it.
    """
    if (parts := parse_parts(reference)) is not None:
        return find_tokenizer(parts.language)
    path = Path(os.path.expanduser(reference))
    if (path / "config.json").is_file():
        require_own_files(path)
    try:
        if packages.is_package_reference(reference) and not packages.is_available(reference):
            return None
        if (path / "config.json").is_file():
            return tokenizer_in(path)
        source = resolve(reference)
        if source.kind == "gguf":
            from deltaw.hub.gguf import tokenizer_of

            tokenizer = tokenizer_of(source.path, choose_precision("cpu").value)
            return tokenizer_in(tokenizer) if isinstance(tokenizer, Path) else tokenizer
        return tokenizer_in(tokenizer_files(source) if source.kind == "hub" else source.path)
    except (UserError, OSError):
        return None


def max_positions(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the number of positions of the tokenizer's model according to its folder or the tokenizer, or None if
    unknown.
    """
    configured = read_json_object(Path(tokenizer.name_or_path) / "config.json").get("max_position_embeddings")
    limits = [n for n in (configured, tokenizer.model_max_length) if isinstance(n, int) and 1 < n < 10**7]
    return min(limits, default=None)


def tokenizer_in(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of ``folder``, or None if it contains none. A tokenizer in use is shared.

    Raises:
        UserError: if its files cannot be read or refer to other folders, or if it requires custom code.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    require_own_files(folder)
    files = [folder / name for name in (*TOKENIZER_FILES, *CONFIG_FILES)] + sorted(folder.glob("*.jinja"))
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    key = (folder.resolve(), trust_remote_code, *states)
    tokenizer = _CACHE.get(key)
    if tokenizer is None:
        _CACHE[key] = tokenizer = _load(folder, trust_remote_code)
        trim_memory()
    return tokenizer


def saving_bytes(folder: Path) -> int:
    """Return the temporary memory in bytes that saving the tokenizer of ``folder`` takes.

    The file is created as UTF-8 by the tokenizers library and as a Python string, which needs two bytes per character
    if a character is beyond Latin-1 (PEP 393, any byte-level vocabulary), and four if one is beyond the basic
    multilingual plane (such as emojis).
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return 0
    size = file.stat().st_size
    with file.open("rb") as stream:
        # First bytes of UTF-8 characters beyond the basic multilingual plane.
        blocks = iter(lambda: stream.read(1 << 20), b"")
        wide = any(not block.isascii() and any(lead in block for lead in _FOUR_BYTES) for block in blocks)
    return size * (5 if wide else 3)


_FOUR_BYTES = (b"\xf0", b"\xf1", b"\xf2", b"\xf3", b"\xf4")


def _load(folder: Path, trust: bool) -> PreTrainedTokenizerBase:
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    except Exception as error:  # invalid files raise various exceptions
        if "trust_remote_code" in str(error):
            raise remote_code_error(folder) from error
        message = f"the tokenizer cannot be read: {first_line(error)}"
        hint = "download or copy the model again"
        raise UserError(message, location=str(folder), hint=hint) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by length, so any token works
    return tokenizer
