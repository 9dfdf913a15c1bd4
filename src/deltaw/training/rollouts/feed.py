"""Rollouts: before a step, the model writes completions of its prompts, which are rewarded and then trained on.

A step's prompts come in an order that the seed decides, as rows do elsewhere; :class:`RolloutFeed` puts completions in
their place. The completions follow from the model, the seed and the step alone, so that a training that was stopped
within a rollout writes the same ones again. Knows no engine: what samples is handed in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaw.data.prompts import Prompt
from deltaw.errors import UserError
from deltaw.hub.loading import has_values
from deltaw.runtime.generation import Drawing, Drawn, seed_of
from deltaw.task_settings import RewardSettings
from deltaw.training.evaluation.base import mean_interval
from deltaw.training.losses import RowLogProbs
from deltaw.training.microbatches import Feed
from deltaw.training.parallel.reducer import ALONE, Reducer
from deltaw.training.rollouts.kept import KeptRollouts, rollouts_in
from deltaw.training.rollouts.losses import PolicyLoss, Rollout, advantages
from deltaw.training.rollouts.scoring import Rewarded, Scorer
from deltaw.training.rollouts.turns import OneTurn, Turns
from deltaw.working import working

if TYPE_CHECKING:
    from deltaw.training.tasks.causal_objective import CausalObjective


class RolloutFeed(Feed):
    """Feeds completions of a step's prompts.

    Args:
        objective, batcher: of the completions, with a :class:`PolicyLoss`.
        write: writes completions of the model as it is at each call; None for a dry run.
        settings: the ``reward:`` section. seed: of the training.
        base: while open, the model is the base model. processes: that train together.

    Attributes:
        scorer: rewards completions. extremes: the best and the worst ones of the last rollout.
    """

    def __init__(
        self,
        objective: CausalObjective,
        batcher: Any,
        write: OneTurn | Turns | None,
        settings: RewardSettings,
        *,
        seed: int,
        base: Callable[[], AbstractContextManager[None]],
        processes: Reducer = ALONE,
    ) -> None:
        super().__init__(objective, batcher)
        self.settings, self.write = settings, write
        self._seed, self._base, self._processes = seed, base, processes
        self.scorer = Scorer(settings)
        self.extremes: list[Rewarded] = []
        self._rollouts: tuple[int, list[Rollout]] = (-1, [])
        self._kept: KeptRollouts | None = None

    def expand(self, prompts: Sequence[Prompt], step: int) -> tuple[list[Rollout], bool]:
        """The completions of a step, those of a prompt one after another, and whether any teaches something.

        Args:
            prompts: of the step. step: its number, from 0.

        Raises:
            UserError: a reward function fails.
        """
        settings = self.settings
        if not has_values(self.objective.model):  # type: ignore[attr-defined]
            return self.longest(prompts), True
        drawn_at = step // settings.updates
        if self._rollouts[0] != drawn_at:
            self._rollouts = drawn_at, self._kept_at(step) or self._drawn(prompts, drawn_at)
            if self._kept is not None:
                self._kept.keep(*self._rollouts)
        rows = self._rollouts[1]
        return rows, any(map(self._teaches, rows))

    def keep_in(self, folder: Path) -> None:
        if self.settings.updates > 1:
            self._kept = KeptRollouts(folder, self.settings.updates)

    def _kept_at(self, step: int) -> list[Rollout]:
        """The completions of a rollout that was stopped between its updates, as process 0 has them; none otherwise."""
        if not step % self.settings.updates:
            return []
        text = "" if self._kept is None else self._kept.text(step // self.settings.updates)
        first = self._processes.texts(text)[0]
        if not first:
            what = f"the completions that step {step + 1} learns from, once more, are not in the run's folder"
            raise UserError(what, where="rollouts", hint="restore the folder from a copy, or begin anew with --fresh")
        return rollouts_in(first)

    def longest(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """What a step's completions are at most, for a dry run: as long as may be, and no two with a shared prefix
        behind the prompt."""
        length = self.settings.most_tokens
        logprobs = np.zeros(length, np.float32)
        group = [Drawn(np.full(length, n, np.int64), "", None, logprobs) for n in range(self.settings.group)]
        return [_rollout(prompt, one) for prompt in prompts for one in group]

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        """The microbatches of those completions that bring a gradient."""
        rows = self._imagined(rows)
        return super().batches([row for row in rows if self._teaches(row)] or list(rows[:1]))

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        return super().shapes(self._imagined(rows))

    def close(self) -> None:
        self.scorer.close()
        if self.write is not None:
            self.write.close()
        super().close()

    def _imagined(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Completions as they are; of prompts, which a dry run asks for, the longest that they can have."""
        return rows if not rows or isinstance(rows[0], Rollout) else self.longest(rows)

    def _teaches(self, row: Rollout) -> bool:
        return row.advantage != 0 or self.settings.beta > 0

    def _drawn(self, prompts: Sequence[Prompt], number: int) -> list[Rollout]:
        """The completions of the rollout of this number, groups that are rewarded alike drawn anew if the settings ask
        for that."""
        groups: dict[int, tuple[list[Drawn], np.ndarray]] = {}
        wanted = list(range(len(prompts)))
        for attempt in range(self.settings.redraw + 1):
            found = self._written([prompts[place] for place in wanted], (number, attempt))
            groups |= dict(zip(wanted, found, strict=True))
            wanted = [place for place in wanted if not np.ptp(self.scorer.weighted(groups[place][1]))]
            if not wanted:
                break
        every = [prompt for prompt in prompts for _ in range(self.settings.group)]
        drawn = [one for place in range(len(prompts)) for one in groups[place][0]]
        return self._rewarded(every, drawn, np.hstack([groups[place][1] for place in range(len(prompts))]))

    def _written(self, prompts: Sequence[Prompt], drawing: tuple[int, int]) -> list[tuple[list[Drawn], np.ndarray]]:
        """A group of completions of each prompt, and their rewards (names, group): each process writes those of its
        prompts, and all have all of them.

        Args:
            drawing: numbers that the seeds of the completions follow from, beside the prompt.
        """
        settings, group = self.settings, self.settings.group
        rank, size = self._processes.rank, self._processes.size
        own = [prompt for prompt in prompts[rank::size] for _ in range(group)]
        seeds = tuple(seed_of(self._seed, *drawing, prompt.row, n % group) for n, prompt in enumerate(own))
        how = Drawing(settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k, seeds, True)
        assert self.write is not None
        with working("writing completions"):
            drawn = self.write(own, how)
        with working("rewarding completions"):
            rewards = self.scorer(own, drawn)
        told = [one.as_list() for one in drawn], rewards.T.tolist()
        parts = [json.loads(text) for text in self._processes.texts(json.dumps(told))]
        found = []
        for place in range(len(prompts)):
            those = slice(place // size * group, (place // size + 1) * group)
            written, columns = (part[those] for part in parts[place % size])
            found.append(([Drawn.of_list(one) for one in written], np.array(columns, np.float64).T))
        return found

    def _rewarded(self, prompts: Sequence[Prompt], drawn: Sequence[Drawn], rewards: np.ndarray) -> list[Rollout]:
        """Completions with their advantages, and what else the loss needs to know."""
        settings = self.settings
        totals = self.scorer.weighted(rewards)
        if settings.overlong:
            over = np.array([one.length for one in drawn]) - (settings.most_written - settings.overlong)
            totals = totals - np.clip(over / settings.overlong, 0.0, 1.0)  # DAPO's soft punishment, eq. 13
        rows = [_rollout(prompt, one) for prompt, one in zip(prompts, drawn, strict=True)]
        if settings.beta:
            with self._base():
                rows = self._with_logprobs(rows, "base_logprobs")
            if settings.loss == "rloo":
                rows = self._with_logprobs(rows, "old_logprobs")
                moved = [float(np.sum(row.old_logprobs - row.base_logprobs)) for row in rows]  # type: ignore[operator]
                totals = totals - settings.beta * np.array(moved)
        if settings.updates > 1 and rows[0].old_logprobs is None:
            rows = self._with_logprobs(rows, "old_logprobs")
        better = advantages(totals.reshape(-1, settings.group), settings.loss, settings.loss != "dr_grpo").reshape(-1)
        cut = np.array([not one.ended for one in drawn])
        if settings.mask_cut:
            better = np.where(cut, 0.0, better)
        self._tell(rewards, totals, rows, cut)
        self.extremes = self.scorer.extremes(prompts, drawn, rewards)
        return [replace(row, advantage=float(value)) for row, value in zip(rows, better, strict=True)]

    def _tell(self, rewards: np.ndarray, totals: np.ndarray, rows: Sequence[Rollout], cut: np.ndarray) -> None:
        """Have the step report what came of its completions; an error is half of a 95 % interval over groups."""
        groups, found = totals.reshape(-1, self.settings.group), {}
        for name, values in self.scorer.named(rewards).items():
            found[name] = float(values.mean())
            if (bounds := mean_interval(values.reshape(groups.shape).mean(1))) is not None:
                found[name.replace("reward", "reward_error", 1)] = bounds[1] - found[name]
        found["reward_std"] = float(groups.std(1).mean())
        found["teaching_groups"] = float((np.ptp(groups, axis=1) > 0).mean())
        found |= {"length": float(np.mean([row.label_count for row in rows])), "cut_share": float(cut.mean())}
        if self.settings.beta and self.settings.loss == "rloo":  # the other losses measure it themselves
            behind = [row.old_logprobs - row.base_logprobs for row in rows]  # type: ignore[operator]
            found["kl"] = float(np.concatenate(behind).mean())
        loss = self.objective.loss  # type: ignore[attr-defined]
        assert isinstance(loss, PolicyLoss)
        loss.watched.of_step = found

    @torch.no_grad()
    def _with_logprobs(self, rows: Sequence[Rollout], name: str) -> list[Rollout]:
        """Rows with the log-probabilities that the model gives their labels now, as training computes them."""
        objective: Any = self.objective
        found: dict[int, np.ndarray] = {}
        for batch in self.batcher.batches(rows):
            of = RowLogProbs.of(batch, objective.token_log_probs(batch))
            values, owner = of.values[of.index].float().cpu().numpy(), of.row.cpu().numpy()
            found |= {id(row): values[owner == place] for place, row in enumerate(of.rows)}
        named: list[dict[str, Any]] = [{name: found[id(row)]} for row in rows]
        return [replace(row, **known) for row, known in zip(rows, named, strict=True)]


def _rollout(prompt: Prompt, drawn: Drawn) -> Rollout:
    """A completion behind its prompt: what the model wrote is a label, and so is the token that ends it."""
    begin = prompt.tokens if drawn.prompt is None else drawn.prompt
    written = np.ones(len(drawn.tokens), bool) if drawn.written is None else drawn.written
    logprobs = drawn.logprobs if drawn.logprobs is None else drawn.logprobs[written]
    ends = [] if drawn.terminator is None else [drawn.terminator]
    tokens = np.concatenate([begin, drawn.tokens, ends]).astype(np.int32)
    is_label = np.concatenate([np.zeros(len(begin), bool), written, np.ones(len(ends), bool)])
    row = Rollout(prompt.row, tokens, is_label, len(begin), drawn.text, prompt.active_from)
    return replace(row, engine_logprobs=logprobs)
