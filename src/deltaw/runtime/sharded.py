"""A model's blocks divided among processes by FSDP2 (``fully_shard``), and whole only while one of them runs.

Each process holds some rows of every frozen weight of the blocks, as they are stored. Around a block's
forward and backward FSDP gathers its rows from all processes and lets go of them. Weights come into their
shares row by row from the files, so that no process ever holds them all. Where the weights are to be rounded
to int8 first, one block at a time is read as a whole, rounded by what is registered on it, and then divided.

All processes must run the same blocks in the same order. What is told before each gathering
(:class:`Wire`) lets one process run blocks on its own while the others only give their rows.

Knows modules, files of weights and process groups; not trainings.
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
from deltaw.hub.stored_weights import Rows, StoredWeights, fill, unfilled
from deltaw.hub.transformers_private import attention_name
from deltaw.kernels.torch_private import is_view, own_parameters, share_parameters, sized_tensor
from deltaw.lora.fingerprint import Values, note_base, note_values, noted_values
from deltaw.lora.stored import weight_scales
from deltaw.machine.choices import Choice
from deltaw.runtime.recognition import blocks_of

# Rows of fewer bytes, as a norm's, travel together: a message costs as much as sending so many bytes does.
SMALL = 2**16
# Called for each gathering with the block's number and what gathers.
Wire = Callable[[int, Callable[[], Any]], Any]

_SHARDED: weakref.WeakKeyDictionary[nn.Module, ShardedBlocks] = weakref.WeakKeyDictionary()


def sharded_blocks(model: nn.Module) -> ShardedBlocks | None:
    """What divides this model's blocks; None where this process holds them whole."""
    return _SHARDED.get(model)


class ShardedLoader:
    """Loads a model with its blocks divided; called in the place of
    :func:`deltaw.hub.loading.load`'s own reading of weights.

    Args:
        group: the processes. wire: is told of each gathering.
        rounded: whether the weights are to be rounded before they are divided
            (:meth:`ShardedBlocks.finish`).
    """

    def __init__(self, group: dist.ProcessGroup, wire: Wire, *, rounded: bool) -> None:
        self._group, self._wire, self._rounded = group, wire, rounded

    def __call__(
        self, folder: Path, config: PretrainedConfig, task: str, dtype: str, attention: str, trust_remote_code: bool
    ) -> tuple[PreTrainedModel, list[str], Choice[str]]:
        """The model, the names of the tensors that its files lack, and its attention.

        Raises:
            UserError: it has no list of blocks, or its files cannot be read by rows.
        """
        model = unfilled(folder, dtype=dtype, task=task, attention=attention, trust_remote_code=trust_remote_code)
        weights = StoredWeights(folder, model)
        used = attention_name(model.config) or attention
        choice = Choice(used, "torch's fused attention" if used == "sdpa" else "as the model has it")
        found = blocks_of(model)
        if found is None:
            raise _no_blocks(folder, "it has no list of blocks")
        if weights.missing:
            return model, weights.missing, choice
        prefix, blocks = found
        inside = {id(parameter) for parameter in blocks.parameters()}
        outside = [name for name, p in model.named_parameters() if id(p) not in inside]
        every = list(model.named_parameters(remove_duplicate=False))
        names = [name for name, p in every if id(p) in inside]
        if len(set(blocks)) != len(blocks) or len(names) != len(inside):
            raise _no_blocks(folder, "its blocks share weights")
        fill(model, weights.read(dict.fromkeys(outside)))
        made = ShardedBlocks(list(blocks), prefix, weights, self._group, self._wire)
        _SHARDED[model] = made
        if not self._rounded:
            made.divide()
        return model, [], choice


class ShardedBlocks:
    """The blocks of a model, each with its weights divided among the processes of ``group``.

    Args:
        blocks: with their parameters on the meta device. prefix: what their parameters' names begin with.
        weights: where the values are.
    """

    def __init__(
        self, blocks: list[nn.Module], prefix: str, weights: StoredWeights, group: dist.ProcessGroup, wire: Wire
    ) -> None:
        from torch.distributed.device_mesh import DeviceMesh

        self._blocks, self._prefix, self._weights, self._wire = blocks, prefix, weights, wire
        self._group = group
        self._mesh = DeviceMesh.from_group(group, "cpu")
        self._classes: list[type | None] = [None] * len(blocks)
        self._tables: list[dict[str, dict[str, nn.Parameter | None]]] = [{} for _ in blocks]
        self._values: list[dict[str, Values | None]] = []
        self._filled: int | None = None
        self._read: list[nn.Module] = []
        for block in blocks:
            self._values.append({name: noted_values(p) for name, p in block.named_parameters()})
        enter = [functools.partial(self._enter, number) for number in range(len(blocks))]
        self._handles = [b.register_forward_pre_hook(hook) for b, hook in zip(blocks, enter, strict=True)]

    def divide(self) -> None:
        """Read this process's rows of every block that is not divided yet, one block after the other."""
        for number, block in enumerate(self._blocks):
            if self._classes[number] is not None:
                continue
            self._shard(number)
            rows = {name: self._rows_of(p) for name, p in block.named_parameters()}
            read = self._weights.read({self._name(number, name): at for name, at in rows.items()})
            self._load(number, {name: read[self._name(number, name)] for name in rows})
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def finish(self) -> None:
        """Divide what was rounded, and make sure that all processes rounded alike.

        Raises:
            UserError: they did not.
        """
        if self._filled is not None:
            self._settle(self._filled)
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
        own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
        every = [torch.empty_like(own) for _ in range(self._group.size())]
        self._wire(0, lambda: dist.all_gather(every, own, group=self._group))
        if any(not torch.equal(other, own) for other in every):
            what = "the processes rounded the weights to int8 differently, so their rows do not belong together"
            raise UserError(what, where="precision", hint="use machines with one kind of processor, or precision bf16")

    def rejoin(self) -> None:
        """Let FSDP's changes reach layers that have taken the place of those it knows.

        An adapted layer is another object than the layer that it adapts. Both are given one table of
        parameters, in which FSDP exchanges its rows for the whole weight and back.
        """
        for block, tables in zip(self._blocks, self._tables, strict=True):
            for path, table in tables.items():
                module = block.get_submodule(path)
                if own_parameters(module) is not table:
                    share_parameters(module, table)

    def gather(self, number: int) -> None:
        """Give this process's rows of a block to another that runs it."""
        with self._as_sharded(number) as block:
            block.unshard()
            block.reshard()

    # One block at a time, as a whole, before it is divided

    def _enter(self, number: int, block: nn.Module, inputs: object) -> None:
        """Before a block that is not divided yet runs: read it, and let go of the one before."""
        if self._filled is not None and self._filled != number:
            self._settle(self._filled)
        if self._classes[number] is None and self._filled != number:
            names = {self._name(number, name): name for name, _ in block.named_parameters()}
            read = self._weights.read(dict.fromkeys(names))
            fill(block, {names[name]: value for name, value in read.items()})
            self._filled, self._read = number, [m for m in block.modules() if own_parameters(m)]

    def _settle(self, number: int) -> None:
        """After a block that was read as a whole: divide it where it was rounded, else forget it."""
        block, self._filled = self._blocks[number], None
        kept = set(block.modules())
        rounded = any(weight_scales(module) is not None for module in kept)
        for module in self._read:  # whoever still knows a layer that was rounded must not keep its weights
            if not (rounded and module in kept):
                for name, parameter in list(own_parameters(module).items()):
                    if parameter is not None:
                        setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
                        note_base(module.get_parameter(name), parameter)
        self._read = []
        if rounded:
            self._shard(number)

    # FSDP

    def _shard(self, number: int) -> None:
        """Divide a block; one on the meta device gets no values yet."""
        from torch.distributed.fsdp import fully_shard

        block = self._blocks[number]
        own = type(block)
        self._tables[number] = {path: own_parameters(m) for path, m in block.named_modules() if own_parameters(m)}
        fully_shard(block, mesh=self._mesh, reshard_after_forward=True)
        block.register_forward_hook(_no_view, prepend=True)
        self._classes[number] = type(block)
        with self._as_sharded(number) as sharded:
            sharded.set_custom_all_gather(_Gather(number, self._wire))
        # FSDP works by hooks; under its own class again, the block is recognized by the rest as before.
        block.__class__ = own
        self._note(number)

    def _load(self, number: int, values: dict[str, Tensor]) -> None:
        """Give a block that was divided on the meta device its rows."""
        from torch.distributed.tensor import DTensor, Shard

        own = dict(self._blocks[number].named_parameters())
        rows = {}
        for name, value in values.items():
            shape, stride = own[name].shape, own[name].stride()
            rows[name] = DTensor.from_local(value, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        with self._as_sharded(number) as block:
            block.load_state_dict(rows, assign=True, strict=False)
        for parameter in self._blocks[number].parameters():
            parameter.requires_grad_(False)
        self._note(number)

    def _note(self, number: int) -> None:
        for name, parameter in self._blocks[number].named_parameters():
            if (values := self._values[number][name]) is not None:
                note_values(parameter, values)

    def _rows_of(self, parameter: Tensor) -> Rows:
        """This process's rows, as FSDP deals them: of n rows ⌈n / P⌉ to each, while there are any."""
        count = parameter.shape[0]
        each = -(-count // self._group.size())
        return min(self._group.rank() * each, count), min((self._group.rank() + 1) * each, count)

    def _name(self, number: int, name: str) -> str:
        return f"{self._prefix}.{number}.{name}"

    @contextlib.contextmanager
    def _as_sharded(self, number: int) -> Iterator[Any]:
        """The block under the class that FSDP gave it, which has FSDP's methods."""
        block, given = self._blocks[number], self._classes[number]
        assert given is not None, f"block {number} is not divided"
        own = type(block)
        block.__class__ = given
        try:
            yield block
        finally:
            block.__class__ = own


def _no_view(block: nn.Module, inputs: object, output: Any) -> Any:
    """FSDP gathers for the backward by a hook on a block's output, which a change in place would drop from a
    view."""
    if isinstance(output, Tensor):
        return output.clone() if is_view(output) else output
    return tuple(_no_view(block, inputs, value) for value in output) if isinstance(output, tuple) else output


class _Gather:
    """FSDP's gathering of a block's rows (its ``AllGather``), straight into the block's weights.

    FSDP gathers a block into one flat buffer and copies the weights out of it, and gloo's ``all_gather`` has
    a buffer of the same size beside its output. Here the flat buffer is an :class:`_Arriving`, which takes no
    memory: the rows travel only when the weights are to be copied out of it.
    """

    def __init__(self, number: int, wire: Wire) -> None:
        self._number, self._wire = number, wire

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _Arriving(torch.Size(map(int, size)), dtype)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        assert isinstance(output_tensor, _Arriving)
        output_tensor.receive = lambda rows, out: self._wire(self._number, lambda: gather_rows(rows, out, group))


class _Arriving(Tensor):
    """What FSDP takes for the flat buffer of a block's gathered rows; it has a size and no values.

    Attributes:
        rows: this process's, of each weight.
        receive: gives all processes' rows of each weight to the tensors given.
    """

    rows: list[Tensor]
    receive: Callable[[list[Tensor], list[Tensor]], Any]

    @staticmethod
    def __new__(cls, size: torch.Size, dtype: torch.dtype) -> _Arriving:
        return sized_tensor(cls, size, dtype)

    def __init__(self, size: torch.Size, dtype: torch.dtype) -> None:
        self.rows = []

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The three things that FSDP does with its buffer."""
        ops = torch.ops
        if operator is ops.fsdp.all_gather_copy_in.default:
            own, buffer = args[:2]
            buffer.rows = list(own)
            return own[0], buffer
        if operator is ops.aten.view.default:
            viewed = _Arriving(torch.empty(args[0].shape, device="meta").view(args[1]).shape, args[0].dtype)
            viewed.rows, viewed.receive = args[0].rows, args[0].receive
            return viewed
        if operator is ops.fsdp.split_with_sizes_copy.default:
            return args[0].receive(args[0].rows, kwargs["out"])
        raise NotImplementedError(f"torch {torch.__version__} does {operator} with FSDP's buffer")


def gather_rows(rows: Sequence[Tensor], out: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """All processes' rows, each received where it belongs; every process sends its own to every other.

    Args:
        rows: this process's, of each weight, flat and of one type.
        out: for each weight (processes, numbers of ``rows``), contiguous.
    """
    rank, size = group.rank(), group.size()
    small = [n for n, own in enumerate(rows) if own.numel() * own.element_size() < SMALL]
    flat = torch.cat([rows[n] for n in small]) if small else rows[0][:0]
    found = flat.new_empty(size, len(flat))
    given = [(rows[n], out[n]) for n in range(len(rows)) if n not in small] + [(flat, found)] * bool(small)
    sent: list[Any] = []
    for step in range(1, size):  # at each, every process sends to one and receives from one
        to, source = (rank + step) % size, (rank - step) % size
        for tag, (own, whole) in enumerate(given):
            sent.append(dist.isend(own, group=group, group_dst=to, tag=tag))
            sent.append(dist.irecv(whole[source], group=group, group_src=source, tag=tag))
    for own, whole in given:
        whole[rank].copy_(own)
    for work in sent:
        work.wait()
    sizes = [len(rows[n]) for n in small]
    for process, received in enumerate(found):
        for n, value in zip(small, received.split(sizes), strict=True):
            out[n][process].copy_(value)


def _no_blocks(folder: Path, why: str) -> UserError:
    what = f"the model cannot be divided among processes: {why}"
    return UserError(what, where=str(folder), hint="set train.sharding: none")
