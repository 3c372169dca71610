"""A live host with an instance, whose metrics are scraped."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final

from schemas.requests import StartInstance
from tests.live_host import LiveHost, live_host
from tests.vm.whole_host.shared_host import ref_of

LISTEN: Final = "127.0.0.1:9464"
REF: Final = ref_of("scraped")
NAMES: Final = (REF.tenant_id, REF.pool_id, REF.instance_id)


@asynccontextmanager
async def scraped_host(**limits: Any) -> AsyncGenerator[LiveHost]:
    """With a network and a running instance."""
    async with live_host(metrics=LISTEN, warm_pool=1, **limits) as made:
        seeded = made.seed(REF, offset=5, mem_mib=32)
        assert (await made.net_up(seeded))["code"] == "ok"
        assert (await made.run(StartInstance(*NAMES)))["code"] == "ok"
        yield made
