"""Opens a base model and adapters from disk for an application to serve: to write text, embed or classify it.

The decoder takes any number of adapters beside the base. A model that has no decoder is run by transformers,
with one adapter at most; that is said. Knows references, folders and memory; not HTTP.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from deltaw.data.report import quoted
from deltaw.errors import UserError
from deltaw.hub.folders import adapter_folder, short_name
from deltaw.serving.adapters import AdapterFacts, no_adapter
from deltaw.serving.bank import AdapterBank, Packer
from deltaw.serving.batch import BatchLimits
from deltaw.serving.decodable import decodable
from deltaw.serving.encoders import How, open_classifiers, open_embedder, what_it_serves
from deltaw.serving.engine import Engine
from deltaw.serving.http.encoders import encoders_served
from deltaw.serving.http.page.document import page_router, trial_page
from deltaw.serving.http.preparing import TokenizerPrompts
from deltaw.serving.http.served import Prompts, Served
from deltaw.serving.http.settings import Limits, check_name
from deltaw.serving.opening import cache_room, engine_over, fallback_engine
from deltaw.serving.probes import NotDecodable
from deltaw.training.callbacks import Say
from deltaw.training.origin import InferenceSession, is_adapter, open_run, read_folder
from deltaw.training.prompting import Prompting, read_prompting
from deltaw.working import working

# The prompts of an adapter by its name; of the base model for None.
AllPrompts: TypeAlias = Callable[[str | None], Prompts]
# Renderings that are kept, of adapters that were asked for; each holds little, but adapters come and go.
MOST_PROMPTS = 1024


@dataclass(frozen=True)
class Opening:
    """How a model is opened.

    Args:
        model: the base model, where a run's folder does not name it. trust_remote_code: run Python code that
            comes with it. name: of the base in requests; None for what it was opened from.
        page: whether ``/`` is a page: to chat with models that write text, to try texts with others.
        pooling, normalize: of an encoder's vectors.
        running: texts that are written at once. cache_bytes: for keys and values; None for a share of what is
            free. adapter_bytes: for adapters in memory.
    """

    model: str | None = None
    trust_remote_code: bool = False
    name: str | None = None
    precision: str = "auto"
    device: str = "auto"
    page: bool = True
    pooling: str = "auto"
    normalize: bool = True
    running: int = 64
    cache_bytes: int | None = None
    adapter_bytes: int = 10**9

    @property
    def how(self) -> How:
        """How a model is loaded, as keyword arguments."""
        return {"precision": self.precision, "device": self.device, "trust_remote_code": self.trust_remote_code}


def open_any(base: str, folders: Mapping[str, Path], opening: Opening, limits: Limits, *, say: Say) -> Served:
    """What a reference names, ready to serve: a model that writes text, an encoder, a classifier, or a reranker.

    Args:
        base: names a model, a run or an adapter. folders: adapters by name. limits: of requests.

    Raises:
        UserError: the model or an adapter cannot be used.
    """
    folders = {name: adapter_folder(folder) for name, folder in folders.items()}
    is_run = is_adapter(fetched := adapter_folder(base, required=False))  # it says itself what it does
    base = str(fetched) if is_run else base
    known = base if is_run else opening.model or base
    kind = what_it_serves(known, **opening.how)
    if kind == "text":
        return open_served(base, folders, opening, say=say)
    name = opening.name or (check_name(short_name(Path(base)), base) if is_run else base)
    if kind == "vectors":
        if folders:
            raise UserError("an encoder is served without adapters", where="--adapter")
        vectors: dict[str, Any] = {"pooling": opening.pooling, "normalize": opening.normalize}
        encoders = open_embedder(base, name, say=say, **vectors, **opening.how)
    else:
        if name in folders:
            raise UserError(f"two models are named '{name}'", where="--adapter", hint="give --name")
        paths = {adapter: str(folder) for adapter, folder in folders.items()}
        encoders = open_classifiers(base, name, paths, model=opening.model, say=say, **opening.how)
    served = encoders_served(encoders, name, base, limits)
    if not opening.page:
        return served
    page = page_router(document=trial_page(kind))
    return replace(served, routers=(*served.routers, page), open_paths=frozenset({"/"}))


def open_served(base: str, folders: Mapping[str, Path], opening: Opening, *, say: Say) -> Served:
    """A base model and its adapters, ready to serve.

    Args:
        base: names a model; or a run's or an adapter's folder, whose adapter is served under the folder's
            name.
        folders: adapters by name.

    Raises:
        UserError: the model or an adapter cannot be used, or the model writes no text.
    """
    folders = dict(folders)
    if is_adapter(Path(base)):
        own = check_name(short_name(Path(base)), base)
        if own in folders:
            raise UserError(f"two adapters are named '{own}'", where=base)
        folders[own] = Path(base)
        found = read_folder(Path(base), trust_remote_code=opening.trust_remote_code)
        base, named = found.base(opening.model), found.base_name(opening.model)
    else:
        base = named = opening.model or base
    name = opening.name or named
    if name in folders:
        raise UserError(f"'{name}' is the base model's name", where="--adapter", hint="give --name")
    session = open_run(base, say=say, **opening.how)
    session.require_generation()
    room = cache_room(opening.cache_bytes)
    bank: AdapterBank | None = None
    try:
        with working("preparing the decoder"):
            made = decodable(session.model, cache_bytes=room)
    except NotDecodable as reason:
        engine, prompts = _by_transformers(base, folders, session, opening, reason, say)
    else:
        packer = Packer(session.model, made)
        bank = AdapterBank(session.model, session.tokenizer, packer, budget_bytes=opening.adapter_bytes)
        with working("loading adapters", len(folders)) as advance:
            for done, (adapter, folder) in enumerate(folders.items(), start=1):
                bank.add(adapter, folder)
                advance(done)
        engine = engine_over(made, session, bank, cache_bytes=room, limits=BatchLimits(running=opening.running))
        prompts = _prompts_of_bank(session, bank)
    close = functools.partial(engine.close, drain=False)
    served = Served(name, engine, prompts, base, engine.positions, bank, lambda: engine.load, close=close)
    if not opening.page:
        return served

    def prompting(model: str) -> Prompting:
        if model == name:
            return read_prompting(Path(base))
        if bank is None and model not in folders:
            raise no_adapter(model, folders)
        return read_prompting(folders[model] if bank is None else bank.facts(model).folder)

    if (known := next((one for one in [name, *folders] if prompting(one).system), None)) is not None:
        shown = quoted(prompting(known).system, 24)
        say(f"system prompt of the rows: {shown} (the page has it, the API adds none)")

    return replace(served, routers=(page_router(prompting),), open_paths=frozenset({"/"}))


def _by_transformers(
    base: str, folders: Mapping[str, Path], session: InferenceSession, opening: Opening, reason: NotDecodable, say: Say
) -> tuple[Engine, AllPrompts]:
    if len(folders) > 1:
        what = f"this model has no decoder, and transformers serves one adapter: {len(folders)} are named"
        raise UserError(what, where="--adapter", hint="start a server for each, on a port of its own")
    own = next(iter(folders), None)
    data: dict[str | None, TokenizerPrompts] = {None: TokenizerPrompts(session.tokenizer, session.data)}
    if own is not None:
        session = open_run(str(folders[own]), model=base, say=say, **opening.how)
        data[own] = TokenizerPrompts(session.tokenizer, session.data)
    return fallback_engine(session, own, reason, say), data.__getitem__


def _prompts_of_bank(session: InferenceSession, bank: AdapterBank) -> AllPrompts:
    """Prompts of the adapters that a bank has at the moment: each with its own template, and rendered as its
    rows were."""
    of_base = TokenizerPrompts(session.tokenizer, session.data)

    @functools.lru_cache(MOST_PROMPTS)
    def of_adapter(facts: AdapterFacts) -> Prompts:  # a swap brings other facts
        data = None if facts.config is None else facts.config.data
        return TokenizerPrompts(facts.tokenizer or session.tokenizer, data)

    return lambda adapter: of_base if adapter is None else of_adapter(bank.facts(adapter))
