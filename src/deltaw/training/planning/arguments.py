"""Parse arguments of a plan: sizes in bytes and lists of methods. This module does not import torch."""

from __future__ import annotations

import re

from deltaw.errors import UserError
from deltaw.memory.plan import Plan
from deltaw.methods import registry

_PREFIXES = "kmgt"
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate(_PREFIXES, 1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate(_PREFIXES, 1)}


def parse_bytes(text: str, location: str = "--fit-memory") -> int:
    """Parse ``6GB``, ``512 MiB`` or a plain number of bytes.

    Raises:
        UserError: if the text is not a size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"'{text}' is not a valid size", location=location, hint="write 6GB, 512MB or 8GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def plan_per_process(plan: Plan, sharding: str, processes: int) -> Plan:
    """Return the plan of each of several processes, given the plan of one process with its rows."""
    if processes == 1:
        return plan
    return plan.per_process(processes, sharded=sharding == "base" and plan.method == "lora")


def reject_memory_setting(memory: str | None, verb: str) -> None:
    """Reject the setting ``memory`` for a command that does not enforce it.

    Raises:
        UserError: if it is set.
    """
    if memory is not None:
        hint = "leave memory out and set train.checkpointing or train.tokens_per_pass"
        raise UserError(f"memory limits 'deltaw train', not 'deltaw {verb}'", location="memory", hint=hint)


def parse_methods(text: str, run_method: str) -> list[str]:
    """Return the methods of a list such as ``lora,head``, or of ``all``. The method of the run is first.

    Raises:
        UserError: if a name is not a method.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if text == "all":
        names = list(registry.names())
    for name in names:
        registry.entry_of(name, location="--methods")
    return list(dict.fromkeys([run_method, *names]))
