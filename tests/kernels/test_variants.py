"""Which variants there are, which a processor runs, and what the user can force."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deltaw.errors import UserError
from deltaw.kernels import loader, processor, variants
from deltaw.kernels.processor import processor_flags, second_level_cache, words_of_library
from tests.kernels.conftest import compiled_only

VARIANTS = "none"

# What processors say of themselves, shortened to what is asked.
HASWELL = "avx avx2 fma f16c"
SKYLAKE_SERVER = f"{HASWELL} avx512f avx512bw avx512vl avx512dq"
ZEN_4 = f"{SKYLAKE_SERVER} avx512_vnni avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN_4} avx_vnni amx_tile amx_bf16 amx_int8"


@pytest.mark.parametrize(
    ("flags", "machine", "best", "built"),
    [
        ("sse2", "x86_64", "generic", "generic"),
        (HASWELL, "AMD64", "avx2", "avx2 generic"),
        (f"{HASWELL} avx_vnni", "x86_64", "avx2_vnni", None),
        (SKYLAKE_SERVER, "x86_64", "avx512", None),
        (f"{SKYLAKE_SERVER} avx512_vnni", "x86_64", "avx512_vnni", None),
        (ZEN_4, "x86_64", "avx512_bf16", "avx512_bf16 avx2 generic"),
        (SAPPHIRE_RAPIDS, "x86_64", "amx", "amx avx2_vnni generic"),
        (SAPPHIRE_RAPIDS.replace(" amx_int8", ""), "x86_64", "avx512_bf16", None),
        ("asimd", "aarch64", "neon", None),
        ("asimd asimddp", "arm64", "neon_dotprod", "neon_dotprod generic"),
        ("asimd asimddp bf16 i8mm", "aarch64", "neon_bf16", None),
        ("", "riscv64", "generic", "generic"),
    ],
)
def test_the_best_variant_of_a_processor_and_what_a_build_makes_for_it(flags, machine, best, built):
    found = variants.allowed(flags.split(), machine)
    assert found[0].name == best and found[-1].name == "generic"
    assert built is None or [v.name for v in variants.worth_building(flags.split(), machine)] == built.split()


def test_names_families_and_flags_are_consistent():
    listed = variants.every_variant()
    assert len({v.name for v in listed}) == len(listed)
    for variant in listed:
        # The highest rank of a family is enough to measure: whoever runs it runs the others.
        for lower in (v for v in listed if v.family == variant.family and v.rank < variant.rank):
            assert set(lower.needs) <= set(variant.needs) and lower.machine == variant.machine
        # A compiler told of an instruction set that is not asked of the processor would crash there.
        sets = {flag[2:].replace("-", "").replace("_", "") for flag in variant.flags if flag.startswith("-m")}
        needs = {word.replace("_", "") for word in variant.needs}
        assert {word for word in sets if not word.startswith("arch=")} <= needs, variant.name


def test_a_line_with_a_column_missing_is_an_error(tmp_path):
    file = tmp_path / "variants.txt"
    file.write_text("# comment\n\nfast | family | 3 | any | flags\n")
    with pytest.raises(ValueError, match="six columns"):
        variants.every_variant(file)


@pytest.mark.parametrize(
    ("value", "off", "kernels", "arithmetic"),
    [
        ("avx2", "", "avx2", None),
        ("avx512_bf16:wide", "", "avx512_bf16", "wide"),
        ("auto:torch", "", None, "torch"),
        ("none", "", "none", None),
        ("none", "0", "none", None),  # twice, which is no contradiction
        ("torch:torch", "", "none", "torch"),
        ("", "", None, None),
    ],
)
def test_what_the_user_forces(value, off, kernels, arithmetic):
    found = variants.asked({variants.VARIABLE: value, variants.OFF: off})
    assert (found.kernels, found.arithmetic) == (kernels, arithmetic)


@pytest.mark.parametrize(
    ("value", "off", "what"),
    [
        ("avx3", "", "'avx2'"),
        ("avx2:widest", "", "'wide'"),
        ("none:wide", "", "without compiled kernels"),
        ("avx2", "0", "contradict"),
    ],
)
def test_what_cannot_be_meant_is_refused(value, off, what):
    with pytest.raises(UserError, match=what):
        variants.asked({variants.VARIABLE: value, variants.OFF: off})


def test_the_command_line_refuses_a_variant_of_another_machine():
    """With status 2 and one message, before anything else."""
    foreign = next(v for v in variants.every_variant() if v.machine not in ("any", variants.machine()))
    environment = os.environ | {variants.VARIABLE: foreign.name, variants.OFF: "1"}
    command = [sys.executable, "-m", "deltaw", "inspect", "nowhere"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert f"'{foreign.name}' need what this processor lacks" in ran.stderr


def test_the_size_of_a_cores_second_level_cache(tmp_path):
    levels = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2M"), ("3", "Unified", "260M")]
    assert second_level_cache(tmp_path) is None
    for number, values in enumerate(levels):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{number}"
        folder.mkdir(parents=True)
        for name, text in zip(("level", "type", "size"), values, strict=True):
            (folder / name).write_text(text + "\n")
    assert second_level_cache(tmp_path) == 2 << 20
    (tmp_path / "sys/devices/system/cpu/cpu0/cache/index2/size").write_text("much\n")
    assert second_level_cache(tmp_path) is None


def test_the_words_of_the_first_processor_count(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name: fast\nflags: avx2 fma\n\nmodel name: slow\nflags: sse2\n")
    assert processor_flags(tmp_path) == {"avx2", "fma"}


@compiled_only
@pytest.mark.skipif(variants.machine() != "x86_64" or sys.platform != "linux", reason="compared with what Linux says")
def test_the_kernels_find_what_the_processor_has(monkeypatch):
    """As Windows asks them, which has no words for it."""
    file = variants.file_of(loader.usable()[-1])
    needed = {word for v in variants.for_machine() for word in v.needs}
    expected = processor_flags() & needed
    assert words_of_library(file) & needed == expected and len(expected) > 0
    monkeypatch.setattr(processor, "_ASKING", file)
    monkeypatch.setattr(sys, "platform", "win32")
    assert processor_flags() == words_of_library(file)


def test_no_library_to_ask_means_no_words(monkeypatch, tmp_path):
    (tmp_path / "damaged.dll").write_bytes(b"MZ")
    assert words_of_library(tmp_path / "damaged.dll") == words_of_library(tmp_path / "missing.dll") == set()


def test_files_are_named_as_the_system_loads_them(monkeypatch):
    variant = variants.for_machine("x86_64")[-1]
    assert variants.file_of(variant).suffix == variants.ENDING
    monkeypatch.setattr(variants, "ENDING", ".dll")
    assert variant.file == "_native_generic.dll"
