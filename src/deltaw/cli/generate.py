"""`deltaw generate`: complete prompts."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from deltaw.cli.mistakes import RunArgument
from deltaw.cli.options import as_text, console, json_flag, model_flags, print_json
from deltaw.cli.text_options import TextSettings, engine_for, system_flag, system_of, text_flags
from deltaw.errors import UserError
from deltaw.working import working

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltaw.serving.engine import Engine
    from deltaw.serving.request import TokenLogprob, Written

LOGPROBS_HELP = "with --json: each token's log-probability, and those of so many likeliest tokens"


@click.command("generate")
@click.argument("run", type=RunArgument())
@click.argument("text", required=False)
@click.option("--prompt", "-p", "prompts", multiple=True, help="what to complete; may be given several times")
@system_flag
@click.option("--base", "with_base", is_flag=True, help="show the base model's completion too")
@text_flags(max_new_tokens=256)
@click.option("--logprobs", type=click.IntRange(0, 100), help=LOGPROBS_HELP)
@model_flags
@json_flag
def command(
    run: str,
    text: str | None,
    prompts: tuple[str, ...],
    system: str | None,
    with_base: bool,
    how: TextSettings,
    as_json: bool,
    **opening: Any,
) -> None:
    """Complete TEXT, or several prompts, with RUN: a run's folder, an adapter's, or a model. Without either,
    prompts are lines of standard input."""
    notes, logprobs = console(True), opening.pop("logprobs")
    if logprobs is not None and not as_json:
        raise UserError("log-probabilities need JSON", where="--logprobs", hint="give --json too")
    with working("starting"):
        from deltaw.serving.opening import base_engine
        from deltaw.training.origin import open_run
        from deltaw.training.prompting import with_system
    asked = [*filter(None, [text]), *prompts] or [line for line in sys.stdin.read().splitlines() if line.strip()]
    asked = [as_text(prompt, "the prompt") for prompt in asked]
    if not asked:
        raise UserError("there is no prompt", hint="give a text behind the run, --prompt, or lines on standard input")

    opened = open_run(run, say=notes.say, **opening)
    opened.require_generation()
    system = system_of(opened, system, notes.say)
    tokens = [opened.encode(with_system(system, prompt)) for prompt in asked]
    if (line := opened.not_invoked(tokens)) is not None:
        notes.say(line)

    def completed(by: Engine, adapter: str | None) -> list[Written]:
        requests = [how.request(prompt, adapter, number=n, logprobs=logprobs) for n, prompt in enumerate(tokens)]
        with working("writing", len(requests)) as advance:
            return by.write_all(requests, lambda done, _: advance(done))

    base: list[Written] | None = None
    with contextlib.closing(engine_for(opened, notes.say)) as engine:
        written = completed(engine, engine.own_adapter)
        if with_base:
            with base_engine(opened, engine, notes.say) as bare:
                base = completed(bare, None)
    if as_json:
        rows = [
            {"prompt": prompt, **_as_dict(w, "", opened.tokenizer)} for prompt, w in zip(asked, written, strict=True)
        ]
        for row, of_base in zip(rows, base or (), strict=False):
            row |= _as_dict(of_base, "base", opened.tokenizer)
        print_json({"completions": rows})
        return
    for number, completion in enumerate(written):
        before = "" if base is None else f"base:    {base[number].text}\nadapter: "
        click.echo(f"{before}{completion.text}")


def _as_dict(text: Written, by: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """A text, why it ended, and its log-probabilities if it has some; ``by`` precedes the keys if it is the base."""
    before = f"{by}_" if by else ""
    shown: dict[str, object] = {by or "completion": text.text, f"{before}finish": text.finish}
    if text.logprobs:
        shown[f"{before}logprobs"] = [_logprob(one, tokenizer) for one in text.logprobs]
    return shown


def _logprob(one: TokenLogprob, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    def named(token: int, value: float) -> dict[str, object]:
        return {"token": str(tokenizer.decode([token])), "id": token, "logprob": value}

    shown = named(one.token, one.logprob)
    return shown | {"top": [named(token, value) for token, value in one.top]} if one.top else shown
