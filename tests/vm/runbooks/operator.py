"""An operator at a host's shell, who types what a page says.

The host's directories are elsewhere than a page says, so that paths of the default settings are
replaced. There is no systemd in a test: `systemctl` does to the worker and to nats-server what it
would (stop by SIGTERM, reload by SIGHUP, wait until started), and `journalctl -u hostd -o cat`
prints the worker's log.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Final

from handlers.host.vmm.cgroups import find_mount
from tests.console import Command, commands
from tests.crash.kills import until
from tests.live_host import LiveHost
from tests.shell import COMMAND_S, Shell, shell
from worker.demo.host import environment_of

LISTEN: Final = "127.0.0.1:9464"  # free in the host's own network namespace
CONFIG: Final = "/etc/hostd/hostd.toml"
UNTIL_S: Final = 60.0
AGAIN_S: Final = 0.1
SYSTEMCTL: Final = re.compile(
    r"systemctl (start|stop|restart|reload|is-active) (hostd|nats-server)"
)
JOURNALCTL: Final = """#!/bin/sh
[ "$*" = "-u hostd -o cat" ] || {{ echo "not played in a test: journalctl $*"; exit 64; }}
exec cat {log}
"""


class Operator:
    """One shell, and the service manager: see `operator_of`."""

    def __init__(
        self,
        host: LiveHost,
        worker: Mapping[str, str | None],
        words: Mapping[str, str],
        module: str,
    ) -> None:
        self._host = host
        self._module = module
        settings = Path(host.directory, "hostd.toml")
        settings.touch()
        self._worker = {"HOSTD_METRICS_LISTEN": LISTEN, "HOSTD_CONFIG": str(settings), **worker}
        self._words = {**_paths(host), **words}
        self._exits = contextlib.AsyncExitStack()
        self._shell: Shell | None = None

    async def start_worker(self, *, ready: bool = True) -> None:
        await self._host.start_worker(ready=ready, environment=self._worker, module=self._module)

    async def follow(self, page: Path) -> None:
        """Type all commands of a page.

        Raises:
            AssertionError: one does not print what the page says, with its line in the page.
        """
        typed = commands(page)
        assert typed, f"{page} has no commands"
        for command in typed:
            await self._follow(command)

    async def copy(self, text: str) -> list[str]:
        """Type each line of a block, without its comment; what each printed.

        Raises:
            AssertionError: one failed.
        """
        printed: list[str] = []
        for line in self.here(text).splitlines():
            code, output = await self.type(re.sub(r" +#.*", "", line))
            assert code == 0, f"{line}\n{output}"
            printed.append(output)
        return printed

    async def _follow(self, command: Command) -> None:
        end = time.monotonic() + UNTIL_S
        wanted = Command(
            command.block,
            self.here(command.text),
            tuple(self.here(line) for line in command.expected),
            command.code,
        )
        while True:
            code, output = await self.type(wanted.text)
            if wanted.matches(code, output):
                return
            told = (
                f"{command.block.page.name}:{command.block.line}: {command.text}\n"
                f"-- printed\n{output}-- with exit code {code}; the page says\n"
                + "\n".join([*wanted.expected, f"-- with exit code {wanted.code}"])
            )
            assert wanted.repeated, told
            assert time.monotonic() < end, told
            await asyncio.sleep(AGAIN_S)

    def here(self, text: str) -> str:
        """The text with this host's paths and words, the longest first; none is looked up twice."""
        there = "|".join(re.escape(word) for word in sorted(self._words, key=len, reverse=True))
        return re.sub(there, lambda found: self._words[found[0]], text)

    async def type(self, text: str) -> tuple[int, str]:
        """Run it in the shell; its exit code and all it printed."""
        if found := SYSTEMCTL.fullmatch(text):
            return await self._systemctl(found[1], found[2])
        assert self._shell is not None
        return await self._shell.type(text)

    async def _systemctl(self, verb: str, unit: str) -> tuple[int, str]:
        if unit == "nats-server":
            if verb == "reload":
                self._host.nats.reload()
            else:
                await self._host.nats.start()
        elif verb == "is-active":
            alive = self._host.worker is not None and self._host.worker.returncode is None
            return (0, "active\n") if alive else (3, "inactive\n")
        elif verb == "reload":
            assert self._host.worker is not None
            reloads = self._reloads()
            self._host.worker.send_signal(signal.SIGHUP)
            await until(lambda: self._reloads() > reloads, "the reload")
        else:
            if verb != "start":
                await self._host.stop_worker()
            if verb != "stop":
                await self.start_worker(ready=False)
                await self._answering()
        return 0, ""

    def _reloads(self) -> int:
        log = self._host.log()
        return sum(log.count(f'"settings.{end}"') for end in ("reloaded", "reload_failed"))

    async def _answering(self) -> None:
        """As systemd's start with Type=notify: until the worker's recovery is complete."""
        recovered = '"recovered": true'
        async with asyncio.timeout(COMMAND_S):
            while recovered not in (await self.type(f"curl -s http://{LISTEN}/readyz"))[1]:
                await asyncio.sleep(AGAIN_S)

    async def __aenter__(self) -> "Operator":
        programs = Path(self._host.directory, "programs")
        programs.mkdir()
        journalctl = programs / "journalctl"
        journalctl.write_text(JOURNALCTL.format(log=f"{self._host.directory}/worker.log"))
        journalctl.chmod(0o755)
        settings = environment_of(self._host.settings)
        path = f"{programs}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        variables = {**os.environ, **settings, **self._worker, "PATH": path}
        named = {name: value for name, value in variables.items() if value is not None}
        self._shell = await self._exits.enter_async_context(shell(named))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()


def _paths(host: LiveHost) -> dict[str, str]:
    """Where the default paths of a page are on this host."""
    paths = host.settings.paths
    return {
        "/var/lib/hostd": paths.state,
        "/var/lib/mvm": paths.data,
        "/run/hostd": paths.run,
        CONFIG: f"{host.directory}/hostd.toml",
        "/etc/nats-server.conf": host.nats.config_file,
        "/root/": f"{host.directory}/",
        "/sys/fs/cgroup/hostd": f"{find_mount()}/{host.settings.limits.cgroup}",
    }


@contextlib.asynccontextmanager
async def operator_of(
    host: LiveHost,
    worker: Mapping[str, str | None] | None = None,
    words: Mapping[str, str] | None = None,
    *,
    module: str = "worker",
) -> AsyncGenerator[Operator]:
    """A shell on the host. `worker`: variables of each worker, beside the host's settings; `words`:
    what else a page calls by another name; `module`: what is executed as the worker."""
    async with Operator(host, worker or {}, words or {}, module) as made:
        yield made
