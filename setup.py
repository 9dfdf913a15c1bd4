"""The compiled kernels: optional, built where a C++ compiler and an x86-64 processor are.

Everything else stands in pyproject.toml. Without the extension deltaw runs on torch's own operations.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("src/deltaw/kernels/csrc")
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fno-math-errno",
    "-fvisibility=hidden",
    # Whether the processor has these is looked up before anything is called.
    *(
        f"-m{name}"
        for name in ("fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "avx512vnni")
    ),
]

x86 = platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")
setup(
    ext_modules=[
        Extension(
            "deltaw.kernels._native",
            sources=sorted(map(str, SOURCES.glob("*.cpp"))),
            depends=[*sorted(map(str, SOURCES.glob("*.h"))), "setup.py"],
            extra_compile_args=FLAGS,
            optional=True,
        )
    ]
    if x86
    else []
)
