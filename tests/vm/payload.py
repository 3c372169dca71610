"""The smallest guests there are: an ELF of some machine code, entered in long mode by Firecracker.

For tests of the VMM alone; what needs an agent, a network or a disk takes the mini guest.
"""

import struct
from pathlib import Path

BASE = 0x100000
COUNTER = 0x200000
ELF_HEADER, PROGRAM_HEADER, CODE_OFFSET = 64, 56, 0x1000

HALT = b"\xfa\xf4\xeb\xfd"
"""cli; hlt, for ever: the vCPU sleeps in KVM."""

COUNT = b"\xfa\x48\xbf" + struct.pack("<Q", COUNTER) + b"\x48\xff\x07\xeb\xfb"
"""cli; mov rdi, COUNTER; inc qword [rdi], for ever."""

RESET = b"\x66\xba\x64\x00\xb0\xfe\xee\xf4\xeb\xfd"
"""A reset by the keyboard controller: the VMM ends with 0."""

CRASH = b"\x0f\x0b"
"""ud2 without an interrupt table: a triple fault, on which the VMM ends with 0 as well."""

EXIT_0 = b"\x31\xff\xb8\x3c\x00\x00\x00\x0f\x05"
"""Not for a guest but for the host: a program that calls exit(0)."""

WAIT = b"\xb8\x22\x00\x00\x00\x0f\x05\xeb\xf7"
"""Not for a guest but for the host: a program that calls pause(2) for ever."""


def write(path: Path, code: bytes = HALT) -> Path:
    """Write a bootable ELF with one segment at 1 MiB."""
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, BASE, ELF_HEADER, 0, 0, ELF_HEADER, PROGRAM_HEADER, 1, 64, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 7, CODE_OFFSET, BASE, BASE, len(code), len(code), 0x1000)
    path.write_bytes((header + segment).ljust(CODE_OFFSET, b"\0") + code)
    path.chmod(0o755)
    return path
