"""The reward ``model``: scores of a reward model that ``task: sequence-classification`` trained on pairs of answers.

The model is loaded in the worker process of the reward, in addition to the model being trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from deltaw.data.bad_rows import raise_error
from deltaw.data.example import Example
from deltaw.data.prompts import with_answer
from deltaw.errors import UserError
from deltaw.inference.open_run import open_run
from deltaw.progress import ignore_line
from deltaw.runtime.padded import padded_rows
from deltaw.settings.data import DataSettings
from deltaw.tasks.classification.objective import LabelObjective
from deltaw.tasks.classification.rows import RewardReader, to_labeled_example
from deltaw.tasks.reward.rewards.functions import Completion, settings_location
from deltaw.tasks.reward.settings import RewardFunction
from deltaw.training.batchers import BatcherOptions, choose_label_batcher, text_positions


class RewardModel:
    """Scores completions with the configured model.

    Raises:
        UserError: if the model cannot be loaded, or is not a reward model.
    """

    def __init__(self, settings: RewardFunction) -> None:
        self._session = session = open_run(str(settings.model), log=ignore_line)
        if session.task.name != "sequence-classification" or len(session.classes or ()) != 1:
            hint = "train one with task: sequence-classification on rows with chosen and rejected"
            message = f"'{settings.model}' is not a reward model"
            raise UserError(message, location=settings_location(settings), hint=hint)
        run = None if session.adapter_folder is None else session.adapter_folder.run
        self._reader = RewardReader(DataSettings(train="") if run is None else run.data, session.tokenizer)
        self._objective = LabelObjective(session.model, session.task.name)
        limit = text_positions(session.model)
        self._limit = None if limit is None else limit - session.virtual_tokens

    def __call__(self, completions: Sequence[Completion]) -> list[float | None]:
        """Return the head's output for each prompt and completion, or None for an empty completion.

        Raises:
            BadRowError: if the prompt of a row cannot be rendered.
        """
        locations = [f"row {completion.row}" for completion in completions]
        pairs = zip(completions, locations, strict=True)
        records = [with_answer(dict(c.columns), c.text, location) for c, location in pairs]
        examples = []
        for index, encoded in enumerate(self._reader.encode(records, locations, raise_error)):
            if completions[index].text.strip() and encoded:
                prompt_length = encoded[-1].prompt_length
                tokens = np.asarray(encoded[-1].tokens[: self._limit], np.int32)
                row = Example(index, tokens, np.arange(len(tokens)) >= prompt_length, prompt_length, None)
                examples.append(self._session.example(to_labeled_example(row, 0.0)))
        rewards: list[float | None] = [None] * len(completions)
        if not examples:
            return rewards
        session = self._session
        options = BatcherOptions(str(session.model.device))
        batcher, _ = choose_label_batcher(session.model, examples, options, session.tokenizer)
        with torch.no_grad(), padded_rows(session.model):
            for batch in batcher.batches(examples):
                values = self._objective.predictions(batch).float().reshape(-1).tolist()
                for example, value in zip(batch.examples, values, strict=True):
                    rewards[example.row] = value
        return rewards
