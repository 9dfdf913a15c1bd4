"""Runs the code of a completion for the reward ``unit-tests``, and the connection between it and the tests.

The completion runs in a process without tests or results. The runner (``unit_tests_runner.py``) calls its functions
through :class:`Peer`: plain data travels by value, other objects as handles that forward operations. This file imports
nothing of deltaw and trusts nothing that it receives: each value is rebuilt from JSON.
"""

import builtins
import collections
import contextlib
import ctypes
import importlib
import io
import itertools
import json
import operator
import os
import struct
import sys
import threading
import types
from typing import Any

MAX_MESSAGE_BYTES = 1 << 24
MAX_FILE_BYTES, MAX_OPEN_FILES = 1 << 24, 64
MAX_SHARED, MAX_OUTPUT = 64, 1 << 20


def _dunder(names, prefixes=("",)):
    return {f"__{prefix}{name}__" for name in names.split() for prefix in prefixes}


COMPARISONS = _dunder("eq ne lt le gt ge contains instancecheck subclasscheck")
ARITHMETIC = _dunder(
    "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift divmod", ("", "r", "i")
) | _dunder("neg pos abs invert")
SPECIAL = (
    COMPARISONS
    | ARITHMETIC
    | _dunder(
        "call len iter next reversed getitem setitem delitem enter exit bool int float index complex round trunc floor "
        "ceil str repr format hash bytes aiter anext await fspath"
    )
)
# Methods that answer a question about plain data. An object that only pretends to be data could always answer True.
QUESTIONS = {
    name for kind in (str, set, float) for name in dir(kind) if name.startswith(("is", "startswith", "endswith"))
}
MAPPINGS: tuple[Any, ...] = dict, collections.Counter, collections.OrderedDict, collections.defaultdict
CONTAINERS: dict[str, Any] = {kind.__name__: kind for kind in (list, set, bytearray, collections.deque, *MAPPINGS)}
# Immutable types that are rebuilt from the arguments of their constructor, which ``__reduce__`` gives for most.
VALUES = {f"datetime.{name}" for name in ("date", "time", "datetime", "timedelta", "timezone")} | {
    *("builtins.int", "builtins.bytes", "builtins.complex", "builtins.range", "builtins.slice"),
    *("decimal.Decimal", "fractions.Fraction"),
}
ARGUMENTS = {
    int: lambda value: (hex(value), 16),
    bytes: lambda value: (value.decode("latin-1"), "latin-1"),
    complex: lambda value: (value.real, value.imag),
}
PLAIN: tuple[Any, ...] = int, float, str, bytes, tuple
# Modules whose exception classes are looked up by name on the other side.
ERROR_MODULES = {"json", "decimal", "asyncio", "re", "struct", "queue", "subprocess", "csv", "dataclasses"}


class PeerLost(BaseException):
    """The other process ended or sent something invalid. Not an Exception, so that no test catches it by accident."""


class Remote:
    """Base of handles to objects of the other process. Subclasses have the special methods of the object's type."""

    def __init__(self, peer, key, base=None):
        self.__dict__.update(_peer=peer, _key=key, _base=base, _aliases=set(), _trusted=False)

    def __getattr__(self, name):
        if name in QUESTIONS and self._peer.guards and not self._trusted:
            raise AttributeError(f"the completion's {type(self).__name__} object is used as plain data in {name}")
        return self._peer.request("getattr", self, name)

    def __setattr__(self, name, value):
        self._peer.request("setattr", self, name, value)

    def __delattr__(self, name):
        self._peer.request("delattr", self, name)


def _forward(name):
    """Return a special method that runs in the other process.

    An operator shows the value that a test expects to the object, which could claim to be equal to it. So only objects
    of classes that the tests instantiate by a capitalized name are compared or combined with plain data.
    """

    def method(self, /, *args, **kwargs):
        peer = self._peer
        pretends = peer.guards and not self._trusted and not all(isinstance(value, Remote) for value in args)
        if pretends and name in COMPARISONS | ARITHMETIC:
            if self._base is not None:
                plain = peer.request("plain", self)
                if type(plain) not in CONTAINERS.values():
                    raise TypeError("not a container")
                return getattr(plain, name, lambda *_: NotImplemented)(*args)
            if name in ("__eq__", "__ne__", "__instancecheck__", "__subclasscheck__"):
                return name == "__ne__"
            raise TypeError(f"the completion's {type(self).__name__} object is used as plain data in {name}")
        result = peer.request("special", self, name, *args, **kwargs)
        if isinstance(result, Remote):
            is_class = hasattr(type(self), "__instancecheck__") and self._aliases
            made = name == "__call__" and is_class and all(alias[0].isupper() for alias in self._aliases)
            result.__dict__["_trusted"] |= bool(made) or (self._trusted and name in ARITHMETIC)
        return result

    return method


class Peer:
    """One end of the connection between the runner and the completion. Requests may nest in both directions.

    Containers that have crossed keep their identity: each message starts with the contents of those that changed.

    Args:
        reader, writer: Binary pipes.
        handler: Serves a request: ``handler(peer, operation, *args, **kwargs)``.
        guards: True if the other side is not trusted.
    """

    def __init__(self, reader, writer, handler, guards):
        self._reader, self._writer, self._handler, self.guards = reader, writer, handler, guards
        self._owned, self._keys, self._handles, self._shared, self._indices = {}, {}, {}, {}, {}
        self._copied, self._numbers, self._lock = {}, itertools.count(), threading.RLock()
        self.output, self.lost = io.StringIO(), None

    def request(self, operation, /, *args, **kwargs):
        """Run an operation on the other side, and return its result or raise its exception."""
        with self._lock:
            self._send("request", (operation, args, tuple(kwargs.items())))
            while True:
                kind, value = self._receive()
                if kind == "result":
                    return value
                if kind == "error":
                    raise value
                self._serve(value)

    def owns(self, value):
        """Return True if a handle to this object was sent to the other side."""
        return id(value) in self._keys

    def serve(self):
        """Answer requests until the other side closes the pipe."""
        with contextlib.suppress(PeerLost):
            while True:
                self._serve(self._receive()[1])

    def _serve(self, request):
        own = os.getpid()
        try:
            operation, args, kwargs = request
            kind, value = "result", self._handler(self, operation, *args, **dict(kwargs))
        except PeerLost:
            raise
        except BaseException as error:
            kind, value = "error", error
        if os.getpid() != own:  # the code forked, and this is the new process
            os._exit(0)
        self._send(kind, value)

    def _send(self, kind, value):
        self._evict(kind)
        count = len(self._shared)
        try:
            changed = [
                [index, self._contents(container)]
                for index, (container, before) in list(self._shared.items())
                if not _identical(before, _items(container))
            ]
            body = self._encode(value)
        except Exception as error:
            while len(self._shared) > count:
                self._indices.pop(id(self._shared.popitem()[1][0]))
            changed, kind, body = [], "error", self._encode(TypeError(f"a value cannot be transported: {error!r}"))
        self._snapshot()
        text = self.output.getvalue()[:MAX_OUTPUT]
        self.output.seek(0)
        self.output.truncate()
        line = json.dumps([kind, text, changed, body]).encode() + b"\n"
        try:
            self._writer.write(line)
            self._writer.flush()
        except (OSError, ValueError) as error:
            raise self._lose("the process of the completion ended") from error

    def _receive(self):
        line = self._reader.readline(MAX_MESSAGE_BYTES)
        if not line.endswith(b"\n"):
            raise self._lose("the process of the completion ended, or its result is too large")
        try:
            kind, text, changed, body = json.loads(line)
            self._evict(kind)
            for index, contents in changed:
                self._fill(self._shared[index][0], contents)
            value = self._decode(body)
            self._snapshot()
        except Exception as error:
            raise self._lose(f"the completion sent an invalid message: {error!r}") from error
        if text:
            sys.stdout.write(str(text))
        if kind == "error" and not isinstance(value, BaseException):
            raise self._lose("the completion sent an invalid exception")
        return kind, value

    def _lose(self, reason):
        self.lost = self.lost or reason
        return PeerLost(reason)

    def _evict(self, kind):
        """Forget the oldest containers, at the same moment on both sides; none of a request before its answer."""
        while kind == "request" and len(self._shared) > MAX_SHARED:
            container, _ = self._shared.pop(next(iter(self._shared)))
            self._indices.pop(id(container))

    def _share(self, index, container):
        self._shared[index] = (container, None)
        self._indices[id(container)] = index

    def _snapshot(self):
        for index, (container, _) in self._shared.items():
            self._shared[index] = (container, _items(container))

    def _contents(self, container):
        extra = getattr(container, "maxlen", None) or getattr(container, "default_factory", None)
        if isinstance(container, dict):
            items = [[self._encode(key), self._encode(value)] for key, value in container.items()]
        else:
            items = [self._encode(value) for value in container]
        return [self._encode(extra), items]

    def _fill(self, container, contents):
        extra, items = contents
        if isinstance(container, collections.defaultdict):
            container.default_factory = self._decode(extra)
        if isinstance(container, dict):
            pairs = [(self._decode(key), self._decode(value)) for key, value in items]
            container.clear()
            container.update(dict(pairs))
        else:
            values = [self._decode(value) for value in items]
            container.clear()
            (container.update if isinstance(container, set) else container.extend)(values)

    def _encode(self, value):
        """Return a value as JSON: plain data by value, other objects as handles."""
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if value is None or kind in (bool, str, float) or (kind is int and abs(value) < 1 << 53):
            return value
        if id(value) in self._indices:
            return ["shared", self._indices[id(value)]]
        if CONTAINERS.get(kind.__name__) is kind:
            index = f"{self.guards:d}{next(self._numbers)}"
            self._share(index, value)
            return ["container", index, kind.__name__, self._contents(value)]
        if kind in (tuple, frozenset):
            return ["items", kind.__name__, [self._encode(item) for item in value]]
        if name in VALUES:
            args = ARGUMENTS[kind](value) if kind in ARGUMENTS else value.__reduce__()[1]
            return ["value", name, [self._encode(item) for item in args]]
        if kind.__module__ == "numpy" and hasattr(value, "dtype") and not value.dtype.hasobject:
            return ["numpy", value.dtype.str, list(value.shape), value.tobytes().hex()]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if value is NotImplemented or value is Ellipsis:
            return ["builtin", repr(value)]
        return self._encode_object(value, kind)

    def _encode_object(self, value, kind):
        if isinstance(value, Remote) or kind in self._copied:
            return ["yours", value._key]
        if isinstance(value, type) and value in self._copied:
            return ["yours", self._copied[value]]
        if kind is type and value.__module__ == "builtins":
            return ["builtin", value.__name__]
        if isinstance(value, BaseException):
            fields = [[key, self._encode(item)] for key, item in vars(value).items() if not key.startswith("_")]
            return ["exception", self._encode(kind), self._encode(value.args), fields]
        if isinstance(value, types.FrameType | types.CodeType | types.TracebackType):
            return None
        key = self._keys.setdefault(id(value), f"{self.guards:d}{next(self._numbers)}")
        self._owned[key] = value
        if isinstance(value, type) and issubclass(value, BaseException):
            bases = [self._encode(base) for base in value.__bases__ if issubclass(base, BaseException)]
            return ["class", key, value.__name__, value.__module__, bases]
        base = next((base for base in PLAIN if isinstance(value, base)), None)
        if base is not None:  # whatever the subclass overrides
            return ["subclass", key, kind.__name__, base.__name__, self._encode(base.__getnewargs__(value)[0])]
        container = next((name for name, base in CONTAINERS.items() if isinstance(value, base)), None)
        return ["handle", key, kind.__name__, sorted(name for name in SPECIAL if hasattr(kind, name)), container]

    def _decode(self, data):
        """Rebuild a value. Everything that JSON can hold may arrive here."""
        return getattr(self, f"_decode_{data[0]}")(*data[1:]) if isinstance(data, list) else data

    def _decode_shared(self, index):
        return self._shared[index][0]

    def _decode_container(self, index, name, contents):
        container = CONTAINERS[name](*[[], self._decode(contents[0])] if name == "deque" else [])
        self._share(index, container)
        self._fill(container, contents)
        return container

    def _decode_items(self, name, items):
        return {"tuple": tuple, "frozenset": frozenset}[name](map(self._decode, items))

    def _decode_value(self, name, args):
        if name not in VALUES:
            raise ValueError(name)
        module, _, name = name.rpartition(".")
        return getattr(importlib.import_module(module), name)(*map(self._decode, args))

    def _decode_numpy(self, dtype, shape, data):
        numpy = importlib.import_module("numpy")
        return numpy.frombuffer(bytes.fromhex(data), numpy.dtype(dtype)).reshape(shape).copy()[()]

    def _decode_module(self, name):
        allowed = sys.stdlib_module_names - {"antigravity", "this"} | {"numpy"}
        return importlib.import_module(name) if name.partition(".")[0] in allowed else None

    def _decode_yours(self, key):
        return self._owned[key]

    def _decode_builtin(self, name):
        value = getattr(builtins, name)
        if not isinstance(value, type) and name not in ("NotImplemented", "Ellipsis"):
            raise ValueError(name)
        return value

    def _decode_exception(self, kind, args, fields):
        kind, args = self._decode(kind), self._decode(args)
        if not issubclass(kind, BaseException):
            raise ValueError("not an exception")
        try:
            error = kind(*args)
        except Exception:
            error = kind.__new__(kind, *args)
        for key, value in fields:
            error.__dict__[key] = self._decode(value)
        return error

    def _decode_class(self, key, name, module, bases):
        module = sys.modules.get(module) if module.partition(".")[0] in ERROR_MODULES else None
        known = getattr(module, name, None)
        if isinstance(known, type) and issubclass(known, Exception):
            return known
        bases = tuple(map(self._decode, bases))
        if not all(issubclass(base, BaseException) for base in bases):
            raise ValueError("not an exception class")
        return self._copy(key, name, bases, {})

    def _decode_subclass(self, key, name, base, value):
        base = next(kind for kind in PLAIN if kind.__name__ == base)
        kind = self._copy(key, name, (base,), {"__getattr__": Remote.__getattr__, "_trusted": False})
        value = kind(self._decode(value))
        value.__dict__.update(_peer=self, _key=key)
        return value

    def _decode_handle(self, key, name, special, base):
        if key not in self._handles:
            kind = type(name, (Remote,), {method: _forward(method) for method in SPECIAL.intersection(special)})
            self._handles[key] = kind(self, key, base)
        return self._awaited(self._handles[key]) if "__await__" in special else self._handles[key]

    def _copy(self, key, *definition):
        """Return the local class that stands for a class, or for the class of an object, of the other process."""
        if key not in self._handles:
            self._handles[key] = type(*definition)
            self._copied[self._handles[key]] = key
        return self._handles[key]

    async def _awaited(self, handle):
        return self.request("await", handle)


def _items(container):
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def _identical(before, after):
    return before is not None and len(before) == len(after) and all(map(operator.is_, before, after))


def landlock_version():
    """Return the version of Landlock's interface, or 0 or less if the system has none."""
    if not sys.platform.startswith("linux"):
        return 0
    return ctypes.CDLL(None).syscall(444, None, 0, 1)  # landlock_create_ruleset(LANDLOCK_CREATE_RULESET_VERSION)


def confine(folder, cpu_seconds, megabytes):
    """Restrict this process and its descendants as far as the system allows.

    Sets resource limits, drops all capabilities, and allows Landlock (Linux) only the interpreter, the system and
    ``folder``, no TCP connections and no signals to other processes.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: megabytes << 20,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
    }
    for kind, limit in limits.items():
        with contextlib.suppress(OSError, ValueError):  # macOS has no memory limit
            resource.setrlimit(kind, (limit, limit))
    if not sys.platform.startswith("linux"):
        return
    libc, version = ctypes.CDLL(None), landlock_version()
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    if version < 1:
        return
    everything = (1 << min(15, 12 + version)) - 1
    handled = struct.pack("QQQ", everything, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    rules = libc.syscall(444, handled, 8 if version < 4 else 16 if version < 6 else 24, 0)
    read, write_file = 0b1101, 0b110
    system = "/usr", "/bin", "/lib", "/lib64", "/etc", "/opt", "/proc", "/sys", sys.prefix, sys.base_prefix
    paths = {**dict.fromkeys(system, read), folder: everything, __file__: 0b101}
    if os.path.isdir("/dev/shm") and os.path.samefile("/dev/shm", folder):  # mounted by the runner
        paths["/dev/shm"] = everything
    paths |= dict.fromkeys(("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"), write_file)
    for path, access in paths.items():
        with contextlib.suppress(OSError):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            libc.syscall(445, rules, 1, struct.pack("=Qi", access, opened), 0)  # landlock_add_rule
            os.close(opened)
    libc.syscall(446, rules, 0)  # landlock_restrict_self
    os.close(rules)


def _load(code):
    """Run the code of the completion, and return its names."""
    module = sys.modules["completion"] = types.ModuleType("completion")
    exec(compile(code, "completion", "exec"), vars(module))
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


def _special(target, name, /, *args, **kwargs):
    return getattr(type(target), name)(target, *args, **kwargs)


def _plain(target):
    """Return a container of a subclass as its base has it."""
    if isinstance(target, dict):
        return dict(dict.items(target))
    base = next(base for base in CONTAINERS.values() if isinstance(target, base))
    return base(base.__iter__(target))


def _await(target, loops=[]):  # noqa: B006
    """Run an awaitable in the event loop of this process."""
    import asyncio

    async def awaited():
        return await target

    loops[:] = loops or [asyncio.new_event_loop()]
    return loops[0].run_until_complete(awaited())


OPERATIONS: dict[str, Any] = {"load": _load, "special": _special, "plain": _plain, "await": _await}
OPERATIONS |= {"getattr": getattr, "setattr": setattr, "delattr": delattr}


def _main():
    folder, cpu_seconds, megabytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    reader, writer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    with contextlib.suppress(AttributeError):
        os.nice(5)  # the watching runner goes first
    confine(folder, cpu_seconds, megabytes)
    peer = Peer(
        reader, writer, lambda peer, operation, /, *args, **kwargs: OPERATIONS[operation](*args, **kwargs), guards=False
    )
    sys.stdout = peer.output
    builtins.input = lambda prompt="": peer.request("input", str(prompt))
    sys.argv = [""]
    peer.serve()


if __name__ == "__main__":
    _main()
