"""Makes a process execute a system call that its seccomp filter forbids.

A signal from outside is not what such a call gets: Firecracker's handler looks at the signal's
origin. Source: ptrace(2), PTRACE_ATTACH and PTRACE_SETREGS; `struct user_regs_struct` of x86-64.
Needs: CAP_SYS_PTRACE.
"""

import ctypes
import os
from typing import Final

ATTACH, DETACH, GETREGS, SETREGS = 16, 17, 12, 13
WAIT_ALL: Final = 0x40000000  # __WALL
WORDS: Final = 27
RAX, ORIG_RAX, RIP = 10, 15, 16
SYSCALL_BYTES: Final = 2
NO_CALL: Final = 2**64 - 1
FORBIDDEN: Final = 169  # reboot(2)


def make_forbidden_call(pid: int) -> None:
    """Have the process, whose main thread sleeps in a system call, go on with another one."""
    registers = (ctypes.c_uint64 * WORDS)()
    _ptrace(ATTACH, pid, None)
    os.waitpid(pid, WAIT_ALL)
    _ptrace(GETREGS, pid, ctypes.addressof(registers))
    registers[RIP] -= SYSCALL_BYTES
    registers[RAX] = FORBIDDEN
    registers[ORIG_RAX] = NO_CALL  # or the kernel restarts the one that was interrupted
    _ptrace(SETREGS, pid, ctypes.addressof(registers))
    _ptrace(DETACH, pid, None)


def _ptrace(request: int, pid: int, data: int | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, pid, None, data) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace request {request}")
