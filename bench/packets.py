"""What a guest's packet costs on its way through the host's rules, with few tenants and with many.

Two hosts, each a network namespace of its own with hostd's real rules: one with one tenant and one
pinned port, one with many. A frame is written to a TAP, goes through bridge, filter and NAT to a
socket in the namespace outside, and back; the kernel does all of that within the call that sends,
so the time of the call is the cost of the way. Batches alternate between the two hosts.
"""

import asyncio
import os
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from bench.report.budgets import within_percent
from bench.report.rows import Measured, row
from tests.kernel.net.frames import IPV4, ethernet, udp
from tests.kernel.net.netns import INTERNET, VNET_HDR, HostNet, TapGuest, udp_socket
from tests.kernel.net.plans import GuestPlan, net_of, plug_in, set_up

ROUNDS = 60
BATCH = 100
TENANTS, PINS = 500, 5000
FIRST_OFFSET = 2
PORT = 9000
FIRST_PORT = 10_000
PAYLOAD = bytes(100)
PERCENT = 5.0


@dataclass
class Way:
    """The first tenant's first guest, and who answers it outside."""

    net: HostNet
    plan: GuestPlan
    guest: TapGuest
    outside: socket.socket
    out_us: list[float] = field(default_factory=list[float])
    back_us: list[float] = field(default_factory=list[float])
    new_us: list[float] = field(default_factory=list[float])

    def frame(self, port: int) -> bytes:
        packet = udp(self.plan.ip, INTERNET, port, PORT, PAYLOAD)
        return VNET_HDR + ethernet(self.plan.mac, self.plan.gateway_mac, IPV4, packet)

    def send(self, frames: list[bytes]) -> float:
        """Microseconds per frame; each must have arrived."""
        descriptor = self.guest.descriptor
        began = time.perf_counter_ns()
        for frame in frames:
            os.write(descriptor, frame)
        took_us = (time.perf_counter_ns() - began) / 1e3 / len(frames)
        for _ in frames:
            self.peer = self.outside.recvfrom(2048)[1]
        return took_us

    def answer(self, count: int) -> float:
        """Microseconds per answer to the last sender; each must have arrived."""
        began = time.perf_counter_ns()
        for _ in range(count):
            self.outside.sendto(PAYLOAD, self.peer)
        took_us = (time.perf_counter_ns() - began) / 1e3 / count
        arrived = 0
        os.set_blocking(self.guest.descriptor, False)
        try:
            while True:
                arrived += PAYLOAD in os.read(self.guest.descriptor, 4096)
        except BlockingIOError:
            os.set_blocking(self.guest.descriptor, True)
        if arrived < count:
            raise RuntimeError(f"{arrived} of {count} answers reached the guest")
        return took_us

    def measure(self, number: int) -> None:
        self.out_us.append(self.send([self.frame(FIRST_PORT)] * BATCH))
        self.back_us.append(self.answer(BATCH))
        first = FIRST_PORT + 1 + number * BATCH
        self.new_us.append(self.send([self.frame(first + port) for port in range(BATCH)]))


async def measure(rounds: int = ROUNDS) -> Measured:
    """The many as hostd's number, the one as the raw one."""
    with ExitStack() as stack:
        one = await way(stack.enter_context(HostNet()), 1, 1)
        many = await way(stack.enter_context(HostNet()), TENANTS, PINS)
        for number in range(rounds + 1):
            for each in (one, many) if number % 2 else (many, one):
                await asyncio.to_thread(each.measure, number)
            if number == 0:
                for each in (one, many):
                    each.out_us.clear()
                    each.back_us.clear()
                    each.new_us.clear()
        for each in (one, many):
            os.close(each.guest.descriptor)
            each.outside.close()
    budget = within_percent(PERCENT)
    against = f"{TENANTS} tenants, {PINS:,} pins against 1"
    return Measured(
        [
            row(f"guest's packet out, {against}", "µs", many.out_us, one.out_us, budget=budget),
            row(f"its answer back, {against}", "µs", many.back_us, one.back_us, budget=budget),
            row(f"first packet of a flow, {against}", "µs", many.new_us, one.new_us, budget=budget),
        ]
    )


async def way(net: HostNet, tenants: int, pins: int) -> Way:
    """A host with so many networks and pins, the guest that is measured among them."""
    each = pins // tenants
    for number in range(1, tenants + 1):
        tenant, tenant_net = f"t-{number}", net_of(number)
        await set_up(net, tenant, tenant_net)
        for offset in range(FIRST_OFFSET, FIRST_OFFSET + each):
            await net.mechanisms.pins.ensure(GuestPlan(tenant, tenant_net, offset).pin)
    middle = (tenants + 1) // 2
    plan = GuestPlan(f"t-{middle}", net_of(middle), FIRST_OFFSET)
    await plug_in(net, plan)
    guest = TapGuest(net, plan.tap)
    return Way(net, plan, guest, udp_socket(net.outside, PORT, INTERNET))
