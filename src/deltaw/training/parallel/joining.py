"""Connect the processes that ``torchrun`` started.

The processes first compare their expected number of processes. A missing process, a different number, or a port in use
raises an error with a description within the time limit.
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
from deltaw.hub.loading import WeightLoader
from deltaw.machine.choices import choose_device, choose_threads
from deltaw.machine.memory import return_large_blocks
from deltaw.progress import LogFunction
from deltaw.settings.config import RunConfig
from deltaw.training.parallel.group import Group, suppress_native_stdout
from deltaw.training.parallel.launch_environment import LaunchEnvironment
from deltaw.training.reducer import SINGLE_PROCESS, Reducer


def apply_sharding(config: RunConfig, log: LogFunction) -> RunConfig:
    """Return the settings of a run with a sharded base model. Automatic generation of text is disabled.

    Raises:
        UserError: if the settings need something that a sharded base model does not support.
    """
    train = config.train
    lora = config.lora
    needs_full_weights = lora.init not in ("uniform", "gaussian", "orthogonal")
    has_block_format = config.precision in ("gguf", "nf4")
    device = choose_device(config.device).value
    for is_unsupported, feature, key, replacement in (
        (config.method != "lora", f"method {config.method}", "method", "lora"),
        (lora.dora, "DoRA, which needs the norms of full weights", "lora.dora", "false"),
        (needs_full_weights, f"init {lora.init}, which needs full weights or many rows", "lora.init", "uniform"),
        (lora.bias != "none", "trained biases of the base model", "lora.bias", "none"),
        (lora.target_parameters, "adapted parameters of modules", "lora.target_parameters", "null"),
        (lora.train_modules, "copies of modules", "lora.train_modules", "[]"),
        (lora.trainable_token_indices, "trained rows of embeddings", "lora.trainable_token_indices", "null"),
        (lora.active != "always", "an adapter with an invocation sequence", "lora.active", "always"),
        (train.keep_features is True, "kept features", "train.keep_features", "false"),
        (train.keep_general > 0, "general answers", "train.keep_general", "0"),
        (has_block_format, f"precision {config.precision}, whose blocks are not divided", "precision", "bf16 or int8"),
        (device != "cpu", f"device {config.device}", "device", "cpu"),
    ):
        if is_unsupported:
            message = f"a base model that is sharded over processes cannot be used with {feature}"
            hint = f"set train.sharding: none, or {key}: {replacement}"
            raise UserError(message, location=f"{key} (train.sharding: base)", hint=hint)
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "set_custom_all_gather"):
        version_error = f"sharding a base model needs a newer torch than {torch.__version__}"
        hint = "pip install --upgrade torch, or set train.sharding: none"
        raise UserError(version_error, location="train.sharding", hint=hint)
    if overrides := {key: value for key, value in (("drift", False), ("samples", 0)) if getattr(train, key) == "auto"}:
        disabled = " and ".join(f"train.{key}: {str(value).lower()}" for key, value in overrides.items())
        log(f"{disabled}: each token of an answer would gather every block of the sharded model")
    return config.with_train(**overrides, keep_features=False)


def sharded_loader(config: RunConfig, processes: Reducer) -> WeightLoader | None:
    """Return the loader that shards the blocks of the run's model, or None if the model is not sharded."""
    if config.train.sharding != "base" or not isinstance(processes, Group):
        return None
    from deltaw.runtime.sharded import ShardedLoader

    return_large_blocks()
    return ShardedLoader(processes.shard(), processes.gather_block, rounded=config.precision == "int8")


_ONE_PROCESS = "train in one process, without torchrun, or "


def apply_parallelism(config: RunConfig, processes: Reducer, log: LogFunction) -> RunConfig:
    """Return the settings that all processes train with. They are unchanged for a single process.

    Raises:
        UserError: if the settings need something that several processes do not support.
    """
    sharded = config.train.sharding == "base"
    if processes.size == 1:
        if sharded:
            log("train.sharding: base has no effect with a single process")
        return config
    if sharded:
        config = apply_sharding(config, log)
    train = config.train
    runs_full_rows = sharded or config.lora.active == "always"
    if train.keep_features is True and not runs_full_rows:
        raise _unsupported_error("stored keys and values of prompts", "train.keep_features", "set it to false")
    check_device(config, processes)
    log(f"{processes.size} processes, {processes.local_size} of them here: they share the rows of a step")
    if train.keep_features == "auto" and not runs_full_rows:
        log("train.keep_features: false: several processes store no keys and values of prompts")
        return config.with_train(keep_features=False)
    return config


def check_device(config: RunConfig, processes: Reducer) -> None:
    """Check that this machine has a CUDA device for each of its processes.

    Raises:
        UserError: if it has too few devices, or one device is configured for all processes.
    """
    kind, _, index = choose_device(config.device).value.partition(":")
    if kind == "cpu":
        return
    if index:
        raise _unsupported_error(f"the one device {config.device}", "device", "set device: cuda")
    num_devices = torch.cuda.device_count() if kind == "cuda" else 1
    if processes.local_size > num_devices:
        message = f"{processes.local_size} processes cannot share {num_devices} {kind} devices of this machine"
        hint = "start as many processes on a node as it has devices, or set device: cpu"
        raise UserError(message, location="device", hint=hint)


def threads_of(config: RunConfig, processes: Reducer) -> str | int:
    """Return the number of threads of a process: an equal share of the machine's, unless configured."""
    if processes.local_size == 1 or config.threads != "auto" or os.environ.get("OMP_NUM_THREADS"):
        return config.threads
    return max(1, choose_threads("auto").value // processes.local_size)


def _unsupported_error(feature: str, location: str, advice: str) -> UserError:
    return UserError(f"several processes cannot use {feature}", location=location, hint=_ONE_PROCESS + advice)


# Seconds that a process waits for other processes to connect and to answer in a step.
VARIABLE = "DELTAW_PEER_SECONDS"
DEFAULT_SECONDS = 300.0
# Time limit while process 0 evaluates, generates samples or saves. A process that exits is detected immediately.
ORDERS_SECONDS = 86400.0
_POLL = 0.05


def launch_size(environment: Mapping[str, str] | None = None) -> int:
    """Return the number of processes in the environment, or 1 by default.

    Raises:
        UserError: if it is not an integer.
    """
    return _read_int(os.environ if environment is None else environment, "WORLD_SIZE", 1, minimum=1)


def read_launch_environment(environment: Mapping[str, str] | None = None) -> LaunchEnvironment | None:
    """Return the settings in the environment, or None for a single process.

    Raises:
        UserError: if a variable is missing or invalid.
    """
    variables = os.environ if environment is None else environment
    size = launch_size(variables)
    if size == 1:
        return None
    rank = _read_int(variables, "RANK", None, minimum=0)
    if rank >= size:
        message = f"rank {rank} is out of range for {size} processes"
        raise UserError(message, location="the environment: RANK and WORLD_SIZE", hint="processes are counted from 0")
    if not variables.get("MASTER_ADDR"):
        raise _missing("MASTER_ADDR")
    local_rank = _read_int(variables, "LOCAL_RANK", rank, minimum=0)
    local_size = _read_int(variables, "LOCAL_WORLD_SIZE", 1, minimum=1)
    address = variables["MASTER_ADDR"]
    port = _read_int(variables, "MASTER_PORT", None, minimum=1)
    agent = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = variables.get("TORCHELASTIC_RESTART_COUNT", "0")
    seconds = _read_seconds(variables)
    return LaunchEnvironment(rank, size, local_rank, local_size, address, port, agent, restarts, seconds)


def require_single_process() -> None:
    """Reject a training in Python code that ``torchrun`` started with several processes.

    Each process would run the same training in the same folder.

    Raises:
        UserError: if the environment defines several processes.
    """
    if launch_size() > 1 and os.environ.get("RANK"):
        message = f"deltaw.fit trains in one process, but the environment sets {launch_size()}"
        hint = "run torchrun --nproc-per-node N -m deltaw train run.yaml, or remove RANK and WORLD_SIZE"
        raise UserError(message, location="the environment: RANK and WORLD_SIZE", hint=hint)


@contextlib.contextmanager
def join_processes() -> Iterator[Reducer]:
    """Connect to the processes in the environment and yield the communication object.

    ``torchrun`` sends SIGTERM to all processes if one of them fails. The signal does not prevent process 0 from saving.

    Raises:
        UserError: if the processes cannot connect.
        LostProcess: if a process exits.
    """
    launch = read_launch_environment()
    if launch is None:
        yield SINGLE_PROCESS
        return
    group = _connect(launch)

    def on_terminate(number: int, frame: FrameType | None) -> None:
        if not group.lost:
            raise KeyboardInterrupt

    previous_handler = signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield group
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
        dist.destroy_process_group()


def _connect(launch: LaunchEnvironment) -> Group:
    store = dist.PrefixStore(f"deltaw/{launch.attempt}", _store(launch))
    _verify_size(store, launch)
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda and launch.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(launch.local_rank)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    limit = timedelta(seconds=launch.seconds)
    try:
        with suppress_native_stdout():
            dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=limit)
            orders = dist.new_group(backend="gloo", timeout=timedelta(seconds=ORDERS_SECONDS))
            # Gradients are sent when they are computed, at a different time in each process. They need a separate
            # group, because other collectives run in a fixed order.
            gradients = dist.new_group(timeout=limit)
    except RuntimeError as error:
        message = f"the processes cannot connect to each other: {first_line(error)}"
        hint = "let GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) name the interface between the nodes"
        raise UserError(message, location=f"process {launch.rank} of {launch.size}", hint=hint) from error
    assert orders is not None and gradients is not None
    return Group(launch, orders, gradients)


def _store(launch: LaunchEnvironment) -> dist.Store:
    """Open the key-value store, which process 0 or torchrun's agent provides."""
    is_server = launch.rank == 0 and not launch.agent
    limit = timedelta(seconds=launch.seconds)
    location = f"MASTER_ADDR={launch.address} MASTER_PORT={launch.port}"
    try:
        address = launch.address
        port = launch.port
        return dist.TCPStore(address, port, None, is_server, limit, wait_for_workers=False, multi_tenant=False)
    except (dist.DistError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            hint = "give torchrun another one with --master-port, or --standalone on one machine"
            raise UserError(f"port {launch.port} is in use", location=location, hint=hint) from error
        if is_server:
            hint = "MASTER_ADDR must be a name or address of the machine that process 0 runs on"
            raise UserError(f"process 0 cannot listen: {first_line(error)}", location=location, hint=hint) from error
        hint = f"start all processes, and open the port in the firewall; {VARIABLE} is the time limit"
        message = f"process 0 did not answer within {launch.seconds:g} seconds"
        raise UserError(message, location=location, hint=hint) from error


def _verify_size(store: dist.Store, launch: LaunchEnvironment) -> None:
    """Wait for all processes and verify that they expect the same number of processes.

    Raises:
        UserError: if a process is late, has a duplicate rank, or expects another number.
    """
    if store.add(f"came/{launch.rank}", 1) > 1:
        hint = "each process needs a unique rank; torchrun sets it by --node-rank"
        raise UserError(f"two processes are both process {launch.rank}", location="the environment: RANK", hint=hint)
    store.set(f"size/{launch.rank}", str(launch.size))
    if launch.rank == 0:
        verdict = _verdict(store, launch)
        store.set("verdict", verdict)
        if verdict != str(launch.size):
            _wait_for_readers(store, launch)
    else:
        verdict = _read_verdict(store, launch)
        store.add("read", 1)
    if verdict == str(launch.size):
        return
    if verdict.isdigit():
        verdict = f"process {launch.rank} expects {launch.size} processes, and process 0 {verdict}"
    hint = f"start all nodes with the same --nnodes and --nproc-per-node; {VARIABLE} is the time limit in seconds"
    raise UserError(verdict, location=f"process {launch.rank}: WORLD_SIZE={launch.size}", hint=hint)


def _verdict(store: dist.Store, launch: LaunchEnvironment) -> str:
    """Return the number of processes, or a description of the problem. Runs in process 0."""
    missing = set(range(1, launch.size))
    deadline = time.monotonic() + launch.seconds
    while missing:
        for rank in sorted(missing):
            if store.check([f"size/{rank}"]):
                size = int(store.get(f"size/{rank}"))
                if size != launch.size:
                    return f"process {rank} expects {size} processes, and process 0 {launch.size}"
                missing.discard(rank)
        if missing and time.monotonic() > deadline:
            ranks = ", ".join(str(rank) for rank in sorted(missing)[:8])
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            return f"of {launch.size} processes, {ranks}{more} did not connect within {launch.seconds:g} seconds"
        time.sleep(_POLL)
    return str(launch.size)


def _read_verdict(store: dist.Store, launch: LaunchEnvironment) -> str:
    try:
        # Process 0 may have started later, and waits for the same time.
        store.wait(["verdict"], timedelta(seconds=2 * launch.seconds + 5))
        return store.get("verdict").decode()
    except (dist.DistError, RuntimeError) as error:
        message = "process 0 ended before all processes were connected"
        hint = "see the output of process 0 for the reason"
        raise UserError(message, location=f"process {launch.rank} of {launch.size}", hint=hint) from error


def _wait_for_readers(store: dist.Store, launch: LaunchEnvironment) -> None:
    """Wait until the connected processes have read the verdict, because the store exits with process 0."""
    num_connected = sum(store.check([f"size/{rank}"]) for rank in range(1, launch.size))
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline and store.add("read", 0) < num_connected:
        time.sleep(_POLL)


def _read_int(variables: Mapping[str, str], name: str, default: int | None, *, minimum: int) -> int:
    text = variables.get(name, "")
    if not text:
        if default is None:
            raise _missing(name)
        return default
    if not text.isdigit() or int(text) < minimum:
        message = f"{name}={text} is not a whole number from {minimum} up"
        raise UserError(message, location="the environment", hint="let torchrun set it")
    return int(text)


def _read_seconds(variables: Mapping[str, str]) -> float:
    text = variables.get(VARIABLE, "")
    try:
        seconds = float(text) if text else DEFAULT_SECONDS
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= ORDERS_SECONDS:
        raise UserError(f"{VARIABLE}={text} is not a number of seconds", location="the environment", hint="such as 300")
    return seconds


def _missing(name: str) -> UserError:
    hint = "start them with torchrun --nproc-per-node N -m deltaw train …, or unset WORLD_SIZE"
    return UserError(f"WORLD_SIZE sets several processes, but {name} is not set", location="the environment", hint=hint)
