"""Shard a model's frozen blocks across processes with FSDP2 (``fully_shard``).

Each process stores a part of the rows of every frozen weight in the blocks, in its storage type. FSDP gathers a block's
rows around its forward and backward, and releases them afterwards. Rows are read from the files directly, so no process
ever loads all weights. For int8 quantization, one block at a time is loaded completely, quantized by hooks, and then
sharded.

All processes must run the same blocks in the same order. A :data:`GatherCallback` is called before each gathering, so
that one process can run blocks while other processes only send their rows.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from deltaw.errors import UserError
from deltaw.hub.stored_weights import Rows, StoredWeights, assign_values, meta_model
from deltaw.hub.transformers_private import attention_name
from deltaw.kernels.torch_modules import direct_parameters, share_parameters
from deltaw.kernels.torch_private import is_view, sized_tensor
from deltaw.lora.fingerprint import TensorDigest, record_base_digest, record_digest, recorded_digest
from deltaw.lora.stored import weight_scales
from deltaw.machine.choices import Choice
from deltaw.runtime.recognition import blocks_of

# Smaller tensors, such as norms, are sent in one message: the latency of a message corresponds to this many bytes.
SMALL_BYTES = 2**16
# Called for each gathering with the block's index and a function that gathers.
GatherCallback = Callable[[int, Callable[[], Any]], Any]

_SHARDED: weakref.WeakKeyDictionary[nn.Module, ShardedBlocks] = weakref.WeakKeyDictionary()


def sharded_blocks(model: nn.Module) -> ShardedBlocks | None:
    """Return the sharded blocks of a model, or None if the model is not sharded."""
    return _SHARDED.get(model)


class ShardedLoader:
    """Loads a model with sharded blocks. Replaces the weight loading of :func:`deltaw.hub.loading.load`.

    Args:
        group: Process group.
        wire: Called for each gathering.
        rounded: True if weights are quantized before they are sharded (:meth:`ShardedBlocks.finish`).
    """

    def __init__(self, group: dist.ProcessGroup, wire: GatherCallback, *, rounded: bool) -> None:
        self._group = group
        self._wire = wire
        self._rounded = rounded

    def __call__(
        self, folder: Path, config: PretrainedConfig, task: str, dtype: str, attention: str, trust_remote_code: bool
    ) -> tuple[PreTrainedModel, list[str], Choice[str]]:
        """Return the model, the names of tensors that its files lack, and its attention implementation.

        Raises:
            UserError: if the model has no list of blocks, or its files do not support reading rows.
        """
        model = meta_model(folder, dtype=dtype, task=task, attention=attention, trust_remote_code=trust_remote_code)
        weights = StoredWeights(folder, model)
        kind = attention_name(model.config) or attention
        choice = Choice(kind, "torch's fused attention" if kind == "sdpa" else "the model's implementation")
        block_list = blocks_of(model)
        if block_list is None:
            raise _no_blocks(folder, "it has no list of blocks")
        if weights.missing:
            return model, weights.missing, choice
        prefix, blocks = block_list
        inside = {id(parameter) for parameter in blocks.parameters()}
        outside = [name for name, p in model.named_parameters() if id(p) not in inside]
        names = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in inside]
        if len(set(blocks)) != len(blocks) or len(names) != len(inside):
            raise _no_blocks(folder, "its blocks share weights")
        assign_values(model, weights.read(dict.fromkeys(outside)))
        sharded = ShardedBlocks(list(blocks), prefix, weights, self._group, self._wire)
        _SHARDED[model] = sharded
        if not self._rounded:
            sharded.divide()
        return model, [], choice


class ShardedBlocks:
    """Blocks of a model with weights sharded across the processes of ``group``.

    Args:
        blocks: Blocks with parameters on the meta device.
        prefix: Prefix of their parameters' names.
        weights: Files with the values.
    """

    def __init__(
        self, blocks: list[nn.Module], prefix: str, files: StoredWeights, group: dist.ProcessGroup, wire: GatherCallback
    ) -> None:
        from torch.distributed.device_mesh import DeviceMesh

        self._blocks = blocks
        self._prefix = prefix
        self._weights = files
        self._wire = wire
        self._group = group
        self._mesh = DeviceMesh.from_group(group, "cpu")
        self._classes: list[type | None] = [None] * len(blocks)
        self._tables: list[dict[str, dict[str, nn.Parameter | None]]] = [{} for _ in blocks]
        self._values: list[dict[str, TensorDigest | None]] = []
        self._filled: int | None = None
        self._read: list[nn.Module] = []
        for block in blocks:
            self._values.append({name: recorded_digest(p) for name, p in block.named_parameters()})
        enter = [functools.partial(self._enter, index) for index in range(len(blocks))]
        self._handles = [b.register_forward_pre_hook(hook) for b, hook in zip(blocks, enter, strict=True)]

    def divide(self) -> None:
        """Read this process's rows of each block that is not sharded yet, one block at a time."""
        for index, block in enumerate(self._blocks):
            if self._classes[index] is not None:
                continue
            self._shard(index)
            rows = {name: self._rows_of(p) for name, p in block.named_parameters()}
            values = self._weights.read({self._name(index, name): row_range for name, row_range in rows.items()})
            self._load(index, {name: values[self._name(index, name)] for name in rows})
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def finish(self) -> None:
        """Shard the quantized blocks, and check that all processes quantized identically.

        Raises:
            UserError: if the quantized weights differ between processes.
        """
        if self._filled is not None:
            self._shard_or_release(self._filled)
        self.divide()
        digest = hashlib.sha256()
        for block in self._blocks:
            for name, module in block.named_modules():
                if (scales := weight_scales(module)) is None:
                    continue
                digest.update(f"{name} {scales.in_blocks}".encode())
                for tensor in scales[:2]:
                    if tensor is not None:
                        digest.update(tensor.numpy().tobytes())
        local_digest = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
        digests = [torch.empty_like(local_digest) for _ in range(self._group.size())]
        self._wire(0, lambda: dist.all_gather(digests, local_digest, group=self._group))
        if any(not torch.equal(remote_digest, local_digest) for remote_digest in digests):
            message = "the processes quantized the weights to int8 differently, so their rows cannot be combined"
            raise UserError(message, location="precision", hint="use machines with one CPU model, or precision bf16")

    def share_tables(self) -> None:
        """Make replaced layers share the parameter tables of the layers that FSDP manages.

        An adapted layer is a different object from the layer that it adapts. With a shared parameter table, FSDP's
        exchange of rows and full weights applies to both.
        """
        for block, tables in zip(self._blocks, self._tables, strict=True):
            for path, table in tables.items():
                module = block.get_submodule(path)
                if direct_parameters(module) is not table:
                    share_parameters(module, table)

    def gather(self, index: int) -> None:
        """Send this process's rows of a block to a process that runs it."""
        with self._as_sharded(index) as block:
            block.unshard()
            block.reshard()

    # Complete blocks before sharding

    def _enter(self, index: int, block: nn.Module, inputs: object) -> None:
        """Load a block that is not sharded yet before it runs, and release the previous one."""
        if self._filled is not None and self._filled != index:
            self._shard_or_release(self._filled)
        if self._classes[index] is None and self._filled != index:
            names = {self._name(index, name): name for name, _ in block.named_parameters()}
            values = self._weights.read(dict.fromkeys(names))
            assign_values(block, {names[name]: value for name, value in values.items()})
            self._filled = index
            self._read = [m for m in block.modules() if direct_parameters(m)]

    def _shard_or_release(self, index: int) -> None:
        """Shard a block that was loaded completely if it was quantized, else release its weights."""
        block = self._blocks[index]
        self._filled = None
        current_modules = set(block.modules())
        rounded = any(weight_scales(module) is not None for module in current_modules)
        for module in self._read:  # other references to a quantized layer must not keep its weights alive
            if not (rounded and module in current_modules):
                for name, parameter in list(direct_parameters(module).items()):
                    if parameter is not None:
                        setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
                        record_base_digest(module.get_parameter(name), parameter)
        self._read = []
        if rounded:
            self._shard(index)

    # FSDP

    def _shard(self, index: int) -> None:
        """Shard a block. A block on the meta device has no values yet."""
        from torch.distributed.fsdp import fully_shard

        block = self._blocks[index]
        original_class = type(block)
        self._tables[index] = {path: direct_parameters(m) for path, m in block.named_modules() if direct_parameters(m)}
        fully_shard(block, mesh=self._mesh, reshard_after_forward=True)
        block.register_forward_hook(_no_view, prepend=True)
        self._classes[index] = type(block)
        with self._as_sharded(index) as sharded:
            sharded.set_custom_all_gather(_Gather(index, self._wire))
        # FSDP works through hooks. Restore the class, so that other code recognizes the block.
        block.__class__ = original_class
        self._note(index)

    def _load(self, index: int, values: dict[str, Tensor]) -> None:
        """Load rows into a block that was sharded on the meta device."""
        from torch.distributed.tensor import DTensor, Shard

        parameters = dict(self._blocks[index].named_parameters())
        rows = {}
        for name, value in values.items():
            shape = parameters[name].shape
            stride = parameters[name].stride()
            rows[name] = DTensor.from_local(value, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        with self._as_sharded(index) as block:
            block.load_state_dict(rows, assign=True, strict=False)
        for parameter in self._blocks[index].parameters():
            parameter.requires_grad_(False)
        self._note(index)

    def _note(self, index: int) -> None:
        for name, parameter in self._blocks[index].named_parameters():
            if (values := self._values[index][name]) is not None:
                record_digest(parameter, values)

    def _rows_of(self, parameter: Tensor) -> Rows:
        """Return this process's range of rows as assigned by FSDP: ⌈n / P⌉ of n rows per process, as available."""
        count = parameter.shape[0]
        rows = -(-count // self._group.size())
        return min(self._group.rank() * rows, count), min((self._group.rank() + 1) * rows, count)

    def _name(self, index: int, name: str) -> str:
        return f"{self._prefix}.{index}.{name}"

    @contextlib.contextmanager
    def _as_sharded(self, index: int) -> Iterator[Any]:
        """Context in which the block has the class that FSDP assigned, with FSDP's methods."""
        block = self._blocks[index]
        sharded_class = self._classes[index]
        assert sharded_class is not None, f"block {index} is not divided"
        original_class = type(block)
        block.__class__ = sharded_class
        try:
            yield block
        finally:
            block.__class__ = original_class


def _no_view(block: nn.Module, inputs: object, output: Any) -> Any:
    """Clone outputs that are views.

    FSDP gathers for the backward through a hook on a block's output. An in-place operation would drop this hook from a
    view.
    """
    if isinstance(output, Tensor):
        return output.clone() if is_view(output) else output
    return tuple(_no_view(block, inputs, value) for value in output) if isinstance(output, tuple) else output


class _Gather:
    """FSDP's gathering of a block's rows (``AllGather``), directly into the block's weights.

    FSDP gathers a block into a flat buffer and copies the weights out of it, and gloo's ``all_gather`` needs a second
    buffer of this size. Here the flat buffer is a :class:`_LazyGatherBuffer` without memory. Rows are sent when the
    weights are copied out of it.
    """

    def __init__(self, index: int, wire: GatherCallback) -> None:
        self._number = index
        self._wire = wire

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _LazyGatherBuffer(torch.Size(map(int, size)), dtype)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        assert isinstance(output_tensor, _LazyGatherBuffer)
        output_tensor.receive = lambda rows, out: self._wire(self._number, lambda: gather_rows(rows, out, group))


class _LazyGatherBuffer(Tensor):
    """Placeholder for FSDP's flat buffer of gathered rows, with a size but no values.

    Attributes:
        rows: This process's rows of each weight.
        receive: Fills the given tensors with all processes' rows of each weight.
    """

    rows: list[Tensor]
    receive: Callable[[list[Tensor], list[Tensor]], Any]

    @staticmethod
    def __new__(cls, size: torch.Size, dtype: torch.dtype) -> _LazyGatherBuffer:
        return sized_tensor(cls, size, dtype, feature="train.sharding: base")

    def __init__(self, size: torch.Size, dtype: torch.dtype) -> None:
        self.rows = []

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Implement the three operations that FSDP applies to its buffer."""
        ops = torch.ops
        if operator is ops.fsdp.all_gather_copy_in.default:
            local_rows, buffer = args[:2]
            buffer.rows = list(local_rows)
            return local_rows[0], buffer
        if operator is ops.aten.view.default:
            view = _LazyGatherBuffer(torch.empty(args[0].shape, device="meta").view(args[1]).shape, args[0].dtype)
            view.rows = args[0].rows
            view.receive = args[0].receive
            return view
        if operator is ops.fsdp.split_with_sizes_copy.default:
            return args[0].receive(args[0].rows, kwargs["out"])
        raise NotImplementedError(f"torch {torch.__version__} applies an unsupported FSDP operation: {operator}")


def gather_rows(rows: Sequence[Tensor], out: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Gather the rows of all processes into their destinations. Every process sends its rows to every other process.

    Args:
        rows: Local shards of each weight, flattened to rows, of one type.
        out: For each weight a contiguous tensor (processes, numbers of ``rows``).
    """
    rank = group.rank()
    size = group.size()
    small = [n for n, local in enumerate(rows) if local.numel() * local.element_size() < SMALL_BYTES]
    flat = torch.cat([rows[n] for n in small]) if small else rows[0][:0]
    received_flat = flat.new_empty(size, len(flat))
    transfers = [(rows[n], out[n]) for n in range(len(rows)) if n not in small] + [(flat, received_flat)] * bool(small)
    requests: list[Any] = []
    for step in range(1, size):  # at each, every process sends to one and receives from one
        target = (rank + step) % size
        source = (rank - step) % size
        for tag, (local, destination) in enumerate(transfers):
            requests.append(dist.isend(local, group=group, group_dst=target, tag=tag))
            requests.append(dist.irecv(destination[source], group=group, group_src=source, tag=tag))
    for local, destination in transfers:
        destination[rank].copy_(local)
    for work in requests:
        work.wait()
    sizes = [len(rows[n]) for n in small]
    for process, received in enumerate(received_flat):
        for n, value in zip(small, received.split(sizes), strict=True):
            out[n][process].copy_(value)


def _no_blocks(folder: Path, reason: str) -> UserError:
    return UserError(f"the model cannot be sharded: {reason}", location=str(folder), hint="set train.sharding: none")
