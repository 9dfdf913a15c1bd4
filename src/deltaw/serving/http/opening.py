"""Open a base model and its adapters for an HTTP server.

The decoder and vLLM support any number of adapters. Other models run with transformers and at most one adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltaw.data.report import quoted
from deltaw.decoding.adapters import AdapterInfo, Adapters, unknown_adapter_error
from deltaw.decoding.attached_adapter import Packer
from deltaw.decoding.bank import AdapterBank
from deltaw.decoding.decodable import build_decodable
from deltaw.decoding.engine import Engine
from deltaw.decoding.opening import build_engine, cache_budget, fallback_engine, vllm_engine
from deltaw.decoding.probes import NotDecodable
from deltaw.decoding.vllm_engine import prefers_vllm
from deltaw.errors import UserError
from deltaw.hub.folders import adapter_folder, short_name
from deltaw.inference.open_run import open_run, run_precision
from deltaw.inference.opened_run import OpenedRun
from deltaw.inference.prompting import Prompting, read_prompting
from deltaw.kernels.torch_modules import direct_buffers, direct_parameters
from deltaw.machine.choices import choose_device
from deltaw.methods.trust import is_adapter, read_folder
from deltaw.progress import LogFunction, track_progress
from deltaw.serving.encoders import EncoderOptions, Encoders, detect_output_kind, open_classifiers, read_embedder
from deltaw.serving.http.encoders import serve_encoders
from deltaw.serving.http.page import page_router, trial_page
from deltaw.serving.http.prompts import TokenizerPrompts
from deltaw.serving.http.served import Served, TokenizedPrompts
from deltaw.serving.http.settings import Limits, check_name

# Number of tokenizers to cache. Each is small, but adapters can be replaced any number of times.
MAX_CACHED_PROMPTS = 1024
# Maximum size of the features of images.
IMAGE_BYTES = 1 << 29


@dataclass(frozen=True)
class OpenOptions:
    """Options of opening a served model.

    Args:
        model: Base model, if the folder of a run does not name it.
        trust_remote_code: Allow Python code of the model.
        name: Name of the base model in requests, or None for its reference.
        precision: Precision of the weights.
        device: Device of the model.
        sampler: Library that generates on a GPU.
        page: Serve a web page at ``/``.
        system: Add the system prompt of a run's rows to chat requests without one.
        pooling: Pooling of an embedding model.
        normalize: Normalize the vectors of an embedding model.
        running: Maximum number of running completions.
        cache_bytes: Memory for keys and values, or None for a fraction of the free memory.
        adapter_bytes: Memory for adapters.
    """

    model: str | None = None
    trust_remote_code: bool = False
    name: str | None = None
    precision: str = "auto"
    device: str = "auto"
    sampler: str = "auto"
    page: bool = True
    system: bool = True
    pooling: str = "auto"
    normalize: bool = True
    running: int = 64
    cache_bytes: int | None = None
    adapter_bytes: int = 10**9

    @property
    def loading_options(self) -> EncoderOptions:
        """Keyword arguments for loading a model."""
        return {"precision": self.precision, "device": self.device, "trust_remote_code": self.trust_remote_code}


def open_any(base: str, folders: Mapping[str, Path], options: OpenOptions, limits: Limits, log: LogFunction) -> Served:
    """Open a model of any kind: text generation, embedding, classification or reranking.

    Args:
        base: Reference of a model, a run or an adapter.
        folders: Adapter folders by name.
        options: Options.
        limits: Limits of requests.
        log: Receives progress lines.

    Raises:
        UserError: if the model or an adapter cannot be used.
    """
    folders = {name: adapter_folder(folder) for name, folder in folders.items()}
    is_run = is_adapter(fetched := adapter_folder(base, required=False))  # the folder of a run declares its task
    base = str(fetched) if is_run else base
    kind = detect_output_kind(base if is_run else options.model or base, **options.loading_options)
    if kind == "text":
        return open_served(base, folders, options, log=log)
    name = options.name or (check_name(short_name(Path(base)), base) if is_run else base)
    if kind == "vectors":
        if folders:
            raise UserError("an embedding model cannot be served with adapters", location="--adapter")
        loading: Any = {"pooling": options.pooling, "normalize": options.normalize, **options.loading_options}
        encoders = Encoders({name: read_embedder(base, log=log, **loading)})
    else:
        if name in folders:
            raise UserError(f"two models are named '{name}'", location="--adapter", hint="use --name")
        paths = {adapter: str(folder) for adapter, folder in folders.items()}
        encoders = open_classifiers(base, name, paths, model=options.model, log=log, **options.loading_options)
    served = serve_encoders(encoders, name, base, limits)
    if not options.page:
        return served
    page = page_router(document=trial_page(kind))
    return replace(served, routers=(*served.routers, page), open_paths=frozenset({"/"}))


def open_served(base: str, folders: Mapping[str, Path], options: OpenOptions, *, log: LogFunction) -> Served:
    """Open a base model that generates text, and its adapters.

    Args:
        base: Reference of a model, or the folder of a run or an adapter. That adapter is served under the folder's
            name.
        folders: Adapter folders by name.
        options: Options.
        log: Receives progress lines.

    Raises:
        UserError: if the model or an adapter cannot be used, or the model does not generate text.
    """
    folders = dict(folders)
    if is_adapter(Path(base)):
        adapter_name = check_name(short_name(Path(base)), base)
        if adapter_name in folders:
            raise UserError(f"two adapters are named '{adapter_name}'", location=base)
        folders[adapter_name] = Path(base)
        run_folder = read_folder(Path(base), trust_remote_code=options.trust_remote_code)
        # Without the calibration of the folder, int8 weights are less accurate than the default. A GPU uses none.
        is_usable = choose_device(options.device).value != "cpu" or getattr(run_folder.run, "precision", "") != "int8"
        if run_folder.run is not None and options.model is None and is_usable:
            options = replace(options, precision=run_precision(run_folder.run, options.precision, options.device, log))
        base = run_folder.base(options.model)
        base_name = run_folder.base_name(options.model)
    else:
        base = base_name = options.model or base
    name = options.name or base_name
    if name in folders:
        raise UserError(f"'{name}' is the base model's name", location="--adapter", hint="use --name")
    loading: Any = {"log": log, "sampler": options.sampler, **options.loading_options}
    session = open_run(base, **loading)
    session.require_generation()
    budget = cache_budget(options.cache_bytes)
    bank: AdapterBank | None = None
    prompts: Callable[[str | None], TokenizedPrompts]
    engine: Engine | None = None

    def prompting(model: str | None) -> Prompting:
        if model in (None, name):
            return read_prompting(Path(base))
        if bank is None and model not in folders:
            raise unknown_adapter_error(model, folders)
        return read_prompting(folders[model] if bank is None else bank.info(model).folder)

    added_prompting = prompting if options.system else lambda model: Prompting()
    try:
        with track_progress("preparing the decoder"):
            if prefers_vllm(session):
                engine = vllm_engine(session, None, folders, options.cache_bytes)
            else:
                result = build_decodable(session.model, cache_bytes=budget)
    except NotDecodable as reason:
        session, engine, prompts = _transformers_engine(session, base, folders, loading, reason, added_prompting)
    else:
        if engine is None:
            packer = Packer(session.model, result)
            bank = AdapterBank(session.model, session.tokenizer, packer, budget_bytes=options.adapter_bytes)
            _load_adapters(bank, folders)
            engine = build_engine(result, session, bank, cache_bytes=budget, running=options.running)
        else:
            log(engine.why)
        prompts = _prompts_of_bank(session, engine.bank, added_prompting)
    close = functools.partial(engine.close, drain=False)
    images = session.task.images
    if images is not None:
        images.limit_bytes = IMAGE_BYTES
    served = Served(name, engine, prompts, base, engine.positions, bank, lambda: engine.load, close, images=images)
    systems = (prompting(model).system for model in [name, *folders])
    if (system := next(filter(None, systems), None)) is not None:
        use = "added to chats without one; --no-system: not" if options.system else "not added by the API"
        log(f"system prompt of the rows: {quoted(system, 24)} ({use})")
    if not options.page:
        return served
    return replace(served, routers=(page_router(prompting, images=images is not None),), open_paths=frozenset({"/"}))


def _load_adapters(bank: AdapterBank, folders: Mapping[str, Path]) -> None:
    with track_progress("loading adapters", len(folders)) as advance:
        for done, (name, folder) in enumerate(folders.items(), start=1):
            bank.add(name, folder)
            advance(done)


def _transformers_engine(
    session: OpenedRun,
    base: str,
    folders: Mapping[str, Path],
    loading: dict[str, Any],
    reason: NotDecodable,
    prompting: Callable[[str | None], Prompting],
) -> tuple[OpenedRun, Engine, Callable[[str | None], TokenizedPrompts]]:
    """Open a model and at most one adapter that transformers runs, and return its session, engine and tokenizers.

    Raises:
        UserError: if there are several adapters.
    """
    if len(folders) > 1:
        message = f"{reason}, and transformers serves one adapter, not {len(folders)}"
        hint = "start one server per adapter, on different ports"
        raise UserError(message, location="--adapter", hint=hint) from reason
    if folders:  # free the base model, which is loaded again with the adapter
        for module in session.model.modules():  # layers of bitsandbytes cannot be moved to the meta device
            direct_parameters(module).clear()
            direct_buffers(module).clear()
    sessions: dict[str | None, OpenedRun] = {None: session}
    for adapter, folder in folders.items():
        session = open_run(str(folder), model=base, **loading)
        sessions[adapter] = session
    images = session.task.images
    data = {
        name: TokenizerPrompts(each.tokenizer, each.data, images, prompting(name)) for name, each in sessions.items()
    }
    engine = fallback_engine(session, next(iter(folders), None), reason, loading["log"])
    return session, engine, data.__getitem__


def _prompts_of_bank(
    session: OpenedRun, bank: Adapters, prompting: Callable[[str | None], Prompting]
) -> Callable[[str | None], TokenizedPrompts]:
    """Return the tokenizers of a bank's adapters. Each has a chat template and renders as its training rows."""
    images = session.task.images
    base_prompts = TokenizerPrompts(session.tokenizer, session.data, images, prompting(None))

    @functools.lru_cache(MAX_CACHED_PROMPTS)
    def adapter_prompts(name: str, info: AdapterInfo) -> TokenizedPrompts:  # a swapped adapter has a new AdapterInfo
        data = None if info.config is None else info.config.data
        return TokenizerPrompts(info.tokenizer or session.tokenizer, data, images, prompting(name))

    return lambda adapter: base_prompts if adapter is None else adapter_prompts(adapter, bank.info(adapter))
