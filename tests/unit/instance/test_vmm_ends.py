"""Why a VMM ended: which evidence counts, and what it does not prove."""

import signal

import pytest

from handlers.vmm_ends import CAUGHT, EXIT_CODES, TEXTS, ExitStatus, OomCounts, end_of, text_of

STAMP = b"2026-11-26T16:17:35.315107113 [000000002fee-4:main] "
RESET = STAMP + b"Vmm is stopping.\n" + STAMP + b"Firecracker exiting successfully. exit_code=0\n"
CRASH = STAMP + b"Received KVM_EXIT_SHUTDOWN signal\n" + RESET
SYSCALL = STAMP + b"Shutting down VM after intercepting signal 31, code 0.\n"
ERROR = STAMP + b"Firecracker exiting with error. exit_code=1\n"
PANIC = STAMP + b"Firecracker panicked at src/vmm/src/lib.rs:1:1:\nindex out of bounds\n"
KILLED = ExitStatus(signal=signal.SIGKILL)
NO_OOM = OomCounts(limit_reached=0, killed=0)
NOTHING = ExitStatus()


@pytest.mark.parametrize(
    ("status", "oom", "log", "reason", "evidence"),
    [
        (KILLED, OomCounts(3, 1), b"", "oom_cgroup", "cgroup"),
        (KILLED, OomCounts(0, 1), b"", "oom_host", "cgroup"),
        (NOTHING, OomCounts(0, 1), b"", "oom_host", "cgroup"),
        (KILLED, NO_OOM, b"", "signal_9", "kernel"),
        (KILLED, None, b"", "signal_9", "kernel"),
        # the limit was reached, but nothing was killed for it
        (KILLED, OomCounts(3, 0), b"", "signal_9", "kernel"),
        # something was killed, but the VMM ended by itself
        (ExitStatus(code=0), OomCounts(3, 1), RESET, "guest_shutdown", "log"),
        (ExitStatus(code=0), NO_OOM, CRASH, "guest_crash", "log"),
        (ExitStatus(code=0), NO_OOM, b"", "guest_shutdown", "log"),
        (NOTHING, None, RESET, "guest_shutdown", "log"),
        (NOTHING, None, CRASH, "guest_crash", "log"),
        (ExitStatus(code=148), None, SYSCALL, "signal_31", "kernel"),
        (NOTHING, None, SYSCALL, "signal_31", "log"),
        (ExitStatus(code=1), None, ERROR, "code_1", "kernel"),
        (NOTHING, None, ERROR, "code_1", "log"),
        (ExitStatus(signal=6), None, PANIC, "panic", "log"),
        (ExitStatus(code=150), None, PANIC + SYSCALL, "panic", "log"),
        (NOTHING, None, PANIC, "panic", "log"),
        # a log does not turn a kill into a panic, nor a kill into a shutdown
        (KILLED, None, PANIC, "signal_9", "kernel"),
        (KILLED, None, RESET, "signal_9", "kernel"),
        (NOTHING, None, b"", "unknown", "none"),
        (NOTHING, None, b"\xff\0 anything", "unknown", "none"),
        # long before the end: not the last words
        (NOTHING, None, RESET + STAMP * 40 + b"\n" * 40, "unknown", "none"),
    ],
)
def test_the_reason_follows_from_the_strongest_evidence(
    status: ExitStatus, oom: OomCounts | None, log: bytes, reason: str, evidence: str
) -> None:
    end = end_of(status, oom, log, launch=3, at_ms=7)

    assert (end.reason, end.evidence) == (reason, evidence)
    assert (end.launch, end.at_ms) == (3, 7)
    assert text_of(end)


@pytest.mark.parametrize(("code", "number"), CAUGHT.items())
def test_a_signal_that_firecracker_caught_is_named_as_that_signal(code: int, number: int) -> None:
    end = end_of(ExitStatus(code=code), None, b"", launch=1, at_ms=1)

    assert end.reason == f"signal_{int(number)}"
    assert signal.Signals(number).name in text_of(end)


def test_reasons_are_few_whatever_a_log_says() -> None:
    """They are labels of a metric, and a guest that took Firecracker over writes its log."""
    found = {
        end_of(NOTHING, None, text % number, launch=1, at_ms=1).reason
        for number in range(5000)
        for text in (
            b"x exiting with error. exit_code=%d",
            b"x intercepting signal %d, code 0.",
        )
    }

    assert len(found - TEXTS.keys()) <= EXIT_CODES + signal.NSIG
