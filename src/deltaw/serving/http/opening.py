"""Opens a base model and adapters from disk for an application to serve: to write text, embed or classify it.

The decoder takes any number of adapters beside the base. A model that has no decoder is run by transformers,
with one adapter at most; that is said. Knows references, folders and memory; not HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from deltaw.host.memory import free_memory_bytes
from deltaw.hub.gguf import terminators
from deltaw.serving.adapters import ActiveAdapter, AdapterFacts, FixedAdapters, FolderFacts
from deltaw.serving.bank import AdapterBank, FactorPlaces, packing
from deltaw.serving.batch import BatchLimits
from deltaw.serving.decodable import Decodable, decodable
from deltaw.serving.encoders import open_classifiers, open_embedder, what_it_serves
from deltaw.serving.engine import Engine
from deltaw.serving.http.encoders import encoders_served
from deltaw.serving.http.page.document import page_router
from deltaw.serving.http.preparing import TokenizerPrompts
from deltaw.serving.http.served import Load, Prompts, Served
from deltaw.serving.http.settings import Limits, check_name
from deltaw.serving.opening import CACHE_SHARE, FallbackWork, engine_over
from deltaw.serving.probes import NotDecodable
from deltaw.training.origin import InferenceSession, is_adapter, open_run, read_folder
from deltaw.working import working

# Renderings that are kept, of adapters that were asked for; each holds little, but adapters come and go.
MOST_PROMPTS = 1024


@dataclass(frozen=True)
class Opening:
    """How a model is opened.

    Args:
        model: the base model, where a run's folder does not name it. trust_remote_code: run Python code that
            comes with it. name: of the base in requests; None for what it was opened from.
        page: whether models that write text have a chat page at ``/``.
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


def open_any(
    base: str, folders: Mapping[str, Path], opening: Opening, limits: Limits, *, say: Callable[[str], None]
) -> Served:
    """What a reference names, ready to serve: a model that writes text, an encoder, or a classifier.

    Args:
        base: names a model, a run or an adapter. folders: adapters by name. limits: of requests.

    Raises:
        UserError: the model or an adapter cannot be used.
    """
    is_run = is_adapter(Path(base))  # it says itself what it does
    known = base if is_run else opening.model or base
    trust = opening.trust_remote_code
    kind = what_it_serves(known, precision=opening.precision, device=opening.device, trust_remote_code=trust)
    if kind == "text":
        return open_served(base, folders, opening, say=say)
    if kind == "vectors":
        if folders:
            raise UserError("an encoder is served without adapters", where="--adapter")
        name = opening.name or base
        encoders = open_embedder(
            base,
            name,
            pooling=opening.pooling,
            normalize=opening.normalize,
            precision=opening.precision,
            device=opening.device,
            trust_remote_code=trust,
            say=say,
        )
    else:
        name = opening.name or (check_name(Path(base).resolve().name, base) if is_run else base)
        if name in folders:
            raise UserError(f"two models are named '{name}'", where="--adapter", hint="give --name")
        paths = {adapter: str(folder) for adapter, folder in folders.items()}
        encoders = open_classifiers(
            base,
            name,
            paths,
            model=opening.model,
            precision=opening.precision,
            device=opening.device,
            trust_remote_code=trust,
            say=say,
        )
    return replace(encoders_served(encoders, name, base, limits), closed=encoders.close)


def open_served(base: str, folders: Mapping[str, Path], opening: Opening, *, say: Callable[[str], None]) -> Served:
    """A base model and its adapters, ready to serve.

    Args:
        base: names a model; or a run's or an adapter's folder, whose adapter is served under the folder's
            name.
        folders: adapters by name.

    Raises:
        UserError: the model or an adapter cannot be used, or the model writes no text.
    """
    folders, trust = dict(folders), opening.trust_remote_code
    if is_adapter(Path(base)):
        own = check_name(Path(base).resolve().name, base)
        if own in folders:
            raise UserError(f"two adapters are named '{own}'", where=base)
        folders[own] = Path(base)
        found = read_folder(Path(base), trust_remote_code=trust)
        base, named = found.base(opening.model), found.base_name(opening.model)
    else:
        base = named = opening.model or base
    name = opening.name or named
    if name in folders:
        raise UserError(f"'{name}' is the base model's name", where="--adapter", hint="give --name")
    session = open_run(base, precision=opening.precision, device=opening.device, trust_remote_code=trust, say=say)
    session.require_generation()
    room = opening.cache_bytes
    room = int(free_memory_bytes() * CACHE_SHARE) if room is None else room
    try:
        with working("preparing the decoder"):
            made = decodable(session.model, cache_bytes=room)
    except NotDecodable as reason:
        say(f"transformers decodes: {reason}")
        served = _by_transformers(base, name, folders, session, opening, say)
    else:
        served = _by_decoder(base, name, folders, session, made, room, opening)
    if not opening.page:
        return served
    return replace(served, routers=(page_router(),), open_paths=frozenset({"/"}))


def _by_decoder(
    base: str,
    name: str,
    folders: Mapping[str, Path],
    session: InferenceSession,
    made: Decodable,
    room: int,
    opening: Opening,
) -> Served:
    places = FactorPlaces(session.model, made.blocks, made.roles)
    pack = packing(places, made.decoder)
    bank = AdapterBank(session.model, session.tokenizer, pack, budget_bytes=opening.adapter_bytes)
    with working("loading adapters", len(folders)) as advance:
        for done, (adapter, folder) in enumerate(folders.items(), start=1):
            bank.add(adapter, folder)
            advance(done)
    engine = engine_over(made, session, bank, cache_bytes=room, limits=BatchLimits(running=opening.running))
    prompts = _PromptsOfBank(session, bank)

    def load() -> Load:
        now = engine.load
        return Load(now.running, now.waiting, now.pages_used, now.pages, bank.status().loaded)

    def close() -> None:
        engine.close(drain=False)
        bank.close()

    return Served(
        name, engine, prompts, reference=base, positions=engine.positions, shelf=bank, load=load, closed=close
    )


def _by_transformers(
    base: str,
    name: str,
    folders: Mapping[str, Path],
    session: InferenceSession,
    opening: Opening,
    say: Callable[[str], None],
) -> Served:
    if len(folders) > 1:
        raise UserError(
            f"this model has no decoder, and transformers serves one adapter: {len(folders)} are named",
            where="--adapter",
            hint="start a server for each, on a port of its own",
        )
    own = next(iter(folders), None)
    data: dict[str | None, TokenizerPrompts] = {None: TokenizerPrompts(session.tokenizer, session.data)}
    if own is not None:
        session = open_run(
            str(folders[own]),
            model=base,
            precision=opening.precision,
            device=opening.device,
            trust_remote_code=opening.trust_remote_code,
            say=say,
        )
        data[own] = TokenizerPrompts(session.tokenizer, session.data)
    ends = terminators(session.model, session.tokenizer)
    facts = AdapterFacts(session.virtual_tokens, None, tuple(ends))
    bank = FixedAdapters({} if own is None else {own: ActiveAdapter(1, facts)})
    work = FallbackWork(session, own)
    engine = Engine(work, session.tokenizer, terminators=ends, adapters=bank, own_adapter=own)

    def load() -> Load:
        now = engine.load
        return Load(now.running, now.waiting, adapters_loaded=len(folders))

    return Served(
        name,
        engine,
        data.__getitem__,
        reference=base,
        positions=engine.positions,
        load=load,
        closed=lambda: engine.close(drain=False),
    )


class _PromptsOfBank:
    """Prompts of the adapters that a bank has at the moment: each with its own template, and rendered as its
    rows were."""

    def __init__(self, session: InferenceSession, bank: AdapterBank) -> None:
        self._session = session
        self._bank = bank
        self._base = TokenizerPrompts(session.tokenizer, session.data)
        self._known: dict[str, tuple[FolderFacts, TokenizerPrompts]] = {}

    def __call__(self, adapter: str | None) -> Prompts:
        if adapter is None:
            return self._base
        facts = self._bank.facts(adapter)
        known = self._known.get(adapter)
        if known is not None and known[0] is facts:  # a swap brings other facts
            return known[1]
        data: DataSettings | None = None if facts.config is None else facts.config.data
        made = TokenizerPrompts(facts.tokenizer or self._session.tokenizer, data)
        if len(self._known) >= MOST_PROMPTS:
            self._known.clear()
        self._known[adapter] = (facts, made)
        return made
