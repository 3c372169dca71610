"""The signals of a worker: which stop it, reload its settings, dump its state, and are ignored.

A signal that is ignored is caught, not set to SIG_IGN: a VMM would inherit SIG_IGN through exec,
while a handler becomes the default again. Source: signal(7), execve(2).
"""

import asyncio
import signal
from signal import Signals
from typing import Final

import structlog

STOP: Final = frozenset({Signals.SIGTERM, Signals.SIGINT})
RELOAD: Final = Signals.SIGHUP
DUMP: Final = Signals.SIGUSR1
# These keep their default actions. The first two cannot be caught; faults, and SIGABRT of abort(3),
# must end the process; the kernel ignores the last three, or continues the process.
FAULTS: Final = frozenset(
    {
        Signals.SIGABRT,
        Signals.SIGBUS,
        Signals.SIGFPE,
        Signals.SIGILL,
        Signals.SIGSEGV,
        Signals.SIGSYS,
        Signals.SIGTRAP,
    }
)
DEFAULT: Final = FAULTS | {
    Signals.SIGKILL,
    Signals.SIGSTOP,
    Signals.SIGCHLD,
    Signals.SIGCONT,
    Signals.SIGPIPE,  # Python ignores it: EPIPE is an error of the write
    Signals.SIGURG,
    Signals.SIGWINCH,
    Signals.SIGXFSZ,  # Python ignores it: EFBIG is an error of the write
}

log = structlog.get_logger()


def ignored() -> frozenset[int]:
    """Every other signal: its default action would stop or end the worker at once."""
    return frozenset(signal.valid_signals()) - DEFAULT - STOP - {RELOAD, DUMP}


def name_of(number: int) -> str:
    """`SIGUSR1`, or `SIGRTMIN+2` for one without a name of its own."""
    try:
        return Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


class WorkerSignals:
    """`stop` is set by SIGTERM and SIGINT, `reload` by SIGHUP, `dump` by SIGUSR1; the readers of
    the last two clear them."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.reload = asyncio.Event()
        self.dump = asyncio.Event()

    def install(self) -> None:
        """Catch all of them from now on, in the running event loop."""
        loop = asyncio.get_running_loop()
        for number in STOP:
            loop.add_signal_handler(number, self.stop.set)
        loop.add_signal_handler(RELOAD, self.reload.set)
        loop.add_signal_handler(DUMP, self.dump.set)
        for other in ignored():
            loop.add_signal_handler(other, self._note, other)

    def _note(self, number: int) -> None:
        log.info("signal.ignored", signal=name_of(number))
