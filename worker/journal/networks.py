"""All tenants' networks in memory, by tenant, net id and subnet."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Iterator
from ipaddress import IPv4Network

from schemas import naming
from schemas.records import NetworkRecord

Subnet = tuple[int, int]
"""First address and length of the prefix."""


class Networks:
    """A subnet is compared with those that can overlap it: two overlap if one is within the other,
    so with its own prefixes, and with those that begin within it."""

    def __init__(self) -> None:
        self._records: dict[str, NetworkRecord] = {}
        self._by_id: dict[int, str] = {}
        self._by_subnet: dict[Subnet, set[str]] = {}
        self._subnets: list[Subnet] = []
        self.address_count = 0
        """How many addresses all of them have for instances."""

    def __len__(self) -> int:
        return len(self._records)

    def put(self, record: NetworkRecord) -> None:
        subnet = _subnet_of(record)
        self.drop(record.tenant_id)
        self._records[record.tenant_id] = record
        self._by_id[record.net.tenant_net_id] = record.tenant_id
        if subnet not in self._by_subnet:
            insort(self._subnets, subnet)
        self._by_subnet.setdefault(subnet, set()).add(record.tenant_id)
        self.address_count += naming.address_count(record.net)

    def drop(self, tenant_id: str) -> None:
        """Absent is success."""
        old = self._records.pop(tenant_id, None)
        if old is None:
            return
        if self._by_id.get(old.net.tenant_net_id) == tenant_id:
            del self._by_id[old.net.tenant_net_id]
        self.address_count -= naming.address_count(old.net)
        subnet = _subnet_of(old)
        self._by_subnet[subnet].discard(tenant_id)
        if not self._by_subnet[subnet]:
            del self._by_subnet[subnet], self._subnets[bisect_left(self._subnets, subnet)]

    def get(self, tenant_id: str) -> NetworkRecord | None:
        return self._records.get(tenant_id)

    def all(self) -> Collection[NetworkRecord]:
        return self._records.values()

    def with_id(self, tenant_net_id: int) -> NetworkRecord | None:
        tenant_id = self._by_id.get(tenant_net_id)
        return None if tenant_id is None else self._records[tenant_id]

    def overlapping(self, subnet: IPv4Network) -> list[NetworkRecord]:
        """Those that have an address in common with the subnet."""
        tenants = (each for found in self._found(subnet) for each in self._by_subnet[found])
        return [self._records[each] for each in tenants]

    def _found(self, subnet: IPv4Network) -> Iterator[Subnet]:
        first, last, length = int(subnet[0]), int(subnet[-1]), subnet.prefixlen
        for shorter in range(length):
            around = first >> (32 - shorter) << (32 - shorter), shorter
            if around in self._by_subnet:
                yield around
        begin = bisect_left(self._subnets, (first, length))
        yield from self._subnets[begin : bisect_right(self._subnets, (last, 32))]


def _subnet_of(record: NetworkRecord) -> Subnet:
    network = naming.subnet_of(record.net.ipv4_subnet)
    return int(network.network_address), network.prefixlen
