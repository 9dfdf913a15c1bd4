"""The reward ``model``: what a reward model gives each completion, one that ``task: sequence-classification`` trained
on pairs of answers.

It is loaded in the reward's own process, beside the model that is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deltaw.data.example import Example
from deltaw.data.prompts import answered
from deltaw.data.report import refuse
from deltaw.data.reward_pairs import RewardReader, labeled
from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from deltaw.runtime.packed import padded_rows
from deltaw.task_settings import RewardFunction
from deltaw.training.callbacks import silent
from deltaw.training.origin import open_run
from deltaw.training.rewards.base import Scored, place_of
from deltaw.training.tasks.labels import LabelObjective, choose_label_batcher, text_positions


class RewardModel:
    """Scores completions with the model that the settings name.

    Raises:
        UserError: it cannot be loaded, or is no reward model.
    """

    def __init__(self, settings: RewardFunction) -> None:
        self._session = session = open_run(str(settings.model), say=silent)
        if session.task.name != "sequence-classification" or len(session.classes or ()) != 1:
            hint = "train one with task: sequence-classification on rows with chosen and rejected"
            raise UserError(f"'{settings.model}' is no reward model", where=place_of(settings), hint=hint)
        run = None if session.found is None else session.found.run
        self._reader = RewardReader(DataSettings(train="") if run is None else run.data, session.tokenizer)
        self._objective = LabelObjective(session.model, session.task.name)
        limit = text_positions(session.model)
        self._limit = None if limit is None else limit - session.virtual_tokens

    def __call__(self, given: Sequence[Scored]) -> list[float | None]:
        """The head's output for each completion behind its prompt; None for one without text.

        Raises:
            BadRowError: a row's prompt cannot be rendered.
        """
        places = [f"row {one.row}" for one in given]
        records = [answered(dict(one.columns), one.text, where) for one, where in zip(given, places, strict=True)]
        examples = []
        for place, encoded in enumerate(self._reader.encode(records, places, refuse)):
            if given[place].text.strip() and encoded:
                tokens, begin = np.asarray(encoded[-1].tokens[: self._limit], np.int32), encoded[-1].prompt_length
                row = Example(place, tokens, np.arange(len(tokens)) >= begin, begin, None)
                examples.append(self._session.example(labeled(row, 0.0)))
        found: list[float | None] = [None] * len(given)
        if not examples:
            return found
        session = self._session
        how: dict[str, Any] = {"device": str(session.model.device), "tokenizer": session.tokenizer}
        batcher, _ = choose_label_batcher(session.model, examples, **how)
        with torch.no_grad(), padded_rows(session.model):
            for batch in batcher.batches(examples):
                values = self._objective.predictions(batch).float().reshape(-1).tolist()
                for example, value in zip(batch.examples, values, strict=True):
                    found[example.row] = value
        return found
