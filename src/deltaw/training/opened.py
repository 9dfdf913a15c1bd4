"""A finished run, or a bare model, opened for use: evaluation, generation, chat."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.config import RunConfig
from deltaw.data.prepare import DataSettings
from deltaw.errors import UserError
from deltaw.lora import disabled, load_adapter
from deltaw.models.loading import LoadedModel, load
from deltaw.training.run_folder import SETTINGS

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Opened:
    """A model ready to answer.

    Attributes:
        config: the run's settings; None where the reference is not a run of deltaw's.
        adapter: whether an adapter is on the model.
    """

    loaded: LoadedModel
    tokenizer: PreTrainedTokenizerBase
    config: RunConfig | None
    adapter: bool

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def data(self) -> DataSettings | None:
        """How the run read its rows; None where it is not known."""
        return self.config.data if self.config is not None else None

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """While open, the model answers as it did before it was trained."""
        if self.adapter:
            with disabled(self.model):
                yield
        else:
            yield


def open_run(
    reference: str,
    *,
    model: str | None = None,
    precision: str = "auto",
    device: str = "auto",
    say: Callable[[str], None],
) -> Opened:
    """Load a run's folder (base model and adapter), an adapter of PEFT's, or a bare model.

    Args:
        reference: a folder with an adapter, else anything that names a model.
        model: the base model, where it is not the one that the folder names.
    """
    folder = Path(reference)
    adapter = (folder / ADAPTER_CONFIG).is_file()
    if not adapter and (folder / SETTINGS).is_file():
        raise UserError(
            "the run has no adapter: it did not get as far as its end",
            where=str(folder),
            mend=f"train it again: deltaw train {folder / SETTINGS}",
        )
    config = RunConfig.read(folder / SETTINGS) if adapter and (folder / SETTINGS).is_file() else None
    if not adapter:
        base = model or reference
    else:
        base = model or (config.model if config is not None else _base_of(folder))
    loaded = load(
        base,
        precision=precision,
        device=device,
        trust_remote_code=config.trust_remote_code if config is not None else False,
        say=say,
    )
    if loaded.tokenizer is None:
        raise UserError("the model has no tokenizer", where=base, mend="copy its tokenizer.json there")
    if adapter:
        say(f"{load_adapter(loaded.model, folder).adapted} layers are adapted by {folder}")
    return Opened(loaded, loaded.tokenizer, config, adapter)


def _base_of(folder: Path) -> str:
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{ADAPTER_CONFIG} cannot be read: {error}", where=str(folder), mend="save the adapter again"
        ) from error
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not base:
        raise UserError(
            "the adapter does not say which model it belongs to",
            where=str(folder / ADAPTER_CONFIG),
            mend="name the base model with --model",
        )
    return str(base)
