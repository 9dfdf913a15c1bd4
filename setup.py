"""The compiled kernels: optional, built where a C++ compiler and an x86-64 processor are.

Everything else stands in pyproject.toml. Without the extension deltaw runs on torch's own operations.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("src/deltaw/kernels/csrc")
# Whether the processor has the instructions that these ask for is looked up before anything is called.
FLAGS = SOURCES / "compile_flags.txt"

x86 = platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")
setup(
    ext_modules=[
        Extension(
            "deltaw.kernels._native",
            sources=sorted(map(str, SOURCES.glob("*.cpp"))),
            depends=[*sorted(map(str, SOURCES.glob("*.h"))), str(FLAGS), "setup.py"],
            extra_compile_args=FLAGS.read_text(encoding="utf-8").split(),
            optional=True,
        )
    ]
    if x86
    else []
)
