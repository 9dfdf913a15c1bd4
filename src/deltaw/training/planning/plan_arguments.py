"""Arguments of the commands that plan."""

from __future__ import annotations

from deltaw.errors import UserError
from deltaw.settings import method_registry


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
        names = list(method_registry.names())
    for name in names:
        method_registry.entry_of(name, location="--methods")
    return list(dict.fromkeys([run_method, *names]))
