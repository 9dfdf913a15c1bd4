"""Training runs of tiny models that call the training loop directly."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from deltaw.data.example import Example
from deltaw.lora import LoRAConfig
from deltaw.methods.lora import LoRA
from deltaw.methods.settings import RandomSettings
from deltaw.methods.single_weights import Random
from deltaw.methods.whole_parameters import Bias, Full
from deltaw.runtime.packed import packed_rows
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.loop import train
from tests.tiny_models import VOCABULARY, causal_model

METHODS = {"lora": lambda: LoRA(LoRAConfig(rank=4, alpha=8))}
METHODS |= {"lora with dropout": lambda: LoRA(LoRAConfig(rank=4, alpha=8, dropout=0.3))}
METHODS |= {"lora plus": lambda: LoRA(LoRAConfig(rank=4, alpha=8), loraplus_lr_ratio=4.0), "bias": lambda: Bias(None)}
METHODS |= {"full": lambda: Full(None), "random": lambda: Random(RandomSettings(weights=0.05))}
SPLIT = CausalMicroBatcher(40, True, False, "cpu")
SETTINGS = {"learning_rate": 1e-2, "total_steps": 10, "batch_size": 4, "seed": 5, "schedule": "cosine", "warmup": 0.2}


def example(number, tokens, first_label, **more):
    """Return an example whose labels start at ``first_label``, the end of its prompt."""
    ids = np.asarray(tokens, np.int32)
    return Example(number, ids, np.arange(len(ids)) >= first_label, first_label, None, **more)


def examples(count=7, seed=0):
    """Return rows with one common prefix and different completions, which are the labels."""
    random = np.random.default_rng(seed)
    stem = random.integers(3, VOCABULARY, 6)
    endings = ((number, random.integers(3, VOCABULARY, 2 + number % 3)) for number in range(count))
    return [example(number + 1, [*stem, *end], 6) for number, end in endings]


def randomize_lora_b(model, scale, seed=1):
    """Fill the adapter's B factors with random values and return the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=scale, generator=generator)
    return model


class Training:
    """A repeatable training run with its results.

    Attributes:
        steps: Reports of the steps so far.
        outcome: Result of the run.
        states: Training states by step, for the steps in ``save_steps``.
    """

    def __init__(self, method="lora with dropout", family="qwen3", dtype=torch.float32, rows=11, batcher=SPLIT, **more):
        self.model = causal_model(family).to(dtype)
        self.method = METHODS[method]()
        self.method.prepare(self.model, seed=0)
        self.trained = dict(self.method.parameters(self.model))
        self.initial_weights = {name: weight.clone() for name, weight in self.weights().items()}
        with self.method.evaluating(self.model):
            self.objective = CausalObjective(self.model)
        self.rows = examples(rows)
        self.batcher = batcher
        self.settings = SETTINGS | more
        self.steps = []
        self.states = {}

    def run(self, checkpoint=None, save_steps=(), should_stop=lambda: False, on_step=lambda step: None):
        def on_begin(state):
            self.state = state

        def record(step):
            self.steps.append(step)
            on_step(step)
            if step.step in save_steps:
                self.states[step.step] = self.state.state()

        with contextlib.nullcontext() if self.batcher.padded else packed_rows(self.model):
            self.outcome = train(
                self.objective,
                [*self.trained.values()],
                self.rows,
                self.batcher,
                names=[*self.trained],
                rate_factors=[self.method.rate_factor(name) for name in self.trained],
                after_step=lambda: self.method.after_step(self.model),
                checkpoint=checkpoint,
                on_begin=on_begin,
                on_step=record,
                should_stop=should_stop,
                **self.settings,
            )
        return self

    def run_until(self, count):
        return self.run(save_steps=(count,), should_stop=lambda: len(self.steps) >= count)

    def weights(self):
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}
