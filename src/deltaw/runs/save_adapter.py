"""Saving of the adapter of a run, with the names of its classes and its prompting."""

from __future__ import annotations

import json
from pathlib import Path

from deltaw.hub.app_stores import is_store_reference
from deltaw.hub.folders import resolve
from deltaw.hub.packages import is_package_reference
from deltaw.hub.sentence_layout import layout_files
from deltaw.inference.prompting import Prompting, prompting_of, write_prompting
from deltaw.methods.base import CLASSES_KEY
from deltaw.runtime.image_tokens import statistics_folded
from deltaw.training.preparation import save_calibration
from deltaw.training.session import Session


def save_adapter(session: Session, folder: Path) -> None:
    """Save the adapter with the names of its classes and its prompting.

    Folders in the format of sentence-transformers get the path of a base model inside a package or a store, because
    other programs cannot resolve its reference.
    """
    classes = session.data.classes
    metadata = {} if classes is None else {CLASSES_KEY: json.dumps(list(classes))}
    metadata |= session.task.adapter_metadata(session.model)
    folder.mkdir(parents=True, exist_ok=True)
    session.task.save_extra_files(session.model, folder)
    base = session.config.model
    if layout_files(folder) and (is_package_reference(base) or is_store_reference(base)):
        base = str(resolve(base).path)
    with statistics_folded(session.model), session.task.saved_form(session.model):
        session.method.save(session.model, folder, base_model=base, metadata=metadata)
    tokenizer = session.task.tokenizer
    writes = session.task.generates_text
    prompting = prompting_of(tokenizer, session.data, session.config.data) if tokenizer and writes else Prompting()
    write_prompting(folder, prompting)
    save_calibration(folder, session.identity, session.roundings)
