"""Assemble everything that a training needs: model, method, rows, batcher, objective.

Runs, plans and comparisons all start here, so that a plan matches its run. The module does not access run folders or
print.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from deltaw.cache.results import load_result, store_result
from deltaw.data.chat_template import read_chat_template
from deltaw.data.example import Example
from deltaw.data.row_reader import RunData
from deltaw.data.row_store import digest_of_rows
from deltaw.decoding.generation import GeneratedCompletion, Sampler, TextGenerator
from deltaw.decoding.model import AdaptedModel
from deltaw.decoding.opening import SessionSampler, verified_generator
from deltaw.errors import UserError
from deltaw.hub.skeletons import has_values
from deltaw.kernels import compiled, gpu_attention, loader
from deltaw.lora.fingerprint import combine_digests, digest_tensor
from deltaw.machine.choices import Choice, choose_device, choose_precision
from deltaw.machine.kernel_choice import numerics_key
from deltaw.machine.memory import PeakMemory, release_free_memory
from deltaw.methods.base import VISION_TOWER, Method
from deltaw.methods.files import choose_method
from deltaw.methods.start import StartAdapter, open_start
from deltaw.progress import Advance, Detail, LogFunction, ignore_line, track_progress
from deltaw.runtime.packed import fused_blocks, packed_rows
from deltaw.runtime.quantized_weights import Rounding
from deltaw.runtime.sharded import sharded_blocks
from deltaw.runtime.weights_in_huge_pages import move_to_huge_pages
from deltaw.settings.config import RunConfig
from deltaw.training.approximations import (
    MAX_CANDIDATE_ROWS,
    AllowedApproximations,
    Approximations,
    GradientCheck,
    applicable,
    check_interval,
    select_check_rows,
)
from deltaw.training.batcher import Batcher
from deltaw.training.batchers import BatcherOptions
from deltaw.training.callbacks import Callback
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.general import (
    GeneralRehearsal,
    GreedyDecoder,
    NoGeneralAnswers,
    TopLogProbs,
    base_log_probs,
    general_answers,
    model_identity,
    quantized_identity,
)
from deltaw.training.evaluation.general_prompts import REHEARSAL_PROMPTS
from deltaw.training.features.prefix_cache import cached_prefix
from deltaw.training.features.prompt_store import stored_prompts
from deltaw.training.features.shared_store import Sharing
from deltaw.training.features.store import StoreLocation
from deltaw.training.feed import Feed
from deltaw.training.loop import train
from deltaw.training.losses import CrossEntropy
from deltaw.training.objective import Objective
from deltaw.training.optimizer import count_steps
from deltaw.training.parallel.group import EVALUATE, Group
from deltaw.training.preparation import checkpoint_blocks, quantize_weights
from deltaw.training.reducer import SINGLE_PROCESS, Reducer
from deltaw.training.rendered_rows import KEY as INVOCATION
from deltaw.training.rendered_rows import render_example, render_rows, resolve_invocation
from deltaw.training.state import Outcome, RowOrder, SavedState, TrainOptions, TrainOverrides, TrainState
from deltaw.training.task import SFT, RateFactor, Rows, Task, TaskGeneration, head_modules, read_run_data, task_of
from deltaw.training.trained_check import may_skip

if TYPE_CHECKING:
    from typing import Unpack  # not available at runtime in Python 3.10

# Number of rows for a data-dependent initialization.
CALIBRATION_ROWS = 256
# Hidden size that the usual learning rates of methods refer to.
WIDTH = 4096
# Settings with automatically chosen values.
RATE = "train.learning_rate"
APPROXIMATE = "train.approximate"
# Settings with the same names in TrainOptions.
_SETTINGS = ("batch_size", "seed", "schedule", "warmup", "weight_decay", "betas", "max_grad_norm")
# Settings that affect the initial gradient only through rows and parameters.
_WITHOUT_GRADIENT: dict[str, Any] = dict.fromkeys(("model", "data", "force", "memory", "track", "output"), True)
_WITHOUT_GRADIENT["train"] = {
    *("learning_rate", "loraplus_lr_ratio", "epochs", "max_steps", "time", "schedule", "warmup", "weight_decay"),
    *("max_grad_norm", "eval_every", "eval_answers", "samples", "early_stopping", "saved_adapter", "drift"),
    *("not_finite", "betas", "keep_general", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints"),
}


@dataclass
class Session:
    """A model that is ready for training.

    Attributes:
        config: Settings of the run.
        model: Model with the trainable parameters.
        method: Training method.
        task: Training task.
        data: Rows, with the method's virtual tokens prepended.
        feed: Supplies rows to the model: from the first layer on, from stored outputs of frozen layers, or with prompts
            computed separately from answers.
        chosen: Automatically chosen values with their reasons, by dotted key.
        notes: Messages about the training.
        identity: Identity of the base model's weights and precision, or None if it cannot be determined.
        general_examples: Answers of the base model that ``train.keep_general`` rehearses, as in ``data``.
        general_log_probs: Log-probabilities of the base model for these answers, by row.
        processes: Communication between processes that train together.
        approximations: Approximations of the training.
        roundings: int8 calibration of the layers.
        start: Adapters that the training starts from, or None.
    """

    config: RunConfig
    model: PreTrainedModel
    method: Method
    task: Task[Any]
    data: RunData
    feed: Feed
    chosen: dict[str, Choice[Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    identity: str | None = None
    general_examples: Sequence[Example] = ()
    general_log_probs: Mapping[int, TopLogProbs] = field(default_factory=dict)
    processes: Reducer = SINGLE_PROCESS
    approximations: Approximations = field(default_factory=Approximations)
    roundings: Sequence[Rounding] = ()
    start: StartAdapter | None = None

    @property
    def uses_start_reference(self) -> bool:
        """True if the reference model is the adapter of ``start_from``, not the base model."""
        return self.start is not None and self.config.reference_model == "start"

    def reference_active(self) -> contextlib.AbstractContextManager[None]:
        """Context manager in which the model computes as the reference model."""
        active = self.method.start_active if self.uses_start_reference else self.method.base_model_active
        return active(self.model)

    def _adapted(self, method: Method | None) -> AdaptedModel:
        task = self.task
        config = self.config
        texts = task.tokenizer, config.model, task.name, task.generates_text
        return AdaptedModel(self.model, method, *texts, sampler=config.sampler)

    def generator(self, *, of_base: bool) -> TextGenerator | None:
        """Return the text generator of the trained model, or of the base model. None if transformers generates.

        Args:
            of_base: Generate without adapter. The model must compute as the base model: inside ``method.without`` or
                before training.
        """
        if self.processes.size > 1 or not has_values(self.model):
            return None
        return verified_generator(self._adapted(None if of_base else self.method))

    def sampler(self) -> Sampler | None:
        """Return the sampler of completions with the current adapter, or None in a dry run."""
        return SessionSampler(self._adapted(self.method)) if has_values(self.model) else None

    @property
    def base_identity(self) -> str | None:
        """Identity of the base model with the rounding of its weights."""
        return quantized_identity(self.identity, self.roundings)

    @property
    def objective(self) -> Objective:
        """Model with its loss function."""
        return self.feed.objective

    @property
    def generation_limits(self) -> TaskGeneration:
        """Limits of the texts that the model generates in this run."""
        return self.task.generation_limits(self.data, self.config.train.batch_size)

    @property
    def batcher(self) -> Batcher:
        """Splits rows into microbatches that start at the first layer."""
        return self.feed.batcher

    @property
    def trainable_parameters(self) -> Sequence[tuple[str, nn.Parameter]]:
        """Trained parameters with their names."""
        return self.task.trainable_parameters(self.method.parameters(self.model), self.data.train)

    @property
    def learning_rate(self) -> float:
        rate = self.config.train.learning_rate
        if not isinstance(rate, str):
            return float(rate)
        choice = self.chosen.get(RATE)
        return self.default_learning_rate.value if choice is None else float(choice.value)

    @property
    def default_learning_rate(self) -> Choice[float]:
        """Default learning rate of the method for this task and model."""
        factors = rate_factors(self.config, self.task, self.method, len(self.data.train))
        return default_rate_of(self.method, self.model.config, *factors)

    @property
    def total_steps(self) -> int:
        settings = self.config.train
        return count_steps(len(self.data.train), settings.batch_size, settings.epochs, settings.max_steps)

    @property
    def row_order(self) -> RowOrder:
        """Rows of each step."""
        settings = self.config.train
        return RowOrder(len(self.data.train), settings.batch_size, settings.seed, self.row_groups)

    def planned_rows(self, step: int) -> Rows:
        """Return the rows of a step (from 0) for a plan. Generated rows have their maximum length."""
        return self.feed.worst_case_rows([self.data.train[index] for index in self.row_order.indices(step)])

    @functools.cached_property
    def row_groups(self) -> np.ndarray | None:
        """Group of each row in the row order: rows about one image, whose tokens are then computed once in a step."""
        inputs = self.task.inputs
        return None if inputs is None or not self.config.train.group_images else inputs.groups(self.data.train)

    def lines(self) -> list[str]:
        """Return messages about batching, the code that the blocks run, and slow settings."""
        batcher = self.batcher
        rows = "padded rows"
        num_steps = self.total_steps
        lines = [*loader.notes(), *gpu_attention.notes(), *compiled.notes()]
        if RATE in self.chosen and self.task.few_rows_factor(len(self.data.train)) != SFT:
            lines.append(f"{RATE}: {self.chosen[RATE]}")
        if not batcher.padded:
            rows = "padding-free packing"
            with packed_rows(self.model):
                fused = fused_blocks(self.model).choice
            kind = "fused" if fused.value else "the model's own code"
            lines.append(Detail(f"blocks: {kind} ({fused.why})"))
        shared = ", shared prefixes computed once" if self.feed.share else ""
        head = "" if self.objective.chunked else ", all logits at once (the model's head is not supported)"
        tokens = batcher.tokens_per_pass
        steps = f"{num_steps} step{'s' if num_steps != 1 else ''}"
        microbatches = f"in microbatches of up to {tokens} tokens: {rows}{shared}{head}"
        if self.task.inputs is not None:
            lines += self.task.inputs.describe(self.data.all_rows)
        return [*lines, Detail(f"{steps} of {self.config.train.batch_size} rows, {microbatches}")]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Enable the session's arithmetic, and let the model accept the session's batches, inside this context."""
        with self.approximations.on(), self.task.model_context(self.model, self.batcher):
            yield

    def close(self) -> None:
        """Release stored features."""
        self.feed.close()

    def train(
        self,
        callback: Callback | None = None,
        *,
        rows: Sequence[Any] | None = None,
        batcher: Batcher | None = None,
        checkpoint: SavedState | None = None,
        **overrides: Unpack[TrainOverrides],
    ) -> Outcome:
        """Train according to the settings. Call it inside :meth:`running`.

        Args:
            callback: Receives training events.
            rows: Rows that replace those of the session.
            batcher: Batcher that replaces the session's feed.
            checkpoint: State to resume from.
            overrides: Options of :class:`deltaw.training.state.TrainOptions` that differ from the settings.
        """
        settings = self.config.train
        named_parameters = self.trainable_parameters
        options = TrainOptions(
            learning_rate=self.learning_rate,
            total_steps=self.total_steps,
            rate_factors=[self.method.rate_factor(name) for name, _ in named_parameters],
            names=[name for name, _ in named_parameters],
            may_skip=may_skip(self.model),
            before_step=self._recheck_approximations(overrides.get("batch_size", settings.batch_size)),
            after_step=lambda: self.method.after_step(self.model),
            add_gradients=self._rehearsal(),
            groups=self.row_groups,
            loss_scaling=self.model.dtype == torch.float16,
            **{name: getattr(settings, name) for name in _SETTINGS},
        )
        return train(
            self.objective,
            [parameter for _, parameter in named_parameters],
            self.data.train if rows is None else rows,
            batcher or self.feed,
            options,
            callback=callback,
            checkpoint=checkpoint,
            reducer=self.processes,
            **overrides,
        )

    def _recheck_approximations(self, batch_size: int) -> Callable[[TrainState, Sequence[Any]], None]:
        """Return a ``before_step`` function that repeats the check of approximations at intervals."""
        approximations = self.approximations
        model = self.model
        first = self.data.train[:batch_size]
        if not approximations.names or not first:
            return lambda state, rows: None
        check_rows = select_check_rows(first, self.batcher, self.objective)
        check_tokens, step_tokens = (sum(b.tokens for b in self.batcher.batches(r)) for r in (check_rows, first))
        interval = check_interval(check_tokens, step_tokens)

        def before_step(state: TrainState, rows: Sequence[Any]) -> None:
            if not approximations.names or state.step % interval or not state.step:
                return
            rows_to_check = select_check_rows(rows, self.batcher, self.objective)
            with self.method.evaluating(model):
                parameters = dict(zip(state.names, state.trained, strict=True))
                check = GradientCheck(model, self.objective, self.batcher, parameters, rows_to_check)
                approximations.recheck(check, state.step + 1, self.processes)

        return before_step

    @property
    def token_objective(self) -> CausalObjective:
        """Objective of next-token prediction, for general answers."""
        objective = self.objective
        if type(objective) is CausalObjective and isinstance(objective.loss, CrossEntropy):
            return objective
        return CausalObjective(objective.model)

    def _rehearsal(self) -> GeneralRehearsal | None:
        """Return the rehearsal of general answers, or None if it is disabled."""
        if not self.general_examples:
            return None
        objective = self.token_objective
        train = self.config.train
        answers = self.general_examples
        base = self.general_log_probs
        return GeneralRehearsal(objective, self.batcher, answers, base, train.keep_general, train.seed)

    def evaluate(self, examples: Sequence[Any] | None = None) -> Evaluation:
        """Evaluate the model on examples, by default the held-out ones. Call it inside :meth:`running`."""
        selected = self.data.held_out if examples is None else examples
        if not selected:
            return Evaluation()
        objective = _shared_objective(self, selected)
        with self.method.evaluating(self.model), track_progress("evaluating"):
            return self.task.evaluate(objective, selected, self.feed, self.data.classes)

    def complete(
        self, prompts: Sequence[Any], max_new_tokens: int, *, of_base: bool = False
    ) -> list[GeneratedCompletion]:
        """Complete prompts of token ids greedily.

        A batch has at most as many tokens as a training microbatch and stores only keys and values, so it needs less
        memory than a training step.

        Args:
            prompts: Prompts to complete.
            max_new_tokens: Maximum length of a completion.
            of_base: The model computes as the base model, so completions are cached on disk.
        """
        decoder = self._decoder(of_base=of_base, batch_tokens=self.batcher.tokens_per_pass)
        with self.method.evaluating(self.model):
            return (decoder.cached if of_base else decoder.complete)(prompts, max_new_tokens)

    @property
    def replaced_base(self) -> bool:
        """True if the adapter of ``start_from`` has replaced weights of the base model, which cannot be restored."""
        return self.start is not None and not self.method.can_restore_base(self.model)

    def _decoder(self, *, of_base: bool, batch_tokens: int) -> GreedyDecoder:
        assert self.task.tokenizer is not None
        writer = self.generator(of_base=of_base)
        identity = None if self.replaced_base else self.base_identity
        return GreedyDecoder(self.model, self.task.tokenizer, identity, writer, batch_tokens)

    def general_answers(self, prompts: Sequence[str]) -> list[Example]:
        """Return the answers of the base model to general prompts, rendered for the base model.

        If the adapter of ``start_from`` has replaced weights of the base model, they are the answers of that adapter.
        If the method does not preserve the base model, call it before training.

        Raises:
            NoGeneralAnswers: if the model generates no usable answer.
        """
        if self.task.tokenizer is None:
            raise NoGeneralAnswers("the model does not read text")
        # Keys and values are a small part of a token's activations, unless blocks are checkpointed.
        batch_tokens = (1 if self.config.train.checkpointing else 4) * self.batcher.tokens_per_pass
        decoder = self._decoder(of_base=True, batch_tokens=batch_tokens)
        with self._base_active():
            return general_answers(decoder, prompts, self.config.data, reserved=self.method.virtual_tokens)

    @contextlib.contextmanager
    def _base_active(self) -> Iterator[None]:
        """Evaluate the base model, or before training the model itself if the method does not preserve the base."""
        preserves_base = self.method.can_restore_base(self.model)
        base = self.method.base_model_active(self.model) if preserves_base else contextlib.nullcontext()
        with self.method.evaluating(self.model), base:
            yield

    def rehearse(self, answers: Sequence[Example]) -> None:
        """Set the general answers that the training rehearses. Call it before training.

        Args:
            answers: Answers of the base model, rendered for it (:meth:`general_answers`).
        """
        objective = self.token_objective
        with self._base_active(), self.running():
            self.general_log_probs = base_log_probs(objective, self.batcher, answers)
        self.general_examples = [render_example(answer, self.method) for answer in answers]


# Evaluates a microbatch.
ComputeBatch: TypeAlias = Callable[[Any], "Tensor | tuple[Tensor, ...]"]


def _shared_objective(session: Session, rows: Sequence[Any]) -> Objective:
    """Return an objective whose microbatches are computed by all processes, in process 0.

    The other processes take part if ``rows`` is one of the run's sets. Otherwise the objective itself is returned and
    they wait. The method named by ``Task.evaluation_method`` must be called once per microbatch, in order.
    """
    group = session.processes
    objective = session.objective
    if not isinstance(group, Group) or not session.task.shares_evaluation:
        return objective
    number = next((number for number, candidate in enumerate(session.data.sets.values()) if candidate is rows), None)
    if number is None:
        return objective
    group.order(EVALUATE, number)
    group.share_parameters([parameter for _, parameter in session.method.parameters(session.model)])
    compute: ComputeBatch = getattr(objective, session.task.evaluation_method)
    counter = itertools.count()

    def compute_shared(batch: Any) -> Tensor | tuple[Tensor, ...]:
        owner = next(counter) % group.size
        if owner:
            outputs = tuple(group.receive(owner) for _ in range(int(group.receive(owner))))
            return outputs if len(outputs) > 1 else outputs[0]
        group.synchronized = True
        try:
            return compute(batch)
        finally:
            group.synchronized = False

    shared = copy.copy(objective)
    setattr(shared, session.task.evaluation_method, compute_shared)
    return shared


@torch.no_grad()
def compute_evaluation_share(session: Session, set_index: int) -> None:
    """Compute this process's microbatches of a set and send the outputs. Runs in processes from 1 on.

    The parameters are received from process 0, because they can differ from the last ones of the training.
    """
    group = session.processes
    assert isinstance(group, Group)
    group.share_parameters([parameter for _, parameter in session.method.parameters(session.model)])
    session.method.after_step(session.model)
    rows = list(session.data.sets.values())[set_index]
    compute: ComputeBatch = getattr(session.objective, session.task.evaluation_method)
    with session.method.evaluating(session.model):
        count = 0
        batch = None
        for index, batch in enumerate(session.task.evaluation_batches(rows, session.feed)):
            count = index + 1
            if index % group.size == group.rank:
                result = compute(batch)
                outputs = result if isinstance(result, tuple) else (result,)
                for tensor in (torch.tensor(len(outputs)), *outputs):
                    group.send(tensor)
        if group.sharded and 0 < count % group.size <= group.rank:
            compute(batch)  # the remaining processes compute one more microbatch, which gathers this process's rows


def read_data(
    config: RunConfig, log: LogFunction = ignore_line, *, check: bool = True, prepare: bool = False
) -> tuple[Task[Any], RunData]:
    """Return the task of a run and its rows, before any weight is read.

    Args:
        config: Settings of the run.
        log: Receives messages.
        check: Reject settings that do not fit the rows.
        prepare: Also compute the inputs that the rows refer to (:meth:`TaskInputs.prepare`).
    """
    if config.data.chat_template is not None:
        read_chat_template(config.data.chat_template)  # report errors in it before a model is converted
    dtype = choose_precision(choose_device(config.device).value, config.precision).value
    code = config.trust_remote_code
    section = config.section
    start = time.monotonic()
    with PeakMemory() as peak, track_progress("reading the rows"):
        task = task_of(config.task, config.model, dtype, trust_remote_code=code, log=log, section=section)
        data = read_run_data(task, config.data, seed=config.data_seed, log=log)
        if prepare and task.inputs is not None:
            task.inputs.prepare(method_for(task, config).trained_modules, is_new=config.start_from is None)
    release_free_memory()  # before smaller objects fragment the memory that was used for reading
    data = replace(data, read_peak_bytes=peak.bytes, read_seconds=time.monotonic() - start)
    for line in data.report.lines():
        log(line)
    if check:
        task.check(data, call=False)
    return task, data


def rate_factors(config: RunConfig, task: Task[Any], method: Method, num_rows: int) -> list[RateFactor]:
    """Return the factors on the method's default learning rate: of the task, a small number of training rows, and the
    trained inputs.
    """
    images = task.images
    is_new = config.start_from is None
    continues = images is not None and images.continues_connector(method.trained_modules, is_new=is_new)
    inputs = RateFactor(0.1, "the connector is trained already") if continues else SFT
    return [task.rate_factor(config.section), task.few_rows_factor(num_rows), inputs]


def default_rate_of(method: Method, architecture: PretrainedConfig, *factors: RateFactor) -> Choice[float]:
    """Return the method's default learning rate for a model of this width, multiplied by the factors.

    The best rates of LoRA and full fine-tuning fall with the model's width to the power of 0.78 ("LoRA Without Regret",
    2025, over Llama models).
    """
    rate = method.default_learning_rate
    reason = f"usual for method {method.name}"
    width = getattr(architecture.get_text_config(), "hidden_size", None)
    if method.rate_scales_with_width and isinstance(width, int):
        rate = float(f"{rate * (WIDTH / width) ** 0.78:.1e}")
        reason += " on a model this wide"
    for factor in (factor for factor in factors if factor.value != 1):
        reason += f", {rate:g}, times {factor.value:g} ({factor.source})"
        rate = float(f"{rate * factor.value:.1e}")
    return Choice(rate, reason)


def assemble(
    config: RunConfig,
    task: Task[Any],
    data: RunData,
    model: PreTrainedModel,
    *,
    device: str,
    new_modules: Sequence[str] = (),
    candidates: Sequence[str] = (),
    resumed: Sequence[str] | None = None,
    processes: Reducer = SINGLE_PROCESS,
) -> Session:
    """Combine a freshly loaded model, a method and rows.

    Args:
        config: Settings of the run.
        task: Training task.
        data: Rows.
        model: Loaded model.
        device: Device of the model.
        new_modules: Names of modules that the model's files do not contain. Each method trains them.
        candidates: Approximations to use if they pass the check.
        resumed: Approximations of the training to resume. None for a new training.
        processes: Communication between processes. All of them assemble the same session.

    Raises:
        UserError: if the method does not fit the model, or a row is too long.
    """
    method = method_for(task, config)
    start = open_start(config)
    from_start = start is not None and config.reference_model == "start"
    invocation = resolve_invocation(method, task.tokenizer, data.train, chat=data.report.template == "chat")
    settings = config.train
    torch.manual_seed(settings.seed)
    identity = model_identity(model, config.precision)
    if task.inputs is not None:
        task.inputs.attach(model, method.trained_modules, is_new=start is None)
    has_weights = sharded_blocks(model) is not None or has_values(model)
    notes, roundings = quantize_weights(model, config.precision if has_weights else "", data.train, identity, device)
    shares = settings.share_prefixes, method.can_share_prefixes()
    options = BatcherOptions(device, settings.tokens_per_pass, *shares, method.virtual_tokens)
    batcher, chosen = task.batcher(model, data.all_rows, options)
    task.initialize_head(model, new_modules, data.train)

    def add_references(rows: Rows) -> Rows:
        return task.add_reference_log_probs(model, rows, batcher, processes)

    if not from_start:
        data = data.map_rows(add_references)
    extra_modules = _extra_modules(task, model, new_modules)
    calibrate = functools.partial(_calibrate, task, model, batcher, data.train[:CALIBRATION_ROWS])
    with track_progress(f"preparing method {method.name}"):
        if start is None:
            notes += [method.prepare(model, seed=settings.seed, extra_modules=extra_modules, calibrate=calibrate)]
        else:
            notes += [method.prepare_from(model, start, seed=settings.seed, extra_modules=extra_modules)]
        notes += task.prepare_head(model, data.train, None if start is None else start.folder, calibrate)
        if start is not None:
            method.record_start(model)
    if settings.checkpointing:
        checkpoint_blocks(model, settings.checkpointing, [p for _, p in method.parameters(model)])
    if (sharded := sharded_blocks(model)) is not None:
        sharded.share_tables()
        with task.model_context(model, batcher):  # all processes determine now which blocks run fused
            pass
    elif has_weights and processes.size == 1 and device == "cpu":  # several processes share the pages of a file
        move_to_huge_pages(model)
    chosen |= _resolved_choices(config, task, data, method, model, invocation)
    data = data.map_rows(lambda rows: render_rows(rows, method))
    with method.evaluating(model):
        if from_start:
            data = data.map_rows(add_references)
        objective = task.objective(model)
    session = Session(config, model, method, task, data, Feed(objective, batcher), chosen, notes, identity)
    session.roundings = roundings
    session.processes = processes
    session.start = start
    session.feed = task.feed(session)
    if settings.keep_general:
        _generate_general_answers(session)
    if not task.caches_features:
        return session
    _cache_features(session, invocation)
    if settings.approximate == "auto":
        _approximate(session, applicable(model, objective, candidates), resumed if has_weights else candidates)
    return session


def _extra_modules(task: Task[Any], model: PreTrainedModel, new_modules: Sequence[str]) -> list[str]:
    """Return the names of the modules that each method trains in addition to its own parameters."""
    if task.trains_head:
        return list(dict.fromkeys([*head_modules(model), *new_modules]))
    return [] if task.inputs is None else task.inputs.extra_modules(model)


def _calibrate(task: Task[Any], model: PreTrainedModel, batcher: Batcher, rows: Sequence[Any]) -> None:
    """Compute these rows for a method whose initialization depends on layer inputs."""
    objective = task.objective(model)
    with torch.no_grad(), task.model_context(model, batcher):
        for batch in batcher.batches(rows):
            task.forward(objective, batch)


def _resolved_choices(
    config: RunConfig,
    task: Task[Any],
    data: RunData,
    method: Method,
    model: PreTrainedModel,
    invocation: Choice[Any] | None,
) -> Iterator[tuple[str, Choice[Any]]]:
    """Yield values that are chosen from the rows and the method."""
    if invocation is not None:
        yield INVOCATION, invocation
    if data.report.date is not None and config.data.date is None:
        yield "data.date", Choice(data.report.date, "the chat template writes the date of the run's start")
    if config.train.learning_rate == "auto":
        factors = rate_factors(config, task, method, len(data.train))
        yield RATE, default_rate_of(method, model.config, *factors)


def _approximate(session: Session, candidates: Sequence[str], resumed: Sequence[str] | None) -> None:
    """Select the approximations of the training and report them.

    Args:
        session: Session to change.
        candidates: Approximations to check.
        resumed: Approximations of a resumed training, which are not checked. None for a new training.
    """
    model = session.model
    if resumed is not None:
        session.approximations = Approximations(resumed)
        return
    if not candidates:
        return
    try:
        progress = track_progress("comparing gradients with fp32; train.approximate: off skips this", 1.0)
        with progress as advance, session.running(), session.method.evaluating(model):
            check = gradient_check(session, advance)
            key = _gradient_cache_key(session, check.rows, candidates)
            cached = None if key is None else load_result("approximations", key, ("torch", "transformers", "deltaw"))
            if isinstance(cached, dict):
                allowed = AllowedApproximations.from_cache(cached)
            else:
                release_free_memory()  # free memory from loading and from the reference log-probabilities
                allowed = check.choose(candidates)
                if key is not None:
                    store_result("approximations", key, asdict(allowed), ("torch", "transformers", "deltaw"))
    except Exception as error:  # a third-party model can raise any error in fp32
        reason = f"it could not be compared with fp32 ({type(error).__name__}: {str(error)[:100]})"
        allowed = AllowedApproximations((), None, dict.fromkeys(candidates, reason))
    finally:
        model.zero_grad()
    agreed = json.loads(session.processes.texts(json.dumps(allowed.names))[0])
    session.approximations = Approximations(agreed, allowed.measured)
    session.chosen[APPROXIMATE] = session.approximations.choice(allowed.refused)
    session.notes += session.approximations.lines(allowed.refused)


def gradient_check(session: Session, advance: Advance = lambda done: None) -> GradientCheck:
    """Return a gradient check on the first rows of a run. Call it inside ``session.running()``."""
    settings = session.config.train
    order = session.row_order
    steps = range(-(-MAX_CANDIDATE_ROWS // settings.batch_size))
    rows = (session.data.train[i] for step in steps for i in order.indices(step))
    check_rows = select_check_rows(rows, session.batcher, session.objective)
    model = session.model
    objective = session.objective
    parameters = dict(session.trainable_parameters)
    return GradientCheck(model, objective, session.batcher, parameters, check_rows, advance)


def _gradient_cache_key(session: Session, rows: Sequence[Any], candidates: Sequence[str]) -> object | None:
    """Return a key of everything that the initial gradient depends on, except versions.

    Returns None if part of it has no stable identity.
    """
    config = session.config
    uses_only_deltaw_classes = all(type(p).__module__.startswith("deltaw.") for p in (session.task, session.method))
    has_identity = session.identity is not None and session.processes.size == 1
    if not has_identity or not uses_only_deltaw_classes or config.trust_remote_code:
        return None
    parameters_digest = combine_digests({name: digest_tensor(p) for name, p in session.trainable_parameters})
    settings = config.model_dump(mode="json", exclude=_WITHOUT_GRADIENT)
    execution = [numerics_key(session.model.device), torch.get_num_threads(), *candidates]
    return [session.identity, settings, session.notes, digest_of_rows(rows), parameters_digest, execution]


def _cache_features(session: Session, invocation: Choice[Any] | None) -> None:
    """Decide which outputs of the frozen layers are stored, and report it.

    Args:
        session: Session to change.
        invocation: Invocation sequence of an activated adapter, or None if the adapter is always active.
    """
    model = session.model
    method = session.method
    settings = session.config.train
    rows = session.data.all_rows
    feed = session.feed
    repeats_rows = session.total_steps * settings.batch_size > len(session.data.train)
    store_features = settings.keep_features is True or (settings.keep_features == "auto" and repeats_rows)
    if invocation is not None:
        with session.running(), method.evaluating(model):
            prompts, choice = stored_prompts(model, feed, rows, StoreLocation(), store_keys=store_features)
        session.feed = prompts or feed
        session.chosen["train.keep_features"] = choice
        session.notes += [f"the adapter is active from {invocation} on", f"prompts: {choice}"]
    elif store_features:
        sharing = Sharing(session.processes)

        def cache_now() -> None:
            with session.running(), method.evaluating(model):
                features, choice = cached_prefix(model, feed, rows, StoreLocation(), sharing)
            session.chosen["train.keep_features"] = choice
            if features is not None:
                session.feed = features
                session.notes.append(f"features computed once for each row: {choice}")

        if sharing.is_leader:
            cache_now()
        if sharing.exchange(has_store=session.feed is not feed) and not sharing.is_leader:
            cache_now()


def _generate_general_answers(session: Session) -> None:
    """Generate the answers that ``train.keep_general`` rehearses, and report it.

    Raises:
        UserError: if the model generates no usable answer.
    """
    weight = session.config.train.keep_general
    try:
        if not session.task.generates_text:
            raise NoGeneralAnswers(f"a model for {session.task.name} generates no text")
        answers = session.general_answers(REHEARSAL_PROMPTS)
    except NoGeneralAnswers as reason:
        message = f"general answers cannot be rehearsed: {reason}"
        raise UserError(message, location="train.keep_general", hint="set train.keep_general: 0") from reason
    session.rehearse(answers)
    rows = f"one of {len(answers)} general answers of the base model, which are not counted as rows"
    session.notes.append(f"keep_general {weight:g}: each step also trains on {rows}")


def method_for(task: Task[Any], config: RunConfig) -> Method:
    """Return the training method of a run.

    Raises:
        UserError: if it does not fit the task.
    """
    method = choose_method(config, task.tokenizer)
    if VISION_TOWER in method.trained_modules and task.images is None:
        message = "this task and model have no vision tower"
        raise UserError(message, location="lora.vision_tower", hint="remove it, or use a vision-language model")
    task.check_method(method)
    if task.inputs is not None:
        task.inputs.check_method(method)
    return method
