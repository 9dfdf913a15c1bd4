"""Model of a run on fake tensors, for its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from deltaw.data.row_reader import RunData
from deltaw.errors import UserError
from deltaw.hub.loading import bitsandbytes_precision, require_head
from deltaw.hub.skeletons import new_modules, skeleton
from deltaw.lora.stored import count_logical_parameters
from deltaw.machine.choices import QUANTIZED, choose_device, choose_precision, choose_threads, loading_precision
from deltaw.machine.kernel_choice import KernelChoice, activate_kernels
from deltaw.machine.memory import memory_limit_bytes
from deltaw.memory.simulation import fake_tensors, with_index
from deltaw.runtime.nf4 import SimulatedLinear, quantize_nf4, quantize_with_bitsandbytes
from deltaw.runtime.quantized_weights import quantize_int8
from deltaw.runtime.recognition import blocks_of
from deltaw.settings.config import RunConfig
from deltaw.training.session import Session, assemble
from deltaw.training.task import Task

# Approximate bytes of a parameter in a model with precision nf4: some weights remain in bf16.
NF4_BYTES = 0.6


class WeightsTooLargeError(UserError):
    """The weights of a model exceed the memory of this machine."""


@dataclass
class FakeModel:
    """Model of a run on fake tensors, before its method is applied.

    Attributes:
        model: Model, quantized if the precision requires it.
        dtype: Data type of the loaded weights.
        kernels: Chosen kernels, or None on another device than the CPU.
        new_modules: Names of modules that the model's files do not contain.
        total_parameters: Number of parameters.
        device: Device of the run.
    """

    model: PreTrainedModel
    dtype: str
    kernels: KernelChoice | None
    new_modules: Sequence[str]
    total_parameters: int
    device: str

    @classmethod
    def of(cls, config: RunConfig, task: Task[Any], data: RunData) -> FakeModel:
        """Build the model. Sets the number of threads and activates the kernels of the run.

        Raises:
            UserError: if the model's files lack a head that the task needs.
        """
        threads = choose_threads(config.threads).value
        torch.set_num_threads(threads)  # workspace sizes of some operators depend on it
        device = choose_device(config.device).value
        dtype = choose_precision(device, config.precision).value
        name = config.model
        code = config.trust_remote_code
        outputs = task.num_outputs(data)
        stored = loading_precision(device, dtype)
        with fake_tensors():
            model = skeleton(name, dtype=stored, task=config.task, num_labels=outputs, trust_remote_code=code)
        require_head(model, name, config.task, dtype=dtype, trust_remote_code=code)
        kernels = activate_kernels(model.config, threads) if device == "cpu" else None
        total = count_logical_parameters(model)
        with fake_tensors():
            library = bitsandbytes_precision(model.config) or (config.precision if device != "cpu" else None)
            if library in QUANTIZED:
                quantize_with_bitsandbytes(model.base_model, library, device, SimulatedLinear)
            elif config.precision == "int8":
                quantize_int8(model.base_model)
            elif config.precision == "nf4":
                quantize_nf4(model.base_model)
        added = new_modules(model, name, dtype=dtype, trust_remote_code=code) if task.trains_head else []
        return cls(model, dtype, kernels, added, total, device)

    def require_memory(self, config: RunConfig, processes: int) -> None:
        """Reject weights that exceed the memory of this machine, because a dry run of a large model takes minutes.

        ``force`` and runs whose weights are elsewhere, on a device or sharded over processes, are not checked.

        Raises:
            WeightsTooLargeError: if the weights exceed the memory.
        """
        is_sharded = processes > 1 and config.train.sharding == "base"
        size = sum(weight.nbytes for weight in self.model.parameters())
        limit = memory_limit_bytes().value
        if size <= limit or config.force or is_sharded or self.device != "cpu":
            return
        message = f"the model does not fit: its {self.total_parameters / 1e9:,.1f} billion parameters need"
        message += f" {size / 1e9:,.1f} GB in {self.dtype}, and this machine has {limit / 1e9:,.1f} GB of memory"
        hint = "choose a smaller model"
        if self.dtype not in QUANTIZED and self.total_parameters * NF4_BYTES < limit:
            hint += f", or set precision: nf4, which needs about {self.total_parameters * NF4_BYTES / 1e9:,.1f} GB"
        raise WeightsTooLargeError(message, location="model", hint=f"{hint}; see docs/goals/little-memory.md")

    def assemble(self, config: RunConfig, task: Task[Any], data: RunData) -> Session:
        """Return the run's session. Call it inside :func:`fake_tensors`."""
        candidates = () if self.kernels is None else self.kernels.approximations
        options = {"device": with_index(self.device), "new_modules": self.new_modules, "candidates": candidates}
        return assemble(config, task, data, self.model, **options)  # type: ignore[arg-type]


def block_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Return the weight bytes of all blocks and of the largest block, or 0 if the model has no list of blocks."""
    blocks = blocks_of(model)
    if blocks is None:
        return 0, 0
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks[1]]
    return sum(sizes), max(sizes)
