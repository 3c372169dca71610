"""`hostd demo`: the life of one instance end to end, with a real Firecracker and a Linux guest.

Starts a private nats-server and worker in a new network namespace, drives one instance through its
life cycle over the bus, and compares hostd's resources before and after. Leaves nothing behind,
also when interrupted. Where this machine's KVM cannot run Linux, it runs in the lab.
"""

import asyncio
import os
import signal
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

import click
import msgspec

from handlers.host import inventory
from handlers.host.jail.layout import JailLayout
from schemas import naming
from schemas.requests import (
    DestroyInstance,
    InstanceRef,
    Request,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    StopInstance,
    TeardownNetwork,
    WakeInstance,
)
from schemas.settings import Settings
from schemas.subjects import Subjects
from worker import logs
from worker.cli.client import Client, connect
from worker.cli.context import CliError, json_option
from worker.cli.seed import Seed, write_seed
from worker.demo.guest import echo_through_tap, read_stat
from worker.demo.host import (
    clean_up,
    demo_settings,
    provision_cell,
    wait_ready,
    worker_process,
)
from worker.demo.nats_server import EmbeddedNats
from worker.demo.netns import enter_new_network
from worker.demo.page import PagePorts, page_served
from worker.demo.progress import DemoFailed, Progress

REF = InstanceRef("acme", "web", "i-1")
NAMES = (REF.tenant_id, REF.pool_id, REF.instance_id)
NET_ID = 7
MEM_MIB = 128
DISK = "/var/tmp"  # noqa: S108 (used only with mkdtemp)
ASLEEP_S = 2.0
REPLY_TIMEOUT_S = 120.0


def linux_runs_here() -> bool:
    """Whether this machine's KVM can run a Linux guest; a paravirtual KVM cannot."""
    vendors = ("kvm_intel", "kvm_amd")
    return os.path.exists("/dev/kvm") and any(os.path.isdir(f"/sys/module/{m}") for m in vendors)


@click.command()
@click.option(
    "--build", default="build", show_default=True, help="Build directory of `make setup`."
)
@click.option("--here", is_flag=True, help="Run on this machine, never in the lab.")
@click.option(
    "--guest",
    type=click.Choice(["linux", "mini"]),
    default="linux",
    show_default=True,
    help="Guest image.",
)
@click.option("--page", is_flag=True, help="Serve the fleet page and go on until Ctrl-C.")
@json_option
def demo(*, build: str, here: bool, guest: str, page: bool, as_json: bool) -> None:
    """Run one microVM through its life cycle. Leaves nothing behind.

    Uses a real Firecracker, a private nats-server and worker, and a new network namespace. Requires
    root and the guests that `make setup` builds. With --page it goes on until Ctrl-C, to be watched
    in a browser; with the mini guest where this machine's KVM cannot run Linux.
    """
    logs.configure("error", stream="stderr")
    if os.geteuid() != 0:
        raise CliError(
            "host_fault",
            "cannot run the demo as an ordinary user: it creates interfaces, cgroups and jails; "
            "run it as root",
        )
    if page and not linux_runs_here():
        guest = "mini"
    if guest == "linux" and not here and not linux_runs_here():
        hand_over_to_lab(os.path.dirname(os.path.abspath(build)), as_json=as_json)
    ports = PagePorts() if page else None
    enter_new_network()
    progress = Progress(lambda text, ends: click.echo(text, nl=ends, err=as_json))
    where = "in the lab" if os.environ.get("HOSTD_LAB") else "on this machine's KVM"
    progress.line(f"hostd demo, {where}, guest: {guest}")
    try:
        asyncio.run(run(progress, os.path.abspath(build), guest, ports))
    except (DemoFailed, CliError) as error:
        raise click.ClickException(str(error)) from error
    except asyncio.CancelledError:
        click.echo("interrupted; cleaned up", err=True)
        sys.exit(128 + (progress.stopped_by or signal.SIGTERM))
    total_s = progress.total_s()
    if as_json:
        rows = [
            {"what": what, "ms": None if seconds is None else round(seconds * 1000, 1), "facts": f}
            for what, seconds, f in progress.rows
        ]
        summary = {"where": where, "guest": guest, "total_s": round(total_s, 1), "steps": rows}
        click.echo(msgspec.json.encode(summary))
    else:
        progress.line(f"Demo passed {where}: {len(progress.rows)} steps, {total_s:.1f} s.")


def hand_over_to_lab(checkout: str, *, as_json: bool) -> NoReturn:
    """Replace this process by the one that runs the demo in the lab."""
    if not os.path.exists(os.path.join(checkout, "tests", "lab", "run.py")):
        raise click.ClickException(
            "this machine's KVM cannot run Linux guests, and the lab requires a source checkout: "
            "run `make demo` in one, or `hostd demo --guest mini` here"
        )
    click.echo("This machine's KVM cannot run a Linux guest; running in the lab.", err=True)
    command = ["hostd", "demo", "--here", *(["--json"] if as_json else [])]
    sys.stdout.flush()
    os.chdir(checkout)
    os.execv(sys.executable, [sys.executable, "-m", "tests.lab.run", "--", *command])  # noqa: S606


async def run(progress: Progress, build: str, guest: str, ports: PagePorts | None = None) -> None:
    """The whole demo, with `ports` again and again; DemoFailed on an unexpected observation."""
    task = asyncio.current_task()

    def stop(number: int) -> None:
        progress.stop(number)
        if task is not None:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    async with AsyncExitStack() as stack:
        # Not /tmp: on a tmpfs, pages that a VMM writes are charged to its memory cgroup.
        directory = tempfile.mkdtemp(prefix="hostd-demo-", dir=os.environ.get("TMPDIR", DISK))
        nats = EmbeddedNats(f"{directory}/nats", web=ports is not None)
        settings = demo_settings(directory, nats.url, build)
        stack.push_async_callback(clean_up, settings, directory)
        await nats.start()
        stack.push_async_callback(nats.stop)
        subjects = Subjects(settings.root, settings.host.id, settings.host.cell)
        await provision_cell(settings, subjects)
        before = (await asyncio.to_thread(inventory.collect, settings)).counts
        with progress.step("worker ready") as facts:
            await stack.enter_async_context(worker_process(settings, directory))
            client = await stack.enter_async_context(connect(settings))
            facts.extend(await wait_ready(client, settings))
        if ports is not None:
            files, cell = f"{build}/dashboard", settings.host.cell
            await stack.enter_async_context(page_served(ports, files, cell, nats.web_port))
            progress.line(f"The fleet page: {ports.url} (until Ctrl-C)")
        await life(Driver(client, settings, progress), build, guest)
        while ports is not None:
            await asyncio.sleep(ASLEEP_S)
            await life(Driver(client, settings, progress), build, guest)
        after = (await asyncio.to_thread(inventory.collect, settings)).counts
        if after != before:
            raise DemoFailed(f"resources left behind: before {before}, after {after}")
        progress.note("inventory", f"unchanged: {sum(after.values())} resources before and after")
    if os.path.exists(directory):
        raise DemoFailed(f"{directory} was not removed")


@dataclass
class Driver:
    """Sends commands as agentd does and reports each result."""

    client: Client
    settings: Settings
    progress: Progress

    async def send(self, what: str, request: Request, *details: str) -> dict[str, Any]:
        """Send a command; print these keys of its detail.

        Raises:
            DemoFailed: the code is not `ok`, or something was left behind.
        """
        with self.progress.step(what) as facts:
            host_id = self.settings.host.id
            reply = await self.client.send(host_id, request, timeout_s=REPLY_TIMEOUT_S)
            if reply["code"] != "ok":
                raise DemoFailed(f"{what}: {reply['code']}: {reply['response']}")
            if reply["left_behind"]:
                raise DemoFailed(f"{what}: left behind {reply['left_behind']}")
            facts.append(str(reply["status"] or reply["code"]))
            facts += [detail_text(name, reply["detail"][name]) for name in details]
        return reply

    async def stat(self, launch: int) -> dict[str, Any]:
        jail_id = naming.jail_id(REF, launch)
        return await read_stat(JailLayout(self.settings.jail_base).root(jail_id))

    async def echo(self, what: str, address: str) -> None:
        with self.progress.step(what) as facts:
            await echo_through_tap(address, b"hello from the host")
            facts.append(f"TCP echo from {address}")

    async def owned(self) -> None:
        """Print hostd's resources on this host, by kind."""
        counts = (await asyncio.to_thread(inventory.collect, self.settings)).counts
        owned = ", ".join(f"{kind} {count}" for kind, count in counts.items() if count)
        self.progress.note("hostd owns", owned or "nothing")


def detail_text(name: str, value: Any) -> str:
    """One entry of a reply's detail as text."""
    if name == "size_bytes":
        return f"{value / (1 << 20):.0f} MiB on disk"
    return f"{name} {value}"


async def life(driver: Driver, build: str, guest: str) -> None:
    """Network up, start, traffic, sleep, wake, stop, destroy, network down."""
    seeded = write_seed(driver.settings.paths.data, seed_of(build, guest))
    driver.progress.note(
        "seed", f"instance {REF}, 1 vCPU, {MEM_MIB} MiB (files as agentd writes them)"
    )
    await driver.send("network up", SetupNetwork(REF.tenant_id, seeded.net))
    reply = await driver.send("start", StartInstance(*NAMES), "pid", "tap")
    await driver.echo("traffic", seeded.guest_ip)
    awake = await driver.stat(reply["detail"]["launch"])
    await driver.owned()
    await driver.send("sleep", SleepInstance(*NAMES, force=False), "drain", "size_bytes")
    with driver.progress.step("asleep") as facts:
        facts.append("no VMM, no TAP; the snapshot is on disk")
        await asyncio.sleep(ASLEEP_S)
    reply = await driver.send("wake", WakeInstance(*NAMES), "pid")
    woken = await driver.stat(reply["detail"]["launch"])
    driver.progress.note("guest state", check_resumed(awake, woken, reply))
    await driver.echo("traffic after wake", seeded.guest_ip)
    await driver.send("stop", StopInstance(*NAMES), "method")
    await driver.send("destroy", DestroyInstance(*NAMES, wipe_volumes=True), "volumes")
    await driver.send("network down", TeardownNetwork(REF.tenant_id, seeded.net))


def check_resumed(awake: dict[str, Any], woken: dict[str, Any], reply: dict[str, Any]) -> str:
    """Check that the guest was resumed, not booted, and its clock is right; return the facts.

    Raises:
        DemoFailed: boot id, counter or clock is not that of a resumed guest.
    """
    if woken["boot_id"] != awake["boot_id"]:
        raise DemoFailed("boot id changed: the guest was booted, not resumed from its snapshot")
    if woken["counter"] <= awake["counter"]:
        raise DemoFailed(f"counter {woken['counter']} after wake, {awake['counter']} before sleep")
    if faults := {k: v for k, v in reply["detail"].items() if k.endswith("_failed")}:
        raise DemoFailed(f"guest agent wake notification failed: {faults}")
    facts = f"counter {awake['counter']} -> {woken['counter']}, same boot id"
    if "unix_nanos" in woken:
        off_s = abs(woken["unix_nanos"] / 1e9 - time.time())
        if off_s > 1:
            raise DemoFailed(f"guest clock is off by {off_s:.1f} s after wake: {reply['detail']}")
        facts += f", clock within {off_s * 1000:.0f} ms"
        facts += f" (was {reply['detail']['clock_was_off_s']:+.3f} s off)"
    return facts


def seed_of(build: str, guest: str) -> Seed:
    directory = f"{build}/guests/{guest}"
    names = ("vmlinux", "rootfs.ext4", "initrd")
    artifacts = {n: f"{directory}/{n}" for n in names if os.path.exists(f"{directory}/{n}")}
    if "vmlinux" not in artifacts:
        raise DemoFailed(f"no guest image in {directory}: run `make setup`")
    return Seed(
        ref=REF,
        net_id=NET_ID,
        artifacts=artifacts,
        mem_mib=MEM_MIB,
        data_disk_mib=16,
        offset=5,
        secrets=b'{"token": "for the demo"}',
    )
