"""`deltaw generate`: complete prompts."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltaw.cli.options import console, json_flag, model_flags, print_json, require_utf8
from deltaw.cli.suggestions import RunArgument
from deltaw.cli.text_options import TextSettings, create_engine, resolve_system_prompt, system_flag, text_flags
from deltaw.errors import UserError
from deltaw.progress import track_progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltaw.decoding.engine import Engine
    from deltaw.decoding.request import GenerationResult, TokenLogprob

IMAGE_HELP = "image before each prompt, or at its marker <image>; can be repeated"
LOGPROBS_HELP = "number of most likely tokens whose log-probabilities are reported per token, with --json"


@click.command("generate")
@click.argument("run", type=RunArgument())
@click.argument("text", required=False)
@click.option("--prompt", "-p", "prompts", multiple=True, help="prompt to complete; can be repeated")
@click.option("--image", "image_files", multiple=True, type=click.Path(path_type=Path), help=IMAGE_HELP)
@system_flag
@click.option("--with-base", "with_base", is_flag=True, help="also print the base model's completions")
@text_flags(max_new_tokens=256)
@click.option("--logprobs", type=click.IntRange(0, 100), help=LOGPROBS_HELP)
@model_flags
@json_flag
def command(
    run: str,
    text: str | None,
    prompts: tuple[str, ...],
    image_files: tuple[Path, ...],
    system: str | None,
    with_base: bool,
    text_settings: TextSettings,
    as_json: bool,
    **opening: Any,
) -> None:
    """Complete TEXT or several prompts with RUN: the folder of a run or an adapter, or a model. Without prompts, each
    line of standard input is a prompt.
    """
    notes = console(True)
    logprobs = opening.pop("logprobs")
    if logprobs is not None and not as_json:
        raise UserError("log-probabilities require JSON output", location="--logprobs", hint="add --json")
    with track_progress("starting"):
        from deltaw.data.image_files import decode
        from deltaw.decoding.opening import base_engine
        from deltaw.inference.open_run import open_run
        from deltaw.inference.prompting import with_system
    prompt_texts = [*filter(None, [text]), *prompts] or [line for line in sys.stdin.read().splitlines() if line.strip()]
    prompt_texts = [require_utf8(prompt, "the prompt") for prompt in prompt_texts]
    if not prompt_texts:
        raise UserError("no prompt is given", hint="give a text after the run, --prompt, or lines on standard input")
    images = [decode(file, str(file)) for file in image_files]

    session = open_run(run, log=notes.print_line, **opening)
    session.require_generation()
    system = resolve_system_prompt(session, system, notes.print_line)
    tokens = [session.encode(with_system(system, prompt), images) for prompt in prompt_texts]
    if (line := session.invocation_warning(tokens)) is not None:
        notes.print_line(line)

    def completed(engine_used: Engine, adapter: str | None) -> list[GenerationResult]:
        requests = [text_settings.request(ids, adapter, number=n, logprobs=logprobs) for n, ids in enumerate(tokens)]
        with track_progress("generating", len(requests)) as advance:
            return engine_used.generate_all(requests, lambda done, _: advance(done))

    base: list[GenerationResult] | None = None
    with contextlib.closing(create_engine(session, notes.print_line)) as engine:
        completions = completed(engine, engine.session_adapter)
        if with_base:
            with base_engine(session, engine, notes.print_line) as bare_engine:
                base = completed(bare_engine, None)
    if as_json:
        rows = [
            {"prompt": prompt, **_as_dict(completed_text, "", session.tokenizer)}
            for prompt, completed_text in zip(prompt_texts, completions, strict=True)
        ]
        for row, base_completion in zip(rows, base or (), strict=False):
            row |= _as_dict(base_completion, "base", session.tokenizer)
        print_json({"completions": rows})
        return
    for number, completion in enumerate(completions):
        prefix = "" if base is None else f"base:    {base[number].text}\nadapter: "
        click.echo(f"{prefix}{completion.text}")


def _as_dict(text: GenerationResult, model_key: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return a completion with its finish reason and log-probabilities.

    ``model_key`` is the prefix of the keys for the base model.
    """
    prefix = f"{model_key}_" if model_key else ""
    result: dict[str, object] = {model_key or "completion": text.text, f"{prefix}finish": text.finish}
    if text.logprobs:
        result[f"{prefix}logprobs"] = [_logprob(logprob, tokenizer) for logprob in text.logprobs]
    return result


def _logprob(logprob: TokenLogprob, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    def named(token: int, value: float) -> dict[str, object]:
        return {"token": str(tokenizer.decode([token])), "id": token, "logprob": value}

    result = named(logprob.token, logprob.logprob)
    return result | {"top": [named(token, value) for token, value in logprob.top]} if logprob.top else result
