"""Train, plan and generate in one forked process per removed private name of torch or transformers.

Run by ``test_private_apis.py``. The libraries are imported once, and each fork imports deltaw itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

import accelerate  # noqa: F401 - imported once, before the forks
import datasets  # noqa: F401
import pyarrow.parquet  # noqa: F401
import pydantic  # noqa: F401
import torch._dynamo
import torch.distributed.tensor  # noqa: F401
import transformers.conversion_mapping
import transformers.models.llama.modeling_llama  # noqa: F401

from deltaw import errors as private_apis


def without(names: list[str]) -> None:
    """Make lookups of these names return None."""
    look_up = private_apis.look_up

    def missing(owner: object, path: str) -> object:
        return None if not set(names).isdisjoint(path.split(".")) else look_up(owner, path)

    private_apis.look_up = missing


def run(settings: dict) -> dict[str, object]:
    """Return the results of training, planning and generating, or the error messages."""
    import deltaw
    from deltaw import cli
    from deltaw.errors import UserError

    results: dict[str, object] = {}
    for key, call in (
        ("plan", lambda: deltaw.plan(settings).peak_bytes),
        ("loss", lambda: deltaw.fit(settings).as_dict()["train_loss"]),
    ):
        try:
            results[key] = call()
        except (UserError, RuntimeError) as error:
            results[key] = f"{type(error).__name__}: {error}"
    if isinstance(results["loss"], float):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            flags = ["-p", "paint it red", "--max-new-tokens", "6", "--precision", "fp32", "--json"]
            cli.main(["generate", settings["output"], *flags])
        results["text"] = json.loads(output.getvalue())["completions"]
    return results


def main() -> None:
    """Run ``python -m tests.private_run FOLDER CASES``. CASES is a JSON list of (settings, names), one result file per
    case.
    """
    folder = Path(sys.argv[1])
    for number, (settings, names) in enumerate(json.loads(sys.argv[2])):
        if not os.fork():
            try:
                os.environ["DELTAW_CACHE"] = str(folder / f"cache-{number}")  # plans are cached
                without(names)
                result = run({**settings, "output": str(folder / f"run-{number}")})
            except BaseException:
                result = {"fault": traceback.format_exc()}
            (folder / f"{number}.json").write_text(json.dumps(result))
            os._exit(0)
        os.wait()


if __name__ == "__main__":
    main()
