"""Tenants that send mixed commands to their instances and networks, and note what they sent."""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from schemas import codec
from schemas.envelopes import Command
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
from schemas.subjects import Lane
from tests.live_host import LiveHost
from worker.cli.seed import Seeded

TENANTS, INSTANCES = 3, 2
NET_ID = 20
ANSWERED_S = 180.0  # the longest that a command may be without an answer, faults included
AT_ONCE = 0.3  # how often a command is not waited for before the next one of its instance
COPIES = 0.2  # how often a second copy is sent


@dataclass
class Ledger:
    """The ids of all commands that the stream took, by request; and those unanswered too long."""

    sent: dict[str, Request] = field(default_factory=dict[str, Request])
    copies: int = 0
    unanswered: list[str] = field(default_factory=list[str])


@dataclass
class Load:
    """The drivers. They stop at the end of their command once `ending` is set."""

    host: LiveHost
    dice: random.Random
    ledger: Ledger = field(default_factory=Ledger)
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    seeded: dict[str, Seeded] = field(default_factory=dict[str, Seeded])

    def refs(self) -> list[InstanceRef]:
        return [
            InstanceRef(f"t{tenant}", "web", f"i-{n}")
            for tenant in range(TENANTS)
            for n in range(INSTANCES)
        ]

    def seed(self, ref: InstanceRef) -> None:
        """Agentd's files of an instance; those that are there are kept."""
        net_id = NET_ID + int(ref.tenant_id[1:])
        self.seeded[ref.tenant_id] = self.host.seed(ref, net_id=net_id)

    async def run(self) -> None:
        """Until `ending`: one driver per instance, and one per network."""
        for ref in self.refs():
            self.seed(ref)
        for tenant_id, seeded in self.seeded.items():
            await self.answered(SetupNetwork(tenant_id, seeded.net))
        async with asyncio.TaskGroup() as group:
            for ref in self.refs():
                group.create_task(self.drive_instance(ref))
            for tenant_id in self.seeded:
                group.create_task(self.drive_network(tenant_id))

    async def drive_instance(self, ref: InstanceRef) -> None:
        names = (ref.tenant_id, ref.pool_id, ref.instance_id)
        choices: Sequence[tuple[int, Callable[[], Request]]] = (
            (5, lambda: StartInstance(*names)),
            (3, lambda: SleepInstance(*names, force=False, drain_timeout_secs=2)),
            (1, lambda: SleepInstance(*names, force=True)),
            (4, lambda: WakeInstance(*names)),
            (2, lambda: StopInstance(*names)),
            (1, lambda: DestroyInstance(*names, wipe_volumes=self.dice.random() < 0.5)),
        )
        weights = [weight for weight, _ in choices]
        open_ids: list[str] = []
        while not self.ending.is_set():
            ((_, make),) = self.dice.choices(choices, weights)
            request = make()
            open_ids.append(await self.send(request))
            if isinstance(request, DestroyInstance) or self.dice.random() > AT_ONCE:
                await self.answers(open_ids)
                open_ids.clear()
            if isinstance(request, DestroyInstance):
                self.seed(ref)
        await self.answers(open_ids)

    async def drive_network(self, tenant_id: str) -> None:
        net = self.seeded[tenant_id].net
        while not self.ending.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ending.wait(), self.dice.uniform(3, 10))
            await self.answered(TeardownNetwork(tenant_id, net))
            await self.answered(SetupNetwork(tenant_id, net))

    async def end(self) -> None:
        """Remove all instances and networks; each command has to succeed."""
        for ref in self.refs():
            names = (ref.tenant_id, ref.pool_id, ref.instance_id)
            await self.answered(DestroyInstance(*names, wipe_volumes=True))
        for tenant_id, seeded in self.seeded.items():
            await self.answered(TeardownNetwork(tenant_id, seeded.net))

    async def answered(self, request: Request) -> None:
        await self.answers([await self.send(request)])

    async def send(self, request: Request) -> str:
        """Publish it until the stream has it, at times a copy more; every copy has the same ID."""
        command_id = f"soak-{len(self.ledger.sent)}"
        self.ledger.sent[command_id] = request
        for _ in range(2 if self.dice.random() < COPIES else 1):
            await self.publish(Command(id=command_id, request=request))
        return command_id

    async def publish(self, command: Command) -> None:
        subject = self.host.subjects.command(Lane.of_request(command.request))
        async with asyncio.timeout(ANSWERED_S):
            while True:
                with contextlib.suppress(Exception):
                    async with self.host.client() as client:
                        data = codec.encode_command(command)
                        await client.nats.jetstream().publish(subject, data, timeout=5)
                        return
                self.ledger.copies += 1
                await asyncio.sleep(0.2)

    async def answers(self, command_ids: Sequence[str]) -> None:
        """Wait until the worker has an outcome for each, whatever happens to it meanwhile."""
        for command_id in command_ids:
            try:
                async with asyncio.timeout(ANSWERED_S):
                    while not await self.is_done(command_id):
                        await asyncio.sleep(0.2)
            except TimeoutError:
                self.ledger.unanswered.append(command_id)

    async def is_done(self, command_id: str) -> bool:
        with contextlib.suppress(Exception):
            async with self.host.client() as client:
                answer = await client.ask(self.host.settings.host.id, "result", {"id": command_id})
                return bool(answer["state"] == "done")
        return False
