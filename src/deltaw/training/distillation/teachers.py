"""Teachers: models that are asked how likely each token is, and never trained.

One is the base model under the student's adapter, which costs no second model; others are loaded as any model is. All
have the student's vocabulary. Knows no loss, and not which rows are taught.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.example import Example
from deltaw.errors import UserError
from deltaw.hub.loading import has_values, skeleton
from deltaw.hub.tokenizers import load_tokenizer
from deltaw.kernels import loader
from deltaw.kernels.transfer import to_device
from deltaw.machine.choices import QUANTIZED, choose_device, choose_precision
from deltaw.methods.base import Method
from deltaw.runtime.generation import Completion, Writer, generate
from deltaw.runtime.packed import packed_rows, padded_rows
from deltaw.runtime.quantized_weights import quantize_int8, quantize_nf4
from deltaw.settings import RunConfig
from deltaw.task_settings import TeacherSettings
from deltaw.training.callbacks import Say
from deltaw.training.losses import label_places
from deltaw.training.microbatches import AnyBatcher
from deltaw.training.origin import open_run
from deltaw.training.tasks.causal_batcher import choose_causal_batcher
from deltaw.training.tasks.causal_objective import CausalObjective
from deltaw.working import working


@dataclass(frozen=True)
class Teacher:
    """A model that is asked.

    Attributes:
        objective: runs its microbatches. batcher: cuts rows into them.
        weight: its share of the distribution of all teachers.
        running: while open, the model is the teacher and takes microbatches.
        with_head: while open, its output head is the teacher's.
        writer: writes its answers; None for transformers.
    """

    objective: CausalObjective
    batcher: AnyBatcher
    weight: float
    running: Callable[[], AbstractContextManager[Any]]
    with_head: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    writer: Writer | None = None

    @torch.no_grad()
    def outputs(self, rows: Sequence[Example]) -> Tensor:
        """(labels of all rows, d) what its head is applied to for each label, rows one after another."""
        parts: dict[int, Tensor] = {}
        with self.running():
            for batch in self.batcher.batches(rows):
                found = self.objective.label_outputs(batch)
                index, owner = label_places(batch)
                for number, member in enumerate(batch.members):
                    places = to_device(torch.from_numpy(index[owner == number]), found.device)
                    parts[id(member.example)] = found.index_select(0, places)
        return torch.cat([parts[id(row)] for row in rows])

    @torch.no_grad()
    def logits(self, outputs: Tensor) -> Tensor:
        """(P, vocabulary) of :meth:`outputs`."""
        with self.with_head():
            return self.objective.logits_of(outputs)

    def write(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[np.ndarray], max_new_tokens: int
    ) -> list[Completion]:
        """Its likeliest completions of prompts (each (length,) token ids), in their order."""
        most = getattr(self.batcher, "tokens_per_pass", 1024)
        with self.running(), working("the teacher is writing answers", len(prompts)) as advance:
            told = lambda done, count: advance(done)  # noqa: E731
            written = None if self.writer is None else self.writer(prompts, max_new_tokens, most, told)
            if written is not None:
                return written
            how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_tokens": most, "on_progress": told}
            return generate(self.objective.model, tokenizer, prompts, **how)


def base_as_teacher(
    objective: CausalObjective, batcher: AnyBatcher, method: Method, weight: float, writer: Writer | None
) -> Teacher:
    """The model that ``objective`` trains, without what is trained on it.

    Raises:
        UserError: the method changes the base model itself.
    """
    model = objective.model
    if not method.keeps_base(model):
        what = f"method '{method.name}' changes the base model, so that it cannot be the teacher"
        hint = "choose method: lora, or name the model as another: distill.teachers: [{model: …}]"
        raise UserError(what, where="method", hint=hint)

    @contextlib.contextmanager
    def running():  # type: ignore[no-untyped-def]
        with method.evaluating(model), method.without(model):
            yield

    head = model.get_output_embeddings()
    is_trained = head is None or any(parameter.requires_grad for parameter in head.parameters())
    return Teacher(objective, batcher, weight, running, running if is_trained else contextlib.nullcontext, writer)


def other_teacher(config: RunConfig, one: TeacherSettings, longest: int, student: PreTrainedModel, say: Say) -> Teacher:
    """A teacher that is loaded, frozen; in a dry run it is of fake tensors.

    Args:
        longest: tokens of the longest row. student: the model that is trained, which computes as before.

    Raises:
        UserError: it cannot be loaded.
    """
    reference = one.model or config.model
    precision = one.quantize or ("auto" if config.precision in QUANTIZED else config.precision)
    if has_values(student):
        model = _loaded(config, one, precision, say)
    else:
        dtype = choose_precision(choose_device(config.device).value, precision).value
        model = skeleton(reference, dtype=dtype, trust_remote_code=config.trust_remote_code)
        if precision == "int8":
            quantize_int8(model.base_model)
        if precision == "nf4":
            quantize_nf4(model.base_model)
    rows = [Example(1, np.zeros(longest, np.int32), np.zeros(longest, bool), 0, None)]
    device = str(model.device)
    batcher, _ = choose_causal_batcher(model, rows, device=device, tokens_per_pass=config.train.tokens_per_pass)
    running = padded_rows if batcher.padded else packed_rows
    return Teacher(CausalObjective(model), batcher, one.weight, lambda: running(model))


def _loaded(config: RunConfig, one: TeacherSettings, precision: str, say: Say) -> PreTrainedModel:
    threads, arithmetic = torch.get_num_threads(), loader.arithmetic()
    how: dict[str, Any] = {"precision": precision, "trust_remote_code": config.trust_remote_code, "say": say}
    model = one.model or config.model
    reference = one.adapter or model
    try:
        with working("loading the teacher"):
            opened = open_run(reference, model=model if one.adapter else None, device=config.device, **how)
    except UserError as error:
        where = f"distill.teachers, {reference}" + (f": {error.where}" if error.where else "")
        raise UserError(error.what, where=where, hint=error.hint) from error
    finally:  # loading chooses threads and arithmetic for the model that is loaded
        torch.set_num_threads(threads)
        loader.compute_with(arithmetic)
    found: nn.Module = opened.model.requires_grad_(False)
    assert isinstance(found, PreTrainedModel)
    if opened.method is not None and opened.virtual_tokens:
        what = "an adapter that puts tokens before a row cannot teach"
        raise UserError(what, where=f"distill.teachers, {reference}", hint="name one of method lora")
    return found.eval()


def require_same_vocabulary(
    student: PreTrainedTokenizerBase, teachers: Sequence[TeacherSettings], *, trust_remote_code: bool, say: Say
) -> None:
    """Refuse teachers whose tokens are others than the student's.

    Raises:
        UserError: they are; it names the first token that differs.
    """
    ours = student.get_vocab()
    for reference in dict.fromkeys(one.model for one in teachers if one.model is not None):
        tokenizer = load_tokenizer(reference, say=say, trust_remote_code=trust_remote_code)
        different = first_difference(ours, tokenizer.get_vocab())
        if different is None:
            continue
        number, own, theirs = different
        what = f"the teacher has another tokenizer: token {number} is {theirs!r}, and the student's is {own!r}"
        hint = "choose a teacher of the same family, or let it write answers and train on these with task: causal-lm"
        raise UserError(what, where=f"distill.teachers, {reference}", hint=hint)


def first_difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> tuple[int, str | None, str | None] | None:
    """The lowest id whose token is not the same in two vocabularies, with both; None where they agree."""
    own, other = ({number: token for token, number in known.items()} for known in (ours, theirs))
    different = (number for number in sorted({*own, *other}) if own.get(number) != other.get(number))
    number = next(different, None)
    return None if number is None else (number, own.get(number), other.get(number))
