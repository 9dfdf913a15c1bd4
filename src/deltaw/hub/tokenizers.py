"""A folder's tokenizer, built once a process.

Reading a vocabulary of 262,144 entries takes a second and some 300 MB for a moment. A tokenizer that is still
in use is therefore handed out again as long as its files are the same, and what reading it left unused goes
back to the system. Nothing is added to a vocabulary.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deltaw.errors import UserError, first_line
from deltaw.hub import packages
from deltaw.hub.folders import (
    asks_for_code,
    local_folder,
    require_own_files,
    resolve,
    say_on_stderr,
    settings_in,
    tokenizer_files,
)
from deltaw.hub.quiet import quiet
from deltaw.machine.choices import choose_precision
from deltaw.machine.memory import trim_memory

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
# What else a tokenizer's behavior depends on.
BESIDE = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_BUILT: weakref.WeakValueDictionary[tuple[object, ...], PreTrainedTokenizerBase] = weakref.WeakValueDictionary()


def load_tokenizer(
    reference: str, *, say: Callable[[str], None] = say_on_stderr, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer alone of what ``reference`` means.

    Raises:
        UserError: the reference leads nowhere, or to a model without a tokenizer.
    """
    given = Path(os.path.expanduser(reference))
    if given.is_dir() and any((given / name).is_file() for name in TOKENIZER_FILES):
        folder = given  # a run's folder holds a tokenizer and no model
    else:
        folder = local_folder(resolve(reference), choose_precision("cpu").value, say, trust_remote_code)
    tokenizer = tokenizer_in(folder, trust_remote_code)
    if tokenizer is None:
        raise UserError("the model has no tokenizer", where=reference, hint="copy its tokenizer.json there")
    return tokenizer


def tokenizer_at_hand(reference: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of what ``reference`` means without its weights: of a folder or a .gguf file here, of a package
    that is here, of a hub id; None where it cannot be had so.

    Raises:
        UserError: files of a folder here lead out of it.
    """
    given = Path(os.path.expanduser(reference))
    if (given / "config.json").is_file():
        require_own_files(given)
    try:
        if packages.is_package_reference(reference) and not packages.is_here(reference):
            return None
        if (given / "config.json").is_file():
            return tokenizer_in(given)
        source = resolve(reference)
        if source.kind == "gguf":
            from deltaw.hub.gguf import tokenizer_of

            found = tokenizer_of(source.path, choose_precision("cpu").value)
            return tokenizer_in(found) if isinstance(found, Path) else found
        return tokenizer_in(tokenizer_files(source) if source.kind == "hub" else source.path)
    except (UserError, OSError):
        return None


def most_tokens(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The positions that the tokenizer's model has, where its folder or the tokenizer says."""
    told = settings_in(Path(tokenizer.name_or_path) / "config.json").get("max_position_embeddings")
    limits = [n for n in (told, tokenizer.model_max_length) if isinstance(n, int) and 1 < n < 10**7]
    return min(limits, default=None)


def tokenizer_in(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer of ``folder``, None where it holds none; the same object while one is in use.

    Raises:
        UserError: its files cannot be read, or lead out of the folder, or it needs code of its own.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    require_own_files(folder)
    key = (folder.resolve(), trust_remote_code, *_stamps(folder))
    tokenizer = _BUILT.get(key)
    if tokenizer is None:
        _BUILT[key] = tokenizer = _built(folder, trust_remote_code)
        trim_memory()
    return tokenizer


def saving_bytes(folder: Path) -> int:
    """Bytes of main memory that writing the tokenizer of ``folder`` takes for a moment.

    Its file is made as one text: in UTF-8 by the tokenizer's own library, and again as a Python string, which
    takes two bytes for each character where one lies beyond Latin-1 (PEP 393), as in any byte-level
    vocabulary; four where one lies beyond the basic plane, as an emoji in a vocabulary of whole words.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return 0
    size = file.stat().st_size
    with file.open("rb") as opened:
        # A character beyond the basic plane begins with one of these bytes in UTF-8.
        wide = any(
            not block.isascii() and any(lead in block for lead in _FOUR_BYTES)
            for block in iter(lambda: opened.read(1 << 20), b"")
        )
    return size * (5 if wide else 3)


_FOUR_BYTES = (b"\xf0", b"\xf1", b"\xf2", b"\xf3", b"\xf4")


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file that decides what the tokenizer is."""
    files = [folder / name for name in (*TOKENIZER_FILES, *BESIDE)] + sorted(folder.glob("*.jinja"))
    found = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found]


def _built(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # files that are not a tokenizer's raise whatever they lead to
        if "trust_remote_code" in str(error):
            raise asks_for_code(folder) from error
        hint = "fetch or copy the model again"
        raise UserError(f"the tokenizer cannot be read: {first_line(error)}", where=str(folder), hint=hint) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by length, so eos does as well as any
    return tokenizer
