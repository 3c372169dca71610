"""`hostd demo`: the main job end to end, with a real Firecracker and a Linux guest.

It starts a nats-server and a worker of its own in a network namespace of its own, drives one
instance through its whole life over the bus, and compares what hostd owns before and after. It
leaves nothing behind, also when it is interrupted. Where this machine's KVM cannot run Linux, it
runs in the lab.
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
    demo_settings,
    first_ping,
    leave_nothing,
    provision_cell,
    worker_process,
)
from worker.demo.nats_server import EmbeddedNats
from worker.demo.netns import enter_new_network
from worker.demo.progress import DemoFailed, Story

REF = InstanceRef("acme", "web", "i-1")
NAMES = (REF.tenant_id, REF.pool_id, REF.instance_id)
NET_ID = 7
MEM_MIB = 128
DISK = "/var/tmp"  # noqa: S108 (only ever with mkdtemp)
ASLEEP_S = 2.0
REPLY_TIMEOUT_S = 120.0


def linux_runs_here() -> bool:
    """Whether this machine's KVM can run a Linux guest; a paravirtual one cannot."""
    vendors = ("kvm_intel", "kvm_amd")
    return os.path.exists("/dev/kvm") and any(os.path.isdir(f"/sys/module/{m}") for m in vendors)


@click.command()
@click.option("--build", default="build", show_default=True, help="Where `make setup` builds.")
@click.option("--here", is_flag=True, help="Never hand over to the lab.")
@click.option("--guest", type=click.Choice(["linux", "mini"]), default="linux", show_default=True)
@json_option
def demo(*, build: str, here: bool, guest: str, as_json: bool) -> None:
    """The main job end to end, with a real Firecracker and a real guest; leaves nothing behind."""
    logs.configure("error", stream="stderr")
    if guest == "linux" and not here and not linux_runs_here():
        hand_over_to_lab(os.path.dirname(os.path.abspath(build)), as_json=as_json)
    if os.geteuid() != 0:
        raise click.ClickException("the demo makes links, cgroups and jails: run it as root")
    enter_new_network()
    story = Story(lambda text, ends: click.echo(text, nl=ends, err=as_json))
    where = "in the lab" if os.environ.get("HOSTD_LAB") else "on this machine's KVM"
    story.line(f"hostd demo, {where}, guest: {guest}")
    try:
        asyncio.run(run(story, os.path.abspath(build), guest))
    except (DemoFailed, CliError) as error:
        raise click.ClickException(str(error)) from error
    except asyncio.CancelledError:
        click.echo("interrupted; nothing is left behind", err=True)
        sys.exit(128 + (story.stopped_by or signal.SIGTERM))
    total_s = story.total_s()
    if as_json:
        rows = [
            {"what": what, "ms": None if seconds is None else round(seconds * 1000, 1), "facts": f}
            for what, seconds, f in story.rows
        ]
        summary = {"where": where, "guest": guest, "total_s": round(total_s, 1), "steps": rows}
        click.echo(msgspec.json.encode(summary))
    else:
        story.line(f"All of it worked, {where}: {len(story.rows)} steps, {total_s:.1f} s.")


def hand_over_to_lab(checkout: str, *, as_json: bool) -> NoReturn:
    """Become the process that runs this demo in the lab."""
    if not os.path.exists(os.path.join(checkout, "tests", "lab", "run.py")):
        raise click.ClickException(
            "this machine's KVM cannot run Linux, and the lab is part of a source checkout: "
            "run `make demo` there, or `hostd demo --guest mini` here"
        )
    click.echo("This machine's KVM cannot run a Linux guest: the demo runs in the lab.", err=True)
    command = ["hostd", "demo", "--here", *(["--json"] if as_json else [])]
    sys.stdout.flush()
    os.chdir(checkout)
    os.execv(sys.executable, [sys.executable, "-m", "tests.lab.run", "--", *command])  # noqa: S606


async def run(story: Story, build: str, guest: str) -> None:
    """The whole story; raises DemoFailed where it does not go as promised."""
    task = asyncio.current_task()

    def stop(number: int) -> None:
        story.stop(number)
        if task is not None:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    async with AsyncExitStack() as stack:
        # Not /tmp: where that is a tmpfs, what a VMM writes there counts as its memory.
        directory = tempfile.mkdtemp(prefix="hostd-demo-", dir=os.environ.get("TMPDIR", DISK))
        nats = EmbeddedNats(f"{directory}/nats")
        settings = demo_settings(directory, nats.url, build)
        stack.push_async_callback(leave_nothing, settings, directory)
        await nats.start()
        stack.push_async_callback(nats.stop)
        subjects = Subjects(settings.root, settings.host.id, settings.host.cell)
        await provision_cell(settings, subjects)
        before = (await asyncio.to_thread(inventory.collect, settings)).counts
        with story.step("worker ready") as facts:
            await stack.enter_async_context(worker_process(settings, directory))
            client = await stack.enter_async_context(connect(settings))
            facts.extend(await first_ping(client, settings))
        await life(Driver(client, settings, story), build, guest)
        after = (await asyncio.to_thread(inventory.collect, settings)).counts
        if after != before:
            raise DemoFailed(f"left behind: before {before}, after {after}")
        story.tell("inventory", f"the same before and after: {sum(after.values())} things owned")
    if os.path.exists(directory):
        raise DemoFailed(f"{directory} is still there")


@dataclass
class Driver:
    """Sends commands as agentd would and tells what came of each."""

    client: Client
    settings: Settings
    story: Story

    async def send(self, what: str, request: Request, *details: str) -> dict[str, Any]:
        """Raises DemoFailed unless it is `ok` with nothing left behind; tells these details."""
        with self.story.step(what) as facts:
            host_id = self.settings.host.id
            reply = await self.client.send(host_id, request, timeout_s=REPLY_TIMEOUT_S)
            if reply["code"] != "ok":
                raise DemoFailed(f"{what}: {reply['code']}: {reply['response']}")
            if reply["left_behind"]:
                raise DemoFailed(f"{what}: left behind {reply['left_behind']}")
            facts.append(str(reply["status"] or reply["code"]))
            facts += [told(name, reply["detail"][name]) for name in details]
        return reply

    async def stat(self, launch: int) -> dict[str, Any]:
        jail_id = naming.jail_id(REF, launch)
        return await read_stat(JailLayout(self.settings.jail_base).root(jail_id))

    async def echo(self, what: str, address: str) -> None:
        with self.story.step(what) as facts:
            await echo_through_tap(address, b"hello from the host")
            facts.append(f"{address} answered by TCP")

    async def owned(self) -> None:
        """What hostd owns on this host now, by kind."""
        counts = (await asyncio.to_thread(inventory.collect, self.settings)).counts
        there = ", ".join(f"{kind} {count}" for kind, count in counts.items() if count)
        self.story.tell("hostd owns", there or "nothing")


def told(name: str, value: Any) -> str:
    """One entry of a reply's detail, for people."""
    if name == "size_bytes":
        return f"{value / (1 << 20):.0f} MiB on disk"
    return f"{name} {value}"


async def life(driver: Driver, build: str, guest: str) -> None:
    """Network up, start, traffic, sleep, wake, stop, destroy, network down."""
    seeded = write_seed(driver.settings.paths.data, seed_of(build, guest))
    driver.story.tell("seed", f"instance {REF}, 1 vCPU, {MEM_MIB} MiB, as agentd would write it")
    await driver.send("network up", SetupNetwork(REF.tenant_id, seeded.net))
    await driver.send("start", StartInstance(*NAMES), "pid", "tap")
    await driver.echo("traffic", seeded.guest_ip)
    awake = await driver.stat(launch=1)
    await driver.owned()
    await driver.send("sleep", SleepInstance(*NAMES, force=False), "drain", "size_bytes")
    with driver.story.step("asleep"):
        await asyncio.sleep(ASLEEP_S)
    reply = await driver.send("wake", WakeInstance(*NAMES), "pid")
    woken = await driver.stat(launch=2)
    driver.story.tell("the guest remembers", remembered(awake, woken, reply))
    await driver.echo("traffic after wake", seeded.guest_ip)
    await driver.send("stop", StopInstance(*NAMES), "rung")
    await driver.send("destroy", DestroyInstance(*NAMES, wipe_volumes=True), "volumes")
    await driver.send("network down", TeardownNetwork(REF.tenant_id, seeded.net))


def remembered(awake: dict[str, Any], woken: dict[str, Any], reply: dict[str, Any]) -> str:
    """Check that the woken guest is the one that slept, with its clock right; says so."""
    if woken["boot_id"] != awake["boot_id"]:
        raise DemoFailed("the woken guest has another boot id: it was booted, not woken")
    if woken["counter"] <= awake["counter"]:
        raise DemoFailed(f"counter {woken['counter']} after wake, {awake['counter']} before sleep")
    if faults := {k: v for k, v in reply["detail"].items() if k.endswith("_failed")}:
        raise DemoFailed(f"the guest was not told of its wake: {faults}")
    facts = f"counter {awake['counter']} -> {woken['counter']}, same boot id"
    if "unix_nanos" in woken:
        off_s = abs(woken["unix_nanos"] / 1e9 - time.time())
        if off_s > 1:
            raise DemoFailed(f"the woken guest's clock is {off_s:.1f} s off: {reply['detail']}")
        facts += f", clock within {off_s * 1000:.0f} ms"
        facts += f" (was {reply['detail']['clock_was_off_s']:+.3f} s off)"
    return facts


def seed_of(build: str, guest: str) -> Seed:
    directory = f"{build}/guests/{guest}"
    names = ("vmlinux", "rootfs.ext4", "initrd")
    artifacts = {n: f"{directory}/{n}" for n in names if os.path.exists(f"{directory}/{n}")}
    if "vmlinux" not in artifacts:
        raise DemoFailed(f"no guest in {directory}: run make setup")
    return Seed(
        ref=REF,
        net_id=NET_ID,
        artifacts=artifacts,
        mem_mib=MEM_MIB,
        data_disk_mib=16,
        offset=5,
        secrets=b'{"token": "for the demo"}',
    )
