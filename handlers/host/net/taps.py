"""TAPs: the guest's end of its tenant's bridge, persistent, owned by the jail's uid.

A TAP without owner could be opened by any jail. The port learns nothing: the guest's MAC is a
static entry of the bridge's FDB and its address a permanent neighbour, so a guest that is still
booting causes no ARP retries and a spoofing one changes no table.
"""

import asyncio
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import ClassVar

from handlers.claims.unrecorded import TapOwner
from handlers.errors import Conflict, Failure, HostFault, Unavailable, of_os_error
from handlers.host.linux.kernel_thread import CALL_S, no_namespace
from handlers.host.net.bridges import GATEWAY_OFFSET
from handlers.host.net.rtnetlink import Kernel, Netlink
from handlers.host.net.rtnetlink_messages import PORT
from handlers.host.net.rtnetlink_reader import IFLA_TUN_OWNER, IFLA_TUN_PERSIST, Link
from handlers.host.net.sysctl import ensure_sysctl
from handlers.mechanism import Durability
from handlers.specs import TapSpec, TapTraffic
from schemas import naming

# linux/if_tun.h
TUN_DEVICE = "/dev/net/tun"
TUNSETIFF, TUNSETPERSIST, TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x8000
FLAGS = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
CLOSE_THREADS = 8  # closes overlap in the kernel: 8 take 30 ms together, 15 to 20 ms each alone


class Taps:
    """TAPs by interface name. `ensure` is true if anything was created or repaired.

    Source: Documentation/networking/tuntap.rst, bridge(8). Needs: CAP_NET_ADMIN, /dev/net/tun.

    Args:
        isolate_guests: set the port's `isolated` flag: the guests of a tenant cannot talk.
        enter: as that of `netlink`, for threads of its own.
    """

    name: ClassVar[str] = "tap"
    durability: ClassVar[Durability] = Durability.VOLATILE
    swept: ClassVar[bool] = True

    def __init__(
        self,
        netlink: Netlink,
        *,
        isolate_guests: bool,
        enter: Callable[[], None] = no_namespace,
    ) -> None:
        self._netlink = netlink
        self._isolate = isolate_guests
        self._closers = ThreadPoolExecutor(CLOSE_THREADS, "close-tap", initializer=enter)
        self._closing: dict[str, asyncio.Future[None]] = {}

    def close(self) -> None:
        """End the threads, once the kernel has deleted what was released."""
        self._closers.shutdown()

    async def exists(self, key: str) -> bool:
        """A TAP that was released does not exist: nothing can use it, or keep it."""
        if key in self._closing:
            return False
        return await self._netlink.run(lambda kernel: own_tap(kernel, key) is not None)

    async def ensure(self, spec: TapSpec) -> bool:
        """Make or repair the TAP, read everything back; its rules and pins must be there already.

        Raises:
            Conflict: another interface has the name, which is not changed; the tenant's bridge
                does not exist; a process of another uid still has the TAP open.
            HostFault: the read-back differs from what was set.
        """
        await self._closed(spec.key)
        return await self._netlink.run(
            lambda kernel: ensure_tap(kernel, spec, isolate=self._isolate)
        )

    async def remove(self, key: str) -> None:
        """Delete the TAP, its FDB entry and neighbour; an interface that is not hostd's stays.

        By a release, so that other netlink work does not wait for the kernel's readers; what that
        could not delete is deleted here, or raises.
        """
        await self.release(key)
        await self._closed(key)
        await self._netlink.run(lambda kernel: delete_tap(kernel, key))

    async def release(self, key: str) -> None:
        """As `remove`, without the 10 to 30 ms that the kernel waits for its readers (ADR 0941).

        On return no frame can come from it, no process can attach to it, whatever its uid, and it
        will be gone whatever happens to this one: hostd holds its only queue, and the kernel
        deletes it when that descriptor is closed.
        """

        def seize(kernel: Kernel) -> Future[None] | None:
            seized = seize_tap(kernel, key)
            return None if seized is None else self._closers.submit(end_tap, seized)

        def closed(closing: asyncio.Future[None]) -> None:
            self._closing.pop(key, None)
            if not closing.cancelled():
                closing.exception()  # what is still there is found by whoever looks for it

        await self._closed(key)
        submitted = await self._netlink.run(seize)
        if submitted is not None:
            closing = self._closing[key] = asyncio.wrap_future(submitted)
            closing.add_done_callback(closed)

    async def remove_unused(self, key: str) -> None:
        """As `remove`, but of a TAP that a process has open: Conflict, and nothing is changed."""

        def seize(kernel: Kernel) -> Future[None] | None:
            if (link := own_tap(kernel, key)) is None:
                return None
            descriptor = open_tap(key, FLAGS)  # its only queue: nobody else can attach now
            try:
                kernel.unwanted.add(key)
                delete_neighbours(kernel, key)
                tap_ioctl(descriptor, TUNSETPERSIST, 0, f"cannot end the persistence of TAP {key}")
            except BaseException:
                os.close(descriptor)
                raise
            return self._closers.submit(end_tap, SeizedTap(key, link.index, descriptor))

        if (ended := await self._netlink.run(seize)) is not None:
            await asyncio.wrap_future(ended)

    async def settle(self, tenant_net_id: int) -> None:
        """Return when no TAP of the network that was released is left."""
        prefix = naming.tap_name_prefix(tenant_net_id)
        for key in [key for key in self._closing if key.startswith(prefix)]:
            await self._closed(key)

    async def traffic(self, key: str) -> TapTraffic | None:
        """What its guest sent and received since it was made; None if it is gone or not hostd's.

        The kernel counts from the host's side: what the guest sends, the TAP receives.
        """

        def counted(kernel: Kernel) -> TapTraffic | None:
            if own_tap(kernel, key) is None or (counters := kernel.counters(key)) is None:
                return None
            return TapTraffic(
                sent_bytes=counters.rx_bytes,
                sent_packets=counters.rx_packets,
                received_bytes=counters.tx_bytes,
                received_packets=counters.tx_packets,
            )

        return None if key in self._closing else await self._netlink.run(counted)

    async def owners(self) -> dict[str, TapOwner]:
        """All TAPs with hostd's alias; those that were released are gone."""

        def listed(kernel: Kernel) -> dict[str, TapOwner]:
            return {
                link.name: TapOwner(
                    link.alias.removeprefix(naming.ALIAS_PREFIX), link.info.get(IFLA_TUN_OWNER, -1)
                )
                for link in kernel.links(kind="tun")
                if link.alias.startswith(naming.ALIAS_PREFIX)
            }

        found = await self._netlink.run(listed)
        return {name: owner for name, owner in found.items() if name not in self._closing}

    async def _closed(self, key: str) -> None:
        """Raises Unavailable: the kernel has not deleted it in the time of a call."""
        closing = self._closing.get(key)
        if closing is not None and not (await asyncio.wait({closing}, timeout=CALL_S))[0]:
            raise Unavailable(f"TAP {key} was released and is still being deleted: try again")


def own_tap(kernel: Kernel, name: str) -> Link | None:
    link = kernel.link(name)
    if link is None or link.kind != "tun" or not link.alias.startswith(naming.ALIAS_PREFIX):
        return None
    return link


def ensure_tap(kernel: Kernel, spec: TapSpec, *, isolate: bool) -> bool:
    kernel.unwanted.discard(spec.name)
    kernel.flushed.discard(spec.guest_ip)
    bridge = kernel.link(spec.bridge)
    if bridge is None or bridge.kind != "bridge":
        raise Conflict(f"the tenant's network is not set up: there is no bridge {spec.bridge}")
    link = kernel.link(spec.name)
    if link is not None and (link.kind != "tun" or link.alias != spec.alias):
        raise Conflict(
            f"interface {spec.name} exists and is not this instance's TAP: expected kind 'tun' with"
            f" alias {spec.alias!r}, found {link.kind!r} with {link.alias!r}"
        )
    if link is None:
        create_tap(kernel, spec, bridge, isolate=isolate)
        changed = True
    else:
        changed = set_owner(link, spec)
        changed = converge_tap(kernel, link, spec, bridge, isolate=isolate) or changed
    try:
        verify_tap(kernel, spec, bridge, isolate=isolate)
    except Failure:
        if link is None:
            remove_tap(kernel, spec.name)
        raise
    return changed


def create_tap(kernel: Kernel, spec: TapSpec, bridge: Link, *, isolate: bool) -> None:
    """Create it; it becomes persistent last, so that a crash before that leaves nothing behind."""
    descriptor = open_tap(spec.name, FLAGS | IFF_TUN_EXCL)
    try:
        index = kernel.existing_link(spec.name).index
        ensure_sysctl(f"ipv6/conf/{spec.name}/disable_ipv6", "1")
        with kernel.together():
            kernel.set_link(index, ifalias=spec.alias, master=bridge.index)
            kernel.set_port(index, **port_settings(isolate=isolate))
            kernel.add_static_fdb(index, spec.mac)
            kernel.add_neighbour(bridge.index, spec.guest_ip, spec.mac)
            kernel.set_link(index, state="up")
        make_persistent(descriptor, spec)
    finally:
        os.close(descriptor)


def set_owner(link: Link, spec: TapSpec) -> bool:
    """Give an existing TAP to the launch's uid; no process may have it open meanwhile."""
    owner, persists = link.info.get(IFLA_TUN_OWNER), link.info.get(IFLA_TUN_PERSIST)
    if owner == spec.owner_uid and persists:
        return False
    descriptor = open_tap(spec.name, FLAGS)
    try:
        make_persistent(descriptor, spec)
    finally:
        os.close(descriptor)
    return True


def converge_tap(kernel: Kernel, link: Link, spec: TapSpec, bridge: Link, *, isolate: bool) -> bool:
    """Change what differs; the TAP goes up last."""
    changed = ensure_sysctl(f"ipv6/conf/{link.name}/disable_ipv6", "1")
    if link.master != bridge.index:
        kernel.set_link(link.index, master=bridge.index)
        changed = True
    wanted = port_flags(isolate=isolate)
    port = kernel.existing_link(spec.name).port
    if any(port.get(flag) != value for flag, value in wanted.items()):
        kernel.set_port(link.index, **port_settings(isolate=isolate))
        changed = True
    if not kernel.has_static_fdb(link.index, spec.mac):
        kernel.add_static_fdb(link.index, spec.mac)
        changed = True
    if kernel.neighbour(bridge.index, spec.guest_ip) != spec.mac:
        kernel.add_neighbour(bridge.index, spec.guest_ip, spec.mac)
        changed = True
    if not link.up:
        kernel.set_link(link.index, state="up")
        changed = True
    return changed


def port_settings(*, isolate: bool) -> dict[str, int]:
    """What a guest's port is set to, by the names of `rtnetlink_messages.PORT`."""
    return {"isolated": int(isolate), "learning": 0, "unicast_flood": 0}


def port_flags(*, isolate: bool) -> dict[int, int]:
    """The same as the kernel reports it."""
    return {PORT[name]: value for name, value in port_settings(isolate=isolate).items()}


def verify_tap(kernel: Kernel, spec: TapSpec, bridge: Link, *, isolate: bool) -> None:
    link = kernel.existing_link(spec.name)
    checks = {
        "alias": link.alias == spec.alias,
        "owner": link.info.get(IFLA_TUN_OWNER) == spec.owner_uid,
        "persistence": link.info.get(IFLA_TUN_PERSIST) == 1,
        "master": link.master == bridge.index,
        "flags": all(link.port.get(f) == v for f, v in port_flags(isolate=isolate).items()),
        "FDB entry": kernel.has_static_fdb(link.index, spec.mac),
        "neighbour": kernel.neighbour(bridge.index, spec.guest_ip) == spec.mac,
        "up": link.up,
    }
    if wrong := [fact for fact, ok in checks.items() if not ok]:
        raise HostFault(f"TAP {spec.name} read-back mismatch: {', '.join(wrong)}")


def remove_tap(kernel: Kernel, name: str) -> None:
    kernel.unwanted.add(name)
    delete_neighbours(kernel, name)
    delete_tap(kernel, name)


def delete_tap(kernel: Kernel, name: str) -> None:
    if (link := own_tap(kernel, name)) is not None:
        kernel.delete_link(link.index)


@dataclass(frozen=True, slots=True)
class SeizedTap:
    """A TAP that ends with its one descriptor."""

    name: str
    index: int
    descriptor: int


def seize_tap(kernel: Kernel, name: str) -> SeizedTap | None:
    """Attach to a TAP and have it end with the descriptor; None: it is gone."""
    kernel.unwanted.add(name)
    delete_neighbours(kernel, name)
    link = own_tap(kernel, name)
    if link is None:
        return None
    try:
        descriptor = open_tap(name, FLAGS)
    except Conflict:  # a process has it open
        kernel.delete_link(link.index)
        return None
    try:
        now = kernel.link(name)
        if now is not None and now.index == link.index:
            tap_ioctl(descriptor, TUNSETPERSIST, 0, f"cannot end the persistence of TAP {name}")
    except BaseException:
        os.close(descriptor)
        raise
    return SeizedTap(name, link.index, descriptor)


def end_tap(tap: SeizedTap) -> None:
    """Close it, in any thread of its namespace; blocks until the kernel has deleted the TAP.

    A child that another thread is just spawning has a copy of the descriptor until it executes, so
    the last one may not be ours.
    """
    os.close(tap.descriptor)
    try:
        left = socket.if_nametoindex(tap.name) == tap.index
    except OSError:
        return
    if left:
        kernel = Kernel()
        try:
            kernel.delete_link(tap.index)
        finally:
            kernel.close()


def delete_neighbours(kernel: Kernel, name: str) -> None:
    """The bridge's permanent entry of the TAP's guest; it does not go with the port."""
    match = naming.TAP_NAME_PATTERN.fullmatch(name)
    bridge = None if match is None else kernel.link(naming.bridge_name(int(match[1])))
    if match is None or bridge is None:
        return
    offset = int(match[2])
    mac = naming.mac_address(int(match[1]), offset)
    gateways = kernel.addresses(bridge.index)
    if not gateways:  # the bridge was damaged: look through all of its neighbours
        neighbours = kernel.permanent_neighbours(bridge.index)
        guests = [address for address, owner in neighbours.items() if owner == mac]
    else:
        of_offset = (IPv4Address(each.address) - GATEWAY_OFFSET + offset for each in gateways)
        guests = [
            each for each in map(str, of_offset) if kernel.neighbour(bridge.index, each) == mac
        ]
    for address in guests:
        kernel.delete_neighbour(bridge.index, address)


def open_tap(name: str, flags: int) -> int:
    """A descriptor of the TAP. With IFF_TUN_EXCL an existing one is EBUSY, never shared."""
    try:
        descriptor = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise of_os_error(error, f"cannot open {TUN_DEVICE}") from error
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError as error:
        os.close(descriptor)
        if error.errno == errno.EBUSY:
            raise Conflict(f"TAP {name} is in use by another process") from error
        raise of_os_error(error, f"cannot attach to TAP {name}") from error
    return descriptor


def make_persistent(descriptor: int, spec: TapSpec) -> None:
    """Set the owner, then persistence: a persistent TAP always has its owner."""
    what = f"of TAP {spec.name}"
    tap_ioctl(descriptor, TUNSETOWNER, spec.owner_uid, f"cannot set the owner {what}")
    tap_ioctl(descriptor, TUNSETPERSIST, 1, f"cannot set the persistence {what}")


def tap_ioctl(descriptor: int, request: int, value: int, what: str) -> None:
    try:
        fcntl.ioctl(descriptor, request, value)
    except OSError as error:
        raise of_os_error(error, what) from error
