"""Child process of the reward ``unit-tests``: executes the completion and exchanges calls with the tests.

The completion runs in a process without tests or results. The runner (``unit_tests_runner.py``) calls its functions
through :class:`Peer`: plain data travels by value, other objects as handles that forward operations. This file imports
nothing of deltaw. All received data is untrusted and is decoded from JSON.
"""

import builtins
import contextlib
import ctypes
import importlib
import io
import itertools
import json
import os
import struct
import sys
import threading
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import IO, Any, NoReturn

MAX_MESSAGE_BYTES = 1 << 24
MAX_FILE_BYTES = 1 << 24
MAX_OPEN_FILES = 64
MAX_OUTPUT = 1 << 20


def _dunder(names: str, prefixes: Sequence[str] = ("",)) -> set[str]:
    return {f"__{prefix}{name}__" for name in names.split() for prefix in prefixes}


# Operators that could let an untrusted object pass for plain data, for example an ``__eq__`` that returns True.
GUARDED_OPERATORS = _dunder("eq ne lt le gt ge contains instancecheck subclasscheck neg pos abs invert") | _dunder(
    "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift divmod", ("", "r", "i")
)
SPECIAL = GUARDED_OPERATORS | _dunder(
    "call len iter next reversed getitem setitem delitem enter exit bool int float index complex round trunc floor "
    "ceil str repr format hash bytes aiter anext await fspath"
)
# Methods that return a bool about plain data, such as ``startswith``. An untrusted object could always return True.
_PREDICATE_PREFIXES = ("is", "startswith", "endswith")
PREDICATE_METHODS = {name for t in (str, set, float) for name in dir(t) if name.startswith(_PREDICATE_PREFIXES)}
SEQUENCES: Any = list, tuple, set, frozenset, bytearray, deque
MAPPINGS: Any = dict, OrderedDict, Counter, defaultdict
MUTABLE: Any = list, set, bytearray, deque, dict, OrderedDict, Counter
REDUCIBLE_TYPES: Any = range, slice, Decimal, Fraction, date, time, datetime, timedelta
# Encoders of plain data types. Each returns the arguments that rebuild the value.
ENCODERS: dict[Any, Any] = dict.fromkeys(SEQUENCES, list) | dict.fromkeys(MAPPINGS, lambda value: value.items())
ENCODERS |= dict.fromkeys(REDUCIBLE_TYPES, lambda value: value.__reduce__()[1])
ENCODERS |= {int: lambda value: (hex(value), 16), complex: lambda value: (value.real, value.imag)}
ENCODERS[bytes] = lambda value: (value.decode("latin-1"), "latin-1")
TYPES_BY_NAME = {kind.__name__: kind for kind in ENCODERS} | {"defaultdict": dict}
SUBCLASSABLE_TYPES: tuple[Any, ...] = int, float, str, bytes, tuple
# Modules whose exception classes are looked up by name on the other side.
ERROR_MODULES = {"json", "decimal", "asyncio", "re", "struct", "queue", "subprocess", "csv", "dataclasses"}


# Modules that may be sent by name. Importing another one could run code: unittest.__main__ runs tests of the folder.
MODULES = {"math", "cmath", "random", "re", "string", "itertools", "functools", "operator", "statistics", "heapq"}
MODULES |= {"bisect", "collections", "collections.abc", "copy", "datetime", "time", "decimal", "fractions", "numpy"}
MODULES |= {"typing", "dataclasses", "enum", "json"}


class Remote:
    """Handle to an object of the other process. Subclasses define ``remote_peer`` and forwarding special methods."""

    def __getattr__(self, name: str) -> Any:
        # NumPy reads any address that an __array_interface__ names.
        if self.remote_peer.is_untrusted and (name in PREDICATE_METHODS or name.startswith("__array")):
            raise AttributeError(f"the completion's {type(self).__name__} object is used as plain data in {name}")
        return self.remote_peer.request("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.remote_peer.request("setattr", self, name, value)


def _forward(name: str) -> Callable[..., Any]:
    """Return a special method that forwards to the other process.

    If the other process is not trusted, a comparison with plain data is unequal, and other operators with plain data
    raise TypeError.
    """

    def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        peer = self.remote_peer
        if peer.is_untrusted and name in GUARDED_OPERATORS and not all(isinstance(value, Remote) for value in args):
            if name in ("__eq__", "__ne__", "__instancecheck__", "__subclasscheck__"):
                return name == "__ne__"
            raise TypeError(f"the completion's {type(self).__name__} object is used as plain data in {name}")
        return peer.request("special", self, name, *args, **kwargs)

    return method


class Peer:
    """One end of the connection between the runner and the completion. Requests may nest in both directions.

    Args:
        reader, writer: Binary pipes.
        handler: Serves a request: ``handler(peer, operation, *args, **kwargs)``.
        on_disconnect: Called with the reason if the other process exits or sends an invalid message. Must not return.
        is_untrusted: True if the other process is untrusted.
    """

    def __init__(
        self,
        reader: IO[bytes],
        writer: IO[bytes],
        handler: Callable[..., Any],
        on_disconnect: Callable[[str], NoReturn],
        is_untrusted: bool = False,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._handler = handler
        self._on_disconnect = on_disconnect
        self.is_untrusted = is_untrusted
        self._exported_objects: dict[int, Any] = {}
        self._exported_keys: dict[int, int] = {}
        self._imported_handles: dict[int, Any] = {}
        self._imported_keys: dict[int, int] = {}
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self.output = io.StringIO()

    def request(self, operation: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run an operation on the other side, and return its result or raise its exception.

        Mutable arguments that the callee changed are updated in place.
        """
        with self._lock:
            self._send("request", (operation, args, kwargs))
            kind, value, changes = self.receive()
        for argument, content in zip([*args, *kwargs.values()], changes, strict=False):
            if type(argument) is type(content) and type(content) in MUTABLE:
                argument.clear()
                (argument.extend if hasattr(argument, "extend") else argument.update)(content)
        if kind == "error":
            raise value
        return value

    def owns(self, value: object) -> bool:
        """Return True if a handle to this object was sent to the other side."""
        return id(value) in self._exported_keys

    def _handle_request(self, request: Any) -> None:
        operation, args, kwargs = request
        arguments = [*args, *kwargs.values()]
        received = list(map(self._encode, arguments))
        try:
            kind = "result"
            value = self._handler(self, operation, *args, **kwargs)
        except BaseException as error:
            kind = "error"
            value = error
        contents = zip(received, map(self._encode, arguments), strict=True)
        self._send(kind, value, [None if before == after else after for before, after in contents])

    def _send(self, kind: str, value: Any, changes: Sequence[Any] = ()) -> None:
        text = self.output.getvalue()[:MAX_OUTPUT]
        self.output.truncate(self.output.seek(0))
        try:
            self._writer.write(json.dumps([kind, text, changes, self._encode(value)]).encode() + b"\n")
            self._writer.flush()
        except (OSError, ValueError):
            self._on_disconnect("the process of the completion ended")

    def receive(self) -> tuple[str, Any, list[Any]]:
        """Process requests until a response arrives. Return its kind, its value and the updated arguments."""
        kind = "request"
        while kind == "request":
            line = self._reader.readline(MAX_MESSAGE_BYTES)
            if not line.endswith(b"\n"):
                self._on_disconnect("the process of the completion ended, or its result exceeds 16 MiB")
            try:
                kind, text, changes, value = json.loads(line)
                value = self._decode(value)
                changes = list(map(self._decode, changes))
            except Exception as error:
                self._on_disconnect(f"the completion sent an invalid message: {error!r}")
            sys.stdout.write(str(text))
            if kind == "request":
                self._handle_request(value)
        return kind, value, changes

    def _encode(self, value: Any) -> Any:
        """Return a value as JSON: plain data by value, other objects as handles."""
        kind = type(value)
        if value is None or kind in (bool, str, float) or (kind is int and abs(value) < 1 << 53):
            return value
        if id(value) in self._imported_keys:
            return ["owned_by_receiver", self._imported_keys[id(value)]]
        if kind in ENCODERS:
            return ["value", kind.__name__, [self._encode(part) for part in ENCODERS[kind](value)]]
        if kind.__module__ == "numpy" and hasattr(value, "dtype") and not value.dtype.hasobject:
            return ["numpy", value.dtype.str, list(value.shape), value.tobytes().hex()]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if value is NotImplemented or value is Ellipsis or (kind is type and value.__module__ == "builtins"):
            return ["builtin", getattr(value, "__name__", repr(value))]
        if isinstance(value, SUBCLASSABLE_TYPES):  # a subclass may override methods
            base = next(base for base in SUBCLASSABLE_TYPES if isinstance(value, base))
            return self._encode(base.__getnewargs__(value)[0])
        if isinstance(value, BaseException):
            fields = [[key, self._encode(item)] for key, item in vars(value).items()]
            return ["exception", self._encode(kind), self._encode(value.args), fields]
        key = self._exported_keys.setdefault(id(value), next(self._numbers))
        self._exported_objects[key] = value
        if isinstance(value, type) and issubclass(value, BaseException):
            bases = [self._encode(base) for base in value.__bases__ if issubclass(base, BaseException)]
            return ["class", key, value.__name__, value.__module__, bases]
        return ["handle", key, kind.__name__, sorted(name for name in SPECIAL if hasattr(kind, name))]

    def _decode(self, data: Any) -> Any:
        """Decode a value. The input is untrusted and may be any JSON."""
        if not isinstance(data, list):
            return data
        match data:
            case ["owned_by_receiver", key]:
                return self._exported_objects[key]
            case ["value", name, parts]:
                kind = TYPES_BY_NAME[name]
                parts = list(map(self._decode, parts))
                if kind in MAPPINGS:
                    return kind(dict(parts))
                return kind(parts) if kind in SEQUENCES else kind(*parts)
            case ["numpy", dtype, shape, values]:
                import numpy

                return numpy.frombuffer(bytes.fromhex(values), numpy.dtype(dtype)).reshape(shape).copy()[()]
            case ["module", name]:
                return importlib.import_module(name) if name in MODULES else None
            case ["builtin", name] if name in ("NotImplemented", "Ellipsis") or isinstance(vars(builtins)[name], type):
                return vars(builtins)[name]
            case ["exception", kind, args, fields]:
                kind = self._decode(kind)
                args = self._decode(args)
                if not issubclass(kind, BaseException):
                    raise ValueError("not an exception")
                error = kind.__new__(kind, *args)
                with contextlib.suppress(Exception):  # some constructors take other arguments
                    error.__init__(*args)
                vars(error).update((key, self._decode(item)) for key, item in fields)
                return error
            case ["class", key, name, module, bases]:
                module = sys.modules.get(module) if module.partition(".")[0] in ERROR_MODULES else None
                known = getattr(module, name, None)
                if isinstance(known, type) and issubclass(known, Exception):
                    return known
                bases = tuple(map(self._decode, bases))
                if not all(issubclass(base, BaseException) for base in bases):
                    raise ValueError("not an exception class")
                return self._adopt(key, lambda: type(name, bases, {}))
            case ["handle", key, name, special]:
                methods = {method: _forward(method) for method in SPECIAL.intersection(special)}
                handle = self._adopt(key, lambda: type(name, (Remote,), methods | {"remote_peer": self})())
                return self._awaited(handle) if "__await__" in special else handle
        raise ValueError("unknown value encoding")

    def _adopt(self, key: int, create: Callable[[], Any]) -> Any:
        """Return the local object that represents an object of the other process."""
        if key not in self._imported_handles:
            self._imported_handles[key] = create()
            self._imported_keys[id(self._imported_handles[key])] = key
        return self._imported_handles[key]

    async def _awaited(self, handle: Any) -> Any:
        return self.request("await", handle)


def landlock_version() -> int:
    """Return the version of Landlock's interface, or a number below 1 if the system has no Landlock."""
    # landlock_create_ruleset(LANDLOCK_CREATE_RULESET_VERSION)
    return int(ctypes.CDLL(None).syscall(444, None, 0, 1)) if sys.platform.startswith("linux") else 0


def confine(folder: str, cpu_seconds: int, megabytes: int) -> None:
    """Restrict this process and its descendants as far as the system allows.

    Sets resource limits. On Linux, also drops capabilities and applies Landlock: only the interpreter, system folders
    and ``folder`` are accessible. Newer kernels also block TCP connections (Landlock 4) and signals to other processes
    (Landlock 6).
    """
    if os.name == "nt":
        return
    import resource

    limits = {"CORE": 0, "CPU": cpu_seconds, "AS": megabytes << 20, "FSIZE": MAX_FILE_BYTES, "NOFILE": MAX_OPEN_FILES}
    for name, limit in limits.items():
        with contextlib.suppress(OSError, ValueError):  # macOS has no memory limit
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    version = landlock_version()
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    if version < 1:
        return
    everything = (1 << min(15, 12 + version)) - 1
    handled = struct.pack("QQQ", everything, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    rules = libc.syscall(444, handled, 8 if version < 4 else 16 if version < 6 else 24, 0)
    system = "/usr", "/bin", "/lib", "/lib64", "/etc", "/opt", "/proc", "/sys", sys.prefix, sys.base_prefix
    devices = "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"
    paths = {**dict.fromkeys(system, 0b1101), **dict.fromkeys(devices, 0b110), folder: everything, __file__: 0b101}
    for path, access in paths.items():
        with contextlib.suppress(OSError):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            libc.syscall(445, rules, 1, struct.pack("=Qi", access, opened), 0)  # landlock_add_rule
            os.close(opened)
    libc.syscall(446, rules, 0)  # landlock_restrict_self
    os.close(rules)


def _load(code: str) -> dict[str, Any]:
    """Execute the completion and return its module-level names and values."""
    module = sys.modules["completion"] = types.ModuleType("completion")
    exec(compile(code, "completion", "exec"), vars(module))
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


def _special(target: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
    return getattr(type(target), name)(target, *args, **kwargs)


def _await(target: Any) -> Any:
    import asyncio

    async def awaited() -> Any:
        return await target

    return asyncio.run(awaited())


OPERATIONS: dict[str, Any] = {"load": _load, "special": _special, "await": _await}
OPERATIONS |= {"getattr": getattr, "setattr": setattr}


def _execute_operation(peer: Peer, operation: str, /, *args: Any, **kwargs: Any) -> Any:
    return OPERATIONS[operation](*args, **kwargs)


def take_standard_streams() -> tuple[IO[bytes], IO[bytes]]:
    """Return stdin and stdout as binary pipes, and redirect stdin, stdout and stderr to the null device."""
    streams = (os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    return streams


def _main() -> None:
    folder = sys.argv[1]
    cpu_seconds = int(sys.argv[2])
    megabytes = int(sys.argv[3])
    reader, writer = take_standard_streams()
    if hasattr(os, "nice"):
        os.nice(5)  # lower priority than the runner, which enforces the limits
    confine(folder, cpu_seconds, megabytes)
    peer = Peer(reader, writer, _execute_operation, on_disconnect=lambda reason: os._exit(1))
    sys.stdout = peer.output
    sys.argv = [""]
    peer.receive()


if __name__ == "__main__":
    _main()
