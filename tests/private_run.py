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

import datasets  # noqa: F401 - imported once, before the forks
import pyarrow.parquet  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401

import deltaw.private_names as private_names
from tests.byte_models import saved, tiny_llama


def without(names: list[str]) -> None:
    """Let these names be gone, for whoever looks them up from now on."""
    look_up = private_names.look_up

    def missing(owner: object, path: str) -> object:
        return None if not set(names).isdisjoint(path.split(".")) else look_up(owner, path)

    private_names.look_up = missing


def run(folder: Path, output: Path, method: str) -> dict[str, object]:
    """What training, planning and writing come to: numbers and texts, or what is said against them."""
    import deltaw
    from deltaw import cli
    from deltaw.errors import UserError

    told: dict[str, object] = {}
    settings = {
        "model": str(folder / "model"),
        "data": {"train": str(folder / "rows.jsonl"), "eval": 2},
        "method": method,
        "train": {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 1},
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
        "output": str(output),
    }
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
            flags = ["--max-new-tokens", "6", "--precision", "fp32", "--json"]
            cli.main(["generate", str(output), "-p", "paint it red", *flags])
        told["text"] = json.loads(said.getvalue())["completions"]
    return told


def main() -> None:
    """``python -m tests.private_run FOLDER CASES``: a file of JSON for each case, a method and some names."""
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    saved(tiny_llama(initializer_range=0.3), folder / "model")
    colors = ("red", "blue", "green", "black", "white", "pink", "gray", "teal", "cyan", "gold")
    rows = "".join(json.dumps({"prompt": f"paint it {c}", "completion": c[0]}) + "\n" for c in colors)
    (folder / "rows.jsonl").write_text(rows)
    for number, (method, names) in enumerate(cases):
        if not os.fork():
            try:
                os.environ["DELTAW_CACHE"] = str(folder / f"cache-{number}")  # plans are remembered
                without(names)
                answer = run(folder, folder / f"run-{number}", method)
            except BaseException:
                answer = {"fault": traceback.format_exc()}
            (folder / f"{number}.json").write_text(json.dumps(answer))
            os._exit(0)
        os.wait()


if __name__ == "__main__":
    main()
