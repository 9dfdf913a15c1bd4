"""`deltaw deploy`: import a run into another program as a model, and compare both on the same questions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from deltaw.data.example import Example, rows_of
from deltaw.decoding.generation import TextGenerator, generate
from deltaw.errors import UserError
from deltaw.export.base import resolve_base
from deltaw.export.formats import OllamaTemplate, export, ollama_template
from deltaw.export.programs import Program, ServerUnreachable
from deltaw.hub.app_stores import OLLAMA, StoredModel
from deltaw.hub.folders import adapter_folder, short_name
from deltaw.hub.terminators import terminators_in
from deltaw.inference.open_run import open_run
from deltaw.inference.opened_run import OpenedRun
from deltaw.inference.prompting import prompt_of, read_prompting, with_system
from deltaw.methods.trust import read_folder
from deltaw.progress import LogFunction, ignore_line, track_progress
from deltaw.training.evaluation.general_prompts import DRIFT_PROMPTS
from deltaw.training.task import read_run_data

DEFAULT_QUESTIONS = 20
MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class DeploymentCheck:
    """Question with the answers of the run and the program."""

    question: str
    run: str
    program: str

    @property
    def exact(self) -> bool:
        """True if the answers are equal except for leading and trailing white space."""
        return self.run.strip() == self.program.strip()

    @property
    def similarity(self) -> float:
        """Similarity of the answers from 0 to 1 (difflib's ratio)."""
        return SequenceMatcher(None, self.run.strip(), self.program.strip(), autojunk=False).ratio()


@dataclass(frozen=True)
class DeploymentResult:
    """Result of :func:`deploy`.

    Attributes:
        name: Name of the model.
        program: Title of the program.
        place: Line that describes the model's location.
        kind: Storage type of the weights, or of the adapter if ``base`` is given.
        precision: Precision of the run's answers.
        asked: Questions with answers, empty if answers were not compared.
        held_out: Number of questions that are held-out prompts of the run. The others are general prompts.
        base: Model of the program that the adapter is applied to, or None if the weights were merged.
    """

    name: str
    program: str
    place: str
    kind: str
    precision: str = ""
    asked: tuple[DeploymentCheck, ...] = ()
    held_out: int = 0
    base: str | None = None

    def lines(self) -> list[str]:
        """Return a summary for the user."""
        if not self.asked:
            return [self.place]
        count = len(self.asked)
        exact = sum(check.exact for check in self.asked)
        similar = sum(check.similarity for check in self.asked) / count
        summary = f"{count} questions ({self.held_out} held-out prompts): {exact} equal answers"
        summary += f", similarity {similar:.0%}"
        stored = f"the model is stored as {self.kind}" if self.base is None else f"{self.program} runs {self.base}"
        reason = f"answers differ by rounding: {stored}, the run computes in {self.precision}"
        return [self.place, summary, *([reason] if exact < count else [])]

    def as_dict(self) -> dict[str, object]:
        checks = [{**asdict(check), "exact": check.exact, "similarity": check.similarity} for check in self.asked]
        return {**asdict(self), "asked": checks}


def deploy(
    run: str,
    program: Program,
    *,
    name: str | None = None,
    kind: str | None = None,
    model: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    precision: str = "auto",
    questions: int = DEFAULT_QUESTIONS,
    make_writer: Callable[[OpenedRun], TextGenerator] = lambda session: lambda *question_texts: None,
    log: LogFunction = ignore_line,
) -> DeploymentResult:
    """Import a run into ``program``, and compare the answers of both.

    If ``program`` is Ollama and has the base model, only the adapter is imported. Otherwise, or if Ollama cannot apply
    the adapter, the adapter is merged into the weights of the base model.

    Args:
        run: Folder of a run or an adapter, or hub id of an adapter.
        program: Program to import the model into.
        name: Name of the model, or None for the name of the run.
        kind: Storage type of merged weights. None means an adapter if possible, else q8_0.
        model: Base model, as in :func:`deltaw.export.formats.export`.
        trust_remote_code: Run the Python files of the base model.
        overwrite: Replace an existing model with this name.
        precision: Precision of the answers of the run.
        questions: Number of questions, or 0 to skip the comparison.
        make_writer: Creates the function that generates the run's answers. The default is transformers.
        log: Receives messages for the user.

    Raises:
        UserError: if the run cannot be exported, or the program is not available or rejects the model.
    """
    folder = adapter_folder(run)
    name = name or short_name(folder)
    program.check(name, overwrite=overwrite)
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".deltaw-", dir=program.folder)
    except OSError as error:
        message = f"the folder is not writable: {error.strerror or error}"
        raise UserError(message, location=str(program.folder), hint="choose another folder with --models") from error
    with temporary as temporary_path:
        files = Path(temporary_path)
        options: dict[str, Any] = {"model": model, "trust_remote_code": trust_remote_code, "log": log}
        base_name = read_folder(folder, trust_remote_code=trust_remote_code).base_name(model)
        may_adapt = kind is None and program.applies_adapters and base_name.startswith(OLLAMA)
        base = resolve_base(folder, dtype="bf16" if may_adapt else "fp32", **options)
        tokenizer = base.tokenizer(folder)
        terminators = [] if tokenizer is None else terminators_in(base.folder, tokenizer)
        chat, _ = ollama_template(tokenizer, terminators, read_prompting(folder).system)
        deployed = None
        if may_adapt and base.in_ollama is not None:
            deployed = _import_adapter(folder, program, name, files / "adapter.gguf", chat, base.in_ollama, options)
        if deployed is None:
            deployed = _import_merged(folder, program, name, files / "model.gguf", chat, kind or "q8_0", options)
    if not questions:
        return deployed
    session = open_run(str(folder), model=model, precision=precision, trust_remote_code=trust_remote_code, log=log)
    question_texts, held_out = select_questions(session, questions)
    plain = not session.tokenizer.chat_template or (session.data is not None and session.data.template == "plain")
    prompts = [session.encode(with_system(chat.system, question)) for question in question_texts]
    texts = [str(session.tokenizer.decode(p, skip_special_tokens=True)) for p in prompts] if plain else question_texts
    program_answers = []
    with track_progress(f"querying {program.title}", len(texts)) as advance:
        for text in texts:
            try:
                program_answers.append(program.query(name, text, chat, MAX_ANSWER_TOKENS, plain=plain))
            except ServerUnreachable as error:
                log(f"answers were not compared because {program.title} does not respond: {error}")
                return deployed
            advance(len(program_answers))
    with track_progress("querying the run"):
        run_answers = make_writer(session)(prompts, MAX_ANSWER_TOKENS, 4096, None)
        if run_answers is None:
            run_answers = generate(session.model, session.tokenizer, prompts, max_new_tokens=MAX_ANSWER_TOKENS)
    answers = zip(question_texts, run_answers, program_answers, strict=True)
    rows = tuple(DeploymentCheck(q, answer.text, program_answer) for q, answer, program_answer in answers)
    return replace(deployed, precision=str(session.loaded.choices["precision"].value), asked=rows, held_out=held_out)


def _import_adapter(
    folder: Path,
    program: Program,
    name: str,
    file: Path,
    chat: OllamaTemplate,
    base: StoredModel,
    options: Mapping[str, Any],
) -> DeploymentResult | None:
    """Import the adapter of a run, to be applied to a model of the program.

    Args:
        folder: Folder of the run.
        program: Program to import the adapter into.
        name: Name of the new model.
        file: Path of the exported file.
        chat: Chat settings of the new model.
        base: Base model.
        options: Options of the export.

    Returns:
        The result, or None if the weights have to be merged. The reason is logged.
    """
    log = options["log"]
    if (problem := program.base_problem(base, chat)) is not None:
        log(f"merging the adapter: {problem}")
        return None
    try:
        exported = export(folder, "gguf-adapter", file, **options)
        if "mmproj" in exported.details:
            raise _vision_error(folder)
        with track_progress(f"importing the adapter into {program.title}"):
            place = program.create(name, file, chat, base.name)
            program.query(name, "Hello", chat, 1, plain=True)  # some of Ollama's engines support no adapters
    except UserError as error:
        log(f"merging the adapter: {error.message}")
        return None
    except ServerUnreachable as error:
        raise UserError(f"{program.title} stopped responding: {error}", location=program.url) from error
    for line in exported.lines:
        log(line)
    return DeploymentResult(name, program.title, place, "f32", base=base.name)


def _import_merged(
    folder: Path, program: Program, name: str, file: Path, chat: OllamaTemplate, kind: str, options: Mapping[str, Any]
) -> DeploymentResult:
    """Merge the adapter of a run, and import the weights."""
    exported = export(folder, "gguf", file, kind=kind, **options)
    if "mmproj" in exported.details:
        raise _vision_error(folder)
    for line in exported.lines:
        options["log"](line)
    with track_progress(f"importing {file.stat().st_size / 1e6:,.0f} MB into {program.title}"):
        return DeploymentResult(name, program.title, program.create(name, file, chat), kind)


def _vision_error(folder: Path) -> UserError:
    message = "deltaw deploy does not import vision-language models"
    return UserError(message, location=str(folder), hint="use deltaw export --format gguf")


def select_questions(session: OpenedRun, count: int) -> tuple[list[str], int]:
    """Return held-out prompts of a run, filled up with general prompts, and the number of held-out ones."""
    held_out: dict[str, None] = {}
    if session.config is not None and session.adapter_folder is not None and session.data is not None:
        try:
            session.adapter_folder.require_rows()
            rows = read_run_data(session.task, session.data, seed=session.config.data_seed).held_out
        except UserError:  # the rows do not exist, or are referenced only by an untrusted folder
            rows = ()
        for row in rows:
            example = rows_of(row)[0]
            if len(held_out) < count and isinstance(example, Example) and example.prompt_length:
                encoded = prompt_of(example, session.prompting.system, session.data, session.tokenizer)
                held_out |= {} if encoded is None else {encoded[0]: None}
    prompts = list(held_out)
    general = [prompt for prompt in DRIFT_PROMPTS if prompt not in held_out]
    return [*prompts, *general[: count - len(prompts)]], len(prompts)
