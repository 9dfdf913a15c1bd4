"""Check the platform tag of a wheel and the format of its object files, on any machine.

``python tests/wheel/contents.py dist/*.whl`` prints one line per wheel and exits with status 1 if a check fails.
Imports only deltaw's list of variants.
"""

from __future__ import annotations

import re
import struct
import sys
import zipfile
from pathlib import Path

from deltaw.kernels import variants

# Platform tag → format and machine number of object files, their extension, and the processor type.
PLATFORMS = {"manylinux_2_28_x86_64": ("ELF 62", ".so", "x86_64"), "linux_x86_64": ("ELF 62", ".so", "x86_64")}
PLATFORMS |= {"manylinux_2_28_aarch64": ("ELF 183", ".so", "aarch64"), "linux_aarch64": ("ELF 183", ".so", "aarch64")}
PLATFORMS |= {"macosx_11_0_arm64": ("Mach-O 16777228", ".so", "aarch64"), "win_amd64": ("PE 34404", ".dll", "x86_64")}
OBJECT_EXTENSIONS = (".so", ".dll", ".dylib", ".pyd", ".o", ".cpp", ".h")
MAX_GLIBC = (2, 28)


def format_of(data: bytes) -> str:
    """Return the format of an object file and its machine number."""
    if data[:4] == b"\x7fELF":
        return f"ELF {struct.unpack_from('<H', data, 18)[0]}"
    if data[:4] == b"\xcf\xfa\xed\xfe":
        return f"Mach-O {struct.unpack_from('<I', data, 4)[0]}"
    if data[:2] == b"MZ":
        at = struct.unpack_from("<I", data, 60)[0]
        return f"PE {struct.unpack_from('<H', data, at + 4)[0]}" if data[at : at + 4] == b"PE\0\0" else "MZ"
    return "unknown"


def glibc_of(data: bytes) -> tuple[int, int]:
    """Return the newest glibc version that an ELF object requires, or (0, 0)."""
    versions = re.findall(rb"\0GLIBC_(\d+)\.(\d+)(?:\.\d+)?(?=\0)", data)
    return max(((int(major), int(minor)) for major, minor in versions), default=(0, 0))


def wheel_errors(wheel: Path, built: set[str] | None = None) -> list[str]:
    """Return the errors of a wheel.

    Args:
        wheel: Path of the wheel.
        built: Names of the built variants, or None if all were built.
    """
    tag = wheel.name.removesuffix(".whl").split("-")[2:]
    if tag[:2] != ["py3", "none"] or tag[2] not in PLATFORMS:
        return [f"unexpected tag {'-'.join(tag)}"]
    kind, extension, machine = PLATFORMS[tag[2]]
    errors = []
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        metadata = archive.read(next(file for file in files if file.endswith(".dist-info/WHEEL"))).decode()
        objects = {file: archive.read(file) for file in files if file.endswith(OBJECT_EXTENSIONS)}
    if f"Tag: py3-none-{tag[2]}\n" not in metadata or "Root-Is-Purelib: false" not in metadata:
        errors.append("the tag in its metadata differs")
    if "deltaw/kernels/csrc/variants.txt" not in files:
        errors.append("the list of variants is missing")
    on_linux = "linux" in tag[2]
    supported = {v.name for v in variants.for_machine(machine) if on_linux or "amx_tile" not in v.needs}
    expected = {f"deltaw/kernels/_native_{name}{extension}" for name in (supported if built is None else built)}
    for file in sorted(expected ^ set(objects)):
        errors.append(f"{file} {'is missing' if file in expected else 'is unexpected'}")
    for file, data in objects.items():
        if format_of(data) != kind:
            errors.append(f"{file} is {format_of(data)}, not {kind}")
        if glibc_of(data) > MAX_GLIBC and tag[2].startswith("manylinux"):
            errors.append(f"{file} needs glibc {'.'.join(map(str, glibc_of(data)))}")
        if b"dw_linear\0" not in data and b"_dw_linear" not in data:
            errors.append(f"{file} does not export the kernels")
    return errors


def main(wheels: list[str]) -> int:
    failed = 0
    for wheel in map(Path, wheels):
        errors = wheel_errors(wheel)
        failed += bool(errors)
        print(f"{wheel.name}: {'; '.join(errors) or 'ok'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
