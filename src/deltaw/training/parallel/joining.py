"""How processes find each other: from the environment that ``torchrun`` sets, within a time limit.

Before anything else travels, each tells how many processes it was told there are. One that never comes, a
number that differs, and a port in use become errors in words. Knows no training.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from deltaw.errors import UserError, first_line
from deltaw.hub.loading import Weights
from deltaw.machine.choices import choose_device, choose_threads
from deltaw.machine.memory import give_large_blocks_back
from deltaw.settings import RunConfig
from deltaw.training.callbacks import Say
from deltaw.training.parallel.group import Group, LostProcess, Told, unprinted
from deltaw.training.parallel.reducer import ALONE, Reducer


def as_sharded(config: RunConfig, say: Say) -> RunConfig:
    """The settings of a run whose base model is divided; what reads text of its own is off unless asked for.

    Raises:
        UserError: they ask for what a divided base model cannot do.
    """
    train, lora = config.train, config.lora
    needs_whole = lora.init not in ("uniform", "gaussian", "orthogonal")
    blocks, device = config.precision in ("gguf", "nf4"), choose_device(config.device).value
    for wrong, what, key, instead in (
        (config.method != "lora", f"method {config.method}", "method", "lora"),
        (config.task != "causal-lm", f"task {config.task}", "task", "causal-lm"),
        (lora.dora, "DoRA, which needs the norms of whole weights", "lora.dora", "false"),
        (needs_whole, f"init {lora.init}, which needs whole weights or many rows of inputs", "lora.init", "uniform"),
        (lora.bias != "none", "trained biases of the base model", "lora.bias", "none"),
        (lora.target_parameters, "adapted parameters of modules", "lora.target_parameters", "null"),
        (lora.train_modules, "copies of modules", "lora.train_modules", "[]"),
        (lora.trainable_token_indices, "trained rows of embeddings", "lora.trainable_token_indices", "null"),
        (lora.activation != "always", "an adapter with an invocation sequence", "lora.activation", "always"),
        (train.keep_features is True, "kept features", "train.keep_features", "false"),
        (train.keep_general > 0, "general answers", "train.keep_general", "0"),
        (blocks, f"precision {config.precision}, whose blocks are not divided", "precision", "bf16 or int8"),
        (device != "cpu", f"device {config.device}", "device", "cpu"),
    ):
        if wrong:
            refused = f"a base model that is sharded over processes cannot be used with {what}"
            hint = f"set train.sharding: none, or {key}: {instead}"
            raise UserError(refused, where=f"{key} (train.sharding: base)", hint=hint)
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "set_custom_all_gather"):
        old = f"sharding a base model needs a newer torch than {torch.__version__}"
        hint = "pip install --upgrade torch, or set train.sharding: none"
        raise UserError(old, where="train.sharding", hint=hint)
    answers = {"drift": False, "samples": 0}
    off = {key: value for key, value in answers.items() if getattr(train, key) == "auto"}
    if off:
        said = " and ".join(f"train.{key}: {str(value).lower()}" for key, value in off.items())
        say(f"{said}: each token of an answer would gather every block of the divided model")
    return config.with_train(**off, keep_features=False)


def divided(config: RunConfig, processes: Reducer) -> Weights | None:
    """What loads the run's model with its blocks divided; None where each process holds it whole."""
    if config.train.sharding != "base" or not isinstance(processes, Group):
        return None
    from deltaw.runtime.sharded import ShardedLoader

    give_large_blocks_back()
    return ShardedLoader(processes.divide(), processes.gathering, rounded=config.precision == "int8")


_ONE_PROCESS = "train in one process, without torchrun, or "


def as_parallel(config: RunConfig, processes: Reducer, say: Say) -> RunConfig:
    """The settings that all processes train with; those given where one trains alone.

    Raises:
        UserError: they ask for what several processes cannot do.
    """
    sharded = config.train.sharding == "base"
    if processes.size == 1:
        if sharded:
            say("train.sharding: base: one process alone holds the whole base model")
        return config
    if sharded:
        config = as_sharded(config, say)
    train = config.train
    whole = sharded or config.lora.activation == "always"
    if train.keep_features is True and not whole:
        raise _refused("kept keys and values of prompts", "train.keep_features", "set it to false")
    check_device(config, processes)
    say(f"{processes.size} processes, {processes.local_size} of them here: they share the rows of a step")
    if train.keep_features == "auto" and not whole:
        say("train.keep_features: false: several processes keep no keys and values of prompts")
        return config.with_train(keep_features=False)
    return config


def check_device(config: RunConfig, processes: Reducer) -> None:
    """Refuse more processes on this machine than it has CUDA devices, where they compute on these.

    Raises:
        UserError: there are too few, or one device is named for all.
    """
    kind, _, index = choose_device(config.device).value.partition(":")
    if kind == "cpu":
        return
    if index:
        raise _refused(f"the one device {config.device}", "device", "set device: cuda")
    there = torch.cuda.device_count() if kind == "cuda" else 1
    if processes.local_size > there:
        what = f"{processes.local_size} processes cannot share {there} {kind} devices of this machine"
        hint = "start as many processes on a node as it has devices, or set device: cpu"
        raise UserError(what, where="device", hint=hint)


def threads_of(config: RunConfig, processes: Reducer) -> str | int:
    """Threads of a process: its part of those that the machine gives, where the settings name no number."""
    if processes.local_size == 1 or config.threads != "auto" or os.environ.get("OMP_NUM_THREADS"):
        return config.threads
    return max(1, choose_threads("auto").value // processes.local_size)


def _refused(what: str, where: str, instead: str) -> UserError:
    return UserError(f"several processes cannot use {what}", where=where, hint=_ONE_PROCESS + instead)


# Seconds that a process waits for the others: to come, and to answer in a step.
VARIABLE, SECONDS = "DELTAW_PEER_SECONDS", 300.0
# What waits while process 0 evaluates, writes samples or saves; a process that dies is noticed at once.
ORDERS_SECONDS = 86400.0
_POLL = 0.05


def told_size(environment: Mapping[str, str] | None = None) -> int:
    """How many processes the environment speaks of; 1 where it does not.

    Raises:
        UserError: it speaks of no whole number.
    """
    found = os.environ if environment is None else environment
    return _number(found, "WORLD_SIZE", 1, least=1)


def told(environment: Mapping[str, str] | None = None) -> Told | None:
    """What the environment says; None where one process trains alone.

    Raises:
        UserError: something is missing or no number.
    """
    found = os.environ if environment is None else environment
    size = told_size(found)
    if size == 1:
        return None
    rank = _number(found, "RANK", None, least=0)
    if rank >= size:
        what = f"there is no process {rank} among {size} processes"
        raise UserError(what, where="the environment: RANK and WORLD_SIZE", hint="processes are counted from 0")
    if not found.get("MASTER_ADDR"):
        raise _missing("MASTER_ADDR")
    return Told(
        rank,
        size,
        _number(found, "LOCAL_RANK", rank, least=0),
        _number(found, "LOCAL_WORLD_SIZE", 1, least=1),
        found["MASTER_ADDR"],
        _number(found, "MASTER_PORT", None, least=1),
        found.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        found.get("TORCHELASTIC_RESTART_COUNT", "0"),
        _seconds(found),
    )


def refuse_alone() -> None:
    """Refuse a training by a call in Python where ``torchrun`` started several processes: it takes part with
    no others, so that all would train the same, into one folder.

    Raises:
        UserError: the environment is that of one process among several.
    """
    if told_size() > 1 and os.environ.get("RANK"):
        raise UserError(
            f"deltaw.fit trains in one process, but the environment sets {told_size()}",
            where="the environment: RANK and WORLD_SIZE",
            hint="train together with torchrun --nproc-per-node N -m deltaw train run.yaml; to train alone, "
            "take RANK and WORLD_SIZE out of the environment",
        )


@contextlib.contextmanager
def joined() -> Iterator[Reducer]:
    """While open, this process belongs to those of the environment; alone where it speaks of none.

    SIGTERM, with which ``torchrun`` ends the others when one process fails, does not keep process 0 from
    saving.

    Raises:
        UserError: they do not come together.
        LostProcess: a process ended.
    """
    who = told()
    if who is None:
        yield ALONE
        return
    group = _join(who)

    def ask(number: int, frame: FrameType | None) -> None:
        if not group.lost:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield group
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def _join(who: Told) -> Group:
    store = dist.PrefixStore(f"deltaw/{who.attempt}", _store(who))
    _agree(store, who)
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda and who.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(who.local_rank)
    backend, limit = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=who.seconds)
    try:
        with unprinted():
            dist.init_process_group(backend, store=store, rank=who.rank, world_size=who.size, timeout=limit)
            orders = dist.new_group(backend="gloo", timeout=timedelta(seconds=ORDERS_SECONDS))
            # Gradients leave when they are there, which each process sees at another time: not among what else
            # is asked of all in one order.
            gradients = dist.new_group(timeout=limit)
    except RuntimeError as error:
        what = f"the processes cannot connect to each other: {first_line(error)}"
        hint = "let GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) name the interface between the nodes"
        raise UserError(what, where=f"process {who.rank} of {who.size}", hint=hint) from error
    assert orders is not None and gradients is not None
    return Group(who, orders, gradients)


def _store(who: Told) -> dist.Store:
    """The table that all write to; process 0 has it, or torchrun's own agent."""
    serves = who.rank == 0 and not who.agent
    limit = timedelta(seconds=who.seconds)
    place = f"MASTER_ADDR={who.address} MASTER_PORT={who.port}"
    try:
        return dist.TCPStore(
            who.address, who.port, is_master=serves, timeout=limit, wait_for_workers=False, multi_tenant=False
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            hint = "give torchrun another one with --master-port, or --standalone on one machine"
            raise UserError(f"port {who.port} is in use", where=place, hint=hint) from error
        if serves:
            hint = "MASTER_ADDR must be a name or address of the machine that process 0 runs on"
            raise UserError(f"process 0 cannot listen there: {first_line(error)}", where=place, hint=hint) from error
        hint = f"start all processes, and open the port in the firewall; {VARIABLE} is the time limit"
        raise UserError(f"process 0 did not answer within {who.seconds:g} seconds", where=place, hint=hint) from error


def _agree(store: dist.Store, who: Told) -> None:
    """Wait until all are there and were told the same number.

    Raises:
        UserError: one does not come in time, comes twice, or was told another number.
    """
    if store.add(f"came/{who.rank}", 1) > 1:
        hint = "each process has a number of its own; torchrun sets it by --node-rank"
        raise UserError(f"two processes are both process {who.rank}", where="the environment: RANK", hint=hint)
    store.set(f"size/{who.rank}", str(who.size))
    if who.rank == 0:
        verdict = _verdict(store, who)
        store.set("verdict", verdict)
        if verdict != str(who.size):
            _await_readers(store, who)
    else:
        verdict = _read_verdict(store, who)
        store.add("read", 1)
    if verdict == str(who.size):
        return
    if verdict.isdigit():
        verdict = f"process {who.rank} was told that there are {who.size} processes, and process 0 {verdict}"
    hint = f"start all nodes with the same --nnodes and --nproc-per-node; {VARIABLE} is the time limit in seconds"
    raise UserError(verdict, where=f"process {who.rank}: WORLD_SIZE={who.size}", hint=hint)


def _verdict(store: dist.Store, who: Told) -> str:
    """What process 0 finds: the number of processes, or what is wrong."""
    missing = set(range(1, who.size))
    until = time.monotonic() + who.seconds
    while missing:
        for rank in sorted(missing):
            if store.check([f"size/{rank}"]):
                size = int(store.get(f"size/{rank}"))
                if size != who.size:
                    return f"process {rank} was told that there are {size} processes, and process 0 {who.size}"
                missing.discard(rank)
        if missing and time.monotonic() > until:
            shown = ", ".join(str(rank) for rank in sorted(missing)[:8])
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            return f"of {who.size} processes, {shown}{more} did not come within {who.seconds:g} seconds"
        time.sleep(_POLL)
    return str(who.size)


def _read_verdict(store: dist.Store, who: Told) -> str:
    try:
        # Process 0 waits as long for the others, from when it came itself.
        store.wait(["verdict"], timedelta(seconds=2 * who.seconds + 5))
        return store.get("verdict").decode()
    except (dist.DistError, RuntimeError) as error:
        what = "process 0 ended before all processes were there"
        hint = "what process 0 printed says why"
        raise UserError(what, where=f"process {who.rank} of {who.size}", hint=hint) from error


def _await_readers(store: dist.Store, who: Told) -> None:
    """The table goes with process 0: let those that are there read the verdict first."""
    there = sum(store.check([f"size/{rank}"]) for rank in range(1, who.size))
    until = time.monotonic() + 5.0
    while time.monotonic() < until and store.add("read", 0) < there:
        time.sleep(_POLL)


def _number(found: Mapping[str, str], name: str, default: int | None, *, least: int) -> int:
    text = found.get(name, "")
    if not text:
        if default is None:
            raise _missing(name)
        return default
    if not text.isdigit() or int(text) < least:
        what = f"{name}={text} is not a whole number from {least} up"
        raise UserError(what, where="the environment", hint="let torchrun set it")
    return int(text)


def _seconds(found: Mapping[str, str]) -> float:
    text = found.get(VARIABLE, "")
    try:
        seconds = float(text) if text else SECONDS
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= ORDERS_SECONDS:
        raise UserError(f"{VARIABLE}={text} is not a number of seconds", where="the environment", hint="such as 300")
    return seconds


def _missing(name: str) -> UserError:
    hint = "start them with torchrun --nproc-per-node N -m deltaw train …, or unset WORLD_SIZE"
    return UserError(f"WORLD_SIZE sets several processes, but {name} is not set", where="the environment", hint=hint)


__all__ = ["LostProcess", "Told", "joined", "refuse_alone", "told", "told_size"]
