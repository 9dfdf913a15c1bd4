"""From references to encoders and classifiers by name: what is loaded, and how it is called in requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from transformers import PretrainedConfig

from deltaw import tasks
from deltaw.config import DEFAULT_TASK
from deltaw.errors import UserError
from deltaw.host.choices import choose_device, choose_precision
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import load, read_config
from deltaw.serving.encoders import Classifier, Embedder, Encoders, RowModel, share_weights
from deltaw.serving.pooling import pooling_of
from deltaw.training.inference import open_run
from deltaw.training.origin import is_adapter, read_folder
from deltaw.training.tasks.labels import own_outputs

Serves = Literal["text", "vectors", "classes"]
Say = Callable[[str], None]


def what_it_serves(
    reference: str, *, precision: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> Serves:
    """What a run or a model gives: text, vectors of texts, or classes of texts.

    A run and an adapter say it by their task, a model by the name of its architecture: what has no head, or a
    head for filling in masked words, gives vectors.
    """
    folder = Path(reference)
    if is_adapter(folder):
        task = read_folder(folder, trust_remote_code=trust_remote_code).task
        return "text" if tasks.entry_of(task).writes_text else "classes"
    config = _config(reference, precision, device, trust_remote_code)
    named = str((getattr(config, "architectures", None) or [""])[0])
    if named.endswith("ForSequenceClassification"):
        return "classes"
    return "vectors" if named.endswith(("Model", "ForMaskedLM", "ForPreTraining")) else "text"


def open_embedder(
    reference: str,
    name: str,
    *,
    pooling: str = "auto",
    normalize: bool = True,
    precision: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    say: Say = lambda line: None,
) -> Encoders:
    """An encoder under its name.

    Raises:
        UserError: it has no tokenizer, or is a decoder and no pooling is asked for.
    """
    loaded = load(
        reference,
        task="features",
        precision=precision,
        device=device,
        trust_remote_code=trust_remote_code,
        say=say,
    )
    if loaded.tokenizer is None:
        raise UserError("the model's folder holds no tokenizer", where=reference)
    way, why = pooling_of(loaded.model, loaded.folder, pooling)
    say(f"vectors: {way} of a row's tokens ({why}), {'of length 1' if normalize else 'not normalized'}")
    return Encoders({name: Embedder(loaded.model, loaded.tokenizer, way, normalize)})


def open_classifiers(
    base: str,
    name: str,
    adapters: Mapping[str, str],
    *,
    model: str | None = None,
    precision: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    say: Say = lambda line: None,
) -> Encoders:
    """A classifier and its adapters, each under its name.

    Args:
        base: a model or a run; a run's adapter is called ``name``, or as in ``adapters``.
        adapters: folders by name, all for this base model.
        model: the base model, where a run's folder does not name it.

    Raises:
        UserError: nothing of it classifies texts: a model without a head needs an adapter that brings one.
    """
    is_run = is_adapter(Path(base))
    folders = {name: base, **adapters} if is_run else dict(adapters)
    model = model if is_run else base
    how = {"precision": precision, "device": device}
    models: dict[str, RowModel] = {}
    opened = []
    for adapter, folder in folders.items():
        session = open_run(folder, model=model, trust_remote_code=trust_remote_code, say=say, **how)
        opened.append(session)
        models[adapter] = Classifier(session)
        say(f"{adapter}: {', '.join(session.classes or ())}")
    if not is_run and own_outputs(_config(base, precision, device, trust_remote_code)) is not None:
        task = "sequence-classification"
        bare = open_run(base, task=task, trust_remote_code=trust_remote_code, say=say, **how)
        opened.append(bare)
        models[name] = Classifier(bare)
    if not models:
        raise UserError(
            "the model has no head for classes", where=base, hint="name an adapter with --adapter name=folder"
        )
    saved = share_weights([session.model for session in opened])
    if saved:
        say(f"{len(opened)} classifiers share {saved / 2**20:,.0f} MB of weights")
    return Encoders(models)


def _config(reference: str, precision: str, device: str, trust_remote_code: bool) -> PretrainedConfig:
    dtype = choose_precision(choose_device(device).value, precision).value
    folder = config_folder(reference, dtype, trust_remote_code)
    return read_config(folder, DEFAULT_TASK, None, trust_remote_code)
