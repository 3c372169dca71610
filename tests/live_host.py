"""A whole host for tests: nats-server, a worker process, real jailer and Firecracker, a client.

Each `LiveHost` has a network namespace of its own (the test process is in it meanwhile, children
inherit it), all its files in one directory, and a cgroup tree of its own; `close` removes all.
"""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import nats.js.errors

from handlers.host import inventory
from handlers.host.jail.layout import JailLayout
from handlers.host.vmm.cgroups import find_mount
from handlers.jail_names import VSOCK_SOCKET
from schemas import codec
from schemas.envelopes import Command
from schemas.requests import (
    InstanceRef,
    Ping,
    Request,
    SetupNetwork,
    TeardownNetwork,
    TenantNet,
)
from schemas.settings import (
    HostSettings,
    LimitSettings,
    MetricsSettings,
    NatsSettings,
    NetworkSettings,
    PathSettings,
    Settings,
    VmmSettings,
)
from schemas.subjects import Lane, Subjects
from tests.constants import REF
from tests.guests.agent import ask, ask_until_answered
from tests.guests.cache import BUILD
from tests.guests.firecracker import FIRECRACKER, JAILER
from tests.guests.namespace import own_network
from tests.leaks import own_directory
from tests.plain import unpacked
from tests.previous_release import Release
from tests.protocol.sent import SENT_TO, read
from tests.protocol.validators import faults_in
from worker.cli.client import Client, connect
from worker.cli.context import CliError
from worker.cli.seed import Seed, Seeded, write_seed
from worker.demo.cleanup import remove_host
from worker.demo.host import environment_of, provision_cell
from worker.demo.nats_server import EmbeddedNats

NET_ID = 7
RECORDER = "tests.protocol.sent"


class LiveHost:
    """One host; `worker` is its process, started and killed as often as a test likes."""

    def __init__(
        self,
        *,
        guest: str = "mini",
        boot_args: str = "",
        production: bool = False,
        disk_mib: int = 0,
        warm_pool: int = 0,
        versions_dir: str = "",
        version: str = "",
        max_flows: int = NetworkSettings().max_flows,
        metrics: str = "",
        host_id: str = "",
        cell: str = "test",
        bus: NatsSettings | None = None,
        enter: Sequence[str] = (),
        uid_base: int = VmmSettings().uid_base,
        wrapper: str = RECORDER,
        **limits: Any,
    ) -> None:
        """With `disk_mib`, data and state are on a file system of that size and nothing else is.

        With `bus` the host is one of a fleet, whose nats-server is elsewhere; `enter` begins the
        command of its worker, e.g. to have it in a network namespace. `wrapper` is a module that
        runs the worker's. By default it keeps every message that the worker sends; they are held
        against their schemas when the host is closed. That costs the worker time and memory.
        """
        # Not in /tmp: where that is a tmpfs, what a VMM writes there counts as its memory.
        self.directory = tempfile.mkdtemp(prefix="hostd-live-", dir="/var/tmp")
        own_directory(self.directory)
        self.sent = f"{self.directory}/sent"
        self.wrapper = wrapper
        self.guest = guest
        # A production host connects only with a credential.
        users = "authorization { user: live, password: host }" if production else ""
        self.nats = EmbeddedNats(f"{self.directory}/nats", config=users)
        self.host_id, self.cell = host_id or f"test-{os.getpid()}", cell
        self.bus = bus or NatsSettings(
            url=f"nats://{'live:host@' if production else ''}127.0.0.1:{self.nats.port}"
        )
        self.enter, self.uid_base = tuple(enter), uid_base
        self.boot_args = boot_args
        self.warm_pool = warm_pool
        self.versions_dir, self.version = versions_dir, version
        self.max_flows = max_flows
        self.metrics = metrics
        self.production = production
        self.limits = {"disk_reserve_mib": 16 if disk_mib else 256} | limits
        self.worker: asyncio.subprocess.Process | None = None
        self.settings = self._settings()
        if disk_mib:
            self._mount_disk(disk_mib)
        self.subjects = Subjects(self.settings.root, self.settings.host.id, self.settings.host.cell)

    def _settings(self) -> Settings:
        controllers = Path(find_mount(), "cgroup.controllers").read_text(encoding="ascii")
        unique = f"{os.getpid()}-{os.path.basename(self.directory)[-8:].lower()}"
        return Settings(
            host=HostSettings(id=self.host_id, cell=self.cell, production=self.production),
            nats=self.bus,
            paths=PathSettings(
                data=f"{self.directory}/disk/mvm",
                state=f"{self.directory}/disk/state",
                run=f"{self.directory}/run",
            ),
            vmm=VmmSettings(
                firecracker=str(FIRECRACKER),
                jailer=str(JAILER),
                versions_dir=self.versions_dir,
                version=self.version,
                boot_args=self.boot_args,
                warm_pool=self.warm_pool,
                uid_base=self.uid_base,
            ),
            metrics=MetricsSettings(listen=self.metrics),
            network=NetworkSettings(max_flows=self.max_flows),
            limits=LimitSettings(
                enforce="memory" in controllers, cgroup=f"hostd-test-{unique}", **self.limits
            ),
        )

    def _mount_disk(self, size_mib: int) -> None:
        point = f"{self.directory}/disk"
        os.mkdir(point)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "hostd-live", point],
            check=True,
            timeout=10,
        )

    # -- worker --------------------------------------------------------------------------------

    async def start_worker(
        self,
        *,
        ready: bool = True,
        stdout: int | None = None,
        environment: Mapping[str, str | None] | None = None,
        release: Release | None = None,
        module: str = "worker",
    ) -> None:
        """Start it; with `ready` wait until it takes commands.

        Its log is `worker.log`, unless it goes to the descriptor `stdout`. A variable of
        `environment` that is None is not set. With `release` it is a worker of that one, which gets
        the settings that it knows, and its messages are not recorded.
        """
        settings = environment_of(self.settings)
        code: dict[str, str] = {}
        if release is not None:
            settings = {name: text for name, text in settings.items() if name in release.settings}
            code = {"PYTHONPATH": release.code}
        sent_to = {SENT_TO: self.sent}
        wanted = os.environ | settings | code | sent_to | dict(environment or {})
        variables = {name: value for name, value in wanted.items() if value is not None}
        with open(f"{self.directory}/worker.log", "ab") as log:
            self.worker = await asyncio.create_subprocess_exec(
                *self.enter,
                sys.executable,
                *(["-P"] if code else []),  # or it is the one of the working directory
                "-m",
                *([] if code else [self.wrapper]),
                module,
                stdout=log if stdout is None else stdout,
                stderr=log,
                env=variables,
            )
        if ready:
            await self.wait_ready()

    async def wait_ready(self, timeout_s: float = 60) -> None:
        wait_s = 0.02
        async with asyncio.timeout(timeout_s), self.client() as client:
            while True:
                with contextlib.suppress(Exception):
                    answer = await client.ask(self.settings.host.id, "ping")
                    if answer["host_state"] == "ready":
                        return
                assert self.worker is None or self.worker.returncode is None, self.log()
                # Ever less often: in the lab each question costs a good deal of the one CPU.
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 1.3, 0.5)

    async def kill_worker(self) -> None:
        """As kill -9."""
        await self._end_worker(signal.SIGKILL)

    async def stop_worker(self) -> int:
        """Orderly; returns its exit code."""
        return await self._end_worker(signal.SIGTERM)

    async def _end_worker(self, number: signal.Signals) -> int:
        worker, self.worker = self.worker, None
        if worker is None:
            return 0
        if worker.returncode is None:
            worker.send_signal(number)
        async with asyncio.timeout(40):
            return await worker.wait()

    def log(self) -> str:
        return Path(self.directory, "worker.log").read_text(encoding="utf-8")

    # -- commands ------------------------------------------------------------------------------

    def client(self) -> contextlib.AbstractAsyncContextManager[Client]:
        return connect(self.settings)

    async def run(
        self, request: Request, command_id: str | None = None, *, timeout_s: float = 60
    ) -> dict[str, Any]:
        """Send a command and return its reply envelope, as a map."""
        async with self.client() as client:
            return await client.send(
                self.settings.host.id, request, timeout_s=timeout_s, command_id=command_id
            )

    async def run_again(self, request: Request, command_id: str) -> dict[str, Any]:
        """As `run`, past the server's own duplicate window: hostd itself has to tell."""
        command = Command(id=command_id, request=request, reply_to="_INBOX.again")
        async with self.client() as client:
            replies = await client.nats.subscribe("_INBOX.again")
            await client.nats.jetstream().publish(
                self.subjects.command(Lane.of_request(request)), codec.encode_command(command)
            )
            reply: dict[str, Any] = unpacked((await replies.next_msg(timeout=20)).data)
            return reply

    async def publish(
        self, request: Request, command_id: str, *, msg_id: bool = True, **more: Any
    ) -> None:
        """Publish one copy of a command, without waiting for anything but the stream."""
        data = codec.encode_command(Command(id=command_id, request=request, **more))
        await self.publish_raw(
            self.subjects.command(Lane.of_request(request)), data, command_id if msg_id else None
        )

    async def publish_raw(self, subject: str, data: bytes, msg_id: str | None = None) -> None:
        async with self.client() as client:
            headers = {"Nats-Msg-Id": msg_id} if msg_id else None
            await client.nats.jetstream().publish(subject, data, headers=headers)

    async def result(self, command_id: str, *, timeout_s: float = 60) -> dict[str, Any]:
        """The kept reply of a command, once it is done."""
        async with asyncio.timeout(timeout_s), self.client() as client:
            while True:
                answer = await client.ask(self.settings.host.id, "result", {"id": command_id})
                if answer["state"] == "done":
                    reply: dict[str, Any] = answer["reply"]
                    return reply
                await asyncio.sleep(0.02)

    async def describe(self, ref: InstanceRef = REF) -> dict[str, Any]:
        async with self.client() as client:
            return await client.ask(
                self.settings.host.id,
                "describe",
                {
                    "tenant_id": ref.tenant_id,
                    "pool_id": ref.pool_id,
                    "instance_id": ref.instance_id,
                },
            )

    async def wait_status(self, status: str, ref: InstanceRef = REF, timeout_s: float = 30) -> None:
        async with asyncio.timeout(timeout_s):
            while await self._status(ref) != status:
                await asyncio.sleep(0.02)

    async def _status(self, ref: InstanceRef) -> str:
        try:
            return str((await self.describe(ref))["status"])
        except CliError as error:
            if error.code != "not_found":
                raise
            return "absent"

    async def wait_unfinished(self, count: int, timeout_s: float = 30) -> None:
        """Until the worker has so many commands without an outcome."""
        async with asyncio.timeout(timeout_s), self.client() as client:
            while (await client.ask(self.settings.host.id, "status"))["unfinished"] != count:
                await asyncio.sleep(0.02)

    async def kept(self, stream: str) -> list[tuple[str, dict[str, str], bytes]]:
        """All messages that are in a stream of `subjects`: subject, headers, data."""
        async with self.client() as client:
            context = client.nats.jetstream()
            state = (await context.stream_info(stream)).state
            found: list[tuple[str, dict[str, str], bytes]] = []
            if not state.messages:
                return found
            for seq in range(state.first_seq, state.last_seq + 1):
                try:
                    message = await context.get_msg(stream, seq)
                except nats.js.errors.NotFoundError:
                    continue  # done and gone, as a work queue does it
                headers = cast("dict[str, str]", message.headers or {})
                found.append((message.subject or "", headers, message.data or b""))
            return found

    async def replies(self, command_id: str) -> list[dict[str, Any]]:
        """What the reply stream keeps for one id."""
        kept = [unpacked(data) for _, _, data in await self.kept(self.subjects.replies_stream)]
        return [reply for reply in kept if reply["id"] == command_id]

    # -- what is there -------------------------------------------------------------------------

    def seed(self, ref: InstanceRef = REF, *, net_id: int = NET_ID, **more: Any) -> Seeded:
        directory = f"{BUILD}/guests/{self.guest}"
        names = ("vmlinux", "rootfs.ext4", "initrd")
        artifacts = {n: f"{directory}/{n}" for n in names if os.path.exists(f"{directory}/{n}")}
        options: dict[str, Any] = {"mem_mib": 128, "data_disk_mib": 16} | more
        return write_seed(
            self.settings.paths.data, Seed(ref=ref, net_id=net_id, artifacts=artifacts, **options)
        )

    async def net_up(self, seeded: Seeded, tenant_id: str = REF.tenant_id) -> dict[str, Any]:
        return await self.run(SetupNetwork(tenant_id, seeded.net))

    async def net_down(self, net: TenantNet, tenant_id: str = REF.tenant_id) -> dict[str, Any]:
        return await self.run(TeardownNetwork(tenant_id, net))

    async def inventory(self) -> dict[str, int]:
        return (await asyncio.to_thread(inventory.collect, self.settings)).counts

    async def jail_root(self, ref: InstanceRef = REF) -> str:
        return JailLayout(self.settings.jail_base).root((await self.describe(ref))["jail_id"])

    async def ask_guest(self, request: object, ref: InstanceRef = REF) -> Any:
        """The running guest's own answer on its agent port, asked until it answers."""
        return await self.ask_jail(await self.jail_root(ref), request)

    async def ask_jail(self, root: str, request: object) -> Any:
        """The same by the jail's root, which needs no worker."""
        uds = Path(root, VSOCK_SOCKET)
        return await asyncio.to_thread(ask_until_answered, uds, request, within_s=20)

    async def crash_guest(self, ref: InstanceRef = REF) -> None:
        """Have the guest fault thrice; its VMM ends. Raises OSError, as nobody answers."""
        uds = Path(await self.jail_root(ref), VSOCK_SOCKET)
        await asyncio.to_thread(ask, uds, "Crash")

    async def stat(self, ref: InstanceRef = REF) -> dict[str, Any]:
        """`Stat` of the test guests: counter, boots, boot_id, ..."""
        stat: dict[str, Any] = (await self.ask_guest("Stat", ref))["Stat"]
        return stat

    def vm_pids(self) -> list[int]:
        """Every process in this host's cgroup tree, by the kernel alone."""
        top = Path(find_mount(), self.settings.limits.cgroup)
        files = top.glob("**/cgroup.procs")
        return [int(pid) for file in files for pid in file.read_text(encoding="ascii").split()]

    def jailer_runs(self) -> int:
        """How often the jailer was executed, ever."""
        path = Path(self.settings.paths.state, "launches.log")
        return len(path.read_text(encoding="ascii").splitlines()) if path.exists() else 0

    async def ping(self) -> dict[str, Any]:
        return await self.run(Ping(), timeout_s=10)

    # -- life ----------------------------------------------------------------------------------

    async def close(self) -> None:
        await self.kill_worker()
        await self.nats.stop()
        wrong = await asyncio.to_thread(lambda: faults_in(read(self.sent)))
        left = await asyncio.to_thread(remove_host, self.settings, self.directory)
        assert not left, left
        assert not wrong, wrong


@contextlib.asynccontextmanager
async def live_host(*, worker: bool = True, **options: Any) -> AsyncGenerator[LiveHost]:
    """A provisioned host in a network namespace of its own, with its worker ready."""
    with own_network():
        host = LiveHost(**options)
        try:
            await host.nats.start()
            await provision_cell(host.settings, host.subjects)
            if worker:
                await host.start_worker()
            yield host
        except BaseException:
            with contextlib.suppress(OSError):
                print(host.log()[-6000:])
            raise
        finally:
            await host.close()
