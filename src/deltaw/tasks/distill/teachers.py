"""Frozen teacher models for distillation.

A teacher is the reference model of the student (its base model or the adapter that it starts from), or a model that is
loaded separately. All teachers have the vocabulary of the student.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.example import Example
from deltaw.decoding.generation import GeneratedCompletion, TextGenerator, generate
from deltaw.errors import UserError
from deltaw.hub.skeletons import has_values, skeleton
from deltaw.hub.tokenizers import load_tokenizer
from deltaw.inference.open_run import open_run
from deltaw.kernels import loader
from deltaw.kernels.layout import to_device
from deltaw.machine.choices import QUANTIZED, choose_device, choose_precision
from deltaw.progress import LogFunction, track_progress
from deltaw.runtime.nf4 import quantize_nf4
from deltaw.runtime.packed import packed_rows
from deltaw.runtime.padded import padded_rows
from deltaw.runtime.quantized_weights import quantize_int8
from deltaw.settings.config import RunConfig
from deltaw.tasks.distill.settings import TeacherSettings
from deltaw.training.batcher import Batcher
from deltaw.training.batchers import BatcherOptions, choose_causal_batcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.losses import label_indices
from deltaw.training.task import TrainingSession


@dataclass(frozen=True)
class Teacher:
    """A teacher model.

    Attributes:
        objective: Runs microbatches of the teacher.
        batcher: Cuts rows into microbatches.
        weight: Weight of the teacher in the mixture.
        model_context: Context in which the model is the teacher and accepts microbatches.
        head_context: Context in which the model's output head is the teacher's.
        writer: Generates the teacher's answers, or None to use transformers.
    """

    objective: CausalObjective
    batcher: Batcher
    weight: float
    model_context: Callable[[], AbstractContextManager[Any]]
    head_context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    writer: TextGenerator | None = None

    @torch.no_grad()
    def outputs(self, rows: Sequence[Example]) -> Tensor:
        """Return the inputs (labels of all rows, d) of the head at each label, row by row."""
        parts: dict[int, Tensor] = {}
        with self.model_context():
            for batch in self.batcher.batches(rows):
                outputs = self.objective.label_outputs(batch)
                index, member_indices = label_indices(batch)
                for member_index, member in enumerate(batch.members):
                    output_indices = to_device(torch.from_numpy(index[member_indices == member_index]), outputs.device)
                    parts[id(member.example)] = outputs.index_select(0, output_indices)
        return torch.cat([parts[id(row)] for row in rows])

    @torch.no_grad()
    def logits(self, outputs: Tensor) -> Tensor:
        """Return logits (P, vocabulary) for :meth:`outputs`."""
        with self.head_context():
            return self.objective.logits_of(outputs)

    def generate(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[np.ndarray], max_new_tokens: int
    ) -> list[GeneratedCompletion]:
        """Return greedy completions of prompts (token ids), in order."""
        batch_tokens = getattr(self.batcher, "tokens_per_pass", 1024)
        with self.model_context(), track_progress("generating the teacher's answers", len(prompts)) as advance:
            on_progress = lambda done, count: advance(done)  # noqa: E731
            write = self.writer
            completions = None if write is None else write(prompts, max_new_tokens, batch_tokens, on_progress)
            if completions is not None:
                return completions
            return generate(
                self.objective.model,
                tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                batch_tokens=batch_tokens,
                on_progress=on_progress,
            )


def reference_as_teacher(session: TrainingSession, weight: float) -> Teacher:
    """Return the reference model of a session as a teacher: its base model, or the adapter of ``start_from``.

    Raises:
        UserError: if the method modifies the base model, or has virtual tokens, which the teacher's rows lack.
    """
    model = session.model
    method = session.method
    objective = session.objective
    if session.uses_start_reference and method.virtual_tokens:
        message = f"an adapter of method '{method.name}' cannot be the teacher, because it has virtual tokens"
        raise UserError(message, location="reference_model", hint="set reference_model: base")
    if not method.can_restore_base(model):
        message = f"method '{method.name}' modifies the base model, so the base model cannot be the teacher"
        hint = "use method: lora, or load the base model separately: distill.teachers: [{model: …}]"
        raise UserError(message, location="method", hint=hint)

    @contextlib.contextmanager
    def model_context() -> Iterator[None]:
        with method.evaluating(model), session.reference_active():
            yield

    head = model.get_output_embeddings()
    is_trained = head is None or any(parameter.requires_grad for parameter in head.parameters())
    trained_context = model_context if is_trained else contextlib.nullcontext
    writer = session.generator(of_base=not session.uses_start_reference)
    return Teacher(objective, session.batcher, weight, model_context, trained_context, writer)


def load_teacher(
    config: RunConfig, settings: TeacherSettings, max_length: int, student: PreTrainedModel, log: LogFunction
) -> Teacher:
    """Load a frozen teacher. In a dry run its tensors are fake.

    Args:
        max_length: Tokens of the longest row.
        student: Model that is trained. Its thread and arithmetic settings are restored.

    Raises:
        UserError: if the teacher cannot be loaded.
    """
    reference = settings.model or config.model
    precision = settings.quantize or ("auto" if config.precision in QUANTIZED else config.precision)
    if has_values(student):
        model = _load_model(config, settings, precision, log)
    else:
        dtype = choose_precision(choose_device(config.device).value, precision).value
        model = skeleton(reference, dtype=dtype, trust_remote_code=config.trust_remote_code)
        if precision == "int8":
            quantize_int8(model.base_model)
        if precision == "nf4":
            quantize_nf4(model.base_model)
    rows = [Example(1, np.zeros(max_length, np.int32), np.zeros(max_length, bool), 0, None)]
    options = BatcherOptions(str(model.device), config.train.tokens_per_pass)
    batcher, _ = choose_causal_batcher(model, rows, options)
    model_context = padded_rows if batcher.padded else packed_rows
    return Teacher(CausalObjective(model), batcher, settings.weight, lambda: model_context(model))


def _load_model(config: RunConfig, settings: TeacherSettings, precision: str, log: LogFunction) -> PreTrainedModel:
    threads = torch.get_num_threads()
    arithmetic = loader.arithmetic()
    model = settings.model or config.model
    reference = settings.adapter or model
    try:
        with track_progress("loading the teacher"):
            opened = open_run(
                reference,
                model=model if settings.adapter else None,
                device=config.device,
                precision=precision,
                trust_remote_code=config.trust_remote_code,
                log=log,
            )
    except UserError as error:
        location = f"distill.teachers, {reference}" + (f": {error.location}" if error.location else "")
        raise UserError(error.message, location=location, hint=error.hint) from error
    finally:  # loading a model also changes the thread count and the arithmetic
        torch.set_num_threads(threads)
        loader.use_arithmetic(arithmetic)
    teacher: nn.Module = opened.model.requires_grad_(False)
    assert isinstance(teacher, PreTrainedModel)
    if opened.method is not None and opened.virtual_tokens:
        message = "an adapter with virtual tokens cannot be a teacher"
        raise UserError(message, location=f"distill.teachers, {reference}", hint="use an adapter of method lora")
    return teacher.eval()


def require_same_vocabulary(
    student: PreTrainedTokenizerBase, teachers: Sequence[TeacherSettings], *, trust_remote_code: bool, log: LogFunction
) -> None:
    """Reject teachers with a different vocabulary than the student.

    Raises:
        UserError: if a vocabulary differs. The message contains the first different token.
    """
    vocabulary = student.get_vocab()
    for reference in dict.fromkeys(teacher.model for teacher in teachers if teacher.model is not None):
        tokenizer = load_tokenizer(reference, log=log, trust_remote_code=trust_remote_code)
        different = first_difference(vocabulary, tokenizer.get_vocab())
        if different is None:
            continue
        token_id, student_token, teacher_token = different
        message = f"a different tokenizer: token {token_id} is {teacher_token!r}, the student's is {student_token!r}"
        hint = "choose a teacher of the same family, or let it write answers and train on these with task: causal-lm"
        raise UserError(message, location=f"distill.teachers, {reference}", hint=hint)


def first_difference(first: Mapping[str, int], second: Mapping[str, int]) -> tuple[int, str | None, str | None] | None:
    """Return the lowest id with different tokens in two vocabularies, and both tokens.

    None if the vocabularies are equal.
    """
    first_tokens, second_tokens = ({token_id: token for token, token_id in v.items()} for v in (first, second))
    ids = sorted({*first_tokens, *second_tokens})
    differences = (i for i in ids if first_tokens.get(i) != second_tokens.get(i))
    token_id = next(differences, None)
    return None if token_id is None else (token_id, first_tokens.get(token_id), second_tokens.get(token_id))
