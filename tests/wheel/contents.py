"""What a wheel must and must not hold, on whatever machine: its tag, and objects of its platform's format alone.

``python tests/wheel/contents.py dist/*.whl`` prints a line for each wheel, and ends with status 1 where one is wrong.
Imports nothing but deltaw's list of variants.
"""

from __future__ import annotations

import re
import struct
import sys
import zipfile
from pathlib import Path

from deltaw.kernels import variants

# By the beginning of a platform's tag: the objects' format and processor, their ending, and the type of processor.
PLATFORMS = {
    "manylinux_2_28_x86_64": ("ELF 62", ".so", "x86_64"),
    "linux_x86_64": ("ELF 62", ".so", "x86_64"),
    "manylinux_2_28_aarch64": ("ELF 183", ".so", "aarch64"),
    "linux_aarch64": ("ELF 183", ".so", "aarch64"),
    "macosx_11_0_arm64": ("Mach-O 16777228", ".so", "aarch64"),
    "win_amd64": ("PE 34404", ".dll", "x86_64"),
}
ENDINGS = (".so", ".dll", ".dylib", ".pyd", ".o", ".cpp", ".h")
OLDEST_GLIBC = (2, 28)


def format_of(data: bytes) -> str:
    """An object's format and the number of the processor that it is for."""
    if data[:4] == b"\x7fELF":
        return f"ELF {struct.unpack_from('<H', data, 18)[0]}"
    if data[:4] == b"\xcf\xfa\xed\xfe":
        return f"Mach-O {struct.unpack_from('<I', data, 4)[0]}"
    if data[:2] == b"MZ":
        at = struct.unpack_from("<I", data, 60)[0]
        return f"PE {struct.unpack_from('<H', data, at + 4)[0]}" if data[at : at + 4] == b"PE\0\0" else "MZ"
    return "unknown"


def glibc_of(data: bytes) -> tuple[int, int]:
    """The newest version of glibc that an ELF object names; (0, 0) where it names none."""
    found = re.findall(rb"\0GLIBC_(\d+)\.(\d+)(?:\.\d+)?(?=\0)", data)
    return max(((int(major), int(minor)) for major, minor in found), default=(0, 0))


def faults_of(wheel: Path, built: set[str] | None = None) -> list[str]:
    """What is wrong with a wheel; ``built`` are the names of the variants where not all were built."""
    tag = wheel.name.removesuffix(".whl").split("-")[2:]
    if tag[:2] != ["py3", "none"] or tag[2] not in PLATFORMS:
        return [f"it is tagged {'-'.join(tag)}"]
    kind, ending, machine = PLATFORMS[tag[2]]
    faults = []
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        about = archive.read(next(file for file in files if file.endswith(".dist-info/WHEEL"))).decode()
        objects = {file: archive.read(file) for file in files if file.endswith(ENDINGS)}
    if f"Tag: py3-none-{tag[2]}\n" not in about or "Root-Is-Purelib: false" not in about:
        faults.append("its description has another tag")
    if "deltaw/kernels/csrc/variants.txt" not in files:
        faults.append("the list of variants is missing")
    on_linux = "linux" in tag[2]
    wanted = {v.name for v in variants.for_machine(machine) if on_linux or "amx_tile" not in v.needs}
    expected = {f"deltaw/kernels/_native_{name}{ending}" for name in (wanted if built is None else built)}
    for file in sorted(expected ^ set(objects)):
        faults.append(f"{file} {'is missing' if file in expected else 'does not belong there'}")
    for file, data in objects.items():
        if format_of(data) != kind:
            faults.append(f"{file} is {format_of(data)}, not {kind}")
        if glibc_of(data) > OLDEST_GLIBC and tag[2].startswith("manylinux"):
            faults.append(f"{file} needs glibc {'.'.join(map(str, glibc_of(data)))}")
        if b"dw_linear\0" not in data and b"_dw_linear" not in data:
            faults.append(f"{file} does not export the kernels")
    return faults


def main(wheels: list[str]) -> int:
    wrong = 0
    for wheel in map(Path, wheels):
        faults = faults_of(wheel)
        wrong += bool(faults)
        print(f"{wheel.name}: {'; '.join(faults) or 'holds what it should'}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
