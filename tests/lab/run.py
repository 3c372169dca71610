"""Run a command in the lab: `python -m tests.lab.run -- COMMAND...`, or `run_in_lab` from a test.

The lab boots for it, has the project as it is on this machine at the same path, and powers off. Its
console is streamed. QEMU's emulation is known to hang now and then: a lab without a sign of life is
killed and started once more, from the beginning.
"""

import argparse
import codecs
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.guests import cache
from tests.lab import qemu
from tests.lab.build import ensure_lab

ALIVE = b"\x1e"  # written by the lab every 3 s
EXIT = b"\x1f"  # begins the line with the exit code
SILENCE_S = 30.0
ATTEMPTS = 2

Sink = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class LabResult:
    """How the command ended, and all that it wrote to stdout and stderr."""

    exit_code: int
    output: str


class LabFailure(Exception):
    """The lab itself failed: hung twice, ran out of time, or ended without an exit code."""


class _Hung(Exception):
    """No sign of life."""


def run_in_lab(
    argv: Sequence[str],
    *,
    files: Mapping[str, Path] | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
    mem_mib: int = 3072,
    sink: Sink = lambda text: None,
) -> LabResult:
    """Boot the lab, run one command in the project's folder, power off.

    Args:
        argv: the command; the project's environment comes first on PATH.
        files: more to take along: path in the lab -> file or folder here.
        environment: variables set for it, besides HOSTD_LAB=1 and CI as it is here.
        timeout_s: for each attempt, boot included.
        sink: gets the output as it comes.

    Raises:
        LabFailure: the command's end is unknown.
    """
    ensure_lab()
    variables = {name: os.environ[name] for name in ("CI",) if name in os.environ}
    variables |= environment or {}
    with tempfile.TemporaryDirectory(prefix="lab-", dir=cache.BUILD) as scratch:
        source = Path(scratch) / "source.tar"
        qemu.write_source(source, argv, files or {}, variables)
        command = qemu.command_line(source, mem_mib=mem_mib, shell=False)
        for _ in range(ATTEMPTS):
            try:
                return _run(command, Path(scratch), timeout_s, sink)
            except _Hung:
                sink(f"\nlab: no sign of life for {SILENCE_S:.0f} s; killed\n")
    raise LabFailure(f"the lab hung {ATTEMPTS} times")


def _run(command: list[str], scratch: Path, timeout_s: float, sink: Sink) -> LabResult:
    console = _Console(sink)
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
                    tail = "".join(console.parts)[-2000:]
                    raise LabFailure(f"not done after {timeout_s:.0f} s; so far: {tail}")
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    return console.result()
                console.feed(data)
        finally:
            process.kill()


class _Console:
    """Takes signs of life and the exit code out of what the lab writes."""

    def __init__(self, sink: Sink) -> None:
        self.parts: list[str] = []
        self._sink = sink
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._exit: bytes | None = None

    def feed(self, data: bytes) -> None:
        text, mark, after = data.replace(ALIVE, b"").partition(EXIT)
        if self._exit is not None:
            self._exit += text
            return
        if mark:
            self._exit = after
        decoded = self._decoder.decode(text)
        self.parts.append(decoded)
        self._sink(decoded)

    def result(self) -> LabResult:
        output = "".join(self.parts)
        try:
            code = int((self._exit or b"").split()[0])
        except (IndexError, ValueError):
            raise LabFailure(f"the lab ended without an exit code: {output[-2000:]}") from None
        return LabResult(code, output.removesuffix("\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a command in the lab.")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="default: %(default)s")
    parser.add_argument("--mem-mib", type=int, default=3072, help="default: %(default)s")
    parser.add_argument("argv", nargs="+", metavar="COMMAND", help="after a --")
    options = parser.parse_args()

    def show(text: str) -> None:
        print(text, end="", flush=True)

    result = run_in_lab(
        options.argv, timeout_s=options.timeout_s, mem_mib=options.mem_mib, sink=show
    )
    sys.exit(result.exit_code)


if __name__ == "__main__":
    main()
