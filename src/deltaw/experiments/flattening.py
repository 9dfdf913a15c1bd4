"""Rule for a flattened validation loss.

A training has flattened if doubling its length lowered the loss by less than 1%: the best loss of the later half of
the evaluations is not at least 1% below the best of the earlier half. Improvements below a thousandth of the
untrained model's loss are ignored, because a loss near zero can decrease by some percentage indefinitely. A loss close
to that of the untrained model is not flat: soft prompts and biases may need epochs before it decreases.

The patience is proportional to the length of the training. The rule requires a constant learning rate, because a rate
that decays to zero flattens any loss.
"""

from __future__ import annotations

from collections.abc import Sequence

# Required improvement as a share of the best loss of the earlier half, and of the untrained model's loss.
TOLERANCE = 0.01
UNTRAINED_TOLERANCE = 0.001
# Share of the untrained model's loss below which the model has started to learn.
MAX_LEARNED_RATIO = 0.85
# Minimum number of evaluations for a decision.
MIN_EVALUATIONS = 8


def has_flattened(losses: Sequence[float], untrained: float) -> bool:
    """Return True if the validation loss has flattened.

    Args:
        losses: Validation losses at even intervals.
        untrained: Validation loss before the first step.
    """
    if len(losses) < MIN_EVALUATIONS or min(losses) > MAX_LEARNED_RATIO * abs(untrained):
        return False
    half = len(losses) // 2
    earlier = min(losses[:half])
    later = min(losses[half:])
    return later >= earlier - max(TOLERANCE * abs(earlier), UNTRAINED_TOLERANCE * abs(untrained))
