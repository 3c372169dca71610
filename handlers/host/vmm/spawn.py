"""Execute a program and wait for it without blocking the event loop or the interpreter.

`subprocess` holds the GIL from vfork until the program is executed: 1 ms on an idle host, 60 ms and
more while many VMMs start. A call through ctypes releases it, so in a thread it blocks nothing.
"""

import asyncio
import ctypes
import os
import signal
from collections.abc import Callable, Sequence

from handlers.cancellation import run_shielded
from handlers.errors import Unavailable
from handlers.host.linux.file_threads import HandedFd, run_in_thread
from handlers.host.vmm import processes

SETSIGDEF, SETSIGMASK = 0x04, 0x08
OPAQUE_BYTES = 1024  # more than any libc's posix_spawnattr_t, file_actions_t and sigset_t

_libc = ctypes.CDLL(None)


def nothing() -> None:
    """What precedes a program that needs no preparation."""


async def run(argv: Sequence[str], output: int, *, first: Callable[[], None] = nothing) -> int:
    """Run to completion with an empty environment; returns the exit code, negative for a signal.

    stdin is empty, stdout and stderr go to the descriptor `output`. If cancelled, the program is
    killed. Its child processes are not waited for. `first` is called before, in the same thread;
    what it raises is raised, and nothing is executed; so it is if the call was abandoned in it.

    Source: posix_spawn(3), pidfd_open(2).

    Raises:
        OSError: it cannot be executed, or not be watched: it was killed then.
    """

    waited_for = True
    handed = HandedFd(os.dup(output))

    def spawn() -> int:
        with handed.taken() as own:
            first()
            if not waited_for:
                raise Unavailable(f"{argv[0]} was not executed: nobody waits for it any more")
            return _spawn(argv, own)

    spawning = asyncio.ensure_future(run_in_thread(spawn))
    try:
        pid = await run_shielded(spawning)
    except asyncio.CancelledError:
        if not spawning.cancelled() and spawning.exception() is None:
            await run_shielded(_end(spawning.result()))
        raise
    finally:
        waited_for = False
        handed.close()
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        await run_shielded(_end(pid))
        raise
    try:
        await processes.wait_exit(pidfd)
    except asyncio.CancelledError:
        processes.send(pidfd, signal.SIGKILL)
        await run_shielded(processes.wait_exit(pidfd))
        raise
    finally:
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)  # noqa: ASYNC222 - it has exited
    return os.waitstatus_to_exitcode(status)


async def _end(pid: int) -> None:
    """Kill and reap what nobody waits for: its launch was cancelled, or it cannot be watched."""
    os.kill(pid, signal.SIGKILL)  # our own child, not reaped yet: the pid cannot be another's
    await run_in_thread(os.waitpid, pid, 0)


def _spawn(argv: Sequence[str], output: int) -> int:
    """posix_spawn(3), with default signal handling and none blocked; glibc 2.34 or newer."""
    pid = ctypes.c_int()
    actions, attributes, signals = (ctypes.create_string_buffer(OPAQUE_BYTES) for _ in range(3))
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    _libc.posix_spawn_file_actions_init(actions)
    _libc.posix_spawnattr_init(attributes)
    try:
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            _libc.posix_spawn_file_actions_adddup2(actions, source, target)
        _libc.posix_spawn_file_actions_addclosefrom_np(actions, 3)
        _libc.posix_spawnattr_setflags(attributes, ctypes.c_short(SETSIGDEF | SETSIGMASK))
        _libc.sigemptyset(signals)
        _libc.posix_spawnattr_setsigmask(attributes, signals)
        _libc.sigfillset(signals)
        _libc.posix_spawnattr_setsigdefault(attributes, signals)
        words = [os.fsencode(each) for each in argv]
        arguments = (ctypes.c_char_p * (len(argv) + 1))(*words, None)
        environment = (ctypes.c_char_p * 1)(None)
        failed = _libc.posix_spawn(
            ctypes.byref(pid), arguments[0], actions, attributes, arguments, environment
        )
    finally:
        _libc.posix_spawn_file_actions_destroy(actions)
        _libc.posix_spawnattr_destroy(attributes)
        os.close(nothing)
    if failed:
        raise OSError(failed, os.strerror(failed), argv[0])
    return pid.value
