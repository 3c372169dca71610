"""A private nats-server with JetStream on the loopback interface, for the demo and the tests.

Source: nats-server(8): SIGTERM stops it in order, SIGHUP reloads its configuration.
Needs: `nats-server` next to the Python interpreter or in PATH.
"""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

from handlers.errors import HostFault

# The streams reserve their sizes against this bound, whatever space there is: the default, three
# quarters of the free space, would refuse them on a small disk.
STORE = "16GB"
CONFIG = """\
listen: "{address}:{port}"
server_name: hostd-embedded
jetstream {{ store_dir: "{directory}/jetstream", max_file_store: {store} }}
{config}
"""
# Without TLS, so on loopback only; a page of any origin may connect.
WEBSOCKET = 'websocket {{ listen: "127.0.0.1:{port}", no_tls: true, same_origin: false }}\n'


class EmbeddedNats:
    """One nats-server.

    Args:
        directory: configuration, log and JetStream store; created if missing. Streams persist there
            across restarts.
        port: 0 allocates a free port, kept across restarts.
        program: path of nats-server; empty means `find_program()`.
        config: additional configuration, e.g. an `authorization` block.
        address: where it listens.
        web: also for browsers, by WebSocket on 127.0.0.1; `web_url` says where.
    """

    def __init__(
        self,
        directory: str,
        *,
        port: int = 0,
        program: str = "",
        config: str = "",
        address: str = "127.0.0.1",
        web: bool = False,
    ) -> None:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self.directory = directory
        self.port = port or _free_port()
        self.address, self.web_port = address, _free_port() if web else 0
        self.config_file = os.path.join(directory, "nats.conf")
        self.log = os.path.join(directory, "nats.log")
        self.process = ServerProcess(self.config_file, self.log, program=program)
        self.configure(config)

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def web_url(self) -> str:
        return f"ws://127.0.0.1:{self.web_port}"

    def configure(self, config: str) -> None:
        """Write the configuration. A running server reads it on `reload`."""
        web = WEBSOCKET.format(port=self.web_port) if self.web_port else ""
        text = CONFIG.format(
            address=self.address,
            store=STORE,
            port=self.port,
            directory=self.directory,
            config=web + config,
        )
        with open(self.config_file, "w", encoding="utf-8") as file:
            file.write(text)

    async def start(self, timeout_s: float = 15.0) -> str:
        """Start the server; return its URL once it accepts connections and JetStream is up.

        Raises:
            HostFault: the program is missing, or it exited, or was not ready within `timeout_s`;
                the message names the log file.
        """
        self.process.start()
        end = time.monotonic() + timeout_s
        while not await self._answers():
            if not self.process.running() or time.monotonic() > end:
                await self.stop()
                raise HostFault(
                    f"nats-server exited or was not ready in {timeout_s:g} s: see {self.log}"
                )
            await asyncio.sleep(0.02)
        return self.url

    async def stop(self) -> None:
        """Stop the server in order. Idempotent."""
        await asyncio.to_thread(self.process.stop)

    def reload(self) -> None:
        """Make the running server read its configuration again."""
        self.process.signal(signal.SIGHUP)

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        try:
            return b'"jetstream":true' in await asyncio.wait_for(reader.readline(), 5)
        except (OSError, TimeoutError):
            return False
        finally:
            writer.transport.abort()


class ServerProcess:
    """The nats-server child process.

    Args:
        config: path of its configuration file.
        log: path of the file that receives its stdout and stderr.
        program: path of nats-server; empty means `find_program()`.

    Raises:
        HostFault: the program was not found, or could not be executed.
    """

    def __init__(self, config: str, log: str, *, program: str = "") -> None:
        self._config, self._log = config, log
        self._program = program or find_program()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; it may not accept connections yet. Idempotent.

        The server is sent SIGTERM when the calling thread exits (`_parent_death_prefix`).
        """
        if self._process is not None and self._process.poll() is None:
            return
        if not os.access(self._program, os.X_OK):
            raise HostFault(f"{self._program}: not found or not executable")
        with open(self._log, "ab") as log:
            try:
                self._process = subprocess.Popen(  # noqa: S603 (fixed argument list, no shell)
                    [*_parent_death_prefix(), self._program, "-c", self._config],
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
        """The pid of the running server. Raises HostFault if it is not running."""
        if self._process is None or self._process.poll() is not None:
            raise HostFault("nats-server is not running")
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, e.g. SIGHUP, SIGSTOP, SIGCONT. Raises HostFault if it is not running."""
        os.kill(self.pid(), number)

    def stop(self, timeout_s: float = 10.0) -> None:
        """SIGTERM, then SIGKILL after `timeout_s`. Blocks until it has exited. Idempotent."""
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
        """SIGKILL: what a power failure looks like to its clients and its store."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


def _parent_death_prefix() -> list[str]:
    """A command prefix that ends the server when the thread that started it exits.

    Also after `kill -9` of the parent. Without setpriv (util-linux) the server outlives it.
    Source: setpriv(1), PR_SET_PDEATHSIG(2const).
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []


def find_program() -> str:
    """The path of nats-server: next to the interpreter, else from PATH.

    Raises:
        HostFault: not found in either.
    """
    beside = os.path.join(os.path.dirname(sys.executable), "nats-server")
    program = beside if os.access(beside, os.X_OK) else shutil.which("nats-server")
    if program is None:
        raise HostFault(f"nats-server not found next to {sys.executable} or in PATH: install it")
    return program


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
