"""What the reward ``unit-tests`` runs in a process of its own: a completion's code, then tests, one after another.

Imports nothing of deltaw. Standard input has the code, the tests, the limits and a token, which is written to standard
output with the number of each test that passes.
"""

import contextlib
import json
import os
import signal
import sys

_MOST_FILE_BYTES, _MOST_FILES = 1 << 24, 64


def _limit(cpu_seconds, wall_seconds, megabytes):
    """Bound this process and those that it starts, where the system can."""
    try:
        import resource
    except ImportError:  # Windows: whoever started this process ends it
        return
    signal.alarm(int(wall_seconds) + 1)  # where nobody is left to end it
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: megabytes << 20,
        resource.RLIMIT_FSIZE: _MOST_FILE_BYTES,
        resource.RLIMIT_NOFILE: _MOST_FILES,
    }
    for kind, most in limits.items():
        with contextlib.suppress(OSError, ValueError):  # macOS knows no limit of memory
            resource.setrlimit(kind, (most, most))


def _main():
    given = json.load(sys.stdin)
    out, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    own = os.getpid()
    _limit(given["cpu_seconds"], given["wall_seconds"], given["megabytes"])
    names = {"__name__": "completion"}
    exec(compile(given.pop("code"), "completion", "exec"), names)
    for number, test in enumerate(given["tests"]):
        try:
            exec(compile(test, "test", "exec"), dict(names))
        except BaseException:  # exits and interrupts of the code among them
            continue
        if os.getpid() != own:  # the code forked, and this is the other one
            os._exit(0)
        os.write(out, f"{given['token']} {number}\n".encode())


if __name__ == "__main__":
    _main()
