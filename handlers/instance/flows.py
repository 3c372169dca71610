"""The tracked connections of a guest's address, which end after the guest does."""

from typing import ClassVar

from handlers.interfaces import Host
from handlers.mechanism import Durability


class Flows:
    """Flows by guest address. Only ever removed: guests make them.

    To find those of one address the kernel walks its whole table, 10 ms also when that is empty. A
    Stop leaves it for after its outcome (`Done.deferred`): the guest is gone, so nothing uses its
    flows, and whatever starts at the address flushes it first.
    """

    name: ClassVar[str] = "flow"
    durability: ClassVar[Durability] = Durability.VOLATILE
    swept: ClassVar[bool] = True

    def __init__(self, host: Host) -> None:
        self._host = host

    async def exists(self, key: str) -> bool:  # noqa: ARG002 - as expensive as to remove them
        return True

    async def remove(self, key: str) -> None:
        await self._host.networks.flush_conntrack(key)
