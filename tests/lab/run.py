"""Run a command in the lab: `python -m tests.lab.run -- COMMAND...`, or `run_in_lab` from a test.

The lab boots for it with the project in its current state at the same path, and powers off. The
command's stdout and stderr are streamed separately; after a failure, the whole console is in
build/lab/console.log. QEMU's emulation is known to hang occasionally: a lab without a heartbeat is
killed and started once more, from the beginning.
"""

import argparse
import codecs
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from tests.guests import cache
from tests.lab import qemu
from tests.lab.build import ensure_lab

ALIVE = b"\x1e"  # written by the lab every 3 s
BEGIN = b"\x1d"  # output before it is the lab's own
ERROR = b"\x1c"  # begins a line of the command's stderr
EXIT = b"\x1f"  # begins the line with the exit code; output after it is the lab's own
PROCESS = os.environ.get("PYTEST_XDIST_WORKER")  # two processes of a test run may have a lab each
CONSOLE = cache.BUILD / "lab" / (f"console-{PROCESS}.log" if PROCESS else "console.log")
SILENCE_S = 30.0
LIMIT_S = 1800.0  # three times what the longest takes: machines differ by more than a factor of two
ATTEMPTS = 2

Sink = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class LabResult:
    """The exit code, and stdout and stderr in the order of their arrival."""

    exit_code: int
    output: str


class LabFailure(Exception):
    """The lab itself failed: hung twice, timed out, or ended without an exit code."""


class _Hung(Exception):
    """No heartbeat."""


def run_in_lab(
    argv: Sequence[str],
    *,
    files: Mapping[str, Path] | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = LIMIT_S,
    mem_mib: int = 3072,
    systemd: bool = False,
    sink: Sink = lambda text: None,
    error_sink: Sink | None = None,
) -> LabResult:
    """Boot the lab, run one command in the project's directory, power off.

    Args:
        argv: the command; the project's environment is first in PATH.
        files: additional files: path in the lab -> file or directory here.
        environment: variables set for it, besides HOSTD_LAB=1 and CI as it is here.
        timeout_s: for each attempt, boot included.
        systemd: it is the first process, and the command a service of it.
        sink: gets the output as it comes.
        error_sink: gets stderr and news of the lab itself; without it they go to `sink` too.

    Raises:
        LabFailure: the command's end is unknown.
    """
    errors = error_sink or sink
    ensure_lab()
    variables = {name: os.environ[name] for name in ("CI",) if name in os.environ}
    variables |= environment or {}
    with tempfile.TemporaryDirectory(prefix="lab-", dir=cache.BUILD) as scratch:
        source = Path(scratch) / "source.tar"
        qemu.write_source(source, argv, files or {}, variables)
        command = qemu.command_line(source, mem_mib=mem_mib, systemd=systemd)
        for attempt in range(1, ATTEMPTS + 1):
            if attempt > 1:
                errors("lab: started once more, all from the beginning\n")
            console = _Console(sink, errors)
            try:
                result = _run(command, Path(scratch), timeout_s, console)
            except _Hung:
                console.keep()
                errors(f"\nlab: QEMU hung, no heartbeat for {SILENCE_S:.0f} s; killed\n")
            except LabFailure:
                console.keep()
                raise
            else:
                if result.exit_code:
                    console.keep()
                return result
    raise LabFailure(f"the lab hung {ATTEMPTS} times; its console is in {CONSOLE}")


def _run(command: list[str], scratch: Path, timeout_s: float, console: "_Console") -> LabResult:
    deadline = time.monotonic() + timeout_s
    with (
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        ) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdout is not None
        selector.register(process.stdout, selectors.EVENT_READ)
        try:
            while True:
                patience_s = min(SILENCE_S, deadline - time.monotonic())
                if not selector.select(max(0.0, patience_s)):
                    if patience_s == SILENCE_S:
                        raise _Hung
                    raise LabFailure(
                        f"command still running after {timeout_s:.0f} s; console: {console.tail()}"
                    )
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    return console.result()
                console.feed(data)
        finally:
            process.kill()


class _Console:
    """Separates the command's output from the rest of the lab's only serial line."""

    def __init__(self, sink: Sink, error_sink: Sink) -> None:
        self._raw = bytearray()
        self._parts: list[str] = []
        self._sinks = {False: sink, True: error_sink}
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {False: decoder("replace"), True: decoder("replace")}
        self._begun = self._in_error = False
        self._exit: bytes | None = None

    def feed(self, data: bytes) -> None:
        text = data.replace(ALIVE, b"")
        self._raw += text
        if not self._begun:
            _, mark, text = text.partition(BEGIN)
            self._begun = bool(mark)
        if self._exit is not None:
            self._exit += text
            return
        text, mark, after = text.partition(EXIT)
        if mark:
            self._exit = after
        self._divide(text if self._begun else b"")

    def _divide(self, text: bytes) -> None:
        """Stderr starts at an ERROR byte and ends with that line."""
        while text:
            piece, mark, text = text.partition(b"\n" if self._in_error else ERROR)
            self._write(piece + mark if self._in_error else piece)
            if mark:
                self._in_error = not self._in_error

    def _write(self, text: bytes) -> None:
        decoded = self._decoders[self._in_error].decode(text)
        if decoded:
            self._parts.append(decoded)
            self._sinks[self._in_error](decoded)

    def result(self) -> LabResult:
        try:
            code = int((self._exit or b"").split()[0])
        except (IndexError, ValueError):
            raise LabFailure(f"the lab ended without an exit code: {self.tail()}") from None
        return LabResult(code, "".join(self._parts))

    def tail(self) -> str:
        """The end of the console, the lab's own output included."""
        return bytes(self._raw[-2000:]).decode("utf-8", "replace")

    def keep(self) -> None:
        """Write all of it to CONSOLE, replacing that of an earlier failure."""
        CONSOLE.parent.mkdir(parents=True, exist_ok=True)
        CONSOLE.write_bytes(self._raw)


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a command in the lab.")
    parser.add_argument("--timeout-s", type=float, default=LIMIT_S, help="default: %(default)s")
    parser.add_argument("--mem-mib", type=int, default=3072, help="default: %(default)s")
    parser.add_argument("--systemd", action="store_true", help="boot systemd, which runs COMMAND")
    parser.add_argument("argv", nargs="+", metavar="COMMAND", help="after a --")
    options = parser.parse_args()
    # So that QEMU and the scratch directory go with this process.
    signal.signal(signal.SIGTERM, _exit)
    try:
        result = run_in_lab(
            options.argv,
            timeout_s=options.timeout_s,
            mem_mib=options.mem_mib,
            systemd=options.systemd,
            sink=lambda text: _show(sys.stdout, text),
            error_sink=lambda text: _show(sys.stderr, text),
        )
    except LabFailure as error:
        sys.exit(f"lab: {error}\nlab: the whole console is in {CONSOLE}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if result.exit_code:
        _show(sys.stderr, f"lab: exit code {result.exit_code}; the whole console is in {CONSOLE}\n")
    sys.exit(result.exit_code)


def _show(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()


if __name__ == "__main__":
    main()
