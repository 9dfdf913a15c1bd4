"""Evaluate inference sessions on tasks of lm-evaluation-harness.

The harness builds the requests and computes the metrics. Log-probabilities are computed from packed rows without
padding: a prefix shared by several requests, such as a question with its choices, is computed once, and logits are
computed only for continuations, in chunks. The decoding engine generates text.

Requires the package ``lm-eval``. Import this module only to run tasks.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import utils
from lm_eval.api import metrics
from lm_eval.api import task as tasks
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text, resolve_max_length
from lm_eval.tasks import TaskManager

from deltaw.atomic_files import write_text
from deltaw.data.example import Example
from deltaw.data.packing import MicroBatch
from deltaw.data.prefix_tree import common_prefix
from deltaw.data.rendering import render_with_tokenizer
from deltaw.decoding.engine import Engine
from deltaw.decoding.opening import open_engine
from deltaw.decoding.request import Request, Sampling
from deltaw.errors import UserError
from deltaw.hub.transformers_private import quiet
from deltaw.inference.opened_run import OpenedRun
from deltaw.kernels.rows import cross_entropy_
from deltaw.progress import LogFunction, track_progress
from deltaw.training.causal_objective import CausalObjective

# File with the task scores in a run's folder.
FILE = "tasks.json"
# Bootstrap samples for standard errors of metrics that are not a mean over rows.
BOOTSTRAP = 1000
# Minimum length in tokens of a shared prompt prefix that is computed in advance.
MIN_SHARED_PREFIX = 32
# Number of an objective's chunks with logits in memory at a time.
LOGIT_CHUNKS = 4
# Maximum size of a task file in bytes, and maximum number of task files.
MAX_TASK_BYTES = 2**20
MAX_TASK_FILES = 20_000


class SessionLM(TemplateLM):
    """Adapts a session to the model interface of the harness. Close it before the model changes.

    Args:
        session: Session of a causal language model.
        log: Receives the reason if transformers decodes.
    """

    def __init__(self, session: OpenedRun, log: LogFunction) -> None:
        super().__init__()
        session.require_generation()
        self.session = session
        self.tokenizer = session.tokenizer
        self.log = log
        if self.tokenizer.eos_token_id is None:
            message = "the tokenizer has no end token, which the harness needs"
            hint = "set eos_token in its files"
            raise UserError(message, location=session.loaded.reference, hint=hint)
        self._objective: CausalObjective | None = None
        self._engine: Engine | None = None

    def close(self) -> None:
        """Stop the decoding engine, if it was started."""
        if self._engine is not None:
            self._engine.close(drain=False)
            self._engine = None

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def max_length(self) -> int:
        """Maximum number of tokens, as in the backend of the harness, minus the length of a soft prompt."""
        return resolve_max_length(self.session.model.config, self.tokenizer) - self.session.virtual_tokens

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    @property
    def _stop_ids(self) -> tuple[int, ...] | None:
        """Terminators: those of the backend of the harness for a model without an adapter, otherwise None for the
        adapter's.
        """
        if self.session.adapter and not self.session.is_base:
            return None
        ids = getattr(self.session.model.generation_config, "eos_token_id", None)
        return tuple({self.eot_token_id, *(ids if isinstance(ids, list) else [] if ids is None else [ids])})

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = render_with_tokenizer(self.tokenizer, chat_history, generation=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()  # the model continues this message, as in transformers
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            options = {"max_seq_len": self.max_length, "context_len": 1}
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, **options):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, rolling=True), strict=True):
            sums[owner] += value
        return sums

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and True if greedy decoding would generate it.

        The last token of a row is only predicted. A context that is too long is truncated at its start.
        """
        session = self.session
        results = [(0.0, True)] * len(requests)
        rows: list[Example] = []
        for number, (_, context, continuation) in enumerate(requests):
            if continuation:
                tokens = np.array((context + continuation)[-(self.max_length + 1) : -1], np.int32)
                prompt = max(1, len(tokens) + 1 - len(continuation))
                rows.append(session.example(Example(number, tokens, np.zeros(len(tokens), bool), prompt, None)))
        if not rows:
            return results
        batcher = session.batcher(rows)
        with session.task.model_context(session.model, batcher), track_progress("scoring", len(rows)) as advance:
            self._objective = self._objective or CausalObjective(session.model)
            done = 0
            for batch in batcher.batches(rows):
                targets = [np.array(requests[member.example.row][2]) for member in batch.members]
                row_scores = _score_rows(self._objective, batch, targets, with_greedy=not kwargs.get("rolling"))
                for member, score in zip(batch.members, row_scores, strict=True):
                    results[member.example.row] = score
                done += batch.rows
                advance(done)
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        if self._engine is None:
            self._engine = open_engine(self.session, log=self.log)
        engine = self._engine
        engine_requests = []
        stops = []
        adapter = None if self.session.is_base else engine.session_adapter
        end = self.tokenizer.decode([self.eot_token_id])
        for number, request in enumerate(requests):
            context, gen_kwargs = request.args
            options: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, 256))
            max_new_tokens = options["max_gen_toks"]
            if self.max_length <= max_new_tokens:
                message = f"the task generates {max_new_tokens} tokens, and the model has {self.max_length} positions"
                raise UserError(message, location=request.task_name, hint="set max_gen_toks in its generation_kwargs")
            tokens = self.tok_encode(context)[max_new_tokens - self.max_length :]
            stop = tuple(text for text in dict.fromkeys(options["until"]) if text and text != end)
            limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": stop, "stop_ids": self._stop_ids}
            engine_requests.append(Request(np.array(tokens), adapter, _sampling_params(options, number), **limits))
            stops.append([*stop, end])
        if len(prefix := _shared_prefix([request.tokens for request in engine_requests])) >= MIN_SHARED_PREFIX:
            engine.generate_all([Request(prefix, adapter, max_new_tokens=0)])
        with track_progress("writing", len(engine_requests)) as advance:
            results = engine.generate_all(engine_requests, lambda done, _: advance(done))
        return [postprocess_generated_text(item.text, stop, None) for item, stop in zip(results, stops, strict=True)]


def _score_rows(
    objective: CausalObjective, batch: MicroBatch, targets: Sequence[np.ndarray], with_greedy: bool
) -> Iterator[tuple[float, bool]]:
    """Yield the summed log-probability of each row's targets, and True if all of them are the most likely tokens.

    Args:
        objective: Computes the logits.
        batch: The packed rows.
        targets: Target tokens of each row, (labels,). The last outputs of the row predict them.
        with_greedy: Compute the second value. Otherwise it is False.
    """
    positions = [member.indices[-len(target) :] for member, target in zip(batch.members, targets, strict=True)]
    distinct, index = np.unique(np.concatenate(positions), return_inverse=True)
    device = batch.predictors.device
    tokens = torch.from_numpy(np.concatenate(targets))
    predictors = torch.from_numpy(distinct).to(device)
    indices = None if batch.predictor_indices is None else predictors
    outputs = objective.label_outputs(replace(batch, predictors=predictors, predictor_indices=indices))
    values = torch.zeros(len(tokens), dtype=torch.float64)
    greedy = torch.zeros(len(tokens), dtype=torch.bool)
    start = 0
    for part in outputs.split(LOGIT_CHUNKS * objective.chunk):
        selected = torch.from_numpy(np.flatnonzero((index >= start) & (index < start + len(part))))
        row = torch.from_numpy(index)[selected].to(device) - start
        labels = tokens[selected].to(device)
        logits = objective.logits_of(part)
        any_target = labels.new_zeros(len(part)).scatter_(0, row, labels)
        chosen = logits[row, labels]
        if with_greedy:
            best = chosen == logits.amax(-1)[row]
            best[best.clone()] = logits[row[best]].argmax(-1) == labels[best]  # ties: the first token
            greedy[selected] = best.cpu()
        reference_logits = logits.gather(1, any_target[:, None])[:, 0].float()
        ones = torch.ones(len(part), device=device)
        normalizer = reference_logits + cross_entropy_(logits, any_target, ones, scale=1.0, softcap=0.0, grad=False)
        values[selected] = (chosen.float() - normalizer[row]).cpu().double()
        start += len(part)
    lengths = [len(row_targets) for row_targets in targets]
    for value, is_greedy in zip(values.split(lengths), greedy.split(lengths), strict=True):
        yield float(value.sum()), bool(is_greedy.all())


def _sampling_params(options: Mapping[str, Any], number: int) -> Sampling:
    """Return the sampling parameters of a request: greedy, unless the task samples."""
    if not options["do_sample"] or not options.get("temperature"):
        return Sampling()
    filters = {name: options[name] for name in ("top_k", "top_p", "min_p") if options.get(name) is not None}
    return Sampling(temperature=float(options["temperature"]), seed=number, **filters)


def _shared_prefix(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the common prefix of all prompts, shorter than each of them. Empty for a single prompt."""
    if len(prompts) < 2:
        return np.zeros(0, np.int64)
    shared = min(common_prefix(prompts[0], prompt) for prompt in prompts[1:])
    return prompts[0][: min(shared, *(len(prompt) - 1 for prompt in prompts))]


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: Name of the task or group.
        metric: Name of the metric, with its filter unless that is ``none``.
        value: Value of the metric.
        stderr: Standard error, or None.
        higher_is_better: True if higher values are better, or None if unknown.
        rows: Number of evaluated rows, or None for a group without this number.
        fewshot: Number of examples in each prompt.
        version: Version of the task.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    rows: int | None
    fewshot: int | None
    version: str


def evaluate_tasks(
    session: OpenedRun,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    trust_remote_code: bool = False,
    log: LogFunction,
) -> list[TaskScore]:
    """Evaluate a session's current model on tasks of the harness.

    Args:
        session: The session.
        names: Names of the tasks.
        folder: Folder with additional task files, or None.
        limit: Evaluate only the first ``limit`` rows of each task.
        fewshot: Number of examples before each row, if the task permits it.
        chat: Render prompts with the chat template, and examples as turns.
        trust_remote_code: Allow task files in ``folder`` to refer to Python code.
        log: Receives progress lines.

    Raises:
        UserError: if a task does not exist, cannot be loaded or computed, or would run code.
    """
    if folder is not None:
        _check_folder(folder, trust_remote_code)
    if chat and not session.tokenizer.chat_template:
        raise UserError("the model has no chat template", location="--chat", hint="leave it out")
    with _quiet_sandbox(), contextlib.closing(SessionLM(session, log)) as model:
        with track_progress("reading tasks"):
            loaded = _load(names, folder)
        for task in loaded["tasks"].values():
            task_fewshot = task.get_config("num_fewshot")
            # An explicit 0 in the task is respected.
            if task_fewshot is None or (fewshot is not None and task_fewshot != 0):
                task.set_config(key="num_fewshot", value=fewshot or 0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        random.seed(0)
        np.random.seed(DEFAULT_OTHER_SEED)
        options: dict[str, Any] = {"limit": limit, "apply_chat_template": chat, "fewshot_as_multiturn": chat}
        try:
            results = evaluate(model, loaded, bootstrap_iters=BOOTSTRAP, log_samples=False, **options)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # task files may raise anything
            raise _harness_error(names, error) from error
    assert results is not None
    return list(_scores(results))


def _load(names: Sequence[str], folder: Path | None) -> Any:
    """Load tasks, from the folder only if it contains all of them.

    Raises:
        UserError: if a task does not exist or cannot be loaded.
    """
    try:
        for defaults in [True] if folder is None else [False, True]:
            manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=defaults)
            if missing := [name for name in names if name not in manager.task_index]:
                continue
            return manager.load(list(names))
    except UserError:
        raise
    except Exception as error:  # task files and datasets may raise anything
        raise _harness_error(names, error) from error
    similar = difflib.get_close_matches(missing[0], manager.all_tasks, n=3)
    hint = f"did you mean {', '.join(similar)}?" if similar else "use a task of lm-evaluation-harness or --include-path"
    raise UserError(f"there is no task '{missing[0]}'", location="--benchmarks", hint=hint)


def _harness_error(names: Sequence[str], error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    hint = "its data must be a local file (dataset_path: json) or on a hub"
    return UserError(f"the harness fails: {type(error).__name__}: {reason}", location=", ".join(names), hint=hint)


def _check_folder(folder: Path, trust_remote_code: bool) -> None:
    """Reject task files that are malformed or would run Python code without permission.

    Raises:
        UserError: if a task file is rejected.
    """
    if not folder.is_dir():
        raise UserError("no such folder", location=f"--include-path {folder}", hint="specify a folder with task files")
    root = folder.resolve()
    for count, file in enumerate(chain(folder.rglob("*.yaml"), folder.rglob("*.yml")), start=1):
        if count > MAX_TASK_FILES or file.stat().st_size > MAX_TASK_BYTES:
            raise UserError("too many task files, or a task file is too large", location=str(file))
        try:
            with file.open("rb") as text:
                nodes = list(_nodes(yaml.compose(text, yaml.CSafeLoader)))
        except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
            raise UserError("the task file is not YAML", location=str(file), hint=str(error)[:200]) from error
        if trust_remote_code:
            continue
        pairs = [pair for node in nodes if isinstance(node, yaml.MappingNode) for pair in node.value]
        includes = [inner.value for key, value in pairs if key.value == "include" for inner in _nodes(value)]
        paths = [include for include in includes if isinstance(include, str)]
        outside = [path for path in paths if not (file.parent / path).resolve().is_relative_to(root)]
        if outside or any(not node.tag.startswith("tag:yaml.org,2002:") for node in nodes):
            message = f"the task file includes '{outside[0]}', outside the folder" if outside else "the task runs code"
            raise UserError(message, location=str(file), hint="read it; if you trust it, add --trust-remote-code")


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    """Yield all nodes of a YAML document, each once."""
    pending = [root]
    visited = set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in visited:
            continue
        visited.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            pending += chain.from_iterable(node.value)
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value


@contextlib.contextmanager
def _quiet_sandbox() -> Iterator[None]:
    """Disable progress bars and log messages of the harness, and render task templates in a sandbox."""
    environment = utils.env
    bars = tasks.tqdm
    bootstrap = metrics.bootstrap_stderr
    sandbox = ImmutableSandboxedEnvironment(undefined=environment.undefined, keep_trailing_newline=True)
    sandbox.filters.update(environment.filters)
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bars_enabled = datasets.is_progress_bar_enabled()
    try:
        utils.env = sandbox
        tasks.tqdm = lambda rows, **_: rows
        metrics.bootstrap_stderr = _bootstrap_stderr
        datasets.disable_progress_bars()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with quiet():
            yield
    finally:
        utils.env = environment
        tasks.tqdm = bars
        metrics.bootstrap_stderr = bootstrap
        if bars_enabled:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _bootstrap_stderr(metric: Callable[[Sequence[Any]], float], rows: Sequence[Any], iters: int) -> float:
    """Compute the bootstrap standard error in this process, without a progress bar."""
    random_rows = random.Random(0)
    return statistics.stdev(metric(random_rows.choices(rows, k=len(rows))) for _ in range(iters))


def _scores(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    """Yield the metrics of tasks and groups in the harness's results."""
    for task, values in results["results"].items():
        rows = results["n-samples"].get(task, {}).get("effective")
        fewshot = results["n-shot"].get(task)
        better = results["higher_is_better"].get(task) or {}
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            stderr = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
            name = metric if filter_name == "none" else f"{metric} ({filter_name})"
            version = str(results["versions"].get(task, ""))
            yield TaskScore(task, name, float(value), stderr, better.get(metric), rows, fewshot, version)


def save_scores(folder: Path, scores: Mapping[str, Sequence[TaskScore]], settings: Mapping[str, object]) -> Path:
    """Write scores by model to a run's folder, with the evaluation settings. Return the file."""
    tasks_by_model = {model: [asdict(score) for score in model_scores] for model, model_scores in scores.items()}
    settings_text = {key: value if value is None else str(value) for key, value in settings.items()}
    content = {"lm_eval": version("lm-eval"), "settings": settings_text, "tasks": tasks_by_model}
    write_text(folder / FILE, json.dumps(content, indent=2) + "\n")
    return folder / FILE
