"""An inference session: a finished run, or a bare model, for evaluation, generation and chat."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw import tasks
from deltaw.config import DEFAULT_TASK, RunConfig
from deltaw.data.chat_template import with_chat_template
from deltaw.data.invocation import last_occurrence
from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from deltaw.host.choices import choose_device, choose_precision
from deltaw.hub.loading import LoadedModel, load
from deltaw.methods.base import Method
from deltaw.methods.choose import method_of_folder
from deltaw.methods.files import classes_of, outputs_of
from deltaw.runtime.int8_weights import quantize_int8
from deltaw.training.evaluation.causal import Score, Writer, score
from deltaw.training.evaluation.general import identity_of
from deltaw.training.origin import FoundFolder, is_adapter, read_folder
from deltaw.training.quantizing import quantized_nf4
from deltaw.training.run_folder import SETTINGS
from deltaw.training.seen import as_seen
from deltaw.training.tasks.base import Task, task_of
from deltaw.working import working


@dataclass
class InferenceSession:
    """A model that is loaded for use.

    Attributes:
        config: the run's settings; None where the reference is not a run of deltaw's.
        method: whose adapter is on the model; None where there is none.
        task: what the model does. classes: the names that a classifier's outputs have.
        identity: names the base model's weights and precision, for what is kept on disk.
        found: the folder that was opened; None for a bare model.
    """

    loaded: LoadedModel
    config: RunConfig | None
    method: Method | None
    task: Task
    classes: tuple[str, ...] | None = None
    identity: str | None = None
    found: FoundFolder | None = None
    _bare: bool = field(default=False, repr=False)

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def adapter(self) -> bool:
        """Whether an adapter is on the model."""
        return self.method is not None

    @property
    def bare(self) -> bool:
        """Whether the model is the base model at the moment, by :meth:`base`."""
        return self._bare

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of a model that reads text.

        Raises:
            UserError: it reads images.
        """
        if self.task.tokenizer is None:
            raise UserError("the model reads images, not text", where=self.loaded.reference, hint="use eval")
        return self.task.tokenizer

    @property
    def data(self) -> DataSettings | None:
        """How the run read its rows; None where it is not known."""
        return self.config.data if self.config is not None else None

    def prompt(self, tokens: np.ndarray) -> np.ndarray:
        """A prompt as the model is to see it."""
        return tokens if self.method is None or self._bare else self.method.with_virtual_tokens(tokens)

    def not_invoked(self, prompts: Sequence[np.ndarray]) -> str | None:
        """A line about prompts that an activated adapter does not act after; None where there are none."""
        invocation = None if self.method is None else self.method.invocation
        if invocation is None:
            return None
        count = sum(last_occurrence(prompt, invocation) is None for prompt in prompts)
        if not count:
            return None
        text = self.tokenizer.decode(list(invocation))
        many = f"{count:,} of {len(prompts):,} prompts do" if len(prompts) > 1 else "the prompt does"
        return f"{many} not have {text!r}, from which on the adapter acts: the base model alone answers"

    def example(self, example: Any) -> Any:
        """An example as the model is to see it."""
        return example if self.method is None or self._bare else as_seen(example, self.method)

    @property
    def virtual_tokens(self) -> int:
        """Positions that the adapter puts before each row."""
        return 0 if self.method is None or self._bare else self.method.virtual_tokens

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """While open, the model is the base model; within another such block, it is already."""
        if self.method is None or self._bare:
            yield
            return
        with self.method.without(self.model):
            self._bare = True
            try:
                yield
            finally:
                self._bare = False

    def require_generation(self) -> None:
        """Raise a UserError where the model does not write text."""
        if not self.task.writes_text:
            raise UserError(
                f"this is an adapter for {self.task.name}, which writes no text",
                where=self.loaded.reference,
                hint="use deltaw eval",
            )


def open_run(
    reference: str,
    *,
    model: str | None = None,
    precision: str = "auto",
    device: str = "auto",
    task: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None],
) -> InferenceSession:
    """Load a run's folder (base model and adapter), an adapter of PEFT's, or a bare model.

    Args:
        reference: a folder with an adapter, else anything that names a model.
        model: the base model, where it is not the one that the folder names.
        precision: auto takes a run's own where its base is kept in blocks.
        task: what a bare model is to do; an adapter says that itself.
        trust_remote_code: run the Python files that came with the base model, whatever the folder says.

    Raises:
        UserError: something cannot be loaded, or the folder names what the caller has to allow.
    """
    folder = Path(reference)
    adapter = is_adapter(folder)
    found = None
    if adapter or (folder / SETTINGS).is_file():
        found = read_folder(folder, trust_remote_code=trust_remote_code)
    config = None if found is None else found.run
    if precision == "auto" and config is not None and model is None and config.precision in ("gguf", "nf4"):
        precision = config.precision  # the adapter belongs to these weights
    kind, base, classes = task or DEFAULT_TASK, model or reference, None
    if found is not None:
        kind, base, classes = found.task, found.base(model), classes_of(folder)
    dtype = choose_precision(choose_device(device).value, precision).value
    work = task_of(
        kind,
        base,
        dtype,
        trust_remote_code=trust_remote_code,
        say=say,
        preference=None if config is None else config.preference,
    )
    if config is not None and work.tokenizer is not None:
        work.tokenizer = with_chat_template(work.tokenizer, config.data.chat_template)
    fixed = tasks.entry_of(kind).outputs
    outputs = len(classes) if classes is not None else fixed
    if adapter and outputs is None and work.has_labels:
        outputs = outputs_of(folder)
    loaded = load(
        base,
        precision=precision,
        device=device,
        task=kind,
        num_labels=outputs,
        trust_remote_code=trust_remote_code,
        say=say if not adapter else lambda line: None if line.startswith("new,") else say(line),
    )
    identity = identity_of(loaded.model, precision)
    if precision == "int8":
        with working("quantizing the weights to int8"):
            report = quantize_int8(loaded.model.base_model)
        say(f"precision int8: {report}")
    if precision == "nf4":
        for line in quantized_nf4(loaded.model):
            say(line)
    if classes is None and work.has_labels and fixed is None:
        numbers = range(loaded.model.config.num_labels or 0)
        classes = getattr(work, "named", None) or tuple(str(number) for number in numbers)
    method = None
    if adapter:
        method = method_of_folder(folder, work.tokenizer)
        say(method.load(loaded.model, folder))
    return InferenceSession(loaded, config, method, work, classes, identity, found)


def score_run(
    opened: InferenceSession,
    examples: Sequence[Any],
    *,
    max_new_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    writer: Writer | None = None,
) -> Score:
    """Evaluate a model on examples that have no virtual tokens yet.

    Args:
        writer: writes answers; None for transformers.
    """
    batcher, _ = opened.task.batcher(
        opened.model,
        [opened.example(example) for example in examples],
        device=str(opened.loaded.choices["device"].value),
        tokens_per_pass="auto",
        share="auto",
        method_shares=True,
        virtual_tokens=0,
    )
    with opened.base():
        examples = opened.task.referenced(opened.model, examples, batcher)
    rows = [opened.example(example) for example in examples]
    if opened.task.writes_text and not opened.task.has_pairs:
        return score(
            opened.model,
            opened.tokenizer,
            rows,
            batcher,
            max_new_tokens=max_new_tokens,
            on_progress=on_progress,
            writer=writer,
        )
    with opened.task.running(opened.model, batcher):
        objective = opened.task.objective(opened.model)
        return Score(opened.task.evaluate(objective, rows, batcher, opened.classes), [])
