"""`deltaw deploy`: a run becomes a model of another program, and both are asked the same questions.

Knows the order and what is compared; the programs are in :mod:`deltaw.export.programs`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path

from deltaw.data.example import Example, rows_of
from deltaw.errors import UserError
from deltaw.export.base import MergeOptions, Say, base_of
from deltaw.export.formats import chat_of, export
from deltaw.export.programs import Program, Unreachable
from deltaw.hub.folders import adapter_folder, short_name
from deltaw.hub.terminators import terminators_in
from deltaw.runtime.generation import Writer, generate
from deltaw.training.evaluation.general_prompts import MEASURED
from deltaw.training.origin import InferenceSession, open_run
from deltaw.training.prompting import prompt_of, read_prompting, with_system
from deltaw.training.tasks.base import read_run_data
from deltaw.working import working

QUESTIONS, TOKENS = 20, 64


@dataclass(frozen=True)
class Asked:
    """One question with both answers."""

    question: str
    run: str
    program: str

    @property
    def exact(self) -> bool:
        """Equal but for white space at both ends."""
        return self.run.strip() == self.program.strip()

    @property
    def similarity(self) -> float:
        """The share of characters that both have in the same order, 0 to 1: difflib's ratio."""
        return SequenceMatcher(None, self.run.strip(), self.program.strip(), autojunk=False).ratio()


@dataclass(frozen=True)
class Deployed:
    """What was made.

    Attributes:
        name: of the model. program: its title. place: a line on where it is. kind: how its numbers are stored.
        precision: in which the run computed its answers.
        asked: questions with answers; empty if the program was not asked.
        held_out: how many questions are held-out prompts of the run; the others are general prompts.
    """

    name: str
    program: str
    place: str
    kind: str
    precision: str = ""
    asked: tuple[Asked, ...] = ()
    held_out: int = 0

    def lines(self) -> list[str]:
        """For a person."""
        if not self.asked:
            return [self.place]
        count, exact = len(self.asked), sum(one.exact for one in self.asked)
        similar = sum(one.similarity for one in self.asked) / count
        told = f"{count} questions, {self.held_out} of them held-out prompts: {exact} equal answers"
        told += f", similarity {similar:.0%}"
        why = f"the model is stored as {self.kind}, and the run computes in {self.precision}: rounding changes answers"
        return [self.place, told, *([why] if exact < count else [])]

    def as_dict(self) -> dict[str, object]:
        asked = [{**asdict(one), "exact": one.exact, "similarity": one.similarity} for one in self.asked]
        return {**asdict(self), "asked": asked}


def deploy(
    run: str,
    program: Program,
    *,
    name: str | None = None,
    kind: str = "q8_0",
    model: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    precision: str = "auto",
    questions: int = QUESTIONS,
    writes: Callable[[InferenceSession], Writer] = lambda session: lambda *asked: None,
    say: Say = lambda line: None,
) -> Deployed:
    """Merge and export a run, make it a model of ``program``, and compare answers.

    Args:
        run: a run's folder, or an adapter's; or an adapter's hub id.
        name: of the model; None for the run's. kind: how a GGUF file stores numbers.
        model, trust_remote_code: of the base, as in :func:`deltaw.export.formats.export`.
        overwrite: replace a model of that name. precision: of the run's own answers.
        questions: how many are asked; 0 for none.
        writes: what writes the run's own answers; by default transformers.

    Raises:
        UserError: the run cannot be exported, or the program is not there or refuses the model.
    """
    folder = adapter_folder(run)
    name = name or short_name(folder)
    program.check(name, overwrite=overwrite)
    options = MergeOptions(model, trust_remote_code, "fp32")
    try:
        made_in = tempfile.TemporaryDirectory(prefix=".deltaw-", dir=program.folder)
    except OSError as error:
        what = f"cannot write there: {error.strerror or error}"
        raise UserError(what, where=str(program.folder), hint="choose another folder with --models") from error
    with made_in as made:
        file = Path(made) / "model.gguf"
        done = export(folder, "gguf", file, kind=kind, model=model, trust_remote_code=trust_remote_code, say=say)
        for line in done.lines:
            say(line)
        base = base_of(folder, "fp32", options, say)
        tokenizer = base.tokenizer(folder)
        ends = [] if tokenizer is None else terminators_in(base.folder, tokenizer)
        chat, _ = chat_of(tokenizer, ends, read_prompting(folder).system)
        with working(f"handing {file.stat().st_size / 1e6:,.0f} MB to {program.title}"):
            deployed = Deployed(name, program.title, program.create(name, file, chat), kind)
    if not questions:
        return deployed
    session = open_run(str(folder), model=model, precision=precision, trust_remote_code=trust_remote_code, say=say)
    asked, held_out = questions_of(session, questions)
    plain = not session.tokenizer.chat_template or (session.data is not None and session.data.template == "plain")
    prompts = [session.encode(with_system(chat.system, one)) for one in asked]
    texts = [str(session.tokenizer.decode(p, skip_special_tokens=True)) for p in prompts] if plain else asked
    theirs = []
    with working(f"asking {program.title}", len(texts)) as advance:
        for text in texts:
            try:
                theirs.append(program.ask(name, text, chat, TOKENS, plain=plain))
            except Unreachable as error:
                say(f"answers were not compared, since {program.title} does not answer: {error}")
                return deployed
            advance(len(theirs))
    with working("asking the run"):
        written = writes(session)(prompts, TOKENS, 4096, None)
        if written is None:
            written = generate(session.model, session.tokenizer, prompts, max_new_tokens=TOKENS)
    rows = tuple(Asked(q, own.text, other) for q, own, other in zip(asked, written, theirs, strict=True))
    computed = str(session.loaded.choices["precision"].value)
    return replace(deployed, precision=computed, asked=rows, held_out=held_out)


def questions_of(session: InferenceSession, count: int) -> tuple[list[str], int]:
    """Held-out prompts of a run, then general ones; and how many of them are the run's."""
    found: dict[str, None] = {}
    if session.config is not None and session.found is not None and session.data is not None:
        try:
            session.found.require_rows()
            rows = read_run_data(session.task, session.data, seed=session.config.data_seed).held_out
        except UserError:  # rows that are gone, or that only the folder names
            rows = ()
        for row in rows:
            example = rows_of(row)[0]
            if len(found) < count and isinstance(example, Example) and example.prompt_length:
                one = prompt_of(example, session.prompting.system, session.data, session.tokenizer)
                found |= {} if one is None else {one[0]: None}
    own = list(found)
    general = [prompt for prompt in MEASURED if prompt not in found]
    return [*own, *general[: count - len(own)]], len(own)
