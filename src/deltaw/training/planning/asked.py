"""What a user asks of a plan, in text: a size in bytes, a list of methods. Imports no torch."""

from __future__ import annotations

import re

from deltaw.errors import UserError
from deltaw.memory.plan import Plan
from deltaw.methods import registry

_PREFIXES = "kmgt"
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate(_PREFIXES, 1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate(_PREFIXES, 1)}


def parse_bytes(text: str, where: str = "--budget") -> int:
    """``6GB``, ``512 MiB`` or a plain number of bytes.

    Raises:
        UserError: it is not a size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"'{text}' is not a valid size", where=where, hint="write 6GB, 512MB or 8GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def of_each(plan: Plan, sharding: str, processes: int) -> Plan:
    """The plan of each of several processes, from that of one with its rows (``train.sharding``)."""
    if processes == 1:
        return plan
    return plan.of_process(processes, divided=sharding == "base" and plan.method == "lora")


def refuse_memory(memory: str | None, verb: str) -> None:
    """Refuse the setting ``memory`` where a verb does not keep it.

    Raises:
        UserError: it is set.
    """
    if memory is not None:
        hint = "leave memory out and set train.checkpointing or train.tokens_per_pass"
        raise UserError(f"memory limits 'deltaw train', not 'deltaw {verb}'", where="memory", hint=hint)


def chosen_methods(text: str, own: str) -> list[str]:
    """The methods of a list such as ``lora,head``, or ``all`` of them; the run's ``own`` comes first.

    Raises:
        UserError: a name is no method.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if text == "all":
        names = list(registry.names())
    for name in names:
        registry.entry_of(name, where="--methods")
    return list(dict.fromkeys([own, *names]))
