"""Everything that a training needs, put together: model, method, rows, batcher, objective.

A run, its plan and a comparison all begin here, so that what is planned is what is run. It knows no folders
and shows nothing.
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

from deltaw.cache import recall, remember
from deltaw.data.chat_template import read_chat_template
from deltaw.data.example import Example
from deltaw.data.lessons import longest_lesson
from deltaw.data.row_store import digest_of_rows
from deltaw.errors import UserError
from deltaw.hub.loading import has_values
from deltaw.kernels import attention, loader
from deltaw.lora.fingerprint import fingerprint_of, values_in_memory
from deltaw.machine.choices import Choice, choose_device, choose_precision
from deltaw.machine.kernel_choice import computed_on
from deltaw.machine.memory import PeakWatch, release_free_memory
from deltaw.methods.base import Method
from deltaw.methods.files import choose_method
from deltaw.runtime.generation import Completion, Sampler, Writer, generate
from deltaw.runtime.packed import fused_blocks, packed_rows
from deltaw.runtime.quantized_weights import Rounding, use_large_pages
from deltaw.runtime.sharded import sharded_blocks
from deltaw.settings import RunConfig
from deltaw.training.approximations import (
    CANDIDATES,
    Approximations,
    Chosen,
    GradientCheck,
    applicable,
    rows_to_look_at,
    steps_between,
)
from deltaw.training.callbacks import Callback, Say, silent
from deltaw.training.distillation.feed import LessonFeed
from deltaw.training.distillation.loss import DistillObjective
from deltaw.training.distillation.teachers import base_as_teacher, other_teacher
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.general import (
    KeepGeneral,
    NoGeneralAnswers,
    as_rounded,
    base_answers,
    general_answers,
    identity_of,
)
from deltaw.training.evaluation.general_prompts import KEPT
from deltaw.training.features.prefix_cache import Sharing, cached_prefix
from deltaw.training.features.prompts import stored_prompts
from deltaw.training.guarantee import may_skip
from deltaw.training.loop import train
from deltaw.training.microbatches import AnyBatcher, AnyObjective, Feed
from deltaw.training.optimizer import count_steps
from deltaw.training.parallel.group import EVALUATE, Group
from deltaw.training.parallel.reducer import ALONE, Reducer
from deltaw.training.preparation import checkpoint_blocks, quantized
from deltaw.training.rollouts.feed import RolloutFeed
from deltaw.training.seen import KEY as INVOCATION
from deltaw.training.seen import as_seen, resolve_invocation, rows_as_seen
from deltaw.training.state import Outcome, RowOrder, SavedState, TrainOptions, TrainState
from deltaw.training.tasks.base import SFT, RateFactor, RunData, Task, Written, read_run_data, task_of
from deltaw.training.tasks.causal_objective import CausalObjective
from deltaw.training.tasks.reward import RewardTask
from deltaw.working import Advance, Detail, working

# Rows that an initialization which depends on the data is calibrated on.
CALIBRATION_ROWS = 256
# The width that methods' usual learning rates are given for.
WIDTH = 4096
# Settings whose values a run may choose itself.
RATE, APPROXIMATE = "train.learning_rate", "train.approximate"
# Settings that the loop has by the same names.
_SETTINGS = ("batch_size", "seed", "schedule", "warmup", "weight_decay", "betas", "max_grad_norm")
# Settings that change nothing about the gradient at the start, besides through rows and parameters.
_WITHOUT_GRADIENT: dict[str, Any] = dict.fromkeys(("model", "data", "force", "memory", "track", "output"), True)
_WITHOUT_GRADIENT["train"] = {
    *("learning_rate", "b_rate", "epochs", "max_steps", "time", "schedule", "warmup", "weight_decay", "betas"),
    *("max_grad_norm", "eval_every", "eval_answers", "samples", "early_stopping", "adapter", "drift", "not_finite"),
    *("keep_general", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints"),
}


@dataclass
class Session:
    """A model ready to be trained.

    Attributes:
        config: the settings.
        model: with what is trained on it.
        method, task: as named.
        data: the rows, with the method's virtual tokens prepended.
        chosen: by dotted key, what the run chose itself and why.
        said: lines about what is trained.
        feed: how the rows reach the model: from the first layer on, from kept outputs of the frozen layers below
            the lowest trained module, or with prompts that run apart from answers.
        identity: names the base model's weights and precision; None where they cannot be named.
        roundings: how layers were calibrated to int8.
        writes: makes what writes texts, of the model with the method's adapter or as it is; None for transformers.
        samples: makes what draws completions with the method's adapter.
        general: the base model's answers that ``train.keep_general`` keeps, as ``data`` holds rows.
        processes: that train together.
        approximations: what is computed approximately.
    """

    config: RunConfig
    model: PreTrainedModel
    method: Method
    task: Task
    data: RunData
    feed: Feed
    chosen: dict[str, Choice] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    identity: str | None = None
    general: Sequence[Example] = ()
    processes: Reducer = ALONE
    approximations: Approximations = field(default_factory=Approximations)
    roundings: Sequence[Rounding] = ()
    writes: Callable[[Method | None], Writer] | None = None
    samples: Callable[[Method], Sampler] | None = None

    def writer(self, *, of_base: bool) -> Writer | None:
        """What writes texts, with what is trained or, within ``without`` or before training, of the base model."""
        if self.writes is None or self.processes.size > 1:
            return None
        return self.writes(None if of_base else self.method)

    @property
    def base_identity(self) -> str | None:
        """Names the base model as it computes."""
        return as_rounded(self.identity, self.roundings)

    @property
    def objective(self) -> AnyObjective:
        """The model with what it is trained to make small."""
        return self.feed.objective

    @property
    def written(self) -> Written:
        """What the model writes in this run."""
        return self.task.written(self.data, self.config.train.batch_size)

    @property
    def batcher(self) -> AnyBatcher:
        """Cuts rows into microbatches that run from the first layer on."""
        return self.feed.batcher

    @property
    def trained(self) -> Sequence[tuple[str, nn.Parameter]]:
        """What :meth:`train` trains, by name."""
        return self.task.trained(self.method.parameters(self.model), self.data.train)

    @property
    def learning_rate(self) -> float:
        rate = self.config.train.learning_rate
        if not isinstance(rate, str):
            return float(rate)
        found = self.chosen.get(RATE)
        return self.usual_rate.value if found is None else float(found.value)

    @property
    def usual_rate(self) -> Choice[float]:
        """Usual learning rate of the method for this task and model."""
        return usual_rate_of(self.method, self.model.config, self.task.rate_factor(self.config.section))

    @property
    def total_steps(self) -> int:
        settings = self.config.train
        return count_steps(len(self.data.train), settings.batch_size, settings.epochs, settings.max_steps)

    def lines(self) -> list[str]:
        """How the rows go through the model, which code its blocks run, and what is slow about it."""
        batcher, objective = self.batcher, self.objective
        total, size = self.total_steps, self.config.train.batch_size
        lines = [*loader.notes(), *map(Detail, attention.notes())]
        rows = "padded rows"
        if not (self.task.has_labels or getattr(batcher, "padded", False)):
            rows = "padding-free packing"
            with packed_rows(self.model):
                fused = fused_blocks(self.model).choice
            kind = "fused" if fused.value else "the model's own code"
            lines.append(Detail(f"blocks: {kind} ({fused.why})"))
        shared = ", shared prefixes computed once" if self.feed.share else ""
        whole = not getattr(objective, "chunked", True)
        head = ", all logits at once (the model's head is not known here)" if whole else ""
        tokens = getattr(batcher, "tokens_per_pass", None)
        steps = f"{total} step{'s' if total != 1 else ''} of {size} rows"
        return [*lines, Detail(f"{steps}, in microbatches of up to {tokens} tokens: {rows}{shared}{head}")]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While open, the model takes this session's batches, and the process computes as it trains."""
        with self.approximations.on(), self.task.running(self.model, self.batcher):
            yield

    def close(self) -> None:
        """Release what is kept on disk."""
        self.feed.close()

    def train(
        self,
        callback: Callback | None = None,
        *,
        rows: Sequence[Any] | None = None,
        batcher: AnyBatcher | None = None,
        saved: SavedState | None = None,
        **changed: Any,
    ) -> Outcome:
        """Train as the settings say; call within :meth:`running`.

        Args:
            callback: told of what happens. saved: what the training goes on from.
            rows, batcher: others than those of the session.
            changed: options of :class:`deltaw.training.state.TrainOptions` that differ from the settings.
        """
        settings, named = self.config.train, self.trained
        options = TrainOptions(
            learning_rate=self.learning_rate,
            total_steps=self.total_steps,
            rate_factors=[self.method.rate_factor(name) for name, _ in named],
            names=[name for name, _ in named],
            may_skip=may_skip(self.model),
            before_step=self._look_again(changed.get("batch_size", settings.batch_size)),
            after_step=lambda: self.method.after_step(self.model),
            add_gradients=self._keep_general(),
            **{name: getattr(settings, name) for name in _SETTINGS},
        )
        parameters = [parameter for _, parameter in named]
        how: dict[str, Any] = {"callback": callback, "saved": saved, "reducer": self.processes, **changed}
        rows = self.data.train if rows is None else rows
        return train(self.objective, parameters, rows, batcher or self.feed, options, **how)

    def _look_again(self, batch_size: int) -> Callable[[TrainState, Sequence[Any]], None]:
        """What verifies approximations before some of the steps."""
        approximations, model = self.approximations, self.model
        first = self.data.train[:batch_size]
        if not approximations.names or not first:
            return lambda state, rows: None
        looked_at = rows_to_look_at(first, self.batcher, self.objective)
        tokens, step = (sum(b.tokens for b in self.batcher.batches(r)) for r in (looked_at, first))
        every = steps_between(tokens, step)

        def before_step(state: TrainState, rows: Sequence[Any]) -> None:
            if not approximations.names or state.step % every or not state.step:
                return
            few = rows_to_look_at(rows, self.batcher, self.objective)
            with self.method.evaluating(model):
                named = dict(zip(state.names, state.trained, strict=True))
                check = GradientCheck(model, self.objective, self.batcher, named, few)
                approximations.look_again(check, state.step + 1, self.processes)

        return before_step

    def _keep_general(self) -> KeepGeneral | None:
        """What adds the gradients of general answers; None where none are kept."""
        settings = self.config.train
        if not self.general:
            return None
        own = self.task.has_pairs or self.task.rolls_out
        objective = CausalObjective(self.model) if own else self.objective
        return KeepGeneral(objective, self.batcher, self.general, settings.keep_general, settings.seed)

    def evaluate(self, examples: Sequence[Any] | None = None) -> Evaluation:
        """Evaluate the model on examples, by default those held out; call within :meth:`running`."""
        chosen = self.data.held_out if examples is None else examples
        if not chosen:
            return Evaluation()
        objective = _shared_objective(self, chosen)
        with self.method.evaluating(self.model), working("evaluating"):
            return self.task.evaluate(objective, chosen, self.feed, self.data.classes)

    def complete(self, prompts: Sequence[Any], max_new_tokens: int, *, of_base: bool = False) -> list[Completion]:
        """Complete prompts of token ids greedily.

        A batch holds no more tokens than a microbatch of training, and only their keys and values, so it takes less
        memory than a training step.

        Args:
            of_base: the model computes as the base model, so its completions are cached on disk.
        """
        model, tokenizer, most = self.model, self.task.tokenizer, getattr(self.batcher, "tokens_per_pass", 1024)
        assert tokenizer is not None
        writer = self.writer(of_base=of_base)
        with self.method.evaluating(model):
            if of_base:
                cached: dict[str, Any] = {"identity": self.base_identity, "batch_tokens": most, "writer": writer}
                return base_answers(model, tokenizer, prompts, max_new_tokens, **cached)
            written = None if writer is None else writer(prompts, max_new_tokens, most, None)
            return written or generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_tokens=most)

    def general_answers(self, prompts: Sequence[str]) -> list[Example]:
        """The base model's own answers to general prompts, as the base model sees them.

        Where the method keeps no base model, this is for the time before training.

        Raises:
            NoGeneralAnswers: it gives none that are of use.
        """
        if self.task.tokenizer is None:
            raise NoGeneralAnswers("the model does not read text")
        kept = self.method.keeps_base(self.model)
        base = self.method.without(self.model) if kept else contextlib.nullcontext()
        how: dict[str, Any] = {"identity": self.base_identity, "reserved": self.method.virtual_tokens}
        # Keys and values alone take a small part of what a step keeps of a token, unless its blocks are checkpointed.
        many = 1 if self.config.train.checkpointing else 4
        how["batch_tokens"] = many * getattr(self.batcher, "tokens_per_pass", 1024)
        how["writer"] = self.writer(of_base=True)
        with self.method.evaluating(self.model), base:
            return general_answers(self.model, self.task.tokenizer, prompts, self.config.data, **how)


def _shared_objective(session: Session, rows: Sequence[Any]) -> Any:
    """In process 0: what an evaluation of these rows asks. The others are told to do their part where the
    rows are one of the run's sets; else it is the objective itself, and they wait.

    Where they take part, the one method that an evaluation asks (``Task.evaluation_asks``) is to be asked of each
    microbatch once and in order.
    """
    group, objective = session.processes, session.objective
    if not isinstance(group, Group) or not session.task.shares_evaluation:
        return objective
    sets = enumerate(session.data.sets.values())
    number = next((number for number, known in sets if known is rows), None)
    if number is None:
        return objective
    group.order(EVALUATE, number)
    group.share_parameters([parameter for _, parameter in session.method.parameters(session.model)])
    asked, turns = getattr(objective, session.task.evaluation_asks), itertools.count()

    def in_turn(batch: Any) -> Tensor | tuple[Tensor, ...]:
        owner = next(turns) % group.size
        if owner:
            given = tuple(group.receive(owner) for _ in range(int(group.receive(owner))))
            return given if len(given) > 1 else given[0]
        group.together = True
        try:
            return asked(batch)
        finally:
            group.together = False

    shared = copy.copy(objective)
    setattr(shared, session.task.evaluation_asks, in_turn)
    return shared


@torch.no_grad()
def take_part(session: Session, number: int) -> None:
    """In a process from 1 on: compute the own microbatches of a set with the parameters of process 0, which
    may be others than the last ones, and send what they gave."""
    group = session.processes
    assert isinstance(group, Group)
    group.share_parameters([parameter for _, parameter in session.method.parameters(session.model)])
    session.method.after_step(session.model)
    rows = list(session.data.sets.values())[number]
    asked = getattr(session.objective, session.task.evaluation_asks)
    with session.method.evaluating(session.model):
        count, batch = 0, None
        for place, batch in enumerate(session.task.evaluation_batches(rows, session.feed)):
            count = place + 1
            if place % group.size == group.rank:
                found = asked(batch)
                given = found if isinstance(found, tuple) else (found,)
                for tensor in (torch.tensor(len(given)), *given):
                    group.send(tensor)
        if group.sharded and 0 < count % group.size <= group.rank:
            asked(batch)  # the others compute one more, and need this one's rows


def read_data(config: RunConfig, say: Say = silent, *, check: bool = True) -> tuple[Task, RunData]:
    """Return the task of a run and its rows, before any weight is read.

    Args:
        check: Refuse settings that do not fit the rows.
    """
    if config.data.chat_template is not None:
        read_chat_template(config.data.chat_template)  # a fault in it shows before a model is converted
    dtype = choose_precision(choose_device(config.device).value, config.precision).value
    with PeakWatch() as watch, working("reading the rows"):
        how: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "section": config.section}
        task = task_of(config.task, config.model, dtype, say=say, **how)
        data = read_run_data(task, config.data, seed=config.data_seed, say=say)
    release_free_memory()  # before smaller objects occupy what reading the tokenizer and the rows left
    data = replace(data, read_peak_bytes=watch.bytes)
    for line in data.report.lines():
        say(line)
    if check:
        task.check(data, call=False)
    return task, data


def usual_rate_of(method: Method, architecture: PretrainedConfig, factor: RateFactor = SFT) -> Choice[float]:
    """Return the method's usual learning rate for a model of this width, multiplied by the factor of the task.

    The best rates of LoRA and of full fine-tuning fall with the model's width to the power of 0.78 ("LoRA Without
    Regret", 2025, over Llama models).
    """
    rate, why = method.usual_rate, f"usual for method {method.name}"
    width = getattr(architecture.get_text_config(), "hidden_size", None)
    if method.falls_with_width and isinstance(width, int):
        rate = float(f"{rate * (WIDTH / width) ** 0.78:.1e}")
        why += " on a model this wide"
    if factor.value != 1:
        why += f", {rate:g}, times {factor.value:g} for this task and loss ({factor.source})"
        rate = float(f"{rate * factor.value:.1e}")
    return Choice(rate, why)


def assemble(
    config: RunConfig,
    task: Task,
    data: RunData,
    model: PreTrainedModel,
    *,
    device: str,
    new_modules: Sequence[str] = (),
    offered: Sequence[str] = (),
    begun: Sequence[str] | None = None,
    processes: Reducer = ALONE,
    writes: Callable[[Method | None], Writer] | None = None,
    samples: Callable[[Method], Sampler] | None = None,
) -> Session:
    """Put a freshly loaded model, a method and rows together.

    Args:
        new_modules: names of modules that the model's files do not hold; every method trains them.
        offered: what would be faster approximately, if that is verified.
        begun: what a training that goes on computed approximately; None for a new one.
        processes: that all assemble the same, and train together.
        writes, samples: see :class:`Session`.

    Raises:
        UserError: the method does not fit the model, or a row is too long for it.
    """
    method = method_for(task, config)
    invocation = resolve_invocation(method, task.tokenizer, data.train, chat=data.report.template == "chat")
    settings = config.train
    torch.manual_seed(settings.seed)
    identity = identity_of(model, config.precision)
    real = sharded_blocks(model) is not None or has_values(model)
    said, roundings = quantized(model, config.precision, data.train, identity) if real else ([], [])
    batcher, chosen = task.batcher(
        model,
        data.every,
        device=device,
        tokens_per_pass=settings.tokens_per_pass,
        share=settings.share_prefixes,
        method_shares=method.can_share_prefixes(),
        virtual_tokens=method.virtual_tokens,
    )
    task.initialize_head(model, new_modules, data.train)
    data = data.mapped(lambda rows: task.referenced(model, rows, batcher, processes))
    extra_modules = list(dict.fromkeys([*head_modules(model), *new_modules])) if task.has_labels else []

    calibrate = functools.partial(_calibrate, task, model, batcher, data.train[:CALIBRATION_ROWS])
    with working(f"preparing method {method.name}"):
        said += [method.prepare(model, seed=settings.seed, extra_modules=extra_modules, calibrate=calibrate)]
    if settings.checkpointing:
        checkpoint_blocks(model, settings.checkpointing, [p for _, p in method.parameters(model)])
    if (sharded := sharded_blocks(model)) is not None:
        sharded.rejoin()
        with task.running(model, batcher):  # all processes find out now which blocks run fused
            pass
    elif real and processes.size == 1 and device == "cpu":  # several processes share the pages of a file
        use_large_pages(model)
    chosen |= _further_choices(config, task, data, method, model, invocation)
    data = data.mapped(lambda rows: rows_as_seen(rows, method))
    with method.evaluating(model):
        objective = task.objective(model)
    feed = Feed(objective, batcher)
    known: dict[str, Any] = {"identity": identity, "roundings": roundings, "writes": writes, "processes": processes}
    known["samples"] = samples
    session = Session(config, model, method, task, data, feed, chosen, said, **known)
    if task.rolls_out:
        session.feed = _lessons(session) if isinstance(objective, DistillObjective) else _rollouts(session)
    if settings.keep_general:
        _take_general_answers(session)
    if task.rolls_out or task.sees_steps:  # each step's rows are new, or no microbatch has a loss of its own
        return session
    _keep_features(session, invocation)
    if settings.approximate == "auto":
        _approximate(session, applicable(model, objective, offered), begun if real else offered)
    return session


def _calibrate(task: Task, model: PreTrainedModel, batcher: AnyBatcher, rows: Sequence[Any]) -> None:
    """Compute what the model makes of these rows, for a method that begins by what its layers see."""
    objective: Any = task.objective(model)
    compute = objective.evaluate_rows if task.sees_steps else objective
    with torch.no_grad(), task.running(model, batcher):
        for batch in batcher.batches(rows):
            compute(batch)


def _rollouts(session: Session) -> RolloutFeed:
    """What writes and rewards completions before each step."""
    task, model, method, objective = session.task, session.model, session.method, session.objective
    assert isinstance(task, RewardTask) and isinstance(objective, CausalObjective)
    return RolloutFeed(
        objective,
        session.batcher,
        None if session.samples is None else task.turns(session.samples(method)),
        task.settings,
        seed=session.config.train.seed,
        base=lambda: method.without(model),
        processes=session.processes,
    )


def _lessons(session: Session) -> LessonFeed:
    """What asks teachers, and writes completions before each step.

    Raises:
        UserError: a teacher cannot be had.
    """
    config, task, data, method, objective = (
        session.config,
        session.task,
        session.data,
        session.method,
        session.objective,
    )
    assert task.tokenizer is not None and isinstance(objective, DistillObjective)
    settings, train = config.distill, config.train
    longest = longest_lesson(data.every, settings.max_new_tokens)
    teachers = []
    for one in settings.all_teachers:
        if one.is_base and one.quantize is None:
            writer = session.writer(of_base=True)
            teachers.append(base_as_teacher(objective, session.batcher, method, one.weight, writer))
        else:
            teachers.append(other_teacher(config, one, longest, session.model, session.said.append))
    order = RowOrder(len(data.train), train.batch_size, train.seed)
    steps = range(min(session.total_steps, order.steps_per_epoch))
    used = sorted({int(place) for step in steps for place in order.indices(step)})
    return LessonFeed(
        objective,
        session.batcher,
        teachers,
        settings,
        task.tokenizer,
        rows=[data.train[place] for place in used],
        held_out=[row for rows in data.sets.values() for row in rows],
        seed=train.seed,
        sampler=None if session.samples is None or not settings.on_policy else session.samples(method),
        processes=session.processes,
    )


def _further_choices(
    config: RunConfig, task: Task, data: RunData, method: Method, model: PreTrainedModel, invocation: Choice | None
) -> Iterator[tuple[str, Choice]]:
    """What follows from the rows and the method."""
    if invocation is not None:
        yield INVOCATION, invocation
    if data.report.date is not None and config.data.date is None:
        yield "data.date", Choice(data.report.date, "the chat template writes the date of the run's start")
    if config.train.learning_rate == "auto":
        yield RATE, usual_rate_of(method, model.config, task.rate_factor(config.section))


def _approximate(session: Session, offered: Sequence[str], begun: Sequence[str] | None) -> None:
    """Decide what is computed approximately, and say so.

    Args:
        begun: what is so without being verified here; None: what is offered is.
    """
    model = session.model
    if begun is not None:
        session.approximations = Approximations(begun)
        return
    if not offered:
        return
    try:
        comparing = working("comparing gradients with fp32; train.approximate: off skips this", 1.0)
        with comparing as advance, session.running(), session.method.evaluating(model):
            check = gradient_check(session, advance)
            key = _what_gradients_follow_from(session, check.rows, offered)
            kept = None if key is None else recall("approximations", key, ("torch", "transformers", "deltaw"))
            if isinstance(kept, dict):
                chosen = Chosen.of_earlier_run(kept)
            else:
                release_free_memory()  # left by loading and by the base model's log-probabilities
                chosen = check.choose(offered)
                if key is not None:
                    remember("approximations", key, asdict(chosen), ("torch", "transformers", "deltaw"))
    except Exception as error:  # whatever a foreign model raises in fp32, it trains without
        brief = f"{type(error).__name__}: {str(error)[:100]}"
        chosen = Chosen((), None, dict.fromkeys(offered, f"it could not be compared with fp32 ({brief})"))
    finally:
        model.zero_grad()
    agreed = json.loads(session.processes.texts(json.dumps(chosen.names))[0])
    session.approximations = Approximations(agreed, chosen.measured)
    session.chosen[APPROXIMATE] = session.approximations.choice(chosen.refused)
    session.said += session.approximations.lines(chosen.refused)


def gradient_check(session: Session, advance: Advance = lambda done: None) -> GradientCheck:
    """Return the comparison of gradients on the first rows of a run. Call it within ``session.running()``."""
    settings = session.config.train
    order = RowOrder(len(session.data.train), settings.batch_size, settings.seed)
    steps = range(-(-CANDIDATES // settings.batch_size))
    rows = (session.data.train[i] for step in steps for i in order.indices(step))
    few = rows_to_look_at(rows, session.batcher, session.objective)
    return GradientCheck(session.model, session.objective, session.batcher, dict(session.trained), few, advance)


def _what_gradients_follow_from(session: Session, rows: Sequence[Any], offered: Sequence[str]) -> object | None:
    """All that the gradient at the start depends on besides versions; None where some of it has no name."""
    config = session.config
    ours = all(type(part).__module__.startswith("deltaw.") for part in (session.task, session.method))
    if session.identity is None or not ours or config.trust_remote_code or session.processes.size > 1:
        return None
    start = fingerprint_of({name: values_in_memory(parameter) for name, parameter in session.trained})
    settings = config.model_dump(mode="json", exclude=_WITHOUT_GRADIENT)
    computed = [computed_on(session.model.device), torch.get_num_threads(), *offered]
    return [session.identity, settings, session.said, digest_of_rows(rows), start, computed]


def _keep_features(session: Session, invocation: Choice | None) -> None:
    """Decide what of the frozen layers' outputs is kept, and say so.

    Args:
        invocation: from where on in a row the adapter acts; None where it acts everywhere.
    """
    model, method, settings, rows = session.model, session.method, session.config.train, session.data.every
    plain = session.feed
    seen_again = session.total_steps * settings.batch_size > len(session.data.train)
    keep = settings.keep_features is True or (settings.keep_features == "auto" and seen_again)
    if invocation is not None:
        with session.running(), method.evaluating(model):
            prompts, kept = stored_prompts(model, plain.objective, plain.batcher, rows, keep=keep)
        session.feed = prompts or plain
        session.chosen["train.keep_features"] = kept
        session.said += [f"the adapter acts from {invocation} on", f"prompts: {kept}"]
    elif keep:
        sharing = Sharing(session.processes)

        def keep_now() -> None:
            with session.running(), method.evaluating(model):
                features, kept = cached_prefix(model, plain.objective, plain.batcher, rows, sharing=sharing)
            session.chosen["train.keep_features"] = kept
            if features is not None:
                session.feed = features
                session.said.append(f"features computed once for each row: {kept}")

        if sharing.leads:
            keep_now()
        if sharing.tell(keeps=session.feed is not plain) and not sharing.leads:
            keep_now()


def _take_general_answers(session: Session) -> None:
    """Let the base model write the answers that ``train.keep_general`` keeps, and say so.

    Raises:
        UserError: the model gives none.
    """
    weight = session.config.train.keep_general
    try:
        if not session.task.writes_text:
            raise NoGeneralAnswers(f"a model for {session.task.name} writes no text")
        answers = session.general_answers(KEPT)
    except NoGeneralAnswers as reason:
        what = f"general answers cannot be kept: {reason}"
        raise UserError(what, where="train.keep_general", hint="set train.keep_general: 0") from reason
    session.general = [as_seen(answer, session.method) for answer in answers]
    session.said.append(
        f"keep_general {weight:g}: each step also learns one of {len(answers)} general answers of the base "
        "model, which are not counted among the rows"
    )


def method_for(task: Task, config: RunConfig) -> Method:
    """The run's method.

    Raises:
        UserError: it does not fit the task.
    """
    method = choose_method(config, task.tokenizer)
    if task.has_pairs and method.activates:
        what = "an adapter with an invocation sequence cannot be trained on pairs"
        raise UserError(what, where="lora.activation", hint="set lora.activation: always")
    return method


def head_modules(model: nn.Module) -> list[str]:
    """The parts of a classifier above its backbone, and a pooler that its files do not hold."""
    base = getattr(model, "base_model_prefix", "")
    children = [(name, child) for name, child in model.named_children() if name != base]
    return [name for name, child in children if any(True for _ in child.parameters())]
