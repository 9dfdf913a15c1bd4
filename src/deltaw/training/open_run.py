"""Open the folder of a run or an adapter for inference.

A folder can refer to things outside of it: a base model, data files, a chat template, a tracker, Python code of the
model. Folders are shared between users, so a reference is followed only if the user named it before on this machine,
for example in the settings of the run, or if it is a model in a local cache. The caller supplies anything else. Remote
code runs only if the caller passes ``trust_remote_code=True``. An error names the reference and the option that allows
it.
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
from deltaw.data.chat_template import with_chat_template
from deltaw.data.invocation import last_occurrence
from deltaw.data.messages import Message
from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from deltaw.hub.folders import adapter_folder, find_cached
from deltaw.hub.loading import LoadedModel, load
from deltaw.hub.sentence_layout import detect_use, read_layout
from deltaw.lora.peft_format import base_reference
from deltaw.machine.choices import choose_device, choose_precision
from deltaw.methods.base import ADAPTER_CONFIG, Method
from deltaw.methods.files import method_from_folder, read_classes, read_config, read_num_outputs
from deltaw.platforms import shell_word
from deltaw.progress import Detail, track_progress
from deltaw.runtime.generation import Sampler, TextGenerator
from deltaw.runtime.quantized_weights import quantize_int8
from deltaw.settings import DEFAULT_TASK, SETTINGS, RunConfig
from deltaw.task_settings import DistillSettings, EmbeddingSettings, TextSource
from deltaw.training.evaluation.general import model_identity, quantized_identity
from deltaw.training.microbatches import AnyBatcher
from deltaw.training.preparation import quantize_weights_nf4, saved_calibration
from deltaw.training.prompting import Prompting, read_prompting
from deltaw.training.rendered_rows import render_example
from deltaw.training.rollouts.scoring import Scorer
from deltaw.training.tasks.base import Task, task_of
from deltaw.training.tasks.causal import EvaluationScore, answers
from deltaw.training.tasks.embedding import EmbeddingTask
from deltaw.training.tasks.reward import GREEDY, RewardEvaluation, RewardTask
from deltaw.untrusted_paths import record_reference, require_contained, was_referenced

CHAT_TEMPLATE = "chat_template.jinja"


# Settings of reward functions, which can run code.
_REWARD_CODE_KEYS = ("reward.functions", "reward.environment")


@dataclass(frozen=True)
class AdapterFolder:
    """Folder of a run or an adapter.

    Attributes:
        folder: Path of the folder.
        adapter: Content of ``adapter_config.json``.
        run: Settings of the run, with its saved chat template and with the caller's ``trust_remote_code``. None if the
            adapter was not created by a deltaw run.
    """

    folder: Path
    adapter: Mapping[str, object]
    run: RunConfig | None

    @property
    def task(self) -> str:
        """Name of the task that the adapter was trained for."""
        if self.run is not None:
            return self.run.task
        if detect_use(self.folder) == "vectors":
            return EmbeddingTask.name
        return tasks.name_of_adapter(self.adapter.get("task_type")) or DEFAULT_TASK

    @property
    def section(self) -> Any:
        """Settings of the task, or None for the defaults."""
        if self.run is not None:
            return self.run.section
        layout = read_layout(self.folder) if self.task == EmbeddingTask.name else None
        if layout is None:
            return None
        pooling_options = {name: getattr(layout, name) for name in ("normalize", "query_prompt", "passage_prompt")}
        return EmbeddingSettings.model_validate({"pooling": layout.pooling or "auto", **pooling_options})

    def base_name(self, model: str | None) -> str:
        """Return ``model`` if given, else the name of the base model in the folder.

        Raises:
            UserError: if neither names a base model.
        """
        stored_name = self.run.model if self.run is not None else base_reference(self.adapter)
        if model is None and not (isinstance(stored_name, str) and stored_name):
            message = "the adapter does not say which model it belongs to"
            hint = "name the base model with --model"
            raise UserError(message, location=str(self.folder / ADAPTER_CONFIG), hint=hint)
        return str(stored_name) if model is None else model

    def base(self, model: str | None) -> str:
        """Return the reference from which the base model is loaded.

        Args:
            model: Reference that the caller passes. It is always allowed.

        Raises:
            UserError: if the folder names no base model, or one that the caller has to allow.
        """
        name = self.base_name(model)
        if model is not None:
            record_reference("model", name)
            return name
        if was_referenced("model", name):
            return name
        if (local_path := find_cached(name)) is not None:
            return local_path
        raise _unapproved_error(self.folder / (ADAPTER_CONFIG if self.run is None else SETTINGS), {"model": name})

    def require_rows(self) -> None:
        """Check that the user named the run's data files on this machine before.

        Raises:
            UserError: if only the folder names them.
        """
        unapproved = {} if self.run is None else _unapproved_references(self.run, ("data.train", "data.eval"))
        if unapproved:
            raise _unapproved_error(self.folder / SETTINGS, unapproved, flag="--data FILE")

    def require_rewards(self) -> None:
        """Check that the code of the run's reward functions may run.

        Raises:
            UserError: if only the folder names the code and remote code is not trusted.
        """
        if self.run is not None:
            _require_rewards(self.run, self.folder / SETTINGS, "--trust-remote-code")


def is_adapter(folder: Path) -> bool:
    """Return True if a folder contains a deltaw or PEFT adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_folder(folder: Path, *, trust_remote_code: bool | None) -> AdapterFolder:
    """Read the settings of a run or adapter folder without following the references in it.

    Args:
        folder: Folder to read.
        trust_remote_code: True if Python files of the base model may run. None if the base model is not loaded.

    Raises:
        UserError: if the folder has no adapter, has a link that leaves the folder or an unreadable file, or if the run
            needs remote code and ``trust_remote_code`` is False.
    """
    if not is_adapter(folder):
        raise _missing_adapter_error(folder)
    require_contained(folder)
    adapter, settings = read_config(folder), folder / SETTINGS
    if not settings.is_file():
        return AdapterFolder(folder, adapter, None)
    run = RunConfig.read(settings)
    if run.trust_remote_code and trust_remote_code is False:
        raise _remote_code_error(settings, run.model, "--trust-remote-code")
    changes = {"trust_remote_code": bool(trust_remote_code), "distill": _without_training_sources(run)}
    run = run.model_copy(update=changes)
    return AdapterFolder(folder, adapter, _with_saved_template(run, folder, {}))


def read_run_settings(folder: Path, overrides: Mapping[str, object], *, resume: bool = False) -> RunConfig:
    """Read a run's settings in order to resume it or to start another run from it.

    Args:
        folder: Folder of the run.
        overrides: Nested settings that override those of the folder.
        resume: True to resume this run. All files of the folder are then checked, and all its references must be
            allowed, including the model revision and the chat template.

    Raises:
        UserError: if the settings contain a reference that the user did not name, or need remote code that the caller
            does not trust.
    """
    require_contained(folder, recursive=resume)
    settings = folder / SETTINGS
    config = RunConfig.read(settings, overrides)
    if config.trust_remote_code and not overrides.get("trust_remote_code"):
        raise _remote_code_error(settings, config.model, "--trust_remote_code true")
    _require_rewards(config, settings, "--trust_remote_code true")
    keys = ["model", "data.train", "data.eval", "track"]
    if resume:
        keys += ["data.chat_template", "distill.prompt", "distill.teachers"]
    else:
        config = config.model_copy(update={"distill": _without_training_sources(config)})
        config = _with_saved_template(config, folder, overrides)
    references = _unapproved_references(config, keys).items()
    unapproved = {key: value for key, value in references if not _is_overridden(overrides, key)}
    if not resume and "model" in unapproved and (local_path := find_cached(config.model)) is not None:
        config = config.model_copy(update={"model": local_path})
        del unapproved["model"]
    if unapproved:
        raise _unapproved_error(settings, unapproved)
    return config


def _without_training_sources(config: RunConfig) -> DistillSettings:
    """Return the ``distill`` section without prompt and teachers, which inference does not need."""
    if config.task != "distill":
        return config.distill
    return config.distill.model_copy(update={"prompt": TextSource(text="as it was trained"), "teachers": []})


def _with_saved_template(config: RunConfig, folder: Path, overrides: Mapping[str, object]) -> RunConfig:
    """Return the settings with the chat template saved by the run instead of the original file.

    Raises:
        UserError: if the folder contains no template and only the folder names the original file.
    """
    key, saved = "data.chat_template", folder / CHAT_TEMPLATE
    if config.data.chat_template is None:
        return config
    if saved.is_file():
        return config.model_copy(update={"data": replace(config.data, chat_template=str(saved))})
    if not _is_overridden(overrides, key) and (unapproved := _unapproved_references(config, (key,))):
        raise _unapproved_error(folder / SETTINGS, unapproved, flag=f"a file {CHAT_TEMPLATE} in the folder")
    return config


def _require_rewards(config: RunConfig, settings: Path, flag: str) -> None:
    if not config.trust_remote_code and (unapproved := _unapproved_references(config, _REWARD_CODE_KEYS)):
        raise _unapproved_error(settings, unapproved, flag=flag)


def _unapproved_references(config: RunConfig, keys: Sequence[str]) -> dict[str, object]:
    """Return the settings among ``keys`` whose values the user did not name on this machine before."""
    references = {key: value for key, value in config.external_references().items() if key in keys}
    return {key: value for key, value in references.items() if not was_referenced(key.partition(".")[0], value)}


def _is_overridden(overrides: Mapping[str, object], key: str) -> bool:
    section, _, leaf = key.rpartition(".")
    section_overrides = overrides.get(section) if section else overrides
    if isinstance(section_overrides, str | list):  # `data: rows.jsonl` is short for `data: {train: rows.jsonl}`
        return leaf == "train"
    return isinstance(section_overrides, Mapping) and leaf in section_overrides


def _unapproved_error(file: Path, references: Mapping[str, object], *, flag: str | None = None) -> UserError:
    """Return the error for references that only a folder names.

    Args:
        file: File that contains the references.
        references: References by dotted settings key.
        flag: Option that allows them, if it differs from the flags of the settings.
    """
    as_json = functools.partial(json.dumps, ensure_ascii=False, default=str)
    texts = {key: value if isinstance(value, str) else as_json(value) for key, value in references.items()}
    flags = flag or " ".join(f"--{key} {shell_word(text)}" for key, text in texts.items())
    listed = " and ".join(f"{key} {text!r}" for key, text in texts.items())
    message = f"the folder refers to {listed}, which you have not named on this machine before"
    reason = "deltaw does not open a reference only because a folder contains it"
    return UserError(f"{message}; {reason}", location=str(file), hint=f"to allow it, name it yourself: {flags}")


def _missing_adapter_error(folder: Path) -> UserError:
    if (folder / SETTINGS).is_file():
        hint = f"train it again: deltaw train {folder / SETTINGS}"
        return UserError("the run has no adapter: it stopped early", location=str(folder), hint=hint)
    hint = "give the folder of a run or of an adapter"
    return UserError(f"no adapter in '{folder}'", location=str(folder), hint=hint)


def _remote_code_error(settings: Path, model: str, flag: str) -> UserError:
    message = f"the run needs Python code of its base model, '{model}'"
    hint = f"read the code; if you trust it, add {flag} (in Python: trust_remote_code=True)"
    return UserError(message, location=f"trust_remote_code in {settings}", hint=hint)


@dataclass
class AdaptedModel:
    """Model loaded for evaluation, generation or chat, with or without an adapter.

    Attributes:
        loaded: The loaded model.
        config: Settings of the run, or None if the reference is not a deltaw run.
        method: Method of the adapter, or None for a base model.
        task: Task of the model.
        classes: Names of a classifier's outputs.
        identity: Identity of the base model and its precision, used in cache keys.
        adapter_folder: The opened folder, or None for a base model.
        prompting: Prompt format of the training rows, as stored in the folder.
    """

    loaded: LoadedModel
    config: RunConfig | None
    method: Method | None
    task: Task
    classes: tuple[str, ...] | None = None
    identity: str | None = None
    adapter_folder: AdapterFolder | None = None
    prompting: Prompting = field(default_factory=Prompting)
    _base_active: bool = field(default=False, repr=False)

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def adapter(self) -> bool:
        """True if the model has an adapter."""
        return self.method is not None

    @property
    def is_base(self) -> bool:
        """True inside :meth:`base`, while the adapter is disabled."""
        return self._base_active

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model.

        Raises:
            UserError: if the model reads images.
        """
        if self.task.tokenizer is None:
            raise UserError("the model reads images, not text", location=self.loaded.reference, hint="use eval")
        return self.task.tokenizer

    @property
    def data(self) -> DataSettings | None:
        """Data settings of the run, or None if unknown."""
        return self.config.data if self.config is not None else None

    def encode(self, prompt: str | Sequence[Message]) -> np.ndarray:
        """Tokenize a prompt or a conversation as the training rows were rendered: int32 (length,).

        Raises:
            UserError: if the chat template rejects it.
        """
        return self.prompting.prompt(prompt, self.data, self.tokenizer)

    def prompt(self, tokens: np.ndarray) -> np.ndarray:
        """Prepend the adapter's virtual tokens to a prompt."""
        return tokens if self.method is None or self._base_active else self.method.with_virtual_tokens(tokens)

    def invocation_warning(self, prompts: Sequence[np.ndarray]) -> str | None:
        """Return a warning about prompts that lack the adapter's invocation sequence, or None."""
        invocation = None if self.method is None else self.method.invocation
        if invocation is None:
            return None
        count = sum(last_occurrence(prompt, invocation) is None for prompt in prompts)
        if not count:
            return None
        text = self.tokenizer.decode(list(invocation))
        subject = f"{count:,} of {len(prompts):,} prompts do" if len(prompts) > 1 else "the prompt does"
        return f"{subject} not have {text!r}, which activates the adapter: the base model alone answers"

    def example(self, example: Any) -> Any:
        """Render an example for the current state of the model."""
        return example if self.method is None or self._base_active else render_example(example, self.method)

    @property
    def virtual_tokens(self) -> int:
        """Number of positions that the adapter prepends to each row."""
        return 0 if self.method is None or self._base_active else self.method.virtual_tokens

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Disable the adapter inside this context. Contexts can be nested."""
        if self.method is None or self._base_active:
            yield
            return
        with self.method.base_model_active(self.model):
            self._base_active = True
            try:
                yield
            finally:
                self._base_active = False

    def batcher(self, rows: Sequence[Any], **options: Any) -> AnyBatcher:
        """Return the batcher for these rows, with the run's settings if there is a run."""
        if self.config is not None:
            train = self.config.train
            options |= {"tokens_per_pass": train.tokens_per_pass, "share": train.share_prefixes}
        shares = self.method is None or self.method.can_share_prefixes()
        device = str(self.loaded.choices["device"].value)
        return self.task.batcher(self.model, rows, device=device, method_shares=shares, **options)[0]

    def require_generation(self) -> None:
        """Raise a UserError if the model does not generate text."""
        if not self.task.generates_text:
            message = f"this is an adapter for {self.task.name}, which generates no text"
            raise UserError(message, location=self.loaded.reference, hint="use deltaw eval")


def open_run(
    reference: str,
    *,
    model: str | None = None,
    precision: str = "auto",
    device: str = "auto",
    task: str | None = None,
    trust_remote_code: bool = False,
    log: Callable[[str], None],
) -> AdaptedModel:
    """Load a run (base model and adapter), a PEFT adapter, or a base model.

    Args:
        reference: Folder or hub id of an adapter, or any model reference.
        model: Base model, if it differs from the one that the folder names.
        precision: Precision of the weights. "auto" uses the precision of the run if the device supports it.
        device: Device to load the model on.
        task: Task of a base model. Ignored for an adapter, which has its own task.
        trust_remote_code: Run Python files of the base model, independent of the settings in the folder.
        log: Receives messages.

    Raises:
        UserError: if a file cannot be loaded, or the folder contains a reference that the caller has to allow.
    """
    folder = adapter_folder(reference, required=False)
    adapter = is_adapter(folder)
    opened_folder = None
    if adapter or (folder / SETTINGS).is_file():
        opened_folder = read_folder(folder, trust_remote_code=trust_remote_code)
    config = None if opened_folder is None else opened_folder.run
    if precision == "auto" and config is not None and model is None and config.precision != "auto":
        with contextlib.suppress(UserError):  # prefer the run's precision if the device supports it
            precision = choose_precision(choose_device(device).value, config.precision).value
    task_name, base, classes = task or DEFAULT_TASK, model or reference, None
    if opened_folder is not None:
        task_name, base, classes = opened_folder.task, opened_folder.base(model), read_classes(folder)
    dtype = choose_precision(choose_device(device).value, precision).value
    section = None if opened_folder is None else opened_folder.section
    task_object = task_of(task_name, base, dtype, trust_remote_code=trust_remote_code, log=log, section=section)
    if config is not None and task_object.tokenizer is not None:
        task_object.tokenizer = with_chat_template(task_object.tokenizer, config.data.chat_template)
    fixed_outputs = tasks.entry_of(task_name).outputs
    outputs = len(classes) if classes is not None else fixed_outputs
    if adapter and outputs is None and task_object.has_labels:
        outputs = read_num_outputs(folder)
    loaded = load(
        base,
        precision=precision,
        device=device,
        task=task_name,
        num_labels=outputs,
        trust_remote_code=trust_remote_code,
        log=log if not adapter else lambda line: None if line.startswith("new,") else log(line),
    )
    task_object.initialize_head(loaded.model, loaded.new_modules, ())  # the part that needs no rows
    identity = model_identity(loaded.model, precision)
    if precision == "int8":
        roundings = None if opened_folder is None else saved_calibration(opened_folder.folder, identity)
        with track_progress("quantizing the weights to int8"):
            report = quantize_int8(loaded.model.base_model, roundings=roundings)
        identity = quantized_identity(identity, report.roundings)
        log(Detail(f"precision int8: {report}"))
    if precision == "nf4":
        for line in quantize_weights_nf4(loaded.model):
            log(Detail(line))
    if classes is None and task_object.has_labels and fixed_outputs is None:
        numbers = range(loaded.model.config.num_labels or 0)
        classes = getattr(task_object, "class_names", None) or tuple(str(number) for number in numbers)
    method = None
    if adapter:
        method = method_from_folder(folder, task_object.tokenizer)
        log(Detail(method.load(loaded.model, folder)))
    prompting = read_prompting(folder)
    return AdaptedModel(loaded, config, method, task_object, classes, identity, opened_folder, prompting)


def score_run(
    opened: AdaptedModel,
    examples: Sequence[Any],
    *,
    num_answers: int = 0,
    max_new_tokens: int | None = None,
    writer: TextGenerator | None = None,
    sampler: Sampler | None = None,
    reward_evaluation: RewardEvaluation = GREEDY,
) -> EvaluationScore:
    """Evaluate a model on examples without virtual tokens, as a run evaluates its held-out rows.

    Args:
        opened: Model to evaluate.
        examples: Examples to evaluate on.
        num_answers: Number of examples, from the first, for which the model generates an answer. With the ``reward``
            task, all completions are returned if it is not 0.
        max_new_tokens: Maximum length of an answer.
        writer: Generates the answers. The default is transformers.
        sampler: Samples completions for the ``reward`` task.
        reward_evaluation: Sampling options for the ``reward`` task.

    Raises:
        UserError: if the run's reward functions were not named on this machine before.
    """
    task, model = opened.task, opened.model
    task.max_searched_passages = None
    if isinstance(task, RewardTask):
        if opened.adapter_folder is not None:
            opened.adapter_folder.require_rewards()
        assert sampler is not None, "the reward task needs a sampler"
        with contextlib.closing(Scorer(task.settings)) as scorer, contextlib.closing(task.turns(sampler)) as write:
            generation = replace(reward_evaluation, max_new_tokens=max_new_tokens)
            score = task.score_completions(examples, write, scorer, generation)
        return score if num_answers else EvaluationScore(score.evaluation)
    batcher = opened.batcher([opened.example(example) for example in examples])
    with opened.base():
        examples = task.add_reference_log_probs(model, examples, batcher)
    rows = [opened.example(example) for example in examples]
    objective = task.objective(model)
    with task.model_context(model, batcher), track_progress("evaluating"):
        evaluation = task.evaluate(objective, rows, batcher, opened.classes)
    if not num_answers or not task.generates_text or task.has_pairs:
        return EvaluationScore(evaluation)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "writer": writer}
    return EvaluationScore(evaluation, answers(model, opened.tokenizer, rows[:num_answers], **options))
