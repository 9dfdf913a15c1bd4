"""Tasks of lm-evaluation-harness on an inference session.

The harness makes the requests and computes the metrics; the log-probabilities and the texts are deltaw's. Requests for
log-probabilities run as padding-free packed rows: a prefix that several of them share, such as a question with its
choices, is computed once, and logits exist only where a continuation is predicted, a chunk at a time. Texts are written
by the decoding engine.

Needs the package ``lm-eval``; imported only where tasks are asked for.
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

from deltaw.data.example import Example
from deltaw.data.packing import Batch, common_prefix
from deltaw.durable import write_text
from deltaw.errors import UserError
from deltaw.hub.quiet import quiet
from deltaw.kernels.rows import cross_entropy_
from deltaw.serving.engine import Engine
from deltaw.serving.opening import open_engine
from deltaw.serving.request import Request, Sampling
from deltaw.training.callbacks import Say
from deltaw.training.origin import InferenceSession
from deltaw.training.tasks.causal_objective import CausalObjective
from deltaw.working import working

# Where a run's folder keeps the scores of its tasks.
FILE = "tasks.json"
# Draws of the bootstrap for standard errors of metrics that are no mean over rows.
BOOTSTRAP = 1000
# A prefix of all prompts of fewer tokens is not computed ahead of them.
LEAST_PREFIX = 32
# An objective's chunks whose logits are there at a time: nothing else of their size is.
TOGETHER = 4
# Bytes of a task file, and files of a folder of tasks, at most.
LARGEST_TASK, MOST_TASKS = 2**20, 20_000


class SessionLM(TemplateLM):
    """A session, as its model is when this is made, as the harness sees a model. Close it before the model changes.

    Args:
        session: of a causal language model. say: told how texts are computed, if it is not by the decoder.
    """

    def __init__(self, session: InferenceSession, say: Say) -> None:
        super().__init__()
        session.require_generation()
        self.session, self.tokenizer, self.say = session, session.tokenizer, say
        if self.tokenizer.eos_token_id is None:
            what, hint = "the tokenizer has no end token, which the harness needs", "set eos_token in its files"
            raise UserError(what, where=session.loaded.reference, hint=hint)
        self._objective: CausalObjective | None = None
        self._engine: Engine | None = None

    def close(self) -> None:
        """End the decoding engine, if texts were written."""
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
        """Tokens that the model reads at once, as the harness's own backend counts them; fewer by a soft prompt."""
        return resolve_max_length(self.session.model.config, self.tokenizer) - self.session.virtual_tokens

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    @property
    def _ends(self) -> tuple[int, ...] | None:
        """Tokens that end a text: of a bare model those of the harness's own backend, of an adapter its own."""
        if self.session.adapter and not self.session.bare:
            return None
        config = self.session.model.generation_config
        named = getattr(config, "eos_token_id", None)
        return tuple({self.eot_token_id, *(named if isinstance(named, list) else [] if named is None else [named])})

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        how: dict[str, Any] = {"tokenize": False, "continue_final_message": not add_generation_prompt}
        text = self.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt, **how)
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **how)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens, how = self.tok_encode(request.args[0]), {"max_seq_len": self.max_length, "context_len": 1}
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, **how):
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
        """The log-probability of each continuation, and whether greedy decoding would write it.

        The last token of a row is predicted, not read; a context that is too long loses its beginning.
        """
        session, found = self.session, [(0.0, True)] * len(requests)
        rows: list[Example] = []
        for number, (_, context, continuation) in enumerate(requests):
            if not continuation:
                continue
            tokens = np.array((context + continuation)[-(self.max_length + 1) : -1], np.int32)
            prompt = max(1, len(tokens) + 1 - len(continuation))
            rows.append(session.example(Example(number, tokens, np.zeros(len(tokens), bool), prompt, None)))
        if not rows:
            return found
        batcher = session.batcher(rows)
        with session.task.running(session.model, batcher), working("scoring", len(rows)) as advance:
            self._objective = self._objective or CausalObjective(session.model)
            done = 0
            for batch in batcher.batches(rows):
                targets = [np.array(requests[member.example.row][2]) for member in batch.members]
                each = _scored(self._objective, batch, targets, with_greedy=not kwargs.get("rolling"))
                for member, scored in zip(batch.members, each, strict=True):
                    found[member.example.row] = scored
                done += batch.rows
                advance(done)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        if self._engine is None:
            self._engine = open_engine(self.session, say=self.say)
        engine, asked, stops = self._engine, [], []
        adapter = None if self.session.bare else engine.own_adapter
        end = self.tokenizer.decode([self.eot_token_id])
        for number, request in enumerate(requests):
            context, given = request.args
            how: dict[str, Any] = dict(normalize_gen_kwargs(given, 256))
            most = how["max_gen_toks"]
            if self.max_length <= most:
                what = f"the task writes up to {most} tokens, and the model reads {self.max_length}"
                raise UserError(what, where=request.task_name, hint="set max_gen_toks in the task's generation_kwargs")
            tokens = self.tok_encode(context)[most - self.max_length :]
            stop = tuple(text for text in dict.fromkeys(how["until"]) if text and text != end)
            ending: dict[str, Any] = {"max_new_tokens": most, "stop": stop, "stop_ids": self._ends}
            asked.append(Request(np.array(tokens), adapter, _sampling(how, number), **ending))
            stops.append([*stop, end])
        if len(prefix := _shared_prefix([request.tokens for request in asked])) >= LEAST_PREFIX:
            engine.write_all([Request(prefix, adapter, max_new_tokens=0)])
        with working("writing", len(asked)) as advance:
            written = engine.write_all(asked, lambda done, _: advance(done))
        return [postprocess_generated_text(one.text, stop, None) for one, stop in zip(written, stops, strict=True)]


def _scored(
    objective: CausalObjective, batch: Batch, targets: Sequence[np.ndarray], with_greedy: bool
) -> Iterator[tuple[float, bool]]:
    """For each row of a batch the log-probability of its targets together, and whether all are the likeliest tokens.

    Args:
        targets: of each row, the tokens that its last outputs are to predict, each (labels,).
        with_greedy: whether that is wanted; False for all otherwise.
    """
    places = [member.places[-len(own) :] for member, own in zip(batch.members, targets, strict=True)]
    asked, index = np.unique(np.concatenate(places), return_inverse=True)
    device, tokens = batch.predictors.device, torch.from_numpy(np.concatenate(targets))
    at = torch.from_numpy(asked).to(device)
    picked = objective.label_outputs(replace(batch, predictors=at, asked=None if batch.asked is None else at))
    values, greedy = torch.zeros(len(tokens), dtype=torch.float64), torch.zeros(len(tokens), dtype=torch.bool)
    start = 0
    for part in picked.split(TOGETHER * objective.chunk):
        own = torch.from_numpy(np.flatnonzero((index >= start) & (index < start + len(part))))
        row, wanted = torch.from_numpy(index)[own].to(device) - start, tokens[own].to(device)
        logits, any_target = objective.logits_of(part), wanted.new_zeros(len(part)).scatter_(0, row, wanted)
        chosen = logits[row, wanted]
        if with_greedy:
            best = chosen == logits.amax(-1)[row]
            best[best.clone()] = logits[row[best]].argmax(-1) == wanted[best]  # of equals, the first
            greedy[own] = best.cpu()
        of_any = logits.gather(1, any_target[:, None])[:, 0].float()
        ones = torch.ones(len(part), device=device)
        normalizer = of_any + cross_entropy_(logits, any_target, ones, scale=1.0, softcap=0.0, grad=False)
        values[own] = (chosen.float() - normalizer[row]).double().cpu()
        start += len(part)
    lengths = [len(own) for own in targets]
    for value, likeliest in zip(values.split(lengths), greedy.split(lengths), strict=True):
        yield float(value.sum()), bool(likeliest.all())


def _sampling(how: Mapping[str, Any], number: int) -> Sampling:
    """How a request's tokens are chosen: greedily, unless the task samples."""
    if not how["do_sample"] or not how.get("temperature"):
        return Sampling()
    drawn = {name: how[name] for name in ("top_k", "top_p", "min_p") if how.get(name) is not None}
    return Sampling(temperature=float(how["temperature"]), seed=number, **drawn)


def _shared_prefix(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """Tokens that all prompts begin with, of several; not the whole of any."""
    if len(prompts) < 2:
        return np.zeros(0, np.int64)
    shared = min(common_prefix(prompts[0], prompt) for prompt in prompts[1:])
    return prompts[0][: min(shared, *(len(prompt) - 1 for prompt in prompts))]


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: its name, or that of a group. metric: with its filter's name, unless that is ``none``.
        value, stderr: of the metric, and its standard error; None where the harness gives none.
        rows: how many were evaluated; None of a group that has no number of its own. fewshot: examples in each prompt.
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
    session: InferenceSession,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    trust_remote_code: bool = False,
    say: Say,
) -> list[TaskScore]:
    """Evaluate a session, as its model is at the moment, on tasks of the harness.

    Args:
        folder: with task files of one's own; None for the harness's alone.
        limit: only the first so many rows of each task. fewshot: examples before each row, where a task allows it.
        chat: whether prompts are rendered by the chat template, examples as turns.
        trust_remote_code: whether task files of ``folder`` may name Python code.

    Raises:
        UserError: there is no such task, it cannot be loaded or computed, or it would run code.
    """
    if folder is not None:
        _check_folder(folder, trust_remote_code)
    if chat and not session.tokenizer.chat_template:
        raise UserError("the model has no chat template", where="--chat", hint="leave it out")
    with _as_ours(), contextlib.closing(SessionLM(session, say)) as model:
        with working("reading tasks"):
            loaded = _load(names, folder)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (fewshot is not None and own != 0):  # a task that says none wants none
                task.set_config(key="num_fewshot", value=fewshot or 0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        random.seed(0)
        np.random.seed(DEFAULT_OTHER_SEED)
        how: dict[str, Any] = {"limit": limit, "apply_chat_template": chat, "fewshot_as_multiturn": chat}
        try:
            found = evaluate(model, loaded, bootstrap_iters=BOOTSTRAP, log_samples=False, **how)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # whatever a task's own file brings about
            raise _refused(names, error) from error
    assert found is not None
    return list(_scores(found))


def _load(names: Sequence[str], folder: Path | None) -> Any:
    """The tasks of these names, from the folder alone if it has all of them.

    Raises:
        UserError: there is no task of a name, or it cannot be loaded.
    """
    try:
        for defaults in [True] if folder is None else [False, True]:
            manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=defaults)
            if missing := [name for name in names if name not in manager.task_index]:
                continue
            return manager.load(list(names))
    except UserError:
        raise
    except Exception as error:  # foreign files, foreign data sets
        raise _refused(names, error) from error
    near = difflib.get_close_matches(missing[0], manager.all_tasks, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "name a task of lm-evaluation-harness, or --include-path"
    raise UserError(f"there is no task '{missing[0]}'", where="--tasks", hint=hint)


def _refused(names: Sequence[str], error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    hint = "its data must be a file here (dataset_path: json), or come from a hub"
    return UserError(f"the harness fails: {type(error).__name__}: {reason}", where=", ".join(names), hint=hint)


def _check_folder(folder: Path, trust_remote_code: bool) -> None:
    """Refuse a folder whose task files cannot be read, or would run Python code that the user does not allow.

    Raises:
        UserError: as said.
    """
    if not folder.is_dir():
        raise UserError("there is no such folder", where=f"--include-path {folder}", hint="name one with task files")
    root = folder.resolve()
    for count, file in enumerate(chain(folder.rglob("*.yaml"), folder.rglob("*.yml")), start=1):
        if count > MOST_TASKS or file.stat().st_size > LARGEST_TASK:
            raise UserError("there are too many task files, or one is too large", where=str(file))
        try:
            with file.open("rb") as text:
                nodes = list(_nodes(yaml.compose(text, yaml.CSafeLoader)))
        except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
            raise UserError("the task file is not YAML", where=str(file), hint=str(error)[:200]) from error
        if trust_remote_code:
            continue
        pairs = [pair for node in nodes if isinstance(node, yaml.MappingNode) for pair in node.value]
        taken = [inner.value for key, value in pairs if key.value == "include" for inner in _nodes(value)]
        leaving = [
            one for one in taken if isinstance(one, str) and not (file.parent / one).resolve().is_relative_to(root)
        ]
        if leaving or any(not node.tag.startswith("tag:yaml.org,2002:") for node in nodes):
            what = f"the task file includes '{leaving[0]}', outside of the folder" if leaving else "the task runs code"
            hint = "read it; if you trust it, add --trust-remote-code"
            raise UserError(what, where=str(file), hint=hint)


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    """All nodes of a YAML document, each once."""
    waiting, known = [root], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in known:
            continue
        known.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += chain.from_iterable(node.value)
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


@contextlib.contextmanager
def _as_ours() -> Iterator[None]:
    """While open, the harness prints no bars and no advice, and a task's templates run in a sandbox."""
    environment, bars, drawn = utils.env, tasks.tqdm, metrics.bootstrap_stderr
    safe = ImmutableSandboxedEnvironment(undefined=environment.undefined, keep_trailing_newline=True)
    safe.filters.update(environment.filters)
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels, loading = [logger.level for logger in loggers], datasets.is_progress_bar_enabled()
    try:
        utils.env, tasks.tqdm, metrics.bootstrap_stderr = safe, lambda rows, **_: rows, _bootstrapped
        datasets.disable_progress_bars()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with quiet():
            yield
    finally:
        utils.env, tasks.tqdm, metrics.bootstrap_stderr = environment, bars, drawn
        if loading:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _bootstrapped(metric: Callable[[Sequence[Any]], float], rows: Sequence[Any], iters: int) -> float:
    """The harness's standard error of a metric by the bootstrap, in this process and without a word."""
    random_rows = random.Random(0)
    return statistics.stdev(metric(random_rows.choices(rows, k=len(rows))) for _ in range(iters))


def _scores(found: Mapping[str, Any]) -> Iterator[TaskScore]:
    """The metrics of the harness's results, those of groups too."""
    for task, values in found["results"].items():
        rows, fewshot = found["n-samples"].get(task, {}).get("effective"), found["n-shot"].get(task)
        better = found["higher_is_better"].get(task) or {}
        for key, value in values.items():
            metric, comma, by = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{by}")
            stderr = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
            name, version = metric if by == "none" else f"{metric} ({by})", str(found["versions"].get(task, ""))
            yield TaskScore(task, name, float(value), stderr, better.get(metric), rows, fewshot, version)


def keep_scores(folder: Path, scores: Mapping[str, Sequence[TaskScore]], how: Mapping[str, object]) -> Path:
    """Write scores by model into a run's folder, with how they were evaluated; the file."""
    kept = {model: [asdict(one) for one in found] for model, found in scores.items()}
    settings = {key: value if value is None else str(value) for key, value in how.items()}
    told = {"lm_eval": version("lm-eval"), "settings": settings, "tasks": kept}
    write_text(folder / FILE, json.dumps(told, indent=2) + "\n")
    return folder / FILE
