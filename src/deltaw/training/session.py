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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from deltaw.cache import load_result, store_result
from deltaw.data.chat_template import read_chat_template
from deltaw.data.distill_rows import max_example_length
from deltaw.data.example import Example
from deltaw.data.row_store import digest_of_rows
from deltaw.errors import UserError
from deltaw.hub.loading import has_values
from deltaw.kernels import attention, loader
from deltaw.lora.fingerprint import combine_digests, digest_tensor
from deltaw.machine.choices import Choice, choose_device, choose_precision
from deltaw.machine.kernel_choice import numerics_key
from deltaw.machine.memory import PeakMemory, release_free_memory
from deltaw.methods.base import Method
from deltaw.methods.files import choose_method
from deltaw.progress import Advance, Detail, track_progress
from deltaw.runtime.generation import GeneratedCompletion, Sampler, TextGenerator, generate
from deltaw.runtime.packed import fused_blocks, packed_rows
from deltaw.runtime.quantized_weights import Rounding, use_large_pages
from deltaw.runtime.sharded import sharded_blocks
from deltaw.settings import RunConfig
from deltaw.training.approximations import (
    MAX_CANDIDATE_ROWS,
    AllowedApproximations,
    Approximations,
    GradientCheck,
    applicable,
    check_interval,
    select_check_rows,
)
from deltaw.training.callbacks import Callback, LogFunction, ignore_line
from deltaw.training.distillation.feed import DistillFeed
from deltaw.training.distillation.loss import DistillObjective
from deltaw.training.distillation.teachers import base_as_teacher, load_teacher
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.general import (
    GeneralRehearsal,
    NoGeneralAnswers,
    base_answers,
    general_answers,
    model_identity,
    quantized_identity,
)
from deltaw.training.evaluation.general_prompts import REHEARSAL_PROMPTS
from deltaw.training.features.prefix_cache import Sharing, cached_prefix
from deltaw.training.features.prompts import stored_prompts
from deltaw.training.guarantee import may_skip
from deltaw.training.loop import train
from deltaw.training.microbatches import AnyBatcher, AnyObjective, Feed
from deltaw.training.optimizer import count_steps
from deltaw.training.parallel.group import EVALUATE, Group
from deltaw.training.parallel.reducer import SINGLE_PROCESS, Reducer
from deltaw.training.preparation import checkpoint_blocks, quantize_weights
from deltaw.training.rendered_rows import KEY as INVOCATION
from deltaw.training.rendered_rows import render_example, render_rows, resolve_invocation
from deltaw.training.rollouts.feed import RolloutFeed
from deltaw.training.state import Outcome, RowOrder, SavedState, TrainOptions, TrainState
from deltaw.training.tasks.base import SFT, RateFactor, RunData, Task, TaskGeneration, read_run_data, task_of
from deltaw.training.tasks.causal_objective import CausalObjective
from deltaw.training.tasks.reward import RewardTask

# Number of rows for a data-dependent initialization.
CALIBRATION_ROWS = 256
# Hidden size that the usual learning rates of methods refer to.
WIDTH = 4096
# Settings with automatically chosen values.
RATE, APPROXIMATE = "train.learning_rate", "train.approximate"
# Settings with the same names in TrainOptions.
_SETTINGS = ("batch_size", "seed", "schedule", "warmup", "weight_decay", "betas", "max_grad_norm")
# Settings that affect the initial gradient only through rows and parameters.
_WITHOUT_GRADIENT: dict[str, Any] = dict.fromkeys(("model", "data", "force", "memory", "track", "output"), True)
_WITHOUT_GRADIENT["train"] = {
    *("learning_rate", "loraplus_lr_ratio", "epochs", "max_steps", "time", "schedule", "warmup", "weight_decay"),
    *("max_grad_norm", "eval_every", "eval_answers", "samples", "early_stopping", "adapter", "drift", "not_finite"),
    *("betas", "keep_general", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints"),
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
        processes: Communication between processes that train together.
        approximations: Approximations of the training.
        roundings: int8 calibration of the layers.
        make_generator: Creates a text generator with the method's adapter, or without it for None. If it is None,
            transformers generates texts.
        make_sampler: Creates a sampler of completions with the method's adapter.
    """

    config: RunConfig
    model: PreTrainedModel
    method: Method
    task: Task
    data: RunData
    feed: Feed
    chosen: dict[str, Choice] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    identity: str | None = None
    general_examples: Sequence[Example] = ()
    processes: Reducer = SINGLE_PROCESS
    approximations: Approximations = field(default_factory=Approximations)
    roundings: Sequence[Rounding] = ()
    make_generator: Callable[[Method | None], TextGenerator] | None = None
    make_sampler: Callable[[Method], Sampler] | None = None

    def writer(self, *, of_base: bool) -> TextGenerator | None:
        """Return the text generator of the trained model, or of the base model.

        Args:
            of_base: Generate without adapter. The model must compute as the base model: inside ``method.without`` or
                before training.
        """
        if self.make_generator is None or self.processes.size > 1:
            return None
        return self.make_generator(None if of_base else self.method)

    @property
    def base_identity(self) -> str | None:
        """Identity of the base model with the rounding of its weights."""
        return quantized_identity(self.identity, self.roundings)

    @property
    def objective(self) -> AnyObjective:
        """Model with its loss function."""
        return self.feed.objective

    @property
    def generation_limits(self) -> TaskGeneration:
        """Limits of the texts that the model generates in this run."""
        return self.task.generation_limits(self.data, self.config.train.batch_size)

    @property
    def batcher(self) -> AnyBatcher:
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
        return default_rate_of(self.method, self.model.config, self.task.rate_factor(self.config.section))

    @property
    def total_steps(self) -> int:
        settings = self.config.train
        return count_steps(len(self.data.train), settings.batch_size, settings.epochs, settings.max_steps)

    def lines(self) -> list[str]:
        """Return messages about batching, the code that the blocks run, and slow settings."""
        batcher, objective = self.batcher, self.objective
        num_steps, batch_size = self.total_steps, self.config.train.batch_size
        lines = [*loader.notes(), *map(Detail, attention.notes())]
        rows = "padded rows"
        if not (self.task.has_labels or getattr(batcher, "padded", False)):
            rows = "padding-free packing"
            with packed_rows(self.model):
                fused = fused_blocks(self.model).choice
            kind = "fused" if fused.value else "the model's own code"
            lines.append(Detail(f"blocks: {kind} ({fused.why})"))
        shared = ", shared prefixes computed once" if self.feed.share else ""
        has_all_logits = not getattr(objective, "chunked", True)
        head = ", all logits at once (the model's head is not supported)" if has_all_logits else ""
        tokens = getattr(batcher, "tokens_per_pass", None)
        steps = f"{num_steps} step{'s' if num_steps != 1 else ''} of {batch_size} rows"
        return [*lines, Detail(f"{steps}, in microbatches of up to {tokens} tokens: {rows}{shared}{head}")]

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
        batcher: AnyBatcher | None = None,
        checkpoint: SavedState | None = None,
        **overrides: Any,
    ) -> Outcome:
        """Train according to the settings. Call it inside :meth:`running`.

        Args:
            callback: Receives training events.
            rows: Rows that replace those of the session.
            batcher: Batcher that replaces the session's feed.
            checkpoint: State to resume from.
            overrides: Options of :class:`deltaw.training.state.TrainOptions` that differ from the settings.
        """
        settings, named_parameters = self.config.train, self.trainable_parameters
        options = TrainOptions(
            learning_rate=self.learning_rate,
            total_steps=self.total_steps,
            rate_factors=[self.method.rate_factor(name) for name, _ in named_parameters],
            names=[name for name, _ in named_parameters],
            may_skip=may_skip(self.model),
            before_step=self._recheck_approximations(overrides.get("batch_size", settings.batch_size)),
            after_step=lambda: self.method.after_step(self.model),
            add_gradients=self._rehearsal(),
            **{name: getattr(settings, name) for name in _SETTINGS},
        )
        parameters = [parameter for _, parameter in named_parameters]
        keywords: dict[str, Any] = {"callback": callback, "checkpoint": checkpoint, "reducer": self.processes}
        keywords |= overrides
        rows = self.data.train if rows is None else rows
        return train(self.objective, parameters, rows, batcher or self.feed, options, **keywords)

    def _recheck_approximations(self, batch_size: int) -> Callable[[TrainState, Sequence[Any]], None]:
        """Return a ``before_step`` function that repeats the check of approximations at intervals."""
        approximations, model = self.approximations, self.model
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

    def _rehearsal(self) -> GeneralRehearsal | None:
        """Return the rehearsal of general answers, or None if it is disabled."""
        settings = self.config.train
        if not self.general_examples:
            return None
        needs_objective = self.task.has_pairs or self.task.uses_rollouts
        objective = CausalObjective(self.model) if needs_objective else self.objective
        return GeneralRehearsal(objective, self.batcher, self.general_examples, settings.keep_general, settings.seed)

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
        model, tokenizer, batch_tokens = self.model, self.task.tokenizer, getattr(self.batcher, "tokens_per_pass", 1024)
        assert tokenizer is not None
        writer = self.writer(of_base=of_base)
        with self.method.evaluating(model):
            if of_base:
                options: dict[str, Any] = {"identity": self.base_identity, "batch_tokens": batch_tokens}
                return base_answers(model, tokenizer, prompts, max_new_tokens, writer=writer, **options)
            completions = None if writer is None else writer(prompts, max_new_tokens, batch_tokens, None)
            return completions or generate(
                model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens
            )

    def general_answers(self, prompts: Sequence[str]) -> list[Example]:
        """Return the base model's own answers to general prompts, rendered for the base model.

        If the method does not preserve the base model, call it before training.

        Raises:
            NoGeneralAnswers: if the model generates no usable answer.
        """
        if self.task.tokenizer is None:
            raise NoGeneralAnswers("the model does not read text")
        preserves_base = self.method.can_restore_base(self.model)
        base = self.method.base_model_active(self.model) if preserves_base else contextlib.nullcontext()
        options: dict[str, Any] = {"identity": self.base_identity, "reserved": self.method.virtual_tokens}
        # Keys and values are a small part of a token's activations, unless blocks are checkpointed.
        batch_factor = 1 if self.config.train.checkpointing else 4
        options["batch_tokens"] = batch_factor * getattr(self.batcher, "tokens_per_pass", 1024)
        options["writer"] = self.writer(of_base=True)
        with self.method.evaluating(self.model), base:
            return general_answers(self.model, self.task.tokenizer, prompts, self.config.data, **options)


def _shared_objective(session: Session, rows: Sequence[Any]) -> Any:
    """Return an objective whose microbatches are computed by all processes, in process 0.

    The other processes take part if ``rows`` is one of the run's sets. Otherwise the objective itself is returned and
    they wait. The method named by ``Task.evaluation_method`` must be called once per microbatch, in order.
    """
    group, objective = session.processes, session.objective
    if not isinstance(group, Group) or not session.task.shares_evaluation:
        return objective
    sets = enumerate(session.data.sets.values())
    number = next((number for number, candidate in sets if candidate is rows), None)
    if number is None:
        return objective
    group.order(EVALUATE, number)
    group.share_parameters([parameter for _, parameter in session.method.parameters(session.model)])
    compute, counter = getattr(objective, session.task.evaluation_method), itertools.count()

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
    compute = getattr(session.objective, session.task.evaluation_method)
    with session.method.evaluating(session.model):
        count, batch = 0, None
        for index, batch in enumerate(session.task.evaluation_batches(rows, session.feed)):
            count = index + 1
            if index % group.size == group.rank:
                result = compute(batch)
                outputs = result if isinstance(result, tuple) else (result,)
                for tensor in (torch.tensor(len(outputs)), *outputs):
                    group.send(tensor)
        if group.sharded and 0 < count % group.size <= group.rank:
            compute(batch)  # the remaining processes compute one more microbatch, which gathers this process's rows


def read_data(config: RunConfig, log: LogFunction = ignore_line, *, check: bool = True) -> tuple[Task, RunData]:
    """Return the task of a run and its rows, before any weight is read.

    Args:
        config: Settings of the run.
        log: Receives messages.
        check: Reject settings that do not fit the rows.
    """
    if config.data.chat_template is not None:
        read_chat_template(config.data.chat_template)  # report errors in it before a model is converted
    dtype = choose_precision(choose_device(config.device).value, config.precision).value
    with PeakMemory() as peak, track_progress("reading the rows"):
        options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "section": config.section}
        task = task_of(config.task, config.model, dtype, log=log, **options)
        data = read_run_data(task, config.data, seed=config.data_seed, log=log)
    release_free_memory()  # before smaller objects fragment the memory that was used for reading
    data = replace(data, read_peak_bytes=peak.bytes)
    for line in data.report.lines():
        log(line)
    if check:
        task.check(data, call=False)
    return task, data


def default_rate_of(method: Method, architecture: PretrainedConfig, factor: RateFactor = SFT) -> Choice[float]:
    """Return the method's default learning rate for a model of this width, multiplied by the factor of the task.

    The best rates of LoRA and full fine-tuning fall with the model's width to the power of 0.78 ("LoRA Without Regret",
    2025, over Llama models).
    """
    rate, reason = method.default_learning_rate, f"usual for method {method.name}"
    width = getattr(architecture.get_text_config(), "hidden_size", None)
    if method.rate_scales_with_width and isinstance(width, int):
        rate = float(f"{rate * (WIDTH / width) ** 0.78:.1e}")
        reason += " on a model this wide"
    if factor.value != 1:
        reason += f", {rate:g}, times {factor.value:g} for this task and loss ({factor.source})"
        rate = float(f"{rate * factor.value:.1e}")
    return Choice(rate, reason)


def assemble(
    config: RunConfig,
    task: Task,
    data: RunData,
    model: PreTrainedModel,
    *,
    device: str,
    new_modules: Sequence[str] = (),
    candidates: Sequence[str] = (),
    resumed: Sequence[str] | None = None,
    processes: Reducer = SINGLE_PROCESS,
    make_generator: Callable[[Method | None], TextGenerator] | None = None,
    make_sampler: Callable[[Method], Sampler] | None = None,
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
        make_generator: See :class:`Session`.
        make_sampler: See :class:`Session`.

    Raises:
        UserError: if the method does not fit the model, or a row is too long.
    """
    method = method_for(task, config)
    invocation = resolve_invocation(method, task.tokenizer, data.train, chat=data.report.template == "chat")
    settings = config.train
    torch.manual_seed(settings.seed)
    identity = model_identity(model, config.precision)
    has_weights = sharded_blocks(model) is not None or has_values(model)
    notes, roundings = quantize_weights(model, config.precision, data.train, identity) if has_weights else ([], [])
    options: dict[str, Any] = {"device": device, "tokens_per_pass": settings.tokens_per_pass}
    options |= {"share": settings.share_prefixes, "method_shares": method.can_share_prefixes()}
    batcher, chosen = task.batcher(model, data.all_rows, virtual_tokens=method.virtual_tokens, **options)
    task.initialize_head(model, new_modules, data.train)
    data = data.map_rows(lambda rows: task.add_reference_log_probs(model, rows, batcher, processes))
    extra_modules = list(dict.fromkeys([*head_modules(model), *new_modules])) if task.has_labels else []

    calibrate = functools.partial(_calibrate, task, model, batcher, data.train[:CALIBRATION_ROWS])
    with track_progress(f"preparing method {method.name}"):
        notes += [method.prepare(model, seed=settings.seed, extra_modules=extra_modules, calibrate=calibrate)]
    if settings.checkpointing:
        checkpoint_blocks(model, settings.checkpointing, [p for _, p in method.parameters(model)])
    if (sharded := sharded_blocks(model)) is not None:
        sharded.share_tables()
        with task.model_context(model, batcher):  # all processes determine now which blocks run fused
            pass
    elif has_weights and processes.size == 1 and device == "cpu":  # several processes share the pages of a file
        use_large_pages(model)
    chosen |= _resolved_choices(config, task, data, method, model, invocation)
    data = data.map_rows(lambda rows: render_rows(rows, method))
    with method.evaluating(model):
        objective = task.objective(model)
    feed = Feed(objective, batcher)
    session_fields: dict[str, Any] = {"identity": identity, "roundings": roundings, "processes": processes}
    session_fields |= {"make_generator": make_generator, "make_sampler": make_sampler}
    session = Session(config, model, method, task, data, feed, chosen, notes, **session_fields)
    if task.uses_rollouts:
        session.feed = _distill_feed(session) if isinstance(objective, DistillObjective) else _rollout_feed(session)
    if settings.keep_general:
        _generate_general_answers(session)
    if task.uses_rollouts or task.has_step_loss:  # rows are new in each step, or losses depend on the entire step
        return session
    _cache_features(session, invocation)
    if settings.approximate == "auto":
        _approximate(session, applicable(model, objective, candidates), resumed if has_weights else candidates)
    return session


def _calibrate(task: Task, model: PreTrainedModel, batcher: AnyBatcher, rows: Sequence[Any]) -> None:
    """Compute these rows for a method whose initialization depends on layer inputs."""
    objective: Any = task.objective(model)
    compute = objective.evaluate_rows if task.has_step_loss else objective
    with torch.no_grad(), task.model_context(model, batcher):
        for batch in batcher.batches(rows):
            compute(batch)


def _rollout_feed(session: Session) -> RolloutFeed:
    """Return the feed that samples and scores completions before each step."""
    task, model, method, objective = session.task, session.model, session.method, session.objective
    assert isinstance(task, RewardTask) and isinstance(objective, CausalObjective)
    return RolloutFeed(
        objective,
        session.batcher,
        None if session.make_sampler is None else task.turns(session.make_sampler(method)),
        task.settings,
        seed=session.config.train.seed,
        base=lambda: method.base_model_active(model),
        processes=session.processes,
    )


def _distill_feed(session: Session) -> DistillFeed:
    """Return the feed that queries teachers and generates completions before each step.

    Raises:
        UserError: if a teacher cannot be loaded.
    """
    config, task, data, method = session.config, session.task, session.data, session.method
    objective = session.objective
    assert task.tokenizer is not None and isinstance(objective, DistillObjective)
    settings, train = config.distill, config.train
    longest = max_example_length(data.all_rows, settings.max_new_tokens)
    teachers = []
    for teacher in settings.all_teachers:
        if teacher.is_base and teacher.quantize is None:
            writer = session.writer(of_base=True)
            teachers.append(base_as_teacher(objective, session.batcher, method, teacher.weight, writer))
        else:
            teachers.append(load_teacher(config, teacher, longest, session.model, session.notes.append))
    order = RowOrder(len(data.train), train.batch_size, train.seed)
    steps = range(min(session.total_steps, order.steps_per_epoch))
    used_indices = sorted({int(index) for step in steps for index in order.indices(step)})
    rows = [data.train[index] for index in used_indices]
    held_out = [row for rows in data.sets.values() for row in rows]
    sampler = None if session.make_sampler is None or not settings.on_policy else session.make_sampler(method)
    options: dict[str, Any] = {"rows": rows, "held_out": held_out, "sampler": sampler, "processes": session.processes}
    return DistillFeed(objective, session.batcher, teachers, settings, task.tokenizer, seed=train.seed, **options)


def _resolved_choices(
    config: RunConfig, task: Task, data: RunData, method: Method, model: PreTrainedModel, invocation: Choice | None
) -> Iterator[tuple[str, Choice]]:
    """Yield values that are chosen from the rows and the method."""
    if invocation is not None:
        yield INVOCATION, invocation
    if data.report.date is not None and config.data.date is None:
        yield "data.date", Choice(data.report.date, "the chat template writes the date of the run's start")
    if config.train.learning_rate == "auto":
        yield RATE, default_rate_of(method, model.config, task.rate_factor(config.section))


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
    order = RowOrder(len(session.data.train), settings.batch_size, settings.seed)
    steps = range(-(-MAX_CANDIDATE_ROWS // settings.batch_size))
    rows = (session.data.train[i] for step in steps for i in order.indices(step))
    check_rows = select_check_rows(rows, session.batcher, session.objective)
    model, objective, parameters = session.model, session.objective, dict(session.trainable_parameters)
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


def _cache_features(session: Session, invocation: Choice | None) -> None:
    """Decide which outputs of the frozen layers are stored, and report it.

    Args:
        session: Session to change.
        invocation: Invocation sequence of an activated adapter, or None if the adapter is always active.
    """
    model, method, settings, rows = session.model, session.method, session.config.train, session.data.all_rows
    feed = session.feed
    repeats_rows = session.total_steps * settings.batch_size > len(session.data.train)
    store_features = settings.keep_features is True or (settings.keep_features == "auto" and repeats_rows)
    if invocation is not None:
        with session.running(), method.evaluating(model):
            prompts, choice = stored_prompts(model, feed.objective, feed.batcher, rows, store_keys=store_features)
        session.feed = prompts or feed
        session.chosen["train.keep_features"] = choice
        session.notes += [f"the adapter is active from {invocation} on", f"prompts: {choice}"]
    elif store_features:
        sharing = Sharing(session.processes)

        def cache_now() -> None:
            with session.running(), method.evaluating(model):
                features, choice = cached_prefix(model, feed.objective, feed.batcher, rows, sharing=sharing)
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
    session.general_examples = [render_example(answer, session.method) for answer in answers]
    rows = f"one of {len(answers)} general answers of the base model, which are not counted as rows"
    session.notes.append(f"keep_general {weight:g}: each step also trains on {rows}")


def method_for(task: Task, config: RunConfig) -> Method:
    """Return the training method of a run.

    Raises:
        UserError: if it does not fit the task.
    """
    method = choose_method(config, task.tokenizer)
    if task.has_pairs and method.is_activated:
        message = "an adapter with an invocation sequence cannot be trained on pairs"
        raise UserError(message, location="lora.active", hint="set lora.active: always")
    return method


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of a classifier's modules above its backbone that have parameters."""
    base = getattr(model, "base_model_prefix", "")
    children = [(name, child) for name, child in model.named_children() if name != base]
    return [name for name, child in children if any(True for _ in child.parameters())]
