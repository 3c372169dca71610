"""What tests ask of the live host that a module shares, and names for what they make on it."""

from typing import Any

from schemas.requests import InstanceRef
from tests.live_host import LiveHost
from tests.plain import unpacked


async def events(host: LiveHost) -> list[dict[str, Any]]:
    """All events so far, in the stream's order."""
    return [unpacked(data) for _, _, data in await host.kept(host.subjects.events_stream)]


def ref_of(name: str, tenant: str = "acme") -> InstanceRef:
    """An instance in a pool of its own."""
    return InstanceRef(tenant, f"pool-{name}", name)
