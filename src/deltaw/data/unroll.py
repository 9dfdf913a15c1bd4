"""The turns of a conversation become as few examples as exactness allows.

A template may render earlier turns differently once more turns follow, for example without their reasoning.
Each turn is then an example of its own, in the context that it is written in. Turns whose tokens are a prefix
of a later turn's are learned in that turn's example: no token sees what follows it. It knows tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence


def fewest(turns: Sequence[Sequence[int]]) -> list[list[int]]:
    """The turns, given as all tokens through the end of each, in groups: one example each.

    The tokens of a group's turns are prefixes of those of its last turn. Groups and turns keep their order.
    """
    groups: list[list[int]] = []
    for turn in reversed(range(len(turns))):
        tokens = turns[turn]
        for group in groups:
            if turns[group[-1]][: len(tokens)] == tokens:
                group.insert(0, turn)
                break
        else:
            groups.append([turn])
    return groups[::-1]
