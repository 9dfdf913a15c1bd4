"""The output head that TRL adds to a model: ``model(…, labels=labels, fused_lm_head=True)``.

TRL keeps its options in the closure of the function that it installs. Names that TRL does not document are only used
here. If one of them is missing, TRL's function runs, with an accelerated backbone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FLAG = "fused_lm_head"
# Fields that are computed here.
FIELDS = frozenset({"log_probs", "entropy", "is_top1", "mean_logits"})
# Arguments of a call that are not passed to the backbone.
CALL_ARGUMENTS = frozenset({FLAG, "labels", "shift_labels", "num_items_in_batch"})


@dataclass(frozen=True)
class TRLHead:
    """Options of TRL's head.

    Attributes:
        temperature: Divisor of the logits.
        fields: Values of each label that a call returns.
        output_class: Class of the result.
    """

    temperature: float
    fields: tuple[str, ...]
    output_class: Callable[..., Any]


def find_head(forward: Callable[..., Any]) -> TRLHead | None:
    """Return the options of the head that ``forward`` contains, or None without a supported head."""
    function = getattr(forward, "__func__", forward)
    code = getattr(function, "__code__", None)
    if code is None or FLAG not in code.co_varnames:
        return None
    values = inspect.getclosurevars(function)
    options = values.nonlocals
    output_class = values.globals.get("FusedCausalLMOutput")
    fields = options.get("outputs")
    temperature = options.get("temperature")
    if output_class is None or not isinstance(fields, tuple) or not set(fields) <= FIELDS:
        return None
    if not isinstance(temperature, float | int) or options.get("cast_lm_head_to_fp32") is not False:
        return None
    return TRLHead(float(temperature), fields, output_class)
