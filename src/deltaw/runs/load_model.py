"""Loading of the model of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deltaw.data.row_reader import RunData
from deltaw.hub.loading import LoadedModel, load
from deltaw.machine.choices import UNTESTED_GPU, Choice
from deltaw.progress import Detail, LogFunction, ignore_line
from deltaw.settings.config import RunConfig
from deltaw.training.parallel.joining import sharded_loader, threads_of
from deltaw.training.reducer import SINGLE_PROCESS, Reducer
from deltaw.training.task import Task


def load_model(
    config: RunConfig,
    task: Task[Any],
    data: RunData,
    log: LogFunction = ignore_line,
    choose: Callable[[str, Choice[Any]], None] | None = None,
    *,
    processes: Reducer = SINGLE_PROCESS,
) -> LoadedModel:
    """Load the model of a run. A classification head is initialized with the run's seed."""
    torch.manual_seed(config.train.seed)
    loaded = load(
        config.model,
        precision=config.precision,
        device=config.device,
        threads=threads_of(config, processes),
        task=config.task,
        num_labels=task.num_outputs(data),
        trust_remote_code=config.trust_remote_code,
        log=log,
        weights=sharded_loader(config, processes),
    )
    choose = choose or (lambda name, choice: log(Detail(f"{name}: {choice}")))
    for name, choice in loaded.choices.items():
        choose(name, choice)
    if loaded.choices["device"].value != "cpu":
        log(UNTESTED_GPU)
    if loaded.kernels is not None and (faster := loaded.kernels.faster_precision(config.precision)) is not None:
        log(faster)
    return loaded
