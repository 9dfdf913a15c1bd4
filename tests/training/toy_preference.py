"""A complete objective over pairs of rows in one file.

−log σ(β (log p(chosen) − log p(rejected))): DPO (arXiv 2305.18290, eq. 7) without its reference model.
"""

from __future__ import annotations

from torch.nn.functional import logsigmoid

BETA = 0.3


class Preference:
    """Preference loss of groups of a chosen and a rejected row. Its unit is a pair."""

    def __call__(self, rows):
        chosen, rejected = rows.grouped(rows.sums()).unbind(1)
        return -logsigmoid(BETA * (chosen - rejected)).sum()

    def units(self, rows):
        return len(rows)
