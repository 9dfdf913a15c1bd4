"""When a training has flattened: a rule on its validation losses.

A training has flattened if its second half brought next to nothing: the best validation loss of the later
half of its evaluations is not at least 1 % below the best of the earlier half. In other words, training
twice as long lowered the loss by less than 1 %. Once the loss is small, a thousandth of the untrained model's
counts as nothing too: a loss that approaches zero falls by some share for ever. A training whose loss is
still near that of the untrained model has not begun to learn, and is not called flat: soft prompts and biases
stay there for epochs before they fall.

The rule has no fixed patience, since a loss may stay where it is for a while before it falls: the longer a
training has gone on, the longer it is waited for. It is applied at a constant learning rate. A rate that
decays to zero ends every descent, whether there is more to learn or not.

It knows numbers alone.
"""

from __future__ import annotations

from collections.abc import Sequence

# By how much the later half must be lower for the training to go on: a share of the best loss of the earlier
# half, and one of the untrained model's loss.
TOLERANCE, OF_UNTRAINED = 0.01, 0.001
# The share of the untrained model's loss below which a training has begun to learn.
BEGUN = 0.85
# Evaluations below which nothing is called flat.
FEWEST = 8
# Evaluations of an epoch, and at least of a budget, that are planned.
OF_EPOCH, OF_BUDGET = 4, 10


def has_flattened(losses: Sequence[float], untrained: float) -> bool:
    """Whether a training has flattened.

    Args:
        losses: validation losses, evenly spaced. untrained: that before the first step.
    """
    if len(losses) < FEWEST or min(losses) > BEGUN * abs(untrained):
        return False
    half = len(losses) // 2
    earlier, later = min(losses[:half]), min(losses[half:])
    return later >= earlier - max(TOLERANCE * abs(earlier), OF_UNTRAINED * abs(untrained))


def steps_between(steps_per_epoch: int, steps: int | None) -> int:
    """Steps from one evaluation to the next: a quarter of an epoch, or a tenth of a budget of ``steps`` if
    that is less."""
    apart = steps_per_epoch / OF_EPOCH
    if steps is not None:
        apart = min(apart, steps / OF_BUDGET)
    return max(1, int(apart))
