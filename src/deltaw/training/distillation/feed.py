"""Lessons: before a step it is settled who writes the completion of each row, and what is kept of the teacher.

Which rows the student writes follows from the seed, the step and the row alone. What the teacher writes, and its
likeliest tokens, are computed once, before the first step, and kept in files that appear whole: a run that was stopped
finds them again. Knows no engine: what samples is handed in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from deltaw.data.lessons import Lesson
from deltaw.data.row_store import digest_of_rows, key_of
from deltaw.durable import replacing, write_text
from deltaw.errors import UserError
from deltaw.hub.loading import has_values
from deltaw.runtime.generation import Drawing, Drawn, Sampler
from deltaw.task_settings import DistillSettings
from deltaw.training.distillation.loss import DistillObjective
from deltaw.training.distillation.teachers import Teacher
from deltaw.training.microbatches import AnyBatcher, Feed
from deltaw.training.parallel.reducer import ALONE, Reducer
from deltaw.working import working

# Within a run's folder.
FOLDER = "teacher"
ANSWERS, LIKELIEST = "answers.json", "likeliest.npy"
# Rows whose likeliest tokens are computed at once.
_AT_ONCE = 64


class LessonFeed(Feed):
    """Feeds rows with completions.

    Args:
        objective, batcher: of the rows. teachers: in the settings' order, the first of which writes answers.
        settings: the ``distill:`` section. tokenizer: of the model.
        rows: that the run's steps take, each once. held_out: rows of evaluations.
        seed: of the training. sampler: writes completions of the model as it is at each call; None: none are asked for.
        processes: that train together.
    """

    objective: DistillObjective

    def __init__(
        self,
        objective: DistillObjective,
        batcher: AnyBatcher,
        teachers: Sequence[Teacher],
        settings: DistillSettings,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rows: Sequence[Lesson] = (),
        held_out: Sequence[Lesson] = (),
        seed: int = 0,
        sampler: Sampler | None = None,
        processes: Reducer = ALONE,
    ) -> None:
        super().__init__(objective, batcher)
        objective.teachers = teachers
        self.settings, self._tokenizer, self._seed = settings, tokenizer, seed
        self._sampler, self._processes = sampler, processes
        self._rows = [] if settings.on_policy == 1 else rows
        self._held_out = held_out
        self._folder: Path | None = None
        self._closing = contextlib.ExitStack()
        self._answers: dict[str, tuple[list[int], str]] | None = None
        self._kept: np.ndarray | None = None
        self._alike = False  # the processes have the same answers
        self._places: dict[bytes, int] = {}

    def keep_in(self, folder: Path) -> None:
        self._folder = folder / FOLDER

    def close(self) -> None:
        self._kept = None
        self._closing.close()
        super().close()

    def longest(self, rows: Sequence[Lesson]) -> list[Lesson]:
        most = np.ones(self.settings.max_new_tokens, np.int32)
        writes = self.settings.on_policy > 0 or self.settings.answers == "teacher"

        def longer(row: Lesson) -> bool:
            return not row.label_count or (writes and row.label_count < len(most))

        return [row.with_completion(most, "", own=False) if longer(row) else row for row in rows]

    def batches(self, rows: Sequence[Any]) -> Any:
        return super().batches(self._imagined(rows))

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        return super().shapes(self._imagined(rows))

    def _imagined(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Rows as they are, but for those without a completion, which a dry run asks for."""
        return [row if row.label_count else self.longest([row])[0] for row in rows]

    def expand(self, rows: Sequence[Lesson], step: int) -> tuple[list[Lesson], bool]:
        """The rows of a step with their completions; all of them teach something.

        Args:
            rows: of the step. step: its number, from 0.
        """
        if not has_values(self.objective.model):
            return self.longest(rows), True
        if self._processes.size > 1 and not self._alike:
            self._take_answers_of_first()
        drawn = [np.random.default_rng([self._seed, step, row.row, place]) for place, row in enumerate(rows)]
        own = [place for place, one in enumerate(drawn) if one.random() < self.settings.on_policy]
        seeds = {place: int(drawn[place].integers(2**62)) for place in own}
        found = dict(zip(own, self._written([rows[place] for place in own], list(seeds.values())), strict=True))
        others = [place for place in range(len(rows)) if place not in seeds]
        given = self.with_answers([rows[place] for place in others])
        found |= dict(zip(others, map(self._with_likeliest, given), strict=True))
        return [found[place] for place in range(len(rows))], True

    def with_answers(self, rows: Sequence[Lesson]) -> list[Lesson]:
        """Rows with the answers that are learned and evaluated: their own, or as the settings say, and where they have
        none, the teacher's."""
        asked = [row for row in rows if self._needs_answer(row)]
        if not asked:
            return list(rows)
        known = self._prepared()
        if missing := [row for row in asked if _key(row) not in known]:
            known |= self._asked_teacher(missing)
        wanted = set(map(id, asked))
        return [_answered(row, *known[_key(row)]) if id(row) in wanted else row for row in rows]

    def _take_answers_of_first(self) -> None:
        """Let all processes learn from the answers that process 0 has: engines of two machines may round otherwise."""
        known = self._prepared() if self._processes.rank == 0 else {}
        first = self._processes.texts(json.dumps([[key, *answer] for key, answer in known.items()]))[0]
        self._answers, self._alike = _answers_of(json.loads(first)), True

    def _needs_answer(self, row: Lesson) -> bool:
        return self.settings.answers == "teacher" or not row.label_count

    def _written(self, rows: Sequence[Lesson], seeds: Sequence[int]) -> list[Lesson]:
        """Rows with completions by the student: each process writes those of its rows, and all get all of them."""
        if not rows:
            return []
        if self._sampler is None:
            what = "completions of the model that is trained are written by 'deltaw train' alone"
            raise UserError(what, where="distill.on_policy", hint="set it to 0")
        rank, size, settings = self._processes.rank, self._processes.size, self.settings
        prompts, drawn = [row.prompt for row in rows[rank::size]], []
        drawing = Drawing(settings.max_new_tokens, settings.sampling_temperature, seeds=tuple(seeds[rank::size]))
        with working("writing completions"):
            drawn = self._sampler(prompts, drawing) if prompts else []
        told = self._processes.texts(json.dumps([one.as_list() for one in drawn]))
        parts = [[Drawn.of_list(one) for one in json.loads(text)] for text in told]
        every = [parts[place % size][place // size] for place in range(len(rows))]
        return [
            row.with_completion(np.asarray(_ended(one.tokens, one.terminator)), one.text, own=True)
            for row, one in zip(rows, every, strict=True)
        ]

    def _asked_teacher(self, rows: Sequence[Lesson]) -> dict[str, tuple[list[int], str]]:
        """The teacher's answers by row."""
        prompts = [row.teacher_prompt for row in rows]
        written = self.objective.teachers[0].write(self._tokenizer, prompts, self.settings.max_new_tokens)
        return {
            _key(row): (_ended(one.tokens, one.terminator), one.text) for row, one in zip(rows, written, strict=True)
        }

    def _prepared(self) -> dict[str, tuple[list[int], str]]:
        """The teacher's answers by row: of a run that was stopped, or all that are needed, written now."""
        if self._answers is not None:
            return self._answers
        rows = {_key(row): row for row in [*self._rows, *self._held_out] if self._needs_answer(row)}
        identity = self._identity(list(rows.values()))
        file = self._file(ANSWERS)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["of"] == identity:
                self._answers = _answers_of(kept["answers"])
                return self._answers
        self._answers = self._asked_teacher(list(rows.values())) if rows else {}
        answers = [[key, *answer] for key, answer in self._answers.items()]
        write_text(file, json.dumps({"of": identity, "answers": answers}))
        return self._answers

    def _with_likeliest(self, row: Lesson) -> Lesson:
        """The row with the teacher's likeliest tokens, where they are kept."""
        if self.settings.top_k is None:
            return row
        if self._kept is None:
            self._kept = self._keep_likeliest()
        place = self._places.get(_whole_key(row))
        if place is None:
            return row
        kept = self._kept[place : place + row.label_count]
        return replace(row, taught=(kept["token"].copy(), kept["logprob"].copy()))

    def _keep_likeliest(self) -> np.ndarray:
        """(labels of all rows, k) the likeliest tokens, a file on the disk: of a run that was stopped, or computed
        now."""
        given = self.with_answers(self._rows)
        rows = list({_whole_key(row): row for row in given}.values())
        counts = [row.label_count for row in rows]
        self._places = dict(zip(map(_whole_key, rows), np.cumsum([0, *counts[:-1]]).tolist(), strict=True))
        shape = sum(counts), min(self.settings.top_k or 1, self.objective.width)
        kind = np.dtype([("token", "<i4"), ("logprob", "<f4")])
        file, told = self._file(LIKELIEST), self._file(f"{LIKELIEST}.json")
        identity = self._identity(rows)
        with contextlib.suppress(OSError, ValueError):
            if json.loads(told.read_text(encoding="utf-8")) == identity:
                found = np.load(file, mmap_mode="r", allow_pickle=False)
                if found.shape == shape and found.dtype == kind:
                    return found
        with replacing(file) as path, working("asking the teacher", len(rows)) as advance:
            written = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
            start = 0
            for first in range(0, len(rows), _AT_ONCE):
                tokens, values = self.objective.likeliest(rows[first : first + _AT_ONCE])
                part = written[start : start + len(tokens)]
                part["token"], part["logprob"] = tokens.cpu().numpy(), values.float().cpu().numpy()
                start += len(tokens)
                advance(min(first + _AT_ONCE, len(rows)))
            written.flush()
            del written, part
        write_text(told, json.dumps(identity))
        return np.load(file, mmap_mode="r", allow_pickle=False)

    def _identity(self, rows: Sequence[Lesson]) -> str:
        """What a kept file is of."""
        return f"{digest_of_rows(rows)} {self.settings.model_dump_json()}"

    def _file(self, name: str) -> Path:
        if self._folder is None:
            self._folder = Path(self._closing.enter_context(tempfile.TemporaryDirectory(prefix="deltaw-teacher-")))
        return self._folder / name


def _key(row: Lesson) -> str:
    """Names a row by the prompts that student and teacher get."""
    return hashlib.blake2b(row.teacher_prompt.tobytes() + b"|" + row.prompt.tobytes(), digest_size=16).hexdigest()


def _whole_key(row: Lesson) -> bytes:
    """Names a row by its prompts and its completion."""
    return key_of(row) + row.teacher_prompt.tobytes()


def _answers_of(told: Sequence[Sequence[Any]]) -> dict[str, tuple[list[int], str]]:
    """Answers by row, as JSON has them."""
    return {str(key): (list(map(int, tokens)), str(text)) for key, tokens, text in told}


def _answered(row: Lesson, tokens: Sequence[int], text: str) -> Lesson:
    return row.with_completion(np.asarray(tokens), text, own=False)


def _ended(tokens: np.ndarray, terminator: int | None) -> list[int]:
    """A completion with the token that ended it, which is a label too."""
    return [*map(int, tokens), *([] if terminator is None else [int(terminator)])]
