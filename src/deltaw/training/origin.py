"""A run's or an adapter's folder, and what its files may bring about.

Such a folder names things outside of itself: a base model, rows, a chat template, a tracker, Python code that
comes with the model. Folders are passed on, and whoever made one must not decide what is read, fetched or run
on another machine. So a name in a folder is followed only if the user named the same before on this machine,
as in the settings of the run that made it, or if it is a model that is in a cache here already. Everything
else is the caller's to name. Code is run for nobody who does not ask for it in this very call. A refusal says
what the folder names and how to allow it.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw import tasks
from deltaw.contained import remember_named, require_contained, was_named
from deltaw.data.chat_template import with_chat_template
from deltaw.data.invocation import last_occurrence
from deltaw.data.messages import Message
from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from deltaw.hub.folders import adapter_folder, already_here
from deltaw.hub.loading import LoadedModel, load
from deltaw.hub.sentence_layout import read_layout, told_use
from deltaw.lora.peft_format import base_reference
from deltaw.machine.choices import choose_device, choose_precision
from deltaw.methods.base import ADAPTER_CONFIG, Method
from deltaw.methods.files import classes_of, method_of_folder, outputs_of, read_config
from deltaw.platforms import shell_word
from deltaw.runtime.generation import Sampler, Writer
from deltaw.runtime.quantized_weights import quantize_int8
from deltaw.settings import DEFAULT_TASK, SETTINGS, RunConfig
from deltaw.task_settings import DistillSettings, EmbeddingSettings, TextSource
from deltaw.training.evaluation.general import as_rounded, identity_of
from deltaw.training.microbatches import AnyBatcher
from deltaw.training.preparation import quantized_nf4, saved_calibration
from deltaw.training.prompting import Prompting, read_prompting
from deltaw.training.rollouts.scoring import Scorer
from deltaw.training.seen import as_seen
from deltaw.training.tasks.base import Task, task_of
from deltaw.training.tasks.causal import Score, answers
from deltaw.training.tasks.embedding import EmbeddingTask
from deltaw.training.tasks.reward import GREEDY, Asked, RewardTask
from deltaw.working import Detail, working

CHAT_TEMPLATE = "chat_template.jinja"


# What rewards a model's texts, and may run code.
_REWARDING = ("reward.functions", "reward.environment")


@dataclass(frozen=True)
class FoundFolder:
    """A run's folder, or an adapter's.

    Attributes:
        folder: where it is. adapter: the content of its ``adapter_config.json``.
        run: the run's settings, with the chat template that it saved, and with the caller's word on code that
            comes with the model; None where no run of deltaw's made the adapter.
    """

    folder: Path
    adapter: Mapping[str, object]
    run: RunConfig | None

    @property
    def task(self) -> str:
        """What the model does with the adapter."""
        if self.run is not None:
            return self.run.task
        if told_use(self.folder) == "vectors":
            return EmbeddingTask.name
        return tasks.name_of_adapter(self.adapter.get("task_type")) or DEFAULT_TASK

    @property
    def section(self) -> Any:
        """The settings for its task; None for their defaults."""
        if self.run is not None:
            return self.run.section
        layout = read_layout(self.folder) if self.task == EmbeddingTask.name else None
        if layout is None:
            return None
        known = {name: getattr(layout, name) for name in ("normalize", "query_prompt", "passage_prompt")}
        return EmbeddingSettings.model_validate({"pooling": layout.pooling or "auto", **known})

    def base_name(self, model: str | None) -> str:
        """What the base model is called: ``model`` where the caller names it, else as the folder does.

        Raises:
            UserError: nobody names it.
        """
        named = self.run.model if self.run is not None else base_reference(self.adapter)
        if model is None and not (isinstance(named, str) and named):
            what = "the adapter does not say which model it belongs to"
            raise UserError(what, where=str(self.folder / ADAPTER_CONFIG), hint="name the base model with --model")
        return str(named) if model is None else model

    def base(self, model: str | None) -> str:
        """The reference by which the base model is to be loaded.

        Args:
            model: the caller's; it may be anything.

        Raises:
            UserError: the folder names what the caller would have to allow, or nothing.
        """
        name = self.base_name(model)
        if model is not None:
            remember_named("model", name)
            return name
        if was_named("model", name):
            return name
        if (here := already_here(name)) is not None:
            return here
        raise _foreign(self.folder / (ADAPTER_CONFIG if self.run is None else SETTINGS), {"model": name})

    def require_rows(self) -> None:
        """Refuse to read rows that only the folder names.

        Raises:
            UserError: nobody else did.
        """
        named = {} if self.run is None else _unknown(self.run, ("data.train", "data.eval"))
        if named:
            raise _foreign(self.folder / SETTINGS, named, flag="--data FILE")

    def require_rewards(self) -> None:
        """Refuse to run the code of reward functions that only the folder names.

        Raises:
            UserError: nobody else did, and the caller does not want such code to be run.
        """
        if self.run is not None:
            _require_rewards(self.run, self.folder / SETTINGS, "--trust-remote-code")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter: deltaw's or PEFT's."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_folder(folder: Path, *, trust_remote_code: bool | None) -> FoundFolder:
    """Read what names things in a run's or an adapter's folder; nothing that it names is looked for.

    Args:
        trust_remote_code: whether the caller wants Python code to be run that comes with the base model; None
            where no base model is loaded for this folder.

    Raises:
        UserError: there is no adapter, a link leads out of the folder, a file cannot be read, or the run's
            settings ask for such code and the caller does not.
    """
    if not is_adapter(folder):
        raise _no_adapter(folder)
    require_contained(folder)
    adapter, settings = read_config(folder), folder / SETTINGS
    if not settings.is_file():
        return FoundFolder(folder, adapter, None)
    run = RunConfig.read(settings)
    if run.trust_remote_code and trust_remote_code is False:
        raise _wants_code(settings, run.model, "--trust-remote-code")
    run = run.model_copy(update={"trust_remote_code": bool(trust_remote_code), "distill": _forgotten(run)})
    return FoundFolder(folder, adapter, _with_saved_template(run, folder, {}))


def settings_in(folder: Path, given: Mapping[str, object], *, all_of_it: bool = False) -> RunConfig:
    """The settings in a run's folder for whoever goes on with them.

    Args:
        given: settings of the caller's own, nested, which come before the folder's.
        all_of_it: whether the run itself goes on, so that everything in the folder is read, and what it names
            is what it began with: no other revision of its model, nor another file with its template.

    Raises:
        UserError: the settings name something, or ask for Python code of the model's, and the caller does not
            name the same.
    """
    require_contained(folder, all_of_it=all_of_it)
    settings = folder / SETTINGS
    config = RunConfig.read(settings, given)
    if config.trust_remote_code and not given.get("trust_remote_code"):
        raise _wants_code(settings, config.model, "--trust_remote_code true")
    _require_rewards(config, settings, "--trust_remote_code true")
    keys = ["model", "data.train", "data.eval", "track"]
    if all_of_it:
        keys += ["data.chat_template", "distill.prompt", "distill.teachers"]
    else:
        config = config.model_copy(update={"distill": _forgotten(config)})
        config = _with_saved_template(config, folder, given)
    named = {key: value for key, value in _unknown(config, keys).items() if not _is_given(given, key)}
    if not all_of_it and "model" in named and (here := already_here(config.model)) is not None:
        config = config.model_copy(update={"model": here})
        del named["model"]
    if named:
        raise _foreign(settings, named)
    return config


def _forgotten(config: RunConfig) -> DistillSettings:
    """The section ``distill`` for use: what the adapter learned from is neither read nor looked for."""
    if config.task != "distill":
        return config.distill
    return config.distill.model_copy(update={"prompt": TextSource(text="as it was trained"), "teachers": []})


def _with_saved_template(config: RunConfig, folder: Path, given: Mapping[str, object]) -> RunConfig:
    """The settings with the chat template that the run saved, instead of the file that it was given.

    Raises:
        UserError: there is none in the folder, and nobody but the folder names that file.
    """
    key, saved = "data.chat_template", folder / CHAT_TEMPLATE
    if config.data.chat_template is None:
        return config
    if saved.is_file():
        return config.model_copy(update={"data": replace(config.data, chat_template=str(saved))})
    if not _is_given(given, key) and (named := _unknown(config, (key,))):
        raise _foreign(folder / SETTINGS, named, flag=f"a file {CHAT_TEMPLATE} in the folder")
    return config


def _require_rewards(config: RunConfig, settings: Path, flag: str) -> None:
    if not config.trust_remote_code and (named := _unknown(config, _REWARDING)):
        raise _foreign(settings, named, flag=flag)


def _unknown(config: RunConfig, keys: Sequence[str]) -> dict[str, object]:
    """Which of ``keys`` name what the user did not name here before, and what."""
    found = {key: value for key, value in config.named().items() if key in keys}
    return {key: value for key, value in found.items() if not was_named(key.partition(".")[0], value)}


def _is_given(given: Mapping[str, object], key: str) -> bool:
    section, _, leaf = key.rpartition(".")
    inside = given.get(section) if section else given
    if isinstance(inside, str | list):  # `data: rows.jsonl` stands for `data: {train: rows.jsonl}`
        return leaf == "train"
    return isinstance(inside, Mapping) and leaf in inside


def _foreign(file: Path, named: Mapping[str, object], *, flag: str | None = None) -> UserError:
    """The refusal of what only a folder names.

    Args:
        named: by the settings' dotted keys. flag: how to name it, where that is not the settings' own flags.
    """
    as_json = functools.partial(json.dumps, ensure_ascii=False, default=str)
    texts = {key: value if isinstance(value, str) else as_json(value) for key, value in named.items()}
    flags = flag or " ".join(f"--{key} {shell_word(text)}" for key, text in texts.items())
    wanted = " and ".join(f"{key} {text!r}" for key, text in texts.items())
    what = f"the folder names {wanted}, which nobody has named on this machine before"
    why = "deltaw does not look for or fetch what only a folder names"
    return UserError(f"{what}; {why}", where=str(file), hint=f"if that is what you want, name it yourself: {flags}")


def _no_adapter(folder: Path) -> UserError:
    if (folder / SETTINGS).is_file():
        hint = f"train it again: deltaw train {folder / SETTINGS}"
        return UserError("the run has no adapter: it ended early", where=str(folder), hint=hint)
    hint = "name a run's folder, or an adapter's"
    return UserError(f"there is no adapter in '{folder}'", where=str(folder), hint=hint)


def _wants_code(settings: Path, model: str, flag: str) -> UserError:
    what = f"the run's settings ask to run Python code that comes with its base model, '{model}'"
    hint = f"read the code; if you trust it, add {flag} (in Python: trust_remote_code=True)"
    return UserError(what, where=f"trust_remote_code in {settings}", hint=hint)


# An inference session: a finished run, or a bare model, for evaluation, generation and chat.


@dataclass
class InferenceSession:
    """A model that is loaded for use.

    Attributes:
        config: the run's settings; None where the reference is not a run of deltaw's.
        method: whose adapter is on the model; None where there is none.
        task: what the model does. classes: the names that a classifier's outputs have.
        identity: names the base model as it computes, for what is kept on disk.
        found: the folder that was opened; None for a bare model.
        prompting: how the rows are prompted, as the folder says.
    """

    loaded: LoadedModel
    config: RunConfig | None
    method: Method | None
    task: Task
    classes: tuple[str, ...] | None = None
    identity: str | None = None
    found: FoundFolder | None = None
    prompting: Prompting = field(default_factory=Prompting)
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

    def encode(self, asked: str | Sequence[Message]) -> np.ndarray:
        """A prompt, or a conversation that ends with one, as the rows were rendered: int32 (length,).

        Raises:
            UserError: the template does not take it.
        """
        return self.prompting.prompt(asked, self.data, self.tokenizer)

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

    def batcher(self, rows: Sequence[Any], **how: Any) -> AnyBatcher:
        """How rows become microbatches: as in the run, where there was one."""
        if self.config is not None:
            train = self.config.train
            how |= {"tokens_per_pass": train.tokens_per_pass, "share": train.share_prefixes}
        shares = self.method is None or self.method.can_share_prefixes()
        device = str(self.loaded.choices["device"].value)
        return self.task.batcher(self.model, rows, device=device, method_shares=shares, **how)[0]

    def require_generation(self) -> None:
        """Raise a UserError where the model does not write text."""
        if not self.task.writes_text:
            what = f"this is an adapter for {self.task.name}, which writes no text"
            raise UserError(what, where=self.loaded.reference, hint="use deltaw eval")


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
        reference: a folder or a hub id with an adapter, else anything that names a model.
        model: the base model, where it is not the one that the folder names.
        precision: auto takes a run's own, where the run named one and this device has it.
        task: what a bare model is to do; an adapter says that itself.
        trust_remote_code: run the Python files that came with the base model, whatever the folder says.

    Raises:
        UserError: something cannot be loaded, or the folder names what the caller has to allow.
    """
    folder = adapter_folder(reference, required=False)
    adapter = is_adapter(folder)
    found = None
    if adapter or (folder / SETTINGS).is_file():
        found = read_folder(folder, trust_remote_code=trust_remote_code)
    config = None if found is None else found.run
    if precision == "auto" and config is not None and model is None and config.precision != "auto":
        with contextlib.suppress(UserError):  # the adapter belongs to these weights, where the device has them
            precision = choose_precision(choose_device(device).value, config.precision).value
    kind, base, classes = task or DEFAULT_TASK, model or reference, None
    if found is not None:
        kind, base, classes = found.task, found.base(model), classes_of(folder)
    dtype = choose_precision(choose_device(device).value, precision).value
    section = None if found is None else found.section
    work = task_of(kind, base, dtype, trust_remote_code=trust_remote_code, say=say, section=section)
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
    work.initialize_head(loaded.model, loaded.new_modules, ())  # as far as it takes no rows
    identity = identity_of(loaded.model, precision)
    if precision == "int8":
        known = None if found is None else saved_calibration(found.folder, identity)
        with working("quantizing the weights to int8"):
            report = quantize_int8(loaded.model.base_model, known=known)
        identity = as_rounded(identity, report.roundings)
        say(Detail(f"precision int8: {report}"))
    if precision == "nf4":
        for line in quantized_nf4(loaded.model):
            say(Detail(line))
    if classes is None and work.has_labels and fixed is None:
        numbers = range(loaded.model.config.num_labels or 0)
        classes = getattr(work, "named", None) or tuple(str(number) for number in numbers)
    method = None
    if adapter:
        method = method_of_folder(folder, work.tokenizer)
        say(Detail(method.load(loaded.model, folder)))
    prompting = read_prompting(folder)
    return InferenceSession(loaded, config, method, work, classes, identity, found, prompting)


def score_run(
    opened: InferenceSession,
    examples: Sequence[Any],
    *,
    shown: int = 0,
    max_new_tokens: int | None = None,
    writer: Writer | None = None,
    sampler: Sampler | None = None,
    asked: Asked = GREEDY,
) -> Score:
    """Evaluate a model on examples that have no virtual tokens yet, as a run evaluates its held-out rows.

    Args:
        shown: the model answers so many of them, from the first on, if it writes text; all of them, if they are
            rewarded.
        max_new_tokens: of an answer. writer: writes answers; None for transformers.
        sampler, asked: write what is rewarded, for the task ``reward``.

    Raises:
        UserError: the folder names code that rewards, and nobody has named it on this machine before.
    """
    task, model = opened.task, opened.model
    task.most_searched = None
    if isinstance(task, RewardTask):
        if opened.found is not None:
            opened.found.require_rewards()
        assert sampler is not None, "completions that are rewarded are drawn"
        with contextlib.closing(Scorer(task.settings)) as scorer, contextlib.closing(task.turns(sampler)) as write:
            score = task.scored(examples, write, scorer, replace(asked, max_new_tokens=max_new_tokens))
        return score if shown else Score(score.evaluation)
    batcher = opened.batcher([opened.example(example) for example in examples])
    with opened.base():
        examples = task.referenced(model, examples, batcher)
    rows = [opened.example(example) for example in examples]
    objective = task.objective(model)
    with task.running(model, batcher), working("evaluating"):
        evaluation = task.evaluate(objective, rows, batcher, opened.classes)
    if not shown or not task.writes_text or task.has_pairs:
        return Score(evaluation)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "writer": writer}
    return Score(evaluation, answers(model, opened.tokenizer, rows[:shown], **how))
