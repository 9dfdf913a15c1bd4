"""Reward ``unit-tests``: test suites in all common formats against correct, wrong, hanging, forking and forging code."""

# ruff: noqa: E501 (suites and completions are source code in strings)

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from deltaw.child_process import kill_process_tree
from deltaw.errors import UserError
from deltaw.tasks.reward.rewards.functions import Completion
from deltaw.tasks.reward.rewards.rewarder import Rewarder
from deltaw.tasks.reward.rewards.unit_tests import cases, code_of, program, unit_tests
from deltaw.tasks.reward.settings import RewardFunction
from tests.training.runs import slow_except

MODULE = sys.modules["deltaw.tasks.reward.rewards.unit_tests"]
ADD = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a - b\n"
STACK = """
class EmptyError(Exception):
    pass

class Stack:
    def __init__(self, items=()):
        self.items = list(items)
    def push(self, value):
        self.items.append(value)
    def pop(self):
        if not self.items:
            raise EmptyError("empty")
        return self.items.pop()
    def __len__(self):
        return len(self.items)
    def __eq__(self, other):
        return isinstance(other, Stack) and self.items == other.items
"""
ASSERT_LIST = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"]
FUNCTIONS = "def test_one():\n    assert add(1, 2) == 3\n\ndef test_two():\n    assert add(2, 2) == 4\n"
CHECK = "METADATA = {'author': 'x'}\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 5) == 5\n"
UNITTEST = """
import unittest
from solution import add

class TestAdd(unittest.TestCase):
    def setUp(self):
        self.one = 1
    def test_sum(self):
        self.assertEqual(add(self.one, 2), 3)
    def test_error(self):
        with self.assertRaises(TypeError):
            add(1, None)
    def test_each(self):
        for a in range(3):
            with self.subTest(a=a):
                self.assertEqual(add(a, a), 2 * a)

if __name__ == "__main__":
    unittest.main()
"""
CLASS = """
class TestAdd:
    def setup_method(self):
        self.numbers = [1, 2]
    def test_sum(self):
        assert add(*self.numbers) == 3
"""
PYTEST = """
import pytest

@pytest.fixture
def numbers():
    return 1, 2

@pytest.mark.parametrize("a, b, total", [(1, 2, 3), (5, 5, 10), (0, 2, 2)])
def test_sums(a, b, total):
    assert add(a, b) == total

def test_fixture(numbers, capsys):
    print(add(*numbers))
    assert capsys.readouterr().out == "3\\n"

def test_raises():
    with pytest.raises(TypeError):
        add(1, None)
    assert add(0.1, 0.2) == pytest.approx(0.3)
"""
ASYNC = "import asyncio\nasync def test_fetch():\n    assert await fetch(2) == 4\n"
DOCTEST = "Adds.\n\n>>> add(1, 2)\n3\n>>> add('a', 'b')\n'ab'\n"
MAIN = "if __name__ == '__main__':\n    assert add(1, 2) == 3\n    print('passed')\n"
STACK_TESTS = """
def test_stack():
    s = Stack()
    s.push(1)
    s.push(2)
    assert s.pop() == 2 and len(s) == 1 and s.items == [1]
    assert s == Stack([1]) and s != Stack([2])
    try:
        Stack().pop()
        assert False, "should raise"
    except EmptyError as error:
        assert str(error) == "empty"
"""
ALWAYS = """
class Always:
    def __bool__(self): return True
    def __getattr__(self, name): return lambda *args, **kwargs: True
    def __hash__(self): return 3
def _true(self, *args): return True
def _self(self, *args): return self
for name in ("eq", "lt", "le", "gt", "ge", "contains", "instancecheck"):
    setattr(Always, f"__{name}__", _true)
for name in ("add", "sub", "radd", "rsub", "abs", "round"):
    setattr(Always, f"__{name}__", _self)
Always.__ne__ = lambda self, other: False
"""
FORGING = {
    "always equal": f"{ALWAYS}\ndef add(a, b): return Always()",
    "always equal class": f"{ALWAYS}\nclass add(Always):\n    def __init__(self, *a): pass",
    "frames": """
import sys, gc
def add(a, b):
    frame = sys._getframe()
    while frame:
        for values in (frame.f_locals, frame.f_globals):
            for name, value in list(values.items()):
                if hasattr(value, "request"):
                    try: value._send("result", {"passed": True})
                    except Exception: pass
        frame = frame.f_back
    return 0
""",
    "exits": "import os\ndef add(a, b): os._exit(0)",
    "system exit": "def add(a, b): raise SystemExit(0)",
    "exits at load": "import sys\nsys.exit(0)",
    "patches unittest": f"""
import builtins, unittest
class AssertionError(Exception): pass
builtins.AssertionError = AssertionError
for name in dir(unittest.TestCase):
    if name.startswith("assert"): setattr(unittest.TestCase, name, lambda *a, **k: None)
{WRONG}""",
    "shadows builtins": "def all(x): return True\ndef abs(x): return 0\ndef len(x): return 3\ndef isinstance(*a): return True\n"
    + WRONG,
    "kills parent": "import os, signal\ndef add(a, b):\n    os.kill(os.getppid(), signal.SIGKILL)\n    return 3 if a == 9 else 0",
    "writes descriptors": """
import os
for fd in range(64):
    try: os.write(fd, b'{"passed": true, "reason": ""}\\n' * 5)
    except OSError: pass
"""
    + WRONG,
    "raises skip": "import unittest\ndef add(a, b): raise unittest.SkipTest('x')",
    "conftest": "open('conftest.py', 'w').write('import os; os._exit(0)')\nopen('pytest.ini', 'w').write('[pytest]')\n"
    "open('unittest.py', 'w').write('')\nopen('sitecustomize.py', 'w').write('')\n" + WRONG,
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\n" + WRONG,
    "reads tests": """
import glob, os
seen = []
for path in glob.glob('/proc/*/cmdline') + glob.glob('/proc/*/environ') + glob.glob('/proc/*/mem') + glob.glob('/proc/*/fd/*'):
    try: seen.append(open(path, 'rb').read(1 << 16))
    except OSError: pass
found = any(b'candidate(1, 2)' in text or b'add(1, 2)' in text for text in seen)
def add(a, b): return 3 if found else 0
""",
}
SUITES = {"statements": ASSERT_LIST, "function text": FUNCTIONS, "HumanEval": CHECK, "unittest": UNITTEST}
SUITES |= {"class": CLASS, "pytest": PYTEST, "doctest": DOCTEST, "main": MAIN}


def completion_of(text: str, row: int = 1, prompt: str = "asked", **columns: object) -> Completion:
    return Completion(prompt, text, None, row, columns)


def settings_of(**options: object) -> RewardFunction:
    return RewardFunction.model_validate({"name": "unit-tests", **options})


def reward(code: str, tests: object, cpu_seconds: int = 1, all_tests: bool = False, **columns: object) -> float | None:
    settings = settings_of(cpu_seconds=cpu_seconds, all_tests=all_tests, megabytes=512)
    return unit_tests(settings, [completion_of(code, tests=tests, **columns)])[0]


@pytest.mark.parametrize("suite", SUITES)
def test_correct_code_passes_and_wrong_code_fails_in_each_format(suite):
    assert reward(ADD, SUITES[suite], cpu_seconds=5) == 1
    expected = 1 / 3 if suite == "unittest" else 0  # its test for an exception passes
    assert reward(WRONG, SUITES[suite], cpu_seconds=5) == pytest.approx(expected)


@pytest.mark.parametrize("attack", FORGING)
def test_forging_code_earns_no_reward(attack):
    suite = "def check(candidate):\n    assert candidate(1, 2) == 3 and 2 < candidate(1, 2) < 4\n    assert candidate(1, 2) in [3]\n"
    assert reward(FORGING[attack], suite, entry_point="add") == 0


# Prefix of attacks on the connection, which the code can find in its process.
CONNECTED = """
import sys
frame = sys._getframe()
while "peer" not in frame.f_locals and not hasattr(frame.f_locals.get("self"), "request"):
    frame = frame.f_back
peer = frame.f_locals.get("peer") or frame.f_locals["self"]
peer = peer if hasattr(peer, "request") else peer._peer
"""

# Code that defines names which the tests expect from Python or pytest: (code, tests).
SHADOWING = {
    "builtin without entry point": (
        WRONG + "def all(x): return True",
        "assert all(add(n, 1) == n + 1 for n in range(3))",
    ),
    "capitalized class": (
        f"{ALWAYS}\nclass Split(Always):\n    def __init__(self, *a): pass",
        ["assert Split([1, 2]) == [1]"],
    ),
    "namespace of the builtins": (
        f"{WRONG}\n{CONNECTED}\nnames = {{**vars(__import__('builtins')), 'abs': lambda x: 0}}\n"
        "peer._send('result', {'add': add, '__builtins__': names})\nwhile True: peer.receive()",
        ["assert abs(add(1, 2) - 3) < 1e-6"],
    ),
    "setup function": (
        "known = []\ndef add(a, b): return known[0] if known else 0\n"
        "def setup_function(test):\n    try: test()\n    except BaseException as error: known.append(int(str(error).split()[-1]))\n",
        "def same(a, b):\n    if a != b: raise AssertionError(f'{a} is not {b}')\n"
        "def test_add():\n    same(add(1, 2), 3)\n    assert isinstance(add(1, 2), int)\n",
    ),
}


@pytest.mark.parametrize("name", SHADOWING)
def test_names_of_code_do_not_replace_names_of_tests(name):
    code, tests = SHADOWING[name]
    assert reward(code, tests) == 0


# Correct code with arguments or results other than numbers: (code, tests).
BEHAVIOR = {
    "class": (STACK, STACK_TESTS),
    "sorts in place": (
        "def sort(values):\n    values.sort()\ndef turn(m):\n    for row in m: row.reverse()",
        "v = [3, 1, 2]\nsort(v)\nassert v == [1, 2, 3]\nm = [[1, 2], [3, 4]]\nturn(m=m)\nassert m == [[2, 1], [4, 3]]",
    ),
    "generator": (
        "def count(n):\n    for i in range(n):\n        yield i",
        "assert list(count(3)) == [0, 1, 2]\ng = count(2)\nassert next(g) == 0\nassert next(g) == 1\nassert next(g, None) is None",
    ),
    "types": (
        "from collections import *\nimport datetime, decimal, fractions\ndef kinds():\n"
        "    return [Counter('aab'), defaultdict(int, a=1), deque([1], 3), OrderedDict(a=1), {1, 2}, frozenset([1]), b'\\xff',\n"
        "            2 ** 200, 1j, float('inf'), (1, (2,)), None, True, range(3), datetime.date(2020, 1, 2),\n"
        "            decimal.Decimal('1.5'), fractions.Fraction(1, 3), '\\ud800', ...]",
        "import datetime\nfrom decimal import Decimal\nfrom fractions import Fraction\nk = kinds()\n"
        "assert k == [{'a': 2, 'b': 1}, {'a': 1}, __import__('collections').deque([1]), {'a': 1}, {1, 2}, {1}, b'\\xff', 2 ** 200, 1j,"
        " float('inf'), (1, (2,)), None, True, range(3), datetime.date(2020, 1, 2), Decimal('1.5'), Fraction(1, 3), '\\ud800', ...]",
    ),
    "nan": ("def nan(): return float('nan')", "import math\nassert math.isnan(nan())"),
    "dataclass": (
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Point:\n    x: int\n    y: int = 0\n"
        "    def __add__(self, o): return Point(self.x + o.x, self.y + o.y)\n"
        "def origin(): return Point(0)",
        "assert Point(1, 2) + Point(1, 0) == Point(2, 2)\n"
        "assert origin() == Point(0, 0)\nassert repr(origin()) == 'Point(x=0, y=0)'\nassert isinstance(origin(), Point)\n"
        "assert len({Point(1), Point(1)}) == 1\nassert type(origin()).__name__ == 'Point'",
    ),
    "namedtuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef p(): return P(1, 2)",
        "assert p() == (1, 2)\nx, y = p()\nassert y == 2",
    ),
    "enum": (
        "import enum\nclass Color(enum.Enum):\n    RED = 1\nclass Level(enum.IntEnum):\n    LOW = 1\ndef red(): return Color.RED\ndef low(): return Level.LOW",
        "assert red() == Color.RED\nassert red() is Color.RED\nassert red().name == 'RED'\nassert low() == 1",
    ),
    "errors": (
        "import json\nclass Custom(ValueError):\n    def __init__(self, message, code):\n        super().__init__(message)\n        self.code = code\n"
        "def fail(): raise Custom('bad', 3)\ndef parse(t): return json.loads(t)\ndef key(): return {}['a']",
        "import json, pytest\ndef test_errors():\n    with pytest.raises(Custom) as caught:\n        fail()\n    assert caught.value.code == 3\n"
        "    with pytest.raises(ValueError, match='bad'):\n        fail()\n    with pytest.raises(json.JSONDecodeError):\n        parse('{')\n"
        "    with pytest.raises(KeyError):\n        key()",
    ),
    "prints": (
        "def hello(): print('hello')",
        "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n    hello()\nassert out.getvalue() == 'hello\\n'",
    ),
    "callbacks": (
        "def apply(f, xs): return [f(x) for x in xs]\ndef compose(f, g): return lambda x: f(g(x))\n"
        "def twice(f):\n    def w(*a, **k):\n        f(*a, **k)\n        return f(*a, **k)\n    return w",
        "assert apply(lambda x: x + 1, [1, 2]) == [2, 3]\nassert apply(str, [1]) == ['1']\n"
        "assert compose(lambda x: x * 2, lambda x: x + 1)(3) == 8\nseen = []\n@twice\ndef note(x, k=0):\n    seen.append(x)\n    return k\n"
        "assert note(1, k=5) == 5\nassert seen == [1, 1]",
    ),
    "nodes of the tests": (
        "def reverse(head):\n    last = None\n    while head:\n        head.next, last, head = last, head, head.next\n    return last",
        "class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\n"
        "def test_reverse():\n    head = reverse(Node(1, Node(2, Node(3))))\n    assert head.value == 3 and head.next.value == 2 and head.next.next.next is None\n",
    ),
    "Solution": (
        "from typing import List\nclass Solution:\n    def two(self, nums: List[int], target: int) -> List[int]:\n        return [0, 1]",
        "assert Solution().two([2, 7], 9) == [0, 1]\ns = Solution()\nassert s.two(nums=[2, 7], target=9) == [0, 1]",
    ),
    "imports": (
        ADD + "RATE = 3",
        "import my_solution\nimport solution as s\nfrom package.module import add as plus\nassert my_solution.add(1, 2) == 3 and s.RATE == 3\nassert plus(1, 1) == 2",
    ),
    "async": ("import asyncio\nasync def fetch(n):\n    await asyncio.sleep(0.01)\n    return n * 2", ASYNC),
    "async pytest": (
        "async def fetch(n): return n * 2",
        "import pytest\n@pytest.mark.asyncio\n@pytest.mark.parametrize('n', [1, 2])\nasync def test_fetch(n):\n    assert await fetch(n) == 2 * n\n",
    ),
    "relative import": (ADD, "from .solution import add as plus\nassert plus(1, 2) == 3"),
    "function named like a test": (
        "def test_equal(a, b): return a == b",
        ["assert test_equal(1, 1)", "assert test_equal(1, 2) == False"],
    ),
    "context manager": (
        "class Open:\n    def __enter__(self):\n        self.on = True\n        return self\n    def __exit__(self, *e):\n        self.on = False\n        return True",
        "o = Open()\nwith o as p:\n    assert p.on\n    raise ValueError\nassert not o.on",
    ),
    "numpy": (
        "import numpy as np\ndef double(x): return np.asarray(x) * 2\ndef mean(x): return np.mean(x)",
        "import numpy as np\nassert np.array_equal(double([1, 2]), np.array([2, 4]))\nassert (double(np.ones((2, 2))) == 2).all()\n"
        "np.testing.assert_allclose(mean([1.0, 2.0]), 1.5)\nassert mean([1, 2]) == 1.5",
    ),
    "files": (
        "def save(t):\n    with open('out.txt', 'w') as f:\n        f.write(t)",
        "save('x')\nassert open('out.txt').read() == 'x'",
    ),
    "float tolerance": (
        "def third(): return 1 / 3",
        "assert abs(third() - 0.333) < 1e-2\nimport math\nassert math.isclose(third(), 1/3)",
    ),
    "raises by hand": (
        ADD,
        "try:\n    add(1, None)\n    assert False, 'no error'\nexcept TypeError:\n    pass\nif add(1, 1) != 2:\n    raise Exception('wrong')",
    ),
    "list with helper": (ADD, ["def check(f):\n    assert f(1, 2) == 3", "check(add)"]),
    "long loop": ("def f(x): return x + 1", "x = 0\nfor _ in range(500):\n    x = f([x][0])\nassert x == 500"),
    "property": (
        "class A:\n    count = 0\n    @property\n    def x(self): return 3\n    @classmethod\n    def make(cls): return cls()\n    @staticmethod\n    def s(): return 1",
        "a = A.make()\nassert a.x == 3 and A.s() == 1 and A.count == 0\na.y = 5\nassert a.y == 5\nassert hasattr(a, 'x') and not hasattr(a, 'z')",
    ),
    "multiprocessing": (
        "from multiprocessing import Pool\ndef sq(x): return x * x\ndef squares(xs):\n    with Pool(2) as p: return p.map(sq, xs)",
        "assert squares([1, 2]) == [1, 4]",
    ),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\ndef squares(f, xs):\n    with ThreadPoolExecutor(2) as p: return list(p.map(f, xs))",
        "assert squares(lambda x: x * x, [1, 2]) == [1, 4]",
    ),
    "subprocess": (
        "import subprocess, sys\ndef say(): return subprocess.run([sys.executable, '-c', 'print(1)'], capture_output=True, text=True).stdout",
        "assert say() == '1\\n'",
    ),
}


QUICK = ["class", "generator", "types", "dataclass", "enum", "errors", "callbacks", "nodes of the tests", "Solution"]
QUICK += ["imports", "async pytest", "context manager", "numpy", "files", "long loop", "multiprocessing"]


@pytest.mark.parametrize("name", slow_except(*QUICK, names=BEHAVIOR))
def test_correct_code_passes_with_all_types_of_values(name):
    code, tests = BEHAVIOR[name]
    assert reward(code, tests, cpu_seconds=5) == 1


EXCESSIVE = {
    "loops": "def add(a, b):\n    while True: pass",
    "sleeps": "import time\ndef add(a, b):\n    while True:\n        try: time.sleep(100)\n        except BaseException: pass",
    "loops at load": "while True: pass",
    "ignores signals": "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
    "recursion": "def add(a, b): return add(a, b)",
    "memory": "def add(a, b): return len(bytearray(1 << 33)) and a + b",
    "memory of many": "import os, time\ndef add(a, b):\n    for _ in range(8):\n        if os.fork() == 0:\n            x = b'x' * (200 << 20)\n            time.sleep(60)\n    time.sleep(2)\n    return a + b",
    "fork bomb": "import os\ndef add(a, b):\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "fork bomb in sessions": "import os\ndef add(a, b):\n    while True:\n        try:\n            if os.fork() == 0: os.setsid()\n        except OSError: pass",
    "many processes": "import os, time\ndef add(a, b):\n    for _ in range(500):\n        if os.fork() == 0:\n            time.sleep(60)\n    return a + b",
    "threads": "import threading, time\ndef add(a, b):\n    for _ in range(100000): threading.Thread(target=time.sleep, args=(60,)).start()\n    return a + b",
    "files": "def add(a, b):\n    for n in range(100000): open(f'f{n}', 'w').close()\n    return a + b",
    "bytes of files": "def add(a, b):\n    for n in range(40): open(f'f{n}', 'wb').write(bytes(1 << 23))\n    return a + b",
    "large file": "def add(a, b):\n    open('large', 'wb').write(bytes(1 << 25))\n    return a + b",
    "large result": "def add(a, b): return 'x' * (1 << 25)",
    "endless result": "import itertools\ndef add(a, b): return itertools.count()",
    "closes descriptors": "import os\ndef add(a, b):\n    os.closerange(0, 64)\n    return a + b",
    "environment": "import os\ndef add(a, b): return os.environ['SECRET']",
    "network": "import socket\ndef add(a, b):\n    socket.create_connection(('127.0.0.1', PORT), 1)\n    return a + b",
    "reads a file": "def add(a, b): return open('FILE').read() and a + b",
    "writes a file": "def add(a, b):\n    open('FILE', 'w').write('x')\n    return a + b",
    "follows a link": "import os\ndef add(a, b):\n    os.symlink('FILE', 'link')\n    open('link', 'w').write('x')\n    return a + b",
    "lists a folder": "import os\ndef add(a, b): return os.listdir(os.path.dirname('FILE')) and a + b",
    "stops its parent": "import os, signal\ndef add(a, b):\n    os.kill(os.getppid(), signal.SIGSTOP)\n    return 7",
}


# Code that runs until its time limit, or that is similar to other code.
UNTIL_THE_LIMIT = ["sleeps", "loops at load", "ignores signals", "endless result", "memory of many"]
UNTIL_THE_LIMIT += ["fork bomb in sessions", "many processes", "bytes of files", "follows a link", "threads"]


@pytest.mark.parametrize("name", slow_except(*EXCESSIVE.keys() - UNTIL_THE_LIMIT, names=EXCESSIVE))
def test_excessive_code_earns_no_reward_and_is_stopped(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "much")
    file = tmp_path / "rows.jsonl"
    file.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = EXCESSIVE[name].replace("FILE", os.fspath(file)).replace("PORT", str(server.getsockname()[1]))
        tests = "total = add(1, 2)\nassert len(list(total)) if not isinstance(total, int) else total == 3"
        assert reward(code, tests) == 0
    assert file.read_text() == "secret"


REFUSED = {
    "empty": "",
    "comment": "# add(1, 2) is 3",
    "empty list": [],
    "no assertion": "add(1, 2)",
    "comparison": "add(1, 2) == 3",
    "constant": "assert True",
    "function without": "def test_add():\n    add(1, 2)\n",
    "class without": "class TestAdd:\n    def test_it(self):\n        add(1, 2)\n",
    "unittest without": "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n        add(1, 2)\n",
    "check without": "def check(candidate):\n    candidate(1, 2)\n    assert True\n",
    "generator": "def test_add():\n    yield\n    assert add(1, 2) == 3\n",
    "helper never called": "def helper():\n    assert add(1, 2) == 3\n",
    "list of text": "['assert add(1, 2) == 3']",
    "not Python": "assert add(1, 2) = 3",
    "not Python in a list": ["assert add(1, 2) == 3", "def ("],
    "doctest without": ">>> x = add(1, 2)\n",
    "number": 3,
    "mapping": {"inputs": ["1"], "outputs": ["2"]},
    "unittest import alone": "import unittest\nunittest.main()",
}


@pytest.mark.parametrize("name", REFUSED)
def test_tests_without_assertion_are_rejected(name):
    with pytest.raises(ValueError, match=r"assertion runs|not Python|text or a list"):
        reward(ADD, REFUSED[name])


# Assertions that never run.
UNREACHED = {
    "loop": "for case in []:\n    assert add(*case) == 3",
    "condition": "if False:\n    assert add(1, 2) == 3",
    "function with return": "def test_add():\n    return\n    assert add(1, 2) == 3\n",
    "empty parametrize": "import pytest\n@pytest.mark.parametrize('a', [])\ndef test_add(a):\n    assert add(a, a) == 3\n",
    "skipped": "import unittest\nclass T(unittest.TestCase):\n    @unittest.skip('later')\n    def test_it(self):\n        self.assertEqual(add(1, 2), 3)\n",
    "pytest skip": "import pytest\ndef test_add():\n    pytest.skip('later')\n    assert add(1, 2) == 3\n",
    "expected failure": "import pytest\n@pytest.mark.xfail\ndef test_add():\n    assert add(1, 2) == 4\n",
    "swallowed": "try:\n    assert add(1, 2) == 4\nexcept AssertionError:\n    pass",
    "no subtest": "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n        for a in []:\n            with self.subTest(a):\n                self.assertEqual(add(a, a), 3)\n",
    "empty check": "def check(candidate):\n    for case in ():\n        assert candidate(*case) == 3\n",
}


@pytest.mark.parametrize("name", UNREACHED)
def test_unreached_assertions_earn_no_reward(name):
    assert reward(ADD, UNREACHED[name], cpu_seconds=5) == 0


SWALLOWED = {
    "callback of unittest": (
        "def each(f):\n    try: f(99)\n    except BaseException: pass\n    return 1",
        "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n"
        "        self.assertEqual(each(lambda x: self.assertEqual(x, 1)), 1)\n",
    ),
    "context manager": (
        "class Sure:\n    def __enter__(self): return self\n    def __exit__(self, *e): return True\n    def value(self): return 4",
        "def test_it():\n    s = Sure()\n    with s:\n        assert s.value() == 3\n    assert s.value() > 0\n",
    ),
    "callback": (
        "def each(f, xs):\n    for x in xs:\n        try: f(0)\n        except BaseException: pass\n    return len(xs)",
        "def test_it():\n    def check(x):\n        assert x > 0\n    assert each(check, [1, 2]) == 2\n",
    ),
    "broad except": (
        "def fail(): return 1",
        "def test_it():\n    try:\n        fail()\n        assert False, 'no error'\n    except Exception:\n        pass\n",
    ),
}


@pytest.mark.parametrize("name", SWALLOWED)
def test_failed_assertion_counts_even_if_caught(name):
    code, tests = SWALLOWED[name]
    assert reward(code, tests) == 0


IMPORTS = """
import types
with open("test_x.py", "w") as file:
    file.write("import os\\nfor fd in range(3, 30):\\n    try: os.write(fd, b'{}\\\\n' * 20)\\n    except OSError: pass\\nos._exit(0)")
def add(a, b): return types.ModuleType("unittest.__main__")
"""


@pytest.mark.parametrize("line", ['{"passed": true, "reason": ""}', "garbage"])
def test_module_of_code_is_not_imported_into_test_process(line):
    assert reward(IMPORTS.replace("{}", line), ASSERT_LIST) == 0


def test_results_not_from_runner_earn_no_reward(monkeypatch):
    monkeypatch.setattr(MODULE, "_results", lambda *args: [{"passed": True}] * 20)
    assert reward(ADD, ASSERT_LIST) == 0


@pytest.mark.parametrize(("body", "share"), [("0", 0), ("functools.reduce(operator.add, xs, 0)", 1)])
def test_function_named_like_builtin_is_tested(body, share):
    code = f"import functools, operator\ndef sum(xs):\n    return {body}\ndef helper(): pass\n"
    assert reward(code, ["assert sum([1, 2]) == 3"]) == share


def test_code_is_last_block_with_definition():
    text = f"<think>\n```python\n{WRONG}```\n</think>\n```python\n{ADD}```\nUse it:\n```python\nprint(add(1, 2))\n```"
    assert code_of(text) == ADD and code_of(f"<think>```\nx = 1\n```</think>\n{ADD}") == f"\n{ADD}"
    assert code_of("```py\na\n```\n```\nb\n```") == "b\n" and code_of("plain") == "plain"


def test_rejected_tests_are_reported_with_row():
    completions = [completion_of(ADD, tests=ASSERT_LIST), completion_of(ADD, row=7, tests="# nothing")]
    with (
        closing(Rewarder(settings_of(cpu_seconds=1))) as rewarder,
        pytest.raises(UserError, match="no assert") as error,
    ):
        rewarder(completions)
    assert "row 7" in str(error.value.location)


STUB = 'from typing import List\n\nLIMIT = 3\n\ndef add(a: int, b: int) -> int:\n    """ Add.\n    >>> add(1, 2)\n    3\n    """\n'


ANSWERS = [
    "    return a + b\n",
    "c = a + b\n    return c",
    STUB + "    return a + b",
    "def add(a: List, b): return a + b",
]
ANSWERS += [
    "```python\ndef help(a, b):\n    return a + b\n\ndef add(a, b):\n    return help(a, b) if LIMIT else 0\n```"
]


@pytest.mark.parametrize("completion", ANSWERS)
def test_completion_may_be_body_or_function(completion):
    assert reward(completion, CHECK, prompt=STUB, entry_point="add") == 1
    assert reward(completion, CHECK, prompt=f"Complete:\n```python\n{STUB}```") == 1


@pytest.mark.parametrize("completion", ["", "    ", "# done", "I cannot.", "    pass"])
def test_solution_in_prompt_earns_no_reward(completion):
    solved = f"Improve this:\n```python\n{ADD}```"
    assert reward(completion, CHECK, prompt=solved) == 0 and reward(completion, CHECK, prompt=STUB) == 0


PROTOCOL = {
    "globals of a callback": "def apply(f, x): return peer.request('special', f, '__getattribute__', '__globals__')['SECRET'] + 1",
    "attribute of a callback": "def apply(f, x): return peer.request('getattr', f, '__globals__')['SECRET'] + 1",
    "public attribute": "def apply(f, x): return peer.request('getattr', f, 'gi_frame')",
    "new class": """
def apply(f, x):
    Evil = peer.request('special', type, '__call__', 'Evil', (int,), {'__eq__': lambda other: True})
    return peer.request('special', Evil, '__call__', 3)
""",
    "patches the tests": "import unittest\ndef apply(f, x): peer.request('setattr', f, '__code__', (lambda *a: True).__code__)",
    "unknown operation": "def apply(f, x): return peer.request('load', 'import os; os._exit(0)')",
    "raw result": """
import json
def apply(f, x):
    for line in (['result', '', [], True], ['result', '', [], ['yours', '10']], ['passed', '', [], True], {'passed': True}, [1, 2]):
        peer._writer.write(json.dumps(line).encode() + b'\\n')
    peer._writer.flush()
""",
    "exception class": """
import json
def apply(f, x):
    line = ['error', '', [], ['exception', ['class', 'k', 'SkipTest', 'unittest.case', [['builtin', 'Exception']]], ['items', 'tuple', []], []]]
    peer._writer.write(json.dumps(line).encode() + b'\\n')
    peer._writer.flush()
""",
    "false base": """
class Liar(list):
    __eq__ = lambda self, other: True
class Always:
    __eq__ = lambda self, other: True
encode = type(peer)._encode_handle if hasattr(type(peer), '_encode_handle') else None
sys.modules['__main__'].OPERATIONS['plain'] = lambda target: Always()
def apply(f, x): return Liar()
""",
    "deep": "def apply(f, x):\n    peer._writer.write(b'[' * 100000 + b'\\n')\n    peer._writer.flush()",
    "module": "import os\ndef apply(f, x): return os",
}


@pytest.mark.parametrize("name", PROTOCOL)
def test_connection_exposes_neither_tests_nor_results(name):
    tests = "import random\nSECRET = random.random()\ndef test_it():\n    assert apply(lambda v: v, SECRET / 2) == SECRET + 1\n"
    assert reward(CONNECTED + PROTOCOL[name], tests) == 0
    if name == "module":  # an honest answer runs up to the attack, so no attack failed for another reason
        assert reward(CONNECTED + "def apply(f, x): return f(x) * 2 + 1", tests) == 1


@pytest.fixture(params=["namespaces", "without"])
def namespaces(request, monkeypatch):
    """Run the code with Linux namespaces and in plain processes."""
    if request.param == "without":
        monkeypatch.setattr(MODULE, "_namespaces", list)
    elif not MODULE._namespaces():
        pytest.skip("the system does not allow namespaces")


ESCAPES = {
    "session": "subprocess.Popen(words, start_new_session=True)",
    "orphan": "if os.fork() == 0:\n    subprocess.Popen(words, start_new_session=True)\n    os._exit(0)",
    "orphan of an orphan": "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: os.execv(words[0], words)\n    os._exit(0)",
    "no environment": "subprocess.Popen(words, env={}, cwd='/', start_new_session=True, process_group=None)",
}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="lists processes in /proc")
@pytest.mark.parametrize("escape", ESCAPES)
def test_processes_started_by_code_are_killed(escape, namespaces):
    mark = f"time.sleep(61.{os.getpid()}{len(escape)})"
    code = f"import os, subprocess, sys, time\nwords = [sys.executable, '-c', 'import time; {mark}']\n"
    code += f"{ESCAPES[escape]}\n"
    code += "def count():\n    time.sleep(0.2)\n    return len([n for n in os.listdir('/proc') if n.isdigit()])"
    assert reward(code, "assert count() > 2") == 1
    commands = [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark in _text(path)]
    assert commands == []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize("attack", ["kills parent", "reads tests", "frames", "always equal"])
def test_forging_code_earns_no_reward_without_namespaces(attack, monkeypatch):
    monkeypatch.setattr(MODULE, "_namespaces", list)
    assert reward(FORGING[attack], CHECK.replace("(1, 2) == 3", "(2, 2) == 4"), entry_point="add") == 0


def test_working_folder_of_code_is_removed(tmp_path, monkeypatch, namespaces):
    monkeypatch.setattr(MODULE.tempfile, "tempdir", os.fspath(tmp_path))
    code = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\nos.chmod('a/b', 0)\ndef f(): return os.getcwd()"
    assert reward(code, f"assert f().startswith({os.fspath(tmp_path)!r})") == 1 and list(tmp_path.iterdir()) == []


def test_missing_isolation_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(MODULE, "_namespaces", list)
    monkeypatch.setattr(MODULE, "landlock_version", lambda: 0)
    monkeypatch.setattr(MODULE, "_warned", set())
    assert reward(ADD, ASSERT_LIST) == 1 and reward(ADD, ASSERT_LIST) == 1
    assert [record.message for record in caplog.records].count(caplog.messages[0]) == 1
    for danger in ("read your files", "use the network", "signal your processes"):
        assert danger in caplog.messages[0]


def test_reason_of_failed_test_is_logged(caplog):
    caplog.set_level("INFO")
    reward("class V: pass\ndef add(a, b): return V()", ["assert add(1, 2) < 4"])
    assert "used as plain data" in caplog.text and "row 1" in caplog.text


def test_each_completion_gets_its_reward():
    completions = [completion_of(code, tests=ASSERT_LIST) for code in (ADD, WRONG, ADD, "def add(a, b): return 3", "")]
    assert unit_tests(settings_of(cpu_seconds=2), completions) == [1, 0, 1, 0.5, 0]


def test_program_returns_self_contained_completion_unchanged():
    assert program("asked", f"Sure:\n```python\n{ADD}```") == ADD
    assert len(cases(["assert f(1)\nassert f(2)", "assert f(3)"])) == 2 and len(cases("assert f(1)\nassert f(2)")) == 2


DOUBLE = ["assert double(2) == 4", "assert double('a') == 'aa'", "assert double(0) == 1"]


def test_reward_is_share_of_passed_tests_or_requires_all():
    code = "So:\n```python\ndef double(x):\n    return 2 * x\n```\nDone."
    assert reward(code, DOUBLE) == pytest.approx(2 / 3)
    assert reward(code, DOUBLE, all_tests=True) == 0 and reward(code, DOUBLE[:2], all_tests=True) == 1
    assert reward("def double(x: return", DOUBLE) == 0 and reward(code, None) is None


def test_tests_in_settings_apply_to_all_rows():
    completions = [completion_of("def double(x): return 2 * x"), completion_of("x = 1")]
    assert unit_tests(settings_of(tests=DOUBLE[0]), completions) == [1, 0]


def test_tests_in_one_text_are_counted_individually():
    functions = "import math\ndef test_a():\n    assert double(2) == 4\ndef test_b():\n    assert math.pi == 3\n"
    assert reward("def double(x): return 2 * x", functions) == 0.5
    statements = "n = 3\nassert double(n) == 5\nn = 4\nassert double(n) == 8"
    assert reward("def double(x): return 2 * x", statements) == 0.5


def test_endless_loop_does_not_affect_other_completions():
    completions = [completion_of("while True: pass", tests=ASSERT_LIST)]
    completions.append(completion_of("x = 1", tests=["assert x == 1"], row=2))
    with closing(Rewarder(settings_of(seconds=1, cpu_seconds=1))) as rewarder:
        assert rewarder(completions) == [0, 1]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="lists processes in /proc")
def test_killing_worker_kills_processes_in_other_sessions():
    words = [sys.executable, "-c", "import time; time.sleep(62.5)"]
    code = f"import subprocess, time\nsubprocess.Popen({words!r}, start_new_session=True)\nprint(1, flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    kill_process_tree(process)
    process.stdout.close()
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if "time.sleep(62.5)" in _text(path)]
