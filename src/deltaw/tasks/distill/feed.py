"""Completions for distillation: generate and store teacher answers, and sample from the student.

Whether the student samples the completion of a row depends only on the seed, the step and the row. Answers and top
tokens of the teacher are computed once, before the first step, and stored in atomically written files, which a resumed
run reuses.
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

from deltaw.atomic_files import atomic_path, write_text
from deltaw.data.row_store import digest_of_rows, key_of
from deltaw.decoding.generation import SampledCompletion, Sampler, SamplingParams
from deltaw.errors import UserError
from deltaw.progress import track_progress
from deltaw.tasks.distill.loss import DistillObjective
from deltaw.tasks.distill.rows import DistillExample
from deltaw.tasks.distill.settings import DistillSettings
from deltaw.tasks.distill.teachers import Teacher
from deltaw.training.batcher import Batcher
from deltaw.training.reducer import SINGLE_PROCESS, Reducer
from deltaw.training.rollouts import RolloutFeed

# Subfolder of a run.
FOLDER = "teacher"
ANSWERS = "answers.json"
TOP_TOKENS = "likeliest.npy"
# Rows per computation of top tokens.
_ROWS_PER_PASS = 64


class DistillFeed(RolloutFeed):
    """Feeds rows with completions.

    Args:
        objective: Objective of the rows.
        batcher: Batcher of the rows.
        teachers: Teachers in the order of the settings. The first one generates answers.
        settings: The ``distill:`` section.
        tokenizer: Tokenizer of the model.
        rows: Rows of all steps, without repetition.
        held_out: Rows of evaluations.
        seed: Seed of the training.
        sampler: Samples completions from the current model, or None if no completions are needed.
        processes: Processes of the training.
    """

    objective: Any  # a DistillObjective
    row_class = DistillExample

    def __init__(
        self,
        objective: DistillObjective,
        batcher: Batcher,
        teachers: Sequence[Teacher],
        settings: DistillSettings,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rows: Sequence[DistillExample] = (),
        held_out: Sequence[DistillExample] = (),
        seed: int = 0,
        sampler: Sampler | None = None,
        processes: Reducer = SINGLE_PROCESS,
    ) -> None:
        super().__init__(objective, batcher, processes)
        objective.teachers = teachers
        self.settings = settings
        self._tokenizer = tokenizer
        self._seed = seed
        self._sampler = sampler
        self._rows = [] if settings.on_policy == 1 else rows
        self._held_out = held_out
        self._closing = contextlib.ExitStack()
        self._answers: dict[str, tuple[list[int], str]] | None = None
        self._top_tokens: np.ndarray | None = None
        self._answers_synced = False  # True if all processes have the same answers
        self._label_offsets: dict[bytes, int] = {}

    def set_run_folder(self, folder: Path) -> None:
        self._folder = folder / FOLDER

    def close(self) -> None:
        self._top_tokens = None
        self._closing.close()
        super().close()

    def worst_case_rows(self, rows: Sequence[DistillExample]) -> list[DistillExample]:
        longest = np.ones(self.settings.max_new_tokens, np.int32)
        generates = self.settings.on_policy > 0 or self.settings.answers == "teacher"

        def needs_max_completion(row: DistillExample) -> bool:
            return not row.label_count or (generates and row.label_count < len(longest))

        return [r.with_completion(longest, "", by_student=False) if needs_max_completion(r) else r for r in rows]

    def is_generated(self, row: DistillExample) -> bool:
        return row.label_count > 0

    def generate(self, rows: Sequence[DistillExample], step: int) -> list[DistillExample]:
        """Return the rows of a step with their completions."""
        if self.processes.size > 1 and not self._answers_synced:
            self._sync_answers()
        generators = [np.random.default_rng([self._seed, step, row.row, index]) for index, row in enumerate(rows)]
        sampled = [index for index, generator in enumerate(generators) if generator.random() < self.settings.on_policy]
        seeds = {index: int(generators[index].integers(2**62)) for index in sampled}
        completed = dict(zip(sampled, self._sample([rows[i] for i in sampled], list(seeds.values())), strict=True))
        remaining = [index for index in range(len(rows)) if index not in seeds]
        answered = self.with_answers([rows[index] for index in remaining])
        completed |= dict(zip(remaining, map(self._with_top_tokens, answered), strict=True))
        return [completed[index] for index in range(len(rows))]

    def with_answers(self, rows: Sequence[DistillExample]) -> list[DistillExample]:
        """Return the rows with the answers to train and evaluate on: their given answers or the teacher's, as
        configured.

        Rows without a given answer always get the teacher's.
        """
        unanswered = [row for row in rows if self._needs_answer(row)]
        if not unanswered:
            return list(rows)
        answers = self._load_answers()
        if missing := [row for row in unanswered if _key(row) not in answers]:
            answers |= self._generate_answers(missing)
        unanswered_ids = set(map(id, unanswered))
        return [_with_answer(row, *answers[_key(row)]) if id(row) in unanswered_ids else row for row in rows]

    def _sync_answers(self) -> None:
        """Distribute the answers of process 0, because engines on different machines may round differently."""
        answers = self._load_answers() if self.processes.rank == 0 else {}
        first = self.processes.texts(json.dumps([[key, *answer] for key, answer in answers.items()]))[0]
        self._answers = _answers_from_json(json.loads(first))
        self._answers_synced = True

    def _needs_answer(self, row: DistillExample) -> bool:
        return self.settings.answers == "teacher" or not row.label_count

    def _sample(self, rows: Sequence[DistillExample], seeds: Sequence[int]) -> list[DistillExample]:
        """Sample completions from the student.

        Each process generates a part of them, and all processes get all of them.
        """
        if not rows:
            return []
        if self._sampler is None:
            message = "only 'deltaw train' can sample completions from the trained model"
            raise UserError(message, location="distill.on_policy", hint="set it to 0")
        rank = self.processes.rank
        size = self.processes.size
        settings = self.settings
        prompts = [row.prompt for row in rows[rank::size]]
        completions = []
        params = SamplingParams(settings.max_new_tokens, settings.sampling_temperature, seeds=tuple(seeds[rank::size]))
        with track_progress("generating completions"):
            completions = self._sampler(prompts, params) if prompts else []
        gathered = self.processes.texts(json.dumps([completion.as_list() for completion in completions]))
        parts = [[SampledCompletion.from_list(completion) for completion in json.loads(text)] for text in gathered]
        all_completions = [parts[index % size][index // size] for index in range(len(rows))]
        tokens = [np.asarray(_with_terminator(c.tokens, c.terminator)) for c in all_completions]
        items = zip(rows, tokens, all_completions, strict=True)
        return [row.with_completion(row_tokens, c.text, by_student=True) for row, row_tokens, c in items]

    def _generate_answers(self, rows: Sequence[DistillExample]) -> dict[str, tuple[list[int], str]]:
        """Return the teacher's answers by row key."""
        prompts = [row.teacher_prompt for row in rows]
        answers = self.objective.teachers[0].generate(self._tokenizer, prompts, self.settings.max_new_tokens)
        pairs = zip(rows, answers, strict=True)
        return {_key(row): (_with_terminator(a.tokens, a.terminator), a.text) for row, a in pairs}

    def _load_answers(self) -> dict[str, tuple[list[int], str]]:
        """Return the teacher's answers by row key, from the file of an interrupted run or newly generated."""
        if self._answers is not None:
            return self._answers
        rows = {_key(row): row for row in [*self._rows, *self._held_out] if self._needs_answer(row)}
        identity = self._identity(list(rows.values()))
        file = self._file(ANSWERS)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads(file.read_text(encoding="utf-8"))
            if stored["of"] == identity:
                self._answers = _answers_from_json(stored["answers"])
                return self._answers
        self._answers = self._generate_answers(list(rows.values())) if rows else {}
        answers = [[key, *answer] for key, answer in self._answers.items()]
        write_text(file, json.dumps({"of": identity, "answers": answers}))
        return self._answers

    def _with_top_tokens(self, row: DistillExample) -> DistillExample:
        """Return the row with the teacher's top tokens, if they are stored."""
        if self.settings.top_k is None:
            return row
        if self._top_tokens is None:
            self._top_tokens = self._store_top_tokens()
        offset = self._label_offsets.get(_completion_key(row))
        if offset is None:
            return row
        top_tokens = self._top_tokens[offset : offset + row.label_count]
        return replace(row, taught=(top_tokens["token"].copy(), top_tokens["logprob"].copy()))

    def _store_top_tokens(self) -> np.ndarray:
        """Return the top tokens (labels of all rows, k) as a memory-mapped file, computing it if necessary."""
        answered = self.with_answers(self._rows)
        rows = list({_completion_key(row): row for row in answered}.values())
        counts = [row.label_count for row in rows]
        self._label_offsets = dict(zip(map(_completion_key, rows), np.cumsum([0, *counts[:-1]]).tolist(), strict=True))
        shape = sum(counts), min(self.settings.top_k or 1, self.objective.width)
        dtype = np.dtype([("token", "<i4"), ("logprob", "<f4")])
        file = self._file(TOP_TOKENS)
        identity_file = self._file(f"{TOP_TOKENS}.json")
        identity = self._identity(rows)
        with contextlib.suppress(OSError, ValueError):
            if json.loads(identity_file.read_text(encoding="utf-8")) == identity:
                stored = np.load(file, mmap_mode="r", allow_pickle=False)
                if stored.shape == shape and stored.dtype == dtype:
                    return stored
        with atomic_path(file) as path, track_progress("computing the teacher's probabilities", len(rows)) as advance:
            array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            start = 0
            for first in range(0, len(rows), _ROWS_PER_PASS):
                tokens, values = self.objective.top_tokens(rows[first : first + _ROWS_PER_PASS])
                part = array[start : start + len(tokens)]
                part["token"] = tokens.cpu().numpy()
                part["logprob"] = values.float().cpu().numpy()
                start += len(tokens)
                advance(min(first + _ROWS_PER_PASS, len(rows)))
            array.flush()
            del array, part
        write_text(identity_file, json.dumps(identity))
        return np.load(file, mmap_mode="r", allow_pickle=False)

    def _identity(self, rows: Sequence[DistillExample]) -> str:
        """Return a text that identifies the inputs of a stored file."""
        return f"{digest_of_rows(rows)} {self.settings.model_dump_json()}"

    def _file(self, name: str) -> Path:
        if self._folder is None:
            self._folder = Path(self._closing.enter_context(tempfile.TemporaryDirectory(prefix="deltaw-teacher-")))
        return self._folder / name


def _key(row: DistillExample) -> str:
    """Return the identity of a row's prompts for student and teacher."""
    return hashlib.blake2b(row.teacher_prompt.tobytes() + b"|" + row.prompt.tobytes(), digest_size=16).hexdigest()


def _completion_key(row: DistillExample) -> bytes:
    """Return the identity of a row's prompts and completion."""
    return key_of(row) + row.teacher_prompt.tobytes()


def _answers_from_json(values: Sequence[Sequence[Any]]) -> dict[str, tuple[list[int], str]]:
    """Parse answers by row key from JSON values."""
    return {str(key): (list(map(int, tokens)), str(text)) for key, tokens, text in values}


def _with_answer(row: DistillExample, tokens: Sequence[int], text: str) -> DistillExample:
    return row.with_completion(np.asarray(tokens), text, by_student=False)


def _with_terminator(tokens: np.ndarray, terminator: int | None) -> list[int]:
    """Append the token that terminated a completion, because it is a label too."""
    return [*map(int, tokens), *([] if terminator is None else [int(terminator)])]
