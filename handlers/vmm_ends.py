"""Why a VMM ended, decided from what the kernel, its cgroup and its own log say. Pure.

What each source can prove:

- The kernel gives the exit status, also to a process that is not the parent, while the process is a
  zombie or, from Linux 6.15 on, after it was reaped. If nobody asked in time it is not known.
- The leaf of the cgroup counts its processes that an OOM killer killed, whichever it was
  (`oom_kill`), and how often its own limit was reached (`oom`); the VMM is all that is in it. So a
  kill without a reached limit came from the host, or from a limit above the leaf: which of the two
  the leaf cannot tell.
- Firecracker's log is its own word, and that of a guest that took it over: it is believed only
  where the kernel says nothing, and for what the kernel cannot know (a panic, why exit code 0).

Source: docs of Firecracker's FcExitCode (src/vmm/src/lib.rs), Documentation/admin-guide/cgroup-v2.
"""

import re
import signal
from dataclasses import dataclass
from typing import Final

from msgspec.structs import asdict

from handlers.errors import Failure, HostFault, Unavailable
from schemas.records import VmmEnd

# Firecracker catches these signals, logs them and exits with its own code (FcExitCode).
CAUGHT: Final = {
    148: signal.SIGSYS,
    149: signal.SIGBUS,
    150: signal.SIGSEGV,
    151: signal.SIGXFSZ,
    154: signal.SIGXCPU,
    155: signal.SIGPIPE,
    156: signal.SIGHUP,
    157: signal.SIGILL,
}
PANIC: Final = b"panicked at"
TRIPLE_FAULT: Final = b"Received KVM_EXIT_SHUTDOWN signal"
LAST_WORDS: Final = re.compile(
    rb"intercepting signal (?P<signal>[0-9]{1,2}),"
    rb"|exiting (?:successfully|with error)\. exit_code=(?P<code>[0-9]{1,3})"
)
LAST_LINES: Final = 16
EXIT_CODES: Final = 256

TEXTS: Final = {
    "hung": "hostd killed it because its API did not answer",
    "oom_cgroup": "the kernel killed it: its cgroup reached memory.max",
    "oom_host": "the kernel killed it: memory ran out on the host, or in a cgroup above its own",
    "panic": "Firecracker panicked",
    "guest_shutdown": "the guest shut down or reset itself",
    "guest_crash": "the guest crashed with a triple fault",
    "host_reboot": "the host was rebooted",
    "unknown": "nothing that is left says why",
}


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process exited; both None where the kernel does not report it any more."""

    code: int | None = None
    signal: int | None = None


@dataclass(frozen=True, slots=True)
class OomCounts:
    """`memory.events` of a VMM's leaf, made anew for each launch."""

    limit_reached: int
    killed: int


def end_of(
    status: ExitStatus, oom: OomCounts | None, log: bytes, *, launch: int, at_ms: int
) -> VmmEnd:
    """Why the VMM of a launch ended.

    Args:
        oom: None without the memory controller.
        log: the end of the VMM's log; empty if there is none.
    """

    def end(reason: str, evidence: str, found: ExitStatus = status) -> VmmEnd:
        return VmmEnd(
            reason=reason,
            evidence=evidence,
            launch=launch,
            at_ms=at_ms,
            code=found.code,
            signal=found.signal,
        )

    killed = status.signal == signal.SIGKILL or status == ExitStatus()
    if killed and oom is not None and oom.killed:
        return end("oom_cgroup" if oom.limit_reached else "oom_host", "cgroup")
    lines = log.splitlines()[-LAST_LINES:]
    if any(PANIC in line for line in lines) and status.signal != signal.SIGKILL:
        return end("panic", "log")
    evidence = "kernel"
    if status == ExitStatus():
        status, evidence = _last_words(lines), "log"
    if status.signal is not None:
        return end(f"signal_{status.signal}", evidence, status)
    if status.code == 0:
        crashed = any(TRIPLE_FAULT in line for line in lines)
        return end("guest_crash" if crashed else "guest_shutdown", "log", status)
    if status.code is not None:
        caught = CAUGHT.get(status.code)
        reason = f"code_{status.code}" if caught is None else f"signal_{caught.value}"
        return end(reason, evidence, status)
    return end("unknown", "none")


def killed_from_outside(end: VmmEnd) -> bool:
    """Whether somebody sent SIGKILL: no OOM killer, and of a VMM that hostd has not ended."""
    return end.reason == f"signal_{signal.SIGKILL.value}"


def failure_of(failure: Failure, end: VmmEnd) -> Failure:
    """The failure of a launch with why its VMM ended: in the message, and as `detail.vmm_end`.

    Who kills a VMM from outside says nothing about the host: `unavailable`, never `host_fault`.
    """
    message = f"{failure.message}: {text_of(end)}"
    if isinstance(failure, HostFault) and killed_from_outside(end):
        failure, given = Unavailable(message, path=failure.path, detail=failure.detail), failure
        failure.final, failure.left_behind = given.final, given.left_behind
    failure.message = message
    failure.detail["vmm_end"] = {**facts_of(end), "text": text_of(end)}
    return failure


def facts_of(end: VmmEnd) -> dict[str, object]:
    """For events and answers; what is not known is left out."""
    return {name: value for name, value in asdict(end).items() if value is not None}


def text_of(end: VmmEnd) -> str:
    """One sentence for an operator, without a full stop."""
    if (text := TEXTS.get(end.reason)) is not None:
        return text
    kind, _, number = end.reason.partition("_")
    if kind == "signal":
        how = "killed by" if end.code is None else f"exited with code {end.code} after"
        return f"{how} {_signal_name(int(number))}"
    return f"exited with code {number}"


def _last_words(lines: list[bytes]) -> ExitStatus:
    """What Firecracker logged last about its end; it exits right after that."""
    for line in reversed(lines):
        if (found := LAST_WORDS.search(line)) is not None:
            number, is_signal = int(found["signal"] or found["code"]), found["signal"] is not None
            if is_signal and number < signal.NSIG:
                return ExitStatus(signal=number)
            if not is_signal and number < EXIT_CODES:
                return ExitStatus(code=number)
    return ExitStatus()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
