"""The process of an embedded nats-server: find the program, start it, stop it by its pid.

Source: nats-server(8): SIGTERM ends it orderly, SIGHUP reads its configuration again.
Needs: the program `nats-server` in PATH, next to the interpreter, or named.
"""

import os
import shutil
import signal
import subprocess
import sys

from handlers.errors import HostFault


class ServerProcess:
    """One running nats-server, a child of this process.

    Args:
        config: path of its configuration file.
        log: path of the file that gets its output.
        program: path of nats-server; empty means to look for it.

    Raises:
        HostFault: no such program, or it could not be started.
    """

    def __init__(self, config: str, log: str, *, program: str = "") -> None:
        self._config, self._log = config, log
        self._program = program or find_program()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it may not listen yet. Started already is success.

        Call it from a thread that lives as long as the server is to live.
        """
        if self._process is not None and self._process.poll() is None:
            return
        if not os.access(self._program, os.X_OK):
            raise HostFault(f"{self._program}: no such program")
        with open(self._log, "ab") as log:
            try:
                self._process = subprocess.Popen(  # noqa: S603 (a fixed argument list, no shell)
                    [*_bound_to_parent(), self._program, "-c", self._config],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                raise HostFault(f"{self._program}: {error.strerror}") from error

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def pid(self) -> int:
        """Of the running server. Raises HostFault if it is not running."""
        if self._process is None or self._process.poll() is not None:
            raise HostFault("the embedded nats-server is not running")
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """E.g. SIGHUP, SIGSTOP, SIGCONT. Raises HostFault if it is not running."""
        os.kill(self.pid(), number)

    def stop(self, timeout_s: float = 10.0) -> None:
        """End it orderly, or else by force; blocks until it is gone. Gone already is success."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """As a power cut would end it."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


def _bound_to_parent() -> list[str]:
    """A prefix that lets the server end with the thread that started it, even by kill -9.

    Source: setpriv(1), PR_SET_PDEATHSIG(2const). Without util-linux it outlives a killed parent.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []


def find_program() -> str:
    """The path of nats-server: next to the interpreter, else in PATH.

    Raises:
        HostFault: it is in neither.
    """
    beside = os.path.join(os.path.dirname(sys.executable), "nats-server")
    found = beside if os.access(beside, os.X_OK) else shutil.which("nats-server")
    if found is None:
        raise HostFault("nats-server is neither next to the interpreter nor in PATH: install it")
    return found
