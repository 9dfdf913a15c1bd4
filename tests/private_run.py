"""A short training, a plan and a text, in a process for each name that torch or transformers might drop.

Run by ``test_private_names.py``: the libraries are imported once, deltaw anew in a fork for each name.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

import accelerate  # noqa: F401 - these are imported once, before the forks
import datasets  # noqa: F401
import pyarrow.parquet  # noqa: F401
import pydantic  # noqa: F401
import torch._dynamo
import torch.distributed.tensor  # noqa: F401
import transformers.conversion_mapping
import transformers.models.llama.modeling_llama  # noqa: F401

import deltaw.private_names as private_names


def without(names: list[str]) -> None:
    """Let these names be gone, for whoever looks them up from now on."""
    look_up = private_names.look_up

    def missing(owner: object, path: str) -> object:
        return None if not set(names).isdisjoint(path.split(".")) else look_up(owner, path)

    private_names.look_up = missing


def run(settings: dict) -> dict[str, object]:
    """What training, planning and writing come to: numbers and texts, or what is said against them."""
    import deltaw
    from deltaw import cli
    from deltaw.errors import UserError

    told: dict[str, object] = {}
    for what, call in (
        ("plan", lambda: deltaw.plan(settings).peak_bytes),
        ("loss", lambda: deltaw.fit(settings).as_dict()["train_loss"]),
    ):
        try:
            told[what] = call()
        except (UserError, RuntimeError) as error:
            told[what] = f"{type(error).__name__}: {error}"
    if isinstance(told["loss"], float):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            flags = ["-p", "paint it red", "--max-new-tokens", "6", "--precision", "fp32", "--json"]
            cli.main(["generate", settings["output"], *flags])
        told["text"] = json.loads(said.getvalue())["completions"]
    return told


def main() -> None:
    """``python -m tests.private_run FOLDER CASES``: a file of JSON for each case, which is settings and some names."""
    folder = Path(sys.argv[1])
    for number, (settings, names) in enumerate(json.loads(sys.argv[2])):
        if not os.fork():
            try:
                os.environ["DELTAW_CACHE"] = str(folder / f"cache-{number}")  # plans are remembered
                without(names)
                answer = run({**settings, "output": str(folder / f"run-{number}")})
            except BaseException:
                answer = {"fault": traceback.format_exc()}
            (folder / f"{number}.json").write_text(json.dumps(answer))
            os._exit(0)
        os.wait()


if __name__ == "__main__":
    main()
