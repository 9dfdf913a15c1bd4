"""Tests of the list of kernel variants, CPU detection and user overrides."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deltaw.errors import UserError
from deltaw.kernels import loader, processor, variants
from deltaw.kernels.processor import library_flags, processor_flags, second_level_cache
from tests.kernels.conftest import compiled_only

VARIANTS = "none"

# CPU flags of some processors, limited to those that variants require.
HASWELL = "avx avx2 fma f16c"
SKYLAKE_SERVER = f"{HASWELL} avx512f avx512bw avx512vl avx512dq"
ZEN_4 = f"{SKYLAKE_SERVER} avx512_vnni avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN_4} avx_vnni amx_tile amx_bf16 amx_int8"


PROCESSORS = [
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
]


@pytest.mark.parametrize(("flags", "machine", "best", "built"), PROCESSORS)
def test_best_variant_and_built_variants_of_a_processor(flags, machine, best, built):
    allowed = variants.allowed(flags.split(), machine)
    assert allowed[0].name == best and allowed[-1].name == "generic"
    assert built is None or [v.name for v in variants.variants_to_build(flags.split(), machine)] == built.split()


def test_names_families_and_flags_are_consistent_across_variants():
    listed = variants.all_variants()
    assert len({v.name for v in listed}) == len(listed)
    for variant in listed:
        # Measuring the highest rank of a family is sufficient: a CPU that supports it supports the lower ranks.
        for lower in (v for v in listed if v.family == variant.family and v.rank < variant.rank):
            assert set(lower.needs) <= set(variant.needs) and lower.machine == variant.machine
        # Code compiled for an instruction set that is not required of the CPU could crash.
        sets = {flag[2:].replace("-", "").replace("_", "") for flag in variant.flags if flag.startswith("-m")}
        needs = {word.replace("_", "") for word in variant.needs}
        assert {word for word in sets if not word.startswith("arch=")} <= needs, variant.name


def test_missing_column_raises(tmp_path):
    file = tmp_path / "variants.txt"
    file.write_text("# comment\n\nfast | family | 3 | any | flags\n")
    with pytest.raises(ValueError, match="six columns"):
        variants.all_variants(file)


OVERRIDES = [
    ("avx2", "", "avx2", None),
    ("avx512_bf16:wide", "", "avx512_bf16", "wide"),
    ("auto:torch", "", None, "torch"),
    ("none", "", "none", None),
    ("none", "0", "none", None),  # disabled twice, not a contradiction
    ("torch:torch", "", "none", "torch"),
    ("", "", None, None),
]


@pytest.mark.parametrize(("value", "off", "kernels", "arithmetic"), OVERRIDES)
def test_overrides_are_parsed_from_environment(value, off, kernels, arithmetic):
    overrides = variants.kernel_overrides({variants.VARIABLE: value, variants.OFF: off})
    assert (overrides.kernels, overrides.arithmetic) == (kernels, arithmetic)


INVALID_OVERRIDES = [("avx3", "", "'avx2'"), ("avx2:widest", "", "'wide'")]
INVALID_OVERRIDES += [("none:wide", "", "requires compiled kernels"), ("avx2", "0", "contradict")]


@pytest.mark.parametrize(("value", "off", "message"), INVALID_OVERRIDES)
def test_invalid_override_raises(value, off, message):
    with pytest.raises(UserError, match=message):
        variants.kernel_overrides({variants.VARIABLE: value, variants.OFF: off})


def test_command_line_rejects_variant_of_another_machine():
    """The command exits with status 2 and a single message."""
    foreign = next(v for v in variants.all_variants() if v.machine not in ("any", variants.machine()))
    environment = os.environ | {variants.VARIABLE: foreign.name, variants.OFF: "1"}
    command = [sys.executable, "-m", "deltaw", "inspect", "nowhere"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"'{foreign.name}' need CPU features that are missing here" in result.stderr


def test_second_level_cache_size(tmp_path):
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


def test_flags_of_first_processor_are_used(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name: fast\nflags: avx2 fma\n\nmodel name: slow\nflags: sse2\n")
    assert processor_flags(tmp_path) == {"avx2", "fma"}


@compiled_only
@pytest.mark.skipif(variants.machine() != "x86_64" or sys.platform != "linux", reason="compares with flags of Linux")
def test_library_detects_same_flags_as_linux(monkeypatch):
    """Windows has no list of flags, so the library is used there."""
    file = variants.file_of(loader.usable_variants()[-1])
    required = {word for v in variants.for_machine() for word in v.needs}
    expected = processor_flags() & required
    assert library_flags(file) & required == expected and len(expected) > 0
    monkeypatch.setattr(processor, "_GENERIC_LIBRARY", file)
    monkeypatch.setattr(sys, "platform", "win32")
    assert processor_flags() == library_flags(file)


def test_missing_or_damaged_library_returns_no_flags(monkeypatch, tmp_path):
    (tmp_path / "damaged.dll").write_bytes(b"MZ")
    assert library_flags(tmp_path / "damaged.dll") == library_flags(tmp_path / "missing.dll") == set()


def test_file_suffix_matches_system(monkeypatch):
    variant = variants.for_machine("x86_64")[-1]
    assert variants.file_of(variant).suffix == variants.LIBRARY_SUFFIX
    monkeypatch.setattr(variants, "LIBRARY_SUFFIX", ".dll")
    assert variant.file == "_native_generic.dll"
