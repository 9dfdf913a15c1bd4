"""An adapter whose initialization changed its base's weights (PiSSA, OLoRA), as a plain one.

Such an adapter, saved by PEFT as it was trained, belongs to W − s·A₀·B₀, where A₀ and B₀ follow from W. They
are found by loading the base model; the plain adapter of twice the rank then goes the way of all others. One
that deltaw saved is plain already.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deltaw.export.base import Base, Say
from deltaw.hub.loading import load
from deltaw.lora import load_adapter, save_adapter
from deltaw.lora.config import CHANGING_INITS
from deltaw.methods.files import read_config


@contextlib.contextmanager
def plain_adapter(folder: Path, base: Base, say: Say) -> Iterator[Path]:
    """Yield ``folder``, or one with the same adapter in plain form that is gone afterwards."""
    init = read_config(folder).get("init_lora_weights")
    if not isinstance(init, str) or init not in CHANGING_INITS:
        yield folder
        return
    say(
        f"the adapter was initialized with '{init}', which took a share out of W: the base model is loaded "
        "to find it"
    )
    loaded = load(
        str(base.folder),
        precision="fp32",
        device="cpu",
        task=base.task,
        num_labels=base.outputs,
        trust_remote_code=base.trust_remote_code,
        say=lambda line: None,
    )
    load_adapter(loaded.model, folder)
    with tempfile.TemporaryDirectory(prefix="deltaw-plain-") as made:
        save_adapter(loaded.model, made, base_model=base.reference)
        del loaded
        yield Path(made)
