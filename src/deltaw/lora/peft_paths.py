"""Where PEFT's files have what a model trains: its wrappers nest, and each adds a part to the names below it.

An adapted layer of ours has the name of the layer that it stands in for. In PEFT a wrapper has that name,
with the layer inside of it as ``base_layer``. That shows in a tensor's name in three cases: a trained bias of
an adapted layer; the two projections of ``nn.MultiheadAttention``, of which the second is inside the first's
wrapper; and several adapted parameters of one module, where each has a wrapper around that of the one before
it.
"""

from __future__ import annotations

from deltaw.lora.attachment import Attachment

PREFIX = "base_model.model."
_INNER = ".base_layer"


class FilePaths:
    """The names in a file, without their last part, of what an attachment trains."""

    def __init__(self, record: Attachment) -> None:
        self._wrappers = {replacement.names[0]: 1 for replacement in record.layers}
        self._special: dict[str, str] = {}
        self._twice: set[str] = set()
        by_runner: dict[str, list[str]] = {}
        for update in record.parameters:
            name = update.names[0]
            if not update.of_attention:
                by_runner.setdefault(name, []).append(update.name)
            elif update.layer.holder is update.runner:
                self._wrappers[name] = 1
                self._special[update.name] = name
            else:
                self._wrappers[f"{name}.out_proj"] = 1
                self._special[update.name] = f"{name}.out_proj"
                self._twice.add(update.name)
        self._depth: dict[str, int] = {}
        for name, updates in by_runner.items():
            self._wrappers[name] = len(updates)
            for outside, update_name in enumerate(reversed(updates)):
                self._special[update_name] = name
                self._depth[update_name] = outside

    def of_layer(self, name: str) -> str:
        """For the factors of an adapted layer, or of a parameter's update, by its name in the model."""
        return PREFIX + self._nested(self._special.get(name, name)) + _INNER * self._depth.get(name, 0)

    def counts_twice(self, name: str) -> bool:
        """Whether PEFT adds this update to its weight twice: that of an attention's output projection.

        Its wrapper of ``nn.MultiheadAttention`` merges that update around each forward, and has the wrapper
        inside merge it once more (up to version 0.21.2; pull request 3774 of its repository). Here it counts
        once. So that outputs agree, a file has half of this B.
        """
        return name in self._twice

    def of_module(self, name: str) -> str:
        """For a module that is trained in full."""
        return PREFIX + self._nested(name)

    def of_parameter(self, name: str) -> str:
        """For a parameter of the base model itself, such as a trained bias: its full name."""
        owner, _, last = name.rpartition(".")
        if not owner:
            return PREFIX + name
        return f"{PREFIX}{self._nested(owner)}{_INNER * self._wrappers.get(owner, 0)}.{last}"

    def _nested(self, name: str) -> str:
        """``name`` with a part for every wrapper around one of the modules above it."""
        if not self._special:
            return name  # no module below an adapted layer can be trained
        parts = name.split(".")
        nested = parts[0]
        for end in range(1, len(parts)):
            nested += _INNER * self._wrappers.get(".".join(parts[:end]), 0) + "." + parts[end]
        return nested


def without_wrappers(name: str) -> str:
    """The model's own name for a name in a file."""
    return name.removeprefix(PREFIX).replace(_INNER, "")
