"""A run's folder: what it was told, what it chose, what it measured, and the adapter.

An earlier run in the same folder is renamed, never overwritten.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase

from deltaw.config import RunConfig
from deltaw.data.bad_rows import SKIPPED_ROWS, BadRows
from deltaw.durable import replacing, write_text
from deltaw.errors import UserError

SETTINGS = "run.yaml"
METRICS = "metrics.jsonl"


class RunFolder:
    """The folder that a run is written to.

    Args:
        path: made where it does not exist.

    Attributes:
        moved: where an earlier run in this folder went; None where there was none.

    Raises:
        UserError: the folder cannot be written, or holds something that is not a run.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        check_output(self.path)
        self.moved = self._rename_earlier()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._metrics = (self.path / METRICS).open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise _not_writable(self.path, error) from error

    def _rename_earlier(self) -> Path | None:
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return None
        number = 1
        while (renamed := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        try:
            self.path.rename(renamed)
        except OSError as error:
            raise UserError(
                f"cannot rename the earlier run: {error.strerror or error}",
                where=str(self.path),
                hint="set 'output' to another folder",
            ) from error
        return renamed

    def write_settings(self, config: RunConfig, chosen: Mapping[str, tuple[object, str]]) -> None:
        """``run.yaml`` with every value; ``chosen`` gives, by dotted key, what ``auto`` became and why."""
        write_text(self.path / SETTINGS, settings_text(config, chosen))

    def write_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The tokenizer with its chat template, so that whoever has the folder renders as the run did."""
        with tempfile.TemporaryDirectory(dir=self.path) as made:
            tokenizer.save_pretrained(made)
            for file in (p for p in Path(made).rglob("*") if p.is_file()):
                with replacing(self.path / file.relative_to(made)) as temporary:
                    shutil.copyfile(file, temporary)

    def write_skipped(self, skipped: BadRows | None) -> None:
        """The rows that cannot be used, where there are any."""
        if skipped:
            skipped.write(self.path / SKIPPED_ROWS)

    def write_metrics(self, line: Mapping[str, object]) -> None:
        """One more line of ``metrics.jsonl``; it is in the file when this returns."""
        self._metrics.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._metrics.close()


def check_output(path: Path) -> None:
    """Refuse, before any work is done, a folder that a run could not be written to. Leaves no trace.

    Raises:
        UserError: it cannot be written, or holds something that is not a run.
    """
    try:
        there = path
        while not there.exists():
            there = there.parent
        if not there.stat().st_mode & 0o222:
            # The system lets its administrator write even here; who marked the folder meant that nobody does.
            raise PermissionError(errno.EACCES, "it is marked read-only")
        with tempfile.TemporaryFile(dir=there):
            holds = sorted(p.name for p in path.iterdir()) if path.exists() else []
    except OSError as error:
        raise _not_writable(path, error) from error
    if holds and SETTINGS not in holds and METRICS not in holds:
        raise UserError(
            f"the output folder holds files that are not a run's, such as '{holds[0]}'",
            where=str(path),
            hint="set 'output' to a new or empty folder",
        )
    if holds and path.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(
            "the output folder holds an earlier run, and cannot be renamed while you are in it",
            where=str(path),
            hint="set 'output' to a folder below this one",
        )


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write into the output folder: {error.strerror or error}",
        where=str(path),
        hint="set 'output' to a folder that you may write to",
    )


def settings_text(config: RunConfig, chosen: Mapping[str, tuple[object, str]]) -> str:
    """The settings as YAML that can be read again, with a comment behind each value that the run chose; what
    it chose without a setting, such as ``kernels``, is a comment of its own."""
    lines = []
    of_settings = set()
    section = ""
    for line in yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=1000).splitlines():
        key = line.partition(":")[0]
        if not line.startswith(" "):
            section = key
        dotted = key if key == section else f"{section}.{key.strip()}"
        if dotted in chosen:
            value, why = chosen[dotted]
            of_settings.add(dotted)
            line += f"  # {value}: {why}"
        lines.append(line)
    lines += [f"# {key}: {value}: {why}" for key, (value, why) in chosen.items() if key not in of_settings]
    return "\n".join(lines) + "\n"
