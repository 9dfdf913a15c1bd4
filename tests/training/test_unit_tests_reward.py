"""The reward ``unit-tests``: suites of all common forms, against right, wrong, hanging, forking and forging code."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from deltaw.errors import UserError
from deltaw.task_settings import RewardFunction
from deltaw.training.rewards import Scored
from deltaw.training.rewards.rewarder import Rewarder
from deltaw.training.rewards.unit_test_cases import cases
from deltaw.training.rewards.unit_tests import program, unit_tests

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
LISTED = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"]
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
    s.items.append(5)
    assert s.pop() == 5
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
    "always equal int": "class I(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\ndef add(a, b): return I(7)",
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
    "shadows builtins": "def all(x): return True\ndef abs(x): return 0\ndef len(x): return 3\ndef isinstance(*a): return True\n" + WRONG,
    "kills parent": "import os, signal\ndef add(a, b):\n    os.kill(os.getppid(), signal.SIGKILL)\n    return 3 if a == 9 else 0",
    "writes descriptors": """
import os
for fd in range(64):
    try: os.write(fd, b'{"passed": true, "reason": ""}\\n' * 5)
    except OSError: pass
""" + WRONG,
    "raises skip": "import unittest\ndef add(a, b): raise unittest.SkipTest('x')",
    "raises stop": "import unittest.case\ndef add(a, b): raise unittest.case._ShouldStop()",
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
SUITES = {
    "statements": LISTED,
    "function text": FUNCTIONS,
    "HumanEval": CHECK,
    "unittest": UNITTEST,
    "class": CLASS,
    "pytest": PYTEST,
    "doctest": DOCTEST,
    "main": MAIN,
}


def scored(text: str, row: int = 1, prompt: str = "asked", **columns: object) -> Scored:
    return Scored(prompt, text, None, row, columns)


def reward(code: str, tests: object, cpu_seconds: int = 1, all_tests: bool = False, **columns: object) -> float | None:
    settings = RewardFunction.model_validate(
        {"name": "unit-tests", "cpu_seconds": cpu_seconds, "all_tests": all_tests, "megabytes": 512}
    )
    return unit_tests(settings, [scored(code, tests=tests, **columns)])[0]


@pytest.mark.parametrize("suite", SUITES)
def test_right_code_passes_all_tests_of_each_form(suite):
    assert reward(ADD, SUITES[suite], cpu_seconds=5) == 1


@pytest.mark.parametrize("suite", SUITES)
def test_wrong_code_passes_no_test_that_compares_its_results(suite):
    expected = {"unittest": 1 / 3, "pytest": 0}  # the test of an exception passes
    assert reward(WRONG, SUITES[suite], cpu_seconds=5) == pytest.approx(expected.get(suite, 0))


@pytest.mark.parametrize("attack", FORGING)
def test_forging_code_gets_nothing(attack):
    suite = "def check(candidate):\n    assert candidate(1, 2) == 3 and 2 < candidate(1, 2) < 4\n    assert candidate(1, 2) in [3]\n"
    assert reward(FORGING[attack], suite, entry_point="add") == 0
